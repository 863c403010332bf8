"""Views of U-Nets: what runs, what is kept, and that every arrangement computes what the model computes."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from hf_accel.errors import Conflict
from hf_accel.sites.step_cache import unet_views
from hf_accel.sites.step_cache.unet_views import UNetViews, deepest_branch
from hf_accel.testing.models import tiny

CONDITION = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 8, "attention_head_dim": 2,
    "norm_num_groups": 4,
}  # fmt: skip


def unconditional(**config):
    from diffusers import UNet2DModel

    return UNet2DModel(
        **{"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 4} | config
    )


def conditional(**config):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**CONDITION | config)


def sd():
    """The layout of Stable Diffusion 1.x: four levels, two layers each, no attention in the deepest."""
    return conditional(block_out_channels=(8, 8, 16, 16))


def sd_xl():
    """Three levels, no attention in the first."""
    return conditional(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2), use_linear_projection=True,
    )  # fmt: skip


def uneven():
    return conditional(
        block_out_channels=(8, 16), layers_per_block=(1, 2),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def headless():
    return conditional(
        block_out_channels=(8, 16), layers_per_block=1, mid_block_type=None,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def simple():
    """Attention over text and pixels at once, and samplers that are resnets."""
    return conditional(
        block_out_channels=(8, 16), layers_per_block=1, mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
    )  # fmt: skip


def ddpm():
    return unconditional(
        layers_per_block=2, block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def adm():
    """Samplers of kind "resnet", which take the time embedding, and attention from the first level on."""
    return unconditional(
        layers_per_block=1, downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift",
        down_block_types=("AttnDownBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "AttnUpBlock2D"),
    )  # fmt: skip


LAYOUTS = {f.__name__: f for f in (sd, sd_xl, uneven, headless, simple, ddpm, adm)}
LAYOUTS |= {name: lambda name=name: tiny.build(name) for name in ("svd", "animatediff")}
EVEN_ONLY = ("simple", "ddpm", "adm")  # diffusers' own forward fails on odd sides, unpatched
MODELS: dict[str, torch.nn.Module] = {}


@pytest.fixture(params=sorted(LAYOUTS))
def layout(request):
    return request.param, model_of(request.param)


def model_of(name):
    if name not in MODELS:
        torch.manual_seed(0)
        MODELS[name] = LAYOUTS[name]().eval()
    return MODELS[name]


def inputs_of(name, model, seed=0, batch=1, side=8, timestep=500.0):
    if name in tiny.TINY:
        return tiny.TINY[name].inputs(model, batch, (3, side, side), timestep, seed)
    generator = torch.Generator().manual_seed(seed)
    channels = model.config.in_channels
    out = {
        "sample": torch.randn(batch, channels, side, side, generator=generator),
        "timestep": torch.full((batch,), timestep),
    }
    if channels == 4:
        out["encoder_hidden_states"] = torch.randn(batch, 5, 8, generator=generator)
    return out


def native(model, inputs):
    return model(**inputs, return_dict=False)[0]


def full(model, views, inputs):
    """(output, inner state) of the full view."""
    out = type(model).forward(views.full, **inputs, return_dict=False)[0]
    return out, views.tap.inner


def partial(model, views, inputs, inner):
    views.splice.inner = inner
    return type(model).forward(views.partial, **views.partial_arguments(model, inputs), return_dict=False)[0]


@torch.no_grad()
def test_every_branch_of_every_layout(layout):
    """The full view is the model, bit for bit; with the same input twice, so is the partial view."""
    name, model = layout
    odd = () if name in EVEN_ONLY else (9,)  # makes the up path ask for sizes
    for side in (8, *odd):
        inputs = inputs_of(name, model, side=side)
        expected = native(model, inputs)
        for branch in range(deepest_branch(model) + 1):
            views = UNetViews(model, branch)
            out, inner = full(model, views, inputs)
            assert torch.equal(out, expected), branch
            before = inner.clone()
            assert torch.equal(partial(model, views, inputs, inner), expected), branch
            assert torch.equal(inner, before), branch  # not changed in place


def entries(model):
    """Names of what is counted, from the definition: down entries after ``conv_in``; up stages from the last."""
    down, up = [], []
    for b, block in enumerate(model.down_blocks):
        for i in range(len(block.resnets)):
            down.append(stage(block, f"down_blocks.{b}", i))
        if block.downsamplers is not None:
            down.append([f"down_blocks.{b}.downsamplers.0"])
    for b, block in enumerate(model.up_blocks):
        for i in range(len(block.resnets)):
            up.append(stage(block, f"up_blocks.{b}", i))
        if block.upsamplers is not None:
            up[-1].append(f"up_blocks.{b}.upsamplers.0")
    return down, up


def stage(block, prefix, i):
    lists = ("resnets", "attentions", "motion_modules")
    return [f"{prefix}.{kind}.{i}" for kind in lists if getattr(block, kind, None) is not None]


def executed(model, run):
    """Names of stages' modules and of the mid block, in order of execution."""
    names, handles = [], []
    for name, module in model.named_modules():
        parts = name.split(".")
        if (len(parts) == 4 and parts[0] in ("down_blocks", "up_blocks")) or name == "mid_block":
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name: names.append(name)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return names


