"""The page of the matrix is what its script makes of the recorded outcomes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_up_to_date():
    made = subprocess.run([sys.executable, ROOT / "docs" / "make" / "matrix.py"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert (ROOT / "docs" / "matrix.md").read_text() == made.stdout, "run what the page says wrote it"
