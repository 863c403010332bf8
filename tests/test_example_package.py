"""``examples/own-method`` as an author ships it: a wheel, installed where this repository is not looked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_accel

EXAMPLE = Path(__file__).parents[1] / "examples" / "own-method"
METHODS = {"local-window", "int8-cache", "low-rank-repair", "skip-steps", "repeat-ngram", "wsd"}
LISTING = "import hf_accel, own_method; print(own_method.__file__); print(*hf_accel.methods())"


def run(*words: object, **more) -> str:
    """What a process of this Python says; a failed one fails the test with that."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=500, check=False, **more
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder of installed packages with the example in it, and the environment of a process that sees it."""
    folder = tmp_path_factory.mktemp("own")
    source = folder / "source"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("__pycache__", "dist"))
    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--target", folder / "site", wheel)
    ours = Path(hf_accel.__file__).parents[1]
    path = os.pathsep.join(map(str, (folder / "site", ours)))
    return folder, os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def test_installing_it_is_all_that_makes_its_methods_known(installed):
    folder, environment = installed
    place, names = run("-W", "error::RuntimeWarning", "-c", LISTING, cwd=folder, env=environment).splitlines()
    assert Path(place).is_relative_to(folder / "site")
    assert set(names.split()) >= METHODS
    assert not METHODS & set(hf_accel.methods())


def test_its_own_tests_pass_there(installed):
    folder, environment = installed
    tests = shutil.copytree(EXAMPLE / "tests", folder / "elsewhere" / "tests", ignore=shutil.ignore_patterns("__pyc*"))
    # What compiles is half of the time, and says nothing of how the package was installed.
    chosen = ("-k", "not compile")
    told = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, tests, cwd=tests, env=environment)
    assert "passed" in told
    assert "failed" not in told
