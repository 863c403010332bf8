"""Promises of methods that change what a forward computes: attention methods and step caches.

A generation is a few forwards with falling timesteps, without a scheduler: the input stays.
"""

from __future__ import annotations

import copy
import functools
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

import hf_accel
from hf_accel.sites.step_cache.statistics import StepCacheStatistics
from hf_accel.testing.case import Case, Checks, fails_at_the_end
from hf_accel.testing.checks.turns import by_turns, in_tasks, in_threads
from hf_accel.testing.compare import (
    close,
    expect_close,
    expect_equal,
    expect_same_objects,
    fingerprint,
    keys_aside,
)
from hf_accel.testing.models import tiny
from hf_accel.testing.outcome import BrokenPromise, Skipped, expect

CHECKS = Checks()
TIMESTEPS = (900.0, 600.0, 300.0)
# Arguments that stay in fp32 when a model is in half precision.
FP32 = {"timestep", "img_ids", "txt_ids", "guidance", "control_hidden_states_scale", "padding_mask"}


@torch.no_grad()
def denoise(
    model: torch.nn.Module, family: str, timesteps: Sequence[float] = TIMESTEPS, seed: int = 0, **size: Any
) -> list[torch.Tensor]:
    """The outputs of a few denoising steps."""
    return [tiny.run(model, family, timestep=t, seed=seed, **size) for t in timesteps]


@torch.no_grad()
def guided(model: torch.nn.Module, family: str, order: Sequence[int]) -> list[torch.Tensor]:
    """The outputs of guidance in two forwards a step, those of branch 0 before those of branch 1."""
    inputs = [tiny.TINY[family].inputs(model, seed=seed) for seed in (3, 4)]
    out: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for timestep in TIMESTEPS:
        for branch in order:
            given = inputs[branch] | {"timestep": torch.full_like(inputs[branch]["timestep"], timestep)}
            out[branch].append(model(**given, return_dict=False)[0])
    return out[0] + out[1]


def run_of(applied: Any) -> Any:
    """What the report says of the run of the one method that was applied."""
    return applied.report().entries[0].run


def expect_all_is_the_methods(run: Any, family: str, forwards: int) -> None:
    """At full budget the method had its say in every forward, and nothing was left out of any."""
    expect(run.forwards == forwards, f"The report counts {run.forwards} forwards; there were {forwards}.")
    expect(not run.dense_calls, f"At full budget calls ran dense: {dict(run.dense_calls)}.")
    if isinstance(run, StepCacheStatistics):
        full = run.full_steps.total()
        expect(full == forwards, f"The report counts {full} full steps at full budget; there were {forwards}.")
        expect(run.partial_steps == 0, f"At full budget {run.partial_steps} steps were partial.")
    else:
        calls = tiny.TINY[family].layers * forwards
        expect(run.sparse_calls == calls, f"The method had {run.sparse_calls} attention calls; there were {calls}.")


@CHECKS.promise()
def full_budget_is_dense(case: Case) -> None:
    model = case.build(0)
    dense = denoise(model, case.family)
    with hf_accel.apply(model, case.method, **case.full_budget) as applied:
        ours = denoise(model, case.family)
        expect_all_is_the_methods(run_of(applied), case.family, len(TIMESTEPS))
    expect_close(ours, dense, "Full budget beside the unpatched model")


@CHECKS.promise()
def batch_of_two_at_full_budget(case: Case) -> None:
    if not case.facts.batched:
        raise Skipped(f"{case.method} declares that it does not do batches")
    model = case.build(0)
    dense = denoise(model, case.family, batch=2)
    with hf_accel.apply(model, case.method, **case.full_budget):
        expect_close(denoise(model, case.family, batch=2), dense, "Two items at full budget")


@CHECKS.promise()
def revert_restores_identity_and_bits(case: Case) -> None:
    model = case.build(0)
    before, dense = fingerprint(model), denoise(model, case.family)
    applied = hf_accel.apply(model, case.method, **case.settings)
    expect(fingerprint(model) != before, "apply() changed nothing on the model.")
    denoise(model, case.family)
    applied.revert()
    applied.revert()  # a second call does nothing
    expect_same_objects(fingerprint(model), before, "After revert()")
    expect_equal(denoise(model, case.family), dense, "After revert()")


