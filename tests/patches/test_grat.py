"""grat against its card: what it must compute, exactly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import hf_accel
from hf_accel.attention.call import AttentionCall, Layer, Step, TokenGrid
from hf_accel.attention.layout import inverse_order
from hf_accel.errors import InvalidSetting
from hf_accel.patches.grat import GRAT, FixedPlan, GRATConfig, VariablePlan
from hf_accel.testing.models import tiny

IMAGE, VIDEO = (1, 16, 16), (4, 8, 8)

# Grids and tiles: whole blocks of 64 and 128, tiles of fewer tokens, ragged ends, one tile.
SHAPES = [
    (TokenGrid(1, 16, 32), (1, 8, 8)),
    (TokenGrid(2, 16, 24), (2, 8, 8)),
    (TokenGrid(4, 6, 8), (2, 2, 2)),
    (TokenGrid(5, 7, 11), (2, 4, 4)),
    (TokenGrid(3, 4, 4), (4, 8, 8)),
    (TokenGrid(1, 9, 17), (1, 8, 8)),
]
TEXTS = [("none", 0), ("last", 5), ("first", 5), ("first", 64)]


def grat(**settings):
    return GRAT(GRATConfig(**settings))


def call_of(grid, text=("none", 0), batch=1, heads=2, hidden=0, order=None, dtype=torch.float32, dim=16, grad=False):
    """A random call; the last ``hidden`` text keys of item 0 are hidden (of item 1: one fewer). With ``order`` its
    video tokens stand in that order already."""
    place, length = text
    grid = TokenGrid(grid.frames, grid.height, grid.width, text=place)
    generator = torch.Generator().manual_seed(0)
    size = grid.tokens + length
    q, k, v = (2 * torch.randn(batch, heads, size, dim, generator=generator) for _ in range(3))
    start, stop = grid.video_span(size)
    mask = None
    if hidden:
        text_rows = torch.cat([torch.arange(start), torch.arange(stop, size)])
        mask = torch.ones(batch, 1, 1, size, dtype=torch.bool)
        for item in range(batch):
            mask[item, ..., text_rows[length - hidden + item :]] = False
    q, k, v = (x.to(dtype).requires_grad_(grad) for x in (q, k, v))
    if order is not None:
        rows = torch.arange(size)
        rows[start:stop] = start + order
        q, k, v = (x[:, :, rows] for x in (q, k, v))
    scale = dim**-0.5
    step = Step(0, 10, 900.0, 0.0, "cond", 0)

    def dense():
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)

    return AttentionCall(
        q, k, v, mask, scale, False, Layer("blocks.0.attn1", 0, 4), grid, step, dense, order=order
    )  # fmt: skip


def token_mask(method, call):
    """The mask that the tile map stands for, in raster order ``[B, 1, S, S]``."""
    grid, size = call.grid, call.query.shape[2]
    start, stop = grid.video_span(size)
    labels = method.tiling(grid).labels()
    mask = torch.ones(call.query.shape[0], 1, size, size, dtype=torch.bool)
    mask[:, :, start:stop, start:stop] = method.tile_map(grid)[labels][:, labels]
    return mask if call.mask is None else mask & call.mask


def oracle(method, call):
    mask = token_mask(method, call)
    return F.scaled_dot_product_attention(call.query, call.key, call.value, mask, scale=call.scale)


def to_raster(out, call):
    start, stop = call.grid.video_span(out.shape[2])
    rows = torch.arange(out.shape[2])
    rows[start:stop] = start + inverse_order(call.order)
    return out[:, :, rows]


@pytest.mark.parametrize("variant", ["B", "X"])
@pytest.mark.parametrize("text", TEXTS, ids=str)
@pytest.mark.parametrize(("grid", "group"), SHAPES, ids=str)
def test_equals_dense_attention_under_the_token_mask(grid, group, text, variant):
    method = grat(variant=variant, group_size=group)
    call = call_of(grid, text, batch=2)
    ours = method.attend(call, None)
    torch.testing.assert_close(ours, oracle(method, call), atol=1e-5, rtol=1e-5)
    mask = token_mask(method, call)
    torch.testing.assert_close(call.notes["density"], mask.float().mean((-2, -1)).expand(2, 2))


@pytest.mark.parametrize(("text", "hidden"), [(t, 0) for t in TEXTS] + [(t, 3) for t in TEXTS[1:]], ids=str)
@pytest.mark.parametrize(("grid", "group"), SHAPES, ids=str)
def test_tokens_moved_at_the_entry_give_the_same(grid, group, text, hidden):
    method = grat(group_size=group)
    plain = call_of(grid, text, batch=2, hidden=hidden)
    order = method.order_of(plain.grid)
    moved = call_of(grid, text, batch=2, hidden=hidden, order=order)
    ours = to_raster(method.attend(moved, None), moved)
    per_call = method.attend(plain, None)
    torch.testing.assert_close(ours, per_call, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, oracle(method, plain), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moved.notes["density"], plain.notes["density"])
    assert moved.notes["kernels"]["token_order"][0] == "at entry and exit"
    assert plain.notes["kernels"]["token_order"] == ("in every call", "hoist=False was set")


@pytest.mark.parametrize("text", TEXTS[1:], ids=str)
@pytest.mark.parametrize(("grid", "group"), SHAPES[:4], ids=str)
def test_hidden_text_changes_nothing(grid, group, text):
    method = grat(group_size=group)
    call = call_of(grid, text, batch=2, hidden=3)
    first = method.attend(call, None)
    torch.testing.assert_close(first, oracle(method, call), atol=1e-5, rtol=1e-5)
    shown = call.key_validity()
    for x in (call.key, call.value):
        x.masked_fill_(~shown[:, None, :, None], 77.0)
    assert torch.equal(method.attend(call, None), first)
    # Pairs with hidden text do not count as work that could have been done.
    mask, both = token_mask(method, call), shown[:, None, :, None] & shown[:, None, None]
    share = (mask & both).sum((-2, -1)) / both.sum((-2, -1))
    torch.testing.assert_close(call.notes["density"], share.expand(2, 2))


@pytest.mark.parametrize("text", [("last", 7), ("first", 7), ("first", 64)], ids=str)
@pytest.mark.parametrize(("grid", "group"), SHAPES[:4], ids=str)
def test_text_sees_everything(grid, group, text):
    call, method = call_of(grid, text), grat(group_size=group, b=0)
    start, stop = call.grid.video_span(call.query.shape[2])
    ours, dense = method.attend(call, None), call.dense()
    rows = torch.cat([torch.arange(start), torch.arange(stop, ours.shape[2])])
    torch.testing.assert_close(ours[:, :, rows], dense[:, :, rows], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours[:, :, start:stop], dense[:, :, start:stop], atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "grid"),
    [
        ({"variant": "B", "b": 100, "group_size": (2, 2, 3)}, TokenGrid(5, 7, 11)),
        ({"variant": "B", "b": 2, "group_size": (2, 3, 4)}, TokenGrid(5, 7, 11)),
        ({"variant": "X", "group_size": (5, 7, 3)}, TokenGrid(5, 7, 11)),
        ({"variant": "X", "group_size": (1, 7, 3)}, TokenGrid(1, 7, 11)),
    ],
)
def test_full_budget_is_dense(settings, grid):
    call = call_of(grid, ("last", 5))
    ours = grat(**settings).attend(call, None)
    torch.testing.assert_close(ours, call.dense(), atol=1e-5, rtol=1e-5)
    assert torch.equal(call.notes["density"], torch.ones(1, 2))


def test_error_falls_as_the_radius_grows():
    errors = []
    for b in (0, 1, 2, 3, 8):
        call = call_of(TokenGrid(4, 8, 12))
        errors.append(float((grat(group_size=(1, 2, 2), b=b).attend(call, None) - call.dense()).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4 < errors[0]


def share_of(method, grid):
    sizes = method.tiling(grid).sizes().double()
    return float(((sizes[:, None] * sizes) * method.tile_map(grid)).sum() / grid.tokens**2)


@pytest.mark.parametrize(
    ("grid", "variant", "kept"),
    [
        ((32, 48, 80), "X", "0.344"), ((32, 48, 80), "B", "0.0428"),
        ((1, 512, 512), "X", "0.0615"), ((1, 512, 512), "B", "0.0084"),
        ((1, 64, 64), "X", "0.438"), ((1, 64, 64), "B", "0.391"),
        ((1, 128, 128), "X", "0.234"), ((1, 128, 128), "B", "0.118"),
        ((1, 256, 256), "X", "0.121"), ((1, 256, 256), "B", "0.032"),
        # Ragged; not in the card.
        ((21, 30, 52), "X", "0.481"), ((21, 30, 52), "B", "0.129"),
        ((21, 45, 80), "X", "0.390"), ((21, 45, 80), "B", "0.064"),
    ],
)  # fmt: skip
def test_densities_of_the_card_and_the_docs(grid, variant, kept):
    assert f"{share_of(grat(variant=variant), TokenGrid(*grid)):.{len(kept) - 2}f}" == kept


def test_tiles_kept_by_each_tile():
    grid, counts = TokenGrid(32, 48, 80), (8, 6, 10)
    cross = grat(variant="X").tile_map(grid)
    assert torch.equal(cross, cross.T)
    assert (cross.sum(1) == 480 - 7 * 5 * 9).all()
    image = grat(variant="X").tile_map(TokenGrid(1, 128, 256))
    assert (image.sum(1) == 8 + 16 - 1).all()
    near = grat(variant="B").tile_map(grid).sum(1).view(counts)
    for t in range(8):
        for h in range(6):
            for w in range(10):
                ends = zip((t, h, w), counts, strict=True)
                extents = [min(place + 1, count - 1) - max(place - 1, 0) + 1 for place, count in ends]
                assert near[t, h, w] == extents[0] * extents[1] * extents[2]


def test_default_tiles_follow_the_medium():
    assert grat().tiling(TokenGrid(1, 64, 64)).size == IMAGE
    assert grat().tiling(TokenGrid(9, 64, 64)).size == VIDEO
    assert grat(group_size=[1, 2, 3]).tiling(TokenGrid(9, 64, 64)).size == (1, 2, 3)


# -- which kernel runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "group", "text", "grad", "kind", "moved"),
    [
        (TokenGrid(2, 16, 16), (2, 8, 8), ("last", 7), False, FixedPlan, False),  # 128 tokens a tile
        (TokenGrid(1, 16, 16), (1, 8, 8), ("last", 7), False, FixedPlan, False),  # 64
        (TokenGrid(1, 16, 16), (1, 8, 8), ("first", 64), False, FixedPlan, False),
        (TokenGrid(1, 16, 16), (1, 8, 8), ("first", 7), False, FixedPlan, True),  # text straddles a block
        (TokenGrid(1, 15, 16), (1, 8, 8), ("first", 7), False, VariablePlan, False),
        (TokenGrid(1, 15, 16), (1, 8, 8), ("last", 7), False, VariablePlan, False),
        (TokenGrid(1, 15, 16), (1, 8, 8), ("last", 7), True, FixedPlan, True),
        (TokenGrid(1, 16, 16), (1, 4, 4), ("none", 0), False, VariablePlan, False),
    ],
)
def test_kernel_and_copies(grid, group, text, grad, kind, moved):
    method = grat(group_size=group)
    order = method.order_of(grid)
    call = call_of(grid, text, order=order, grad=grad)
    method.attend(call, None)
    (plan,) = method._plans._kept.values()
    assert type(plan) is kind
    assert (plan.rows is not None) == moved
    if kind is FixedPlan:
        assert plan.block == (128 if grid.frames == 2 else 64)


def test_one_plan_per_shape_and_few_of_them():
    method = grat(group_size=(1, 4, 4))
    for _ in range(2):
        for height in range(4, 24):
            method.attend(call_of(TokenGrid(1, height, 4)), None)
    assert len(method._plans) <= 8
    kept = next(reversed(method._plans._kept.values()))
    method.attend(call_of(TokenGrid(1, 23, 4)), None)
    assert next(reversed(method._plans._kept.values())) is kept


@pytest.mark.parametrize("hidden", [0, 3])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("text", TEXTS[1:], ids=str)
@pytest.mark.parametrize(("grid", "group"), [SHAPES[0], SHAPES[3], SHAPES[5]], ids=str)
def test_gradients_are_those_of_masked_attention(grid, group, text, moved, hidden):
    method = grat(group_size=group)
    call = call_of(grid, text, batch=2, hidden=hidden, dtype=torch.float64, grad=True)
    theirs = oracle(method, call)
    weight = torch.randn(theirs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if hidden:  # what padded text asks for is nobody's business
        weight = weight * call.key_validity()[:, None, :, None]
    wanted = torch.autograd.grad(theirs, (call.query, call.key, call.value), weight)
    if moved:
        twin = call_of(
            grid, text, batch=2, hidden=hidden, dtype=torch.float64, grad=True, order=method.order_of(call.grid)
        )
        ours = to_raster(method.attend(twin, None), twin)
        got = torch.autograd.grad(ours, (twin.query, twin.key, twin.value), weight)
        got = tuple(to_raster(x, twin) for x in got)
    else:
        got = torch.autograd.grad(method.attend(call, None), (call.query, call.key, call.value), weight)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("hidden", [0, 3])
@pytest.mark.parametrize("group", [(1, 8, 8), (1, 7, 8)], ids=["fixed", "variable"])
def test_triton_agrees(group, hidden, dtype):
    """Compiled on a GPU, in Triton's interpreter elsewhere."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    call = call_of(TokenGrid(1, 8, 24), ("last", 5), hidden=hidden, dtype=dtype)
    exact = call_of(TokenGrid(1, 8, 24), ("last", 5), hidden=hidden)
    method = grat(group_size=group, backend="triton", b=1)
    mask = None if call.mask is None else call.mask.to(device)
    moved = AttentionCall(
        *(x.to(device) for x in (call.query, call.key, call.value)), mask, call.scale, False, call.layer, call.grid,
        call.step, call.dense,
    )  # fmt: skip
    ours = method.attend(moved, None).cpu().float()
    limit = 1e-5 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(ours, oracle(method, exact), atol=limit, rtol=limit)


