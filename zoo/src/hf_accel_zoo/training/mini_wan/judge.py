"""Does `mini-wan` do what its prompts say? Sample the held-out prompts with the stock pipeline and look.

What is looked at is simple on purpose: pixels of a shape's colour (hue and brightness), the way their centroid
goes, and the form whose outline covers them best. The same looking at rendered clips of the same scenes gives the
ceiling, since shapes that hide each other or leave the frame cannot be read from the true video either.

Written to `--out`: `judge.json`, and `heldout-*.png`, one row of frames per prompt.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from PIL import Image
from torch import Tensor

from . import data, grammar
from . import model as parts

HUES = {"red": 0.0, "yellow": 52.0, "green": 127.0, "cyan": 182.0, "blue": 231.0, "magenta": 306.0}
FEWEST = 30  # pixels of 64 x 64 from which on a colour counts as seen in a frame
TURNS = 8  # orientations tried per form


def colour_masks(video: Tensor) -> dict[str, Tensor]:
    """Per colour word the pixels of it, `[F, H, W]` bool, of a video `[F, H, W, 3]` in 0..1.

    Backgrounds never get as bright as shapes (below 0.5 in every channel), which is what tells them apart.
    """
    high, low = video.amax(-1), video.amin(-1)
    chroma = (high - low).clamp(min=1e-6)
    red, green, blue = video.unbind(-1)
    hue = torch.where(
        high == red,
        (green - blue) / chroma % 6,
        torch.where(high == green, (blue - red) / chroma + 2, (red - green) / chroma + 4),
    )
    distance = torch.stack([((hue * 60 - degrees + 180) % 360 - 180).abs() for degrees in HUES.values()])
    nearest = distance.argmin(0)
    bright, vivid = high > 0.52, chroma / high.clamp(min=1e-6) > 0.5
    masks = {name: bright & vivid & (nearest == index) for index, name in enumerate(HUES)}
    masks["white"] = bright & (chroma / high.clamp(min=1e-6) < 0.25)
    return masks


def heading(mask: Tensor) -> str | None:
    """The word for the way the centroid of a mask `[F, H, W]` goes; None if it is seen in too few frames."""
    area = mask.sum((1, 2))
    seen = (area >= FEWEST).nonzero().flatten()
    if len(seen) < 4:
        return None
    ys, xs = (torch.arange(n, dtype=torch.float32) for n in mask.shape[1:])
    x = (mask.sum(1) * xs).sum(-1) / area.clamp(min=1)
    y = (mask.sum(2) * ys).sum(-1) / area.clamp(min=1)
    time_axis = seen.float() - seen.float().mean()
    slopes = [float((time_axis * axis[seen]).sum()) for axis in (x, y)]
    horizontal = abs(slopes[0]) > abs(slopes[1])
    if horizontal:
        return "left" if slopes[0] < 0 else "right"
    return "up" if slopes[1] < 0 else "down"


def form(mask: Tensor) -> str | None:
    """The form whose outline, at the mask's centre and size, overlaps it best in most frames."""
    votes = torch.zeros(len(grammar.FORMS))
    axis_y, axis_x = (torch.arange(n, dtype=torch.float32) for n in mask.shape[1:])
    kinds = torch.arange(len(grammar.FORMS)).view(-1, 1, 1, 1, 1)
    angles = torch.arange(TURNS).float().view(1, -1, 1, 1, 1) * (2 * torch.pi / TURNS)
    for frame in mask[(mask.sum((1, 2)) >= FEWEST)]:
        rows, columns = frame.any(1).nonzero(), frame.any(0).nonzero()
        top, bottom = float(rows.min()), float(rows.max())
        left, right = float(columns.min()), float(columns.max())
        reach = max(bottom - top, right - left) / 2 + 0.5
        radius = torch.tensor([0.85, 0.95, 1.05, 1.15]).view(1, 1, -1, 1, 1) * reach
        x = axis_x.view(1, 1, 1, 1, -1) - (left + right) / 2
        y = axis_y.view(1, 1, 1, -1, 1) - (top + bottom) / 2
        x, y = angles.cos() * x + angles.sin() * y, angles.cos() * y - angles.sin() * x
        inside = data.signed_distance(kinds, x, y, radius) < 0
        both = (inside & frame).sum((-1, -2)).float()
        overlap = both / (inside | frame).sum((-1, -2)).clamp(min=1)
        votes[overlap.flatten(1).amax(1).argmax()] += 1
    return grammar.FORMS[int(votes.argmax())] if votes.any() else None


