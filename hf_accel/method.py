"""What a method is: declared facts, checked settings, and a way to put itself on a model.

Composition is derived from the facts (:func:`conflict`), never from lists of friends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch

from hf_accel.attention.call import AttentionCall, Step
from hf_accel.attention.gate import resolve_share
from hf_accel.config import Config as Settings
from hf_accel.config import setting
from hf_accel.errors import UnsupportedByKernel
from hf_accel.hosts.clocks.steps import Clock
from hf_accel.hosts.denoisers import HOSTS_OF, Host, Medium, describe, host_of
from hf_accel.hosts.foreign import Foreign
from hf_accel.hosts.target import Model
from hf_accel.kernels.common import kernel_log
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport
from hf_accel.sites.attention import break_even
from hf_accel.sites.attention import diffusers as attention_host
from hf_accel.sites.attention.seam import SeamContext
from hf_accel.sites.step_cache import seam as step_cache_host

Site = Literal["attention", "embedding", "step cache", "kv cache", "linear", "sampler", "adapter", "training"]
Need = Literal["token grid", "step", "branch", "text span", "prefix cache", "trained weights"]

# Order of installation: what lies deeper in the network first, so that outer sites wrap finished inner ones.
SITE_ORDER: tuple[Site, ...] = (
    "linear",
    "adapter",
    "attention",
    "embedding",
    "kv cache",
    "step cache",
    "sampler",
    "training",
)

# Sites where two methods would compute the same thing twice: one owner per model.
EXCLUSIVE_SITES: frozenset[Site] = frozenset({"attention", "embedding", "step cache", "kv cache", "sampler"})


@dataclass(frozen=True)
class Facts:
    """What a method owns, needs and can do. The generic tests hold every method to its facts.

    Attributes:
        site: the place in the model it takes.
        needs: what the host must be able to tell it.
        media: kinds of hosts it is meant for; image hosts have one frame or no grid at all, text hosts are causal
            language models, where only the prefill is attended by a method.
        hosts: kinds of networks it works on; empty: all whose attention shows its media.
        families: of block-diffusion models (:data:`hf_accel.hosts.block_context.FAMILIES`) it works on, by name;
            empty: all.
        backward: gradients flow through it; otherwise calls that need gradients run dense and are counted.
        compile: works in a model under ``torch.compile(fullgraph=True)``.
        batched: handles batch > 1; other calls run dense and are counted.
        causal: an attention method that honours a causal mask; others run dense there.
        exact: computes the unpatched result (to rounding) at every setting.
        full_budget: settings at which an approximate method equals the unpatched model.
        full_budget_error: relative error of the output there, in fp32. Above 1e-5 only where no setting is exact
            (8-bit weights are 8-bit weights).
        budget: the setting that dials the density, all else equal; density rises or falls with it. Benchmarks search
            along it, the break-even table is keyed by it. None: no single setting does.
        dtypes: accepted by its kernels; calls in others run dense and are counted.
        max_head_dim: of its GPU kernels; larger heads take the torch form, and the report says so.
    """

    site: Site
    needs: frozenset[Need] = frozenset()
    media: frozenset[Medium] = frozenset({"video"})
    hosts: frozenset[Host] = frozenset()
    families: frozenset[str] = frozenset()
    backward: bool = False
    compile: bool = True
    batched: bool = True
    causal: bool = False
    exact: bool = False
    full_budget: dict[str, Any] = field(default_factory=dict)
    full_budget_error: float = 1e-5
    budget: str | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    max_head_dim: int = 256

    @property
    def places(self) -> frozenset[tuple[Host, Medium]]:
        """The kinds of networks it works on, each with what their tokens show."""
        return frozenset((host, medium) for medium in self.media for host in self.hosts or HOSTS_OF[medium])


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


Party = type["Method"] | Foreign


def apart(a: Party, b: Party) -> str | None:
    """Why the two never meet, no model taking both; None if one does. Symmetric."""
    first, second = sorted((a, b), key=lambda party: party.name)
    families = [party.facts.families for party in (first, second) if not isinstance(party, Foreign)]
    strangers = len(families) == 2 and all(families) and not families[0] & families[1]
    if _places(first) & _places(second) and not strangers:
        return None
    words = (f"{party.name} is for {hosts_in_words(party)}" for party in (first, second))
    return f"no model takes both: {'; '.join(words)}"


def conflict(a: Party, b: Party) -> str | None:
    """Why two methods, or a method and something foreign, cannot be on one model together, or None. Symmetric.

    None also where they never meet (:func:`apart`).
    """
    if type(a) is type(b) and a.name == b.name:
        return None  # applying a method again replaces it
    if apart(a, b) is not None:
        return None
    first, second = sorted((a, b), key=lambda party: party.name)
    site = site_of(first)
    if site == site_of(second) and site in EXCLUSIVE_SITES:
        return f"{first.name} and {second.name} both own the {site} site of a model; only one can"
    for method, other in ((first, second), (second, first)):
        # A step cache runs the model's own forward in parts.
        if site_of(method) == "step cache" and isinstance(other, Foreign) and other.replaces_forward:
            return f"{method.name} runs parts of the model's forward, and {other.name} has replaced that forward"
    return None


def takes(cls: type[Method], module: torch.nn.Module) -> bool:
    """Whether a method is meant for this kind of network, by its facts alone."""
    spec, host = describe(module), host_of(module)
    if spec is None and host == "unet" and cls.facts.site == "attention":
        return False  # nobody reads its tokens
    shown = {spec.medium} if spec is not None else set(HOSTS_OF)
    return any(place == host and medium in shown for place, medium in cls.facts.places)


def site_of(party: Party) -> str | None:
    """The site that a method, or something foreign, takes."""
    return party.site if isinstance(party, Foreign) else party.facts.site


def _places(party: Party) -> frozenset[tuple[Host, Medium]]:
    if isinstance(party, Foreign):
        return frozenset((host, medium) for host in party.hosts for medium in HOSTS_OF)
    return party.facts.places


def hosts_in_words(party: Party) -> str:
    """The kinds of networks of a method, or of something foreign, for people."""
    if isinstance(party, Foreign):
        return ", ".join(sorted(party.hosts)) or "none that a method takes"
    media: dict[Host, list[str]] = {}
    for host, medium in sorted(party.facts.places):
        media.setdefault(host, []).append(medium)
    words = ", ".join(f"{host} ({', '.join(shown)})" for host, shown in media.items())
    return f"{words}: {', '.join(sorted(party.facts.families))}" if party.facts.families else words


class Given(dict[str, Any]):
    """What the caller handed over beside settings. Copies of a model share it, pickles leave it out: texts, models and
    functions are not ours to copy, and some cannot be."""

    def __deepcopy__(self, memo: dict) -> Given:
        return self

    def __reduce__(self) -> tuple[type[Given], tuple[()]]:
        return Given, ()


class Method(ABC):
    """A published method with its settings. Subclasses declare the class attributes and :meth:`install`.

    Attributes:
        name: registry name; the user types it.
        paper: title and arXiv number.
        summary: one line for ``methods()``.
        facts: see :class:`Facts`.
        Config: the settings class.
        trained_with: settings to which trained parameters are bound; weights trained with others are refused.
        inputs: what it takes beside settings, by keyword of ``apply``: data or objects, which no preset can hold
            (calibration texts, a tokenizer). In :meth:`install` those handed over are in ``self.given``.
        stands_on: methods without which it does not apply. In one request with one of them it is asked again when that
            one stands.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    facts: ClassVar[Facts]
    Config: ClassVar[type[Settings]]
    trained_with: ClassVar[tuple[str, ...]] = ()
    inputs: ClassVar[tuple[str, ...]] = ()
    stands_on: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Settings):
        self.config = config
        self.given = Given()

    @classmethod
    @abstractmethod
    def why_not(cls, model: Model) -> str | None:
        """Why the method does not apply to this model, in words; None if it does."""

    @abstractmethod
    def install(self, model: Model, ledger: Ledger, report: MethodReport, clock: Clock) -> Any:
        """Change the model through the ledger and write into the report. May raise; the caller undoes."""

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Parameters that the method added to the model, by dotted name there; empty if it learns nothing."""
        return {}

    def take_over(self, former: Any) -> None:  # noqa: B027 (a method that learns nothing takes nothing over)
        """Called before :meth:`install` when the same method stood on the model: keep what that one learned."""


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

    def install(self, model: Model, ledger: Ledger, report: MethodReport, clock: Clock) -> SeamContext:
        self._check_head_dim(model, report)
        return attention_host.install(model, AttentionRunner(self), ledger, report, clock)

    def _check_head_dim(self, model: Model, report: MethodReport) -> None:
        """Say before the first forward that the method's GPU kernel cannot do this model's heads."""
        head_dim = model.config.get("attention_head_dim")
        if not isinstance(head_dim, int) or head_dim <= self.facts.max_head_dim:
            return
        words = (
            f"the heads of {model.class_name} have {head_dim} dims; the Triton kernel does {self.facts.max_head_dim}"
        )
        if getattr(self.config, "backend", "auto") == "triton":
            raise UnsupportedByKernel(f"{self.name}: {words}. Use backend='auto' or 'torch'.")
        report.notes.append(f"{words}: the torch form runs everywhere")


class StepCacheMethod(Method):
    """A method that decides how much of the model each denoising step computes.

    Attributes:
        branch: the skip connection at which a U-Net is cut; see ``sites/step_cache/unet_views.py``.
        reads_timestep: :meth:`why_full` needs the noise level, which waits for the device.
    """

    branch: int
    reads_timestep: bool = False

    @abstractmethod
    def why_full(self, step: Step, kept: Step) -> str | None:
        """Why ``step`` is computed in full though the state of step ``kept`` is there; None if that is reused."""

    def begin(self, step: Step) -> None:
        """A generation begins at ``step``. May raise if it cannot be scheduled."""

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Refuse a forward with these arguments, by raising."""

    @classmethod
    def why_not(cls, model: Model) -> str | None:
        return step_cache_host.why_not(model.module)

    def install(self, model: Model, ledger: Ledger, report: MethodReport, clock: Clock) -> Any:
        return step_cache_host.install(model, self, ledger, report, clock)


class AttentionRunner:
    """Runs an attention method inside the seam: dense gate, grid check, state per layer and generation."""

    def __init__(self, method: AttentionMethod):
        self.method = method
        self.differentiable = method.facts.backward
        self._states: dict[tuple[int, int, int], Any] = {}
        self._verdicts: dict[Any, break_even.Verdict] = {}

    def reset(self) -> None:
        self._states = {}

    def attend(self, call: AttentionCall) -> torch.Tensor:
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
        if self._slower_than_dense(call):
            return call.fallback("slower than dense at this shape (on_slow)")
        # A cache may run half of a guidance batch within a generation: state of two items is not that of one.
        key = (call.layer.index, call.item, call.query.shape[0])
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
        return None

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
