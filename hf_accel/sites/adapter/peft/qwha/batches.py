"""Batches whose samples have different adapters: peft's ``adapter_names`` argument of ``forward`` and ``generate``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

BASE = "__base__"


@contextmanager
def names_for_layers(model: nn.Module, names: Sequence[str], known: set[str], beams: int = 1) -> Iterator[None]:
    """Every adapter layer inside ``model`` gets ``adapter_names=names`` in its calls, while the context stands.

    Args:
        model: with adapters, in eval mode.
        names: of an adapter for each sample; "__base__" is none.
        known: names of the adapters on the model.
        beams: of a beam search, which repeats every sample; an encoder sees the samples once.

    Raises:
        ValueError: the model is in training mode, or has no adapter of a name.
    """
    # Sentences of peft's, which tools match.
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    unknown = set(names) - known - {BASE}
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
    once = set(_encoder_modules(model)) if beams > 1 else set()
    repeated = [name for name in names for _ in range(beams)]
    handles = []
    try:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                hook = _Giving(list(names) if module in once else repeated)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_names(names: Sequence[str], x: torch.Tensor, merged: bool) -> None:
    """Raise ``ValueError`` unless there is a name for each sample of ``x`` and no adapter is merged."""
    if len(x) != len(names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {len(x)} respectively."
        )
    if merged:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )


class _Giving:
    """A forward pre-hook that adds ``adapter_names``."""

    def __init__(self, names: list[str]):
        self.names = names

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": self.names}


def _encoder_modules(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        encoder: Any = getattr(module, "get_encoder", None)
        if encoder is not None and getattr(getattr(module, "config", None), "is_encoder_decoder", False):
            yield from encoder().modules()
            return


__all__ = ["BASE", "check_names", "names_for_layers"]
