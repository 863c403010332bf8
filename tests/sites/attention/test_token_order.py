"""Tokens moved at a model's door: nothing else may change, whatever the order."""

from __future__ import annotations

import copy

import pytest
import torch

import hf_accel
from hf_accel.ledger import Ledger
from hf_accel.sites.attention import token_order
from hf_accel.sites.attention.seam import context_of, seams_of
from hf_accel.sites.attention.token_order import move_patches
from hf_accel.testing.models import tiny

MOVED = (
    "wan", "wan-i2v", "wan-vace", "skyreels-v2", "hunyuan-video", "hunyuan-video-1.5", "cogvideox", "ltx", "mochi",
    "flux", "sd3", "qwen-image", "pixart",
)  # fmt: skip


class Shuffled:
    """A random order per grid, the same one at every asking."""

    def __init__(self):
        self.asked = 0

    def order_of(self, grid):
        self.asked += 1
        return torch.randperm(grid.tokens, generator=torch.Generator().manual_seed(grid.tokens))


def hoisted(model):
    """A model with dense attention and shuffled tokens: ``(applied, ledger, state, owner)``."""
    applied = hf_accel.apply(model, "dense")
    ledger, owner = Ledger(), Shuffled()
    return applied, ledger, token_order.hoist(model, seams_of(model), owner.order_of, ledger), owner


@pytest.fixture(params=MOVED)
def family(request):
    return request.param


@torch.no_grad()
def outputs(model, family, **size):
    return [tiny.run(model, family, timestep=t, seed=seed, **size) for t, seed in ((900.0, 0), (400.0, 1))]


def close(ours, theirs, limit=1e-5):
    return all(torch.allclose(a, b, atol=limit, rtol=limit) for a, b in zip(ours, theirs, strict=True))


def test_any_order_gives_the_same_output(family):
    model = tiny.build(family)
    plain = outputs(model, family, batch=2)
    _, ledger, state, owner = hoisted(model)
    assert close(outputs(model, family, batch=2), plain)
    assert state.reason is None
    assert owner.asked == 1
    ledger.undo()
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, family, batch=2), plain, strict=True))


def test_every_attention_sees_its_tokens_in_that_order(family):
    """Queries of all layers are those of the plain model, moved; so rotary tables moved along."""
    model = tiny.build(family)
    seen = {True: [], False: []}

    def spy(moved):
        context = context_of(model)
        attend = context.core.attend

        def recording(call):
            seen[moved].append(call)
            return attend(call)

        context.core.attend = recording

    applied, ledger, _state, _ = hoisted(model)
    spy(True)
    outputs(model, family)
    ledger.undo()
    applied.revert()
    hf_accel.apply(model, "dense")
    spy(False)
    outputs(model, family)
    assert len(seen[True]) == len(seen[False]) == 2 * tiny.TINY[family].layers
    for moved, plain in zip(seen[True], seen[False], strict=True):
        assert plain.order is None
        assert moved.order is not None
        start, stop = plain.grid.video_span(plain.query.shape[2])
        rows = torch.arange(plain.query.shape[2])
        rows[start:stop] = start + moved.order
        assert not torch.equal(rows, rows.sort().values)
        for ours, theirs in ((moved.query, plain.query), (moved.key, plain.key), (moved.value, plain.value)):
            torch.testing.assert_close(ours, theirs[:, :, rows], atol=1e-5, rtol=1e-5)


def test_another_resolution_and_back(family):
    model = tiny.build(family)
    frames = 1 if family in tiny.IMAGES else 2
    sizes = [{}, {"size": (frames, 6, 8 if frames == 2 else 10)}, {}]
    plain = [outputs(model, family, **size) for size in sizes]
    *_, owner = hoisted(model)
    for size, expected in zip(sizes, plain, strict=True):
        assert close(outputs(model, family, **size), expected)
    assert owner.asked == 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(family, checkpointing):
    model = tiny.build(family)
    if checkpointing:
        model.train()
        model.enable_gradient_checkpointing()

    def gradients():
        model.zero_grad()
        tiny.run(model, family).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    hoisted(model)
    assert close(gradients(), plain)


