"""Miniature trained models, small enough to ship: what the demo, the tests and the benchmarks run on.

::

    from diffusers import WanPipeline
    from hf_accel import zoo

    pipe = WanPipeline.from_pretrained(zoo.path("mini-wan"))

Block-diffusion models are loaded by `AutoModelForCausalLM` once `hf_accel_zoo.sdar` is imported. Importing this module
reads nothing and imports nothing heavy. How a miniature is trained is under `training/`; a recipe whose weights are not
in the package is not in :func:`names`.
"""

from __future__ import annotations

import json
from pathlib import Path

from hf_accel.errors import InvalidSetting

__all__ = ["heldout", "names", "path", "trained"]

_ROOT = Path(__file__).parent
_RECIPES = {"mini-rcd": "mini-sdar", "mini-seqd": "mini-sdar"}  # fine-tuned, judged on what their origin is judged on


def names() -> tuple[str, ...]:
    """The miniatures that are shipped, sorted."""
    pipelines, models = _ROOT.glob("*/model_index.json"), _ROOT.glob("*/config.json")
    return tuple(sorted(file.parent.name for file in (*pipelines, *models)))


def path(name: str) -> Path:
    """Folder of the miniature `name`, ready for `from_pretrained`.

    Raises InvalidSetting (a ValueError) for a name that is not one of :func:`names`.
    """
    known = names()
    if name not in known:
        missing = "the name of a shipped miniature, of which there is none (docs/zoo.md says how to train one)"
        allowed = f"one of {', '.join(map(repr, known))}" if known else missing
        raise InvalidSetting("hf_accel.zoo.path", "name", name, allowed)
    return _ROOT / name


def trained(name: str, method: str) -> Path:
    """Folder of what `method` learned on the miniature `name`, ready for `hf_accel.load_trained`.

    Raises InvalidSetting (a ValueError) if no such weights are shipped.
    """
    folder = _ROOT / f"{name}-{method}"
    if not (folder / "hf_accel.yaml").is_file():
        shipped = sorted(file.parent.name for file in _ROOT.glob("*/hf_accel.yaml"))
        raise InvalidSetting("hf_accel.zoo.trained", "name-method", folder.name, f"one of {', '.join(shipped)}")
    return folder


def heldout(name: str) -> list[dict]:
    """The held-out set of the miniature `name`: dicts with `prompt` (str), `seed` (int) and what to look for.

    Training never shows the first two shapes of such a prompt together, nor the pair that a question asks for. The set
    comes with the recipe, so it is there before weights are. Raises InvalidSetting (a ValueError) for a name without a
    recipe.
    """
    files = {file.parent.name.replace("_", "-"): file for file in _ROOT.glob("training/*/heldout.json")}
    recipe = _RECIPES.get(name, name)
    if recipe not in files:
        raise InvalidSetting("hf_accel.zoo.heldout", "name", name, f"one of {', '.join(map(repr, sorted(files)))}")
    return json.loads(files[recipe].read_text())
