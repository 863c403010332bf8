"""The same recipes on hf_accel's own loops."""

from __future__ import annotations

import pytest
import torch
from toys import TOYS

import hf_accel
from hf_accel import errors
from hf_accel.testing.models import tiny
from hf_accel.train import FinetuneConfig, Finetuner
from hf_accel.train.loop.random import generator_for

QUICK = {
    "steps": 4, "lr": 1e-2, "lora_rank": 2, "progress": False, "checkpoint_every": 2, "validate_every": 2,
    "batch_size": 2, "loss": "diffusion",
}  # fmt: skip


class Examples(torch.utils.data.Dataset):
    """Sixteen examples, which remember in what order they were asked for."""

    def __init__(self):
        self.asked: list[int] = []

    def __len__(self):
        return 16

    def __getitem__(self, item):
        self.asked.append(int(item))
        generator = generator_for("data", int(item))
        return {
            "latents": torch.randn(4, 2, 8, 8, generator=generator),
            "encoder_hidden_states": torch.randn(7, 24, generator=generator),
        }


def finetuner(out, **settings) -> Finetuner:
    model = tiny.build("wan")
    hf_accel.apply(model, "sla", topk=0.25)
    return Finetuner(model, FinetuneConfig(**{**QUICK, **settings}), out=out)


def trained(tuner) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in tuner.parameters.items()}


@pytest.mark.parametrize("cls", [cls for cls in TOYS if cls.name not in ("toy-hook", "toy-batches")])
def test_recipes_change_the_loop_and_leave_no_trace(tmp_path, cls):
    tuner, plain, data = finetuner(tmp_path / "a"), finetuner(tmp_path / "b"), Examples()
    before = vars(tuner).copy()
    applied = hf_accel.apply(tuner, cls.name)
    assert ("trainer", cls.name) in hf_accel.api.applied_methods(tuner)
    tuner.fit(data)
    plain.fit(Examples())
    stats = applied.stats()["trainer"][cls.name]
    assert stats["steps"] == (3 if cls.name == "toy-callback" else 4)
    after = trained(tuner)
    assert any(not torch.equal(value, trained(plain)[name]) for name, value in after.items())
    applied.revert()
    assert all(torch.equal(value, after[name]) for name, value in trained(tuner).items())
    assert vars(tuner).keys() == before.keys()
    assert tuner.recipes == []
    assert not tuner.optimizer._optimizer_step_post_hooks
    assert all(torch.is_tensor(v) for state in tuner.optimizer.state.values() for v in state.values())
    assert hf_accel.api.applied_methods(tuner) == [("model", "sla")]


def test_schedule_order_and_loss(tmp_path):
    tuner, data = finetuner(tmp_path), Examples()
    hf_accel.apply(tuner, ["toy-schedule", "toy-order"])
    history = tuner.fit(data)
    assert [entry["lr"] for entry in history.train] == pytest.approx([1e-2 * (1 - 0.75 * s / 3) for s in range(4)])
    assert data.asked == [15, 14, 13, 12, 11, 10, 9, 8]
    growing = Examples()
    tuner = finetuner(tmp_path / "growing", steps=3)
    hf_accel.apply(tuner, "toy-batches")
    tuner.fit(growing)
    assert growing.asked == list(range(16))


def test_an_order_needs_numbered_examples(tmp_path):
    tuner = finetuner(tmp_path)
    hf_accel.apply(tuner, "toy-order")
    with pytest.raises(errors.InvalidSetting, match="Dataset of single examples"):
        tuner.fit(lambda number: {})


def test_resumed_with_recipes_it_is_the_same_run(tmp_path):
    names = ["toy-schedule", "toy-order"]
    whole = finetuner(tmp_path / "whole")
    hf_accel.apply(whole, names)
    whole.fit(Examples())
    half = finetuner(tmp_path / "half")
    hf_accel.apply(half, names)
    half.fit(Examples(), callback=lambda tuner: tuner.step == 2)
    hf_accel.revert(half)
    assert hf_accel.api.applied_methods(half) == []
    tuner = finetuner(tmp_path / "half")
    tuner.resume("latest")
    hf_accel.apply(tuner, names)
    tuner.fit(Examples())
    assert all(torch.equal(value, trained(whole)[name]) for name, value in trained(tuner).items())


def test_undo_in_the_middle_is_refused_until_it_ends(tmp_path):
    tuner = finetuner(tmp_path)
    applied = hf_accel.apply(tuner, "toy-schedule")
    caught = []

    def undo(tuner):
        with pytest.raises(errors.RevertRefused, match="A training of this Finetuner is under way"):
            applied.revert()
        with pytest.raises(errors.Conflict, match="cannot join it"):
            hf_accel.apply(tuner, "toy-callback")
        caught.append(tuner.step)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tuner.fit(Examples(), callback=undo)
    assert caught == [1]
    applied.revert()
    assert tuner.recipes == []
