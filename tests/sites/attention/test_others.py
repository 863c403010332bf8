"""Others who intercept attention: they see what they see unpatched, or the call is theirs and is counted."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, CogVideoXAttnProcessor2_0
from torch.overrides import TorchFunctionMode

import hf_accel
from hf_accel.testing.models import tiny


class Recorder(TorchFunctionMode):
    """Writes down the shapes of attention calls, and lets them through."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch._C._nn.scaled_dot_product_attention:
            self.shapes.append(tuple(args[0].shape if args else kwargs["query"].shape))
        return func(*args, **(kwargs or {}))


class Identity(TorchFunctionMode):
    """Perturbed attention: every token attends to itself."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch._C._nn.scaled_dot_product_attention:
            query, value = (args[0], args[2]) if args else (kwargs["query"], kwargs["value"])
            if query.shape[2] == value.shape[2]:
                return value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        return func(*args, **kwargs)


@contextlib.contextmanager
def replaced():
    """A package that puts its own function in the place of torch's, and calls torch's."""
    own, seen = F.scaled_dot_product_attention, []

    def fast_attention(*args, **kwargs):
        seen.append(1)
        return own(*args, **kwargs)

    F.scaled_dot_product_attention = fast_attention
    try:
        yield seen
    finally:
        F.scaled_dot_product_attention = own


@contextlib.contextmanager
def replaced_for_good():
    """As :func:`replaced`, but torch's is never called."""
    own = F.scaled_dot_product_attention

    def other_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kwargs):
        return 0.5 * query

    F.scaled_dot_product_attention = other_attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


# name -> what runs it; kinds of seams: the dispatcher, a processor with SDPA, a U-Net, a language model
def _denoiser(family):
    model = tiny.build(family)
    return model, lambda: tiny.run(model, family)


MAKERS = {name: (lambda name=name: _denoiser(name)) for name in ("wan", "cogvideox", "qwen-image", "sdxl", "llama")}


@pytest.fixture(params=MAKERS)
def host(request):
    with torch.no_grad():
        yield MAKERS[request.param]()


def run_of(applied):
    return applied.report().entries[0].run


def test_a_recorder_sees_every_call_and_the_method_runs(host):
    model, run = host
    with Recorder() as plain:
        dense = run()
    with hf_accel.apply(model, "sparge", density=1.0) as applied:
        with Recorder() as ours:
            out = run()
        assert ours.shapes == plain.shapes
        assert torch.allclose(out, dense, atol=1e-4)
        assert run_of(applied).sparse_calls == len(applied.report().entries[0].patched)
        assert not run_of(applied).dense_calls


def test_a_mode_that_answers_is_obeyed_and_counted(host):
    model, run = host
    dense = run()
    with Identity():
        theirs = run()
    assert not torch.allclose(theirs, dense, atol=1e-4)
    with hf_accel.apply(model, "sparge", density=1.0) as applied:
        with Identity():
            assert torch.allclose(run(), theirs, atol=1e-6)
        assert not run_of(applied).sparse_calls
        assert run_of(applied).dense_calls == {
            "left to the torch function mode Identity": len(applied.report().entries[0].patched)
        }
        assert torch.allclose(run(), dense, atol=1e-4)


def test_a_default_device_is_nobody(host):
    model, run = host
    with hf_accel.apply(model, "sparge", density=1.0) as applied, torch.device("cpu"):
        run()
        assert run_of(applied).sparse_calls
        assert not run_of(applied).dense_calls


def test_a_replacement_that_calls_torchs_is_called_and_the_method_runs(host):
    model, run = host
    dense = run()
    with replaced() as plain:
        run()
    with hf_accel.apply(model, "sparge", density=1.0) as applied:
        with replaced() as seen:
            assert torch.allclose(run(), dense, atol=1e-4)
        assert len(seen) == len(plain)
        assert run_of(applied).sparse_calls == len(applied.report().entries[0].patched)


