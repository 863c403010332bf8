"""Which cells of the matrix a run asks, and what it found.

A cell is one promise of one method on one family. ``--cells`` chooses:

- ``all`` asks every cell;
- ``representative`` asks every promise of every method on one family of each kind (``REPRESENTATIVES`` of the kit);
- ``changed`` adds to these every cell of the methods that code touches which changed since they were recorded.

What a change touches is read from imports: a file of the package touches the methods whose module needs it, through
however many others. Files that nobody's cells can depend on touch none; anything else, and anything when git cannot
say what changed, touches all. Changed is what differs from the commit at which all cells of a method were recorded last
(``make test-all``), committed or not; so nothing goes unasked because it landed in several commits. For a method that
was never recorded it is what differs from main, or on main from the commit before.

Kernels are compiled ahead of time likewise: all cases of those that changed since they were recorded, the first case of
the others.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_accel"
RESULTS = ROOT / "tests" / "results"
LOG = RESULTS / "cells.jsonl"  # one line per cell that was asked: where the next run goes on
SUMMARY = RESULTS / "matrix.json"  # what the documentation shows
COMPILED = RESULTS / "compiled.json"  # kernels all of whose cases compile, by a hash of their code
CHOICES = ("all", "changed", "representative")
# Nothing that a cell runs is in these, unless the module of a method imports it.
QUIET = (
    "docs/", "benchmarks/", "configs/", "examples/", "zoo/", ".ci/", ".github/", ".gitignore", ".pre-commit",
    "Makefile", "mkdocs.yml", "LICENSE",
    "hf_accel/cli.py", "hf_accel/new.py", "hf_accel/skeletons/", "hf_accel/measure/", "hf_accel/train/",
    "hf_accel/presets/", "hf_accel/checkpoints/", "hf_accel/generation/",
)  # fmt: skip
LOUD_TESTS = ("tests/matrix/",)


# -- what changed ------------------------------------------------------------------------------------------------------


def git(*words: str) -> str | None:
    """What git says; None where there is no git, no repository, or no such thing."""
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


@functools.cache
def base() -> str | None:
    """Where this work left main; on main, the commit before."""
    head = git("rev-parse", "HEAD")
    for branch in ("origin/main", "main"):
        found = git("merge-base", "HEAD", branch)
        if found is not None and found != head:
            return found.strip()
    found = git("rev-parse", "HEAD~1")
    return found.strip() if found is not None else None


@functools.cache
def changed_files(since: str) -> frozenset[str] | None:
    """Paths that differ from a commit, committed or not, new ones included; None if git cannot say."""
    differing, new = git("diff", "--name-only", since), git("ls-files", "--others", "--exclude-standard")
    if differing is None or new is None:
        return None
    return frozenset(differing.split("\n") + new.split("\n")) - {""}


@functools.cache
def imports(module: str) -> frozenset[str]:
    """The modules of the package that a module names in an import, at its top or inside a function."""
    file = file_of(module)
    if file is None:
        return frozenset()
    named: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    parents = {name.rpartition(".")[0] for name in named}  # a package runs when one of its modules is imported
    # The package itself imports everything there is, and is asked of every cell.
    return frozenset(n for n in named | parents if n.startswith("hf_accel.") and file_of(n) is not None)


def file_of(module: str) -> Path | None:
    plain = ROOT / (module.replace(".", "/") + ".py")
    package = ROOT / module.replace(".", "/") / "__init__.py"
    return next((file for file in (plain, package) if file.is_file()), None)


@functools.cache
def needed_by(module: str) -> frozenset[str]:
    """Paths of all files that a module imports, itself included."""
    seen, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += imports(name)
    files = (file_of(name) for name in seen)
    return frozenset(str(file.relative_to(ROOT)) for file in files if file is not None)


def touched(files: Iterable[str] | None, modules: dict[str, str]) -> frozenset[str]:
    """The methods, of ``modules`` by name, that changes to ``files`` touch; all of them in doubt."""
    every = frozenset(modules)
    if files is None:
        return every
    out: set[str] = set()
    for file in files:
        users = {name for name, module in modules.items() if file in needed_by(module)}
        # A module that was deleted or is data: the methods of the folder that it lay in are touched.
        users |= {name for name, module in modules.items() if file.startswith(module.replace(".", "/") + "/")}
        if users:
            out |= users
        elif not quiet(file):
            return every
    return frozenset(out)


def quiet(file: str) -> bool:
    """Whether no cell can depend on a file."""
    if file.startswith("tests/"):
        return not file.startswith(LOUD_TESTS)
    return file.endswith(".md") or file.startswith(QUIET)


# -- what is asked -----------------------------------------------------------------------------------------------------


def parties(item: Any) -> tuple[frozenset[str], str | None] | None:
    """The methods and the family of a test of the matrix; None for a test that is no cell."""
    given = item.callspec.params if hasattr(item, "callspec") else {}
    if "promise" in given:
        return frozenset({given["promise"].method}), given["promise"].family
    if "pair" in given:
        from hf_accel import registry

        names = [part for part in given["pair"] if part in registry.methods()]
        return frozenset(names), next((part for part in given["pair"] if part not in names), None)
    return None


def wanted(item: Any, cells: str, of: frozenset[str], changed: frozenset[str]) -> bool:
    """Whether a test is asked: ``of`` methods alone if any are named, ``changed`` are those that a change touches."""
    from hf_accel.testing import REPRESENTATIVES

    found = parties(item)
    if found is None:
        return not of or "matrix" not in item.path.parts
    methods, family = found
    if of and not methods & of:
        return False
    if cells == "all" or family is None or family in REPRESENTATIVES:
        return True
    return cells == "changed" and bool(methods & changed)


def methods_changed() -> frozenset[str]:
    """The methods that code touches which changed since all of their cells were recorded."""
    from hf_accel import registry
    from hf_accel.testing import families

    rows = read_summary()
    out: set[str] = set()
    for name, cls in registry.methods().items():
        own = {row["family"]: row for row in rows if row["method"] == name}
        recorded = own.keys() >= {None, *families(name)}
        for commit in {row["commit"] for row in own.values()} if recorded else {base()}:
            out |= touched(changed_files(commit) if commit is not None else None, {name: cls.__module__})
    return frozenset(out)


def kernel_code(kernel: str, triton: str) -> str:
    """A hash of what decides how a kernel compiles: its folder, what kernels share, and the version of Triton."""
    digest = hashlib.sha256(triton.encode())
    for folder in (PACKAGE / "kernels" / kernel, PACKAGE / "kernels" / "common"):
        for file in sorted(folder.rglob("*.py")):
            digest.update(str(file.relative_to(PACKAGE)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def compiled(kernel: str, triton: str) -> bool:
    """Whether all cases of a kernel, as it is now, were recorded to compile on this version of Triton."""
    known = json.loads(COMPILED.read_text()) if COMPILED.is_file() else {}
    return known.get(f"{kernel} {triton}") == kernel_code(kernel, triton)


def record_compiled(kernel: str, triton: str) -> None:
    """All cases of a kernel compiled on this version of Triton."""
    known = json.loads(COMPILED.read_text()) if COMPILED.is_file() else {}
    known[f"{kernel} {triton}"] = kernel_code(kernel, triton)
    COMPILED.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


# -- what was found ----------------------------------------------------------------------------------------------------


@functools.cache
def code() -> str:
    """A hash of the package and of the libraries under it: cells that were asked of another are asked again."""
    digest = hashlib.sha256()
    for name in ("torch", "transformers", "diffusers", "peft"):
        digest.update(f"{name} {version(name)}\n".encode())
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def line_of(report: Any, promise: dict[str, Any]) -> dict[str, Any]:
    """One cell as it is written to the log."""
    reason = ""
    if report.skipped:
        reason = report.longrepr[2].removeprefix("Skipped: ")
    elif report.failed:
        reason = str(getattr(report.longrepr, "reprcrash", None) or report.longrepr).splitlines()[0]
    outcome = {"passed": "kept", "failed": "broken", "skipped": "skipped"}[report.outcome]
    found = {"outcome": outcome, "reason": reason, "seconds": round(report.duration, 2)}
    commit = (git("rev-parse", "--short", "HEAD") or "unknown").strip()
    return promise | found | {"code": code(), "commit": commit, "version": version("hf_accel")}


def logged(log: Path = LOG) -> list[dict[str, Any]]:
    """The lines of this code, the last one of each cell."""
    if not log.is_file():
        return []
    lines = (json.loads(line) for line in log.read_text().splitlines() if line.endswith("}"))
    return list({name_of(line): line for line in lines if line["code"] == code()}.values())


def name_of(line: dict[str, Any]) -> str:
    return "-".join(part for part in (line["method"], line["family"], line["promise"]) if part)


def done(log: Path = LOG) -> frozenset[str]:
    """Cells that need not be asked again."""
    return frozenset(name_of(line) for line in logged(log) if line["outcome"] != "broken")


def summarise(log: Path = LOG, summary: Path = SUMMARY) -> None:
    """Write rows of the log into the summary: one per method and family; rows of earlier code stay until replaced."""
    rows = {(row["method"], row["family"]): row for row in read_summary(summary)}
    fresh: dict[tuple[str, str | None], dict[str, Any]] = {}
    for line in sorted(logged(log), key=name_of):
        place = line["method"], line["family"]
        row = fresh.setdefault(
            place,
            {"method": place[0], "family": place[1], "kept": 0, "skipped": {}, "broken": {}}
            | {name: line[name] for name in ("version", "commit", "code")},
        )
        if line["outcome"] == "kept":
            row["kept"] += 1
        else:
            row[line["outcome"]][line["promise"]] = line["reason"]
    rows |= fresh
    ordered = [rows[place] for place in sorted(rows, key=lambda p: (p[0], p[1] or ""))]
    summary.parent.mkdir(parents=True, exist_ok=True)
    summary.write_text("[\n" + ",\n".join(json.dumps(row) for row in ordered) + "\n]\n")


def read_summary(summary: Path = SUMMARY) -> list[dict[str, Any]]:
    return json.loads(summary.read_text()) if summary.is_file() else []
