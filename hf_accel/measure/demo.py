"""``hf-accel demo``: a miniature pipeline of the zoo, unpatched and accelerated, same prompt and seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_accel.api import apply
from hf_accel.errors import HFAccelError, NotApplicable
from hf_accel.hosts.loading import load_pipeline
from hf_accel.measure.compare import DENSE, Comparison, compare
from hf_accel.measure.pictures import write_density_map
from hf_accel.measure.sampling import attention_runs, generate


@dataclass(frozen=True)
class Miniature:
    """A trained pipeline of the zoo, and what it was trained for.

    Attributes:
        name: in the zoo.
        prompt, steps: of the demo.
        call: arguments of the pipeline call beside them.
    """

    name: str
    prompt: str
    steps: int
    call: dict[str, Any] = field(default_factory=dict)

    def load(self) -> Any:
        """The pipeline in fp32, on the GPU if there is one."""
        from hf_accel import zoo  # a distribution of its own: the rest of the command line works without it

        return load_pipeline(zoo.path(self.name), torch.float32).to("cuda" if torch.cuda.is_available() else "cpu")


MINI_WAN = Miniature(
    "mini-wan",
    "a red ring drifts left behind a blue square",
    20,
    {"num_frames": 17, "height": 64, "width": 64, "guidance_scale": 3.0, "max_sequence_length": 64},
)
MINI_SD = Miniature(
    "mini-sd",
    "a large plain red ring above a small striped blue square on a plain grey background",
    50,
    {"height": 64, "width": 64, "guidance_scale": 5.0},
)
MINIATURES = (MINI_WAN, MINI_SD)


def demo(
    out: Path,
    prompt: str | None = None,
    seed: int = 0,
    method: str = "svg2",
    steps: int | None = None,
    settings: dict[str, Any] | None = None,
) -> Comparison:
    """Generate unpatched and patched, write pictures and figures into ``out``, print them, and return them.

    The pipeline is the first of :data:`MINIATURES` that the method applies to. Writes ``side_by_side.gif`` (of a video)
    or ``.png`` (unpatched | method | difference x 4), ``comparison.json``, and ``density.png`` (layer x step) of an
    attention method.

    Args:
        prompt, steps: default: the miniature's.

    Raises:
        NotApplicable: no miniature suits the method.
    """
    request = {method: settings} if settings else method
    miniature, pipe = _suited(request)
    prompt = miniature.prompt if prompt is None else prompt
    steps = miniature.steps if steps is None else steps
    call = {"num_inference_steps": steps, **miniature.call}
    brief = {**call, "num_inference_steps": 2}

    def announce(words: str) -> None:
        pipe.set_progress_bar_config(desc=words)

    print(f'{miniature.name}, "{prompt}", seed {seed}, {steps} steps', flush=True)
    announce("before")
    before = generate(pipe, prompt, seed, **brief)
    result = compare(pipe, [(method, request)], prompt=prompt, seed=seed, announce=announce, **call)
    announce("after revert")
    if not torch.equal(generate(pipe, prompt, seed, **brief).frames, before.frames):
        raise HFAccelError("revert() did not restore the model: outputs differ. Please report this.")

    label = next(label for label in result.labels if label != DENSE)
    report = result.reports[label]
    files = result.save(out)
    for run in attention_runs(report)[:1]:
        files.append(out / "density.png")
        write_density_map(files[-1], run, label)
    print(report)
    print(result)
    print("Written: " + ", ".join(map(str, files)))
    return result


def _suited(request: Any) -> tuple[Miniature, Any]:
    """The first miniature that takes what is asked for, loaded."""
    reasons = []
    for miniature in MINIATURES:
        pipe = miniature.load()
        try:
            apply(pipe, request).revert()
        except NotApplicable as error:
            reasons.append(f"{miniature.name}: {error}")
        else:
            return miniature, pipe
    raise NotApplicable("No miniature of the zoo suits it. " + " ".join(reasons))


def native_call(miniature: Miniature = MINI_WAN) -> dict[str, Any]:
    """The pipeline arguments a miniature was trained for."""
    return dict(miniature.call)
