"""The results page is what its script makes of the committed JSON."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "make"))
    import tables

    yield tables
    for name in [name for name in sys.modules if name.startswith("tables") or name == "page_parts"]:
        del sys.modules[name]


def test_no_figure_on_the_page_was_typed_by_hand(tables):
    assert tables.PAGE.read_text() == tables.page()


def test_every_result_has_a_section(tables):
    told = {name for name, _, _ in tables.SECTIONS}
    unused = {file.name for file in (ROOT / "benchmarks" / "results").glob("*.json")} - told
    assert not unused
