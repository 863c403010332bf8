"""The soak of soak.py for three minutes; thirty are run by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_accel import requests

FILE = Path(__file__).with_name("soak.py")


@pytest.mark.timeout(600)
def test_three_minutes(tmp_path):
    found = tmp_path / "soak.json"
    command = [sys.executable, str(FILE), "--minutes", "3", "--json", str(found)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=560, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    told = json.loads(found.read_text())
    assert told["wrong"] == []
    for name, least in {"requests": 60, "InjectedError": 2, "CancelledRequest": 2, "exchanges": 10}.items():
        assert told[name] >= least, told
    assert told["requests_alive_at_the_end"] <= 2
    assert told["memory_mb_most_in_last_third"] <= told["memory_mb_most_in_second_third"] + 24, told["memory_mb"]


def test_it_sees_requests_that_meet(monkeypatch):
    sys.path.insert(0, str(FILE.parent))
    try:
        import soak
    finally:
        sys.path.remove(str(FILE.parent))
    only, threads = requests.Request("of all"), torch.get_num_threads()
    try:
        monkeypatch.setattr(requests, "current", lambda: only)
        assert soak.soak(0.5, say=lambda words: None)["wrong"]
    finally:
        torch.set_num_threads(threads)


def test_the_page_says_what_the_record_says():
    told = json.loads((FILE.parent / "results" / "soak_cpu.json").read_text())
    page = " ".join((FILE.parents[1] / "docs" / "serving.md").read_text().split())
    assert not told["wrong"]
    for words in (
        f"{told['requests']:,} requests", f"{told['exchanges']} exchanges", f"{told['InjectedError']} injected",
        f"{told['CancelledRequest']} abandoned", f"memory {int(told['memory_mb_most_in_last_third'])} MB",
    ):  # fmt: skip
        assert words in page, words
