"""What the first use loads. That it is fast follows; no test asserts a time (``benchmarks/first_use.py`` prints it)."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from hf_accel.quant.packed_linear import PackedLinear

HEAVY = ("torch._dynamo", "torch._inductor", "sympy", "transformers", "diffusers", "peft", "triton", "accelerate")
ALSO_LAZY = ("yaml", "packaging.specifiers", "huggingface_hub", "safetensors", "httpx", "httpx2")

LISTED = """
import json, sys
import torch
before = set(sys.modules)
import hf_accel
hf_accel.methods()
print(json.dumps(sorted(set(sys.modules) - before)))
"""

APPLIED = """
import json, sys
from diffusers import WanTransformer3DModel
model = WanTransformer3DModel(  # not by the kit, which imports what is looked for
    num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=24, freq_dim=32,
    ffn_dim=64, num_layers=2, rope_max_seq_len=64,
).eval()
before = set(sys.modules)
import hf_accel
hf_accel.apply(model, "svg2").revert()
from hf_accel.presets import families
loaded = sorted(set(sys.modules) - before)
print(json.dumps([loaded, families._variants_in.cache_info().currsize, len(families._texts())]))
"""


def fresh(code: str) -> object:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def listed() -> object:
    return fresh(LISTED)


@pytest.mark.parametrize("name", [*HEAVY, *ALSO_LAZY])
def test_listing_the_methods_loads_nothing_that_only_some_uses_need(listed: list[str], name: str) -> None:
    assert not [module for module in listed if module == name or module.startswith(f"{name}.")]


def test_the_first_apply_reads_the_presets_of_its_model_and_compiles_nothing() -> None:
    loaded, read, shipped = fresh(APPLIED)  # type: ignore[misc]
    assert not {"torch._dynamo", "peft", "transformers"}.intersection(loaded)
    assert 0 < read < shipped / 2


def test_the_mark_of_a_constant_is_what_torch_itself_writes() -> None:
    """``PackedLinear`` writes it by itself, since torch's decorator loads dynamo."""

    @torch.compiler.assume_constant_result
    def marked() -> None: ...

    assert vars(marked) == vars(PackedLinear._inspect)
