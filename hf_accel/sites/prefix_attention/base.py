"""Methods on the attention of block-diffusion language models: the base class, and what runs them inside the seam."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from hf_accel.attention.gate import resolve_share
from hf_accel.base import Method
from hf_accel.config import Config as Settings
from hf_accel.config import setting
from hf_accel.hosts.clocks.steps import Clocks
from hf_accel.hosts.target import Model
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport
from hf_accel.sites.prefix_attention import install as block_attention
from hf_accel.sites.prefix_attention.call import PrefixCall
from hf_accel.sites.prefix_attention.install import PrefixSeams
from hf_accel.sites.prefix_attention.split import split_attention


@dataclass(frozen=True)
class PrefixAttentionConfig(Settings):
    """What the settings of all approximate methods on prefix attention have in common."""

    min_prefix: int = setting(0, "shorter prefixes are attended exactly", ge=0)
    dense_layers: int | float = setting(0, "first layers that are attended exactly", share=True)


class PrefixAttentionMethod(Method):
    """A method that computes the attention of an active block to its frozen prefix and to itself: :meth:`attend`.

    ``min_prefix`` and ``dense_layers`` in its settings are honoured before :meth:`attend` is asked; what they exclude
    is attended exactly, in two parts.

    Attributes:
        traceable: it keeps no state, so that ``torch.compile`` may trace it into the model's graph.
    """

    traceable: ClassVar[bool] = False

    @abstractmethod
    def attend(self, call: PrefixCall, state: Any) -> torch.Tensor:
        """Compute one call of a denoising step: ``[B, Hq, b, D]`` like ``call.query``.

        ``state`` is what :meth:`new_state` made for this layer in this block; ``call.request_state`` is what
        :meth:`new_request_state` made.
        """

    def new_state(self) -> Any:
        """State of one layer for one block."""
        return None

    def new_request_state(self) -> Any:
        """State of all layers for one request, over its blocks. ``call.generation`` and ``call.block`` say where it
        stands."""
        return None

    @classmethod
    def why_not(cls, model: Model) -> str | None:
        return block_attention.why_not(model.module)

    def install(self, model: Model, ledger: Ledger, report: MethodReport, clock: Clocks) -> PrefixSeams:
        return block_attention.install(model, PrefixRunner(self), ledger, report)


class PrefixRunner:
    """Runs a method inside the seam: gates, and state per layer and block of one request."""

    def __init__(self, method: PrefixAttentionMethod):
        self.method = method  # shared by all requests, and not written to
        self.traceable = method.traceable
        self._states: dict[int, Any] = {}
        self._of_request: Any = None

    def fork(self) -> PrefixRunner:
        twin = PrefixRunner(self.method)
        twin._of_request = self.method.new_request_state()
        return twin

    def reset(self) -> None:
        self._states = {}

    def attend(self, call: PrefixCall) -> torch.Tensor:
        if self.traceable:
            return self.method.attend(call, None)
        reason = self._why_exact(call)
        if reason is not None:
            call.notes["density"] = 1.0
            call.notes["exact"] = reason
            return split_attention(call, getattr(self.method.config, "backend", "auto"))
        layer, call.request_state = call.layer.index, self._of_request
        if layer not in self._states:
            self._states[layer] = self.method.new_state()
        return self.method.attend(call, self._states[layer])

    def _why_exact(self, call: PrefixCall) -> str | None:
        config = self.method.config
        if call.prefix <= getattr(config, "min_prefix", 0):
            return "short prefix (min_prefix)"
        if call.sliding:
            return "sliding layer"
        share = getattr(config, "dense_layers", 0)
        owner = self.method.name
        if call.layer.index < resolve_share(share, call.layer.count, owner=owner, field="dense_layers"):
            return "dense layer (dense_layers)"
        if call.query.dtype not in self.method.facts.dtypes:
            return f"dtype {str(call.query.dtype).removeprefix('torch.')}"
        return None
