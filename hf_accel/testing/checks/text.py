"""Promises of methods on the K/V cache and on decoding, in whole calls of ``generate``."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch

import hf_accel
from hf_accel.testing.case import Case, Checks, fails_at_the_end
from hf_accel.testing.checks.turns import in_threads
from hf_accel.testing.compare import expect_equal, expect_same_objects, fingerprint, keys_aside
from hf_accel.testing.outcome import Skipped, expect

CHECKS = Checks()
NEW = 24  # tokens written
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "assisted": {"prompt_lookup_num_tokens": 3},
}


def prompt(model: Any, rows: int = 1, length: int = 33, seed: int = 0) -> torch.Tensor:
    """Token ids, int64 ``[rows, length]``; the same few come again and again, so that there is something to guess."""
    ids = torch.randint(3, model.config.vocab_size, (rows, 8), generator=torch.Generator().manual_seed(seed))
    return ids.repeat(1, length // 8 + 1)[:, :length]


@torch.no_grad()
def write(model: Any, rows: int = 1, seed: int = 0, **more: Any) -> torch.Tensor:
    """The text that ``generate`` writes, int64 ``[rows, 33 + NEW]``."""
    ids = prompt(model, rows, seed=seed)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}
    torch.manual_seed(0)
    return model.generate(ids, **given | {"do_sample": False} | more)


def budget(case: Case) -> dict[str, Any]:
    """Settings at which the text is the model's own: any, of an exact method."""
    return case.full_budget


@CHECKS.promise(mode=tuple(MODES))
def full_budget_writes_the_same_text(case: Case, mode: str) -> None:
    model = case.build(0)
    plain = write(model, **MODES[mode])
    with hf_accel.apply(model, case.method, **budget(case)) as applied:
        ours = write(model, **MODES[mode])
        run = applied.report().entries[0].run
    sampled_otherwise = mode == "sampled" and case.facts.at("decoding")  # of the same distribution, by other draws
    if not sampled_otherwise:
        expect_equal([ours], [plain], f"Text at full budget, {mode}")
    expect(run is not None, "The report tells nothing of what the method did.")


@CHECKS.promise()
def requests_in_threads_do_not_meet(case: Case) -> None:
    """Two texts written at once, forward by forward in turns: each as if it were alone."""
    model = case.build(0)
    runs = [functools.partial(write, model, seed=seed) for seed in (0, 1)]
    with hf_accel.apply(model, case.method, **case.settings) as applied:
        alone = [run() for run in runs]
        before = applied.report().entries[0].run.to_dict()
        expect_equal(in_threads(model, runs), alone, "Two texts at once beside one after the other")
        after = applied.report().entries[0].run.to_dict()
    counted = [name for name in ("forwards", "rounds", "generations") if name in before]
    for name in counted:
        expect(after[name] == 2 * before[name], f"Twice the work is {after[name]} {name}, after {before[name]}.")


@CHECKS.promise()
def batches_are_written_as_by_the_model(case: Case) -> None:
    model = case.build(0)
    plain = write(model, rows=3)
    with hf_accel.apply(model, case.method, **budget(case)):
        expect_equal([write(model, rows=3)], [plain], "Three rows at full budget")


@CHECKS.promise()
def revert_restores_identity_and_text(case: Case) -> None:
    model = case.build(0)
    before, plain = fingerprint(model), write(model)
    applied = hf_accel.apply(model, case.method, **case.settings)
    expect(fingerprint(model) != before or "generate" in model.__dict__, "apply() changed nothing on the model.")
    write(model)
    applied.revert()
    applied.revert()  # a second call does nothing
    expect_same_objects(fingerprint(model), before, "After revert()")
    expect("generate" not in model.__dict__, "After revert() the model still has a generate() of its own.")
    expect_equal([write(model)], [plain], "After revert()")