def test_a_replacement_for_good_is_counted(host):
    model, run = host
    with replaced_for_good():
        theirs = run()
    with hf_accel.apply(model, "sparge", density=1.0) as applied:
        with replaced_for_good():
            assert torch.allclose(run(), theirs, atol=1e-6)
        assert not run_of(applied).sparse_calls
        (reason,) = run_of(applied).dense_calls
        assert "other_attention in place of scaled_dot_product_attention" in reason


def test_modes_stand_as_before_after_an_error():
    model = tiny.build("sdxl")
    with torch.no_grad(), hf_accel.apply(model, "sparge"), Recorder() as mode:
        model.register_forward_pre_hook(lambda *_: None)
        model.mid_block.attentions[0].transformer_blocks[0].attn1.to_out[0].forward = None
        with pytest.raises(TypeError):
            tiny.run(model, "sdxl")
        assert torch.overrides._get_current_function_mode_stack() == [mode]
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("family", ["wan", "cogvideox", "llama"])  # dispatcher, processor with SDPA, language model
def test_a_mode_around_a_compiled_model_is_obeyed(family):
    torch._dynamo.reset()
    with torch.no_grad():
        model, run = MAKERS[family]()
        with Identity():
            theirs = run()
        with hf_accel.apply(model, "sparge", density=1.0), Identity():
            model.compile(backend="eager")
            assert torch.allclose(run(), theirs, atol=1e-5)
    torch._dynamo.reset()


# -- diffusers' own ------------------------------------------------------------------------------------------------

PLACES = {"wan": "blocks", "cogvideox": "transformer_blocks", "qwen-image": "transformer_blocks",
          "sdxl": "down_blocks.1.attentions.0.transformer_blocks"}  # fmt: skip


# Its own models, unpatched: a processor that is not registered, and one tensor where two are expected.
DIFFUSERS_CANNOT = {
    ("cogvideox", "attention"), ("cogvideox", "scores"), ("qwen-image", "attention"), ("qwen-image", "block"),
}  # fmt: skip


@pytest.mark.parametrize("what", ["attention", "scores", "feed forward", "block"])
@pytest.mark.parametrize("family", ["cogvideox", "qwen-image", "sdxl"])
@pytest.mark.parametrize("first", ["skip", "method"])
@torch.no_grad()
def test_layer_skipping_is_obeyed(family, what, first):
    model, run = _denoiser(family)
    config = LayerSkipConfig(
        [0], PLACES[family], skip_attention=what in ("attention", "block"), skip_ff=what in ("feed forward", "block"),
        skip_attention_scores=what == "scores",
    )  # fmt: skip
    plain = run()
    twin, run_twin = _denoiser(family)
    twin.load_state_dict(model.state_dict())
    try:
        apply_layer_skip(twin, config)
        theirs = run_twin()
    except (ValueError, RuntimeError):
        assert (family, what) in DIFFUSERS_CANNOT
        return
    assert not torch.allclose(theirs, plain, atol=1e-5)
    if first == "skip":
        apply_layer_skip(model, config)
    with hf_accel.apply(model, "sparge", density=1.0) as applied:
        if first == "method":
            apply_layer_skip(model, config)
        assert torch.allclose(run(), theirs, atol=1e-4)
        taken = run_of(applied).dense_calls["left to the torch function mode AttentionScoreSkipFunctionMode"]
        assert taken == (what == "scores")


# -- patched, and never called -------------------------------------------------------------------------------------


def warned(run):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run()
    return [str(one.message) for one in said if "hf_accel" in str(one.message)]


