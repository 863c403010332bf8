"""``hf-accel demo``: the miniature Wan pipeline, dense and accelerated, same prompt and seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hf_accel.errors import HFAccelError
from hf_accel.measure.compare import DENSE, Comparison, compare
from hf_accel.measure.pictures import write_density_map
from hf_accel.measure.sampling import generate
from hf_accel.zoo import path

PROMPT = "a red ring drifts left behind a blue square"


def demo(
    out: Path,
    prompt: str = PROMPT,
    seed: int = 0,
    method: str = "svg2",
    steps: int = 20,
    settings: dict[str, Any] | None = None,
) -> Comparison:
    """Generate dense and patched, write pictures and figures into ``out``, print them, and return them.

    Writes ``side_by_side.gif`` (dense | method | difference x 4), ``density.png`` (layer x step) and
    ``comparison.json``.
    """
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(path("mini-wan"), dtype=torch.float32)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    call = {"num_inference_steps": steps, **native_call()}
    brief = {**call, "num_inference_steps": 2}

    def announce(words: str) -> None:
        pipe.set_progress_bar_config(desc=words)

    print(f'"{prompt}", seed {seed}, {steps} steps', flush=True)
    announce("before")
    before = generate(pipe, prompt, seed, **brief)
    request = {method: settings} if settings else method
    result = compare(pipe, [(method, request)], prompt=prompt, seed=seed, announce=announce, **call)
    announce("after revert")
    if not torch.equal(generate(pipe, prompt, seed, **brief).frames, before.frames):
        raise HFAccelError("revert() did not restore the model: outputs differ. Please report this.")

    label = next(label for label in result.labels if label != DENSE)
    report = result.reports[label]
    files = result.save(out)
    run = report.entries[0].run
    if run is not None:
        files.append(out / "density.png")
        write_density_map(files[-1], run, label)
    print(report)
    print(result)
    print("Written: " + ", ".join(map(str, files)))
    return result


def native_call() -> dict[str, Any]:
    """The pipeline arguments mini-wan was trained for."""
    return {"num_frames": 17, "height": 64, "width": 64, "guidance_scale": 3.0, "max_sequence_length": 64}