@CHECKS.promise(on=("wan", "hunyuan-video", "cogvideox", "mochi", "flux", "unet"))
@torch.no_grad()
def an_item_does_not_depend_on_its_batch(case: Case) -> None:
    if not case.facts.batched:
        raise Skipped(f"{case.method} declares that it does not do batches")
    model, inputs = case.build(0), tiny.TINY[case.family].inputs
    single, both = inputs(model), inputs(model, batch=2)
    of_batch = [n for n, x in both.items() if isinstance(x, torch.Tensor) and x.shape != single[n].shape]
    items = [both | {name: both[name][i : i + 1] for name in of_batch} for i in (0, 1)]

    def run(given: dict[str, Any]) -> list[torch.Tensor]:
        levels = [given | {"timestep": torch.full_like(given["timestep"], t)} for t in TIMESTEPS]
        return [model(**one, return_dict=False)[0] for one in levels]

    with hf_accel.apply(model, case.method, **case.settings):
        together = run(both)
    for index, item in enumerate(items):
        with hf_accel.apply(model, case.method, **case.settings):
            expect_close(run(item), [x[index : index + 1] for x in together], f"Item {index} beside the batch of two")


@CHECKS.promise()
def requests_in_turns_do_not_meet(case: Case) -> None:
    """Threads, asyncio tasks and requests of one loop: each as if it were alone, counted together and apart."""
    model = case.build(0)
    levels = (TIMESTEPS, (850.0, *TIMESTEPS[1:]))  # their steps are not the same either

    def steps(seed: int) -> list[Callable[[], torch.Tensor]]:
        return [functools.partial(tiny.run, model, case.family, timestep=t, seed=seed) for t in levels[seed]]

    def run(seed: int) -> list[torch.Tensor]:
        return denoise(model, case.family, levels[seed], seed)

    with hf_accel.apply(model, case.method, **case.settings) as applied, torch.no_grad():
        alone = [run(0), run(1)]
        before = run_of(applied).forwards
        one, other = hf_accel.request(model), hf_accel.request(model, name="other")
        found = {
            "in threads": in_threads(model, [functools.partial(run, seed) for seed in (0, 1)]),
            "in asyncio tasks": in_tasks([steps(0), steps(1)]),
            "in requests by turns": by_turns([one, other], [steps(0), steps(1)]),
        }
        for how, outputs in found.items():
            for ours, theirs in zip(outputs, alone, strict=True):
                expect_equal(ours, theirs, f"Two requests {how}, beside one after the other")
        together = run_of(applied).forwards - before
        forwards = len(found) * sum(map(len, levels))
        expect(
            together == forwards, f"The report counts {together} forwards of several requests; there were {forwards}."
        )
        ((told,),) = (run.values() for run in applied.stats(other).values())
        expect(told["forwards"] == len(levels[1]), f"Of one request the report counts {told['forwards']} forwards.")


@CHECKS.promise()
def a_failing_replacement_leaves_what_stood(case: Case) -> None:
    model = case.build(0)
    before, dense = fingerprint(model), denoise(model, case.family)
    applied = hf_accel.apply(model, case.method, **case.settings)
    standing, ours = keys_aside(fingerprint(model)), denoise(model, case.family)
    with fails_at_the_end(case.method):
        hf_accel.apply(model, case.method, **case.settings)
    expect(applied.active, "What stood is no longer active after a replacement that failed.")
    expect_same_objects(keys_aside(fingerprint(model)), standing, "After a replacement that failed")
    expect_equal(denoise(model, case.family), ours, "After a replacement that failed")
    applied.revert()
    expect_same_objects(fingerprint(model), before, "After revert()")
    expect_equal(denoise(model, case.family), dense, "After revert()")


@CHECKS.promise()
def two_models_of_one_class_do_not_see_each_other(case: Case) -> None:
    model, other = case.build(0), case.build(1)
    before, dense = fingerprint(other), denoise(other, case.family)
    first = hf_accel.apply(model, case.method, **case.settings)
    expect_same_objects(fingerprint(other), before, "A second model, while the first is patched")
    expect_equal(denoise(other, case.family), dense, "A second model, while the first is patched")
    with hf_accel.apply(other, case.method, **case.full_budget):
        first.revert()
        expect_close(denoise(other, case.family), dense, "A second model at full budget, when the first was reverted")
    expect_same_objects(fingerprint(other), before, "After revert() of the second model")


