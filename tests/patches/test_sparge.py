"""sparge: its map, its identities, its hosts, and the words of its refusals."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
import yaml

import hf_accel
from hf_accel.attention.call import AttentionCall, Layer, Step, TokenGrid
from hf_accel.attention.hilbert import hilbert_order
from hf_accel.attention.selectors import top_cdf
from hf_accel.errors import InvalidSetting
from hf_accel.kernels.common import kernel_log
from hf_accel.patches.sparge import Sparge, SpargeConfig
from hf_accel.patches.sparge.plan import make_plan
from hf_accel.testing.models import tiny

EVERYTHING = {"topk": 1.0}
CDF = {"mode": "cdf", "simthreshd1": -1.0}


def tensors(batch=1, heads=2, queries=300, keys=None, head_dim=32, key_heads=None, seed=0, run=50):
    """Queries and keys that point, for ``run`` tokens each, in directions of their own, so that there is something to
    choose."""
    generator = torch.Generator().manual_seed(seed)
    keys = queries if keys is None else keys
    key_heads = heads if key_heads is None else key_heads

    def clustered(count, length):
        centres = torch.randn(batch, count, -(-length // run), head_dim, generator=generator)
        noise = torch.randn(batch, count, length, head_dim, generator=generator)
        return 1.5 * centres.repeat_interleave(run, 2)[:, :, :length] + 0.5 * noise

    value = torch.randn(batch, key_heads, keys, head_dim, generator=generator)
    return clustered(heads, queries), clustered(key_heads, keys), value


def call_of(query, key, value, mask=None, causal=False, grid=None, layer=0, layers=1):
    scale = query.shape[-1] ** -0.5

    def dense():
        raise AssertionError("the call ran dense")

    return AttentionCall(
        query, key, value, mask, scale, causal, Layer("blocks.0", layer, layers), grid,
        Step(0, 1, 500.0, 0.0, "cond", 0), dense,
    )  # fmt: skip


def expected(query, key, value, mask=None):
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(query, key, value, mask)


def lower_right(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def run(call, **settings):
    return Sparge(SpargeConfig(**settings)).attend(call, None)


def map_of(call, **settings):
    """The block map of a call and the plan behind it."""
    method = Sparge(SpargeConfig(**settings))
    plan = method.plan(call)
    keep = method.choose(method.predict(method.tokens(call, plan), plan), plan, method.head_settings(call))
    return keep, plan


def as_tokens(keep, queries, keys, block_q=128, block_k=64):
    return keep.repeat_interleave(block_q, 2).repeat_interleave(block_k, 3)[:, :, :queries, :keys]


# -- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"topk": 1.0}, {"density": 1.0}, {"mode": "cdf", "cdfthreshd": 1.0, "simthreshd1": -1.0},
        {"mode": "cdf", "simthreshd1": 1.0}, {"topk": 1.0, "block_q": 64, "block_k": 128},
    ],
)  # fmt: skip
def test_full_budget_is_dense(settings):
    call = call_of(*tensors(batch=2))
    torch.testing.assert_close(run(call, **settings), expected(call.query, call.key, call.value), atol=1e-5, rtol=1e-5)
    assert call.notes["density"].eq(1).all()


@pytest.mark.parametrize("settings", [{"topk": 0.4}, {"density": 0.4}, {**CDF, "cdfthreshd": 0.7}])
@pytest.mark.parametrize("queries", [256, 300, 641])
def test_output_is_attention_under_the_map(settings, queries):
    call = call_of(*tensors(queries=queries))
    keep, _ = map_of(call, **settings)
    mask = as_tokens(keep, queries, queries)
    assert not mask.all()
    torch.testing.assert_close(
        run(call, **settings), expected(call.query, call.key, call.value, mask), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(call.notes["density"], mask.float().mean((-1, -2)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["topk", "cdf"])
def test_error_falls_as_the_budget_rises(mode):
    call = call_of(*tensors(queries=640))
    dense, errors, before = expected(call.query, call.key, call.value), [], None
    for budget in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        settings = {"topk": budget} if mode == "topk" else {**CDF, "cdfthreshd": budget}
        keep, _ = map_of(call, **settings)
        assert keep.any(-1).all()
        assert before is None or (keep | ~before).all(), "a larger budget keeps what a smaller one kept"
        before = keep
        errors.append(float((run(call, **settings) - dense).abs().sum() / dense.abs().sum()))
    assert errors[-1] < 1e-5
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.01


def test_chosen_blocks_hold_more_mass_than_others():
    """The map finds the blocks that matter: the mass it holds is near that of the best map of the same size."""
    call = call_of(*tensors(queries=640, heads=4, run=128))
    keep, _ = map_of(call, topk=0.3)
    weights = (call.query @ call.key.mT * call.scale).softmax(-1)
    mass = F.avg_pool2d(weights.flatten(0, 1), (128, 64)).view(keep.shape) * 64
    best = torch.zeros_like(keep).scatter_(-1, mass.topk(3, -1).indices, True)
    assert (mass * keep).sum() > 0.9 * (mass * best).sum()
    assert (mass * best).sum() > 1.3 * 0.3 * mass.sum()


def test_a_constant_on_all_keys_changes_nothing():
    query, key, value = tensors(queries=300)
    call, moved = call_of(query, key, value), call_of(query, key + 3 * torch.randn(32), value)
    for settings in ({"topk": 0.4}, {**CDF, "cdfthreshd": 0.6}):
        assert torch.equal(map_of(call, **settings)[0], map_of(moved, **settings)[0])
        torch.testing.assert_close(run(call, **settings), run(moved, **settings), atol=1e-4, rtol=1e-4)


def test_budget_in_the_code_of_the_paper():
    """floor(topk * key blocks), at least 1; the block that crosses the mass is not kept."""
    call = call_of(*tensors(queries=640))
    assert map_of(call, topk=0.59)[0].sum(-1).eq(5).all()
    assert map_of(call, topk=0.01)[0].sum(-1).eq(1).all()
    p = torch.tensor([[0.1, 0.5, 0.1, 0.3], [0.9, 0.1, 0.0, 0.0]])
    assert top_cdf(p, 0.85).tolist() == [[False, True, False, True], [True, False, False, False]]
    assert top_cdf(p, 0.0).sum(-1).tolist() == [1, 1]
    assert top_cdf(p, 1.0).all()
    per_row = top_cdf(p[None].expand(2, 2, 4), torch.tensor([0.5, 1.0]).view(2, 1, 1))
    assert per_row[0].sum(-1).tolist() == [1, 1]
    assert per_row[1].all()


# -- blocks that are kept by rule ------------------------------------------------------------------------------------


def test_blocks_of_unlike_tokens_are_kept_whole():
    query, key, value = tensors(queries=640)
    query[:, :, 128:256] = torch.randn(128, 32)
    key[:, :, 320:384] = torch.randn(64, 32)
    keep, _ = map_of(call_of(query, key, value), mode="cdf", cdfthreshd=0.3, simthreshd1=0.2)
    assert keep[:, :, 1].all()
    assert keep[:, :, :, 5].all()
    assert not keep.all()
    without, _ = map_of(call_of(query, key, value), mode="cdf", cdfthreshd=0.3, simthreshd1=-1.0)
    assert not without[:, :, 1].all()
    assert not without[:, :, :, 5].all()


def test_last_blocks_and_sink_are_kept():
    call = call_of(*tensors(queries=650))
    keep, _ = map_of(call, topk=0.1)
    assert keep[:, :, -1].all()
    assert keep[:, :, :, -1].all()
    assert not keep[:, :, :, 0].all()
    assert map_of(call, topk=0.1, attention_sink=True)[0][:, :, :, 0].all()


@pytest.mark.parametrize(("text", "rows", "columns"), [("first", [0], [0, 1]), ("last", [4], [8, 9])])
def test_text_rows_and_columns_are_kept(text, rows, columns):
    call = call_of(*tensors(queries=640), grid=TokenGrid(6, 10, 9, text=text))  # 100 tokens of text
    keep, _ = map_of(call, topk=0.2)
    assert keep[:, :, rows].all()
    assert keep[:, :, :, columns].all()
    others = [i for i in range(5) if i not in rows]
    assert keep[:, :, others].sum(-1).max() <= 4


@pytest.mark.parametrize("wanted", [0.25, 0.5, 0.75])
def test_density_counts_what_is_kept_by_rule(wanted):
    call = call_of(*tensors(queries=1920), grid=TokenGrid(18, 10, 10, text="last"))
    run(call, density=wanted, block_q=64)
    assert wanted - 0.05 < call.notes["density"].mean() <= wanted + 1e-3
    query, key, value = tensors(queries=1024, seed=1)
    causal = call_of(query, key, value, causal=True)
    keep, plan = map_of(causal, density=wanted, block_q=64)
    reached = Sparge(SpargeConfig(block_q=64)).density(keep, plan, None)
    assert wanted - 0.1 < reached.mean() <= wanted + 0.01


# -- masks, causal, heads --------------------------------------------------------------------------------------------


def test_hidden_keys_take_no_part():
    query, key, value = tensors(batch=2, queries=300)
    valid = torch.arange(300)[None] < torch.tensor([[300], [150]])
    call = call_of(query, key, value, mask=valid[:, None, None])
    key = torch.where(valid[:, None, :, None], key, 50.0)
    dense = expected(query, key, value, valid[:, None, None])
    torch.testing.assert_close(run(call, **EVERYTHING), dense, atol=1e-5, rtol=1e-5)
    assert call.notes["density"].sub(1).abs().max() < 1e-6
    keep, _ = map_of(call, topk=0.4)
    assert not keep[1, :, :, 3:].any(), "blocks without a visible key are not computed"


@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (256, 256), (150, 300), (129, 130)])
def test_causal_map_is_lower_triangular_with_its_diagonal(queries, keys):
    query, key, value = tensors(queries=queries, keys=keys)
    call = call_of(query, key, value, causal=True)
    visible = lower_right(queries, keys)
    keep, plan = map_of(call, topk=0.1)
    tokens = as_tokens(keep, queries, keys)
    assert (tokens & visible).any(-1).all(), "every token sees something"
    assert tokens.diagonal(keys - queries, -2, -1).all(), "every token sees itself"
    for i in range(keep.shape[2]):
        for j in range(keep.shape[3]):
            if not visible[i * 128 : i * 128 + 128, j * 64 : j * 64 + 64].any():
                assert not keep[:, :, i, j].any()
    exact = (tokens & visible).float().sum((-1, -2)) / visible.sum()
    torch.testing.assert_close(Sparge(SpargeConfig()).density(keep, plan, None), exact, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (150, 300)])
@pytest.mark.parametrize("settings", [{"topk": 1.0}, {"topk": 0.3}, {**CDF, "cdfthreshd": 0.5}])
def test_causal_output(queries, keys, settings):
    query, key, value = tensors(queries=queries, keys=keys, heads=4, key_heads=2)
    call = call_of(query, key, value, causal=True)
    keep, _ = map_of(call, **settings)
    mask = as_tokens(keep, queries, keys) & lower_right(queries, keys)
    torch.testing.assert_close(run(call, **settings), expected(query, key, value, mask), atol=1e-5, rtol=1e-5)


def test_grouped_query_attention():
    query, key, value = tensors(heads=4, key_heads=2)
    full = call_of(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1))
    torch.testing.assert_close(run(call_of(query, key, value), topk=0.4), run(full, topk=0.4), atol=1e-6, rtol=0)


def test_masks_that_are_no_key_mask_run_dense_and_are_counted():
    query, key, value = tensors()
    call = call_of(query, key, value, mask=torch.ones(1, 1, 300, 300, dtype=torch.bool))
    call.dense = lambda: query
    assert run(call, topk=0.4) is query
    assert "differs between queries" in call.notes["fallback"]


# -- arithmetic --------------------------------------------------------------------------------------------------------


def relative_l1(ours, dense):
    return float((ours - dense).abs().sum() / dense.abs().sum())


def test_int8_is_near_exact():
    query, key, value = tensors(queries=300)
    for causal in (False, True):
        call = call_of(query, key + 2.0, value, causal=causal)
        dense = expected(query, key + 2.0, value, lower_right(300, 300) if causal else None)
        with kernel_log.logging_to({}) as kernels:
            ours = run(call, numerics="int8", **EVERYTHING)
        assert F.cosine_similarity(ours.flatten(), dense.flatten(), dim=0) > 0.99
        assert 1e-5 < relative_l1(ours, dense) < 0.06
        assert kernels.keys() == {"block_summary", "block_sparse_attention"}


def test_a_wide_margin_skips_nothing_and_a_narrow_one_little():
    call = call_of(*tensors(queries=640))
    dense = expected(call.query, call.key, call.value)
    torch.testing.assert_close(run(call, pvthreshd=500.0, **EVERYTHING), dense, atol=1e-5, rtol=1e-5)
    errors = [relative_l1(run(call, pvthreshd=margin, **EVERYTHING), dense) for margin in (8.0, 3.0, 0.5)]
    assert errors == sorted(errors)
    assert errors[-1] > 1e-3, "a narrow margin skips something"


# -- the Hilbert curve -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8, 8), (4, 4, 4), (1, 16, 16), (1, 1, 8), (5, 6, 7), (1, 9, 5), (1, 1, 1)])
def test_hilbert_order_is_a_walk(size):
    frames, height, width = size
    order = hilbert_order(*size)
    assert order.sort().values.equal(torch.arange(frames * height * width))
    places = torch.stack([order // (height * width), order // width % height, order % width], 1)
    steps = places.diff(dim=0).abs().sum(1)
    if all(side in (1, max(size)) for side in size) and max(size) & (max(size) - 1) == 0:
        assert steps.eq(1).all(), "each step goes to a neighbour"
    elif len(steps):
        assert steps.float().mean() < 2


@pytest.mark.parametrize("text", ["none", "first", "last"])
def test_hilbert_order_is_undone(text):
    tokens = 256 if text == "none" else 280
    call = call_of(*tensors(queries=tokens), grid=TokenGrid(4, 8, 8, text=text))
    dense = expected(call.query, call.key, call.value)
    torch.testing.assert_close(run(call, hilbert=True, **EVERYTHING), dense, atol=1e-5, rtol=1e-5)
    sparse = call_of(call.query, call.key, call.value, grid=call.grid)
    assert not torch.equal(run(sparse, hilbert=True, topk=0.3), run(call, topk=0.3))


def test_hilbert_needs_a_grid():
    call = call_of(*tensors())
    call.dense = lambda: call.query
    run(call, hilbert=True)
    assert call.notes["fallback"] == "no Hilbert order: the token grid is unknown"


# -- thresholds of single heads --------------------------------------------------------------------------------------


def table(layers=1, heads=2, **changes):
    full = {
        "cdfthreshd": [[0.5] * heads] * layers, "simthreshd1": [[-1.0] * heads] * layers,
        "is_sparse": [[True] * heads] * layers,
    }  # fmt: skip
    return {**full, **changes}


def test_each_head_has_its_own_threshold():
    call = call_of(*tensors(queries=640))
    thresholds = table(cdfthreshd=[[0.2, 0.8]])
    keep, _ = map_of(call, mode="cdf", thresholds=thresholds)
    for head, mass in enumerate((0.2, 0.8)):
        alone, _ = map_of(call, mode="cdf", cdfthreshd=mass, simthreshd1=-1.0)
        assert torch.equal(keep[:, head], alone[:, head])
    dense, _ = map_of(call, mode="cdf", thresholds=table(is_sparse=[[True, False]]))
    assert dense[:, 1].all()
    assert not dense[:, 0].all()


def test_each_head_has_its_own_share():
    call = call_of(*tensors(queries=640))
    shares = {"topk": [[0.2, 0.7]], "is_sparse": [[True, True]]}
    keep, _ = map_of(call, thresholds=shares)
    for head, share in enumerate((0.2, 0.7)):
        assert torch.equal(keep[:, head], map_of(call, topk=share)[0][:, head])


def test_thresholds_come_from_files_and_stay_in_the_settings(tmp_path):
    bare, preset = tmp_path / "bare.yaml", tmp_path / "preset.yaml"
    bare.write_text(yaml.safe_dump(table()))
    entry = {"method": "sparge", "version": 1, "settings": {"mode": "cdf", "thresholds": table()}}
    preset.write_text(yaml.safe_dump({"hf_accel": 1, "name": "preset", "apply": [entry]}))
    configs = [SpargeConfig(mode="cdf", thresholds=source) for source in (str(bare), str(preset), table())]
    assert configs[0] == configs[1] == configs[2]
    assert SpargeConfig.from_dict(json.loads(json.dumps(configs[0].to_dict()))) == configs[0]


@pytest.mark.parametrize(
    ("thresholds", "words"),
    [
        ({"cdfthreshd": [[0.5]]}, "and is_sparse"),
        (table(theta=[[1.0]]), "a table with topk, cdfthreshd"),
        (table(is_sparse=[[True]]), "as large as cdfthreshd, which has 1 layers of 2 heads"),
        (table(cdfthreshd=[[0.5, 1.5]]), r"a number from 0 to 1; got '1.5 at cdfthreshd\[0\]\[1\]'"),
        (table(is_sparse=[[1, 0]]), "true or false"),
        (table(cdfthreshd=0.5), "a list per layer"),
        ("nowhere.yaml", "readable file"),
    ],
)
def test_a_wrong_table_is_refused_in_words(thresholds, words):
    with pytest.raises(InvalidSetting, match=words):
        SpargeConfig(mode="cdf", thresholds=thresholds)


@torch.no_grad()
def test_a_table_of_another_model_is_refused():
    model = tiny.build("wan")  # 2 layers of 4 heads
    with pytest.raises(InvalidSetting, match=r"for the 2 patched layers of WanTransformer3DModel.*3 layers of 4 heads"):
        hf_accel.apply(model, "sparge", mode="cdf", thresholds=table(3, 4))
    with (
        hf_accel.apply(model, "sparge", mode="cdf", thresholds=table(2, 3)),
        pytest.raises(InvalidSetting, match="for the 4 heads of"),
    ):
        tiny.run(model, "wan")
    with hf_accel.apply(model, "sparge", mode="cdf", thresholds=table(2, 4)):
        tiny.run(model, "wan")


def test_table_and_density_exclude_each_other():
    with pytest.raises(InvalidSetting, match="at least topk"):
        SpargeConfig(thresholds=table())
    with pytest.raises(InvalidSetting, match="without density"):
        SpargeConfig(mode="cdf", density=0.5, thresholds=table())


# -- the plan --------------------------------------------------------------------------------------------------------


def test_plans_are_few_and_follow_the_shape():
    method = Sparge(SpargeConfig())
    for queries in range(100, 1300, 100):
        method.plan(call_of(*tensors(queries=queries)))
    assert len(method._plans) <= 8
    assert method.plan(call_of(*tensors(queries=300))).rows.shape == (3,)
    assert method.plan(call_of(*tensors(queries=300), causal=True)).allowed is not None


def test_plan_of_text_and_frames():
    plan = make_plan(SpargeConfig(), 640, 640, False, TokenGrid(6, 10, 9, text="first"), (100, 640))
    assert plan.rows.tolist() == [True, False, False, False, False]
    assert plan.columns.nonzero().flatten().tolist() == [0, 1]
    plan = make_plan(SpargeConfig(), 640, 640, False, TokenGrid(1, 32, 20), (0, 640))
    assert not plan.rows.any()
    assert not plan.kept.any()
