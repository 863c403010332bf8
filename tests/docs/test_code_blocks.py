"""Every code block of the README and of docs/ does what it says, as it stands.

Python blocks are run, page by page, in a process beside this one (``run_pages.py``) with tiny models under the names
that the pages use (``stand_ins.py``). Of commands the arguments are read, YAML and JSON are parsed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import code_blocks
import pytest
import yaml
from code_blocks import ROOT

pytestmark = pytest.mark.xdist_group("code blocks")  # one process that imports everything, not one per worker

LANGUAGES = {"", "python", "yaml", "json", "toml", "text", "sh"}
PAGES = code_blocks.pages()
# Blocks that are not run, each with its reason on the page. Where more seem to be needed, change the page first.
MOST_NOT_RUN = 2


@pytest.fixture(scope="module")
def runner():
    """A function: the path of a page, or the words of a command, to what came of it."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("run_pages.py"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "zoo" / "src")])},
    )  # fmt: skip

    def ask(work: str | list[str]) -> dict:
        process.stdin.write(json.dumps(work) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, "the process that runs pages has ended: python tests/docs/run_pages.py PAGE shows why"
        return json.loads(answer)

    yield ask
    process.stdin.close()
    process.wait(60)


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.runs for block in code_blocks.blocks(page))])
def test_python_blocks_run(page, runner):
    found = runner(page)
    assert found["error"] is None, f"{page} fails as it stands:\n{found['error']}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page, runner):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in code_blocks.commands(page):
        words = shlex.split(command)
        if words[0] == "make":
            assert words[1] in targets, f"{page}: {command}"
            continue
        if "-c" in words:
            compile(words[words.index("-c") + 1], page, "exec")
            continue
        if words[0] == "python" and words[1] != "-m":
            file = ROOT / words[1]
            assert file.is_file(), f"{page}: {command}"
            if not re.search("parse_args|from common import", file.read_text()):
                assert words[2:] in ([], [">", words[-1]]), f"{page}: {words[1]} takes no arguments"
                continue
        named = not any(word.startswith("-") for word in words[3:])  # "the table of `hf-accel bench attention`"
        found = runner([*words, "--help"] if named else words)
        assert found["error"] is None, f"{page}: {command}\n{found['error']}"


@pytest.mark.parametrize("page", PAGES)
def test_data_blocks_parse(page):
    for block in code_blocks.blocks(page):
        assert block.language in LANGUAGES, f"{block}: {block.language!r} is none of {sorted(LANGUAGES)}"
        if block.language in ("yaml", "json"):
            assert isinstance(yaml.safe_load(block.code), dict), block
        if block.language == "json":
            json.loads(block.code)
        if block.language == "toml":
            assert tomllib.loads(block.code), block


def test_presets_on_the_pages_are_presets():
    from hf_accel.presets import families, files

    for block in code_blocks.blocks("docs/configs.md"):
        if block.language == "yaml":
            family = yaml.safe_load(block.code).get("family")
            assert families.parse(block.code, f"{family}.yaml") if family else files.parse(block.code, str(block))


def test_excerpts_are_what_their_files_say():
    for page in PAGES:
        for block in code_blocks.blocks(page):
            assert block.excerpt_of is None or block.code in (ROOT / block.excerpt_of).read_text(), block


def test_few_blocks_are_not_run_and_each_says_why():
    left_out = [block for page in PAGES for block in code_blocks.blocks(page) if block.not_run is not None]
    assert len(left_out) <= MOST_NOT_RUN, [str(block) for block in left_out]
    assert all(len(block.not_run.split()) >= 3 for block in left_out)
    for page in PAGES:
        text = (ROOT / page).read_text()
        for block in code_blocks.blocks(page):  # one page shows such a comment in a block
            text = text.replace(block.code, "")
        marks = sum(block.page == page for block in left_out)
        assert text.count("<!-- not run") == marks, f"{page}: a comment 'not run' stands right above its block"


def test_how_pages_are_read():
    text = "a\n\n<!-- not run: needs a GPU -->\n```python\nx = 1\n```\n\n- b\n\n  ```yaml\n  a: 1\n  ```\n"
    first, second = code_blocks.blocks("page.md", text)
    assert (first.language, first.code, first.line, first.not_run) == ("python", "x = 1\n", 5, "needs a GPU")
    assert first.runs is False
    assert (second.language, second.code, second.not_run) == ("yaml", "a: 1\n", None)