@torch.no_grad()
def test_a_branch_runs_so_many_entries_and_stages(layout):
    name, model = layout
    inputs = inputs_of(name, model)
    down, up = entries(model)
    assert deepest_branch(model) == len(down) == len(up) - 1
    mid = [] if getattr(model, "mid_block", None) is None else ["mid_block"]
    everything = [*chain(*down), *mid, *chain(*up)]
    for branch in range(len(up)):
        views = UNetViews(model, branch)
        kept = {}
        assert executed(model, lambda: kept.update(inner=full(model, views, inputs)[1])) == everything  # noqa: B023
        ran = executed(model, lambda: partial(model, views, inputs, kept["inner"]))  # noqa: B023
        assert ran == [*chain(*down[:branch]), *chain(*up[-branch - 1 :])], branch


def test_branches_of_stable_diffusion_run_what_the_card_says():
    """Table of the branches of the authors' package (level, slot), written out."""
    model = model_of("sd")
    level_0, level_1 = "down_blocks.0", "down_blocks.1"
    down = [
        [],
        [f"{level_0}.resnets.0", f"{level_0}.attentions.0"],
        [f"{level_0}.resnets.1", f"{level_0}.attentions.1"],
        [f"{level_0}.downsamplers.0"],
        [f"{level_1}.resnets.0", f"{level_1}.attentions.0"],
        [f"{level_1}.resnets.1", f"{level_1}.attentions.1"],
    ]
    up = [
        ["up_blocks.3.resnets.2", "up_blocks.3.attentions.2"],
        ["up_blocks.3.resnets.1", "up_blocks.3.attentions.1"],
        ["up_blocks.3.resnets.0", "up_blocks.3.attentions.0"],
        ["up_blocks.2.resnets.2", "up_blocks.2.attentions.2", "up_blocks.2.upsamplers.0"],
        ["up_blocks.2.resnets.1", "up_blocks.2.attentions.1"],
        ["up_blocks.2.resnets.0", "up_blocks.2.attentions.0"],
    ]
    inputs = inputs_of("sd", model)
    with torch.no_grad():
        for branch in range(6):
            views = UNetViews(model, branch)
            inner = full(model, views, inputs)[1]
            ran = executed(model, lambda: partial(model, views, inputs, inner))  # noqa: B023
            assert ran == [*chain(*down[: branch + 1]), *chain(*reversed(up[: branch + 1]))]


@torch.no_grad()
def test_the_kept_state_enters_the_stage_before_its_skip_does():
    model, down_widths = model_of("sd"), (8, 8, 8, 8, 8, 8, 8, 16, 16, 16, 16, 16)
    inputs = inputs_of("sd", model, batch=2)
    for branch, (width, side) in enumerate(
        [(8, 8), (8, 8), (8, 8), (8, 4), (8, 4), (16, 4), (16, 2), (16, 2), (16, 2), (16, 1), (16, 1), (16, 1)]
    ):
        views = UNetViews(model, branch)
        inner = full(model, views, inputs)[1]
        assert inner.shape == (2, width, side, side), branch
        stages = [resnet for block in model.up_blocks for resnet in block.resnets]
        assert stages[-branch - 1].in_channels == width + down_widths[branch]


