"""Digits at the Python prompt: what mini-llama can learn beside writing Python, with answers that are right or wrong.

Text is that of a session, one expression on a string of digits and its value::

    >>> ''.join(sorted('7294', reverse=True))
    '9742'

`RELATED` are the expressions of which a share is mixed into the pre-training; `TASKS` are those for fine-tuning: each
is near to related ones and none was seen. Every digit is a token. A hash of the string keeps one in eight for held-out
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
DIGITS = (3, 8)
Draw = Callable[[np.random.Generator, str], str]


def _digit(rng: np.random.Generator, low: int = 0, high: int = 9) -> int:
    return int(rng.integers(low, high + 1))


def _one_of(rng: np.random.Generator, digits: str) -> str:
    return digits[int(rng.integers(len(digits)))]


RELATED: dict[str, Draw] = {
    "str": lambda rng, s: f"str('{s}')",
    "sorted": lambda rng, s: f"''.join(sorted('{s}'))",
    "max": lambda rng, s: f"max('{s}')",
    "min": lambda rng, s: f"min('{s}')",
    "len": lambda rng, s: f"len('{s}')",
    "item": lambda rng, s: f"'{s}'[{_digit(rng, 0, len(s) - 1)}]",
    "tail": lambda rng, s: f"'{s}'[{_digit(rng, 1, 2)}:]",
    "head": lambda rng, s: f"'{s}'[:{_digit(rng, 1, len(s) - 1)}]",
    "sum": lambda rng, s: f"'{s[:2]}' + '{s[2:]}'",
    "in": lambda rng, s: f"'{_digit(rng)}' in '{s}'",
    "larger": lambda rng, s: f"'{_digit(rng)}' > '{_digit(rng)}'",
    "twice": lambda rng, s: f"'{s}' * 2",
}
TASKS: dict[str, Draw] = {
    "descending": lambda rng, s: f"''.join(sorted('{s}', reverse=True))",
    "reversed": lambda rng, s: f"'{s}'[::-1]",
    "filtered": lambda rng, s: f"''.join(x for x in '{s}' if x > '{_digit(rng, 2, 6)}')",
    "distinct": lambda rng, s: f"''.join(sorted(set('{s}')))",
    "replaced": lambda rng, s: f"'{s}'.replace('{_one_of(rng, s)}', '{_digit(rng)}')",
    "doubled": lambda rng, s: f"''.join(x + x for x in '{s}')",
    "ends": lambda rng, s: f"min('{s}') + max('{s}')",
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


def reserved(digits: str) -> bool:
    """Whether items on this string of digits are held out."""
    return hashlib.sha256(digits.encode()).digest()[0] % RESERVED == 0


def _digits(rng: np.random.Generator, held: bool) -> str:
    low, high = DIGITS
    while True:
        found = "".join(map(str, rng.integers(0, 10, int(rng.integers(low, high + 1)))))
        if reserved(found) == held:
            return found


def _item(rng: np.random.Generator, name: str, draw: Draw, held: bool) -> Item:
    expression = draw(rng, _digits(rng, held))
    return Item(name, f">>> {expression}\n", f"{eval(expression)!r}\n")


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
