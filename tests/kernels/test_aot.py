"""Every kernel compiles for sm80, sm90 and sm100, on the installed Triton and on 3.6.0, the oldest we allow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OLDEST_TRITON = ROOT / ".triton36"
SCRIPT = Path(__file__).with_name("aot_main.py")


def start(python_path: list[Path]) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [*python_path, ROOT]))
    return subprocess.Popen(
        [sys.executable, str(SCRIPT)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def compilers():
    """Both versions at work at the same time: each uses one core."""
    processes = {"installed": start([])}
    if OLDEST_TRITON.is_dir():
        processes["3.6.0"] = start([OLDEST_TRITON])
    yield processes
    for process in processes.values():
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", ["installed", "3.6.0"])
def test_kernels_compile(compilers, version):
    if version not in compilers:
        pytest.fail(f"{OLDEST_TRITON.name}/ is absent, so Triton 3.6.0 cannot be tested: `make test` installs it.")
    output, _ = compilers[version].communicate()
    first_line = output.splitlines()[0] if output else ""
    if version != "installed":
        assert first_line.startswith(f"triton {version} "), f"another Triton was imported: {first_line}"
    assert compilers[version].returncode == 0, output
