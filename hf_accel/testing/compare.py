"""Comparing models by identity and outputs by value."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from hf_accel.hosts.target import Model
from hf_accel.testing.outcome import BrokenPromise, expect

Outputs = Iterable[torch.Tensor]


def fingerprint(model: torch.nn.Module) -> dict[str, Any]:
    """Everything a patch could touch, by identity: attributes, processors and their attributes, hooks, keys."""
    out: dict[str, Any] = {"keys": list(model.state_dict()), "config": dict(Model("model", model).config)}
    for name, module in model.named_modules():
        attributes = {k: v for k, v in module.__dict__.items() if not k.startswith("_") or k in ("_hf_accel",)}
        hooks = {k: list(v.items()) for k, v in module.__dict__.items() if k.endswith("_hooks") and v}
        flags = {k: dict(v) for k, v in module.__dict__.items() if "hooks_" in k and isinstance(v, dict) and v}
        out[name] = ({k: id(v) for k, v in attributes.items()}, hooks, flags, id(module.__dict__.get("forward")))
        processor = getattr(module, "processor", None)
        if processor is not None:
            out[name + ".processor"] = (id(processor), type(processor), dict(vars(processor)))
    return out


def keys_aside(found: dict[str, Any]) -> dict[str, Any]:
    """A fingerprint without the numbers that torch gave to hooks: they differ where a hook left and came back."""
    return {
        name: (part[0], {k: [hook for _, hook in v] for k, v in part[1].items()}, *map(len, part[2:3]), part[3])
        if isinstance(part, tuple) and len(part) == 4
        else part
        for name, part in found.items()
    }


def close(ours: Outputs, theirs: Outputs, limit: float = 1e-5) -> bool:
    """Whether every tensor equals its counterpart up to ``limit``, absolute and relative."""
    return all(torch.allclose(a, b, atol=limit, rtol=limit) for a, b in zip(ours, theirs, strict=True))


def equal(ours: Outputs, theirs: Outputs) -> bool:
    """Whether every tensor equals its counterpart to the bit."""
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def difference(ours: Outputs, theirs: Outputs) -> str:
    """The largest absolute difference, for a message."""
    pairs = list(zip(ours, theirs, strict=False))
    if any(a.shape != b.shape for a, b in pairs):
        return "; shapes differ: " + ", ".join(f"{tuple(a.shape)} and {tuple(b.shape)}" for a, b in pairs)
    largest = max((float((a.float() - b.float()).abs().max()) for a, b in pairs if a.numel()), default=0.0)
    return f"; the largest difference is {largest:.3g}"


def expect_close(ours: Outputs, theirs: Outputs, what: str, limit: float = 1e-5) -> None:
    """:func:`close`, or a :class:`BrokenPromise` that begins with ``what`` and gives the largest difference."""
    ours, theirs = list(ours), list(theirs)
    expect(close(ours, theirs, limit), f"{what}: expected equal up to {limit:g}{difference(ours, theirs)}.")


def expect_equal(ours: Outputs, theirs: Outputs, what: str) -> None:
    """:func:`equal`, or a :class:`BrokenPromise` that begins with ``what`` and gives the largest difference."""
    ours, theirs = list(ours), list(theirs)
    expect(equal(ours, theirs), f"{what}: expected equal to the bit{difference(ours, theirs)}.")


def expect_same_objects(found: dict[str, Any], wanted: dict[str, Any], when: str) -> None:
    """Two fingerprints are one, or a :class:`BrokenPromise` that names what differs."""
    if found == wanted:
        return
    names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    shown = ", ".join(name or "the model itself" for name in names[:8])
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    raise BrokenPromise(f"{when}, not the same objects as before: {shown}{more}.")
