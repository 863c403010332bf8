"""radial against its card: the maps of the released code, its rule at any length, and attention under the map."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import hf_accel
from hf_accel.attention.call import AttentionCall, Layer, Step, TokenGrid
from hf_accel.attention.layout import VideoLayout, block_sizes
from hf_accel.attention.layout import density as pair_density
from hf_accel.errors import InvalidSetting
from hf_accel.kernels.common import kernel_log
from hf_accel.patches import radial
from hf_accel.patches.radial import Radial, RadialConfig, radial_map, windows
from hf_accel.testing.models import tiny


def layout_of(frames, frame_tokens, text=0, place="last"):
    tokens = frames * frame_tokens
    return VideoLayout(frames, frame_tokens, text if place == "first" else 0, tokens + text)


def share(block_map, sequence, block_size):
    sizes = block_sizes(sequence, block_size)[None, None]
    return float(pair_density(block_map[None, None], sizes, sizes))


# Kept blocks counted on maps that the released generator made.
GOLDEN = [
    (256, 8, 0, 1.0, True, 232, 256),
    (256, 8, 0, 1.0, False, 224, 256),
    (512, 16, 0, 0.2, True, 2640, 4096),
    (512, 16, 0, 0.95, False, 2732, 4096),
    (640, 24, 0, 0.8, True, 6850, 14400),
    (128, 40, 0, 1.0, False, 394, 1600),
    (400, 16, 0, 0.2, True, 1433, 2500),
    (1024, 20, 256, 0.95, False, 14636, 26244),
    (3840, 18, 0, 0.2, True, 83728, 291600),
]


@pytest.mark.parametrize(("frame_tokens", "frames", "text", "decay", "sink", "kept", "blocks"), GOLDEN)
def test_maps_of_the_released_code(frame_tokens, frames, text, decay, sink, kept, blocks):
    block_map = radial_map(layout_of(frames, frame_tokens, text), decay, 128, sink=sink)
    assert (int(block_map.sum()), block_map.numel()) == (kept, blocks)
    assert block_map.diagonal().all()
    without_sink = block_map[:, frame_tokens // 128 :][frame_tokens // 128 :] if sink else block_map
    if frame_tokens % 128 == 0:
        assert torch.equal(without_sink, without_sink.T)
    if sink:
        assert block_map[:, : math.ceil(frame_tokens / 128)].all()


@pytest.mark.parametrize(
    ("frames", "decay", "sink", "density"),
    [(18, 0.2, True, 0.2871), (20, 0.8, True, 0.3525), (30, 0.95, False, 0.2746), (128, 1.0, False, 0.115)],
)
def test_densities_of_the_published_runs(frames, decay, sink, density):
    """Frames of 768x1280; the last is HunyuanVideo made four times as long, 88.3 % sparse in the paper."""
    block_map = radial_map(layout_of(frames, 3840), decay, 128, sink=sink)
    assert block_map.float().mean().item() == pytest.approx(density, abs=6e-4 if frames == 128 else 5e-5)


def by_hand(layout, decay, block, sink):
    """The rule of the card, token by token and pair by pair."""
    frames, size = layout.frames, layout.frame_tokens
    length = layout.sequence
    count = math.ceil(length / block)
    rows_in = [min(block, length - b * block) for b in range(count)]
    place = torch.arange(size)
    near = (place[:, None] - place).abs()
    pairs = []  # token masks, one for each judgement
    together = torch.zeros(length, length, dtype=torch.bool)
    for i, j in itertools.product(range(frames), repeat=2):
        distance = abs(i - j)
        window_length = 2.0 ** (max(size, block).bit_length() - distance.bit_length())
        half = size if distance <= 1 else max(window_length * decay, block)
        seen = window_length >= block or distance % int(block / window_length) == 0
        mask = (near <= half) & seen
        if sink and j == 0:
            mask = torch.ones_like(mask)
        rows = slice(layout.start + i * size, layout.start + (i + 1) * size)
        columns = slice(layout.start + j * size, layout.start + (j + 1) * size)
        together[rows, columns] = mask
        if size >= block:
            alone = torch.zeros_like(together)
            alone[rows, columns] = mask
            pairs.append(alone)
    out = torch.eye(count, dtype=torch.bool)
    for mask in pairs or [together]:
        for a, b in itertools.product(range(count), repeat=2):
            rows = mask[a * block : (a + 1) * block, b * block : (b + 1) * block].sum(0) / rows_in[a]
            out[a, b] |= bool((rows > 1 / 3).sum() / ((rows > 0).sum() + 1e-9) > 0.6)
    for token in (*range(layout.start), *range(layout.stop, length)):
        out[token // block] = out[:, token // block] = True
    return out


@pytest.mark.parametrize("sink", [True, False], ids=["sink", "no sink"])
@pytest.mark.parametrize(
    ("frames", "frame_tokens", "text", "place", "block", "decay"),
    [
        (6, 150, 0, "last", 64, 0.3),
        (5, 201, 0, "last", 64, 1.0),  # a pair of frames that touches one more block than the frame has
        (9, 131, 0, "last", 128, 1.0),
        (5, 263, 50, "last", 128, 0.5),
        (4, 263, 77, "first", 128, 0.4),
        (8, 70, 30, "first", 64, 1.0),
        (7, 65, 0, "last", 64, 1.0),  # ends in a block of 7 tokens
        (11, 40, 0, "last", 64, 1.0),  # frames smaller than a block
        (12, 50, 9, "first", 128, 0.2),
        (30, 8, 5, "last", 64, 1.0),
        (21, 1, 0, "last", 64, 1.0),
        (200, 1, 0, "last", 64, 1.0),  # no column is kept by a third of its rows: the diagonal alone
    ],
)
def test_equals_the_rule_done_by_hand_at_any_length(frames, frame_tokens, text, place, block, decay, sink):
    layout = layout_of(frames, frame_tokens, text, place)
    assert torch.equal(radial_map(layout, decay, block, sink=sink), by_hand(layout, decay, block, sink))


@pytest.mark.parametrize("decay", [0.2, 0.95, 2.0])
def test_closed_form_for_frames_of_whole_blocks(decay):
    frames, per_frame = 20, 7
    layout = layout_of(frames, per_frame * 128)
    half, seen = windows(layout, decay, 128)
    frame, block = torch.meshgrid(torch.arange(frames), torch.arange(per_frame), indexing="ij")
    frame, block = frame.flatten(), block.flatten()
    distance = (frame[:, None] - frame).abs()
    expected = seen[distance] & (half[distance] >= 128 * (block[:, None] - block).abs() - 22)
    assert not expected.all()
    assert torch.equal(radial_map(layout, decay, 128, sink=False), expected)


def test_windows_shrink_and_the_gate_doubles_its_stride():
    half, seen = windows(layout_of(16, 128), 1.0, 128)
    assert seen.nonzero().flatten().tolist() == [0, 1, 2, 4, 8]
    half, _ = windows(layout_of(5, 3600), 0.95, 128)
    assert half.tolist() == [3600, 3600, 972, 972, 486]  # 4096 / 4 * 0.95 = 972.8: the last whole token within
    for frame_tokens, decay in ((3600, 0.95), (1000, 0.3), (256, 1.0), (40, 1.0)):
        half, seen = windows(layout_of(64, frame_tokens), decay, 128)
        assert (half[2:].diff() <= 0).all()
        assert half[2:].min() == 128  # never less than a block
        assert half[:2].tolist() == [frame_tokens] * 2
        assert seen[:3].all()


@pytest.mark.parametrize("frame_tokens", [50, 400, 512])
def test_blocks_grow_with_the_decay_factor(frame_tokens):
    layout = layout_of(12, frame_tokens, 20)
    maps = [radial_map(layout, decay, 64, sink=False) for decay in (0.1, 0.4, 1.0, 3.0, None)]
    for fewer, more in itertools.pairwise(maps):
        assert (more | ~fewer).all()
    assert maps[-1].all()
    assert not maps[-2].all()


@pytest.mark.parametrize("frame_tokens", [17, 128, 333, 400])
@pytest.mark.parametrize("frames", [1, 2])
def test_two_frames_are_dense(frames, frame_tokens):
    assert radial_map(layout_of(frames, frame_tokens), 0.1, 128, sink=False).all()


@pytest.mark.parametrize("frames", [8, 16, 32, 64, 128])
def test_grows_as_n_log_n_in_frames(frames):
    layout = layout_of(frames, 1024)
    kept = share(radial_map(layout, 1.0, 128, sink=False), layout.sequence, 128) * layout.sequence**2
    assert kept <= 4 * 1024**2 * frames * math.log2(frames)


# -- attention under the map ----------------------------------------------------------------------------------------


def call_of(grid, text=0, batch=1, heads=2, dim=16, mask=None, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    size = grid.tokens + text
    q, k, v = (torch.randn(batch, heads, size, dim, generator=generator).to(dtype) for _ in range(3))
    scale = dim**-0.5
    step = Step(0, 10, 900.0, 0.0, "cond", 0)

    def dense():
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)

    return AttentionCall(q, k, v, mask, scale, False, Layer("blocks.0.attn1", 0, 4), grid, step, dense)


def token_mask(method, call):
    block = method.config.block_size
    block_map = method.blocks(VideoLayout.of(call), call.query.device).block_map
    size = call.query.shape[2]
    return block_map.repeat_interleave(block, 0).repeat_interleave(block, 1)[:size, :size]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("place", "text"), [("none", 0), ("first", 11), ("last", 70)])
@pytest.mark.parametrize(("frames", "height", "block"), [(9, 9, 64), (7, 16, 128)])
def test_equals_dense_attention_under_the_token_mask(frames, height, block, place, text, batch):
    call = call_of(TokenGrid(frames, height, 10, text=place), text=text, batch=batch)
    method = Radial(RadialConfig(block_size=block, decay_factor=0.2))
    with kernel_log.logging_to({}) as kernels:
        ours = method.attend(call, None)
    mask = token_mask(method, call)
    assert not mask.all()
    theirs = F.scaled_dot_product_attention(call.query, call.key, call.value, mask, scale=call.scale)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(call.notes["density"], mask.float().mean().expand(batch, 2))
    assert kernels.keys() == {"block_sparse_attention"}


def test_the_sink_is_for_sequences_without_text_or_as_the_user_says():
    for place, text, setting, expected in (
        ("none", 0, "auto", True),
        ("last", 64, "auto", False),
        ("none", 0, "none", False),
        ("last", 64, "first_frame", True),
    ):
        call = call_of(TokenGrid(16, 8, 8, text=place), text=text)
        mask = token_mask(Radial(RadialConfig(block_size=64, sink=setting)), call)
        assert bool(mask[:, :64].all()) == expected


def test_padded_text_does_not_reach_the_video():
    grid = TokenGrid(8, 8, 8, text="last")
    valid = torch.ones(2, 1, 1, 532, dtype=torch.bool)
    valid[0, ..., 515:] = False
    valid[1, ..., 530:] = False  # another length in each item
    calls = [call_of(grid, text=20, batch=2, mask=valid) for _ in range(2)]
    for item, first in ((0, 515), (1, 530)):
        calls[1].value[item, :, first:], calls[1].key[item, :, first:] = 99.0, -5.0
    method = Radial(RadialConfig(block_size=64))
    ours, theirs = (method.attend(call, None)[:, :, :512] for call in calls)
    assert calls[0].notes["density"].max() < 1
    assert torch.equal(ours, theirs)


def test_masks_that_differ_between_queries_run_dense_and_say_so():
    call = call_of(TokenGrid(8, 8, 8), mask=torch.ones(512, 512, dtype=torch.bool).tril())
    out = Radial(RadialConfig()).attend(call, None)
    assert torch.equal(out, call.dense())
    assert "differs between queries" in call.notes["fallback"]


def test_one_list_serves_all_layers_heads_and_items_and_few_shapes_are_kept():
    method = Radial(RadialConfig(block_size=64))
    first = method.blocks(layout_of(8, 64), torch.device("cpu"))
    assert first.index.shape == (1, 1, 8, int(first.count.max()))
    assert method.blocks(layout_of(8, 64), torch.device("cpu")) is first
    assert method.blocks(layout_of(9, 64), torch.device("cpu")) is not first
    assert method.blocks(layout_of(8, 64, 5), torch.device("cpu")) is not first
    assert Radial(RadialConfig(block_size=64)).blocks(layout_of(8, 64), torch.device("cpu")) is not first
    for text in range(40):  # prompts of every length
        method.blocks(layout_of(8, 64, text), torch.device("cpu"))
    assert len(method._blocks) <= 8


# -- gradients ------------------------------------------------------------------------------------------------------


def test_gradients_in_double_precision():
    grid = TokenGrid(8, 4, 9)  # 288 tokens in blocks of 64: ragged
    call = call_of(grid, heads=1, dim=4, dtype=torch.float64)
    method = Radial(RadialConfig(block_size=64, sink="none"))

    def attend(query, key, value):
        call.query, call.key, call.value = query, key, value
        return method.attend(call, None)

    inputs = [x.requires_grad_() for x in (call.query, call.key, call.value)]
    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)
    assert call.notes["density"].max() < 1


def masked_sdpa(query, key, value, index, count, *, block_size, scale, key_valid, backend):
    """Dense attention under the token mask, differentiated by torch."""
    from hf_accel.kernels.block_sparse_attention.reference import token_mask

    mask = token_mask(index, count, (block_size, block_size), (query.shape[2], key.shape[2]))
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale), None


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_lora_on_a_longer_video_gets_the_gradients_of_masked_attention(monkeypatch, checkpointing):
    from peft import LoraConfig

    model = tiny.build("wan")
    model.requires_grad_(False)
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "longer")
    if checkpointing:
        model.train()
        model.enable_gradient_checkpointing()
    frames = {"size": (8, 16, 16)}  # twice the 4 frames that a short video would have, 64 tokens each

    def gradients(**settings):
        model.zero_grad()
        with hf_accel.apply(model, "radial", block_size=64, **settings) as applied:
            # LoRA is trained after pictures were made: what was cached then must not be in the way.
            with torch.inference_mode():
                tiny.run(model, "wan", **frames)
            tiny.run(model, "wan", **frames).square().mean().backward()
            run = applied.report().entries[0].run
        assert not run.dense_calls
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, run.mean_density

    ours, density = gradients(sink="none")
    assert density < 0.7
    dense, _ = gradients(decay_factor=None)
    monkeypatch.setattr(radial, "block_sparse_attention", masked_sdpa)
    theirs, _ = gradients(sink="none")
    assert len(ours) == 2 * 2 * 4 * 2  # layers, attentions, projections, matrices
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-4)
    assert any((ours[name] - dense[name]).norm() > 1e-2 * dense[name].norm() for name in ours)


def test_dense_steps_are_the_unpatched_model_bit_by_bit():
    model = tiny.build("wan")
    size = {"size": (8, 16, 16)}

    @torch.no_grad()
    def steps():
        return [tiny.run(model, "wan", timestep=t, **size) for t in (900.0, 600.0, 300.0)]

    plain = steps()
    with hf_accel.apply(model, "radial", dense_steps=2, block_size=64):
        ours = steps()
    assert [torch.equal(a, b) for a, b in zip(ours, plain, strict=True)] == [True, True, False]


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("decay_factor", 0, "int | float | None > 0"),
        ("decay_factor", "half", "int | float | None > 0"),
        ("block_size", 96, "one of 64, 128"),
        ("sink", "last", "one of 'auto', 'first_frame', 'none'"),
        ("dense_timesteps", 12, "one of "),
    ],
)
def test_wrong_settings_name_field_value_and_range(setting, value, words):
    with pytest.raises(InvalidSetting) as caught:
        hf_accel.apply(tiny.build("wan"), "radial", **{setting: value})
    assert str(caught.value).startswith(f"radial: setting '{setting}' must be {words}")
