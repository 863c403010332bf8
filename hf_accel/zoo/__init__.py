"""Miniature trained models, small enough to ship: what the demo, the tests and the benchmarks run on.

::

    from diffusers import WanPipeline
    from hf_accel import zoo

    pipe = WanPipeline.from_pretrained(zoo.path("mini-wan"))

Importing this module reads nothing and imports nothing heavy. How a miniature was trained is under `training/`.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import InvalidSetting

__all__ = ["names", "path"]

_ROOT = Path(__file__).parent


def names() -> tuple[str, ...]:
    """The miniatures that are shipped, sorted."""
    return tuple(sorted(folder.parent.name for folder in _ROOT.glob("*/model_index.json")))


def path(name: str) -> Path:
    """Folder of the miniature `name`, ready for `from_pretrained`.

    Raises InvalidSetting (a ValueError) for a name that is not one of :func:`names`.
    """
    known = names()
    if name not in known:
        raise InvalidSetting("hf_accel.zoo.path", "name", name, f"one of {', '.join(map(repr, known)) or 'none'}")
    return _ROOT / name
