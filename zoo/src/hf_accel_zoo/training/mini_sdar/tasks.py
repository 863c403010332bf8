"""The world of mini-sdar: contexts of shuffled records, and questions whose answers can be checked.

A context is a run of entries, each ended by `;`, with filler between them::

    # NAME w w w w ;          a record: 3 to 8 value words
    > NAME OTHER ;            a link to the record of OTHER
    ~ NAME w w ... w ;        a passage of 24 to 40 words
    { NAME 41 07 ... 33 ;     a list of 8 to 12 numbers

Nothing is aligned to blocks. Questions and answers (the answer is what the model writes, up to `<eos>`)::

    ? # NAME                  recall   w w w w
    ? > NAME                  link     OTHER w w w w               (two hops; the key between is shown)
    ? ~ NAME                  copy     w w ... w
    ? { NAME                  sort     07 33 41 ...
    ? + 3 4 7 & 2 8 5         add      7 5 1 2 , 4 8 1 3 , 3 2 0 6 = 0 6 3 2    (digits, carry, digit; low digits first)

**Held out by content**: a pair of (name, first word), (name, other), (name, first number) or of operands is reserved
when a hash of it says so, one in eight; no entry or sum of a training document is a reserved pair, every held-out
question asks for one. Held-out items also come from a different stream of random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TASKS = ("recall", "link", "copy", "add", "sort")
MARKERS = {"recall": "#", "link": ">", "copy": "~", "add": "+", "sort": "{"}
SPECIAL = ("<eos>", "<mask>", "<unk>", "?", "#", ">", "~", "{", ";", ",", "&", "+", "=")
NAMES, WORDS, FILLER, NUMBERS = 400, 192, 48, 64
# Names and numbers in use: the first minutes of training drew all of them, which was more than an hour can teach.
DRAWN, COUNTED = 128, 32
RESERVED = 8
BLOCK = 16
PASSAGE = (24, 40)


def _syllables(count: int, onsets: str, vowels: str, codas: Sequence[str]) -> list[str]:
    spoken = [
        a + b + c + d + e for e in codas for b in vowels for d in vowels for a in onsets for c in onsets if a != c
    ]
    step = len(spoken) // count
    return [spoken[index * step] for index in range(count)]


VOCABULARY: tuple[str, ...] = (
    *SPECIAL,
    *"0123456789",
    *(f"{number:02d}" for number in range(NUMBERS)),
    *(word.capitalize() for word in _syllables(NAMES, "bdklmnrst", "aeiou", ("", "n"))),
    *_syllables(WORDS, "bdgklmnprstv", "aeiou", ("l", "k")),
    *_syllables(FILLER, "hwy", "aeou", ("",)),
)
IDS = {word: index for index, word in enumerate(VOCABULARY)}
EOS, MASK = IDS["<eos>"], IDS["<mask>"]
_DIGIT = len(SPECIAL)
_NUMBER = _DIGIT + 10
_NAME = _NUMBER + NUMBERS
_WORD = _NAME + NAMES
_FILL = _WORD + WORDS


def encode(text: str) -> list[int]:
    """Ids of words split at spaces; what is not in the vocabulary becomes `<unk>`."""
    return [IDS.get(word, IDS["<unk>"]) for word in text.split()]


def decode(ids: Sequence[int]) -> str:
    return " ".join(VOCABULARY[index] for index in ids)


def reserved(first: int, second: int) -> bool:
    """Whether this pair (of ids, or of operands) is kept for held-out items."""
    return (first * 2654435761 + second * 40503 + (first ^ second) * 97) // 64 % RESERVED == 0


@dataclass(frozen=True)
class Turn:
    """A question of `task` and its answer, both ids; the answer without `<eos>`."""

    task: str
    question: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Item:
    """A held-out item: `prompt` is context and question."""

    task: str
    prompt: list[int]
    answer: list[int]


def check(item: Item | Turn, answer_ids: Sequence[int]) -> bool:
    """Whether the ids that were generated, cut at the first `<eos>`, answer the item.

    Every word counts, but for `add`, where the sum behind `=` does: a slip in the working that leaves it right is no
    wrong answer.
    """
    given = [int(index) for index in answer_ids]
    if EOS not in given:
        return False
    given = given[: given.index(EOS)]
    if item.task != "add":
        return given == item.answer
    equals = IDS["="]
    return equals in given and given[given.index(equals) :] == item.answer[item.answer.index(equals) :]


class _Draw:
    """Draws entries of one document; every name is the key of at most one of them."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.free = [int(index) + _NAME for index in rng.permutation(DRAWN)]
        self.records: dict[int, list[int]] = {}

    def _first(self, key: int, low: int, count: int, hold: bool) -> int:
        while reserved(key, second := low + int(self.rng.integers(count))) != hold:
            pass
        return second

    def record(self, hold: bool = False) -> tuple[list[int], Turn]:
        key = self.free.pop()
        rest = self.rng.integers(_WORD, _WORD + WORDS, int(self.rng.integers(2, 8))).tolist()
        value = [self._first(key, _WORD, WORDS, hold), *rest]
        self.records[key] = value
        return [IDS["#"], key, *value, IDS[";"]], Turn("recall", [IDS["?"], IDS["#"], key], value)

    def link(self, target: int, hold: bool = False) -> tuple[list[int], Turn]:
        at = next(at for at in range(len(self.free) - 1, -1, -1) if reserved(self.free[at], target) == hold)
        key = self.free.pop(at)
        answer = [target, *self.records[target]]
        return [IDS[">"], key, target, IDS[";"]], Turn("link", [IDS["?"], IDS[">"], key], answer)

    def passage(self, hold: bool = False, words: tuple[int, int] = PASSAGE) -> tuple[list[int], Turn]:
        key = self.free.pop()
        length = int(self.rng.integers(words[0], words[1] + 1))
        text = (self.rng.permutation(WORDS)[: length - 1] + _WORD).tolist()
        text = [self._first(key, _WORD, WORDS, hold), *text]
        return [IDS["~"], key, *text, IDS[";"]], Turn("copy", [IDS["?"], IDS["~"], key], text)

    def numbers(self, hold: bool = False) -> tuple[list[int], Turn]:
        # With so few numbers a name may have no reserved one.
        key = next(
            key for key in reversed(self.free) if any(reserved(key, _NUMBER + n) == hold for n in range(COUNTED))
        )
        self.free.remove(key)
        first = self._first(key, _NUMBER, COUNTED, hold)
        others = [int(n) + _NUMBER for n in self.rng.permutation(COUNTED) if int(n) + _NUMBER != first]
        items = [first, *others[: int(self.rng.integers(7, 12))]]
        return [IDS["{"], key, *items, IDS[";"]], Turn("sort", [IDS["?"], IDS["{"], key], sorted(items))

    def sum(self, hold: bool = False) -> Turn:
        digits = int(self.rng.integers(2, 5))
        low, high = 10 ** (digits - 1), 10**digits
        while True:
            a, b = (int(n) for n in self.rng.integers(low, high, 2))
            if reserved(a, b) == hold:
                break
        working, carry = [], 0
        for place in range(digits):
            x, y = a // 10**place % 10, b // 10**place % 10
            carry, digit = divmod(x + y + carry, 10)
            working.append(f"{x} {y} {carry} {digit}")
        question = f"? + {' '.join(str(a))} & {' '.join(str(b))}"
        answer = f"{' , '.join(working)} = {' '.join(f'{a + b:0{digits + 1}d}')}"
        return Turn("add", encode(question), encode(answer))


