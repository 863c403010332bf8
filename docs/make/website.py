"""What the site has beside the pages as they lie here: a hook of mkdocs, and an extension of griffe.

``CONTRIBUTING.md`` and ``CHANGELOG.md`` stand at the root of the repository, where people look for them; on the site
they are pages too. Docstrings use roles of reStructuredText and tell some parameters together, neither of which griffe
knows.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
FROM_THE_ROOT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
REPOSITORY = "https://github.com/hf-accel/hf_accel/blob/main/"
_LINK = re.compile(r"\]\((?!https?:|#)([^)]+)\)")
_TOGETHER = re.compile(r"^( +)(\w+), (\w+(?:, \w+)*): ", re.MULTILINE)
# A line break that one kernel's docstring has lost. Mended there, every case of the kernel would be compiled anew.
_MISPLACED = re.compile(r"^( *)sorted\. key_order:", re.MULTILINE)
_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc):`~?\.*([^`]+)`")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from the root, with links that lead where they led from there."""
    for name, page in FROM_THE_ROOT.items():
        text = _LINK.sub(_moved, (ROOT / name).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    return files


def _moved(link: re.Match[str]) -> str:
    target = link[1]
    if target in FROM_THE_ROOT:
        return f"]({FROM_THE_ROOT[target]})"
    inside = target.startswith("docs/") and target.partition("#")[0].endswith(".md")
    return f"]({target.removeprefix('docs/')})" if inside else f"]({REPOSITORY}{target})"


class Docstrings(griffe.Extension):
    """Docstrings as the Markdown that the site's reader of Google's style expects."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Roles become code, ``::`` before a block a colon, and parameters told together one entry.

    Of ``seed, seeds: of the noise`` the reader knows no parameter; as ``seed: (also `seeds`) of the noise`` it does.
    """
    text = _ROLE.sub(r"`\1`", text)
    text = re.sub(r"^\s*::$", "", re.sub(r"(?<=\S)::$", ":", text, flags=re.M), flags=re.M)
    text = _MISPLACED.sub(r"\1    sorted.\n\1key_order:", text)
    head, arguments, rest = text.partition("Args:\n")
    section, end, tail = rest.partition("\n\n")
    return head + arguments + _TOGETHER.sub(_one_entry, section) + end + tail


def _one_entry(found: re.Match[str]) -> str:
    indent, first, others = found.groups()
    return f"{indent}{first}: (also {', '.join(f'`{name}`' for name in others.split(', '))}) "
