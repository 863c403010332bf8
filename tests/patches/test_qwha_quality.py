"""QWHA on a trained model: what its start repairs of a model in 2 bits, on text that it was not calibrated on."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import hf_accel
from hf_accel.zoo import llama

TRAIN, HELD_OUT = 4, 12


@torch.no_grad()
def perplexity(model, ids) -> float:
    return math.exp(sum(float(model(input_ids=row[None], labels=row[None]).loss) for row in ids) / len(ids))


@pytest.fixture(scope="module")
def measured():
    """Perplexity in fp32, rounded to nearest in 2 bits, and with each start of the adapter."""
    full, tokenizer = llama.load()
    calibration = llama.windows(tokenizer, "train", TRAIN, 256)
    held_out = llama.windows(tokenizer, "heldout", HELD_OUT, 128)
    found = {"full": perplexity(full, held_out)}
    packed = copy.deepcopy(full)
    hf_accel.apply(packed, "gptq", bits=2, group_size=32, rounding="nearest", progress=False)
    found["rounded"] = perplexity(packed, held_out)
    starts = {"r=4": {"r": 4}, "r=16": {"r": 16}, "cut": {"r": 16, "refine": False}}
    for name, settings in starts.items():
        with hf_accel.apply(packed, "qwha", calibration=calibration, progress=False, **settings):
            found[name] = perplexity(packed, held_out)
    return found


def test_rounding_hurts_and_the_start_repairs_most_of_it(measured):
    lost = math.log(measured["rounded"] / measured["full"])
    left = math.log(measured["r=16"] / measured["full"])
    assert lost > 0.5
    assert left < 0.6 * lost


def test_more_budget_and_refinement_repair_more(measured):
    assert measured["full"] < measured["r=16"] < measured["r=4"] < measured["rounded"]
    assert measured["r=16"] < measured["cut"]
