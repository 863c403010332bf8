"""Pictures for people: the unpatched run beside each method, and density by layer and step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from hf_accel.sites.attention.statistics import AttentionStatistics

# Shorter sides below this are enlarged, so that a miniature's video can be seen.
SMALL = 200


def write_side_by_side(folder: Path, unpatched: torch.Tensor, methods: Mapping[str, torch.Tensor]) -> Path:
    """A row ``unpatched | method | difference x 4`` per method: a GIF of a video, a PNG of one image.

    Args:
        unpatched: ``[F, H, W, 3]`` uint8; one frame makes a PNG.
        methods: label -> the same shape.

    Returns:
        ``side_by_side.gif`` or ``side_by_side.png`` in ``folder``.
    """
    from PIL import Image

    zoom = max(1, -(-SMALL // min(unpatched.shape[1:3])))
    frames = []
    for index in range(unpatched.shape[0]):
        rows = [_row(unpatched[index], video[index], label, zoom) for label, video in methods.items()]
        sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
        top = 0
        for row in rows:
            sheet.paste(row, (0, top))
            top += row.height
        frames.append(sheet)
    if len(frames) == 1:
        file = folder / "side_by_side.png"
        frames[0].save(file)
    else:
        file = folder / "side_by_side.gif"
        frames[0].save(file, save_all=True, append_images=frames[1:], duration=120, loop=0)
    return file


def _row(unpatched: torch.Tensor, ours: torch.Tensor, label: str, zoom: int):
    from PIL import Image, ImageDraw

    difference = ((ours.int() - unpatched.int()).abs() * 4).clamp(0, 255).byte()
    panels = {"unpatched": unpatched, label: ours, "difference x 4": difference}
    image = Image.fromarray(torch.cat(list(panels.values()), dim=1).numpy())
    image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    canvas = Image.new("RGB", (image.width, image.height + 14), "white")
    canvas.paste(image, (0, 14))
    pen = ImageDraw.Draw(canvas)
    for place, name in enumerate(panels):
        pen.text((place * image.width // len(panels) + 3, 1), name, fill="black")
    return canvas


def write_density_map(file: Path, run: AttentionStatistics, label: str) -> None:
    """Heat map of density, layer x step, of the last generation; dense calls are 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = run.density_by_layer_and_step()
    layers = 1 + max((layer for layer, _ in cells), default=0)
    steps = 1 + max((step for _, step in cells), default=0)
    grid = torch.ones(layers, steps)
    for (layer, step), value in cells.items():
        grid[layer, step] = value
    figure, axes = plt.subplots(figsize=(1.5 + 0.32 * steps, 1.4 + 0.32 * layers))
    image = axes.imshow(grid.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xlabel("step")
    axes.set_ylabel("layer")
    axes.set_title(f"density of {label}")
    figure.colorbar(image, ax=axes)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