# -- on models -----------------------------------------------------------------------------------------------------

FAMILIES = ("wan", "hunyuan-video", "cogvideox", "mochi", "flux", "sd3", "qwen-image", "pixart", "ltx")


@pytest.mark.parametrize("variant", ["B", "X"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_entry_and_every_call_give_the_same_model(family, variant):
    model = tiny.build(family)
    settings = {"variant": variant, "b": 0, "group_size": (1, 2, 2)}
    outputs = {}
    for hoist in ("auto", False):
        with hf_accel.apply(model, "grat", hoist=hoist, **settings) as applied:
            outputs[hoist] = tiny.run(model, family, batch=2)
            run = applied.report().entries[0].run
        assert run.sparse_calls
        assert not run.dense_calls
        assert run.mean_density < 0.9
        assert run.kernels["token_order"][0] == ("at entry and exit" if hoist else "in every call")
    torch.testing.assert_close(outputs["auto"], outputs[False], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(outputs["auto"], tiny.run(model, family, batch=2), atol=1e-4)


@torch.no_grad()
def test_dense_steps_between_reordered_ones():
    model = tiny.build("wan")
    plain = [tiny.run(model, "wan", timestep=t) for t in (900.0, 500.0)]
    with hf_accel.apply(model, "grat", group_size=(1, 2, 2), b=0, dense_steps=1) as applied:
        ours = [tiny.run(model, "wan", timestep=t) for t in (900.0, 500.0)]
        run = applied.report().entries[0].run
    torch.testing.assert_close(ours[0], plain[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours[1], plain[1], atol=1e-4)
    assert run.dense_calls == {"dense step (dense_steps)": 2}


@torch.no_grad()
def test_the_report_names_a_host_that_cannot_be_reordered_and_small_images():
    model = tiny.build("unet")
    with hf_accel.apply(model, "grat", group_size=(1, 2, 2)) as applied:
        tiny.run(model, "unet")
        tiny.run(model, "unet")
        entry = applied.report().entries[0]
    assert "UNet2DConditionModel" in entry.run.kernels["token_order"][1]
    assert len([n for n in entry.notes if "below 128x128 tokens" in n]) == len(entry.notes) == 2  # two levels


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("variant", "C", "one of 'B', 'X'"),
        ("b", -1, "int >= 0"),
        ("group_size", (1, 2), "tuple"),
        ("group_size", (1, 0, 2), "three counts of tokens, each >= 1"),
        ("hoist", True, "one of 'auto', False"),
        ("dense_steps", 1.5, r"a count \(int >= 0\) or a fraction"),
        ("radius", 2, "one of"),
    ],
)
def test_wrong_settings_name_field_value_and_range(setting, value, words):
    model = tiny.build("wan")
    with pytest.raises(InvalidSetting, match=f"grat: setting '{setting}' must be .*{words}"):
        hf_accel.apply(model, "grat", **{setting: value})
    assert "_hf_accel" not in model.__dict__


def test_masks_that_are_not_over_text_run_dense_and_are_counted():
    grid, method = TokenGrid(1, 4, 4), grat(group_size=(1, 2, 2))
    call = call_of(grid)
    call.mask = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    method.attend(call, None)
    assert "differs between queries" in call.notes["fallback"]
    call = call_of(grid)
    call.mask = torch.ones(1, 1, 1, 16, dtype=torch.bool)
    method.attend(call, None)
    assert call.notes["fallback"] == "a mask over image or video tokens"
