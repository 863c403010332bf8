"""Promises of methods on models that write by denoising, in whole generations."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import torch

import hf_accel
from hf_accel.testing.case import Case, Checks, fails_at_the_end
from hf_accel.testing.checks.forwards import run_of
from hf_accel.testing.checks.turns import in_threads
from hf_accel.testing.compare import difference, expect_equal, expect_same_objects, fingerprint, keys_aside
from hf_accel.testing.models.block_diffusion import BOTH, FAMILIES, ONE, OTHER, generate
from hf_accel.testing.outcome import BrokenPromise, expect

CHECKS = Checks()
Logits = list[torch.Tensor]


def close(ours: Logits, theirs: Logits, limit: float = 1e-5) -> bool:
    """Equal up to ``limit`` of the largest logit; a cache may hand on the rows that are read only."""
    return len(ours) == len(theirs) and all(
        bool((a - b).abs().max() <= limit * b.abs().max().clamp(min=1)) for a, b in zip(ours, theirs, strict=True)
    )


def expect_close(ours: Logits, theirs: Logits, what: str, limit: float = 1e-5) -> None:
    if close(ours, theirs, limit):
        return
    if len(ours) != len(theirs):
        raise BrokenPromise(f"{what}: {len(ours)} steps; expected {len(theirs)}.")
    largest = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    raise BrokenPromise(f"{what}: expected equal up to {limit:g} of the largest logit; they differ by {largest:.3g}.")


def expect_same(case: Case, ours: Logits, theirs: Logits, what: str) -> None:
    """To the bit; methods that are exact may take another way the second time (a cache that was verified)."""
    if case.facts.exact:
        expect_close(ours, theirs, what, 2e-5)
    else:
        expect_equal(ours, theirs, what)


def expect_finite(logits: Logits, what: str) -> None:
    expect(all(bool(torch.isfinite(x).all()) for x in logits), f"{what}: some logits are not finite.")


@CHECKS.promise()
def full_budget_is_dense(case: Case) -> None:
    model = case.build(0)
    dense = generate(model, case.family)
    with hf_accel.apply(model, case.method, **case.full_budget) as applied:
        expect_close(generate(model, case.family), dense, "Full budget beside the unpatched model")
        told = run_of(applied).to_dict()
    expect(json.loads(json.dumps(told)) == told, "The report's run does not survive JSON.")
    reasons = {why for why in told.get("dense_calls", {}) if "first block" not in why}
    expect(not reasons, f"At full budget calls ran dense: {sorted(reasons)}.")


@CHECKS.promise()
def requests_in_threads_do_not_meet(case: Case) -> None:
    """Two texts written at once, forward by forward in turns: each as if it were alone."""
    model = case.build(0)

    def run(rows: slice) -> Logits:
        return generate(model, case.family, rows)

    with hf_accel.apply(model, case.method, **case.settings):
        run(ONE)  # what is found out once about the model is known to both
        alone = [run(ONE), run(OTHER)]
        together = in_threads(model, [functools.partial(run, ONE), functools.partial(run, OTHER)])
        for ours, theirs in zip(together, alone, strict=True):
            expect_same(case, ours, theirs, "Two texts at once beside one after the other")


@CHECKS.promise()
def tiny_settings_run_and_tell(case: Case) -> None:
    model = case.build(0)
    with hf_accel.apply(model, case.method, **case.settings) as applied:
        expect_finite(generate(model, case.family), "With the settings for tiny models")
        text = str(applied.report())
    expect("  ran " in text or "  patched " in text, f"The report says neither what ran nor what was patched: {text}")
    if not case.facts.exact and case.facts.site == "attention":
        density = run_of(applied).mean("density")
        expect(density < 1, f"The mean density is {density}: the settings for tiny models leave nothing out.")


@CHECKS.promise()
def the_defaults_run(case: Case) -> None:
    model = case.build(0)
    with hf_accel.apply(model, case.method):
        expect_finite(generate(model, case.family), "With the defaults")


@CHECKS.promise()
def revert_restores_identity_and_bits(case: Case) -> None:
    model = case.build(0)
    before, dense = fingerprint(model), generate(model, case.family)
    applied = hf_accel.apply(model, case.method, **case.settings)
    expect(fingerprint(model) != before, "apply() changed nothing on the model.")
    expect(list(model.state_dict()) == before["keys"], "apply() changed the keys of the state dict.")
    generate(model, case.family)
    applied.revert()
    applied.revert()  # a second call does nothing
    expect_same_objects(fingerprint(model), before, "After revert()")
    expect_equal(generate(model, case.family), dense, "After revert()")


@CHECKS.promise()
def applying_twice_replaces(case: Case) -> None:
    model = case.build(0)
    before = fingerprint(model)
    with hf_accel.apply(model, case.method, **case.settings):
        once = generate(model, case.family)
    first = hf_accel.apply(model, case.method, **case.settings)
    second = hf_accel.apply(model, case.method, **case.settings)
    expect(not first.active, "What was replaced still calls itself active.")
    expect_same(case, generate(model, case.family), once, "Applied twice beside once")
    second.revert()
    expect_same_objects(fingerprint(model), before, "After revert()")


@CHECKS.promise()
def a_failing_replacement_leaves_what_stood(case: Case) -> None:
    model = case.build(0)
    before = fingerprint(model)
    applied = hf_accel.apply(model, case.method, **case.settings)
    standing, ours = keys_aside(fingerprint(model)), generate(model, case.family)
    with fails_at_the_end(case.method):
        hf_accel.apply(model, case.method, **case.settings)
    expect(applied.active, "What stood is no longer active after a replacement that failed.")
    expect_same_objects(keys_aside(fingerprint(model)), standing, "After a replacement that failed")
    expect_same(case, generate(model, case.family), ours, "After a replacement that failed")
    applied.revert()
    expect_same_objects(fingerprint(model), before, "After revert()")


@CHECKS.promise()
def the_next_request_equals_a_fresh_run(case: Case) -> None:
    model, alone = case.build(0), []
    for seed in (5, 6):
        with hf_accel.apply(model, case.method, **case.settings):
            alone.append(generate(model, case.family, seed=seed))
    with hf_accel.apply(model, case.method, **case.settings):
        for seed, wanted in zip((5, 6), alone, strict=True):
            expect_same(case, generate(model, case.family, seed=seed), wanted, f"Request {seed} beside it alone")


class Breakdown(Exception):
    """What a forward raises that is broken off."""


class BreakingDown:
    """Raises in the n-th forward of a module."""

    def __init__(self, module: torch.nn.Module, n: int):
        self.left = n
        self.handle = module.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if not self.left:
            raise Breakdown


@CHECKS.promise(forward=(2, 4))
def an_exception_leaves_nothing_behind(case: Case, forward: int) -> None:
    model = case.build(0)
    with hf_accel.apply(model, case.method, **case.settings):
        alone = generate(model, case.family, seed=6)
    with hf_accel.apply(model, case.method, **case.settings):
        last = [m for m in model.modules() if "norm" in type(m).__name__.lower()][-1]
        breaking = BreakingDown(last, forward)
        try:
            generate(model, case.family, seed=5)
        except Breakdown:
            breaking.handle.remove()
        else:
            raise BrokenPromise(f"The generation did not break off in forward {forward}.")
        ours = generate(model, case.family, seed=6)
        expect_same(case, ours, alone, f"A request after one that broke off in forward {forward}, beside it alone")


@CHECKS.promise()
def deepcopy_has_a_life_of_its_own(case: Case) -> None:
    model = case.build(0)
    before, dense = fingerprint(model), generate(model, case.family)
    applied = hf_accel.apply(model, case.method, **case.full_budget)
    generate(model, case.family, seed=7)
    twin = copy.deepcopy(model)
    told = run_of(applied).to_dict()
    expect_close(generate(twin, case.family), dense, "A copy at full budget")
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    expect(not close(generate(twin, case.family), dense), "A copy with zeroed weights computes with the original's.")
    expect(run_of(applied).to_dict() == told, "What a copy does is counted in the original's report.")
    hf_accel.revert(twin)
    expect("_hf_accel" not in twin.__dict__, "revert() of a copy leaves its note on it.")
    expect_close(generate(model, case.family), dense, "The original, when its copy was reverted")
    applied.revert()
    expect_same_objects(fingerprint(model), before, "After revert()")


@CHECKS.promise()
def a_batch_equals_its_rows_at_full_budget(case: Case) -> None:
    model = case.build(0)
    dense = generate(model, case.family, rows=BOTH)
    with hf_accel.apply(model, case.method, **case.full_budget):
        both = generate(model, case.family, rows=BOTH)
        alone = [generate(model, case.family, rows=row) for row in (ONE, OTHER)]
    expect_close(both, dense, "Two rows at full budget")
    if case.family == "llada2":
        return  # the pipeline goes on until all rows of a block are done
    for row, logits in enumerate(alone):
        expect_close([x[row : row + 1] for x in both], logits, f"Row {row} of a batch beside it alone", 1e-4)


@CHECKS.promise()
def two_models_do_not_see_each_other(case: Case) -> None:
    model, other = case.build(0), case.build(1)
    before, dense = fingerprint(other), generate(other, case.family)
    with hf_accel.apply(model, case.method, **case.settings):
        generate(model, case.family)
        expect_same_objects(fingerprint(other), before, "A second model, while the first is patched")
        expect_equal(generate(other, case.family), dense, "A second model, while the first is patched")


@CHECKS.promise()
def gradients_are_right(case: Case) -> None:
    model = case.build(0)
    own = dict(model.named_parameters())  # a method may add parameters

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        FAMILIES[case.family].step(model).float().square().mean().backward()
        return {name: p.grad.clone() for name, p in own.items() if p.grad is not None}

    dense = gradients()
    with hf_accel.apply(model, case.method, **case.full_budget) as applied:
        ours = gradients()
        told = run_of(applied).to_dict()
    expect(ours.keys() == dense.keys(), f"Other parameters get a gradient: {sorted(ours.keys() ^ dense.keys())}.")
    largest = max(float(x.abs().max()) for x in dense.values())
    wrong = [name for name in dense if float((ours[name] - dense[name]).abs().max()) > 1e-5 * largest]
    apart = difference([ours[name] for name in wrong], [dense[name] for name in wrong])
    expect(not wrong, f"Gradients of {wrong} differ{apart}, where the largest of all is {largest:.3g}.")
    if case.facts.site == "attention":
        counted = told["dense_calls"]
        expect(case.facts.backward == (not counted), f"Facts: backward={case.facts.backward}; dense calls: {counted}.")