def test_model_outputs_with_names(family):
    model = tiny.build(family)
    inputs = tiny.TINY[family].inputs(model)
    with torch.no_grad():
        plain = model(**inputs, return_dict=True)
        hoisted(model)
        ours = model(**inputs, return_dict=True)
    assert type(ours) is type(plain)
    assert close([ours.sample], [plain.sample])


@pytest.mark.parametrize("family", ["wan", "flux", "cogvideox"])
@torch.no_grad()
def test_a_function_around_the_model_compiles_to_one_graph(family):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, counter = tiny.build(family), CompileCounter()
    inputs = [tiny.TINY[family].inputs(model, timestep=t) for t in (900.0, 500.0)]
    plain = [model(**given).sample for given in inputs]
    _, _, state, owner = hoisted(model)
    run = torch.compile(lambda given: model(**given).sample, backend=counter, fullgraph=True)
    assert close([run(given) for given in inputs], plain)
    assert counter.frame_count == 1
    assert owner.asked == 1
    assert state.seams.now().order is not None
    torch._dynamo.reset()


def test_lora_on_the_first_and_last_layers_added_later():
    from peft import LoraConfig

    for family, targets in (
        ("flux", ["x_embedder", "proj_out"]),
        ("hunyuan-video", ["to_q", "proj_out"]),
        ("wan", ["patch_embedding", "proj_out"]),
        ("sd3", ["pos_embed.proj", "proj_out"]),
    ):
        model = tiny.build(family)
        hoisted(model)
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "extra")
        ours = outputs(model, family)
        twin = tiny.build(family)
        torch.manual_seed(0)
        twin.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "extra")
        assert close(ours, outputs(twin, family)), family


def test_a_deep_copy_asks_its_own_owner():
    model = tiny.build("wan")
    applied = hf_accel.apply(model, "grat", group_size=(2, 2, 3))
    method = applied._installed[0][1].method
    twin = copy.deepcopy(model)
    outputs(twin, "wan")
    assert method._order.order_of.__self__ is method
    other = context_of(twin).token_order
    assert other is not method._order
    assert other.order_of.__self__ is not method
    assert len(method._order._made) == 0
    assert len(other._made) == 1


def test_an_exception_leaves_no_order_behind():
    model = tiny.build("wan")
    _, _, state, _ = hoisted(model)
    inputs = tiny.TINY["wan"].inputs(model)
    with pytest.raises(RuntimeError), torch.no_grad():
        model(**inputs | {"encoder_hidden_states": torch.zeros(1, 2, 1)})
    assert state.moved.order is None
    assert state.moved.inverse is None


