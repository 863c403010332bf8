"""The captions of `mini-wan`: what a scene consists of, how it is told in words, how words become token ids.

A scene has two or three shapes of different colours, each with a form, texture, size, direction and either
drift or tumble (drift and turn), a depth relation between neighbours in the caption, and a textured
background that slides. ::

    a small striped red ring drifts left behind a large blue square tumbling up over a dotted brown background
    sliding right
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta", "white")
FORMS = ("disc", "ring", "square", "triangle", "cross")
TEXTURES = ("plain", "striped", "checkered", "dotted")
SIZES = ("small", "large")
DIRECTIONS = ("left", "right", "up", "down")
BACK_COLOURS = ("grey", "brown", "navy", "teal", "plum", "olive")
BACK_TEXTURES = ("striped", "checkered", "dotted", "cloudy")
RELATIONS = ("behind", "in front of")
VERBS = (("drifts", "tumbles"), ("drifting", "tumbling"))  # first shape of a caption, later ones

PAD, EOS, UNK = 0, 1, 2
SPECIAL = ("<pad>", "</s>", "<unk>")
MAX_SHAPES = 3
TOKENS = 40  # no caption is longer: 7 + 10 + 10 words of shapes, 7 of background, </s>
HELDOUT = Path(__file__).with_name("heldout.json")


def vocabulary() -> dict[str, int]:
    """Word -> token id; the three special tokens come first."""
    words = [*COLOURS, *FORMS, *TEXTURES, *SIZES, *DIRECTIONS, *BACK_COLOURS, "cloudy", *VERBS[0], *VERBS[1]]
    words += ["behind", "in", "front", "of", "a", "over", "background", "sliding"]
    return {word: index for index, word in enumerate([*SPECIAL, *words])}


@dataclass
class Scenes:
    """Labels of N scenes, int64 on the CPU. Per shape `[N, 3]` (the third counts only where `count` is 3)."""

    count: Tensor  # [N], 2 or 3
    colour: Tensor
    form: Tensor
    texture: Tensor
    size: Tensor
    direction: Tensor
    tumble: Tensor
    relation: Tensor  # [N, 2]: of shape 0 to shape 1, of shape 1 to shape 2
    back: Tensor  # [N, 3]: colour, texture, direction
    said: Tensor  # [N, 10] bool: size, texture, motion of each shape; the background

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, index: Tensor | slice) -> Scenes:
        return Scenes(**{name: value[index] for name, value in vars(self).items()})


def sample(n: int, generator: torch.Generator, exclude: Tensor | None = None) -> Scenes:
    """Draw N scenes without the pairs of shapes in `exclude`, `[M, 4]` as of :func:`heldout_pairs`.

    Adjectives and the background are left out of some captions, so that short prompts are understood too.
    """

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, (n, *shape), generator=generator)

    scenes = Scenes(
        count=2 + (torch.rand(n, generator=generator) < 0.35).long(),
        colour=torch.rand(n, len(COLOURS), generator=generator).argsort(1)[:, :MAX_SHAPES],
        form=integers(len(FORMS), MAX_SHAPES),
        texture=integers(len(TEXTURES), MAX_SHAPES),
        size=integers(2, MAX_SHAPES),
        direction=integers(4, MAX_SHAPES),
        tumble=(torch.rand(n, MAX_SHAPES, generator=generator) < 0.4).long(),
        relation=integers(2, MAX_SHAPES - 1),
        back=torch.stack([integers(len(BACK_COLOURS)), integers(len(BACK_TEXTURES)), integers(4)], 1),
        said=torch.rand(n, 10, generator=generator) < 0.8,
    )
    if exclude is None or not len(exclude):
        return scenes
    bad = contains_pair(scenes, exclude)
    while bad.any():
        redrawn = sample(int(bad.sum()), generator)
        for name, value in vars(redrawn).items():
            getattr(scenes, name)[bad] = value
        bad = contains_pair(scenes, exclude)
    return scenes


def contains_pair(scenes: Scenes, pairs: Tensor) -> Tensor:
    """`[N]` bool: does the scene hold both (colour, form) and (colour, form) of some row of `pairs`?"""
    code = scenes.colour * len(FORMS) + scenes.form  # [N, 3]
    first, second = pairs[:, 0] * len(FORMS) + pairs[:, 1], pairs[:, 2] * len(FORMS) + pairs[:, 3]
    present = torch.arange(MAX_SHAPES) < scenes.count[:, None]
    holds_first = ((code[:, :, None] == first) & present[:, :, None]).any(1)
    holds_second = ((code[:, :, None] == second) & present[:, :, None]).any(1)
    return (holds_first & holds_second).any(1)


def caption(scenes: Scenes, index: int) -> str:
    """The caption of one scene."""
    said = scenes.said[index].tolist()
    parts = []
    for shape in range(int(scenes.count[index])):
        size, texture, motion = said[3 * shape : 3 * shape + 3]
        words = ["a"]
        if size:
            words.append(SIZES[int(scenes.size[index, shape])])
        if texture:
            words.append(TEXTURES[int(scenes.texture[index, shape])])
        words += [COLOURS[int(scenes.colour[index, shape])], FORMS[int(scenes.form[index, shape])]]
        if motion or shape == 0:
            words.append(VERBS[min(shape, 1)][int(scenes.tumble[index, shape])])
            words.append(DIRECTIONS[int(scenes.direction[index, shape])])
        if shape + 1 < int(scenes.count[index]):
            words.append(RELATIONS[int(scenes.relation[index, shape])])
        parts += words
    if said[9]:
        colour, texture, direction = scenes.back[index].tolist()
        parts += ["over a", BACK_TEXTURES[texture], BACK_COLOURS[colour], "background sliding"]
        parts.append(DIRECTIONS[direction])
    return " ".join(parts)


def encode(captions: list[str]) -> Tensor:
    """Token ids `[N, 40]` int64, padded with `<pad>`; the same ids as the pipeline's tokenizer gives."""
    words = vocabulary()
    ids = torch.full((len(captions), TOKENS), PAD)
    for row, text in zip(ids, captions, strict=True):
        tokens = [*[words.get(word, UNK) for word in text.lower().split()][: TOKENS - 1], EOS]
        row[: len(tokens)] = torch.tensor(tokens)
    return ids


def heldout() -> list[dict]:
    """The held-out prompts: `prompt`, `seed`, and `shapes` with the words that the judge looks for."""
    return json.loads(HELDOUT.read_text())


def heldout_pairs() -> Tensor:
    """`[M, 4]` int64: (colour, form, colour, form) of the first two shapes of each held-out prompt."""
    rows = []
    for entry in heldout():
        first, second = entry["shapes"][:2]
        rows.append(
            [
                COLOURS.index(first["colour"]),
                FORMS.index(first["form"]),
                COLOURS.index(second["colour"]),
                FORMS.index(second["form"]),
            ]
        )
    return torch.tensor(rows)