@torch.no_grad()
def test_the_error_shrinks_as_the_branch_grows():
    model = model_of("sd")
    before, now = inputs_of("sd", model), inputs_of("sd", model, timestep=450.0)
    now["sample"] = before["sample"] + 0.2 * inputs_of("sd", model, seed=1)["sample"]
    exact = native(model, now)
    errors = []
    for branch in (0, 3, 6, 11):
        views = UNetViews(model, branch)
        ours = partial(model, views, now, full(model, views, before)[1])
        errors.append(float((ours - exact).norm() / exact.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 4 * errors[-1] > 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd", "sd_xl"])
def test_controlnet_residuals_are_fresh_down_to_the_branch_and_kept_below(name):
    model = model_of(name)
    inputs = inputs_of(name, model)
    skips, mid = residual_shapes(model, inputs)
    first, second = ({
        "down_block_additional_residuals": [noise(shape, seed + i) for i, shape in enumerate(skips)],
        "mid_block_additional_residual": noise(mid, seed + 90),
    } for seed in (100, 200))  # fmt: skip
    for branch in range(deepest_branch(model) + 1):
        views = UNetViews(model, branch)
        out, inner = full(model, views, inputs | first)
        assert torch.equal(out, native(model, inputs | first))
        mixed = first | {
            "down_block_additional_residuals": [
                *second["down_block_additional_residuals"][: branch + 1],
                *first["down_block_additional_residuals"][branch + 1 :],
            ]
        }
        assert torch.equal(partial(model, views, inputs | second, inner), native(model, inputs | mixed)), branch


def noise(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def residual_shapes(model, inputs):
    """Shapes of the skips and of the mid block's output, of which a ControlNet has one residual each."""
    shapes = [inputs["sample"][:, :1].expand(-1, model.config.block_out_channels[0], -1, -1).shape]
    mid = []
    handles = [model.mid_block.register_forward_hook(lambda m, args, out: mid.append(out.shape))]
    for block in model.down_blocks:
        handles.append(block.register_forward_hook(lambda m, args, out: shapes.extend(s.shape for s in out[1])))
    native(model, inputs)
    for handle in handles:
        handle.remove()
    return shapes, mid[0]


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd", "sd_xl"])
@pytest.mark.parametrize("argument", ["down_intrablock_additional_residuals", "down_block_additional_residuals"])
@pytest.mark.filterwarnings("ignore:Passing intrablock residual connections")
def test_adapter_residuals_are_added_where_they_are_added_in_the_model(name, argument):
    """T2I-adapters add once per down block; the last of XL adapters goes to the mid block."""
    model = model_of(name)
    inputs = inputs_of(name, model)
    shapes = []
    handles = []
    for block in model.down_blocks:
        last = block.resnets[-1] if getattr(block, "has_cross_attention", False) else block
        handles.append(last.register_forward_hook(
            lambda m, args, out: shapes.append((out[0] if isinstance(out, tuple) else out).shape)
        ))  # fmt: skip
    native(model, inputs)
    for handle in handles:
        handle.remove()
    if name == "sd_xl":
        shapes.append(shapes[-1])
    adapted = [noise(shape, 300 + i) for i, shape in enumerate(shapes)]

    def given():
        return inputs | {argument: [state.clone() for state in adapted]}

    expected = native(model, given())
    assert not torch.allclose(expected, native(model, inputs), atol=1e-3)
    for branch in range(deepest_branch(model) + 1):
        views = UNetViews(model, branch)
        out, inner = full(model, views, given())
        assert torch.equal(out, expected)
        before = inner.clone()
        assert torch.equal(partial(model, views, given(), inner), expected), branch
        assert torch.equal(inner, before)


@torch.no_grad()
def test_freeu_toggled_while_views_stand():
    """FreeU multiplies hidden states in place, which must not reach the kept one; branch 3 cuts no up block."""
    torch.manual_seed(0)
    model = conditional(
        block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    inputs = inputs_of("small", model)
    plain = native(model, inputs)
    for branch in range(4):
        views = UNetViews(model, branch)
        for freeu in (False, True, False):
            if freeu:
                model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
            else:
                model.disable_freeu()
            if views.stale(model):
                views = UNetViews(model, branch)
            expected = native(model, inputs)
            assert torch.equal(expected, plain) != freeu
            out, inner = full(model, views, inputs)
            assert torch.equal(out, expected)
            before = inner.clone()
            for _ in range(2):
                assert torch.equal(partial(model, views, inputs, inner), expected), (branch, freeu)
            assert torch.equal(inner, before)


@torch.no_grad()
def test_hooks_on_a_cut_block_run_where_it_is_entered_and_where_it_is_left():
    model = model_of("sd")
    inputs = inputs_of("sd", model)
    seen = []
    blocks = {"down": model.down_blocks[0], "up": model.up_blocks[3]}
    handles = [blocks["up"].register_forward_hook(lambda m, args, out: 2 * out)]
    for name, block in blocks.items():
        handles.append(block.register_forward_pre_hook(lambda m, args, name=name: seen.append(f"{name} entered")))
        handles.append(block.register_forward_hook(lambda m, args, out, name=name: seen.append(f"{name} left")))
    try:
        expected = native(model, inputs)
        assert seen == ["down entered", "down left", "up entered", "up left"]
        views = UNetViews(model, 1)
        seen.clear()
        out, inner = full(model, views, inputs)
        assert torch.equal(out, expected)
        assert seen == ["down entered", "down left", "up entered", "up left"]
        seen.clear()
        assert torch.equal(partial(model, views, inputs, inner), expected)
        assert seen == ["down entered", "up left"]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("change", ["train", "child", "block", "freeu", "stage"])
def test_views_are_stale_after_a_change_of_what_they_copied(change):
    model = ddpm() if change == "train" else sd_xl()
    branch = 1
    views = UNetViews(model, branch)
    assert not views.stale(model)
    if change == "train":
        model.train(not model.training)
    elif change == "child":
        model.conv_in = torch.nn.Conv2d(4, 8, 3, padding=1)
    elif change == "block":
        model.up_blocks[0] = sd_xl().up_blocks[0]
    elif change == "freeu":
        model.enable_freeu(0.9, 0.2, 1.2, 1.4)
        views = UNetViews(model, 4)
        model.disable_freeu()
    else:
        model.up_blocks[2].resnets[1] = sd_xl().up_blocks[2].resnets[1]
    assert views.stale(model)


def test_views_share_every_parameter():
    model = model_of("sd")
    own = {id(p) for p in model.parameters()}
    views = UNetViews(model, 4)
    assert {id(p) for p in views.full.parameters()} == own
    assert {id(p) for p in views.partial.parameters()} < own
    assert [name for name, _ in model.named_modules() if "tap" in name or "splice" in name] == []


def test_a_block_with_another_forward_is_not_cut():
    model = sd()
    block = model.up_blocks[3]
    block.forward = lambda *args, **kwargs: None
    with pytest.raises(Conflict, match=r"CrossAttnUpBlock2D\.forward was replaced.* branch 1 cuts.*: 11\.$"):
        UNetViews(model, 1)
    UNetViews(model, 2)  # takes all of that block


def test_a_partial_forward_needs_a_kept_state():
    model = model_of("sd")
    views = UNetViews(model, 0)
    with pytest.raises(RuntimeError, match="without a stored hidden state"):
        partial(model, views, inputs_of("sd", model), None)


@pytest.mark.parametrize(
    ("down", "up", "word"),
    [
        (("DownBlock2D", "SkipDownBlock2D"), ("UpBlock2D", "UpBlock2D"), "SkipDownBlock2D"),
        (("DownBlock2D", "AttnSkipDownBlock2D"), ("UpBlock2D", "UpBlock2D"), "AttnSkipDownBlock2D"),
        (("DownBlock2D", "DownBlock2D"), ("UpBlock2D", "SkipUpBlock2D"), "SkipUpBlock2D"),
    ],
)
def test_blocks_that_pass_a_second_picture_are_refused(down, up, word):
    model = unconditional(
        block_out_channels=(32, 32), layers_per_block=1, down_block_types=down, up_block_types=up, norm_num_groups=32
    )
    assert f"its {word} is no list of stages" in unet_views.why_not(model)


def test_blocks_that_share_a_skip_are_refused():
    model = conditional(
        block_out_channels=(32, 32), layers_per_block=1, mid_block_type=None, norm_num_groups=None, act_fn="gelu",
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D"),
        up_block_types=("KCrossAttnUpBlock2D", "KUpBlock2D"), resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    assert "its KDownBlock2D is no list of stages" in unet_views.why_not(model)


def test_other_networks_are_refused():
    assert "it is no U-Net of UNet2DConditionModel" in unet_views.why_not(tiny.build("wan"))
    assert "it is no U-Net" in unet_views.why_not(torch.nn.Linear(2, 2))
