"""Requests: whose forward this is, so that callers who share a model share no more than the model.

What a site keeps between forwards (the clock, states of layers, statistics) belongs to a :class:`Request`. A forward
belongs to the request that was opened around it (:func:`request`), else to the asyncio task it runs in, else to its
thread. So threads and tasks that serve one model do not meet, and one caller need not know of any of this. Requests
that one thread serves in turns, or that wander from thread to thread, are opened by their caller.

A site keeps its state in a :class:`PerRequest`: one object that all requests share, and a fork of it for each.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import itertools
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar, cast

import torch

from hf_accel.errors import Interleaved

T = TypeVar("T", bound="Forked")
_NUMBERS = itertools.count(1)
_KEYS = itertools.count(1)
_LOCK = threading.RLock()  # held for bookkeeping, never while a model runs


def _renew_lock() -> None:
    global _LOCK
    _LOCK = threading.RLock()  # a thread of the parent process may have held it


os.register_at_fork(after_in_child=_renew_lock)


class Request:
    """One caller's work on models: a call of a pipeline, a text, a chat. A context manager that may be entered again,
    as when one loop serves several requests step by step.

    What methods keep for it is dropped when nobody holds the request any more; so hold it only as long as it runs, or
    as you want to ask for its statistics.

    Attributes:
        name: for people; None: none.
        number: in the order of creation, from 1.
    """

    def __init__(self, name: str | None = None):
        self.name, self.number = name, next(_NUMBERS)

    def __enter__(self) -> Request:
        _OPENED.set((*_OPENED.get(), self))
        return self

    def __exit__(self, *exc: Any) -> None:
        opened = _OPENED.get()
        mine = max((place for place, one in enumerate(opened) if one is self), default=None)
        if mine is not None:  # in a copied context that was entered later it is not there
            _OPENED.set(opened[:mine] + opened[mine + 1 :])

    def __repr__(self) -> str:
        return f"<Request {self.number}{f' {self.name!r}' if self.name is not None else ''}>"


# Those that were entered and not left, from the outside in.
_OPENED: contextvars.ContextVar[tuple[Request, ...]] = contextvars.ContextVar("hf_accel_requests", default=())


F = TypeVar("F", bound=Callable[..., Any])


def its_own_request(function: F) -> F:
    """A function whose every call is a request, unless its caller has opened one."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _OPENED.get():
            return function(*args, **kwargs)
        with Request(function.__name__):
            return function(*args, **kwargs)

    return cast(F, call)


class _OfThread(threading.local):
    """The request of a thread that opened none."""

    def __init__(self) -> None:
        self.request = Request(f"thread {threading.current_thread().name}")


_OF_THREAD = _OfThread()
_OF_TASKS: weakref.WeakKeyDictionary[asyncio.Task[Any], Request] = weakref.WeakKeyDictionary()


def current() -> Request:
    """The request to which a forward that begins now belongs."""
    opened = _OPENED.get()
    if opened:
        return opened[-1]
    if asyncio._get_running_loop() is not None and (task := asyncio.current_task()) is not None:
        found = _OF_TASKS.get(task)
        if found is None:
            with _LOCK:
                found = _OF_TASKS.setdefault(task, Request(f"task {task.get_name()}"))
        return found
    return _OF_THREAD.request


def in_backward() -> bool:
    """Whether autograd's backward pass runs in this thread."""
    return torch._C._current_graph_task_id() != -1


def in_functional_transform() -> bool:
    """Whether a transform of ``torch.func`` (jvp, vmap, grad) or forward-mode differentiation is on: tensors then carry
    what an operator that was not made for it drops without a word."""
    return torch.autograd.forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


class Occupied:
    """Refuses a second thread where one is inside: a request is one caller's, who does one thing at a time."""

    def __init__(self) -> None:
        self._by: int | None = None

    def enter(self) -> None:
        """A forward begins.

        Raises:
            Interleaved: another thread is in a forward of this request.
        """
        me = threading.get_ident()
        with _LOCK:
            if self._by not in (None, me) and _runs_a_module(self._by):
                raise Interleaved(
                    "hf_accel: two threads run one model at once inside one request. Nothing was mixed. Open a request "
                    "in each thread (`with hf_accel.request(model): ...`), or none: threads are told apart without."
                )
            self._by = me

    def leave(self) -> bool:
        """The forward is over. Whether it was this thread's: one that was refused has nothing to end."""
        with _LOCK:
            mine = self._by == threading.get_ident()
            if mine:
                self._by = None
            return mine

    def __getstate__(self) -> dict[str, Any]:
        return {"_by": None}  # nobody is inside of a copy