@CHECKS.promise()
def state_does_not_leak_into_the_next_prompt(case: Case) -> None:
    model = case.build(0)
    with hf_accel.apply(model, case.method, **case.settings):
        denoise(model, case.family, seed=5)
        second = denoise(model, case.family, seed=6)
    with hf_accel.apply(model, case.method, **case.settings):
        alone = denoise(model, case.family, seed=6)
    expect_equal(second, alone, "A second prompt beside the same prompt alone")


@CHECKS.promise()
def state_does_not_survive_an_exception(case: Case) -> None:
    model = case.build(0)
    with hf_accel.apply(model, case.method, **case.settings):
        inputs = tiny.TINY[case.family].inputs(model, timestep=900.0, seed=5)
        tiny.run(model, case.family, timestep=900.0, seed=5)
        try:
            model(**{**inputs, **tiny.TINY[case.family].bad})
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError):
            second = denoise(model, case.family, seed=6)
        else:
            raise BrokenPromise("The model took arguments that were to break it.")
    with hf_accel.apply(model, case.method, **case.settings):
        expect_equal(second, denoise(model, case.family, seed=6), "A prompt after one that broke off, beside it alone")


@CHECKS.promise()
def a_second_generation_equals_the_first(case: Case) -> None:
    model = case.build(0)
    with hf_accel.apply(model, case.method, **case.settings) as applied:
        first, second = denoise(model, case.family), denoise(model, case.family)
        if case.family not in tiny.TEXTS:  # where every prompt is one
            generations = run_of(applied).generations
            expect(generations == 2, f"The report counts {generations} generations; there were 2.")
    expect_equal(first, second, "The same generation twice")


@CHECKS.promise()
def inference_mode_leaves_nothing_for_other_modes(case: Case) -> None:
    model = case.build(0)
    with hf_accel.apply(model, case.method, **case.settings):
        with torch.inference_mode():
            first = [tiny.run(model, case.family, timestep=t) for t in TIMESTEPS]
        expect_equal(denoise(model, case.family), first, "no_grad() after inference_mode()")


@CHECKS.promise(done=(1, 2))
def revert_in_the_middle_of_a_generation(case: Case, done: int) -> None:
    model = case.build(0)
    before, dense = fingerprint(model), denoise(model, case.family)
    applied = hf_accel.apply(model, case.method, **case.settings)
    denoise(model, case.family, TIMESTEPS[:done])
    applied.revert()
    expect_same_objects(fingerprint(model), before, f"After revert() behind step {done}")
    expect_equal(denoise(model, case.family, TIMESTEPS[done:]), dense[done:], f"After revert() behind step {done}")


@CHECKS.promise()
def apply_in_the_middle_of_a_generation(case: Case) -> None:
    model = case.build(0)
    dense = denoise(model, case.family)
    with hf_accel.apply(model, case.method, **case.full_budget):
        expect_close(denoise(model, case.family, TIMESTEPS[1:]), dense[1:], "Full budget from the second step on")


@CHECKS.promise()
def other_resolution_on_the_second_call(case: Case) -> None:
    model = case.build(0)
    size = (1, 6, 10) if case.family in (*tiny.IMAGES, *tiny.TEXTS) else (2, 6, 8)
    with hf_accel.apply(model, case.method, **case.full_budget) as applied:
        denoise(model, case.family)
        ours = denoise(model, case.family, size=size)
        run = run_of(applied)
    expect(not run.dense_calls, f"At full budget calls ran dense: {dict(run.dense_calls)}.")
    expect_close(ours, denoise(model, case.family, size=size), "Another resolution on the second call")


def _needs_branches(case: Case) -> None:
    if case.family in tiny.TEXTS:
        raise Skipped("a language model has no guidance branches")


@CHECKS.promise(first=("cond_first", "uncond_first"))
def two_pass_guidance(case: Case, first: str) -> None:
    _needs_branches(case)
    model, order = case.build(0), (0, 1) if first == "cond_first" else (1, 0)
    dense = guided(model, case.family, order)
    with hf_accel.apply(model, case.method, **case.full_budget) as applied:
        ours = guided(model, case.family, order)
        run = run_of(applied)
    expect(run.generations == 1, f"The report counts {run.generations} generations; there was one, of two branches.")
    forwards = 2 * len(TIMESTEPS)
    expect(run.forwards == forwards, f"The report counts {run.forwards} forwards; there were {forwards}.")
    expect_close(ours, dense, "Guidance in two forwards a step at full budget")


