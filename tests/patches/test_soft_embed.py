"""soft-embed on a tiny DiffusionGemma: the same logits and tokens, in every way the model can be called."""

from __future__ import annotations

import copy

import pytest
import torch

import hf_accel
from hf_accel.errors import NotApplicable
from hf_accel.kernels.soft_embedding import soft_embed
from hf_accel.testing.models.gemma import diffusion_gemma

CANVAS = 8


@pytest.fixture
def model():
    return diffusion_gemma(canvas_length=CANVAS)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))


def predicted(batch: int = 2, seed: int = 1) -> torch.Tensor:
    return 3 * torch.randn(batch, CANVAS, 97, generator=torch.Generator().manual_seed(seed))


def step(model, **more):
    """Logits of one denoising step after a prompt of 20 tokens."""
    given = {"self_conditioning_logits": predicted()} | more
    return model(input_ids=tokens(2, 20), decoder_input_ids=tokens(2, CANVAS, seed=2), **given).logits


@torch.no_grad()
def generate(model, batch=2, **more):
    torch.manual_seed(0)
    return model.generate(tokens(batch, 20), max_new_tokens=2 * CANVAS, max_denoising_steps=4, **more).sequences


def relative(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def stats(applied):
    return applied.stats()["model"]["soft-embed"]


@torch.no_grad()
def test_the_self_conditioning_matters_and_is_the_same(model):
    dense, first = step(model), step(model, self_conditioning_logits=None)
    assert relative(first, dense) > 0.1
    with hf_accel.apply(model, "soft-embed") as applied:
        assert relative(step(model), dense) < 1e-5
        assert torch.equal(step(model, self_conditioning_logits=None), first)
        assert stats(applied)["forwards"] == 2
        assert stats(applied)["first_steps"] == stats(applied)["calls"] == 1
        assert stats(applied)["rows"] == 2 * CANVAS
        assert not stats(applied)["dense_calls"]
        assert "soft_embed: torch" in str(applied.report())
    assert torch.equal(step(model), dense)


@torch.no_grad()
@pytest.mark.parametrize("mask", [(True, False), (False, True), (False, False)])
def test_self_conditioning_mask(model, mask):
    mask = torch.tensor(mask)
    dense = step(model, self_conditioning_mask=mask)
    assert relative(dense, step(model)) > 0.1
    with hf_accel.apply(model, "soft-embed") as applied:
        assert relative(step(model, self_conditioning_mask=mask), dense) < 1e-5
        assert stats(applied)["calls"] == 1


@torch.no_grad()
def test_banned_tokens(model):
    banned = predicted()
    banned[..., 40:] = -torch.inf
    dense = step(model, self_conditioning_logits=banned)
    with hf_accel.apply(model, "soft-embed"):
        assert relative(step(model, self_conditioning_logits=banned), dense) < 1e-5


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"cache_implementation": "static", "disable_compile": True},
        {"batch": 1},
        {"attention_mask": torch.tensor([[0] * 5 + [1] * 15, [1] * 20])},
    ],
    ids=["dynamic", "static", "alone", "padded"],
)
def test_same_tokens(model, how):
    dense = generate(model, **how)
    with hf_accel.apply(model, "soft-embed") as applied:
        assert torch.equal(generate(model, **how), dense)
        assert stats(applied)["forwards"] == 8
        assert stats(applied)["first_steps"] == 2
        assert stats(applied)["calls"] == 6


@torch.no_grad()
@pytest.mark.parametrize("order", ["compiled before", "compiled after"])
def test_compiled_models(model, order):
    """In one graph; what was compiled before notices both the patch and its end."""
    dense = step(model)
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")

    def run():
        out = model(input_ids=tokens(2, 20), decoder_input_ids=tokens(2, CANVAS))
        return compiled(
            decoder_input_ids=tokens(2, CANVAS, seed=2),
            self_conditioning_logits=predicted(),
            past_key_values=out.past_key_values,
        ).logits

    if order == "compiled before":
        run()
    with hf_accel.apply(model, "soft-embed") as applied:
        for calls in (1, 2):
            assert relative(run(), dense) < 1e-5
            assert stats(applied)["calls"] == calls
            assert stats(applied)["kernels"]["soft_embed"]["backend"] == "torch"
    assert relative(run(), dense) < 1e-5
    assert stats(applied)["calls"] == 2


def fingerprint(model):
    return {
        name: {key: id(value) for key, value in module.__dict__.items() if key != "training"}
        for name, module in model.named_modules()
    }


def test_revert_leaves_no_trace(model):
    before, keys = fingerprint(model), list(model.state_dict())
    applied = hf_accel.apply(model, "soft-embed")
    assert fingerprint(model) != before
    assert list(model.state_dict()) == keys
    generate(model)
    applied.revert()
    applied.revert()
    assert fingerprint(model) == before


@torch.no_grad()
def test_a_wrapper_that_outlives_it_runs_the_decoders_own(model):
    plain = generate(model)
    applied = hf_accel.apply(model, "soft-embed")
    decoder = model.model.decoder
    ours = decoder.forward
    decoder.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.warns(UserWarning, match="left as it is now"):
        applied.revert(force=True)
    assert torch.equal(generate(model), plain)


def test_two_models_and_a_copy(model):
    other, dense = diffusion_gemma(seed=1, canvas_length=CANVAS), step(model)
    untouched = step(other)
    applied = hf_accel.apply(model, "soft-embed")
    assert torch.equal(step(other), untouched)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.decoder.embed_tokens.weight.mul_(0.5)
    changed = step(twin)
    assert stats(applied)["calls"] == 0
    assert relative(step(model), dense) < 1e-5
    hf_accel.revert(twin)
    assert relative(step(twin), changed) < 1e-5
    assert stats(applied)["calls"] == 1
    assert applied.active
    assert relative(step(model), dense) < 1e-5
    assert stats(applied)["calls"] == 2


