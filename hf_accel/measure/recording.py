"""Attention calls of a real run, kept to be computed again by other methods or at other settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from hf_accel.attention.call import AttentionCall
from hf_accel.config import Config
from hf_accel.errors import HFAccelError, NotApplicable
from hf_accel.hosts.clocks.steps import clocks
from hf_accel.hosts.target import resolve
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport
from hf_accel.sites.attention import diffusers as attention_host
from hf_accel.sites.attention.base import AttentionMethod


class Recorder:
    """An attention core that runs everything dense and keeps copies of the calls that ``keep`` picks."""

    differentiable = False

    def __init__(self, keep: Callable[[AttentionCall], bool], most_bytes: int):
        self.keep, self.most_bytes = keep, most_bytes
        self.calls: list[AttentionCall] = []
        self.bytes = 0

    def attend(self, call: AttentionCall) -> torch.Tensor:
        size = sum(x.numel() * x.element_size() for x in (call.query, call.key, call.value))
        if self.bytes + size <= self.most_bytes and self.keep(call):
            self.bytes += size
            self.calls.append(copy_of(call))
        return call.dense()

    def reset(self) -> None:
        """A recording spans generations."""

    def fork(self) -> Recorder:
        return self  # one record of all requests


def record_attention(
    pipe: Any, run: Callable[[], Any], steps: Iterable[int], *, most_bytes: int = 2 << 30
) -> list[AttentionCall]:
    """The self-attention calls of a dense run of a pipeline or model, in order.

    Args:
        pipe: without methods on it.
        run: what to run, e.g. ``lambda: pipe(prompt, ...)``.
        steps: denoising steps of interest; of each, the first forward is kept and not its other branches.
        most_bytes: no more query, key and value than this is kept, on their device.

    Raises:
        NotApplicable: ``pipe`` has no denoiser whose attention can be reached.
    """
    wanted = frozenset(steps)
    seen: set[tuple[int, int, int]] = set()

    def keep(call: AttentionCall) -> bool:
        place = call.step.index, call.layer.index, call.item
        if call.step.index not in wanted or place in seen:
            return False
        seen.add(place)
        return True

    target = resolve(pipe)
    recorder = Recorder(keep, most_bytes)
    reasons = {m.name: attention_host.why_not(m.module, frozenset({"video", "image", "text"})) for m in target.models}
    usable = [model for model in target.models if reasons[model.name] is None]
    if not usable:
        raise NotApplicable("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    ledger, clock = Ledger(), clocks(target.pipeline)
    try:
        for model in usable:
            report = MethodReport("recording", {}, model.name, model.class_name)
            attention_host.install(model, recorder, ledger, report, clock)
        with torch.no_grad():
            run()
    finally:
        ledger.undo()
    return recorder.calls


def copy_of(call: AttentionCall) -> AttentionCall:
    """A call with tensors of its own, whose ``dense`` is plain SDPA on them."""
    query, key, value = (x.detach().clone() for x in (call.query, call.key, call.value))
    mask = call.mask.detach().clone() if call.mask is not None else None

    def dense() -> torch.Tensor:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=call.causal and mask is None, scale=call.scale,
            enable_gqa=grouped,
        )  # fmt: skip

    return replace(call, query=query, key=key, value=value, mask=mask, dense=dense, notes={})


def replay_density(method: AttentionMethod, calls: Iterable[AttentionCall]) -> float:
    """Mean density of a method over recorded calls, computed in their order with the state it would keep.

    Raises:
        HFAccelError: the method runs all of them dense; with its first reason.
    """
    calls = list(calls)
    if calls:
        method.stand_alone(calls[0].layer.count, calls[0].query.shape[-1])
    states: dict[tuple[int, int], Any] = {}
    densities, reasons = [], []
    with torch.no_grad():
        for call in calls:
            again = replace(call, notes={})
            place = call.layer.index, call.item
            if place not in states:
                states[place] = method.new_state()
            method.attend(again, states[place])
            if "density" in again.notes:
                densities.append(again.notes["density"].float().mean())
            elif "fallback" in again.notes:
                reasons.append(again.notes["fallback"])
    if not densities:
        raise HFAccelError(f"{method.name} computed none of the recorded calls: {(reasons or ['there are none'])[0]}.")
    return float(torch.stack(densities).mean())


def density_on(calls: list[AttentionCall], method: type[AttentionMethod]) -> Callable[[dict[str, Any]], float]:
    """Settings -> density on recorded calls, as :class:`~hf_accel.measure.budget.Dial` wants it."""

    def measure(settings: dict[str, Any]) -> float:
        config: Config = method.Config.build(settings)
        return replay_density(method(config), calls)

    return measure
