"""LLaDA2 behind diffusers' ``LLaDA2Pipeline``: forwards over a growing window whose finished blocks never change.

At every denoising step the pipeline calls ``model(x[:, :end], attention_mask=[B, end], position_ids=[B, end])`` and
reads the logits of the last block. Here the model's ``forward`` is overridden on the instance: the K/V of finished
blocks are kept, and only the rows behind them are computed. At a new block these are two blocks, the one just finished
(its K/V, with its final tokens, are thereby kept) and the new one; else one.

Nothing of this is taken for granted. The remote code decides which positions see which under a 2-D mask, and published
versions differ; so the cached forward and the model's own run both, until comparing their logits has shown that the
prefix is frozen (:class:`Verdict`). Where it is not, the model's own forward runs and the reason is counted.

The pipeline tells the model neither its block length nor that it reads the last block only. Both are known if the
calling frame is that of ``LLaDA2Pipeline.__call__`` (:func:`block_read`). Whoever else calls the model may want the
logits of all rows and gets them from the model's own forward.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import types
import weakref
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hf_accel.hosts.block_families import DIFFUSION_GEMMA, LLADA2, SDAR, arguments_of, family_of
from hf_accel.hosts.patching.forward_override import override_forward
from hf_accel.hosts.target import Model, kind
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport, Patched
from hf_accel.requests import PerRequest, Request
from hf_accel.sites.kv_cache.statistics import KVCacheStatistics
from hf_accel.sites.kv_cache.transformers import new_cache

_ATTRIBUTE = "_hf_accel_prefix_cache"

# Packages whose frames stand between the pipeline's call and our forward: they hand the logits on as they are.
_PLUMBING = ("torch", "accelerate", "transformers", "peft", "contextlib", "functools", "hf_accel")
_GIVEN = ("input_ids", "attention_mask", "position_ids")
# What remote code raises if it cannot do a forward with a cache and a 4-D mask.
_CANNOT = (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError)


class PrefixCacheCore(Protocol):
    """What is put into the site: judges whether two ways of computing logits agree."""

    def difference(self, native: torch.Tensor, cached: torch.Tensor, dtype: torch.dtype) -> str | None:
        """Why logits ``[B, b, V]`` of a model in ``dtype`` are not the same, in words; None if they are."""


def why_not(module: torch.nn.Module) -> str | None:
    """Why there is no prefix to be cached for this model, in words; None if there may be (the logits will tell)."""
    name, family = type(module).__name__, family_of(module)
    if family is None:
        return f"{name} is a {kind(module)}, not a block-diffusion language model"
    if family is SDAR:
        return f"{name} keeps the K/V of finished blocks when told to (store_kv); hf_accel.generate_blocks does"
    if family is DIFFUSION_GEMMA:
        return f"{name} caches its prefix itself; 'prefix-split' saves the copy of it in every layer and step"
    if family is not LLADA2:
        return f"{name} is of the {family.name} family: every token sees all others, so no prefix is ever frozen"
    missing = {"past_key_values", "use_cache"} - inspect.signature(type(module).forward).parameters.keys()
    if missing:
        return f"the forward of this {name} does not take {' and '.join(sorted(missing))}: it cannot be given K/V"
    own = module.__dict__.get("forward")
    if own is not None and _ATTRIBUTE not in module.__dict__ and "_old_forward" not in module.__dict__:
        return (
            f"the forward of this {name} was replaced by another library ({type(own).__name__}); take that off first, "
            "or apply hf_accel before it"
        )
    return None


def install(model: Model, core: PrefixCacheCore, ledger: Ledger, report: MethodReport) -> PrefixCacheSeams:
    """Keep the K/V of finished blocks of ``model``, once ``core`` finds that this changes nothing."""
    module: Any = model.module
    seams = PrefixCacheSeams(PrefixCacheSeam(core))
    report.run = seams
    ledger.set(module, _ATTRIBUTE, seams)
    override_forward(ledger, module, types.MethodType(_forward_of(module.__class__), module))
    report.patched.append(Patched(model.name, "", "forward against the K/V of finished blocks, once verified"))
    return seams


# -- the caller ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockRead:
    """A caller that reads the logits of the last ``length`` positions only.

    ``request`` is a tensor that lives as long as the caller's request, and no longer.
    """

    length: int
    request: torch.Tensor


def block_read() -> BlockRead | None:
    """How the pipeline that calls this forward reads its logits; None if it is not ``LLaDA2Pipeline`` that calls."""
    module = sys.modules.get("diffusers.pipelines.llada2.pipeline_llada2")
    if module is None:
        return None
    code = inspect.unwrap(module.LLaDA2Pipeline.__call__).__code__
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            # Not the tokens: what the pipeline returns is a view of them, which outlives the call.
            length, request = (frame.f_locals.get(name) for name in ("block_length", "position_ids"))
            if isinstance(length, int) and isinstance(request, torch.Tensor):
                return BlockRead(length, request)
            return None
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _PLUMBING:
            return None
        frame = frame.f_back
    return None


# -- one forward -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Window:
    """The arguments of one forward: ``tokens``, ``mask``, ``positions``, int ``[B, W]``, the last ``block`` active."""

    tokens: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    block: int

    @property
    def rows(self) -> int:
        """Positions of the window, W."""
        return self.tokens.shape[1]

    @property
    def start(self) -> int:
        """Where the active block begins: length of the prefix."""
        return self.rows - self.block

    def prefix(self, length: int) -> torch.Tensor:
        """All that K/V of the first ``length`` positions depend on, ``[3, B, length]``."""
        parts = (self.tokens, self.mask, self.positions)
        return torch.stack([part[:, :length].to(torch.long).expand(self.tokens.shape[0], -1) for part in parts])

    def visible(self, first: int, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask ``[B, 1, W - first, W]``: rows from ``first`` on see their own block and all before it."""
        place = torch.arange(self.rows, device=self.tokens.device)
        ends = (place[first:] // self.block + 1) * self.block
        seen = (place < ends[:, None]) & self.mask.bool()[:, None, None]
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def window_of(module: torch.nn.Module, arguments: Mapping[str, Any], read: BlockRead | None) -> Window | str:
    """The window of a forward, or why this forward is none that a prefix cache takes part in."""
    if read is None:
        return "not called by LLaDA2Pipeline: the logits of all rows may be wanted"
    if module.training or torch.is_grad_enabled():
        return "training mode or gradients"
    given = {name: value for name, value in arguments.items() if value is not None}
    if set(given) != set(_GIVEN) or any(given[name].ndim != 2 for name in _GIVEN):
        return "other arguments than tokens, a 2-D mask and positions"
    tokens, mask, positions = (given[name] for name in _GIVEN)
    if mask.shape != tokens.shape or positions.shape[1] != tokens.shape[1]:
        return "mask or positions of another length than the tokens"
    if tokens.shape[1] % read.length:
        return "a window that is no whole number of blocks"
    if tokens.shape[1] == read.length:
        return "the first block: nothing is in front of it"
    return Window(tokens, mask, positions, read.length)


@dataclass
class Verdict:
    """What comparisons have shown of forwards of one form (block length, hidden tokens, attention, dtype).

    A prefix of P tokens is frozen if P is a multiple of the model's own block size, whatever that is, and only then,
    tokens at both sides of the seam being visible. Hence: if prefixes of several lengths were frozen, so is every
    multiple of their greatest common divisor, ``aligned``.

    Attributes:
        aligned: 0 before the first comparison.
        grown: a comparison had K/V in it that were kept when a block was finished, not by a prefill.
        refused: why the cache is not used, for good.
    """

    aligned: int = 0
    grown: bool = False
    refused: str | None = None

    def covers(self, start: int, grows: bool) -> bool:
        """Whether a forward with a prefix of ``start`` tokens needs no comparison."""
        return self.aligned > 0 and start % self.aligned == 0 and (self.grown or not grows)

    def learn(self, start: int, grows: bool) -> None:
        """A forward was compared and equal."""
        self.aligned, self.grown = math.gcd(self.aligned, start), self.grown or grows


@dataclass
class Frozen:
    """K/V of the prefix, and what they were computed from."""

    cache: Any
    of: torch.Tensor

    @property
    def length(self) -> int:
        return self.of.shape[2]

    def begins(self, window: Window) -> bool:
        """Whether ``window`` begins with this prefix. Waits for the device."""
        return (
            self.length <= window.start
            and self.of.shape[1] == window.tokens.shape[0]
            and self.of.device == window.tokens.device
            and torch.equal(self.of, window.prefix(self.length))
        )


# Yields arguments of the model's own forward, is sent what that returns, and returns what the caller gets.
Forwards = Generator[dict[str, Any], Any, Any]


class PrefixCacheSeam:
    """State of one request with a prefix cache: K/V live as long as the pipeline call they belong to. Verdicts are of
    the model, and stay."""

    def __init__(self, core: PrefixCacheCore, verdicts: dict[tuple[Any, ...], Verdict] | None = None):
        self.core, self.run = core, KVCacheStatistics()
        self._verdicts: dict[tuple[Any, ...], Verdict] = {} if verdicts is None else verdicts
        self._frozen: Frozen | None = None
        self._request: weakref.ref[torch.Tensor] | None = None
        self._shown: tuple[torch.Tensor, tuple[Any, ...], Any] | None = None
        self._mask: tuple[torch.Tensor, tuple[Any, ...], torch.Tensor] | None = None

    def fork(self, request: Request) -> PrefixCacheSeam:
        return PrefixCacheSeam(self.core, self._verdicts)

    def steps(self, module: Any, arguments: dict[str, Any]) -> Forwards:
        """One call of the patched forward, as the forwards of the model that it takes."""
        self.run.forwards += 1
        read = block_read()
        self._follow(read)
        window = window_of(module, arguments, read)
        if isinstance(window, str):
            return (yield from self._native(arguments, window))
        form = self._form(module, window)
        if isinstance(form, str):
            return (yield from self._native(arguments, form))
        verdict = self._verdicts.setdefault(form, Verdict())
        if verdict.refused is not None:
            return (yield from self._native(arguments, verdict.refused))
        try:
            return (yield from self._with_cache(module, arguments, window, verdict))
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """Forget the K/V that are kept, and all that was worked out for them."""
        self._frozen = self._shown = self._mask = None

    def _follow(self, read: BlockRead | None) -> None:
        """Notice another request: nothing is kept from one to the next, in which weights may have changed."""
        if read is None or (self._request is not None and self._request() is read.request):
            return
        self.drop()  # what is left if the last one raised and its frames are still held by a traceback
        self._request = weakref.ref(read.request, self._ended)
        self.run.generations += 1

    def _ended(self, request: weakref.ref) -> None:
        if request is self._request:
            self.drop()

    def _native(self, arguments: dict[str, Any], reason: str) -> Forwards:
        self.run.dense_calls[reason] += 1
        given = [arguments[name] for name in ("input_ids", "inputs_embeds") if arguments.get(name) is not None]
        rows = math.prod(given[0].shape[:2]) if given else 0
        self.run.rows_native += rows
        self.run.rows_computed += rows
        return (yield arguments)

    def _form(self, module: Any, window: Window) -> tuple[Any, ...] | str:
        """What a verdict is on, or why no verdict could be had. Reads the device once per block, in which the pipeline
        keeps its mask."""
        key = _version(window.mask), window.tokens.shape, window.block
        if self._shown is None or self._shown[0] is not window.mask or self._shown[1] != key:
            self._shown = window.mask, key, _hidden_tokens(window)
        hidden = self._shown[2]
        if isinstance(hidden, str):
            return hidden
        if len(self._verdicts) >= 64:
            self._verdicts.clear()
        return window.block, hidden, getattr(module.config, "_attn_implementation", None), _dtype_of(module)

    def _with_cache(self, module: Any, arguments: dict[str, Any], window: Window, verdict: Verdict) -> Forwards:
        run, batch = self.run, window.tokens.shape[0]
        run.rows_native += batch * window.rows
        if self._frozen is not None and not self._frozen.begins(window):
            self._frozen = None
            run.prefills["the prefix changed"] += 1
        elif self._frozen is None:
            run.prefills["the first block of a request"] += 1
        grows = self._frozen is not None and self._frozen.length < window.start
        if verdict.covers(window.start, grows):
            out = yield from self._cached(module, window)
            run.cached_forwards += 1
            return out
        whole = yield arguments
        run.rows_computed += batch * window.rows
        try:
            cached = yield from self._cached(module, window)
        except torch.OutOfMemoryError:
            raise
        except _CANNOT as error:
            verdict.refused = f"a forward with K/V and a 4-D mask raised {type(error).__name__}: {error}"
        else:
            verdict.refused = self.core.difference(whole.logits[:, -window.block :], cached.logits, _dtype_of(module))
        if verdict.refused is None:
            verdict.learn(window.start, grows)
            run.verified += 1
        else:
            self.drop()
            run.dense_calls[verdict.refused] += 1
        return whole

    def _cached(self, module: Any, window: Window) -> Forwards:
        """The output of the model for the active block, ``logits [B, b, V]``; K/V of all before it are kept."""
        if self._frozen is None:
            self._frozen = yield from self._prefilled(window)
        frozen = self._frozen
        first = frozen.length
        tokens, _, positions = (part[:, first:] for part in _parts(window))
        self.run.rows_computed += tokens.numel()
        out = yield {
            "input_ids": tokens,
            "attention_mask": self._visible(window, first, _dtype_of(module)),
            "position_ids": positions,
            "past_key_values": frozen.cache,
            "use_cache": True,
        }
        self.run.kept_bytes = max(self.run.kept_bytes, frozen.cache.nbytes)
        _filled(frozen.cache, window.rows).truncate(window.start)
        if first < window.start:
            self._frozen = Frozen(frozen.cache, window.prefix(window.start))
        out.logits = out.logits[:, -window.block :]
        return out

    def _prefilled(self, window: Window) -> Forwards:
        """The prefix alone, under the model's own mask."""
        cache, length = new_cache(), window.start
        self.run.rows_computed += window.tokens.shape[0] * length
        alone = {name: part[:, :length] for name, part in zip(_GIVEN, _parts(window), strict=True)}
        yield alone | {"past_key_values": cache, "use_cache": True}
        return Frozen(_filled(cache, length), window.prefix(length))

    def _visible(self, window: Window, first: int, dtype: torch.dtype) -> torch.Tensor:
        """The 4-D mask, made once for the steps of a block."""
        key = _version(window.mask), window.tokens.shape, window.block, first, dtype
        if self._mask is None or self._mask[0] is not window.mask or self._mask[1] != key:
            self._mask = window.mask, key, window.visible(first, dtype)
        return self._mask[2]


PrefixCacheSeams = PerRequest[PrefixCacheSeam]


def _hidden_tokens(window: Window) -> tuple[Any, ...] | str:
    """Whether the prefix has hidden tokens, and which of the active block are, in the row that shows most of it: a row
    with a hidden half would not tell a model whose blocks are half as long. A text if no row shows both sides of the
    seam, where nothing could be learnt."""
    rows = window.mask[:, window.start - 1 :].bool().tolist()
    best = max(rows, key=sum)
    if not (best[0] and best[1]):
        return "hidden tokens where the active block begins"
    return not bool(window.mask[:, : window.start].bool().all()), tuple(best[1:])


def _parts(window: Window) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return window.tokens, window.mask, window.positions


def _version(tensor: torch.Tensor) -> int:
    """Counts changes in place, outside of inference mode; the pipeline makes none to its masks."""
    return 0 if tensor.is_inference() else tensor._version


def _filled(cache: Any, length: int) -> Any:
    """The cache, after making sure that the model wrote into it."""
    found = cache.get_seq_length()
    if found != length:
        raise RuntimeError(f"the model left {found} positions in the cache that it was given, expected {length}")
    return cache


def _dtype_of(module: Any) -> torch.dtype:
    """Of the hidden states: what remote code adds the mask to."""
    return module.get_input_embeddings().weight.dtype


@dataclass(frozen=True)
class _Done:
    out: Any


def _begin(module: Any, args: tuple, kwargs: dict[str, Any]) -> Forwards:
    return module.__dict__[_ATTRIBUTE].now().steps(module, arguments_of(module, args, kwargs))


def _advance(forwards: Forwards, out: Any = None, error: BaseException | None = None) -> dict[str, Any] | _Done:
    """Arguments of the next forward, after one that returned ``out`` or raised ``error``."""
    try:
        return forwards.send(out) if error is None else forwards.throw(error)
    except StopIteration as stop:
        return _Done(stop.value)


def _close(forwards: Forwards) -> None:
    forwards.close()


@functools.cache
def _forward_of(cls: Any) -> Callable:
    """The override of ``cls.forward``: runs it as often as it takes. Keeps the signature, which peft inspects."""
    native, reason = cls.forward, "hf_accel chooses which rows are computed"
    # What runs is decided at every call, outside of any graph; what is compiled is ``native``.
    begin, advance, close = (torch._dynamo.disable(decide, reason=reason) for decide in (_begin, _advance, _close))

    @functools.wraps(native)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _ATTRIBUTE not in self.__dict__:  # undone by force, while somebody's wrapper still calls this
            return native(self, *args, **kwargs)
        forwards = begin(self, args, kwargs)
        try:
            call = advance(forwards)
            while not isinstance(call, _Done):
                try:
                    out = native(self, **call)
                except _CANNOT as error:
                    call = advance(forwards, error=error)
                else:
                    call = advance(forwards, out)
        finally:
            close(forwards)
        return call.out

    return torch._dynamo.disable(forward, recursive=False, reason=reason)
