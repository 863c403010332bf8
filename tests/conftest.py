"""Where the kernels run (compiled if a GPU is here, else in Triton's interpreter), and which cells of the matrix do.

The first choice is made at import of this file, because Triton reads the variable when it is first imported. The second
is described in ``cells.py``.
"""

from __future__ import annotations

import json
import os

# One thread a process: the tests run in several processes, and OpenMP threads that wait for a busy core spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import cells

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser):
    group = parser.getgroup("matrix", "the matrix of promises")
    group.addoption("--cells", choices=cells.CHOICES, default="all", help="which cells (see tests/cells.py)")
    group.addoption("--method", action="append", default=[], help="cells of this method alone; may be repeated")
    group.addoption(
        "--record", action="store_true", help="write outcomes to tests/results/, and skip cells found there"
    )


def pytest_configure(config):
    # The workers of xdist must collect the same: what is done already is read once, before any of them starts.
    given = getattr(config, "workerinput", None)
    if not config.getoption("--record"):
        config.cells_done = frozenset()
    else:
        config.cells_done = frozenset(given["cells_done"]) if given is not None else cells.done()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["cells_done"] = sorted(node.config.cells_done)


def pytest_report_header(config):
    chosen = config.getoption("--cells")
    said = f"cells of the matrix: {chosen}"
    if chosen == "changed":
        said += f" (all families of: {', '.join(sorted(cells.methods_changed())) or 'no method'})"
    return f"{said}, {len(config.cells_done)} done already" if config.getoption("--record") else said


def pytest_collection_modifyitems(config, items):
    chosen, of = config.getoption("--cells"), frozenset(config.getoption("--method"))
    changed = cells.methods_changed() if chosen == "changed" else frozenset()
    kept, left_out = [], []
    for item in items:
        promise = item.callspec.params.get("promise") if hasattr(item, "callspec") else None
        asked = cells.wanted(item, chosen, of, changed) and str(promise) not in config.cells_done
        (kept if asked else left_out).append(item)
        if promise is not None:
            told = {"method": promise.method, "family": promise.family, "promise": promise.name}
            item.user_properties.append(("promise", told))
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


class Recorder:
    """Writes each cell when it was asked; lives where the reports of all workers arrive."""

    def __init__(self):
        cells.RESULTS.mkdir(exist_ok=True)
        self.file = cells.LOG.open("a")

    def pytest_runtest_logreport(self, report):
        promise = dict(report.user_properties).get("promise")
        if promise is not None and (report.when == "call" or not report.passed):
            self.file.write(json.dumps(cells.line_of(report, promise)) + "\n")
            self.file.flush()
        compiled = dict(report.user_properties).get("compiled")
        if compiled is not None and report.when == "call" and report.passed:
            cells.record_compiled(*compiled)

    def pytest_sessionfinish(self):
        self.file.close()
        cells.summarise()


def pytest_sessionstart(session):
    if session.config.getoption("--record") and not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(Recorder(), "recorder")


@pytest.fixture
def another_implementation():
    """Attention that somebody else has registered with transformers, as kernels from the Hub are."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for table in (AttentionInterface, AttentionMaskInterface):
        table.register("another", table()["sdpa"])
    yield
    for table in (AttentionInterface, AttentionMaskInterface):
        table._global_mapping.pop("another")
