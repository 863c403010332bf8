"""svg against its card: the band of the released code, the two orders, and who is spatial."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import hf_accel
from hf_accel.attention.call import AttentionCall, Layer, Step, TokenGrid
from hf_accel.attention.layout import VideoLayout, block_sizes, inverse_order
from hf_accel.attention.layout import density as pair_density
from hf_accel.errors import InvalidSetting
from hf_accel.kernels.common import kernel_log
from hf_accel.kernels.permute import gather_rows, scatter_rows
from hf_accel.patches.svg import SVG, Draws, SVGConfig, band_map, density_of, released_half_width
from hf_accel.presets import families
from hf_accel.testing.models import tiny

CPU = torch.device("cpu")
GRID = TokenGrid(9, 6, 10)  # 540 tokens: nine blocks of 64, the last ragged


def layout_of(frames, frame_tokens, text=0, place="last"):
    tokens = frames * frame_tokens
    return VideoLayout(frames, frame_tokens, text if place == "first" else 0, tokens + text)


def share(block_map, sequence, block_size):
    sizes = block_sizes(sequence, block_size)[None, None]
    return float(pair_density(block_map[None, None], sizes, sizes))


# -- the band -------------------------------------------------------------------------------------------------------

# Frames, tokens per frame, text, its place, sparsity; half-width in frames and tokens, share of the pairs in the band.
GOLDEN = [
    (21, 3600, 0, "last", 0.30, 3.4301, 12416, 0.3015),
    (21, 3600, 0, "last", 0.25, 2.8135, 10240, 0.2526),
    (33, 3600, 256, "last", 0.25, 4.3487, 15616, 0.2451),
    (33, 3600, 256, "last", 0.20, 3.4120, 12160, 0.1938),
    (11, 4080, 226, "first", 0.25, 1.4174, 5760, 0.2391),
]


@pytest.mark.parametrize(("frames", "frame_tokens", "text", "place", "sparsity", "width", "tokens", "band"), GOLDEN)
def test_band_of_the_released_code(frames, frame_tokens, text, place, sparsity, width, tokens, band):
    layout = layout_of(frames, frame_tokens, text, place)
    half = released_half_width(sparsity, layout)
    assert half == tokens
    assert abs(half - width * frame_tokens) < 128
    assert 1 - (1 - half / layout.sequence) ** 2 == pytest.approx(band, abs=5e-5)
    # Our density that stands for this sparsity gives this very band, also when it is rounded as in configs/.
    sink = not text
    block_map = band_map(layout, round(density_of(sparsity, layout), 3), 128, sink=sink)
    block = torch.arange(len(block_map))
    expected = (block[:, None] - block).abs() <= tokens // 128
    always = torch.zeros_like(expected)
    if sink:
        always[:, : math.ceil(frame_tokens / 128)] = True
    for token in (*range(layout.start), *range(layout.stop, layout.sequence)):
        always[token // 128] = always[:, token // 128] = True
    assert torch.equal(block_map, expected | always)
    assert share(block_map, layout.sequence, 128) == pytest.approx(density_of(sparsity, layout), abs=1e-6)


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize(("text", "place", "sink"), [(0, "last", True), (0, "last", False), (50, "first", False)])
def test_density_is_the_share_of_pairs_that_is_computed(text, place, sink, block_size):
    layout = layout_of(21, 391, text, place)
    step = 2 * block_size / layout.sequence  # one more block on either side of the band
    shares = []
    for wanted in (0.25, 0.3, 0.5, 0.75, 0.95):
        block_map = band_map(layout, wanted, block_size, sink=sink)
        shares.append(share(block_map, layout.sequence, block_size))
        assert shares[-1] == pytest.approx(wanted, abs=step / 2)
    assert shares == sorted(shares)
    assert band_map(layout, 1.0, block_size, sink=sink).all()


def test_thinnest_band_is_the_diagonal_with_what_is_always_kept():
    thin = band_map(layout_of(9, 64), 1e-3, 64, sink=False)
    assert torch.equal(thin, torch.eye(9, dtype=torch.bool))
    with_text = band_map(layout_of(9, 64, 10), 1e-3, 64, sink=False)
    assert with_text[-1].all()
    assert with_text[:, -1].all()
    assert torch.equal(with_text[:-1, :-1], thin)
    with_sink = band_map(layout_of(9, 64), 1e-3, 64, sink=True)
    assert with_sink[:, 0].all()
    assert torch.equal(with_sink[:, 1:], thin[:, 1:])


# -- the two orders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "place"), [(0, "last"), (7, "first"), (7, "last")])
def test_token_major_is_the_transposed_grid_and_text_stays(text, place):
    layout = layout_of(5, 12, text, place)
    x = torch.randn(2, 3, layout.sequence, 16)
    order = layout.token_major_order()
    moved = gather_rows(x, order.expand(2, 3, -1))
    video = x[:, :, layout.start : layout.stop]
    expected = video.view(2, 3, 5, 12, 16).transpose(2, 3).reshape(2, 3, 60, 16)
    assert torch.equal(moved[:, :, layout.start : layout.stop], expected)
    for outside in (slice(0, layout.start), slice(layout.stop, None)):
        assert torch.equal(moved[:, :, outside], x[:, :, outside])
    assert torch.equal(scatter_rows(moved, order.expand(2, 3, -1)), x)
    assert torch.equal(x[:, :, order.long()][:, :, inverse_order(order).long()], x)


def call_of(grid=GRID, text=0, batch=1, heads=3, dim=16, mask=None, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    size = grid.tokens + text
    q, k, v = (torch.randn(batch, heads, size, dim, generator=generator).to(dtype) for _ in range(3))
    scale = dim**-0.5
    step = Step(0, 10, 900.0, 0.0, "cond", 0)

    def dense():
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)

    return AttentionCall(q, k, v, mask, scale, False, Layer("blocks.0.attn1", 0, 4), grid, step, dense)


def svg(**settings):
    return SVG(SVGConfig(**{"block_size": 64, "dense_steps": 0, "dense_layers": 0, **settings}))


def say(monkeypatch, *temporal):
    """Decide the heads in place of the profile."""
    monkeypatch.setattr(
        SVG, "temporal_heads", staticmethod(lambda query, *_: torch.tensor(temporal).expand(len(query), -1))
    )


def token_masks(method, call):
    """What spatial and temporal heads see, ``[2, S, S]``, by definition: place of a token -> its block -> the map."""
    layout = VideoLayout.of(call)
    block_map = method.shape(layout, CPU).blocks.block_map
    block = method.config.block_size
    places = []
    for token in range(layout.sequence):
        frame, spot = divmod(token - layout.start, layout.frame_tokens)
        video = layout.start <= token < layout.stop
        places.append((token, layout.start + spot * layout.frames + frame if video else token))
    blocks = torch.tensor(places).T // block
    return torch.stack([block_map[b[:, None], b] for b in blocks])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("place", "text"), [("none", 0), ("first", 11), ("last", 70)])
@pytest.mark.parametrize("block_size", [64, 128])
def test_equals_dense_attention_under_the_mask_carried_back(monkeypatch, block_size, place, text, batch):
    """No permutation in the oracle: each head has its own token mask, in the order of the sequence."""
    say(monkeypatch, False, True, True)
    call = call_of(TokenGrid(9, 6, 10, text=place), text=text, batch=batch)
    method = svg(density=0.3, block_size=block_size)
    with kernel_log.logging_to({}) as kernels:
        ours = method.attend(call, Draws())
    spatial, temporal = token_masks(method, call)
    assert not spatial.all()
    assert not torch.equal(spatial, temporal)
    mask = torch.stack([spatial, temporal, temporal])
    theirs = F.scaled_dot_product_attention(call.query, call.key, call.value, mask, scale=call.scale)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(call.notes["density"], mask.float().mean((-2, -1)).expand(batch, 3))
    assert kernels.keys() == {"block_sparse_attention"}


def test_the_sink_is_for_sequences_without_text_or_as_the_user_says():
    for place, text, setting, expected in (
        ("none", 0, "auto", True),
        ("last", 70, "auto", False),
        ("none", 0, "none", False),
        ("first", 11, "first_frame", True),
    ):
        call = call_of(TokenGrid(9, 6, 10, text=place), text=text)
        layout = VideoLayout.of(call)
        spatial, temporal = token_masks(svg(density=0.3, sink=setting), call)
        first = slice(layout.start, layout.start + 60)
        assert bool(spatial[:, first].all()) == expected
        assert bool(temporal[:, layout.token_major_order()[first].long()].all()) == expected


@pytest.mark.parametrize("heads", [(False, False, False), (True, True, True), (True, False, True)])
def test_full_budget_is_dense_whatever_the_heads_are(monkeypatch, heads):
    say(monkeypatch, *heads)
    for place, text in (("none", 0), ("first", 11), ("last", 70)):
        call = call_of(TokenGrid(9, 6, 10, text=place), text=text)
        torch.testing.assert_close(svg(density=1.0).attend(call, Draws()), call.dense(), atol=1e-5, rtol=1e-5)
        assert torch.equal(call.notes["density"], torch.ones(1, 3))


def test_error_falls_as_the_density_rises():
    errors = []
    for density in (0.1, 0.3, 0.5, 0.8, 1.0):
        call = call_of()
        errors.append(float((svg(density=density).attend(call, Draws()) - call.dense()).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4 < errors[0]


# -- who is spatial -------------------------------------------------------------------------------------------------


def block_diagonal(order, grid, dim=64):
    """A head whose tokens attend to their own group of 9 alone, groups being neighbours in ``order``."""
    group = torch.empty(grid.tokens, dtype=torch.long)
    group[order.long()] = torch.arange(grid.tokens) // 9
    code = F.one_hot(group, dim).float() * 12
    return code, torch.randn(grid.tokens, dim, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("place", "text"), [("none", 0), ("first", 11), ("last", 70)])
def test_a_head_of_neighbours_is_spatial_and_its_transposed_copy_is_temporal(place, text):
    grid = TokenGrid(9, 6, 10, text=place)
    layout = layout_of(9, 60)
    spatial, value = block_diagonal(torch.arange(grid.tokens), grid)
    temporal, _ = block_diagonal(layout.token_major_order(), grid)
    codes = torch.stack([torch.stack([spatial, temporal]), torch.stack([temporal, spatial])])  # two items, mixed
    call = call_of(grid, text=text, batch=2, heads=2, dim=64)
    start, stop = grid.video_span(grid.tokens + text)
    call.query[:, :, start:stop], call.key[:, :, start:stop], call.value[:, :, start:stop] = codes, codes, value
    for outside in (slice(0, start), slice(stop, None)):
        call.key[:, :, outside] = 0
    method = svg(density=0.5, sink="none")
    shape = method.shape(VideoLayout.of(call), CPU)
    rows = method.draw(call, Draws(), shape.layout)
    heads = method.temporal_heads(call.query, call.key, call.value, call.scale, None, shape, rows)
    assert heads.tolist() == [[False, True], [True, False]]
    # What it is judged to be is what it runs as: nothing that matters is lost.
    torch.testing.assert_close(method.attend(call, Draws()), call.dense(), atol=1e-3, rtol=1e-3)
    assert call.notes["density"].max() < 0.6


def test_ties_are_spatial():
    call = call_of()
    method = svg(density=0.3)
    shape = method.shape(VideoLayout.of(call), CPU)
    flat = torch.zeros_like(call.value)  # every mean of them is exactly the same
    rows = torch.arange(GRID.tokens)
    assert not method.temporal_heads(call.query, call.key, flat, call.scale, None, shape, rows).any()


def test_profile_of_all_rows_is_the_exact_comparison():
    for seed in range(3):
        call = call_of(heads=8, seed=seed)
        method = svg(density=0.3)
        shape = method.shape(VideoLayout.of(call), CPU)
        masks = token_masks(method, call)
        assert torch.equal(shape.masks(torch.arange(GRID.tokens)), masks)
        errors = [
            (F.scaled_dot_product_attention(call.query, call.key, call.value, m, scale=call.scale) - call.dense())
            .square().mean((-2, -1))
            for m in masks
        ]  # fmt: skip
        rows = torch.arange(GRID.tokens)
        heads = method.temporal_heads(call.query, call.key, call.value, call.scale, None, shape, rows)
        assert torch.equal(heads, errors[1] < errors[0])
        assert heads.any()
        assert not heads.all()


def test_rows_come_from_the_whole_video_and_differ_from_call_to_call():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    call = call_of(TokenGrid(9, 6, 10, text="first"), text=40)
    method, state = svg(num_sampled_rows=2000), Draws()
    first, second = (method.draw(call, state, VideoLayout.of(call)) for _ in range(2))
    assert (int(first.min()), int(first.max())) == (40, 579)
    assert not torch.equal(first, second)
    assert torch.equal(first, method.draw(call, Draws(), VideoLayout.of(call)))
    assert torch.equal(torch.get_rng_state(), before)


def test_padded_text_does_not_reach_the_video():
    grid = TokenGrid(9, 6, 10, text="last")
    valid = torch.ones(2, 1, 1, 560, dtype=torch.bool)
    valid[0, ..., 543:] = False
    valid[1, ..., 558:] = False  # another length in each item
    calls = [call_of(grid, text=20, batch=2, heads=8, mask=valid) for _ in range(2)]
    for item, first in ((0, 543), (1, 558)):
        calls[1].value[item, :, first:], calls[1].key[item, :, first:] = 99.0, 5.0
    method = svg(density=0.3)
    ours, theirs = (method.attend(call, Draws())[:, :, :540] for call in calls)
    assert calls[0].notes["density"].max() < 1
    assert torch.equal(ours, theirs)
    exact = svg(density=1.0)
    torch.testing.assert_close(exact.attend(calls[0], Draws()), calls[0].dense(), atol=1e-5, rtol=1e-5)


def test_masks_it_cannot_honour_run_dense_and_say_so():
    for mask, words in (
        (torch.ones(540, 540, dtype=torch.bool).tril(), "differs between queries"),
        (torch.arange(540).view(1, 1, 1, 540) < 500, "a mask over video tokens"),
    ):
        call = call_of(mask=mask)
        assert torch.equal(svg().attend(call, Draws()), call.dense())
        assert words in call.notes["fallback"]


def test_grouped_heads_and_half_precision():
    call, wide = call_of(heads=4), call_of(heads=4)
    for name in ("key", "value"):
        few = getattr(call, name)[:, :2].clone()
        setattr(call, name, few)
        setattr(wide, name, few.repeat_interleave(2, 1))
    method = svg(density=0.3)
    assert torch.equal(method.attend(call, Draws()), method.attend(wide, Draws()))
    for dtype, limit in ((torch.float16, 3e-3), (torch.bfloat16, 3e-2)):
        low, exact = call_of(dtype=dtype), call_of().dense()
        ours = svg(density=1.0).attend(low, Draws())
        assert ours.dtype == dtype
        assert (ours.float() - exact).norm() <= limit * exact.norm()


def test_masks_are_made_once_per_shape_and_few_are_kept():
    method = svg()
    first = method.shape(layout_of(9, 60), CPU)
    assert first.blocks.index.shape == (1, 1, 9, int(first.blocks.count.max()))
    assert method.shape(layout_of(9, 60), CPU) is first
    assert method.shape(layout_of(9, 60, 5), CPU) is not first
    assert svg().shape(layout_of(9, 60), CPU) is not first
    for text in range(40):
        method.shape(layout_of(9, 60, text), CPU)
    assert len(method._shapes) <= 8


def test_a_generation_is_reproducible():
    model = tiny.build("wan")
    size = {"size": (9, 12, 20)}

    @torch.no_grad()
    def steps():
        return [tiny.run(model, "wan", timestep=t, **size) for t in (900.0, 600.0)]

    plain = steps()
    with hf_accel.apply(model, "svg", density=0.3, block_size=64, dense_steps=0, dense_layers=0) as applied:
        first, second = steps(), steps()
        run = applied.report().entries[0].run
    assert run.mean_density == pytest.approx(0.3, abs=0.1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], plain[0])


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("density", 0, "float > 0 and <= 1"),
        ("density", 25, "float > 0 and <= 1"),
        ("num_sampled_rows", 0, "int >= 1"),
        ("block_size", 32, "one of 64, 128"),
        ("sink", "text", "one of 'auto', 'first_frame', 'none'"),
        ("sparsity", 0.25, "one of "),
    ],
)
def test_wrong_settings_name_field_value_and_range(setting, value, words):
    with pytest.raises(InvalidSetting) as caught:
        hf_accel.apply(tiny.build("wan"), "svg", **{setting: value})
    assert str(caught.value).startswith(f"svg: setting '{setting}' must be {words}")


@pytest.mark.parametrize(
    ("variant", "layout", "sparsity"),
    [
        ("wan2.1-t2v-14b-720p", layout_of(21, 45 * 80), 0.3),
        ("wan2.1-i2v-14b-720p", layout_of(21, 45 * 80), 0.3),
        ("wan2.1-i2v-14b-480p", layout_of(21, 30 * 52), 0.3),
        ("hunyuanvideo-t2v-720p", layout_of(33, 45 * 80, 256), 0.25),
        ("hunyuanvideo-t2v-480p", layout_of(33, 30 * 45, 256), 0.2),
        ("cosmos-1.0-14b-text2world", layout_of(16, 44 * 80), 0.25),
        ("cogvideox-1.5-5b", layout_of(11, 48 * 85, 226, "first"), 0.25),
    ],
)
def test_shipped_densities_stand_for_the_published_sparsities(variant, layout, sparsity):
    methods = next(v.methods for v in families.variants() if v.name == variant)
    density = next(m.wanted.config.density for m in methods if m.wanted.method == "svg")
    assert density == pytest.approx(density_of(sparsity, layout), abs=5e-4)
