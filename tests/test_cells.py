"""Which cells a change reaches, and what is kept of a run."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

import cells
from hf_accel import registry
from hf_accel.testing import REPRESENTATIVES, families, promises

MODULES = {name: cls.__module__ for name, cls in registry.methods().items()}


@pytest.mark.parametrize(
    ("file", "methods"),
    [
        ("hf_accel/patches/svg2.py", {"svg2"}),
        ("hf_accel/patches/losa.py", {"losa", "quest"}),
        ("hf_accel/patches/sparge/plan.py", {"sparge"}),
        ("hf_accel/patches/sparge/deleted.py", {"sparge"}),
        ("hf_accel/kernels/kmeans/triton.py", {"svg2"}),
        ("hf_accel/sites/step_cache/seam.py", {"deepcache"}),
        ("docs/svg2.md", set()),
        ("README.md", set()),
        ("tests/patches/test_svg2.py", set()),
        ("hf_accel/measure/compare.py", set()),
    ],
)
def test_what_a_file_touches(file, methods):
    assert cells.touched([file], MODULES) == methods


@pytest.mark.parametrize(
    "file", ["hf_accel/ledger.py", "hf_accel/api.py", "hf_accel/testing/checks/forwards.py", "pyproject.toml", "new.py"]
)
def test_in_doubt_everything(file):
    assert cells.touched([file], MODULES) == set(MODULES)
    assert cells.touched(None, MODULES) == set(MODULES)


def test_a_seam_touches_all_that_stand_on_it():
    found = cells.touched(["hf_accel/sites/attention/seam.py"], MODULES)
    assert {"svg2", "sparge", "radial", "grat", "sla", "svg", "dense"} <= found


def test_every_method_has_a_representative_on_each_kind_that_it_claims():
    for method in registry.methods():
        assert not families(method) or set(families(method)) & set(REPRESENTATIVES), method


def item(name, method, family):
    promise = next(p for p in promises(method, family) if p.name == name)
    return SimpleNamespace(callspec=SimpleNamespace(params={"promise": promise}), path=cells.ROOT / "tests" / "matrix")


def test_what_is_asked():
    wan, ltx = (item("full_budget_is_dense", "svg2", family) for family in ("wan", "ltx"))
    none, svg2 = frozenset(), frozenset({"svg2"})
    assert cells.wanted(ltx, "all", none, none)
    assert cells.wanted(wan, "representative", none, none)
    assert not cells.wanted(ltx, "representative", none, svg2)
    assert cells.wanted(ltx, "changed", none, svg2)
    assert not cells.wanted(ltx, "changed", none, frozenset({"svg"}))
    assert not cells.wanted(wan, "all", frozenset({"svg"}), none)
    plain = SimpleNamespace(path=cells.ROOT / "tests" / "patches" / "test_svg2.py")
    assert cells.wanted(plain, "representative", svg2, none)


def line(promise, outcome, code=None, reason=""):
    told = {"method": "svg2", "family": "wan", "promise": promise, "outcome": outcome, "reason": reason}
    return told | {"seconds": 1.0, "code": code or cells.code(), "commit": "c", "version": "1"}


def test_a_run_goes_on_where_it_stopped(tmp_path):
    log, summary = tmp_path / "cells.jsonl", tmp_path / "matrix.json"
    lines = [
        line("first", "kept"), line("second", "broken", reason="no"), line("third", "skipped", reason="why"),
        line("fourth", "kept", code="of before"), line("fifth", "broken"), line("fifth", "kept"),
    ]  # fmt: skip
    log.write_text("".join(json.dumps(one) + "\n" for one in lines) + '{"method": "cut sh')
    assert cells.done(log) == {"svg2-wan-first", "svg2-wan-third", "svg2-wan-fifth"}
    older = [{"method": m, "family": "ltx", "kept": 3, "skipped": {}, "broken": {}} for m in ("svg", "svg2")]
    summary.write_text(json.dumps(older))
    cells.summarise(log, summary)
    rows = {(row["method"], row["family"]): row for row in json.loads(summary.read_text())}
    assert set(rows) == {("svg", "ltx"), ("svg2", "ltx"), ("svg2", "wan")}
    assert rows["svg2", "wan"]["kept"] == 2
    assert rows["svg2", "wan"]["broken"] == {"second": "no"}
    assert rows["svg2", "wan"]["skipped"] == {"third": "why"}
