"""svg2 against its card: what it must compute, exactly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import hf_accel
from hf_accel.attention.call import AttentionCall, Layer, Step, TokenGrid
from hf_accel.attention.layout import expand_block_map
from hf_accel.errors import InvalidSetting
from hf_accel.patches.svg2 import SVG2, SVG2Config
from hf_accel.testing.models import tiny

GRID = TokenGrid(3, 5, 8)  # 120 tokens


def call_of(grid=GRID, text=0, batch=1, heads=2, dim=16, mask=None, seed=0, layer=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    size = grid.tokens + text
    # Clustered tokens, so that the map is far from uniform.
    centres = 3 * torch.randn(batch, heads, 8, dim, generator=generator)
    which = torch.randint(0, 8, (size,), generator=generator)
    q, k = (centres[:, :, which] + 0.5 * torch.randn(batch, heads, size, dim, generator=generator) for _ in range(2))
    v = torch.randn(batch, heads, size, dim, generator=generator)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    scale = dim**-0.5
    step = Step(0, 10, 900.0, 0.0, "cond", 0)

    def dense():
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)

    return AttentionCall(q, k, v, mask, scale, False, Layer("blocks.0.attn1", layer, 4), grid, step, dense)


def svg2(**settings):
    defaults = {"num_q_centroids": 6, "num_k_centroids": 9, "kmeans_iter_init": 5, "dense_steps": 0, "dense_layers": 0}
    return SVG2(SVG2Config(**{**defaults, "min_kc_ratio": 0.0, **settings}))


@pytest.mark.parametrize("settings", [{"top_p": 1.0}, {"min_kc_ratio": 1.0}], ids=["all mass", "all clusters"])
@pytest.mark.parametrize("counts", [(1, 1), (6, 9), (120, 120), (300, 1000)])
def test_full_budget_is_dense_for_any_clustering(settings, counts):
    call = call_of()
    method = svg2(num_q_centroids=counts[0], num_k_centroids=counts[1], **settings)
    torch.testing.assert_close(method.attend(call, method.new_state()), call.dense(), atol=1e-5, rtol=1e-5)
    assert torch.equal(call.notes["density"], torch.ones(1, 2))


def test_one_cluster_is_dense_at_any_budget():
    call, method = call_of(), svg2(num_q_centroids=1, num_k_centroids=1, top_p=0.1)
    torch.testing.assert_close(method.attend(call, method.new_state()), call.dense(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("top_p", [0.3, 0.7, 0.95])
def test_equals_dense_attention_under_the_expanded_mask(top_p, batch):
    """No permutation in the oracle: the map, expanded through the labels, as a token mask."""
    call, method = call_of(batch=batch), svg2(top_p=top_p)
    ours = method.attend(call, method.new_state())
    query, key = method.cluster(call, method.new_state())
    keep = method.select(method.estimate(call, query, key))
    mask = expand_block_map(keep, query.labels, key.labels)
    assert 0 < mask.float().mean() < 1
    theirs = F.scaled_dot_product_attention(call.query, call.key, call.value, mask, scale=call.scale)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(call.notes["density"], mask.float().mean((-2, -1)))


def test_singleton_clusters_choose_by_the_true_map():
    """Clusters of one token at its own place: the estimate is the attention map itself."""
    call, method = call_of(), svg2(num_q_centroids=120, num_k_centroids=120, kmeans_iter_step=1)
    state = method.new_state()
    state.query, state.key = call.query.clone(), call.key.clone()
    query, key = method.cluster(call, state)
    truth = torch.softmax(call.query @ call.key.mT * call.scale, -1)
    estimate = expand_estimate(method.estimate(call, query, key), query.labels, key.labels)
    torch.testing.assert_close(estimate, truth, atol=1e-5, rtol=1e-4)


def expand_estimate(estimate, query_labels, key_labels):
    rows = estimate.gather(2, query_labels.long()[..., None].expand(-1, -1, -1, estimate.shape[-1]))
    return rows.gather(3, key_labels.long()[:, :, None].expand(-1, -1, rows.shape[2], -1))


def test_error_falls_as_the_budget_rises():
    errors = []
    for p in (0.2, 0.5, 0.8, 0.95, 1.0):
        call, method = call_of(), svg2(top_p=p)
        errors.append(float((method.attend(call, method.new_state()) - call.dense()).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4 < errors[0]


def test_centroids_are_kept_and_move_less_the_second_time():
    call, method = call_of(), svg2(kmeans_iter_init=1, kmeans_iter_step=1)
    state = method.new_state()
    method.attend(call, state)
    first = state.key
    method.attend(call, state)
    second = state.key
    method.attend(call, state)
    assert (state.key - second).norm() <= (second - first).norm()


def test_runs_are_reproducible_and_leave_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    outs = [svg2().attend(call_of(), svg2().new_state()) for _ in range(2)]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("place", ["first", "last"])
def test_text_sees_everything_and_is_seen_by_everything(place):
    grid = TokenGrid(3, 5, 8, text=place)
    call, method = call_of(grid, text=7), svg2(top_p=0.3)
    ours = method.attend(call, method.new_state())
    query, key = method.cluster(call, method.new_state())
    keep = method.select(method.estimate(call, query, key))
    start, stop = grid.video_span(127)
    mask = torch.ones(1, 2, 127, 127, dtype=torch.bool)
    mask[:, :, start:stop, start:stop] = expand_block_map(keep, query.labels, key.labels)
    assert not mask.all()
    theirs = F.scaled_dot_product_attention(call.query, call.key, call.value, mask, scale=call.scale)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_padded_text_does_not_reach_the_video():
    grid = TokenGrid(3, 5, 8, text="last")
    valid = torch.ones(2, 1, 1, 130, dtype=torch.bool)
    valid[0, ..., 124:] = False
    valid[1, ..., 121:] = False  # another length in each item
    call, method = call_of(grid, text=10, batch=2, mask=valid), svg2(top_p=0.5)
    ours = method.attend(call, method.new_state())
    other = call_of(grid, text=10, batch=2, mask=valid)
    other.value[0, :, 124:], other.key[0, :, 124:] = 99.0, -5.0
    other.value[1, :, 121:], other.key[1, :, 121:] = 99.0, -5.0
    assert torch.equal(ours[:, :, :120], method.attend(other, method.new_state())[:, :, :120])
    exact = svg2(top_p=1.0)
    torch.testing.assert_close(exact.attend(call, exact.new_state()), call.dense(), atol=1e-5, rtol=1e-5)


def test_half_precision_stays_close_to_full():
    for dtype, limit in ((torch.float16, 3e-3), (torch.bfloat16, 3e-2)):
        call, method = call_of(dtype=dtype), svg2(top_p=1.0)
        exact = call_of().dense()
        ours = method.attend(call, method.new_state())
        assert ours.dtype == dtype
        assert (ours.float() - exact).norm() <= limit * exact.norm()


def test_dense_steps_can_warm_up_the_clusters():
    model = tiny.build("wan")
    common = {"dense_steps": 2, "dense_layers": 1, "kmeans_iter_init": 3, "num_q_centroids": 4, "num_k_centroids": 6}
    for warm in (False, True):
        with hf_accel.apply(model, "svg2", zero_step_kmeans_init=warm, **common) as applied, torch.no_grad():
            tiny.run(model, "wan", timestep=900.0)
            tiny.run(model, "wan", timestep=600.0)
            runner = applied._installed[0][1].handle.now().core
            states = {layer: state.query is not None for (layer, *_), state in runner._states.items()}
            assert states == {1: warm}  # never for the always-dense layer 0
            assert applied.report().entries[0].run.sparse_calls == 0


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("top_p", 0.0, "float > 0 and <= 1"),
        ("top_p", "high", "float > 0 and <= 1"),
        ("num_q_centroids", 0, "int >= 1"),
        ("num_k_centroids", 2.5, "int >= 1"),
        ("dense_steps", -1, r"a count \(int >= 0\) or a fraction"),
        ("dense_layers", 1.5, r"a count \(int >= 0\) or a fraction"),
        ("zero_step_kmeans_init", 1, "bool"),
        ("backend", "cuda", "one of 'auto', 'triton', 'torch'"),
        ("topp", 0.9, "one of .*top_p, min_kc_ratio"),
    ],
)
def test_wrong_settings_name_field_value_and_range(setting, value, words):
    model = tiny.build("wan")
    with pytest.raises(InvalidSetting, match=f"svg2: setting '{setting}' must be {words}.*; got {value!r}"):
        hf_accel.apply(model, "svg2", **{setting: value})
    assert "_hf_accel" not in model.__dict__
