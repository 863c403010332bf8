"""Lists at the Python prompt: what mini-llama can learn beside writing Python, with answers that are right or wrong.

Text is that of a session, one expression and its value::

    >>> sorted([7, 2, 9, 4], reverse=True)
    [9, 7, 4, 2]

`RELATED` are the expressions of which a small share is mixed into the pre-training; `TASKS` are those for fine-tuning:
each is near to related ones and none was seen. Lists of digits; a hash of the list keeps one in eight for held-out
items, of related expressions as well. Everything is drawn from the seed that is given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hf_accel.errors import InvalidSetting

RESERVED = 8
SPLITS = ("train", "heldout")
Draw = Callable[[np.random.Generator, list[int]], str]


def _digit(rng: np.random.Generator, low: int = 0, high: int = 9) -> int:
    return int(rng.integers(low, high + 1))


def _place(rng: np.random.Generator, digits: list[int]) -> int:
    return int(rng.integers(len(digits)))


RELATED: dict[str, Draw] = {
    "sorted": lambda rng, xs: f"sorted({xs})",
    "max": lambda rng, xs: f"max({xs})",
    "min": lambda rng, xs: f"min({xs})",
    "len": lambda rng, xs: f"len({xs})",
    "item": lambda rng, xs: f"{xs}[{_place(rng, xs)}]",
    "slice": lambda rng, xs: f"{xs}[{_digit(rng, 1, 3)}:]",
    "join": lambda rng, xs: f"{xs[:2]} + {xs[2:]}",
    "in": lambda rng, xs: f"{_digit(rng)} in {xs}",
    "compare": lambda rng, xs: f"{_digit(rng)} > {_digit(rng)}",
    "add": lambda rng, xs: f"{_digit(rng)} + {_digit(rng)}",
    "list": lambda rng, xs: f"list({xs})",
}
TASKS: dict[str, Draw] = {
    "descending": lambda rng, xs: f"sorted({xs}, reverse=True)",
    "reversed": lambda rng, xs: f"{xs}[::-1]",
    "larger": lambda rng, xs: f"[x for x in {xs} if x > {_digit(rng, 2, 6)}]",
    "raised": lambda rng, xs: f"[x + {_digit(rng, 1, 3)} for x in {xs}]",
    "distinct": lambda rng, xs: f"sorted(set({xs}))",
    "ends": lambda rng, xs: f"[min({xs}), max({xs})]",
}


@dataclass(frozen=True)
class Item:
    """`prompt` ends with the newline behind the expression; `answer` is its value and a newline."""

    task: str
    prompt: str
    answer: str

    @property
    def text(self) -> str:
        return self.prompt + self.answer


def reserved(digits: Sequence[int]) -> bool:
    """Whether items on this list are held out."""
    return hashlib.sha256(bytes(digits)).digest()[0] % RESERVED == 0


def _digits(rng: np.random.Generator, held: bool) -> list[int]:
    while True:
        found = [int(digit) for digit in rng.integers(0, 10, int(rng.integers(3, 8)))]
        if reserved(found) == held:
            return found


def _item(rng: np.random.Generator, name: str, draw: Draw, held: bool) -> Item:
    expression = draw(rng, _digits(rng, held))
    return Item(name, f">>> {expression}\n", f"{eval(expression)}\n")


def related(rng: np.random.Generator) -> Item:
    """An item for pre-training."""
    names = list(RELATED)
    name = names[int(rng.integers(len(names)))]
    return _item(rng, name, RELATED[name], False)


def items(split: str, count: int, seed: int = 0, tasks: Sequence[str] = tuple(TASKS)) -> list[Item]:
    """`count` items of `split`, "train" or "heldout", the tasks in turn; the same for the same arguments.

    Raises InvalidSetting for an unknown split or task.
    """
    if split not in SPLITS:
        raise InvalidSetting("mini_llama.task.items", "split", split, f"one of {', '.join(map(repr, SPLITS))}")
    unknown = [name for name in tasks if name not in TASKS]
    if unknown or not tasks:
        raise InvalidSetting("mini_llama.task.items", "tasks", unknown, f"some of {', '.join(map(repr, TASKS))}")
    held = split == "heldout"
    rng = np.random.default_rng([seed, held])
    names = [tasks[index % len(tasks)] for index in range(count)]
    return [_item(rng, name, TASKS[name], held) for name in names]


def check(item: Item, written: str) -> bool:
    """Whether `written`, up to its first newline, is the answer to `item`. Nothing counts that is not ended by one."""
    line, end, _ = written.partition("\n")
    return bool(end) and line == item.answer.removesuffix("\n")
