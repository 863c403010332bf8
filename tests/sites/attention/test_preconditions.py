"""What kernels cannot do is told before they are asked; and where text stands though the grid is unknown."""

from __future__ import annotations

import pytest
import torch

import hf_accel
from hf_accel.attention.call import AttentionCall, Layer, Step, TokenGrid
from hf_accel.errors import UnsupportedByKernel
from hf_accel.hosts.denoisers import dims_from_ids
from hf_accel.patches.sla import Geometry
from hf_accel.patches.sparge import Sparge, SpargeConfig
from hf_accel.sites.attention.base import AttentionRunner, as_autocast, as_wide_as_keys
from hf_accel.testing.models import tiny


def call_of(query, key=None, value=None, **more):
    key = query if key is None else key
    step = Step(0, None, 500.0, 0.0, "call0", 0)
    dense = torch.nn.functional.scaled_dot_product_attention
    return AttentionCall(
        query, key, key if value is None else value, None, 0.25, False, Layer("x", 0, 1), more.pop("grid", None), step,
        lambda: dense(query, key, key if value is None else value, scale=0.25), **more,
    )  # fmt: skip


def heads(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


CANNOT = {
    "values wider than keys": lambda: (heads(1, 2, 70, 16), heads(1, 2, 70, 16), heads(1, 2, 70, 24)),
    "no tokens": lambda: (heads(1, 2, 0, 16), heads(1, 2, 70, 16), heads(1, 2, 70, 16)),
    "keys and values that the batch shares": lambda: (heads(3, 2, 70, 16), heads(1, 2, 70, 16), heads(1, 2, 70, 16)),
    "more than 65535 sequences and heads at once": lambda: (heads(1, 65_536, 1, 8),) * 3,
}


@pytest.mark.parametrize("reason", CANNOT)
def test_what_no_kernel_takes_runs_dense_and_is_counted(reason):
    call = call_of(*CANNOT[reason]())
    out = AttentionRunner(Sparge(SpargeConfig(density=1.0))).attend(call)
    assert torch.equal(out, call.dense())
    assert call.notes["fallback"] == reason


def test_different_dtypes_are_told_outside_of_autocast():
    call = call_of(heads(1, 2, 70, 16), heads(1, 2, 70, 16), heads(1, 2, 70, 16, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="dtype"):  # torch's own
        AttentionRunner(Sparge(SpargeConfig(density=1.0))).attend(call)
    assert call.notes["fallback"] == "queries, keys and values of different dtypes"


def test_autocast_brings_a_call_to_one_dtype():
    mixed = call_of(heads(1, 2, 70, 16), heads(1, 2, 70, 16), heads(1, 2, 70, 16, dtype=torch.bfloat16))
    assert as_autocast(mixed) is mixed
    with torch.autocast("cpu", torch.bfloat16):
        one = as_autocast(mixed)
        assert {one.query.dtype, one.key.dtype, one.value.dtype} == {torch.bfloat16}
        out = AttentionRunner(Sparge(SpargeConfig(density=1.0))).attend(mixed)
        assert out.dtype == mixed.dense().dtype
        assert torch.allclose(out, mixed.dense(), atol=2e-2)
        double = call_of(heads(1, 2, 70, 16, dtype=torch.float64))
        assert as_autocast(double) is double


@pytest.mark.parametrize("width", [8, 16])
def test_narrow_values(width):
    call = call_of(heads(2, 4, 70, 16), heads(2, 2, 70, 16), heads(2, 2, 70, width))
    wide = as_wide_as_keys(call)
    assert wide.value.shape == (2, 2, 70, 16)
    assert not wide.value[..., width:].any()
    assert (wide is call) == (width == 16)


def test_attention_without_a_head_axis_is_dense():
    model = tiny.build("sdxl")
    processor = type(model.mid_block.attentions[0].transformer_blocks[0].attn1.processor)

    class OneHead(processor):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            x = hidden_states
            return super().__call__(attn, x, *args, **kwargs) + torch.nn.functional.scaled_dot_product_attention(
                x, x, x
            )

    model.set_attn_processor(OneHead())
    with torch.no_grad():
        dense = tiny.run(model, "sdxl")
        with hf_accel.apply(model, "sparge", density=1.0) as applied:
            assert torch.allclose(tiny.run(model, "sdxl"), dense, atol=1e-4)
            entry = applied.report().entries[0]
    assert entry.run.dense_calls == {"queries, keys and values without batch or heads": len(entry.patched)}


@pytest.mark.parametrize(("config", "dims"), [({"head_dim": 512}, 512), ({}, 640)])
def test_heads_that_triton_cannot_do_are_told_at_apply(config, dims):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=1280, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                    **config)
    )  # fmt: skip
    with pytest.raises(UnsupportedByKernel, match=f"have {dims} dims"):
        hf_accel.apply(model, "sparge", backend="triton")
    applied = hf_accel.apply(model, "sparge")
    assert any(f"{dims} dims" in note for note in applied.report().entries[0].notes)


