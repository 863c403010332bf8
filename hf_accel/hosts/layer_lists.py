"""The blocks of a network: the lists of layers that run one after another and hold nearly all of its weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from hf_accel.hosts.target import is_a

# A block is more than a linear with a name: it has several. Lists of single projections are no block lists.
_FEWEST_LINEARS = 2


def layer_list(model: torch.nn.Module) -> list[tuple[str, torch.nn.ModuleList]]:
    """The lists of blocks of a model of transformers or diffusers, by dotted name, in the order of registration.

    A list counts if the model declares the class of one of its items as its repeated block (``_repeated_blocks`` of
    diffusers, ``_no_split_modules`` of both) or, where no declared class stands in a list, if its items hold linears.
    Of lists inside each other the outermost counts: experts and sub-layers belong to their block. A model with several
    towers (vision and text, encoder and decoder, double and single stream) has several lists.

    Args:
        model: a network; wrappers of peft and ``torch.compile`` are part of the names.

    Returns:
        Empty if the model has no such list.
    """
    lists = [(name, sub) for name, sub in model.named_modules() if isinstance(sub, torch.nn.ModuleList) and len(sub)]
    for declared in _declared(model):
        found = [(name, blocks) for name, blocks in lists if any(_class_name(block) in declared for block in blocks)]
        if found:
            return _outermost(found)
    return _outermost([(name, blocks) for name, blocks in lists if any(map(_has_linears, blocks))])


def layer_names(model: torch.nn.Module) -> list[str]:
    """Dotted names of all blocks, list by list."""
    return [f"{name}.{index}" for name, blocks in layer_list(model) for index in range(len(blocks))]


def is_linear(module: torch.nn.Module) -> bool:
    """Whether a module maps its last axis by one weight: ``nn.Linear``, what other libraries put in its place (a leaf
    with ``in_features`` and ``out_features``), or transformers' ``Conv1D``."""
    if isinstance(module, torch.nn.Linear) or is_a(module, "transformers.pytorch_utils", "Conv1D"):
        return True
    sized = isinstance(getattr(module, "in_features", None), int) and hasattr(module, "out_features")
    return sized and not module._modules


def _declared(model: torch.nn.Module) -> Iterable[set[str]]:
    """Class names that the parts of the model declare as blocks, the narrower declaration first."""
    for attribute in ("_repeated_blocks", "_no_split_modules"):
        names: set[str] = set()
        for module in model.modules():
            names.update(getattr(module, attribute, None) or ())
        if names:
            yield names


def _class_name(block: Any) -> str:
    return type(getattr(block, "_orig_mod", block)).__name__


def _has_linears(block: torch.nn.Module) -> bool:
    return not is_linear(block) and sum(map(is_linear, block.modules())) >= _FEWEST_LINEARS


def _outermost(lists: list[tuple[str, torch.nn.ModuleList]]) -> list[tuple[str, torch.nn.ModuleList]]:
    names = [name for name, _ in lists]
    return [
        (name, blocks) for name, blocks in lists if not any(name.startswith(f"{outer}.") for outer in names if outer)
    ]
