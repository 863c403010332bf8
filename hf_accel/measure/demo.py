"""``hf-accel demo``: the miniature Wan pipeline, dense and accelerated, same prompt and seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from hf_accel.errors import HFAccelError
from hf_accel.measure.machine import describe_machine
from hf_accel.measure.quality import psnr, ssim
from hf_accel.measure.sampling import Sample, generate, generate_with
from hf_accel.zoo import path

PROMPT = "a red ring drifts left behind a blue square"


def demo(
    out: Path,
    prompt: str = PROMPT,
    seed: int = 0,
    method: str = "svg2",
    steps: int = 20,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Generate dense and patched, write pictures and a table into ``out``, and return the figures.

    Writes ``side_by_side.gif`` (dense | method | difference x 4), ``density.png`` (layer x step) and ``demo.json``.
    """
    from diffusers import WanPipeline

    out.mkdir(parents=True, exist_ok=True)
    pipe = WanPipeline.from_pretrained(path("mini-wan"), dtype=torch.float32)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    call = {"num_inference_steps": steps, **native_call()}

    print(f'"{prompt}", seed {seed}, {steps} steps', flush=True)
    pipe.set_progress_bar_config(desc="warm-up")
    generate(pipe, prompt, seed, **{**call, "num_inference_steps": 2})
    pipe.set_progress_bar_config(desc="dense")
    plain = generate(pipe, prompt, seed, **call)
    pipe.set_progress_bar_config(desc="dense, attention timed")
    dense = generate_with(pipe, "dense", prompt, seed, **call)
    pipe.set_progress_bar_config(desc=method)
    fast = generate_with(pipe, method, prompt, seed, settings, **call)
    pipe.set_progress_bar_config(desc="after revert")
    again = generate(pipe, prompt, seed, **{**call, "num_inference_steps": 2})
    pipe.set_progress_bar_config(desc="unpatched")
    before = generate(pipe, prompt, seed, **{**call, "num_inference_steps": 2})
    if not torch.equal(again.frames, before.frames):
        raise HFAccelError("revert() did not restore the model: outputs differ. Please report this.")

    figures = {
        "prompt": prompt,
        "seed": seed,
        "steps": steps,
        "method": method,
        "psnr_db": psnr(fast.frames, plain.frames),
        "ssim": ssim(fast.frames, plain.frames),
        "density": fast.density,
        "attention_time_ratio": (dense.attention_seconds or 0.0) / (fast.attention_seconds or 1.0),
        "whole_time_ratio": plain.seconds / fast.seconds,
        "dense_seconds": plain.seconds,
        "method_seconds": fast.seconds,
        "machine": describe_machine(),
        "report": fast.report.to_dict() if fast.report is not None else None,
    }
    (out / "demo.json").write_text(json.dumps(figures, indent=2))
    write_side_by_side(out / "side_by_side.gif", plain, fast, method)
    write_density_map(out / "density.png", fast, method)
    print(fast.report)
    print(table(figures))
    print(f"Pictures: {out / 'side_by_side.gif'}, {out / 'density.png'}; figures: {out / 'demo.json'}")
    return figures


def native_call() -> dict[str, Any]:
    """The pipeline arguments mini-wan was trained for."""
    return {"num_frames": 17, "height": 64, "width": 64, "guidance_scale": 3.0, "max_sequence_length": 64}


def table(figures: dict[str, Any]) -> str:
    """The figures of one demo as a text table; a ratio never stands without the quality it cost."""
    rows = [
        ("PSNR against dense", f"{figures['psnr_db']:.2f} dB"),
        ("SSIM against dense", f"{figures['ssim']:.4f}"),
        ("density in sparse calls", f"{figures['density']:.3f}"),
        ("attention time, dense / method", f"{figures['attention_time_ratio']:.2f} x"),
        ("whole run, dense / method", f"{figures['whole_time_ratio']:.2f} x"),
        ("machine", f"{figures['machine']['device']}, {figures['machine']['threads']} threads"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def write_side_by_side(file: Path, plain: Sample, fast: Sample, method: str, zoom: int = 4) -> None:
    """Animated ``dense | method | difference x 4``."""
    from PIL import Image, ImageDraw

    difference = ((fast.frames - plain.frames).abs() * 4).clamp(0, 1)
    panels = {"dense": plain.frames, method: fast.frames, "difference x 4": difference}
    pictures = []
    for index in range(plain.frames.shape[0]):
        strip = torch.cat([video[index] for video in panels.values()], dim=1)
        image = Image.fromarray((strip * 255).round().byte().numpy())
        image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
        canvas = Image.new("RGB", (image.width, image.height + 14), "white")
        canvas.paste(image, (0, 14))
        pen = ImageDraw.Draw(canvas)
        for place, name in enumerate(panels):
            pen.text((place * image.width // len(panels) + 3, 1), name, fill="black")
        pictures.append(canvas)
    pictures[0].save(file, save_all=True, append_images=pictures[1:], duration=120, loop=0)


def write_density_map(file: Path, fast: Sample, method: str) -> None:
    """Heat map of density, layer x step; dense calls are 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    run = fast.run
    if run is None:
        raise HFAccelError("There is no report to draw a density map from.")
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
    axes.set_title(f"density of {method}")
    figure.colorbar(image, ax=axes)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