def test_gradient_of_the_embeddings(model):
    """Of what the decoder's layers are given: behind them fp32 itself is good for no more than 1e-5."""
    weight, given = model.model.decoder.embed_tokens.weight, []
    model.model.decoder.self_conditioning.register_forward_hook(lambda module, args, output: given.append(output))
    direction = torch.randn(2, CANVAS, 32, generator=torch.Generator().manual_seed(5))

    def gradient():
        model.zero_grad()
        step(model)
        (given.pop() * direction).sum().backward()
        return weight.grad.clone()

    dense = gradient()
    rows_of_tokens = tokens(2, CANVAS, seed=2).unique()
    others = torch.ones(97, dtype=torch.bool)
    others[rows_of_tokens] = False
    assert dense[others].abs().max() > 1e-3  # they are reached by way of the soft embedding alone
    with hf_accel.apply(model, "soft-embed") as applied:
        ours = gradient()
        assert relative(ours, dense) < 1e-5
        assert relative(ours[others], dense[others]) < 1e-5
        assert stats(applied)["calls"] == 1


def test_what_it_cannot_do_runs_dense_and_is_counted(model):
    wanting = predicted().requires_grad_()
    step(model, self_conditioning_logits=wanting).square().mean().backward()
    dense, wanting.grad = wanting.grad, None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cast = step(model)
    with hf_accel.apply(model, "soft-embed") as applied:
        step(model, self_conditioning_logits=wanting).square().mean().backward()
        assert torch.equal(wanting.grad, dense)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(step(model), cast)
        assert stats(applied)["dense_calls"] == {"the logits want a gradient": 1, "autocast is on": 1}
        assert stats(applied)["calls"] == 0
        assert "1 x autocast is on" in str(applied.report())


@torch.no_grad()
def test_bf16_is_no_further_from_the_truth_than_the_model(model):
    weight, logits = model.model.decoder.embed_tokens.weight.bfloat16(), predicted().bfloat16()
    exact = logits.double().softmax(-1) @ weight.double()
    native = torch.matmul(logits.softmax(-1, dtype=torch.float32).to(weight.dtype), weight)
    assert relative(soft_embed(logits, weight).double(), exact) <= relative(native.double(), exact)
    model.bfloat16()
    dense = step(model, self_conditioning_logits=logits)
    with hf_accel.apply(model, "soft-embed") as applied:
        ours = step(model, self_conditioning_logits=logits)
        assert stats(applied)["calls"] == 1
    # Twelve layers' worth of bf16 roundings lie between; another first step is ten times as far.
    assert relative(ours, dense) < 0.3 * relative(step(model, self_conditioning_logits=None), dense)


@torch.no_grad()
@pytest.mark.parametrize("order", ["hooked before", "hooked after"])
def test_inside_hooks_of_accelerate(model, order):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    dense, decoder = step(model), model.model.decoder
    if order == "hooked before":
        add_hook_to_module(decoder, AlignDevicesHook(io_same_device=True))
    applied = hf_accel.apply(model, "soft-embed")
    if order == "hooked after":
        add_hook_to_module(decoder, AlignDevicesHook(io_same_device=True))
    assert relative(step(model), dense) < 1e-5
    assert stats(applied)["calls"] == 1
    applied.revert()
    assert torch.equal(step(model), dense)
    remove_hook_from_module(decoder)
    assert torch.equal(step(model), dense)


@torch.no_grad()
def test_beside_another_exact_patch(model):
    dense = generate(model)
    with hf_accel.apply(model, ["soft-embed", "prefix-split"]) as applied:
        assert torch.equal(generate(model), dense)
        assert stats(applied)["calls"] == 6
    assert torch.equal(generate(model), dense)


@torch.no_grad()
def test_applying_again_replaces_and_outputs_are_captured(model):
    dense = model(
        input_ids=tokens(2, 20),
        decoder_input_ids=tokens(2, CANVAS, seed=2),
        self_conditioning_logits=predicted(),
        output_hidden_states=True,
    ).hidden_states
    hf_accel.apply(model, "soft-embed")
    applied = hf_accel.apply(model, "soft-embed", backend="torch")
    ours = model(
        input_ids=tokens(2, 20),
        decoder_input_ids=tokens(2, CANVAS, seed=2),
        self_conditioning_logits=predicted(),
        output_hidden_states=True,
    ).hidden_states
    assert len(ours) == len(dense) > 0
    assert all(relative(a, b) < 1e-5 for a, b in zip(ours, dense, strict=True))
    assert stats(applied)["calls"] == 1
    applied.revert()
    assert "forward" not in model.model.decoder.__dict__


def test_other_models_and_other_code_are_refused(model, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(NotApplicable, match="language model without DiffusionGemma's self-conditioning"):
        hf_accel.apply(LlamaForCausalLM(config), "soft-embed")
    model.model.decoder.forward = lambda *args, **kwargs: None
    with pytest.raises(NotApplicable, match="replaced by another library"):
        hf_accel.apply(model, "soft-embed")
    del model.model.decoder.forward
    monkeypatch.setattr(type(model.model.decoder), "forward", lambda self, decoder_input_ids: None)
    with pytest.raises(NotApplicable, match="another way"):
        hf_accel.apply(model, "soft-embed")