@pytest.mark.parametrize("frames_at", [1, 2])
def test_patches_move_by_a_loop(frames_at):
    dims, patch = (2, 3, 2), (2, 1, 2)
    x = torch.randn(2, 3, *(d * p for d, p in zip(dims, patch, strict=True)))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    expected = torch.empty_like(x)

    def box(place):
        at = (place // 6, place // 2 % 3, place % 2)
        return (..., *(slice(a * p, (a + 1) * p) for a, p in zip(at, patch, strict=True)))

    for place, token in enumerate(order.tolist()):
        expected[box(place)] = x[box(token)]
    given = x if frames_at == 2 else x.transpose(1, 2)
    ours = move_patches(given, order, dims, frames_at)
    assert torch.equal(ours if frames_at == 2 else ours.transpose(1, 2), expected)
    assert torch.equal(move_patches(ours, torch.argsort(order), dims, frames_at), given)


# -- what stands beside the tokens ---------------------------------------------------------------------------------


def same_with(model, family, **extra):
    """Whether the output with more arguments is that of the plain model; the reason for raster order, if any."""
    inputs = tiny.TINY[family].inputs(model) | extra
    with torch.no_grad():
        plain = model(**inputs, return_dict=False)[0]
        _, ledger, state, _ = hoisted(model)
        ours = model(**inputs, return_dict=False)[0]
    ledger.undo()
    return close([ours], [plain]), state.reason


def test_timesteps_per_token_move():
    model = tiny.build("wan")
    per_token = torch.linspace(0, 900, 48)[None]
    assert same_with(model, "wan", timestep=per_token) == (True, None)
    model = tiny.build("ltx")
    assert same_with(model, "ltx", timestep=per_token) == (True, None)


def test_control_residuals_move():
    generator = torch.Generator().manual_seed(0)
    residuals = [torch.randn(1, 64, 32, generator=generator) for _ in range(2)]
    controls = {"controlnet_block_samples": residuals[:1], "controlnet_single_block_samples": tuple(residuals)}
    assert same_with(tiny.build("flux"), "flux", **controls) == (True, None)
    # SD3 adds them to all but its last block.
    residuals = [torch.randn(1, 16, 32, generator=generator) for _ in range(2)]
    assert same_with(tiny.build("sd3"), "sd3", block_controlnet_hidden_states=residuals) == (True, None)
    residuals = [torch.randn(1, 48, 32, generator=generator) for _ in range(2)]
    assert same_with(tiny.build("qwen-image"), "qwen-image", controlnet_block_samples=residuals) == (True, None)


def test_rotary_tables_that_come_as_arguments_move():
    generator = torch.Generator().manual_seed(0)
    tables = tuple(torch.randn(48, 16, generator=generator) for _ in range(2))
    model = tiny.build("cogvideox")
    assert same_with(model, "cogvideox", image_rotary_emb=tables) == (True, None)


def test_text_as_long_as_the_image_does_not_move():
    model = tiny.build("qwen-image")
    text = torch.randn(1, 48, 24, generator=torch.Generator().manual_seed(0))
    extra = {"encoder_hidden_states": text, "encoder_hidden_states_mask": torch.ones(1, 48, dtype=torch.bool)}
    assert same_with(model, "qwen-image", **extra) == (True, None)


@pytest.mark.parametrize(
    ("family", "extra", "reason"),
    [
        ("flux", {"controlnet_block_samples": [torch.zeros(1, 1, 32), torch.zeros(1, 2, 32)]}, "2 rows for 64"),
        ("pixart", {"attention_mask": torch.ones(1, 1, 16)}, "attention mask"),
        ("flux", {"joint_attention_kwargs": {"attention_mask": torch.ones(70, 70, dtype=torch.bool)}}, "mask"),
    ],
)
def test_what_is_not_known_to_move_keeps_the_raster(family, extra, reason):
    model = tiny.build(family)
    *_, state, _ = hoisted(model)
    hook = next(h for h in model._forward_pre_hooks.values() if isinstance(h, token_order.EntryHook))
    assert hook(model, (), tiny.TINY[family].inputs(model) | extra) is None
    assert reason in state.reason


def test_positional_arguments():
    model = tiny.build("flux")
    inputs = tiny.TINY["flux"].inputs(model)
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids")
    with torch.no_grad():
        plain = model(*(inputs[name] for name in names), return_dict=False)[0]
        hoisted(model)
        ours = model(*(inputs[name] for name in names), return_dict=False)[0]
    assert close([ours], [plain])


def test_diffusion_forcing_keeps_the_raster():
    model = tiny.build("skyreels-v2")
    model._set_ar_attention(3)
    inputs = tiny.TINY["skyreels-v2"].inputs(model)
    with torch.no_grad():
        plain = model(**inputs, return_dict=False)[0]
        _, _, state, _ = hoisted(model)
        assert close([model(**inputs, return_dict=False)[0]], [plain])
        assert "diffusion forcing" in state.reason
        model._set_ar_attention(1)
        model(**inputs, return_dict=False)
    assert state.reason is None


def test_first_frame_tokens_keep_the_raster():
    from diffusers import HunyuanVideoTransformer3DModel

    config = dict(tiny.build("hunyuan-video").config) | {"image_condition_type": "token_replace"}
    del config["_use_default_values"]  # else the new value is taken for a default
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel.from_config(config).eval()
    right, reason = same_with(model, "hunyuan-video")
    assert right
    assert "token_replace" in reason


def test_latents_that_are_no_whole_patches_keep_the_raster():
    model = tiny.build("wan")
    *_, state, _ = hoisted(model)
    with torch.no_grad():
        tiny.run(model, "wan", size=(3, 9, 8))
    assert "whole patches" in state.reason


def test_all_doors_are_tested():
    tested = {type(tiny.build(name)).__name__ for name in MOVED}
    assert tested == set(token_order.DOORS)


def test_unknown_classes_are_refused_in_words():
    model = tiny.build("unet")
    assert "UNet2DConditionModel" in token_order.why_not(model)
    with pytest.raises(ValueError, match="UNet2DConditionModel"):
        token_order.hoist(model, None, None, Ledger())