def read(video: Tensor, entry: dict) -> dict[str, Any]:
    """What of one held-out entry is found in a video `[F, H, W, 3]` in 0..1: booleans per claim."""
    masks = colour_masks(video)
    frames = len(video)
    seen = {name: int((mask.sum((1, 2)) >= FEWEST).sum()) >= frames // 3 for name, mask in masks.items()}
    asked = [shape["colour"] for shape in entry["shapes"]]
    found: dict[str, Any] = {
        "colour": [seen[colour] for colour in asked],
        "no_other_colour": [not present for name, present in seen.items() if name not in asked],
        "form": [form(masks[shape["colour"]]) == shape["form"] for shape in entry["shapes"]],
        "direction": [
            heading(masks[shape["colour"]]) == shape["direction"] for shape in entry["shapes"] if "direction" in shape
        ],
    }
    return found


def scene_of(entry: dict) -> grammar.Scenes:
    """The labels of a held-out entry, for rendering; what its prompt leaves open is the first of each list."""

    def shapes(field: str, words: tuple[str, ...]) -> Tensor:
        values = [words.index(shape[field]) if field in shape else 0 for shape in entry["shapes"]]
        return torch.tensor([values + [0] * (grammar.MAX_SHAPES - len(values))])

    background = entry.get("background", {"colour": "grey", "texture": "striped", "direction": "left"})
    return grammar.Scenes(
        count=torch.tensor([len(entry["shapes"])]),
        colour=shapes("colour", grammar.COLOURS),
        form=shapes("form", grammar.FORMS),
        texture=shapes("texture", grammar.TEXTURES),
        size=shapes("size", grammar.SIZES),
        direction=shapes("direction", grammar.DIRECTIONS),
        tumble=shapes("motion", grammar.VERBS[0]),
        relation=shapes("relation", grammar.RELATIONS)[:, :2],
        back=torch.tensor(
            [
                [
                    grammar.BACK_COLOURS.index(background["colour"]),
                    grammar.BACK_TEXTURES.index(background["texture"]),
                    grammar.DIRECTIONS.index(background["direction"]),
                ]
            ]
        ),
        said=torch.ones(1, 10, dtype=torch.bool),
    )


def agreement(readings: list[dict[str, list[bool]]]) -> dict[str, float]:
    """Share of the claims of each kind that hold."""
    out = {}
    for kind in readings[0]:
        claims = [claim for reading in readings for claim in reading[kind]]
        out[kind] = round(sum(claims) / max(len(claims), 1), 3)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder written by assemble.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--limit", type=int, help="judge only so many prompts")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    size = parts.TOY if args.toy else parts.FULL
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe: Any = WanPipeline.from_pretrained(args.model).to(device)
    pipe.set_progress_bar_config(disable=True)
    entries = grammar.heldout()[: args.limit]
    videos, readings, ceiling, seconds = [], [], [], []
    for entry in entries:
        start = time.monotonic()
        video = pipe(
            entry["prompt"],
            num_frames=size.frames,
            height=size.side,
            width=size.side,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            generator=torch.Generator().manual_seed(entry["seed"]),
            output_type="pt",
        ).frames[0]
        seconds.append(time.monotonic() - start)
        videos.append(video.float().cpu())  # [F, 3, H, W] in 0..1
        readings.append(read(videos[-1].permute(0, 2, 3, 1), entry))
        generator = torch.Generator().manual_seed(entry["seed"])
        true = data.render(scene_of(entry), "cpu", generator, size.frames, size.side)[0]
        ceiling.append(read(true.permute(1, 2, 3, 0) / 2 + 0.5, entry))
        print(entry["seed"], f"{seconds[-1]:.1f}s", entry["prompt"], readings[-1], flush=True)
    report = {
        "agreement": agreement(readings),
        "agreement_of_rendered_clips": agreement(ceiling),
        "prompts": [{**entry, **reading} for entry, reading in zip(entries, readings, strict=True)],
        "steps": args.steps,
        "guidance": args.guidance,
        "seconds_per_clip": round(sorted(seconds)[len(seconds) // 2], 2),
    }
    (args.out / "judge.json").write_text(json.dumps(report, indent=1))
    for first in range(0, len(videos), 10):
        clips = torch.stack(videos[first : first + 10]).transpose(1, 2) * 2 - 1
        sheet = Image.fromarray(data.contact_sheet(clips).numpy())
        sheet.save(args.out / f"heldout-{first // 10}.png")
    print(json.dumps({k: report[k] for k in ("agreement", "agreement_of_rendered_clips", "seconds_per_clip")}))


if __name__ == "__main__":
    main()
