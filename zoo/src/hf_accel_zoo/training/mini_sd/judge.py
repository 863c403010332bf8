"""Does a picture show what its caption says? A small classifier reads it: the stand-in for a CLIP score.

Trained on rendered pictures with their true labels, never on samples of the U-Net. It finds for each colour where a
shape of it is, and reads form, size and texture there; where the two named shapes are gives the relation. ::

    from hf_accel_zoo.training.mini_sd import judge

    judge.caption_accuracy(pictures, prompts)  # {"colour": 0.98, ..., "all": 0.97}

    python -m hf_accel_zoo.training.mini_sd.judge train
    python -m hf_accel_zoo.training.mini_sd.judge report --model zoo/src/hf_accel_zoo/mini-sd --out DIR
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import data, grammar

__all__ = ["Classifier", "caption_accuracy", "load", "prompts", "read"]

prompts = grammar.prompts
WEIGHTS = Path(__file__).with_name("classifier.safetensors")
ATTRIBUTES = ("colour", "form", "size", "texture", "relation", "background")
WIDTH = 48


class Classifier(nn.Module):
    """Pictures `[N, 3, 64, 64]` in 0..1 to logits. Per colour a map of 8 x 8 places says where a shape of it is."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, kernel, stride in ((3, 16, 5, 2), (16, 32, 3, 2), (32, WIDTH, 3, 2), (WIDTH, WIDTH, 3, 1)):
            layers += [nn.Conv2d(before, after, kernel, stride, kernel // 2), nn.GroupNorm(4, after), nn.SiLU()]
        self.features = nn.Sequential(*layers, nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.SiLU())
        self.where = nn.Conv2d(WIDTH, len(grammar.COLOURS), 1)
        self.shape = nn.Sequential(nn.Linear(2 * WIDTH, 64), nn.SiLU(), nn.Linear(64, len(grammar.FORMS) + 2 + 2))
        self.back = nn.Linear(WIDTH, len(grammar.BACK_COLOURS) + 2)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """`seen` `[N, 7]`, `form` `[N, 7, 5]`, `size`, `texture` `[N, 7, 2]`, `place` `[N, 7, 2]` (x, y in -1..1),
        `back_colour` `[N, 6]`, `back_texture` `[N, 2]`."""
        x = self.features(pictures * 4 - 2)
        where = self.where(x).flatten(2)  # [N, 7, 64]
        attention = where.softmax(-1)
        pixels = x.flatten(2).transpose(1, 2)  # [N, 64, C]
        spot = attention @ pixels
        peak = pixels.gather(1, where.argmax(-1)[..., None].expand(-1, -1, pixels.shape[-1]))
        form, size, texture = self.shape(torch.cat([spot, peak], -1)).split([len(grammar.FORMS), 2, 2], -1)
        side = pictures.shape[-1] // 8
        axis = (torch.arange(side, device=x.device) + 0.5) * (2 / side) - 1
        grid = torch.stack([axis.repeat(side), axis.repeat_interleave(side)], -1)
        back_colour, back_texture = self.back(pixels.mean(1)).split([len(grammar.BACK_COLOURS), 2], -1)
        return {
            "seen": where.logsumexp(-1) - 3,
            "form": form,
            "size": size,
            "texture": texture,
            "place": attention @ grid,
            "back_colour": back_colour,
            "back_texture": back_texture,
        }


def loss_of(out: dict[str, Tensor], scenes: grammar.Scenes, centres: Tensor) -> Tensor:
    """Sum of the heads' losses; `centres` `[N, 2, 2]` are the places of both shapes in -1..1."""
    present = torch.arange(2) < scenes.count[:, None]  # [N, 2]
    picture, shape = present.nonzero().unbind(1)
    colour = scenes.colour[picture, shape]
    seen = torch.zeros_like(out["seen"])
    seen[picture, colour] = 1
    loss = 3 * F.binary_cross_entropy_with_logits(out["seen"], seen)
    for name in ("form", "size", "texture"):
        loss = loss + F.cross_entropy(out[name][picture, colour], getattr(scenes, name)[picture, shape])
    loss = loss + 3 * F.mse_loss(out["place"][picture, colour], centres[picture, shape])
    loss = loss + F.cross_entropy(out["back_colour"], scenes.back[:, 0])
    return loss + F.cross_entropy(out["back_texture"], scenes.back[:, 1])


def train(steps: int, seed: int = 0) -> Classifier:
    """A classifier of rendered pictures, half of them blurred and noisy as an autoencoder's output is."""
    torch.manual_seed(seed)
    model, generator = Classifier(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-3)
    for step in range(steps):
        scenes = grammar.sample(64, generator)
        pictures, centres = data.render_with_places(scenes, generator, free=True)
        pictures = pictures / 2 + 0.5
        worn = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
        amount = torch.rand(64, 1, 1, 1, generator=generator) * (torch.rand(64, 1, 1, 1, generator=generator) < 0.5)
        pictures = pictures.lerp(worn, amount)
        pictures = pictures + 0.08 * amount * torch.randn(pictures.shape, generator=generator)
        loss = loss_of(model(pictures.clamp(0, 1)), scenes, centres / (data.SIDE / 2))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.param_groups[0]["lr"] = 3e-3 * min((step + 1) / 100, 1.0) * (1 - 0.98 * step / steps)
        optimizer.step()
        if step % 200 == 0:
            print(step, round(loss.item(), 4), flush=True)
    return model.eval()


def load() -> Classifier:
    """The shipped classifier, in fp32 on the CPU."""
    model = Classifier()
    model.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    return model.eval()


@torch.no_grad()
def read(pictures: Tensor, model: Classifier | None = None) -> list[dict[str, Any]]:
    """What is seen in pictures `[N, 3, 64, 64]` in 0..1: `shapes` by colour, `background`."""
    model = model or load()
    out = [model(chunk.float().cpu().clamp(0, 1)) for chunk in pictures.split(64)]
    found = []
    for chunk in out:
        for index in range(len(chunk["seen"])):
            shapes = {}
            for colour, word in enumerate(grammar.COLOURS):
                if chunk["seen"][index, colour] > 0:
                    shapes[word] = {
                        "form": grammar.FORMS[int(chunk["form"][index, colour].argmax())],
                        "size": grammar.SIZES[int(chunk["size"][index, colour].argmax())],
                        "texture": grammar.TEXTURES[int(chunk["texture"][index, colour].argmax())],
                        "place": tuple(chunk["place"][index, colour].tolist()),
                    }
            background = {
                "colour": grammar.BACK_COLOURS[int(chunk["back_colour"][index].argmax())],
                "texture": grammar.BACK_TEXTURES[int(chunk["back_texture"][index].argmax())],
            }
            found.append({"shapes": shapes, "background": background})
    return found


def relation(first: tuple[float, float], second: tuple[float, float]) -> str | None:
    """The word for how a shape at `first` stands to one at `second`, None if it is right of it or below."""
    dx, dy = second[0] - first[0], second[1] - first[1]  # y grows downward
    if max(-dx, -dy) >= max(dx, dy):
        return None
    return "left of" if dx > dy else "above"


def agreement(claims: dict, seen: dict) -> dict[str, list[float]]:
    """How each claim of a caption (:func:`grammar.claims`) fares with what was seen, 0 or 1 per claim.

    `colour` is one number per picture: colours both asked for and seen, over colours either asked for or seen, so a
    shape too many counts as much as one too few. What is said of a shape that is not there is false.
    """
    shapes, asked = seen["shapes"], {shape["colour"] for shape in claims["shapes"]}
    out: dict[str, list[float]] = {name: [] for name in ATTRIBUTES}
    out["colour"].append(len(asked & set(shapes)) / len(asked | set(shapes)))
    for shape in claims["shapes"]:
        for name in ("form", "size", "texture"):
            if name in shape:
                out[name].append(float(shapes.get(shape["colour"], {}).get(name) == shape[name]))
    if "relation" in claims:
        places = [shapes[shape["colour"]]["place"] for shape in claims["shapes"] if shape["colour"] in shapes]
        out["relation"].append(float(len(places) == 2 and relation(*places) == claims["relation"]))
    out["background"] += [float(seen["background"][key] == word) for key, word in claims.get("background", {}).items()]
    return out


def caption_accuracy(
    pictures: Tensor, prompts: Sequence[str], classifier: Classifier | None = None
) -> dict[str, float]:
    """Share of the prompts' claims that hold in `pictures` `[N, 3, 64, 64]`, floats in 0..1; deterministic.

    Returns one number for each of `colour` (the set of colours, see :func:`agreement`), `form`, `size`, `texture` (of
    shapes), `relation`, `background` (its colour and texture), and their mean as `all`. An attribute that no prompt
    mentions is left out. Raises ValueError if there are not as many pictures as prompts.
    """
    if len(pictures) != len(prompts):
        raise ValueError(f"expected as many pictures as prompts, got {len(pictures)} and {len(prompts)}")
    claims: dict[str, list[float]] = {name: [] for name in ATTRIBUTES}
    for text, seen in zip(prompts, read(pictures, classifier), strict=True):
        for name, values in agreement(grammar.claims(text), seen).items():
            claims[name] += values
    out = {name: sum(values) / len(values) for name, values in claims.items() if values}
    return out | {"all": sum(out.values()) / len(out)}


def rounded(scores: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in scores.items()}


@torch.no_grad()
def through(vae: Any, pictures: Tensor) -> Tensor:
    """Rendered pictures in -1..1 encoded and decoded, in 0..1: the best that any U-Net could show."""
    decoded = torch.cat([vae.decode(vae.encode(x).latent_dist.mode()).sample for x in pictures.split(64)])
    return (decoded / 2 + 0.5).clamp(0, 1)


def ceiling(vae: Any, n: int = 512, seed: int = 9) -> tuple[dict[str, float], dict[str, float]]:
    """Accuracies for fresh rendered pictures with their own captions: as they are, and through the autoencoder."""
    generator = torch.Generator().manual_seed(seed)
    scenes = grammar.sample(n, generator)
    pictures, texts = data.render(scenes, generator), [grammar.caption(scenes, index) for index in range(n)]
    return caption_accuracy(pictures / 2 + 0.5, texts), caption_accuracy(through(vae, pictures), texts)


def sample(pipe: Any, entries: Sequence[dict], steps: int, guidance: float, batch: int = 16) -> Tensor:
    """Pictures `[N, 3, 64, 64]` in 0..1 of prompts with their own seeds; a batch gives what single calls give."""
    pictures = []
    for first in range(0, len(entries), batch):
        some = entries[first : first + batch]
        out = pipe(
            [entry["prompt"] for entry in some],
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=data.SIDE,
            width=data.SIDE,
            generator=[torch.Generator().manual_seed(entry["seed"]) for entry in some],
            output_type="pt",
        )
        pictures.append(out.images.float().cpu())
    return torch.cat(pictures)


def report(args: argparse.Namespace) -> None:
    pipe: Any = StableDiffusionPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    out: dict[str, Any] = {"steps": args.steps, "guidance": args.guidance}
    out["rendered"], out["rendered_through_vae"] = map(rounded, ceiling(pipe.vae))
    for name, entries in (("heldout", grammar.heldout()), ("fresh", grammar.prompts(args.fresh, 77))):
        entries = entries[: args.limit]
        if not entries:
            continue
        start = time.monotonic()
        pictures, texts = sample(pipe, entries, args.steps, args.guidance), [entry["prompt"] for entry in entries]
        out[name] = rounded(caption_accuracy(pictures, texts))
        out[f"{name}_floor"] = rounded(caption_accuracy(pictures, texts[1:] + texts[:1]))
        out[f"{name}_seconds_per_picture"] = round((time.monotonic() - start) / len(entries), 2)
        Image.fromarray(data.contact_sheet(pictures).numpy()).save(args.out / f"{name}.png")
    (args.out / "judge.json").write_text(json.dumps(out, indent=1))
    print(json.dumps(out, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train the classifier anew and write its weights")
    training.add_argument("--steps", type=int, default=2500)
    reporting = commands.add_parser("report", help="sample, and judge")
    reporting.add_argument("--model", type=Path, required=True, help="folder written by assemble.py")
    reporting.add_argument("--out", type=Path, required=True)
    reporting.add_argument("--steps", type=int, default=50)
    reporting.add_argument("--guidance", type=float, default=5.0)
    reporting.add_argument("--limit", type=int, help="judge only so many prompts of each set")
    reporting.add_argument("--fresh", type=int, default=64, help="further prompts, of the training distribution")
    args = parser.parse_args()
    if args.command == "report":
        args.out.mkdir(parents=True, exist_ok=True)
        return report(args)
    model = train(args.steps)
    save_file({name: value.half() for name, value in model.state_dict().items()}, WEIGHTS)


if __name__ == "__main__":
    main()
