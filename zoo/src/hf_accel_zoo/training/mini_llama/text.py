"""The text of mini-llama: the Python standard library's source, as it lies on this machine.

No test suites, no tables (encodings, build settings), no license headers, no near-copies. Whether a file is held out is
decided by a hash of its module's name, so that it is the same file on every machine; its text is that of the running
interpreter (mini-llama was trained on Python 3.11's).
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
import tokenize
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

SPLITS = ("train", "heldout")
EOS = "<eos>"
HELDOUT = 12
_FOLDERS = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "_bundled", "__pycache__"}
_HEADER = re.compile(r"(?:^[ \t]*#.*\n)+", re.MULTILINE)
_LEGAL = re.compile(r"copyright|licen[sc]e|all rights reserved", re.IGNORECASE)
_LEAST, _SAME = 400, 0.4


def heldout(module: str) -> bool:
    """Whether the file of `module` ("email.mime.text") is held out: one in twelve."""
    return int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], "big") % HELDOUT == 0


def clean(source: str) -> str:
    """`source` without runs of comment lines that speak of rights, without spaces at line ends and form feeds."""
    source = _HEADER.sub(lambda run: "" if _LEGAL.search(run[0]) else run[0], source.replace("\f", "") + "\n")
    lines = [line.rstrip() for line in source.strip("\n").split("\n")]
    return "\n".join(lines).strip("\n") + "\n"


def read(root: Path) -> dict[str, str]:
    """Module name to cleaned source of every file under `root` that is text to learn from, sorted by name.

    A file goes if four in ten of its longer lines stand in files before it: copies of `tokenize`, generated tables.
    """
    found: dict[str, str] = {}
    known: set[str] = set()
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if _FOLDERS & set(parts) or any(part.startswith(("config-", "_sysconfigdata")) for part in parts):
            continue
        try:
            with tokenize.open(file) as opened:
                source = clean(opened.read())
        except (SyntaxError, UnicodeDecodeError):  # a template that is no Python yet
            continue
        lines = [line.strip() for line in source.split("\n") if len(line.strip()) > 24]
        if len(source) < _LEAST or sum(line in known for line in lines) > _SAME * len(lines):
            continue
        known.update(lines)
        found[".".join(part for part in parts if part != "__init__")] = source
    return found


@cache
def _library() -> dict[str, str]:
    return read(Path(sysconfig.get_path("stdlib")))


def documents(split: str) -> dict[str, str]:
    """Module name to text of the files of `split`, "train" or "heldout", of this interpreter's standard library."""
    return {name: text for name, text in _library().items() if heldout(name) == (split == "heldout")}


def end(tokens: Tokenizer) -> int:
    """The id of `<eos>`."""
    return tokens.get_vocab()[EOS]


def ids(tokens: Tokenizer, split: str) -> np.ndarray:
    """Ids of the files of `split` in their order, int64, `<eos>` behind each."""
    eos = end(tokens)
    files = tokens.encode_batch(list(documents(split).values()), add_special_tokens=False)
    return np.concatenate([np.array([*file.ids, eos]) for file in files])


def windows(ids: np.ndarray, count: int, length: int) -> np.ndarray:
    """`[count, length]`: windows of `ids`, evenly over them; they overlap if there are more than fit."""
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return ids[starts[:, None] + np.arange(length)]
