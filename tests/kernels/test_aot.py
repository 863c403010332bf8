"""Every kernel compiles for sm80, sm90 and sm100, on the installed Triton and on 3.6.0, the oldest we allow.

One case per kernel and Triton, each in a process of its own with a limit of its own, so that a loaded machine with a
cold cache makes them slow one by one and never all at once. What was compiled is kept in ``.triton_cache/``.

All cases take half an hour of two cores. ``--cells changed`` compiles all of those kernels that changed since they were
recorded, and the first case of the others for sm90 (``tests/cells.py``).
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cells

ROOT = Path(__file__).parents[2]
OLDEST_TRITON = ROOT / ".triton36"
SCRIPT = Path(__file__).with_name("aot_main.py")
LIMIT = 1200  # seconds for one kernel; alone on a core the slowest takes a tenth of it
# By folder: asking a kernel for its cases imports Triton, for the interpreter in this process.
KERNELS = sorted(file.parent.name for file in (ROOT / "hf_accel" / "kernels").glob("*/triton.py"))


def test_kernels_are_found():
    assert len(KERNELS) >= 10


@pytest.mark.timeout(LIMIT + 60)
@pytest.mark.parametrize("version", ["installed", "3.6.0"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_compile(kernel, version, request, record_property):
    release = importlib.metadata.version("triton") if version == "installed" else version
    known = request.config.getoption("--cells") != "all" and cells.compiled(kernel, release)
    path = [ROOT, ROOT / "zoo" / "src"]
    if version != "installed":
        if not OLDEST_TRITON.is_dir():
            pytest.fail(f"{OLDEST_TRITON.name}/ is absent, so Triton 3.6.0 cannot be tested: `make test` installs it.")
        path.insert(0, OLDEST_TRITON)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    environment["TRITON_CACHE_DIR"] = str(ROOT / ".triton_cache" / version)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), kernel, *(["--first", "90"] if known else [])],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
    )
    first_line = done.stdout.splitlines()[0] if done.stdout else ""
    if version != "installed":
        assert first_line.startswith(f"triton {version} "), f"another Triton was imported: {first_line}"
    assert done.returncode == 0, done.stdout
    if not known:
        record_property("compiled", (kernel, release))