@CHECKS.promise()
def guidance_branches_do_not_see_each_other(case: Case) -> None:
    _needs_branches(case)
    model, alone = case.build(0), []
    for branch in (0, 1):
        with hf_accel.apply(model, case.method, **case.settings):
            alone += guided(model, case.family, (branch,))
    with hf_accel.apply(model, case.method, **case.settings):
        expect_equal(guided(model, case.family, (0, 1)), alone, "Two branches of guidance beside each one alone")


@CHECKS.promise(when=("before", "after"))
def lora(case: Case, when: str) -> None:
    from peft import LoraConfig

    model: Any = case.build(0)
    if not hasattr(model, "add_adapter"):
        raise Skipped(f"diffusers' {case.family} model has no add_adapter; the PeftModel around it is checked")
    plain = denoise(model, case.family)

    def add() -> None:
        torch.manual_seed(0)
        targets = list(tiny.TINY[case.family].projections)
        model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "extra")

    if when == "before":
        add()
    before = fingerprint(model)
    applied = hf_accel.apply(model, case.method, **case.full_budget)
    if when == "after":
        add()
    ours = denoise(model, case.family)
    applied.revert()
    expect(not close(ours, plain), f"A LoRA added {when} apply() has no effect on the patched model.")
    expect_close(ours, denoise(model, case.family), f"A LoRA added {when} apply(), beside the unpatched model with it")
    if when == "before":
        expect_same_objects(fingerprint(model), before, "After revert() of a model with a LoRA")
    delete = model.delete_adapter if case.family in tiny.TEXTS else model.delete_adapters
    delete("extra")
    # peft leaves its modules around the weights: other rounding
    expect_close(denoise(model, case.family), plain, "When the LoRA was deleted", 1e-6)


@CHECKS.promise()
def peft_model_is_looked_into(case: Case) -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = case.build(0)
    targets = [tiny.TINY[case.family].projections[0]]
    with warnings.catch_warnings():
        # peft still asks transformers by an old name
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated")
        wrapped: Any = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    dense = denoise(wrapped, case.family)
    with hf_accel.apply(wrapped, case.method, **case.full_budget) as applied:
        expect_close(denoise(wrapped, case.family), dense, "A PeftModel at full budget")
        expect_all_is_the_methods(run_of(applied), case.family, len(TIMESTEPS))
    expect_equal(denoise(wrapped, case.family), dense, "A PeftModel after revert()")


@CHECKS.promise()
def bfloat16(case: Case) -> None:
    if case.family == "hunyuan-video-1.5":
        raise Skipped("diffusers' HunyuanVideo 1.5 token refiner mixes fp32 and bf16 in this configuration, unpatched")
    model = case.build(0).to(torch.bfloat16)

    @torch.no_grad()
    def low() -> torch.Tensor:
        given = {
            k: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() and k not in FP32 else v
            for k, v in tiny.TINY[case.family].inputs(model).items()
        }
        return model(**given, return_dict=False)[0].float()

    dense = low()
    with hf_accel.apply(model, case.method, **case.full_budget):
        ours = low()
    error = float((ours - dense).norm() / dense.norm())
    expect(error <= 2e-2, f"In bf16 at full budget the relative error is {error:.3g}; expected at most 0.02.")


@CHECKS.promise()
def whole_model_compiles_to_one_graph(case: Case) -> None:
    from torch._dynamo.testing import CompileCounter

    from hf_accel.sites.attention import token_order
    from hf_accel.sites.attention.seam import RootHook

    if case.family in ("mochi", "hunyuan-video-1.5", "cosmos"):
        raise Skipped(f"diffusers' own {case.family} forward does not compile in one graph, unpatched")
    if not case.facts.compile:
        raise Skipped(f"{case.method} declares that it does not compile")
    torch._dynamo.reset()
    model, counter = case.build(0), CompileCounter()
    dense = denoise(model, case.family)
    with hf_accel.apply(model, case.method, **case.full_budget) as applied:
        hooks = (*model._forward_pre_hooks.values(), *model._forward_hooks.values())
        movers = sum(isinstance(hook, token_order.EntryHook | token_order.ExitHook) for hook in hooks)
        begins = any(isinstance(hook, RootHook) for hook in hooks)
        compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
        ours = denoise(compiled, case.family)
        run = run_of(applied)
        expect_all_is_the_methods(run, case.family, len(TIMESTEPS))
    torch._dynamo.reset()
    expect_close(ours, dense, "Compiled at full budget")
    # Of a step cache it is the full view; of others the model, the hook in front of it, those that move its tokens. The
    # hooks of a language model stand on the network inside it.
    frames = 1 if isinstance(run, StepCacheStatistics) else 1 + begins + movers
    expect(counter.frame_count == frames, f"{counter.frame_count} graphs were compiled; expected {frames}.")


