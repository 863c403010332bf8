"""The code blocks of the README and of the pages under docs/, as the tests read them.

A block that cannot run here stands below a comment that a reader of the page does not see::

    <!-- not run: needs two machines -->

A block that is a piece of a file, which has tests of its own, names the file::

    <!-- excerpt of examples/own-method/own_method/wsd.py -->
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(
    r"(?:^(?P<before>[^\n]*)\n)?^(?P<indent> *)```(?P<language>[\w+-]*)[^\n]*\n(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
_NOT_RUN = re.compile(r"<!-- not run: (.+) -->\s*\Z")
_EXCERPT = re.compile(r"<!-- excerpt of (\S+) -->\s*\Z")


@dataclass(frozen=True)
class Block:
    """One fenced block. ``line`` is that of its first line of code; ``not_run`` the reason why it is left out;
    ``excerpt_of`` the file that it is a piece of.
    """

    page: str
    line: int
    language: str
    code: str
    not_run: str | None
    excerpt_of: str | None

    @property
    def runs(self) -> bool:
        return self.language == "python" and self.not_run is None and self.excerpt_of is None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """Paths of all pages, relative to the repository."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "zoo" / "README.md", *ROOT.glob("docs/**/*.md")]
    return sorted(str(page.relative_to(ROOT)) for page in found)


def blocks(page: str, text: str | None = None) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = (ROOT / page).read_text() if text is None else text
    out = []
    for match in _BLOCK.finditer(text):
        reason, file = _NOT_RUN.search(match["before"] or ""), _EXCERPT.search(match["before"] or "")
        line = text.count("\n", 0, match.start("code")) + 1
        code = textwrap.dedent(match["code"])
        out.append(Block(page, line, match["language"], code, reason[1] if reason else None, file[1] if file else None))
    return out


def python_blocks(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


_COMMAND = re.compile(r"(?:\.venv/bin/)?hf-accel .+|python (?:.* -c|-m \S+|[\w/]\S*)( .*)?|make [\w-]+( .*)?")
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def commands(page: str) -> list[str]:
    """Command lines of the project that a page names: in fenced or indented blocks, and between backticks.

    Lines that end in a backslash are joined; comments, and the brackets around what may be left out, are taken off.
    """
    text = (ROOT / page).read_text()
    for block in python_blocks(page):
        text = text.replace(textwrap.indent(block.code, ""), "")
    lines = re.sub(r"\\\n\s*", "", text).split("\n")
    found = [line.strip() for line in lines if line.startswith("    ")]
    for block in blocks(page):
        if block.language in ("", "sh", "bash", "console"):
            found += re.sub(r"\\\n\s*", "", block.code).split("\n")
    found += _SPAN.findall(text)
    stripped = (re.sub(r"\s+#.*", "", line.strip()).replace("[", "").replace("]", "") for line in found)
    return list(dict.fromkeys(line for line in stripped if _COMMAND.fullmatch(line)))
