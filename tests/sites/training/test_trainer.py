"""Recipes on transformers' Trainer: what they change, that undo is exact, and what is refused."""

from __future__ import annotations

import pytest
import torch
from toys import Sequences, Toy, facts, llama, same, trainer, weights
from transformers import Trainer, TrainerCallback

import hf_accel
from hf_accel import errors, registry
from hf_accel.facts import Facts

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
NAMES = ["toy-schedule", "toy-order", "toy-batches", "toy-loss", "toy-moments", "toy-callback"]
WATCHED = ("callback_handler", "lr_scheduler", "optimizer", "compute_loss_func", "train_dataset", "data_collator")


def fingerprint(t: Trainer) -> dict[str, object]:
    """The objects of a Trainer that a recipe could have changed, and the keys of its instance."""
    return {
        "keys": sorted(vars(t)),
        "callbacks": [*t.callback_handler.callbacks],
        "list": id(t.callback_handler.callbacks),
        "handler": {k: v for k, v in vars(t.callback_handler).items() if k != "callbacks"},
        **{name: getattr(t, name) for name in WATCHED},
    }


def trained(folder, *names, **settings) -> tuple[Trainer, dict[str, torch.Tensor]]:
    t = trainer(folder, **settings)
    if names:
        hf_accel.apply(t, list(names))
    t.train()
    return t, weights(t.model)


@pytest.mark.parametrize("name", NAMES)
def test_undone_before_a_training_it_leaves_no_trace(tmp_path, name):
    t = trainer(tmp_path)
    before = fingerprint(t)
    applied = hf_accel.apply(t, name)
    assert hf_accel.api.applied_methods(t) == [("trainer", name)]
    assert applied.report().entries[0].patched
    hf_accel.revert(t)
    after = fingerprint(t)
    assert before == after
    assert all(after[key] is before[key] for key in WATCHED)
    assert not applied.active
    t.train()
    assert same(weights(t.model), trained(tmp_path)[1])


@pytest.mark.parametrize("name", NAMES)
def test_undone_after_a_training_the_weights_stay_and_the_next_one_is_plain(tmp_path, name):
    t = trainer(tmp_path)
    scheduler, callbacks = t.lr_scheduler, [*t.callback_handler.callbacks]
    with hf_accel.apply(t, name) as applied:
        t.train()
        stood = weights(t.model)
        assert applied.stats()["trainer"][name]["trainings"] == 1
    assert same(weights(t.model), stood)
    assert t.lr_scheduler is scheduler or name != "toy-schedule"
    assert t.callback_handler.callbacks == callbacks
    assert not {"create_scheduler", "compute_loss", "_get_train_sampler", "get_train_dataloader"} & vars(t).keys()
    optimizer = t.optimizer.optimizer
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_state_dict_post_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks
    assert all(isinstance(v, torch.Tensor) for state in optimizer.state.values() for v in state.values())
    t.optimizer = None
    t.model.load_state_dict(llama().state_dict())
    t.train()
    assert same(weights(t.model), trained(tmp_path)[1])


def test_schedule(tmp_path):
    t, _ = trained(tmp_path, "toy-schedule")
    rates = [entry["learning_rate"] for entry in t.state.log_history if "loss" in entry]
    assert rates == pytest.approx([1e-2 * (1 - 0.75 * step / 5) for step in range(6)])
    run = registry_stats(t)
    assert run["steps"] == 6
    assert run["learning_rate_factors"][1] == 1


def registry_stats(t):
    return t.__dict__["_hf_accel"][0].report.run.to_dict()


