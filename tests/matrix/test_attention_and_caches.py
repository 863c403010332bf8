"""One matrix of promises over every registered method and every host it claims.

A new method is found through the registry and held to all of this without a line here.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import hf_accel
import tiny
from hf_accel import registry
from hf_accel.errors import NotApplicable
from hf_accel.hosts.target import Model
from hf_accel.sites.attention import token_order
from hf_accel.sites.step_cache.statistics import StepCacheStatistics

FAMILIES = sorted(tiny.TINY)
EVERY = sorted(registry.methods())
# Those that change what a forward does. Methods that change weights are held to test_linear.
METHODS = [name for name in EVERY if registry.get(name).facts.site != "linear"]
TIMESTEPS = (900.0, 600.0, 300.0)
# Settings that only save time on tiny models; a method without an entry is tested as it comes.
QUICK = {
    "grat": {"group_size": (2, 2, 3)},  # default tiles are larger than tiny grids
    "svg2": {"kmeans_iter_init": 2, "num_q_centroids": 6, "num_k_centroids": 9},
}
SHARED_BY_BRANCHES = ("svg2",)  # its centroids, as in the authors' code


def claims(method: str, model: torch.nn.Module) -> bool:
    return registry.get(method).why_not(Model("model", model)) is None


def claimed_pairs() -> list[tuple[str, str]]:
    """Every method with every family that it claims."""
    pairs = []
    for family in FAMILIES:
        try:
            model = tiny.build(family)
        except pytest.skip.Exception:  # diffusers cannot build it here; the test of refusals below says so
            continue
        pairs += [(method, family) for method in METHODS if claims(method, model)]
    return sorted(pairs)


CLAIMED = claimed_pairs()


@pytest.fixture(params=CLAIMED, ids=lambda p: f"{p[0]}-{p[1]}")
def case(request):
    """(method name, family name, model) for every pair that the method claims."""
    method, family = request.param
    return method, family, tiny.build(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_methods_that_do_not_claim_a_family_are_refused_in_words(family):
    model = tiny.build(family)
    others = [method for method in METHODS if (method, family) not in CLAIMED]
    assert others
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    for method in others:
        reason = registry.get(method).why_not(Model("model", model))
        with pytest.raises(NotApplicable) as caught:
            hf_accel.apply(model, method)
        assert reason in str(caught.value)
    assert before == {name: dict(module.__dict__) for name, module in model.named_modules()}


@torch.no_grad()
def denoise(model, family, timesteps=TIMESTEPS, seed=0, **size):
    """The outputs of a few denoising steps (without a scheduler: the input stays)."""
    return [tiny.run(model, family, timestep=t, seed=seed, **size) for t in timesteps]


def full_budget(method: str) -> dict:
    return {**quick(method), **registry.get(method).facts.full_budget}


def quick(method: str) -> dict:
    return QUICK.get(method, {})


@torch.no_grad()
def guided(model, family, order):
    """The outputs of guidance in two forwards a step, those of branch 0 before those of branch 1."""
    inputs = [tiny.TINY[family].inputs(model, seed=seed) for seed in (3, 4)]
    out = {0: [], 1: []}
    for timestep in TIMESTEPS:
        for branch in order:
            given = inputs[branch] | {"timestep": torch.full_like(inputs[branch]["timestep"], timestep)}
            out[branch].append(model(**given, return_dict=False)[0])
    return out[0] + out[1]


def close(ours, theirs, limit=1e-5):
    return all(torch.allclose(a, b, atol=limit, rtol=limit) for a, b in zip(ours, theirs, strict=True))


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def check_all_is_the_methods(run, family, forwards):
    """At full budget the method had its say in every forward, and nothing was left out of any."""
    assert run.forwards == forwards
    assert not run.dense_calls
    if isinstance(run, StepCacheStatistics):
        assert run.full_steps.total() == forwards
        assert run.partial_steps == 0
    else:
        assert run.sparse_calls == tiny.TINY[family].layers * forwards


def fingerprint(model: torch.nn.Module) -> dict:
    """Everything a patch could touch, by identity: attributes, processors and their attributes, hooks, keys."""
    out: dict = {"keys": list(model.state_dict()), "config": dict(Model("model", model).config)}
    for name, module in model.named_modules():
        attributes = {k: v for k, v in module.__dict__.items() if not k.startswith("_") or k in ("_hf_accel",)}
        hooks = {k: list(v.items()) for k, v in module.__dict__.items() if k.endswith("_hooks") and v}
        flags = {k: dict(v) for k, v in module.__dict__.items() if "hooks_" in k and isinstance(v, dict) and v}
        out[name] = ({k: id(v) for k, v in attributes.items()}, hooks, flags, id(module.__dict__.get("forward")))
        processor = getattr(module, "processor", None)
        if processor is not None:
            out[name + ".processor"] = (id(processor), type(processor), dict(vars(processor)))
    return out


def keys_aside(found: dict) -> dict:
    """A fingerprint without the numbers that torch gave to hooks."""
    return {
        name: (part[0], {k: [hook for _, hook in v] for k, v in part[1].items()}, *map(len, part[2:3]), part[3])
        if isinstance(part, tuple) and len(part) == 4
        else part
        for name, part in found.items()
    }


def test_full_budget_is_dense(case):
    method, family, model = case
    dense = denoise(model, family)
    with hf_accel.apply(model, method, **full_budget(method)) as applied:
        ours = denoise(model, family)
        check_all_is_the_methods(applied.report().entries[0].run, family, len(TIMESTEPS))
    assert close(ours, dense)


def test_batch_of_two_at_full_budget(case):
    method, family, model = case
    if not registry.get(method).facts.batched:
        pytest.skip(f"{method} declares that it does not do batches")
    dense = denoise(model, family, batch=2)
    with hf_accel.apply(model, method, **full_budget(method)):
        assert close(denoise(model, family, batch=2), dense)


def test_revert_restores_identity_and_bits(case):
    method, family, model = case
    before, dense = fingerprint(model), denoise(model, family)
    applied = hf_accel.apply(model, method, **quick(method))
    assert fingerprint(model) != before
    denoise(model, family)
    applied.revert()
    applied.revert()  # a second call does nothing
    assert fingerprint(model) == before
    assert equal(denoise(model, family), dense)


def test_a_failing_replacement_leaves_what_stood(case, fails_at_the_end):
    method, family, model = case
    before, dense = fingerprint(model), denoise(model, family)
    applied = hf_accel.apply(model, method, **quick(method))
    standing, ours = keys_aside(fingerprint(model)), denoise(model, family)
    with fails_at_the_end(method):
        hf_accel.apply(model, method, **quick(method))
    assert applied.active
    assert keys_aside(fingerprint(model)) == standing
    assert equal(denoise(model, family), ours)
    applied.revert()
    assert fingerprint(model) == before
    assert equal(denoise(model, family), dense)


def test_two_models_of_one_class_do_not_see_each_other(case):
    method, family, model = case
    other = tiny.build(family, seed=1)
    before, dense = fingerprint(other), denoise(other, family)
    first = hf_accel.apply(model, method, **quick(method))
    assert fingerprint(other) == before
    assert equal(denoise(other, family), dense)
    with hf_accel.apply(other, method, **full_budget(method)):
        first.revert()
        assert close(denoise(other, family), dense)
    assert fingerprint(other) == before


def test_state_does_not_leak_into_the_next_prompt(case):
    method, family, model = case
    with hf_accel.apply(model, method, **quick(method)):
        denoise(model, family, seed=5)
        second = denoise(model, family, seed=6)
    with hf_accel.apply(model, method, **quick(method)):
        alone = denoise(model, family, seed=6)
    assert equal(second, alone)


def test_state_does_not_survive_an_exception(case):
    method, family, model = case
    with hf_accel.apply(model, method, **quick(method)):
        inputs = tiny.TINY[family].inputs(model, timestep=900.0, seed=5)
        tiny.run(model, family, timestep=900.0, seed=5)
        with pytest.raises((RuntimeError, ValueError, TypeError, AssertionError, IndexError)):
            model(**inputs | tiny.TINY[family].bad)
        second = denoise(model, family, seed=6)
    with hf_accel.apply(model, method, **quick(method)):
        assert equal(second, denoise(model, family, seed=6))


def test_a_second_generation_equals_the_first(case):
    method, family, model = case
    with hf_accel.apply(model, method, **quick(method)) as applied:
        first, second = denoise(model, family), denoise(model, family)
        if family not in tiny.TEXTS:  # where every prompt is one
            assert applied.report().entries[0].run.generations == 2
    assert equal(first, second)


def test_inference_mode_leaves_nothing_for_other_modes(case):
    method, family, model = case
    with hf_accel.apply(model, method, **quick(method)):
        with torch.inference_mode():
            first = denoise.__wrapped__(model, family)
        assert equal(denoise(model, family), first)


@pytest.mark.parametrize("done", [1, 2])
def test_revert_in_the_middle_of_a_generation(case, done):
    method, family, model = case
    before, dense = fingerprint(model), denoise(model, family)
    applied = hf_accel.apply(model, method, **quick(method))
    denoise(model, family, TIMESTEPS[:done])
    applied.revert()
    assert fingerprint(model) == before
    assert equal(denoise(model, family, TIMESTEPS[done:]), dense[done:])


def test_apply_in_the_middle_of_a_generation(case):
    method, family, model = case
    dense = denoise(model, family)
    with hf_accel.apply(model, method, **full_budget(method)):
        assert close(denoise(model, family, TIMESTEPS[1:]), dense[1:])


def test_other_resolution_on_the_second_call(case):
    method, family, model = case
    frames, height, width = (1, 6, 10) if family in (*tiny.IMAGES, *tiny.TEXTS) else (2, 6, 8)
    with hf_accel.apply(model, method, **full_budget(method)) as applied:
        denoise(model, family)
        ours = denoise(model, family, size=(frames, height, width))
        run = applied.report().entries[0].run
    assert not run.dense_calls
    assert close(ours, denoise(model, family, size=(frames, height, width)))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["cond-first", "uncond-first"])
def test_two_pass_guidance_in_both_orders(case, order):
    method, family, model = case
    if family in tiny.TEXTS:
        pytest.skip("a language model has no guidance branches")
    dense = guided(model, family, order)
    with hf_accel.apply(model, method, **full_budget(method)) as applied:
        ours = guided(model, family, order)
        run = applied.report().entries[0].run
    assert run.generations == 1
    assert run.forwards == 2 * len(TIMESTEPS)
    assert close(ours, dense)


def test_guidance_branches_do_not_see_each_other(case):
    method, family, model = case
    if family in tiny.TEXTS:
        pytest.skip("a language model has no guidance branches")
    if method in SHARED_BY_BRANCHES:
        pytest.skip(f"{method} shares its state between guidance branches")
    alone = []
    for branch in (0, 1):
        with hf_accel.apply(model, method, **quick(method)):
            alone += guided(model, family, (branch,))
    with hf_accel.apply(model, method, **quick(method)):
        assert equal(guided(model, family, (0, 1)), alone)


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(case, when):
    from peft import LoraConfig

    method, family, model = case
    if not hasattr(model, "add_adapter"):
        pytest.skip(f"diffusers' {family} model has no add_adapter; the PeftModel around it is tested below")
    plain = denoise(model, family)

    def add():
        torch.manual_seed(0)
        targets = list(tiny.TINY[family].projections)
        model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "extra")

    if when == "before":
        add()
        before = fingerprint(model)
        applied = hf_accel.apply(model, method, **full_budget(method))
    else:
        applied = hf_accel.apply(model, method, **full_budget(method))
        add()
    ours = denoise(model, family)
    applied.revert()
    assert not close(ours, plain)
    assert close(ours, denoise(model, family))
    if when == "before":
        assert fingerprint(model) == before
    delete = model.delete_adapter if family in tiny.TEXTS else model.delete_adapters
    delete("extra")
    assert close(denoise(model, family), plain, 1e-6)  # peft leaves its modules around the weights: other rounding


# peft still asks transformers by an old name
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_peft_model_is_looked_into(case):
    from peft import LoraConfig, get_peft_model

    method, family, model = case
    targets = [tiny.TINY[family].projections[0]]
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    dense = denoise(wrapped, family)
    with hf_accel.apply(wrapped, method, **full_budget(method)) as applied:
        assert close(denoise(wrapped, family), dense)
        check_all_is_the_methods(applied.report().entries[0].run, family, len(TIMESTEPS))
    assert equal(denoise(wrapped, family), dense)


def test_bfloat16(case):
    method, family, model = case
    if family == "hunyuan-video-1.5":
        pytest.skip("diffusers' HunyuanVideo 1.5 token refiner mixes fp32 and bf16 in this configuration, unpatched")
    model.to(torch.bfloat16)

    @torch.no_grad()
    def low():
        inputs = tiny.TINY[family].inputs(model)
        keep = {"timestep", "img_ids", "txt_ids", "guidance", "control_hidden_states_scale", "padding_mask"}
        given = {
            k: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() and k not in keep else v
            for k, v in inputs.items()
        }
        return model(**given, return_dict=False)[0].float()

    dense = low()
    with hf_accel.apply(model, method, **full_budget(method)):
        ours = low()
    assert (ours - dense).norm() <= 2e-2 * dense.norm()


def test_whole_model_compiles_to_one_graph(case):
    method, family, model = case
    if family in ("mochi", "hunyuan-video-1.5", "cosmos"):
        pytest.skip(f"diffusers' own {family} forward does not compile in one graph, unpatched")
    if not registry.get(method).facts.compile:
        pytest.skip(f"{method} declares that it does not compile")
    torch._dynamo.reset()
    counter = CompileCounter()
    dense = denoise(model, family)
    with hf_accel.apply(model, method, **full_budget(method)) as applied:
        hooks = (*model._forward_pre_hooks.values(), *model._forward_hooks.values())
        movers = sum(isinstance(hook, token_order.EntryHook | token_order.ExitHook) for hook in hooks)
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        ours = denoise(compiled, family)
        run = applied.report().entries[0].run
        check_all_is_the_methods(run, family, len(TIMESTEPS))
    assert close(ours, dense)
    if isinstance(run, StepCacheStatistics):
        assert counter.frame_count == 1  # the full view; see below for the partial one
    else:
        assert counter.frame_count == 2 + movers  # the model, the hook in front of it, and those that move its tokens
    torch._dynamo.reset()


def test_a_step_cache_compiles_to_two_graphs(case):
    method, family, model = case
    if not registry.get(method).facts.at("step cache"):
        pytest.skip("attention methods are one graph, whatever they leave out; see above")
    torch._dynamo.reset()
    counter = CompileCounter()
    with hf_accel.apply(model, method, **quick(method)) as applied:
        eager = denoise(model, family)
        ours = denoise(torch.compile(model, backend=counter, fullgraph=True), family)
        ours += denoise(torch.compile(model, backend=counter, fullgraph=True), family, seed=6)
        run = applied.report().entries[0].run
        assert close(ours, eager + denoise(model, family, seed=6))
    assert run.partial_steps
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_deepcopy_has_a_life_of_its_own(case):
    method, family, model = case
    before, dense = fingerprint(model), denoise(model, family)
    applied = hf_accel.apply(model, method, **full_budget(method))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    forwards = applied.report().entries[0].run.forwards
    assert not close(denoise(twin, family), dense)
    assert applied.report().entries[0].run.forwards == forwards
    hf_accel.revert(twin)
    assert "_hf_accel" not in twin.__dict__
    assert close(denoise(model, family), dense)
    applied.revert()
    assert fingerprint(model) == before


def test_saving_a_patched_model_saves_the_plain_model(case, tmp_path):
    method, family, model = case
    dense = denoise(model, family)
    with hf_accel.apply(model, method, **quick(method)):
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert list(again.state_dict()) == list(model.state_dict())
    assert equal(again.state_dict().values(), model.state_dict().values())
    assert close(denoise(again, family), dense)  # loaded weights lie elsewhere in memory: other rounding


def test_gradients_are_right_or_dense_and_counted(case):
    method, family, model = case

    own = dict(model.named_parameters())  # a method may add parameters

    def gradients():
        model.zero_grad()
        tiny.run(model, family).square().mean().backward()
        return [p.grad.clone() for p in own.values() if p.grad is not None]

    dense = gradients()
    with hf_accel.apply(model, method, **full_budget(method)) as applied:
        ours = gradients()
        run = applied.report().entries[0].run
    assert close(ours, dense)
    assert registry.get(method).facts.backward == (not run.dense_calls)


def test_gradient_checkpointing(case):
    method, family, model = case
    model.train()
    if family in tiny.TEXTS:
        model.activation_checkpointing_enable()
    else:
        model.enable_gradient_checkpointing()

    own = dict(model.named_parameters())  # a method may add parameters

    def gradients():
        model.zero_grad()
        tiny.run(model, family).square().mean().backward()
        return [p.grad.clone() for p in own.values() if p.grad is not None]

    dense = gradients()
    with hf_accel.apply(model, method, **full_budget(method)):
        assert close(gradients(), dense)


@pytest.mark.parametrize("method", EVERY)
def test_settings_round_trip_and_declarations(method):
    cls = registry.get(method)
    config = cls.Config()
    assert cls.Config.METHOD == cls.name == method
    assert cls.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    # An adapter is no approximation of the model that it stands on.
    exact = cls.facts.exact or cls.facts.site == "adapter"
    assert exact or cls.facts.full_budget, "an approximate method names the settings at which it is dense"
    cls.Config.build(cls.facts.full_budget)


@pytest.mark.parametrize("method", EVERY)
def test_wrong_models_are_refused_in_words(method):
    from diffusers import AutoencoderKL
    from transformers import UMT5Config, UMT5EncoderModel

    encoder = UMT5EncoderModel(UMT5Config(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, vocab_size=16))
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2)
    for model, word in ((encoder, "text encoder"), (vae, "autoencoder"), (torch.nn.Linear(2, 2), "module")):
        with pytest.raises(NotApplicable, match=word):
            hf_accel.apply(model, method)
    for thing in (None, "a path", {"transformer": 1}):
        with pytest.raises(NotApplicable, match="Load the model first"):
            hf_accel.apply(thing, method)