@CHECKS.promise()
def a_step_cache_compiles_to_two_graphs(case: Case) -> None:
    from torch._dynamo.testing import CompileCounter

    if not case.facts.at("step cache"):
        raise Skipped("attention methods are one graph, whatever they leave out")
    torch._dynamo.reset()
    model, counter = case.build(0), CompileCounter()
    with hf_accel.apply(model, case.method, **case.settings) as applied:
        eager = denoise(model, case.family)
        first: Any = torch.compile(model, backend=counter, fullgraph=True)
        ours = denoise(first, case.family)
        second: Any = torch.compile(model, backend=counter, fullgraph=True)
        ours += denoise(second, case.family, seed=6)
        run = run_of(applied)
        expect_close(ours, eager + denoise(model, case.family, seed=6), "Compiled beside eager")
    torch._dynamo.reset()
    expect(run.partial_steps, "No step was partial.")
    expect(counter.frame_count == 2, f"{counter.frame_count} graphs were compiled; expected one full, one partial.")


@CHECKS.promise()
def deepcopy_has_a_life_of_its_own(case: Case) -> None:
    model = case.build(0)
    before, dense = fingerprint(model), denoise(model, case.family)
    applied = hf_accel.apply(model, case.method, **case.full_budget)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    forwards = run_of(applied).forwards
    expect(not close(denoise(twin, case.family), dense), "A copy with zeroed weights computes with the original's.")
    expect(run_of(applied).forwards == forwards, "Forwards of a copy are counted in the original's report.")
    hf_accel.revert(twin)
    expect("_hf_accel" not in twin.__dict__, "revert() of a copy leaves its note on it.")
    expect_close(denoise(model, case.family), dense, "The original, when its copy was reverted")
    applied.revert()
    expect_same_objects(fingerprint(model), before, "After revert()")


@CHECKS.promise()
def saving_a_patched_model_saves_the_plain_model(case: Case) -> None:
    model: Any = case.build(0)
    dense = denoise(model, case.family)
    with tempfile.TemporaryDirectory() as folder:
        with hf_accel.apply(model, case.method, **case.settings):
            model.save_pretrained(folder)
        again = type(model).from_pretrained(folder).eval()
    names = set(again.state_dict()) ^ set(model.state_dict())
    expect(list(again.state_dict()) == list(model.state_dict()), f"The saved state dict differs: {sorted(names)}.")
    expect_equal(again.state_dict().values(), model.state_dict().values(), "Saved weights")
    # loaded weights lie elsewhere in memory: other rounding
    expect_close(denoise(again, case.family), dense, "The saved model, loaded")


def gradients(model: torch.nn.Module, family: str, own: dict[str, torch.nn.Parameter]) -> list[torch.Tensor]:
    """Of the mean square of one forward's output, by the parameters ``own`` (a method may add others)."""
    model.zero_grad()
    tiny.run(model, family).square().mean().backward()
    return [p.grad.clone() for p in own.values() if p.grad is not None]


@CHECKS.promise()
def gradients_are_right_or_dense_and_counted(case: Case) -> None:
    model = case.build(0)
    own = dict(model.named_parameters())
    dense = gradients(model, case.family, own)
    with hf_accel.apply(model, case.method, **case.full_budget) as applied:
        ours = gradients(model, case.family, own)
        run = run_of(applied)
    expect_close(ours, dense, "Gradients at full budget")
    said = "flow through it" if case.facts.backward else "make it run dense"
    counted = dict(run.dense_calls) or "no dense call"
    expect(case.facts.backward == (not run.dense_calls), f"Facts say that gradients {said}; the report has {counted}.")


@CHECKS.promise()
def gradient_checkpointing(case: Case) -> None:
    model: Any = case.build(0).train()
    if case.family in tiny.TEXTS:
        model.activation_checkpointing_enable()
    else:
        model.enable_gradient_checkpointing()
    own = dict(model.named_parameters())
    dense = gradients(model, case.family, own)
    with hf_accel.apply(model, case.method, **case.full_budget):
        expect_close(gradients(model, case.family, own), dense, "Gradients under checkpointing at full budget")
