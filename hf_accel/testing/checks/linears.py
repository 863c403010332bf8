"""Promises of methods that change weights.

What they put in the place of a linear stays there, so promises about steps, generations and branches have no meaning;
those about identity, copies, gradients and neighbours have.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection
from typing import Any

import torch

import hf_accel
from hf_accel.quant.packed_linear import PackedLinear
from hf_accel.testing.case import Case, Checks, fails_at_the_end
from hf_accel.testing.checks.turns import in_threads
from hf_accel.testing.compare import expect_close, expect_equal, expect_same_objects, fingerprint
from hf_accel.testing.models import encoders, tiny
from hf_accel.testing.outcome import Skipped, expect

CHECKS = Checks()
# Families that the slower promises are asked of: a DiT with one stream, one with two, a U-Net, a language model.
FEW = ("wan", "flux", "unet", "llama")
FP32 = {"timestep", "img_ids", "txt_ids"}  # arguments that stay in fp32 when a model is in half precision
HALF_ERROR = 0.02  # relative, of an output in half precision, when weights were rounded otherwise


def run(model: torch.nn.Module, family: str, seed: int = 0, batch: int = 1) -> torch.Tensor:
    """The output of one forward."""
    if family in encoders.ENCODERS:
        return encoders.run(model, seed, batch)
    return tiny.run(model, family, seed=seed, batch=batch)


def near(case: Case, ours: torch.Tensor, theirs: torch.Tensor, slack: float = 1.0) -> bool:
    """Within what the method declares for its full budget."""
    return bool((ours - theirs).norm() <= slack * case.facts.full_budget_error * theirs.norm())


def expect_near(case: Case, ours: torch.Tensor, theirs: torch.Tensor, what: str, slack: float = 1.0) -> None:
    error, limit = float((ours - theirs).norm() / theirs.norm()), slack * case.facts.full_budget_error
    expect(near(case, ours, theirs, slack), f"{what}: a relative error of {error:.3g}; declared is {limit:.3g}.")


def new_modules(model: torch.nn.Module, stood: Collection[torch.nn.Module]) -> list[torch.nn.Module]:
    """What stands in a place of a model where one of the modules ``stood`` before; not what is inside of it."""
    known = set(map(id, stood))
    pairs = ((parent, child) for parent in model.modules() if id(parent) in known for child in parent.children())
    return list({id(child): child for _, child in pairs if id(child) not in known}.values())


def tensors_of(module: torch.nn.Module) -> list[torch.Tensor]:
    """The floating-point parameters and buffers of a module."""
    return [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]


@CHECKS.promise(on=FEW)
def requests_in_threads_do_not_meet(case: Case) -> None:
    """Two forwards at once, each as if it were alone."""
    model = case.build(0)

    @torch.no_grad()
    def twice(seed: int) -> torch.Tensor:
        return torch.stack([run(model, case.family, seed) for _ in range(2)])

    runs = [functools.partial(twice, seed) for seed in (0, 1)]
    with hf_accel.apply(model, case.method, **case.full_budget):
        alone = [one() for one in runs]
        expect_equal(in_threads(model, runs), alone, "Two requests at once beside one after the other")


@CHECKS.promise()
@torch.no_grad()
def full_budget_is_as_close_as_declared_and_undone_exactly(case: Case) -> None:
    model = case.build(0)
    stood = [*model.modules()]
    before, dense = fingerprint(model), run(model, case.family)
    two = run(model, case.family, batch=2)
    applied = hf_accel.apply(model, case.method, **case.full_budget)
    expect(fingerprint(model) != before, "apply() changed nothing on the model.")
    ours = run(model, case.family)
    same = not case.facts.exact and torch.equal(ours, dense)
    expect(not same, "The output is that of the unpatched model to the bit: nothing was changed.")
    expect_near(case, ours, dense, "Full budget beside the unpatched model")
    expect_near(case, run(model, case.family, batch=2), two, "Two items at full budget")
    expect_equal([run(model, case.family)], [ours], "The same forward twice")
    told = len(applied.report().entries[0].patched)
    new = len(new_modules(model, stood))
    expect(new == told > 0, f"{new} linears were replaced; the report names {told}.")
    applied.revert()
    applied.revert()  # a second call does nothing
    expect_same_objects(fingerprint(model), before, "After revert()")
    expect_equal([run(model, case.family)], [dense], "After revert()")


@CHECKS.promise(on=FEW)
@torch.no_grad()
def two_models_of_one_class_do_not_see_each_other(case: Case) -> None:
    model, other = case.build(0), case.build(1)
    before, dense = fingerprint(other), run(other, case.family)
    with hf_accel.apply(model, case.method, **case.full_budget):
        expect_same_objects(fingerprint(other), before, "A second model, while the first is patched")
        with hf_accel.apply(other, case.method, **case.full_budget):
            ours = run(other, case.family)
        expect_equal([run(other, case.family)], [dense], "A second model, after its revert()")
    expect_near(case, ours, dense, "A second model at full budget")


@CHECKS.promise(on=FEW)
@torch.no_grad()
def applying_again_begins_from_the_full_weights(case: Case) -> None:
    model = case.build(0)
    before = fingerprint(model)
    with hf_accel.apply(model, case.method, **case.full_budget):
        once = run(model, case.family)
    first = hf_accel.apply(model, case.method, **case.small_budget)
    small = case.facts.exact or not near(case, run(model, case.family), once)
    expect(small, "A small budget is as good as the full one.")
    second = hf_accel.apply(model, case.method, **case.full_budget)
    expect_equal([run(model, case.family)], [once], "Full budget after a small one, beside it alone")
    expect(not first.active, "What was replaced still calls itself active.")
    second.revert()
    expect_same_objects(fingerprint(model), before, "After revert()")


@CHECKS.promise(on=FEW)
@torch.no_grad()
def a_failing_replacement_leaves_what_stood(case: Case) -> None:
    model = case.build(0)
    before = fingerprint(model)
    applied = hf_accel.apply(model, case.method, **case.full_budget)
    standing, ours = fingerprint(model), run(model, case.family)  # by identity: the very same packed linears
    with fails_at_the_end(case.method):
        hf_accel.apply(model, case.method, **case.small_budget)
    expect(applied.active, "What stood is no longer active after a replacement that failed.")
    expect_same_objects(fingerprint(model), standing, "After a replacement that failed")
    expect_equal([run(model, case.family)], [ours], "After a replacement that failed")
    applied.revert()
    expect_same_objects(fingerprint(model), before, "After revert()")


@CHECKS.promise(on=FEW)
@torch.no_grad()
def deepcopy_has_a_life_of_its_own(case: Case) -> None:
    model = case.build(0)
    before, dense = fingerprint(model), run(model, case.family)
    places = {id(module): name for name, module in model.named_modules()}
    applied = hf_accel.apply(model, case.method, **case.full_budget)
    ours = run(model, case.family)
    twin = copy.deepcopy(model)
    for name, module in model.named_modules():
        if name and id(module) not in places:
            for tensor in tensors_of(twin.get_submodule(name)):
                tensor.zero_()
    expect(not torch.equal(run(twin, case.family), ours), "A copy with zeroed tensors computes with the original's.")
    expect_equal([run(model, case.family)], [ours], "The original, when its copy was changed")
    hf_accel.revert(twin)
    expect_equal([run(twin, case.family)], [dense], "The copy after its revert()")
    expect_equal([run(model, case.family)], [ours], "The original, when its copy was reverted")
    applied.revert()
    expect_same_objects(fingerprint(model), before, "After revert()")


@CHECKS.promise(on=FEW, dtype=(torch.bfloat16, torch.float16))
@torch.no_grad()
def half_precision(case: Case, dtype: torch.dtype) -> None:
    model = case.build(0).to(dtype)

    def low() -> torch.Tensor:
        given = {
            name: value.to(dtype) if value.is_floating_point() and name not in FP32 else value
            for name, value in tiny.TINY[case.family].inputs(model).items()
            if isinstance(value, torch.Tensor)
        }
        return model(**given, return_dict=False)[0].float()

    dense = low()
    with hf_accel.apply(model, case.method, **case.full_budget) as applied:
        # However close to the dense weights, their own rounding in half precision is between the two.
        slack = max(1.5, HALF_ERROR / case.facts.full_budget_error)
        expect_near(case, low(), dense, f"In {dtype} at full budget", slack)
        dtypes = {module.scales.dtype for module in model.modules() if isinstance(module, PackedLinear)}
        expect(dtypes <= {dtype}, f"Scales are in {sorted(map(str, dtypes))}; the model is in {dtype}.")
    expect(not applied.active, "What was reverted still calls itself active.")
    expect_equal([low()], [dense], "After revert()")


@CHECKS.promise(on=FEW)
def gradients_pass_through_to_what_is_still_dense(case: Case) -> None:
    model = case.build(0)
    norms = [p for name, p in model.named_parameters() if p.ndim == 1 and "norm" in name][:4]
    stood = [*model.modules()]

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        run(model, case.family).square().mean().backward()
        return [p.grad.clone() for p in norms if p.grad is not None]

    dense = gradients()
    expect(dense, "No norm of the unpatched model gets a gradient.")
    with hf_accel.apply(model, case.method, **case.full_budget):
        ours = gradients()
        learning = [module for module in new_modules(model, stood) if list(module.parameters())]
    expect(case.facts.backward, "Facts say that no gradients flow through it.")
    expect(not learning, f"{len(learning)} replaced linears have parameters.")
    expect(len(ours) == len(dense), f"{len(ours)} norms get a gradient; {len(dense)} do in the unpatched model.")
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(ours, dense, strict=True)]
    expect(max(errors) < 0.1, f"Relative errors of the norms' gradients are {errors}; expected below 0.1.")


@CHECKS.promise(on=FEW)
def gradient_checkpointing(case: Case) -> None:
    model: Any = case.build(0).train()
    norms = [p for name, p in model.named_parameters() if p.ndim == 1 and "norm" in name]

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        run(model, case.family).square().mean().backward()
        return [p.grad.clone() for p in norms if p.grad is not None]

    with hf_accel.apply(model, case.method, **case.full_budget):
        plain = gradients()
        if case.family in tiny.TEXTS:
            model.activation_checkpointing_enable()
        else:
            model.enable_gradient_checkpointing()
        again = gradients()
    same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(plain, again, strict=True))
    expect(same, "Gradients under checkpointing differ from those without.")


@CHECKS.promise(on=("llama",))
@torch.no_grad()
def the_model_compiles_to_one_graph(case: Case) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, counter = case.build(0), CompileCounter()
    with hf_accel.apply(model, case.method, **case.full_budget):
        eager = run(model, case.family)
        compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
        ours = run(compiled, case.family)
    torch._dynamo.reset()
    expect(counter.frame_count == 1, f"{counter.frame_count} graphs were compiled; expected one.")
    expect_close([ours], [eager], "Compiled beside eager")


@CHECKS.promise(on=FEW)
@torch.no_grad()
def an_adapter_that_stands_keeps_working(case: Case) -> None:
    from peft import LoraConfig

    model: Any = case.build(0)
    if not hasattr(model, "add_adapter"):
        raise Skipped(f"diffusers' {case.family} model has no add_adapter")
    torch.manual_seed(0)
    targets = list(tiny.TINY[case.family].projections)
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "extra")
    before, adapted = fingerprint(model), run(model, case.family)
    with hf_accel.apply(model, case.method, **case.full_budget) as applied:
        expect_near(case, run(model, case.family), adapted, "A model with a LoRA at full budget")
        names = {patched.module for patched in applied.report().entries[0].patched}
    inside = sorted(name for name in names if "lora" in name or "base_layer" in name)
    expect(not inside, f"The report names parts of peft's layers: {inside}.")
    expect_same_objects(fingerprint(model), before, "After revert() of a model with a LoRA")
    expect_equal([run(model, case.family)], [adapted], "After revert() of a model with a LoRA")
