"""Methods on self-attention: the base class, and what runs them inside the seam."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_accel.attention.call import AttentionCall
from hf_accel.attention.gate import resolve_share
from hf_accel.base import Method
from hf_accel.config import Config as Settings
from hf_accel.config import setting
from hf_accel.errors import UnsupportedByKernel
from hf_accel.hosts.clocks.steps import Clocks
from hf_accel.hosts.target import Model, kind
from hf_accel.kernels.common import kernel_log
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport
from hf_accel.sites.attention import break_even
from hf_accel.sites.attention import diffusers as attention_host
from hf_accel.sites.attention.seam import AttentionSeams

MOST_SEQUENCES = 65_535  # of the second and third axis of a CUDA launch
_AUTOCAST_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class SparseAttentionConfig(Settings):
    """What the settings of every sparse attention method have in common. A method may declare a field again."""

    dense_steps: int | float = setting(0, "first steps that stay dense", share=True)
    dense_layers: int | float = setting(0, "first layers that stay dense", share=True)
    on_slow: str = setting(
        "keep", "where the method is known to be slower than dense: keep it, or run dense", choices=("keep", "dense")
    )
    break_even: str = setting(
        "table",
        "how to know whether it is slower: the shipped table of this device, a measurement at first use, or not at all",
        choices=("table", "measure", "off"),
    )
    backend: str = setting("auto", "kernels to use", choices=("auto", "triton", "torch"))


class AttentionMethod(Method):
    """A method that computes self-attention. An easy one is one function: :meth:`attend`.

    ``dense_steps`` and ``dense_layers`` in its settings are honoured here, before :meth:`attend` is asked.
    """

    @abstractmethod
    def attend(self, call: AttentionCall, state: Any) -> torch.Tensor:
        """Compute one attention call: ``[B, H, Sq, D]`` like ``call.query``.

        ``state`` is what :meth:`new_state` made for this layer in this generation.
        """

    def new_state(self) -> Any:
        """State of one layer for one generation."""
        return None

    def stand_alone(self, layers: int, head_dim: int) -> None:
        """Get ready to attend without having been installed on a model, untrained: for benchmarks and replays."""

    def observe(self, call: AttentionCall, state: Any) -> None:
        """A call in a dense step of a layer that will be sparse later; the place to warm up state."""

    @classmethod
    def why_not(cls, model: Model) -> str | None:
        return attention_host.why_not(model.module, cls.facts.media)

    def install(self, model: Model, ledger: Ledger, report: MethodReport, clock: Clocks) -> AttentionSeams:
        self._check_head_dim(model, report)
        return attention_host.install(model, AttentionRunner(self), ledger, report, clock)

    def _check_head_dim(self, model: Model, report: MethodReport) -> None:
        """Say before the first forward that the method's GPU kernel cannot do this model's heads."""
        head_dim = _head_dim(model)
        if head_dim is None or head_dim <= self.facts.max_head_dim:
            return
        words = (
            f"the heads of {model.class_name} have {head_dim} dims; the Triton kernel does {self.facts.max_head_dim}"
        )
        if getattr(self.config, "backend", "auto") == "triton":
            raise UnsupportedByKernel(f"{self.name}: {words}. Use backend='auto' or 'torch'.")
        report.notes.append(f"{words}: the torch form runs everywhere")


def _head_dim(model: Model) -> int | None:
    """The width of a model's attention heads, as its configuration tells; None if it does not."""
    config = model.config
    if kind(model.module) != "language model":
        found = config.get("attention_head_dim")
    elif "qk_nope_head_dim" in config:
        found = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    else:
        size, heads = config.get("hidden_size"), config.get("num_attention_heads")
        found = config.get("head_dim") or (size // heads if size and heads else None)
    return found if isinstance(found, int) else None


def why_no_kernel(call: AttentionCall) -> str | None:
    """Why a call, which the host's own attention may well compute, is none for the kernels of any method; or None."""
    query, key, value = call.query, call.key, call.value
    if not (query.numel() and key.numel()):
        return "no tokens"
    if not query.dtype == key.dtype == value.dtype:
        return "queries, keys and values of different dtypes"
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        return "keys and values that the batch shares"
    if key.shape[1] != value.shape[1] or query.shape[1] % key.shape[1]:
        return "query heads that are no multiple of the key heads"
    if value.shape[-1] > key.shape[-1]:
        return "values wider than keys"
    if query.shape[0] * query.shape[1] > MOST_SEQUENCES:
        return f"more than {MOST_SEQUENCES} sequences and heads at once"
    return None


def as_autocast(call: AttentionCall) -> AttentionCall:
    """A call in the dtype to which torch.autocast brings attention, as it does where it meets the host's own."""
    device = call.query.device.type
    if not torch.is_autocast_enabled(device):
        return call
    dtype = torch.get_autocast_dtype(device)
    tensors = {name: getattr(call, name) for name in ("query", "key", "value")}
    changed = {name: x.to(dtype) for name, x in tensors.items() if x.dtype != dtype and x.dtype in _AUTOCAST_DTYPES}
    return replace(call, **changed) if changed else call


def as_wide_as_keys(call: AttentionCall) -> AttentionCall:
    """A call whose values are narrower than its keys (latent attention of the DeepSeek class) with zeros behind them,
    so that methods and kernels know one width. The output has the zeros, too: cut it, whoever computed it."""
    missing = call.key.shape[-1] - call.value.shape[-1]
    return call if not missing else replace(call, value=torch.nn.functional.pad(call.value, (0, missing)))


class AttentionRunner:
    """Runs an attention method inside the seam: dense gate, grid check, state per layer and generation.

    Args:
        method: shared by all requests, and not written to.
        verdicts: what is known of being slower than dense, shared as well.
    """

    def __init__(self, method: AttentionMethod, verdicts: dict[Any, break_even.Verdict] | None = None):
        self.method = method
        self.differentiable = method.facts.backward
        self._states: dict[tuple[int, ...], Any] = {}
        self._verdicts: dict[Any, break_even.Verdict] = {} if verdicts is None else verdicts

    def fork(self) -> AttentionRunner:
        return AttentionRunner(self.method, self._verdicts)

    def __getstate__(self) -> dict[str, Any]:
        # For copies, which may be made while others are served.
        return {**self.__dict__, "_states": {}, "_verdicts": dict(self._verdicts)}

    def reset(self) -> None:
        self._states = {}

    def attend(self, call: AttentionCall) -> torch.Tensor:
        call = as_autocast(call)
        if call.layer.index < self._resolve("dense_layers", call.layer.count):
            return call.fallback("dense layer (dense_layers)")
        if "token grid" in self.method.facts.needs:
            if call.grid is None:
                return call.fallback("the token grid of this forward is unknown")
            lengths = call.query.shape[2], call.key.shape[2]
            if lengths[0] != lengths[1] or call.grid.video_span(lengths[0]) is None:
                return call.fallback(f"{lengths[0]} x {lengths[1]} tokens disagree with the grid {call.grid}")
        if (reason := self._cannot(call)) is not None:
            return call.fallback(reason)
        width = call.value.shape[-1]
        return self._run(as_wide_as_keys(call))[..., :width]

    def _run(self, call: AttentionCall) -> torch.Tensor:
        """A call that the method can take, unless it is not asked to."""
        if self._slower_than_dense(call):
            return call.fallback("slower than dense at this shape (on_slow)")
        # A cache may run half of a guidance batch within a generation, and tiles may differ in size.
        key = call.layer.index, call.item, call.step.tile, call.query.shape[0], call.query.shape[2]
        if key not in self._states:
            self._states[key] = self.method.new_state()
        if self._dense_step(call):
            self.method.observe(call, self._states[key])
            return call.fallback("dense step (dense_steps)")
        return self.method.attend(call, self._states[key])

    def _cannot(self, call: AttentionCall) -> str | None:
        """Why the method's declared facts exclude this call, or None."""
        facts = self.method.facts
        if call.causal and not facts.causal:
            return "causal attention"
        if call.query.dtype not in facts.dtypes:
            return f"dtype {str(call.query.dtype).removeprefix('torch.')}"
        if call.query.shape[0] > 1 and not facts.batched:
            return "batch > 1"
        return why_no_kernel(call)

    def _slower_than_dense(self, call: AttentionCall) -> bool:
        """Ask once per shape, note the answer once; whether it means that this call runs dense."""
        config = self.method.config
        mode = getattr(config, "break_even", "off")
        if mode == "off":
            return False
        key = call.query.device, call.query.dtype, call.query.shape, call.key.shape, call.causal
        verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = self._verdict(call, mode)
            if len(self._verdicts) >= 64:  # a server of many resolutions; asking again costs little
                self._verdicts.clear()
            self._verdicts[key] = verdict
            call.notes["break_even"] = verdict.words
        return verdict.slower and getattr(config, "on_slow", "keep") == "dense"

    def _verdict(self, call: AttentionCall, mode: str) -> break_even.Verdict:
        method, device = self.method, call.query.device
        if mode == "table":
            settings = method.config.to_dict()["settings"]
            return break_even.look_up(method.name, settings, method.facts.budget, break_even.Shape.of(call.query))
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return break_even.Verdict(None, f"{method.name} against dense: not measured inside a CUDA graph capture")
        # A trial has notes and state of its own, so that the generation goes on as if it had never been.
        query, key, value = (x.detach() for x in (call.query, call.key, call.value))
        trial = replace(call, query=query, key=key, value=value, notes={})
        state = method.new_state()
        tokens = query.shape[2]
        with torch.no_grad(), kernel_log.logging_to({}):
            ratio = break_even.measure(call.dense, lambda: method.attend(trial, state), device)
        if "fallback" in trial.notes:
            why = f"it runs dense here ({trial.notes['fallback']})"
            return break_even.Verdict(None, f"{method.name} against dense at {tokens} tokens: {why}")
        return break_even.verdict_of(method.name, tokens, ratio, "measured here, forward only")

    def _dense_step(self, call: AttentionCall) -> bool:
        """A count is a count; a fraction is of the step count where known, else of the fall of the timestep.

        Training draws noise levels at random: there is no first step, and what is trained is the method.
        """
        if call.needs_grad:
            return False
        share = getattr(self.method.config, "dense_steps", 0)
        if isinstance(share, int) or call.step.count is not None:
            # A count is not cut to a total that may be unknown.
            return call.step.index < self._resolve("dense_steps", call.step.count or call.step.index + 1)
        return call.step.progress < share

    def _resolve(self, field: str, total: int) -> int:
        return resolve_share(getattr(self.method.config, field, 0), total, owner=self.method.name, field=field)