# -- where the text is ---------------------------------------------------------------------------------------------


def test_text_is_protected_where_its_place_is_known_though_the_grid_is_not():
    query = heads(1, 2, 128 + 256, 16)
    for call in (call_of(query, shown=(128, 384)), call_of(query, grid=TokenGrid(1, 16, 16, text="first"))):
        assert call.span == (128, 384)
        plan = Sparge(SpargeConfig(block_q=64, block_k=64)).plan(call)
        assert plan.columns.nonzero().flatten().tolist() == [0, 1]
        assert Geometry.of(call, 64, 64).text.all(1).tolist() == [True, True, False, False, False, False]
    assert call_of(query).span is None
    assert call_of(query, heads(1, 2, 100, 16), shown=(128, 384)).span is None
    assert not Sparge(SpargeConfig(block_q=64, block_k=64)).plan(call_of(query)).columns.any()


def lattice(height, width, top=0.0, left=0.0, image=0.0):
    ids = torch.zeros(height, width, 3)
    ids[..., 0] = image
    ids[..., 1] += torch.arange(height)[:, None] + top
    ids[..., 2] += torch.arange(width) + left
    return ids.reshape(-1, 3)


def test_a_lattice_is_read_from_all_of_its_coordinates():
    ids = lattice(6, 8)
    assert dims_from_ids(ids, 48) == (1, 6, 8)
    assert dims_from_ids(ids[None].repeat(2, 1, 1), 48) == (1, 6, 8)
    assert dims_from_ids(lattice(6, 8, top=3, left=2, image=1), 48) == (1, 6, 8)
    assert dims_from_ids(lattice(300, 4).bfloat16(), 1200) in {None, (1, 300, 4)}  # rounded, never another size
    assert dims_from_ids(ids.flip(0), 48) is None
    assert dims_from_ids(torch.cat([lattice(3, 8), lattice(3, 8, top=3, image=1)]), 48) is None
    assert dims_from_ids(torch.cat([ids[:-1], ids[:1]]), 48) is None
    assert dims_from_ids(torch.stack([ids, ids.flip(0)]), 48) is None
    assert dims_from_ids(torch.cat([ids, ids]), 96) is None


def edited(family, shapes, text=128):
    """A model and the arguments of an edit pipeline: the tokens of several pictures behind each other."""
    model = tiny.build(family)
    given = dict(tiny.TINY[family].inputs(model))
    tokens = sum(height * width for _, height, width in shapes)
    given |= {"hidden_states": torch.randn(1, tokens, 4), "encoder_hidden_states": torch.randn(1, text, 24)}
    if family == "flux":
        given["img_ids"] = torch.cat([lattice(h, w, image=n) for n, (_, h, w) in enumerate(shapes)])
        given["txt_ids"] = torch.zeros(text, 3)
    else:
        given |= {"encoder_hidden_states_mask": torch.ones(1, text, dtype=torch.bool), "img_shapes": [shapes]}
    return model, given


@pytest.mark.parametrize("family", ["flux", "qwen-image"])
@pytest.mark.parametrize("shapes", [[(1, 16, 32)], [(1, 16, 16)] * 2, [(1, 16, 16), (1, 8, 16), (1, 8, 16)]])
@torch.no_grad()
def test_edit_pipelines_keep_their_text(family, shapes, monkeypatch):
    seen = []
    plan = Sparge.plan
    monkeypatch.setattr(Sparge, "plan", lambda self, call: seen.append((call, plan(self, call))) or seen[-1][1])
    model, given = edited(family, shapes)
    with hf_accel.apply(model, "sparge", topk=0.2, block_q=64, block_k=64):
        model(**given)
    assert len(seen) == tiny.TINY[family].layers
    for call, made in seen:
        assert (call.grid is None) == (len(shapes) > 1)
        assert call.span == (128, 640)
        assert made.columns.nonzero().flatten().tolist() == [0, 1]
