"""The matrix of promises over methods that change weights, on every family of networks and on text encoders.

What they put in the place of a linear stays there, so promises about steps, generations and branches have no meaning;
those about identity, copies, gradients and neighbours have. Methods are found through the registry.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from test_attention_and_caches import FAMILIES, METHODS, QUICK, equal, fingerprint
from torch._dynamo.testing import CompileCounter

import hf_accel
import tiny
from hf_accel import registry
from hf_accel.errors import NotApplicable
from hf_accel.hosts.target import Model
from hf_accel.quant.packed_linear import PackedLinear

LINEAR = [name for name, cls in registry.methods().items() if cls.facts.site == "linear"]
# Families that the slower promises are checked on: a DiT with one stream, one with two, a U-Net, a language model.
FEW = ("wan", "flux", "unet", "llama")
ENCODERS = ("umt5", "clip-text")


def umt5():
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=50))


def clip_text():
    from transformers import CLIPTextConfig, CLIPTextModel

    config = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return CLIPTextModel(CLIPTextConfig(**config, num_attention_heads=4, eos_token_id=49, bos_token_id=48))


def build(family, seed=0):
    if family in ENCODERS:
        torch.manual_seed(seed)
        return {"umt5": umt5, "clip-text": clip_text}[family]().eval()
    try:
        return tiny.build(family, seed=seed)
    except pytest.skip.Exception:  # diffusers cannot build it here
        return None


def run(model, family, seed=0, batch=1):
    if family in ENCODERS:
        ids = torch.randint(0, 48, (batch, 9), generator=torch.Generator().manual_seed(seed))
        return model(input_ids=ids)[0]
    return tiny.run(model, family, seed=seed, batch=batch)


def claims(method, model):
    return registry.get(method).why_not(Model("model", model)) is None


MODELS = {family: model for family in (*FAMILIES, *ENCODERS) if (model := build(family)) is not None}
CLAIMED = [(method, family) for method in LINEAR for family in MODELS if claims(method, MODELS[family])]


@pytest.fixture(params=CLAIMED, ids="-".join)
def case(request):
    method, family = request.param
    return method, family, copy.deepcopy(MODELS[family])


@pytest.fixture(params=[c for c in CLAIMED if c[1] in FEW], ids="-".join)
def few(request):
    method, family = request.param
    return method, family, copy.deepcopy(MODELS[family])


def full_budget(method):
    return registry.get(method).facts.full_budget


def near(method, ours, theirs, slack=1.0):
    """Within what the method declares for its full budget."""
    return (ours - theirs).norm() <= slack * registry.get(method).facts.full_budget_error * theirs.norm()


def test_every_family_with_packable_linears_is_claimed():
    for method in LINEAR:
        assert {family for m, family in CLAIMED if m == method} >= {"wan", "flux", "unet", "llama", *ENCODERS}


@torch.no_grad()
def test_full_budget_is_as_close_as_declared_and_undone_exactly(case):
    method, family, model = case
    before, dense, two = fingerprint(model), run(model, family), run(model, family, batch=2)
    applied = hf_accel.apply(model, method, **full_budget(method))
    assert fingerprint(model) != before
    ours = run(model, family)
    assert not torch.equal(ours, dense)
    assert near(method, ours, dense)
    assert near(method, run(model, family, batch=2), two)
    assert equal([run(model, family)], [ours])
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    assert len(packed) == len(applied.report().entries[0].patched) > 0
    applied.revert()
    applied.revert()  # a second call does nothing
    assert fingerprint(model) == before
    assert torch.equal(run(model, family), dense)


@torch.no_grad()
def test_two_models_of_one_class_do_not_see_each_other(few):
    method, family, model = few
    other = build(family, seed=1)
    before, dense = fingerprint(other), run(other, family)
    with hf_accel.apply(model, method, **full_budget(method)):
        assert fingerprint(other) == before
        with hf_accel.apply(other, method, **full_budget(method)):
            ours = run(other, family)
        assert torch.equal(run(other, family), dense)
    assert near(method, ours, dense)


@torch.no_grad()
def test_applying_again_begins_from_the_full_weights(few):
    method, family, model = few
    before = fingerprint(model)
    with hf_accel.apply(model, method, **full_budget(method)):
        once = run(model, family)
    first = hf_accel.apply(model, method, **full_budget(method) | {"bits": 2})
    assert not near(method, run(model, family), once)
    second = hf_accel.apply(model, method, **full_budget(method))
    assert torch.equal(run(model, family), once)
    assert not first.active
    second.revert()
    assert fingerprint(model) == before


@torch.no_grad()
def test_a_failing_replacement_leaves_what_stood(few, fails_at_the_end):
    method, family, model = few
    before = fingerprint(model)
    applied = hf_accel.apply(model, method, **full_budget(method))
    standing, ours = fingerprint(model), run(model, family)  # by identity: the very same packed linears
    with fails_at_the_end(method):
        hf_accel.apply(model, method, **full_budget(method) | {"bits": 2})
    assert applied.active
    assert fingerprint(model) == standing
    assert torch.equal(run(model, family), ours)
    applied.revert()
    assert fingerprint(model) == before


@torch.no_grad()
def test_deepcopy_has_a_life_of_its_own(few):
    method, family, model = few
    before, dense = fingerprint(model), run(model, family)
    applied = hf_accel.apply(model, method, **full_budget(method))
    ours = run(model, family)
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, PackedLinear):
            module.scales.zero_()
    assert not torch.equal(run(twin, family), ours)
    assert torch.equal(run(model, family), ours)
    hf_accel.revert(twin)
    assert torch.equal(run(twin, family), dense)
    assert torch.equal(run(model, family), ours)
    applied.revert()
    assert fingerprint(model) == before


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(few, dtype):
    method, family, model = few
    model.to(dtype)
    keep = {"timestep", "img_ids", "txt_ids"}

    def low():
        given = {
            name: value.to(dtype) if value.is_floating_point() and name not in keep else value
            for name, value in tiny.TINY[family].inputs(model).items()
            if isinstance(value, torch.Tensor)
        }
        return model(**given, return_dict=False)[0].float()

    dense = low()
    with hf_accel.apply(model, method, **full_budget(method)) as applied:
        assert near(method, low(), dense, slack=1.5)
        assert {m.scales.dtype for m in model.modules() if isinstance(m, PackedLinear)} == {dtype}
    assert not applied.active
    assert torch.equal(low(), dense)


def test_gradients_pass_through_to_what_is_still_dense(few):
    method, family, model = few
    norms = [p for name, p in model.named_parameters() if p.ndim == 1 and "norm" in name][:4]

    def gradients():
        model.zero_grad()
        run(model, family).square().mean().backward()
        return [p.grad.clone() for p in norms if p.grad is not None]

    dense = gradients()
    assert dense
    with hf_accel.apply(model, method, **full_budget(method)):
        ours = gradients()
        learning = [m for m in model.modules() if isinstance(m, PackedLinear) and list(m.parameters())]
    assert registry.get(method).facts.backward
    assert not learning
    assert len(ours) == len(dense)
    assert all((a - b).norm() < 0.1 * b.norm() for a, b in zip(ours, dense, strict=True))


def test_gradient_checkpointing(few):
    method, family, model = few
    model.train()
    norms = [p for name, p in model.named_parameters() if p.ndim == 1 and "norm" in name]

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)
        run(model, family).square().mean().backward()
        return [p.grad.clone() for p in norms if p.grad is not None]

    with hf_accel.apply(model, method, **full_budget(method)):
        plain = gradients()
        if family in tiny.TEXTS:
            model.activation_checkpointing_enable()
        else:
            model.enable_gradient_checkpointing()
        again = gradients()
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(plain, again, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("case", [c for c in CLAIMED if c[1] == "llama"], ids="-".join)
def test_the_model_compiles_to_one_graph(case):
    method, family = case
    model = copy.deepcopy(MODELS[family])
    torch._dynamo.reset()
    counter = CompileCounter()
    with hf_accel.apply(model, method, **full_budget(method)):
        eager = run(model, family)
        ours = run(torch.compile(model, backend=counter, fullgraph=True), family)
    assert counter.frame_count == 1
    assert torch.allclose(ours, eager, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


@torch.no_grad()
def test_an_adapter_that_stands_keeps_working(few):
    from peft import LoraConfig

    method, family, model = few
    if not hasattr(model, "add_adapter"):
        pytest.skip(f"diffusers' {family} model has no add_adapter")
    torch.manual_seed(0)
    targets = list(tiny.TINY[family].projections)
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "extra")
    before, adapted = fingerprint(model), run(model, family)
    with hf_accel.apply(model, method, **full_budget(method)) as applied:
        assert near(method, run(model, family), adapted)
        names = {patched.module for patched in applied.report().entries[0].patched}
    assert not {name for name in names if "lora" in name or "base_layer" in name}
    assert fingerprint(model) == before
    assert torch.equal(run(model, family), adapted)


PAIRS = [
    (method, other, family)
    for method, other in itertools.product(LINEAR, METHODS)
    for family in FEW
    if claims(method, MODELS[family]) and claims(other, MODELS[family])
]


@torch.no_grad()
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_beside_other_methods_in_both_orders(pair):
    """The other at full budget changes nothing of what the weights do; either leaves first."""
    method, other, family = pair
    model = copy.deepcopy(MODELS[family])
    before, dense = fingerprint(model), run(model, family)
    settings = {method: full_budget(method), other: QUICK.get(other, {}) | full_budget(other)}
    with hf_accel.apply(model, method, **settings[method]):
        alone = run(model, family)
    for order, leave in itertools.product([(method, other), (other, method)], (0, 1)):
        applied = [hf_accel.apply(model, name, **settings[name]) for name in order]
        assert torch.allclose(run(model, family), alone, atol=1e-5, rtol=1e-5)
        applied[leave].revert()
        left = order[1 - leave]
        assert torch.allclose(run(model, family), alone if left == method else dense, atol=1e-5, rtol=1e-5)
        applied[1 - leave].revert()
        assert fingerprint(model) == before


@pytest.mark.parametrize("method", LINEAR)
def test_models_without_linears_to_change_are_refused(method):
    from diffusers import AutoencoderKL

    class Convolutions(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.Conv2d(3, 3, 3) for _ in range(2))

    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2)
    for model, word in ((vae, "autoencoder"), (Convolutions(), "without linears"), (torch.nn.Linear(32, 32), "module")):
        with pytest.raises(NotApplicable, match=word):
            hf_accel.apply(model, method)