class Sees(Trainer):
    """Remembers which examples each training step saw."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("seen", []).append([int(row[0]) for row in inputs["input_ids"]])
        return super().training_step(model, inputs, *args, **kwargs)


def first_tokens(*items):
    return [3 * item % 31 for item in items]


def test_order_of_examples_by_epoch(tmp_path):
    t = trainer(tmp_path, cls=Sees)
    hf_accel.apply(t, "toy-order")
    t.train()
    assert t.seen[0] == first_tokens(15, 14, 13, 12)
    assert t.seen[3] == first_tokens(3, 2, 1, 0)
    assert t.seen[4] == first_tokens(0, 1, 2, 3)  # the second epoch
    assert registry_stats(t)["orders"] == 2


def test_batches_that_grow(tmp_path):
    t = trainer(tmp_path, cls=Sees)
    hf_accel.apply(t, "toy-batches")
    t.train()
    assert [len(batch) for batch in t.seen] == [2, 4, 10, 2, 4, 10]
    assert t.seen[1] == first_tokens(2, 3, 4, 5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_loss_is_scaled_as_the_trainer_scales_and_evaluation_keeps_its_own(tmp_path, accumulation):
    t = trainer(tmp_path, gradient_accumulation_steps=accumulation, max_steps=1, max_grad_norm=0, optim="sgd")
    plain = trainer(tmp_path, gradient_accumulation_steps=accumulation, max_steps=1, max_grad_norm=0, optim="sgd")
    start = weights(t.model)
    hf_accel.apply(t, "toy-loss")
    assert t.evaluate(Sequences())["eval_loss"] == plain.evaluate(Sequences())["eval_loss"]
    t.train()
    plain.train()
    for name, value in weights(t.model).items():
        # One step of SGD: the penalty's gradient is 0.2 w, whatever the number of batches in the step.
        assert torch.allclose(value, weights(plain.model)[name] - 1e-2 * 0.2 * start[name], atol=1e-6)
    assert registry_stats(t)["losses"] == accumulation


def test_moments_are_codes_between_steps_and_plain_in_checkpoints(tmp_path):
    t = trainer(tmp_path, save_strategy="steps", save_steps=3)
    hf_accel.apply(t, "toy-moments")
    t.train()
    inner = t.optimizer.optimizer
    moments = [state["exp_avg"] for state in inner.state.values()]
    assert not any(isinstance(moment, torch.Tensor) for moment in moments)
    stats = registry_stats(t)
    assert stats["encoded_states"] == 2 * len(moments)
    assert stats["state_bytes"]["codes"] * 2 == stats["state_bytes"]["dense"]
    saved = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert all(torch.is_tensor(value) for state in saved["state"].values() for value in state.values())
    assert not torch.is_tensor(next(iter(inner.state.values()))["exp_avg"])  # saving left the codes
    resumed = trainer(tmp_path)
    hf_accel.apply(resumed, "toy-moments")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(weights(resumed.model), weights(t.model))


def test_save_and_resume_with_a_schedule_and_an_order(tmp_path):
    names = ["toy-schedule", "toy-order"]
    _, whole = trained(tmp_path, *names, save_strategy="steps", save_steps=3)
    resumed = trainer(tmp_path)
    hf_accel.apply(resumed, names)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(weights(resumed.model), whole)


def test_callback_steers_the_training(tmp_path):
    t = trainer(tmp_path)
    hf_accel.apply(t, "toy-callback")
    t.train()
    notes = t.callback_handler.callbacks[-1]
    assert notes.events == ["begin", "step 1", "step 2", "step 3", "end"]
    t.add_callback(TrainerCallback())  # somebody else's, later: it stays
    hf_accel.revert(t)
    assert notes not in t.callback_handler.callbacks
    assert type(t.callback_handler.callbacks[-1]) is TrainerCallback


class Reverts(TrainerCallback):
    def __init__(self, event, act):
        self.event, self.act = event, act

    def on_step_end(self, args, state, control, **kwargs):
        if self.event == "step":
            self.act()

    def on_train_begin(self, args, state, control, **kwargs):
        if self.event == "begin":
            self.act()

    def on_train_end(self, args, state, control, **kwargs):
        if self.event == "end":
            self.act()


@pytest.mark.parametrize("event", ["begin", "step", "end"])
def test_undo_in_the_middle_is_refused_and_nothing_is_undone(tmp_path, event):
    t = trainer(tmp_path, max_steps=2)
    applied = hf_accel.apply(t, ["toy-schedule", "toy-callback"])
    refusals = []

    def act():
        before = fingerprint(t)
        ways = (
            applied.revert,
            lambda: applied.revert(force=True),
            lambda: hf_accel.revert(t, force=True),
            lambda: hf_accel.apply(t, "toy-schedule", low=0.5),
        )
        for undo in ways:
            with pytest.raises(errors.RevertRefused, match=r"under way.*Nothing was changed") as refused:
                undo()
            refusals.append(str(refused.value))
        assert fingerprint(t) == before

    t.add_callback(Reverts(event, act))
    t.train()
    assert len(refusals) >= 3
    applied.revert()
    assert "create_scheduler" not in vars(t)


def test_a_recipe_joins_no_training_in_its_middle(tmp_path):
    t = trainer(tmp_path, max_steps=1)
    caught = []

    def act():
        with pytest.raises(errors.Conflict, match="cannot join it in the middle"):
            hf_accel.apply(t, "toy-schedule")
        caught.append(True)

    t.add_callback(Reverts("step", act))
    t.train()
    assert caught
    assert "_hf_accel" not in vars(t)


def test_a_training_that_an_exception_ended_is_over(tmp_path):
    class Stop(RuntimeError):
        pass

    def stop():
        raise Stop

    t = trainer(tmp_path)
    breaks = Reverts("step", stop)
    t.add_callback(breaks)
    before = [*t.callback_handler.callbacks]
    with pytest.raises(Stop):
        t.train()
    assert t.is_in_train  # transformers leaves its flag
    applied = hf_accel.apply(t, NAMES[:2] + NAMES[3:])
    with pytest.raises(Stop):
        t.train()
    applied.revert()
    assert t.callback_handler.callbacks == before
    assert "create_scheduler" not in vars(t)
    with pytest.raises(Stop), hf_accel.apply(t, "toy-schedule"):
        t.train()
    assert "create_scheduler" not in vars(t)


def test_recipes_side_by_side_come_off_in_any_order(tmp_path):
    t = trainer(tmp_path)
    before = fingerprint(t)
    first, second = hf_accel.apply(t, ["toy-schedule", "toy-callback"]), hf_accel.apply(t, "toy-loss")
    first.revert()
    assert second.active
    assert hf_accel.api.applied_methods(t) == [("trainer", "toy-loss")]
    second.revert()
    assert fingerprint(t) == before


def test_one_slot_has_one_owner(tmp_path):
    t = trainer(tmp_path)
    with pytest.raises(errors.Conflict, match="toy-batches and toy-order both own the data of the training site"):
        hf_accel.apply(t, ["toy-order", "toy-batches"])
    hf_accel.apply(t, "toy-order")
    with pytest.raises(errors.Conflict, match=r"toy-order is on trainer already.*hf_accel\.revert"):
        hf_accel.apply(t, "toy-batches")
    with pytest.raises(errors.Conflict, match="toy-all and toy-order both own the training site"):
        hf_accel.apply(t, "toy-all")
    assert hf_accel.api.applied_methods(t) == [("trainer", "toy-order")]


def test_applying_again_replaces(tmp_path):
    t = trainer(tmp_path)
    before = fingerprint(t)
    hf_accel.apply(t, "toy-schedule")
    hf_accel.apply(t, "toy-schedule", low=1.0)
    t.train()
    assert {e["learning_rate"] for e in t.state.log_history if "loss" in e} == {1e-2}
    hf_accel.revert(t)
    assert fingerprint(t)["callbacks"] == before["callbacks"]


def test_what_fits_where_is_said_in_words(tmp_path):
    model = llama()
    with pytest.raises(errors.NotApplicable, match=r"recipe of a training.*Trainer.*hf_accel\.apply\(trainer"):
        hf_accel.apply(model, "toy-schedule")
    given = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduled = trainer(tmp_path)
    scheduled.optimizer, scheduled.lr_scheduler = given, torch.optim.lr_scheduler.ConstantLR(given)
    with pytest.raises(errors.NotApplicable, match=r"given a ConstantLR.*optimizers=\(optimizer, None\)"):
        hf_accel.apply(scheduled, "toy-schedule")
    with pytest.raises(errors.NotApplicable, match="one process, without DDP"):
        hf_accel.apply(trainer(tmp_path), "toy-hook")
    endless = trainer(tmp_path)
    endless.train_dataset = iter(())
    with pytest.raises(errors.NotApplicable, match="without a length"):
        hf_accel.apply(endless, "toy-order")


def test_a_part_with_nothing_to_do_is_in_the_report(tmp_path):
    t = trainer(tmp_path, max_steps=1)
    applied = hf_accel.apply(t, "toy-all")
    assert "one process, without DDP" in str(applied.report())
    t.train()
    assert list(applied.stats()["trainer"]["toy-all"]["idle"].values()) == [1]


def test_patches_of_a_training_stand_on_its_network(tmp_path):
    t = trainer(tmp_path, max_steps=1)
    applied = hf_accel.apply(t, ["sparge", "toy-schedule"])
    assert hf_accel.api.applied_methods(t) == [("model", "sparge"), ("trainer", "toy-schedule")]
    assert hf_accel.api.applied_methods(t.model) == [("model", "sparge")]
    assert "_hf_accel" in vars(t.model)
    verdicts = {v.method: v for v in hf_accel.explain(t)}
    assert verdicts["toy-schedule"].applies
    assert verdicts["sparge"].applies
    assert not {v.method: v for v in hf_accel.explain(t.model)}["toy-schedule"].applies
    assert "toy-schedule (trainer)" in str(hf_accel.explain(t))
    applied.revert()
    assert "_hf_accel" not in vars(t.model)
    assert hf_accel.methods()["toy-schedule"]["kind"] == "recipe"


def test_facts_that_do_not_say_what_a_recipe_overrides(tmp_path):
    class Wrong(Toy):
        name, facts, Config = "toy-wrong", facts("loss"), registry.get("toy-loss").Config

        def schedule(self, step, total):
            return 1.0

    class Nothing(Toy):
        name, facts, Config = "toy-nothing", facts("loss"), registry.get("toy-loss").Config

    class Half(Toy):
        name, facts, Config = "toy-half", facts("optimizer"), registry.get("toy-loss").Config

        def encode_state(self, key, value):
            return value

    class Patch(Toy):
        name, facts, Config = "toy-patch", Facts(sites="training: schedule"), registry.get("toy-loss").Config

        def schedule(self, step, total):
            return 1.0

    for cls, words in ((Wrong, "sites="), (Nothing, "overrides none"), (Half, "go together"), (Patch, "kind=")):
        with pytest.raises(errors.HFAccelError, match=words):
            cls(cls.Config())._check_facts()


def test_a_factor_that_is_none_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(registry.get("toy-schedule"), "schedule", lambda self, step, total: float("nan"))
    t = trainer(tmp_path)
    hf_accel.apply(t, "toy-schedule")
    with pytest.raises(errors.HFAccelError, match="expected a finite factor"):
        t.train()