def _runs_a_module(thread: int | None) -> bool:
    """Whether a thread is inside the call of a module. torch calls no hooks after an exception that is no
    ``Exception`` (KeyboardInterrupt), so that nobody tells of the end of such a forward."""
    frame = sys._current_frames().get(thread) if thread is not None else None
    while frame is not None:
        if frame.f_code.co_name == "_call_impl" and frame.f_globals.get("__name__") == torch.nn.Module.__module__:
            return True
        frame = frame.f_back
    return False


class Forked(Protocol):
    """What a site keeps for each request.

    Attributes:
        run: statistics with ``merge(other)``, which adds those of another request.

    One with a method ``ended()`` is told when its request is gone.
    """

    run: Any

    def fork(self, request: Request) -> Any:
        """One more of the kind, for another request: shares what does not change, has seen no forward."""


class Counters:
    """What a site keeps for each request where that is nothing but statistics."""

    def __init__(self, run: Any):
        self.run = run

    def fork(self, request: Request) -> Counters:
        return Counters(type(self.run)())


class PerRequest(Generic[T]):
    """One object of a site for each request, made as requests come.

    A deep copy starts without requests, and with the counters so far; so does what is unpickled.

    Attributes:
        shared: the original, which runs nothing itself. Its ``run`` has the statistics of requests that are gone.
        key: names it where only numbers can be passed; see :func:`by_key`.
    """

    def __init__(self, shared: T):
        self.shared = shared
        self._forks: dict[int, tuple[weakref.ref[Request], T]] = {}
        self._gone: deque[Any] = deque()  # statistics that are still to be added up
        self._any_gone = False  # the shared one has statistics
        self._trained: T | None = None  # of the last forward that gradients were recorded of
        self._adopt_key()

    def _adopt_key(self) -> None:
        self.key = next(_KEYS)
        _BY_KEY[self.key] = self

    def now(self) -> T:
        """That of the request to which the forward that runs now belongs."""
        if self._trained is not None and in_backward():
            return self._trained  # checkpointing repeats a part of the forward, in a thread of autograd's own
        request = current()
        found = self._forks.get(id(request))
        return found[1] if found is not None else self.for_request(request)

    def begin(self) -> T:
        """As :meth:`now`, at the begin of a forward."""
        found = self.now()
        if torch.is_grad_enabled():
            self._trained = found
        return found

    def for_request(self, request: Request) -> T:
        """That of a request, made if there is none yet."""
        with _LOCK:
            found = self._forks.get(id(request))
            if found is None:
                self._add_up()
                fork = self.shared.fork(request)
                ended = functools.partial(_ended, weakref.ref(self), id(request))
                found = self._forks[id(request)] = weakref.ref(request, ended), fork
            return found[1]

    def of(self, request: Request) -> T | None:
        """That of a request; None if it never ran here."""
        found = self._forks.get(id(request))
        return found[1] if found is not None else None

    def all(self) -> list[T]:
        """The shared one and those of all requests that live."""
        with _LOCK:
            return [self.shared, *(fork for _, fork in list(self._forks.values()))]

    def total(self) -> Any:
        """The statistics of all requests together, in the order in which they came. While there is one request, these
        are its own, which go on counting."""
        if not self._forks and not self._gone and not self._any_gone:
            return self.now().run
        with _LOCK:
            self._add_up()
            living = [fork.run for _, fork in list(self._forks.values())]  # requests may end meanwhile
            if len(living) == 1 and not self._any_gone:
                return living[0]
            whole = copy.deepcopy(self.shared.run)
            for run in living:
                whole.merge(run)
            return whole

    def _add_up(self) -> None:
        while self._gone:
            self.shared.run.merge(self._gone.popleft())
            self._any_gone = True

    def __deepcopy__(self, memo: dict[int, Any]) -> PerRequest[T]:
        total = copy.deepcopy(self.total(), memo)
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__({"shared": copy.deepcopy(self.shared, memo), "total": total})
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {"shared": self.shared, "total": self.total()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["shared"])  # type: ignore[misc]
        self.shared.run, self._any_gone = state["total"], True


_BY_KEY: weakref.WeakValueDictionary[int, PerRequest[Any]] = weakref.WeakValueDictionary()


def by_key(key: int) -> PerRequest[Any] | None:
    """What an opaque operator in a compiled graph names by a number; None if its model is gone."""
    return _BY_KEY.get(key)


def _ended(owner: weakref.ref[PerRequest[Any]], identity: int, request: weakref.ref[Request]) -> None:
    """A request is gone, perhaps in the middle of a collection of garbage: let its state go, keep its statistics."""
    per_request = owner()
    if per_request is None:
        return
    with _LOCK:
        found = per_request._forks.pop(identity, None)
        if found is not None:
            per_request._gone.append(found[1].run)
            if hasattr(found[1], "ended"):
                found[1].ended()