@CHECKS.promise()
def a_failing_replacement_leaves_what_stood(case: Case) -> None:
    model = case.build(0)
    before = fingerprint(model)
    applied = hf_accel.apply(model, case.method, **case.settings)
    standing, ours = keys_aside(fingerprint(model)), write(model)
    with fails_at_the_end(case.method):
        hf_accel.apply(model, case.method, **case.settings)
    expect(applied.active, "What stood is no longer active after a replacement that failed.")
    expect_same_objects(keys_aside(fingerprint(model)), standing, "After a replacement that failed")
    expect_equal([write(model)], [ours], "After a replacement that failed")
    applied.revert()
    expect_same_objects(fingerprint(model), before, "After revert()")


@CHECKS.promise()
def two_models_of_one_class_do_not_see_each_other(case: Case) -> None:
    model, other = case.build(0), case.build(1)
    before, plain = fingerprint(other), write(other)
    first = hf_accel.apply(model, case.method, **case.settings)
    expect_same_objects(fingerprint(other), before, "A second model, while the first is patched")
    expect_equal([write(other)], [plain], "A second model, while the first is patched")
    with hf_accel.apply(other, case.method, **budget(case)):
        first.revert()
        expect_equal([write(other)], [plain], "A second model at full budget, when the first was reverted")


@CHECKS.promise()
def a_second_text_equals_the_first_and_another_is_not_disturbed(case: Case) -> None:
    model = case.build(0)
    other = write(model, seed=1)
    with hf_accel.apply(model, case.method, **budget(case)):
        first = write(model)
        expect_equal([write(model, seed=1)], [other], "Another prompt, after a first one")
        expect_equal([write(model)], [first], "The first prompt again")


@CHECKS.promise()
@torch.no_grad()
def a_cache_goes_from_turn_to_turn(case: Case) -> None:
    model = case.build(0)

    def turns() -> list[torch.Tensor]:
        cache = model(prompt(model, length=20), use_cache=True).past_key_values
        return [model(prompt(model, length=n, seed=n), past_key_values=cache).logits for n in (1, 5, 1)]

    plain = turns()
    with hf_accel.apply(model, case.method, **budget(case)):
        ours = turns()
    far = max(float((a - b).abs().max()) for a, b in zip(ours, plain, strict=True))
    expect(far <= 1e-5, f"Logits of later turns at full budget are {far:.2g} from the unpatched model's.")


@CHECKS.promise()
def deepcopy_has_a_life_of_its_own(case: Case) -> None:
    model = case.build(0)
    plain = write(model)
    applied = hf_accel.apply(model, case.method, **budget(case))
    twin = copy.deepcopy(model)
    counted = applied.report().entries[0].run.to_dict()  # type: ignore[union-attr]
    expect_equal([write(twin)], [plain], "A copy at full budget")
    expect(applied.report().entries[0].run.to_dict() == counted, "What a copy did is counted by the original.")  # type: ignore[union-attr]
    hf_accel.revert(twin)
    expect("generate" not in twin.__dict__, "A copy that was reverted still has a generate() of its own.")
    expect_equal([write(twin)], [plain], "A copy after its revert()")
    expect(applied.active, "Reverting a copy took the method off the original.")
    expect_equal([write(model)], [plain], "The original, when its copy was reverted")


@CHECKS.promise(dtype=(torch.bfloat16, torch.float16))
def half_precision(case: Case, dtype: torch.dtype) -> None:
    model = case.build(0).to(dtype)
    with hf_accel.apply(model, case.method, **case.settings):
        text = write(model)
    expect(text.shape[1] == 33 + NEW, f"Wrote {text.shape[1] - 33} tokens in {dtype}; expected {NEW}.")


@CHECKS.promise()
def an_adapter_of_peft_stays_at_work(case: Case) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(case.build(0), lora).eval()
    plain = write(model)
    if torch.equal(plain, write(case.build(0))):
        raise Skipped("random adapters leave this tiny model's text as it is")
    with hf_accel.apply(model, case.method, **budget(case)):
        expect_equal([write(model)], [plain], "A model with an adapter, at full budget")