def _filler(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(_FILL, _FILL + FILLER, count).tolist()


def _context(
    draw: _Draw, length: int, entries: list[list[int]], words: tuple[int, int]
) -> tuple[list[int], list[Turn]]:
    """A context of exactly `length` tokens that holds `entries` and others; the turns that the others can answer."""
    rng, turns = draw.rng, []
    free = length - sum(map(len, entries))
    left = dict(zip(MOST, (int(rng.integers(most // 2, most + 1)) for most in MOST.values()), strict=True))
    filler = int(free * rng.uniform(0.05, 0.2))
    free -= filler
    needs = {"record": 11, "link": 4, "passage": words[1] + 3, "numbers": 15}
    while kinds := [kind for kind in left if left[kind] and free >= needs[kind] and (kind != "link" or draw.records)]:
        weights = np.array([left[kind] for kind in kinds], dtype=float)
        kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]
        left[kind] -= 1
        if kind == "record":
            entry, turn = draw.record()
        elif kind == "link":
            entry, turn = draw.link(list(draw.records)[int(rng.integers(len(draw.records)))])
        elif kind == "passage":
            entry, turn = draw.passage(words=words)
        else:
            entry, turn = draw.numbers()
        entries.append(entry)
        turns.append(turn)
        free -= len(entry)
    rest = filler + free
    cuts = np.sort(rng.integers(0, rest + 1, len(entries)))
    runs = np.diff(np.concatenate([[0], cuts, [rest]]))
    context: list[int] = []
    for run, index in zip(runs[:-1], rng.permutation(len(entries)), strict=True):
        context += [*_filler(rng, int(run)), *entries[index]]
    return context + _filler(rng, int(runs[-1])), turns


MOST = {"record": 8, "link": 3, "passage": 3, "numbers": 4}
ASKED = {"recall": 0.16, "link": 0.22, "copy": 0.27, "add": 0.06, "sort": 0.29}


def document(
    rng: np.random.Generator,
    context: int,
    total: int,
    *,
    words: tuple[int, int] = PASSAGE,
    asked: dict[str, float] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A training document of `total` tokens: a context of `context` tokens, then turns, each to the end of a block.

    Returns ids, roles (1 answer and its `<eos>`, 2 the `<eos>` that fill the block, 0 given) and tasks (index in
    :data:`TASKS`), each `[total]`. `words`: fewest and most words of a passage.
    """
    asked = asked or ASKED
    draw = _Draw(rng)
    ids, turns = _context(draw, context, [], words)
    left: dict[str, list[Turn]] = {task: [] for task in TASKS}
    for index in rng.permutation(len(turns)):
        left[turns[index].task].append(turns[index])
    roles, kinds = [0] * len(ids), [-1] * len(ids)
    names, weights = list(asked), np.array(list(asked.values()))
    misses = 0
    while misses < 6:
        task = names[int(rng.choice(len(names), p=weights / weights.sum()))]
        if task != "add" and not left[task]:
            misses += 1
            continue
        turn = draw.sum() if task == "add" else left[task].pop()
        lead = _filler(rng, int(rng.integers(0, 9)))
        written = len(lead) + len(turn.question) + len(turn.answer) + 1
        tail = -(len(ids) + written) % BLOCK
        if len(ids) + written + tail > total:
            misses += 1
            continue
        ids += [*lead, *turn.question, *turn.answer, *[EOS] * (1 + tail)]
        roles += [0] * (len(lead) + len(turn.question)) + [1] * (len(turn.answer) + 1) + [2] * tail
        kinds += [TASKS.index(turn.task)] * (written + tail)
    short = total - len(ids)
    return (
        np.array(ids + [EOS] * short, dtype=np.int64),
        np.array(roles + [0] * short, dtype=np.int8),
        np.array(kinds + [-1] * short, dtype=np.int8),
    )


def heldout(task: str, length: int, seed: int) -> Item:
    """Held-out item number `seed` of `task`; context and question together have `length` tokens."""
    rng = np.random.default_rng([7, TASKS.index(task), length, seed])
    draw = _Draw(rng)
    entries: list[list[int]] = []
    if task == "recall":
        entry, turn = draw.record(hold=True)
        entries.append(entry)
    elif task == "link":
        record, _ = draw.record(hold=True)
        entry, turn = draw.link(next(iter(draw.records)), hold=True)
        entries += [record, entry]
    elif task == "copy":
        entry, turn = draw.passage(hold=True)
        entries.append(entry)
    elif task == "sort":
        entry, turn = draw.numbers(hold=True)
        entries.append(entry)
    else:
        turn = draw.sum(hold=True)
    context, _ = _context(draw, length - len(turn.question), entries, PASSAGE)
    return Item(task, context + turn.question, turn.answer)