CHANGES = {
    "slicing": (lambda net: net.set_attention_slice("auto"), "SlicedAttnProcessor"),
    "a plain processor": (lambda net: net.set_attn_processor(AttnProcessor()), "AttnProcessor"),
    "other processors": (lambda net: net.set_attn_processor(AttnProcessor2_0()), "AttnProcessor2_0"),
    "fused projections": (UNet2DConditionModel.fuse_qkv_projections, "FusedAttnProcessor2_0"),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_every_patched_attention_has_run_or_is_counted(change, when):
    model, run = _denoiser("sdxl")
    make, name = CHANGES[change]
    if when == "before":
        make(model)
    dense = run()
    applied = hf_accel.apply(model, "sparge", density=1.0)
    if when == "after":
        make(model)
        dense = run()
    before = run_of(applied).sparse_calls, sum(run_of(applied).dense_calls.values())
    places = len(applied.report().entries[0].patched)
    said = warned(run) if when == "before" else []
    assert torch.allclose(run(), dense, atol=1e-4)
    run_now = run_of(applied)
    if when == "before" and change in ("other processors", "fused projections"):
        assert run_now.sparse_calls == 2 * places
        assert not said
        return
    assert run_now.sparse_calls == 0
    assert sum(run_now.dense_calls.values()) == 2 * places
    (reason,) = run_now.dense_calls
    assert name in reason
    assert len(said) == (when == "before")
    assert not warned(run)
    assert before[1] == (places if when == "after" else 0)


@torch.no_grad()
def test_perturbed_processors_of_a_pipeline_are_theirs_and_come_off():
    """What ``PAGMixin`` does in a call: other processors in some layers, and the first ones back at its end."""
    from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0

    model = tiny.build("sdxl")

    def run():
        return tiny.run(model, "sdxl", batch=2)

    dense = run()
    applied = hf_accel.apply(model, "sparge", density=1.0)
    there = dict(model.attn_processors)
    name = next(name for name in there if "mid_block" in name and "attn1" in name)
    model.get_submodule(name.removesuffix(".processor")).processor = PAGIdentitySelfAttnProcessor2_0()
    with pytest.warns(UserWarning, match="1 of .* PAGIdentitySelfAttnProcessor2_0 after apply"):
        run()
    model.set_attn_processor(there)
    assert torch.allclose(run(), dense, atol=1e-4)
    applied.revert()
    assert torch.equal(run(), dense)


@torch.no_grad()
def test_a_further_attention_in_a_layer_is_not_taken_for_the_next_one():
    """An IP adapter's processor attends to the image as well."""

    class WithImage(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            out = super().__call__(attn, hidden_states, *args, **kwargs)
            image = torch.ones(*hidden_states.shape[:1], attn.heads, 4, hidden_states.shape[-1] // attn.heads)
            own = hidden_states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return out + F.scaled_dot_product_attention(own, image, image).transpose(1, 2).flatten(2)

    model, run = _denoiser("sdxl")
    model.set_attn_processor(WithImage())
    dense = run()
    with hf_accel.apply(model, "sparge", density=1.0) as applied:
        assert torch.allclose(run(), dense, atol=1e-4)
        places = len(applied.report().entries[0].patched)
        assert run_of(applied).sparse_calls == places
        assert run_of(applied).dense_calls == {"a further attention within one layer": places}


@torch.no_grad()
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "blocks"])
def test_replaced_processors_of_a_compiled_model_are_counted(whole):
    torch._dynamo.reset()
    model, run = _denoiser("cogvideox")
    applied = hf_accel.apply(model, "sparge", density=1.0)
    if whole:
        model.compile(backend="eager")
    else:
        for block in model.transformer_blocks:
            block.compile(backend="eager")
    run()
    assert run_of(applied).sparse_calls
    model.set_attn_processor(CogVideoXAttnProcessor2_0())
    with pytest.warns(UserWarning, match="replaced by CogVideoXAttnProcessor2_0"):
        run()
    torch._dynamo.reset()


def test_training_a_compiled_model_warns_of_nothing():
    torch._dynamo.reset()
    model, _ = _denoiser("wan")
    with hf_accel.apply(model, "sparge") as applied:
        model.compile(backend="eager")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            for _ in range(2):
                tiny.run(model, "wan").sum().backward()
        assert run_of(applied).dense_calls == {"gradients are needed and the method has no backward": 4}
    torch._dynamo.reset()
