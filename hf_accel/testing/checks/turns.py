"""Several requests on one model at once: in threads that take turns forward by forward, in asyncio tasks, and in
requests that one loop enters by turns."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from hf_accel.requests import Request

T = TypeVar("T")


def in_threads(model: torch.nn.Module, runs: Sequence[Callable[[], T]]) -> list[T]:
    """What each run returns, all of them in threads of their own that hand on at every forward of the model, so that
    forwards of different requests always alternate.

    Raises:
        BaseException: the first that a run raised.
    """
    turn, waiting = threading.Condition(), list(range(len(runs)))
    out: list[Any] = [None] * len(runs)
    raised: list[BaseException] = []
    mine = threading.local()

    def hand_on(*_: Any) -> None:
        with turn:
            if getattr(mine, "index", None) in waiting:
                waiting.append(waiting.pop(0))
                turn.notify_all()
                turn.wait_for(lambda: waiting[0] == mine.index, timeout=60)

    def work(index: int) -> None:
        mine.index = index
        with turn:
            turn.wait_for(lambda: waiting[0] == index, timeout=60)
        try:
            out[index] = runs[index]()
        except BaseException as error:  # noqa: BLE001 (raised again where the caller sees it)
            raised.append(error)
        finally:
            with turn:
                waiting.remove(index)
                turn.notify_all()

    hook = model.register_forward_pre_hook(hand_on)
    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(runs))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        hook.remove()
    if raised:
        raise raised[0]
    return out


def in_tasks(steps: Sequence[Sequence[Callable[[], T]]]) -> list[list[T]]:
    """What the steps of each run return, each run an asyncio task that lets the others go on after every step."""

    async def work(run: Sequence[Callable[[], T]]) -> list[T]:
        out = []
        for step in run:
            out.append(step())
            await asyncio.sleep(0)
        return out

    async def all_of_them() -> list[list[T]]:
        return list(await asyncio.gather(*(work(run) for run in steps)))

    return asyncio.run(all_of_them())


def by_turns(requests: Sequence[Request], steps: Sequence[Sequence[Callable[[], T]]]) -> list[list[T]]:
    """What the steps of each run return, one step of each in turn, each inside its request. Runs may differ in
    length."""
    out: list[list[T]] = [[] for _ in steps]
    for place in range(max(map(len, steps))):
        for index, (request, run) in enumerate(zip(requests, steps, strict=True)):
            if place < len(run):
                with request:
                    out[index].append(run[place]())
    return out
