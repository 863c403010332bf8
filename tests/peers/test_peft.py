"""A part of what ``tests/peers/peft.sh`` runs: peft's own tests of a tuner, on QWHA."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("peft.sh")
NOT_TO_BE_HAD = 3

# Both linears on the activation's side, a Conv1D, several adapters on one model, batches of different adapters, all
# about configurations; of the causal models OPT, which has biases.
FILES = ("tests/test_custom_models.py", "tests/test_config.py", "tests/test_decoder_models.py")
CHOSEN = (
    "config_kwargs5 or config_kwargs7 or MultipleActive or MixedAdapter or RequiresGrad or test_config or "
    "(OPTForCausalLM and (merge or save_pretrained or disable or lora_conversion))"
)
AT_LEAST = 150


def test_pefts_own_tests():
    """One process for all, as most of the time is that of the imports."""
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(SCRIPT), *FILES, "-k", CHOSEN]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode == NOT_TO_BE_HAD:
        pytest.skip(done.stderr.strip())
    output = (done.stdout + done.stderr)[-8000:]
    assert done.returncode == 0, output
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None, output
    assert int(passed[1]) >= AT_LEAST, output
