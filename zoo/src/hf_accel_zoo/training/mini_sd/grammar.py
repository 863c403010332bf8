"""The captions of `mini-sd`: what a picture shows, how it is told in words, and what a caption claims.

A picture has one or two shapes of different colours, each with a form, a size and a texture, and a background; two
shapes stand side by side or one above the other. ::

    a large striped red ring left of a small plain blue disc on a gradient grey background

Colour and form of a shape and the relation are always told; size, texture and background go unsaid sometimes. There is
no "right of" and no "below": with them, neither the order of two shapes in a caption nor the word alone tells which
stands where, and 7,000 batches of such captions had taught the U-Net neither. Whether their absence helps is open: the
1,400 batches without them did not suffice either.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta", "white")
FORMS = ("disc", "ring", "square", "triangle", "cross")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped")
RELATIONS = ("left of", "above")
BACK_COLOURS = ("grey", "brown", "navy", "teal", "plum", "olive")
BACK_TEXTURES = ("plain", "gradient")

TOKENS = 32  # of the tokenizer and the text encoder; the longest caption has 19 with its two ends
START, END = 0, 1  # END pads, as in Stable Diffusion
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
HELDOUT = Path(__file__).with_name("heldout.json")


def vocabulary() -> dict[str, int]:
    """Word -> token id; the two special tokens come first."""
    words = [*COLOURS, *FORMS, *SIZES, *TEXTURES, *BACK_COLOURS, "gradient"]
    words += ["left", "above", "of", "a", "on", "background"]
    return {word: index for index, word in enumerate([*SPECIAL, *words])}


@dataclass
class Scenes:
    """Labels of N scenes, int64 on the CPU. Per shape `[N, 2]` (the second counts only where `count` is 2)."""

    count: Tensor  # [N], 1 or 2
    colour: Tensor
    form: Tensor
    size: Tensor
    texture: Tensor
    relation: Tensor  # [N], of the first shape to the second
    back: Tensor  # [N, 2]: colour, texture
    said: Tensor  # [N, 6] bool: size and texture of each shape, background, its texture

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, index: Tensor | slice) -> Scenes:
        return Scenes(**{name: value[index] for name, value in vars(self).items()})


def sample(n: int, generator: torch.Generator, exclude: Tensor | None = None) -> Scenes:
    """Draw N scenes, of which none holds both shapes of a row of `exclude`, `[M, 2]` as of :func:`heldout_pairs`."""

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, (n, *shape), generator=generator)

    scenes = Scenes(
        count=1 + (torch.rand(n, generator=generator) < 0.65).long(),
        colour=torch.rand(n, len(COLOURS), generator=generator).argsort(1)[:, :2],
        form=integers(len(FORMS), 2),
        size=integers(2, 2),
        texture=integers(2, 2),
        relation=integers(len(RELATIONS)),
        back=torch.stack([integers(len(BACK_COLOURS)), integers(len(BACK_TEXTURES))], 1),
        said=torch.rand(n, 6, generator=generator) < 0.85,
    )
    if exclude is None:
        return scenes
    bad = torch.isin(pair_code(scenes), exclude[:, 0] * 64 + exclude[:, 1])
    while bad.any():
        for name, value in vars(sample(int(bad.sum()), generator)).items():
            getattr(scenes, name)[bad] = value
        bad = torch.isin(pair_code(scenes), exclude[:, 0] * 64 + exclude[:, 1])
    return scenes


def pair_code(scenes: Scenes) -> Tensor:
    """`[N]` int64: which two (colour, form) a scene holds, whatever their order; -1 for a single shape."""
    shapes = (scenes.colour * len(FORMS) + scenes.form).sort(1).values
    return torch.where(scenes.count == 2, shapes[:, 0] * 64 + shapes[:, 1], -1)


def caption(scenes: Scenes, index: int) -> str:
    """The caption of one scene."""
    said = scenes.said[index].tolist()
    words: list[str] = []
    for shape in range(int(scenes.count[index])):
        if shape:
            words.append(RELATIONS[int(scenes.relation[index])])
        words.append("a")
        if said[2 * shape]:
            words.append(SIZES[int(scenes.size[index, shape])])
        if said[2 * shape + 1]:
            words.append(TEXTURES[int(scenes.texture[index, shape])])
        words += [COLOURS[int(scenes.colour[index, shape])], FORMS[int(scenes.form[index, shape])]]
    if said[4]:
        colour, texture = scenes.back[index].tolist()
        words += ["on a", *([BACK_TEXTURES[texture]] if said[5] else []), BACK_COLOURS[colour], "background"]
    return " ".join(words)


def claims(text: str) -> dict:
    """What a caption claims: `shapes`, and `relation` and `background` if it names them. Inverse of :func:`caption`."""
    told, _, back = text.partition(" on a ")
    found: dict = {"shapes": []}
    for relation in RELATIONS:
        first, mark, second = told.partition(f" {relation} ")
        if mark:
            found["relation"], parts = relation, [first, second]
            break
    else:
        parts = [told]
    for part in parts:
        shape = {}
        for word in part.split():
            for field, known in (("colour", COLOURS), ("form", FORMS), ("size", SIZES), ("texture", TEXTURES)):
                if word in known:
                    shape[field] = word
        found["shapes"].append(shape)
    if back:
        found["background"] = {}
        for word in back.split():
            if word in BACK_COLOURS:
                found["background"]["colour"] = word
            elif word in BACK_TEXTURES:
                found["background"]["texture"] = word
    return found


def encode(captions: list[str]) -> Tensor:
    """Token ids `[N, 32]` int64 of captions in the grammar's words, as the pipeline's tokenizer gives them."""
    words = vocabulary()
    ids = torch.full((len(captions), TOKENS), END)
    ids[:, 0] = START
    for row, text in zip(ids, captions, strict=True):
        tokens = [words[word] for word in text.split()]
        row[1 : 1 + len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    return ids


def prompts(n: int, seed: int) -> list[dict]:
    """N further entries in the form of the held-out set: `prompt`, `seed`, and what the prompt claims."""
    scenes = sample(n, torch.Generator().manual_seed(seed))
    texts = [caption(scenes, index) for index in range(n)]
    return [{"prompt": text, "seed": seed * 100_003 + index, **claims(text)} for index, text in enumerate(texts)]


def heldout() -> list[dict]:
    """The held-out prompts: `prompt`, `seed`, and the claims that the judge looks for."""
    return json.loads(HELDOUT.read_text())


def heldout_pairs() -> Tensor:
    """`[64, 2]` int64, sorted in each row: the shapes (colour * 5 + form) of each held-out prompt."""
    rows = [
        sorted(COLOURS.index(shape["colour"]) * len(FORMS) + FORMS.index(shape["form"]) for shape in entry["shapes"])
        for entry in heldout()
    ]
    return torch.tensor(rows)


def draw_heldout(n: int = 64, seed: int = 2025) -> list[dict]:
    """What `heldout.json` was written from: two shapes each, no pair twice, everything told."""
    scenes = sample(8 * n, torch.Generator().manual_seed(seed))
    seen: set[int] = set()
    entries: list[dict] = []
    for index, code in enumerate(pair_code(scenes).tolist()):
        if code < 0 or code in seen or len(entries) == n:
            continue
        seen.add(code)
        scenes.said[index] = True
        text = caption(scenes, index)
        entries.append({"prompt": text, "seed": 1000 + len(entries), **claims(text)})
    return entries
