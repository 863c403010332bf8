"""Methods on what a masked or uniform diffusion language model embeds at open positions: the base classes.

There are two places. Where open positions hold a mask token, rows of the input embedding can be replaced by something
made of the last prediction (:class:`ResidualMethod`). Where the model conditions on its last prediction itself, the
expected embedding can be computed otherwise (:class:`SoftEmbeddingMethod`).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch

from hf_accel.base import Method
from hf_accel.hosts.clocks.steps import Clocks
from hf_accel.hosts.target import Model
from hf_accel.kernels.common.dispatch import Choice
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport
from hf_accel.sites.embedding import residual, self_conditioning
from hf_accel.sites.embedding.residual import ResidualSeams
from hf_accel.sites.embedding.self_conditioning import SelfConditioningSeams
from hf_accel.sites.embedding.start import Start
from hf_accel.sites.embedding.table import EmbeddingTable


class EmbeddingMethod(Method):
    """A method on the embeddings of open positions: a :class:`ResidualMethod` or a :class:`SoftEmbeddingMethod`."""


class ResidualMethod(EmbeddingMethod):
    """A method that mixes the last prediction into the embeddings of positions that hold a mask token: :meth:`mix`.

    ``mask_token_id`` and ``logit_shift`` in its settings, where they are, stand for what the model does not tell.
    """

    @abstractmethod
    def mix(self, embedded: torch.Tensor, logits: torch.Tensor, table: EmbeddingTable) -> tuple[torch.Tensor, Any]:
        """The rows that take the place of the mask's embedding.

        Args:
            embedded: ``[N, D]``, the mask's embedding at ``N`` open positions.
            logits: ``[N, V]``, the last prediction there.
            table: the input embedding's weight ``[V, D]``, with what else the model does to embeddings.

        Returns:
            ``[N, D]`` in the dtype of ``embedded``, and the weight of the residual, fp32 ``[N]``, for the report.
        """

    def start(self) -> Start | None:
        """Where a prediction comes from at the first step of a block, which has none; None: from nowhere."""
        return None

    @classmethod
    def why_not(cls, model: Model) -> str | None:
        return residual.why_not(model.module)

    def install(self, model: Model, ledger: Ledger, report: MethodReport, clock: Clocks) -> ResidualSeams:
        token, shift = (getattr(self.config, name, None) for name in ("mask_token_id", "logit_shift"))
        return residual.install(model, self, ledger, report, mask_token=token, shift=shift, start=self.start())


class SoftEmbeddingMethod(EmbeddingMethod):
    """A method that computes the expected embedding where a model conditions on its last prediction: :meth:`embed`."""

    @abstractmethod
    def embed(self, logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``softmax(logits) @ weight``: ``[B, S, V]`` and ``[V, D]`` -> ``[B, S, D]`` in ``weight``'s dtype."""

    @abstractmethod
    def choice(self, weight: torch.Tensor) -> Choice:
        """Which kernels run for embeddings ``[V, D]``, and why: in a compiled model none of ours is called by name."""

    @classmethod
    def why_not(cls, model: Model) -> str | None:
        return self_conditioning.why_not(model.module)

    def install(self, model: Model, ledger: Ledger, report: MethodReport, clock: Clocks) -> SelfConditioningSeams:
        return self_conditioning.install(model, self, ledger, report)
