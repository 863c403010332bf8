"""Methods on the K/V cache of language models: the base classes.

A cache has two slots. A *codec* says how tokens behind an exact window are stored (:class:`CodecMethod`), a *policy*
which tokens stay at all (:class:`PolicyMethod`); two methods can own one each. What keeps K/V where a model keeps none
is a :class:`PrefixCacheMethod`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch

from hf_accel.base import Method
from hf_accel.hosts.clocks.steps import Clocks
from hf_accel.hosts.target import Model
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport
from hf_accel.sites.kv_cache import llada2, seam


class KVCacheMethod(Method):
    """A method on the K/V cache: a :class:`CodecMethod`, a :class:`PolicyMethod`, both, or a
    :class:`PrefixCacheMethod`."""

    @classmethod
    def why_not(cls, model: Model) -> str | None:
        return seam.why_not(model.module)

    def install(self, model: Model, ledger: Ledger, report: MethodReport, clock: Clocks) -> Any:
        return seam.install(model, self, ledger, report)


class CodecMethod(KVCacheMethod):
    """A method that stores K/V behind an exact window as codes: :meth:`encode` and :meth:`decode`.

    ``window`` and ``group_size`` in its settings, where they are, take the place of :attr:`window` and :attr:`group`.
    Tokens are encoded in groups that begin at multiples of the group size, so that codes do not depend on how tokens
    arrived. Cropping decodes the last groups again; beams and batches are reordered by the first dimension of every
    tensor among the codes.

    Attributes:
        window: the newest tokens that stay exact, at least.
        group: tokens that are encoded at a time.
    """

    window: int = 32
    group: int = 32

    @abstractmethod
    def encode(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> Any:
        """K/V ``[B, H, group, D]`` of one layer as codes: tensors whose first dimension is the batch, in any nesting of
        tuples, lists and dicts."""

    @abstractmethod
    def decode(self, codes: Any, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What :meth:`encode` made, as keys and values ``[B, H, group, D]`` in the dtype that they had."""


class PolicyMethod(KVCacheMethod):
    """A method that says which tokens of the cache stay: :meth:`keep`. Positions stay absolute.

    Needs batches without padding, whose rows have their tokens at the same places; others are refused in words.
    """

    @abstractmethod
    def keep(self, positions: torch.Tensor, layer: int) -> torch.Tensor:
        """Which tokens stay, bool ``[n]``, of those that are held at ``positions``, int64 ``[n]``, rising, the newest
        last. Asked after every forward. A group that is encoded goes when none of its tokens stays."""


class PrefixCacheMethod(KVCacheMethod):
    """A method that keeps K/V of finished blocks where the model computes its whole window anew: :meth:`difference`
    judges whether that changes nothing."""

    @abstractmethod
    def difference(self, native: torch.Tensor, cached: torch.Tensor, dtype: torch.dtype) -> str | None:
        """Why logits ``[B, b, V]`` of a model in ``dtype``, computed by the model and with K/V kept, are not the same,
        in words; None if they are."""

    @classmethod
    def why_not(cls, model: Model) -> str | None:
        return llada2.why_not(model.module)

    def install(self, model: Model, ledger: Ledger, report: MethodReport, clock: Clocks) -> Any:
        return llada2.install(model, self, ledger, report)
