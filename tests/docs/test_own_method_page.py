"""The page about methods of one's own shows the files of ``examples/own-method`` as they are."""

from __future__ import annotations

import re
from pathlib import Path

from hf_accel import method, new

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "your-own-method.md").read_text()
EXAMPLE = ROOT / "examples" / "own-method"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.S | re.M)
FILES = {file: file.read_text() for file in [*EXAMPLE.rglob("*.py"), EXAMPLE / "pyproject.toml"]}


def test_every_block_is_a_part_of_a_file_or_shell_commands():
    assert len(BLOCKS) > 8
    for language, text in BLOCKS:
        if language:
            assert any(text in whole for whole in FILES.values()), text
        else:
            assert all(re.match(r"(cd|pip|python) ", line) for line in text.splitlines()), text


def test_every_method_of_the_example_is_shown():
    shown = "".join(text for _, text in BLOCKS)
    for file in (EXAMPLE / "own_method").glob("[!_]*.py"):
        names = re.findall(r"^class (\w+)\(\w*(?:Method|Recipe)\)", file.read_text(), re.M)
        assert len(names) == 1, file
        assert f"class {names[0]}(" in shown


def test_every_site_that_a_package_is_written_for_has_a_row():
    rows = re.findall(r"^\| `([\w-]+)` \| `\w+` \|", PAGE, re.M)
    assert rows == list(new.SITES)


def test_what_authors_import_is_there():
    assert all(getattr(method, name) is not None for name in method.__all__)
    files = [*EXAMPLE.rglob("*.py"), *new.SKELETONS.glob("*.txt")]
    for names in re.findall(r"^from hf_accel\.method import (.*)$", "\n".join(map(Path.read_text, files)), re.M):
        assert {name.strip() for name in names.split(",")} <= set(method.__all__)


def test_links_lead_somewhere():
    headings = {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", PAGE, re.M)
    }
    for link in re.findall(r"\]\(([^)]+)\)", PAGE):
        if link.startswith("#"):
            assert link[1:] in headings, link
        elif not link.startswith("http"):
            assert (ROOT / "docs" / link).exists(), link
    mine = "[your own method](docs/your-own-method.md)"
    assert all(mine in (ROOT / name).read_text().lower() for name in ("README.md", "CONTRIBUTING.md"))
