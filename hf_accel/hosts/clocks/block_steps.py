"""Where block diffusion stands: which block, which denoising step of it, what is frozen in front of it.

A block-diffusion language model writes block after block. The K/V of finished blocks are frozen in a cache; the active
block runs again at every denoising step. Methods on such a model need to know which forward is a *prefill* (prompt
blocks enter the cache), a *denoise* step (reads the cache, never writes it) or a *commit* (the clean tokens of a
finished block enter the cache), and when what they remember is void: at a new block, a new request, or an exception.

A :class:`BlockClock` learns all this from the arguments of the model's forwards (:func:`follow` puts the hooks);
samplers, ours or foreign, need not know of it. Where the hooks stand and how the arguments are read differs per family
of models (:mod:`hf_accel.hosts.block_families`).

Every request on a model has a clock of its own (:mod:`hf_accel.requests`), and so has a copy of the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hf_accel.errors import Interleaved
from hf_accel.hosts.block_families import BlockFamily, ForwardRead, Reader, arguments_of
from hf_accel.ledger import Ledger
from hf_accel.requests import Occupied

Phase = Literal["prefill", "denoise", "commit", "whole"]


@dataclass(frozen=True, slots=True)
class BlockStep:
    """What a forward of a block-diffusion model is.

    Attributes:
        phase: ``"prefill"``, ``"denoise"``, ``"commit"``, or ``"whole"``: no cache is involved (training, scoring).
        generation: number of the request; nothing is remembered from one to the next.
        block: number of the block in this request, from 0.
        index: denoising step within the block, from 0.
        prefix: frozen positions in front of the block, padding included.
        length: positions of this forward.
    """

    phase: Phase
    generation: int
    block: int
    index: int
    prefix: int
    length: int


class BlockClock:
    """State of the block clock on one model.

    Args:
        family: of the model.
        mask_token: id of open positions, if the family has one.
        tokens: whether to compare the tokens of one step with those of the last. Needed by whoever keeps state between
            steps; waits for the device once per denoising step.

    Attributes:
        step: the forward that runs now; None outside of one.
        changed: bool ``[B, n]``, tokens that differ from those of the last denoising step of this block; None at a
            block's first step.
        most_changed: the largest number of changed tokens in a row of the batch; 0 where there is none to compare with.
    """

    def __init__(self, family: BlockFamily, mask_token: int | None = None, tokens: bool = True):
        self.family, self.mask_token, self.tokens = family, mask_token, tokens
        self.step: BlockStep | None = None
        self.changed: torch.Tensor | None = None
        self.most_changed = 0
        self._last: BlockStep | None = None
        self._tokens: torch.Tensor | None = None
        self._cache: weakref.ref | None = None
        self._left: tuple[weakref.ref, int] | None = None  # cache and prefix of a block that was left unfinished
        self._conditioned = False
        self._occupied = Occupied()
        self._rows = 0

    def fork(self) -> BlockClock:
        """One for another request."""
        return BlockClock(self.family, self.mask_token, self.tokens)

    def __deepcopy__(self, memo: dict) -> BlockClock:
        twin = memo[id(self)] = self.fork()
        return twin  # the request that runs is the original's

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.fork().__dict__)

    def begin(self, arguments: Mapping[str, Any], read: Reader | None = None) -> BlockStep:
        """A forward with these arguments begins. ``read`` is the family's unless the module has one of its own.

        Raises:
            Interleaved: it goes on with a block in a cache that another request's forwards followed, or another thread
                is in a forward of this request.
        """
        self._occupied.enter()
        given = (read or self.family.read)(arguments)
        phase, follows = self._phase(given)
        self._refuse_turns(given, phase)
        last = self._last
        generation, block, index = (last.generation, last.block, 0) if last is not None else (-1, -1, 0)
        self.changed, self.most_changed = None, 0
        if phase == "denoise" and follows and last is not None:
            same_block = last.phase == "denoise" and (last.prefix, last.length) == (given.prefix, given.shape[1])
            relation = self._relation(given) if same_block else "another block"
            follows = relation != "another request"
            if relation == "next step":
                index = last.index + 1
            else:
                self.changed, self.most_changed = None, 0
        if not follows:
            generation, block = generation + 1, -1
        if phase == "denoise" and index == 0:
            block += 1
        self.step = self._last = BlockStep(phase, generation, block, index, given.prefix, given.shape[1])
        self._rows, self._conditioned = given.shape[0], given.conditioned
        keep = self.tokens and phase == "denoise" and given.tokens is not None
        self._tokens = given.tokens.clone() if keep and given.tokens is not None else None
        self._cache = weakref.ref(given.cache) if given.cache is not None else None
        return self.step

    def end(self, raised: bool) -> None:
        """The forward is over; after an exception nothing of its request is remembered."""
        if not self._occupied.leave():
            return  # it was refused, while another one runs
        self.step = None
        if raised:
            self.forget()

    def forget(self) -> None:
        """The next forward belongs to another request."""
        self._cache = self._tokens = self.changed = None
        self.most_changed = 0

    def _refuse_turns(self, given: ForwardRead, phase: Phase) -> None:
        """Refuse a step of a block that other forwards followed: what is kept between steps was theirs since."""
        left, last = self._left, self._last
        if given.cache is None:
            return
        returns = left is not None and left[0]() is given.cache and left[1] == given.prefix
        if phase == "denoise" and returns and not self._is_first(given):
            self.forget()
            self._left = None
            raise Interleaved(
                "hf_accel: two texts are written in turns by one model in one thread or task. Nothing was mixed; both "
                "must begin their block again. Run the forwards of each inside a request of its own: "
                "`a = hf_accel.request(model)`, then `with a: ...` around every forward of the one, and likewise for "
                "the other."
            )
        mine = self._cache() if self._cache is not None else None
        if mine is not None and mine is not given.cache and last is not None and last.phase == "denoise":
            self._left = weakref.ref(mine), last.prefix

    def _is_first(self, given: ForwardRead) -> bool:
        """Whether a step begins its block anew, so that it goes on from nothing."""
        if not self.family.masked:
            return not given.conditioned
        return (
            given.tokens is not None and self.mask_token is not None and bool((given.tokens == self.mask_token).all())
        )

    def _phase(self, given: ForwardRead) -> tuple[Phase, bool]:
        """What this forward is, and whether it belongs to the request of the last one."""
        last = self._last
        if given.cache is None or last is None:
            return ("whole" if given.cache is None else "prefill" if given.stores else "denoise"), False
        same = self._cache is not None and self._cache() is given.cache
        follows = same and given.shape[0] == self._rows and given.prefix >= last.prefix
        if not given.stores:
            return "denoise", follows
        if follows and last.phase == "denoise" and last.prefix == given.prefix:
            return "commit", True
        return "prefill", follows and given.prefix > 0  # a cache that was emptied fills anew

    def _relation(self, given: ForwardRead) -> Literal["next step", "another block", "another request"]:
        """What two denoising forwards behind the same prefix are to each other; notes the changed tokens."""
        if self._conditioned and not given.conditioned:
            return "another block"  # which begins without the prediction of a step before it
        if not self.tokens:
            return "next step"
        if given.tokens is None or self._tokens is None:
            return "another block"  # nobody can tell
        self.changed = given.tokens != self._tokens
        most = self.changed.sum(1).max()
        if self.family.masked and self.mask_token is not None:
            # A committed position that is open again: rows of another request under the same cache.
            opened = (self.changed & (given.tokens == self.mask_token)).any()
            self.most_changed, again = torch.stack([most, opened.to(most.dtype)]).tolist()
            return "another request" if again else "next step"
        self.most_changed = int(most)
        return "next step"


class BlockHook:
    """Forward pre-hook of a watched module: tells the context of every forward. Nothing under ``torch.compile``."""

    def __init__(self, context: BlockClock, read: Reader | None = None):
        self.context, self.read = context, read

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self.context.begin(arguments_of(module, args, kwargs), self.read)


class BlockEndHook:
    """Forward hook of a watched module, called after exceptions too."""

    def __init__(self, context: BlockClock):
        self.context = context

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.context.end(raised=output is None)


def follow(
    module: torch.nn.Module,
    context: BlockClock,
    ledger: Ledger,
    begin: Callable[[Reader], Any] | None = None,
    end: Any = None,
) -> None:
    """Put the hooks on a model of the context's family.

    Args:
        begin: makes the pre-hook of a watched module from its reader; None: a :class:`BlockHook`.
        end: hook after each; None: a :class:`BlockEndHook`.
    """
    for watched, read in context.family.watched(module):
        ledger.pre_hook(watched, BlockHook(context, read) if begin is None else begin(read))
        ledger.post_hook(watched, BlockEndHook(context) if end is None else end)
