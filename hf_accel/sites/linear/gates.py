"""Gates in front of the blocks of a network, and the loan of its tensors to a device: parts of a block stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from hf_accel.errors import NotApplicable

_DEEP = 3  # a cache, its layers, what they hold


class Passing(Protocol):
    """Decides what happens at a gate."""

    def passed(self, gate: Gate, args: tuple, kwargs: dict) -> Any: ...


class Reached(Exception):
    """Breaks off a forward at the block in question."""


@dataclass(eq=False)
class Gate:
    """Stands as the forward of a block.

    Attributes:
        action: ``"run"`` the block; ``"note"`` its place in the order too; ``"stop"`` after it; ``"keep"`` its output
            and stop; ``"answer"`` what was kept; ``"look"`` at what it gets and stop.
        poison: answer NaN.
        writes: it changes an object that it is given, such as a cache of keys and values, which others read. Then it
            cannot answer without running.
        calls: in this forward.
        outputs: by sample: kept, or let go, of which the shapes are left.
    """

    owner: Passing
    name: str
    block: torch.nn.Module
    forward: Any = None
    action: str = "run"
    poison: bool = False
    writes: bool = False
    calls: int = 0
    outputs: dict[int, Any] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.owner.passed(self, args, kwargs)

    def keep(self, sample: int, out: Any) -> None:
        self.outputs[sample] = pytree.tree_map(
            lambda leaf: leaf.detach().to("cpu") if isinstance(leaf, torch.Tensor) else leaf, out
        )

    def note(self, sample: int, out: Any) -> None:
        """Remember shapes only."""
        self.outputs[sample] = pytree.tree_map(_Hollow.of, out)

    def let_go(self) -> None:
        for sample, out in self.outputs.items():
            self.note(sample, out)

    def answer(self, sample: int, device: torch.device) -> Any:
        """The output for a sample, the code after it free to write to it; zeros for one that was let go."""
        if sample not in self.outputs:
            raise NotApplicable(
                f"{self.name} runs in some samples before, in others after another block: this network cannot be "
                "calibrated block by block. Give samples of one kind."
            )

        def filled(leaf: Any) -> Any:
            if isinstance(leaf, _Hollow):
                value = float("nan") if self.poison and leaf.dtype.is_floating_point else 0
                return torch.full(leaf.shape, value, dtype=leaf.dtype, device=device)
            return leaf.to(device, copy=True) if isinstance(leaf, torch.Tensor) else leaf

        return pytree.tree_map(filled, self.outputs[sample])


@dataclass(frozen=True)
class _Hollow:
    """A tensor without its contents."""

    shape: torch.Size
    dtype: torch.dtype

    @staticmethod
    def of(leaf: Any) -> Any:
        return _Hollow(leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf


class Mover:
    """Brings parts of a model to a device and back. The tensors stay the same objects, and get the memory back that
    they had."""

    def __init__(self, model: torch.nn.Module, device: torch.device | None):
        self.model = model
        # As tensors there say it: cuda is cuda:0 or another.
        self.device = None if device is None else torch.empty(0, device=device).device
        self._inside: set[int] = set()
        if device is not None and any(hasattr(module, "_hf_hook") for module in model.modules()):
            raise NotApplicable(
                f"accelerate moves the parts of this {type(model).__name__} itself. Leave out device=, or load the "
                "model without device_map and without offloading."
            )

    @contextmanager
    def holding(self, blocks: Sequence[torch.nn.Module]) -> Iterator[None]:
        """Everything but the blocks on the device."""
        held = {id(tensor) for block in blocks for tensor in tensors_of(block)}
        with self._lent([tensor for tensor in tensors_of(self.model) if id(tensor) not in held]):
            yield

    @contextmanager
    def inside(self, block: torch.nn.Module) -> Iterator[None]:
        """A block on the device; what is new in it afterwards goes where the block was."""
        if self.device is None or id(block) in self._inside:
            yield
            return
        before = tensors_of(block)
        home = next((tensor.device for tensor in before if tensor.device != self.device), self.device)
        self._inside.add(id(block))
        try:
            with self._lent(before):
                yield
        finally:
            self._inside.discard(id(block))
            known = set(map(id, before))
            for tensor in tensors_of(block):
                if id(tensor) not in known and tensor.device != home:
                    tensor.data = tensor.data.to(home)

    @contextmanager
    def _lent(self, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
        lent = []
        try:
            for tensor in tensors:
                if self.device is not None and tensor.device != self.device:
                    lent.append((tensor, tensor.data))
                    tensor.data = tensor.data.to(self.device)
            yield
        finally:
            for tensor, data in lent:
                tensor.data = data


def tensors_of(module: torch.nn.Module) -> list[torch.Tensor]:
    return list({id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}.values())


def poisoned_tree(tree: Any) -> bool:
    leaves = pytree.tree_leaves(tree)
    return any(isinstance(x, torch.Tensor) and x.is_floating_point() and bool(x.isnan().any()) for x in leaves)


def contents(given: Iterable[Any]) -> list[tuple[torch.Tensor, int]]:
    """The tensors inside of objects that a block is given (not those given as such), with their versions."""
    found: list[tuple[torch.Tensor, int]] = []
    to_see = [(item, 0) for item in given if not isinstance(item, torch.Tensor)]
    while to_see:
        item, depth = to_see.pop()
        if isinstance(item, torch.Tensor):
            found.append((item, -1 if item.is_inference() else item._version))
        elif isinstance(item, list | tuple | dict):
            to_see += [(x, depth) for x in (item.values() if isinstance(item, dict) else item)]
        elif depth < _DEEP and hasattr(item, "__dict__") and not isinstance(item, type | torch.nn.Module):
            to_see += [(x, depth + 1) for x in vars(item).values()]
    return found


def differ(before: list[tuple[torch.Tensor, int]], after: list[tuple[torch.Tensor, int]]) -> bool:
    """Whether two lists of contents are not of the same tensors, unchanged."""
    same = len(before) == len(after) and all(a is b and n == m for (a, n), (b, m) in zip(before, after, strict=True))
    return not same


@contextmanager
def gated(gates: Iterable[Gate]) -> Iterator[None]:
    """Gates in the place of the blocks' forwards, on these instances."""
    standing = []
    try:
        for gate in gates:
            own = gate.block.__dict__.get("forward")
            gate.forward = gate.block.forward
            gate.block.forward = gate
            standing.append((gate.block, own))
        yield
    finally:
        for block, own in standing:
            if own is None:
                del block.forward
            else:
                block.forward = own


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode; modules that were put in meanwhile take the mode of what stood in their place."""
    modes = {name: (module, module.training) for name, module in model.named_modules()}
    model.eval()
    try:
        yield
    finally:
        for name, module in model.named_modules():
            while name not in modes:
                name = name.rpartition(".")[0]
            module.training = modes[name][1]
        for module, mode in modes.values():
            module.training = mode
