"""What the first step of a block has in the place of a last prediction: the model's own, or another model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hf_accel.errors import NotApplicable, WeightsMismatch
from hf_accel.hosts.block_families import cache_length, mask_token_of
from hf_accel.hosts.caches import new_dynamic_cache
from hf_accel.hosts.clocks.block_steps import BlockStep

NO_LOGITS = "the output has no logits of these positions"


class Start(Protocol):
    """Where the logits come from that the first step of a block has in the place of a last prediction."""

    def fork(self) -> Start:
        """One for another request."""

    def follow(self, arguments: Mapping[str, Any], step: BlockStep) -> None:
        """A prefill or commit forward of the model runs with these arguments."""

    def logits(
        self, module: Any, arguments: Mapping[str, Any], step: BlockStep, opened: torch.Tensor
    ) -> tuple[torch.Tensor | None, str]:
        """``[N, V]`` for the N True of ``opened`` ``[B, n]``; or None and the reason, and the start is cold."""


class OwnStart:
    """An extra forward of the model itself, past the hooks on it."""

    def __init__(self, shift: int | None = None):
        self.shift = shift

    def fork(self) -> OwnStart:
        return self

    def follow(self, arguments: Mapping[str, Any], step: BlockStep) -> None:
        pass

    def logits(
        self, module: Any, arguments: Mapping[str, Any], step: BlockStep, opened: torch.Tensor
    ) -> tuple[torch.Tensor | None, str]:
        shift = logit_shift_of(module) if self.shift is None else self.shift
        return rows_at(logits_of(module.forward(**arguments)), opened, shift), NO_LOGITS


@dataclass
class Reference:
    """The model that is asked, and how its logits are placed; the same for all requests."""

    model: Any = None
    shift: int | None = None


class ReferenceStart:
    """A forward of another model, which follows the request with a cache of its own."""

    def __init__(self, asked: Reference | None = None) -> None:
        self.asked = asked if asked is not None else Reference()
        self._cache: Any = None
        self._rows = 0

    @property
    def model(self) -> Any:
        """The reference; None: none was given."""
        return self.asked.model

    @property
    def shift(self) -> int | None:
        return self.asked.shift

    def fork(self) -> ReferenceStart:
        return ReferenceStart(self.asked)

    def __deepcopy__(self, memo: dict) -> ReferenceStart:
        # A copy of the target asks the same reference.
        return ReferenceStart(Reference(self.asked.model, self.asked.shift))

    def set_model(self, reference: torch.nn.Module, target: torch.nn.Module, mask_token: int) -> None:
        """Ask ``reference`` from now on.

        Raises:
            WeightsMismatch: it has another vocabulary or mask token.
        """
        sizes = [_vocabulary(m) for m in (target, reference)]
        if sizes[0] != sizes[1]:
            raise WeightsMismatch(
                f"The reference {type(reference).__name__} has {sizes[1]} tokens, {type(target).__name__} has "
                f"{sizes[0]}. They may differ in width, not in vocabulary."
            )
        other = mask_token_of(reference)
        if other is not None and other != mask_token:
            raise WeightsMismatch(f"The reference's mask token is {other}; that of the model is {mask_token}.")
        self.asked.model, self._cache = reference, None

    def follow(self, arguments: Mapping[str, Any], step: BlockStep) -> None:
        if self.model is not None and self._cache_at(arguments, step) is not None:
            with torch.no_grad():
                self._run(arguments, store_kv=True)

    def logits(
        self, module: Any, arguments: Mapping[str, Any], step: BlockStep, opened: torch.Tensor
    ) -> tuple[torch.Tensor | None, str]:
        if self.model is None:
            raise NotApplicable(
                "init='warm' asks a reference model, and none was given: apply with reference='folder or Hub id', or "
                "call hf_accel.patches.rcd.set_reference(model, reference)."
            )
        if step.phase == "denoise" and self._cache_at(arguments, step) is None:
            return (
                None,
                "the reference cannot follow (applied in the middle of a request, rows taken out, a static cache)",
            )
        shift = logit_shift_of(self.model) if self.shift is None else self.shift
        found = self._run(arguments, store_kv=False) if step.phase == "denoise" else self._run(arguments)
        return rows_at(logits_of(found), opened, shift), NO_LOGITS

    def _cache_at(self, arguments: Mapping[str, Any], step: BlockStep) -> Any:
        """The cache that holds the prefix of this forward, or None: what was done to that of the model is not known."""
        tokens = arguments.get("input_ids")
        rows = 0 if tokens is None else len(tokens)
        if getattr(arguments.get("past_key_values"), "is_compileable", False):
            self._cache = None  # a static cache: its masks are longer than any other's
        elif step.prefix == 0:
            self._cache = new_dynamic_cache()
        elif cache_length(self._cache) != step.prefix or self._rows != rows:
            self._cache = None
        self._rows = rows
        return self._cache

    def _run(self, arguments: Mapping[str, Any], **more: Any) -> Any:
        device = next(self.model.parameters()).device
        taken = ("input_ids", "attention_mask", "position_ids", "cache_position")
        given = {name: arguments[name] for name in taken if arguments.get(name) is not None}
        given = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in given.items()}
        cache = {"past_key_values": self._cache, "use_cache": True} if more else {"use_cache": False}
        return self.model(**given, **cache, **more)


def _vocabulary(module: Any) -> int:
    return int(module.get_input_embeddings().weight.shape[0])


# -- logits of foreign models ---------------------------------------------------------------------------------------


def logits_of(output: Any) -> torch.Tensor | None:
    """Logits ``[B, m, V]`` of a model's output, or None."""
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, tuple):
        found = output[0]
    return found if isinstance(found, torch.Tensor) and found.ndim == 3 else None


def logit_shift_of(module: torch.nn.Module) -> int:
    """1 where logits at ``i`` predict token ``i + 1``, as Dream kept it from autoregressive training; else 0."""
    return 1 if type(module).__name__.startswith("Dream") else 0


def align_logits(logits: torch.Tensor, shift: int) -> torch.Tensor:
    """``[B, S, V]`` with row ``i`` the prediction of token ``i``. With a shift of 1 the first row has none and keeps
    its own, as in Dream's sampler."""
    return logits if shift == 0 else torch.cat([logits[:, :1], logits[:, :-1]], 1)


def rows_at(logits: torch.Tensor | None, opened: torch.Tensor, shift: int) -> torch.Tensor | None:
    """The predictions of the True of ``opened`` ``[B, n]``, a copy ``[N, V]``; None if they are not all there.

    Args:
        logits: ``[B, m, V]`` of the last m positions.
        opened: positions.
        shift: see :func:`logit_shift_of`.
    """
    rows, length = opened.shape
    if logits is None or logits.shape[0] != rows or logits.shape[1] > length:
        return None
    given = logits.shape[1]
    before = length - given
    if before and bool(opened[:, :before].any()):
        return None
    source = (torch.arange(length, device=opened.device) - before - shift).clamp_min(0)
    source = source + given * torch.arange(rows, device=opened.device)[:, None]
    index = source[opened]
    return logits.detach().reshape(-1, logits.shape[-1])[index.to(logits.device)]
