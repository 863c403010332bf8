"""A window along the sequence: the kit's promises, the window itself, and every kind of mask."""

import pytest
import torch
import torch.nn.functional as F
from own_method import local_window
from own_method.local_window import LocalWindow, LocalWindowConfig

import hf_accel
from hf_accel.method import AttentionCall, Layer, Step, TokenGrid
from hf_accel.testing import promises
from hf_accel.testing.models import tiny

# With the defaults a tiny video of 48 tokens fits into the window.
SETTINGS = {"width": 6, "dense_steps": 0}


@pytest.mark.parametrize("promise", promises("local-window", "wan", settings=SETTINGS), ids=str)
def test_promises(promise):
    promise()


def call(dtype, grid, tokens, mask=None, heads=4, kv_heads=4):
    """One attention call as the package hands it over, of random queries, keys and values."""
    generator = torch.Generator().manual_seed(0)
    shapes = (1, heads, tokens, 16), (1, kv_heads, tokens, 16), (1, kv_heads, tokens, 16)
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    step, layer = Step(0, 1, 500.0, 0.0, "cond", 0), Layer("blocks.0", 0, 1)
    return AttentionCall(query, key, value, mask, 0.25, False, layer, grid, step, dense=lambda: query)


def wanted(call, width, start, stop):
    """The definition: attention in fp32 under the mask of the whole window."""
    place = torch.arange(call.query.shape[2])
    text = (place < start) | (place >= stop)
    near = ((place[:, None] - place).abs() <= width) | text[:, None] | text
    mask = torch.zeros(near.shape).masked_fill(~near, float("-inf"))
    if call.mask is not None:
        theirs = call.mask
        hidden = theirs.dtype == torch.bool
        mask = mask + (torch.zeros(theirs.shape).masked_fill(~theirs, float("-inf")) if hidden else theirs)
    query, key, value = (x.float() for x in (call.query, call.key, call.value))
    return F.scaled_dot_product_attention(query, key, value, mask, scale=call.scale, enable_gqa=True), near


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", ["none", "first", "last"])
@pytest.mark.parametrize("mask", ["none", "keys", "queries", "additive"])
def test_it_attends_to_the_window_and_to_the_text(monkeypatch, dtype, text, mask):
    monkeypatch.setattr(local_window, "CHUNK", 40)  # so that there are several, and the last one is short
    tokens, words = 300, 0 if text == "none" else 7
    total = tokens + words
    start = words if text == "first" else 0
    hidden = torch.ones(1, 1, 1, total, dtype=torch.bool)
    hidden[..., start + 3] = False
    given = {
        "none": None,
        "keys": hidden,
        "queries": hidden.expand(1, 1, total, total).clone(),
        "additive": torch.linspace(-1, 1, total).to(dtype).expand(total, total),
    }[mask]
    one = call(dtype, TokenGrid(3, 10, 10, text), total, given, kv_heads=2)
    ours = LocalWindow(LocalWindowConfig(width=29)).attend(one, None)
    theirs, near = wanted(one, 29, start, start + tokens)
    assert ours.dtype == dtype
    assert torch.allclose(ours.float(), theirs, atol=1e-5 if dtype == torch.float32 else 2e-2)
    assert one.notes["density"].shape == (1, 4)
    assert torch.allclose(one.notes["density"], near.float().mean())


def test_a_wider_window_comes_nearer_to_dense_attention():
    model, errors = tiny.build("hunyuan-video"), []
    with torch.no_grad():
        dense = tiny.run(model, "hunyuan-video")
        for width in (1, 8, 64):
            with hf_accel.apply(model, "local-window", width=width, dense_steps=0) as applied:
                errors.append(float((tiny.run(model, "hunyuan-video") - dense).norm() / dense.norm()))
                assert not applied.report().entries[0].run.dense_calls
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-3
    assert errors[-1] < 1e-5
