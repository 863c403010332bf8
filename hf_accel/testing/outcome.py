"""How a check ends: it returns, it raises :class:`BrokenPromise`, or it raises :class:`Skipped`."""

from __future__ import annotations

import unittest
from collections.abc import Iterator
from contextlib import contextmanager


class BrokenPromise(AssertionError):
    """A promise does not hold; the message says what was expected and what came."""


class Skipped(unittest.SkipTest):
    """The promise cannot be asked of this model here, and why.

    ``unittest`` and pytest both report it as a skipped test, so a kit that knows neither needs no adapter.
    """


def expect(holds: object, words: str) -> None:
    """Nothing, if ``holds`` is true.

    Raises:
        BrokenPromise: with ``words``, which say what was expected and what came.
    """
    if not holds:
        raise BrokenPromise(words)


@contextmanager
def expect_refusal(error: type[Exception], *words: str) -> Iterator[None]:
    """The block raises ``error``, and its message holds every one of ``words``.

    Raises:
        BrokenPromise: nothing was raised, or the message lacks a word. Errors of other types pass through.
    """
    try:
        yield
    except error as raised:
        for word in words:
            expect(word in str(raised), f"Expected a refusal that says {word!r}; it says: {raised}")
    else:
        raise BrokenPromise(f"Expected {error.__name__}; nothing was raised.")
