"""Moments of an optimizer that are kept as a recipe's codes between steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from hf_accel.sites.training.statistics import RecipeStatistics

if TYPE_CHECKING:
    from hf_accel.sites.training.base import Recipe


class _Code:
    """Stands in the optimizer's state for a moment. A class of its own, so that no optimizer takes it for a tensor."""

    def __init__(self, code: Any):
        self.code = code


class StateCoder:
    """Encodes the moments of one optimizer after every step and decodes them before it, by torch's own hooks.

    Also a change of a ledger, recorded when the recipe is applied; :meth:`attach` is called for the optimizer that the
    training then has. Whoever reads or writes ``state_dict()`` meets decoded moments.
    """

    def __init__(self, recipe: Recipe, run: RecipeStatistics):
        self.recipe, self.run = recipe, run
        self.optimizer: torch.optim.Optimizer | None = None
        self._handles: list[Any] = []

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the moments of this optimizer as codes from now on, and of no other."""
        if self.optimizer is optimizer and self._handles:
            return
        self.undo()
        self.optimizer = optimizer
        self.redo()

    def blocked(self) -> str | None:
        return None

    def undo(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._decode()

    def redo(self) -> None:
        if self.optimizer is None:
            return
        optimizer = self.optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._decode),
            optimizer.register_step_post_hook(self._encode),
            optimizer.register_state_dict_post_hook(self._write_out),
            optimizer.register_load_state_dict_post_hook(self._encode),
        ]
        self._encode()

    @torch.no_grad()
    def _encode(self, *_: Any) -> None:
        encoded = dense = codes = 0
        for parameter, state in self._states():
            for key, value in state.items():
                if _is_moment(value, parameter):
                    code = self.recipe.encode_state(key, value)
                    encoded, dense, codes = encoded + 1, dense + _bytes(value), codes + _bytes(code)
                    state[key] = _Code(code)
        if encoded:
            self.run.encoded, self.run.dense_bytes, self.run.code_bytes = encoded, dense, codes

    @torch.no_grad()
    def _decode(self, *_: Any) -> None:
        for _parameter, state in self._states():
            for key, value in state.items():
                if isinstance(value, _Code):
                    state[key] = self.recipe.decode_state(key, value.code)

    @torch.no_grad()
    def _write_out(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A ``state_dict`` with moments in place of codes. The codes stay: encoding them again could change them, and
        saving must not change a training."""
        state = {
            number: {
                key: self.recipe.decode_state(key, value.code) if isinstance(value, _Code) else value
                for key, value in entries.items()
            }
            for number, entries in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    def _states(self) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        if self.optimizer is not None:
            yield from self.optimizer.state.items()


def _is_moment(value: Any, parameter: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape == parameter.shape


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0
