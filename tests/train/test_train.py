"""The trainer on tiny random models: what it trains, what it leaves, and that a resumed run is the same run."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F

import hf_accel
from hf_accel.errors import Conflict, InvalidSetting, NotApplicable, PresetError, WeightsMismatch
from hf_accel.sites.adapter.peft import lora as adapters
from hf_accel.testing.models import tiny
from hf_accel.train import FinetuneConfig, Finetuner, History, teacher
from hf_accel.train import saving as trained
from hf_accel.train.finetune.flow_matching import forward_for
from hf_accel.train.finetune.noise import mix, noise_levels
from hf_accel.train.loop.checkpoint import FREE_ON_RESUME
from hf_accel.train.loop.data import Batches
from hf_accel.train.loop.random import generator_for
from hf_accel.train.loop.training_loop import learning_rate_factor

SIZE = (4, 16, 16)  # latents of the tiny Wan: 256 tokens, four blocks of 64
QUICK = {"steps": 4, "lr": 1e-2, "lora_rank": 2, "progress": False, "checkpoint_every": 2, "validate_every": 2}


def batch(number: int, size=SIZE, items: int = 1) -> dict:
    generator = generator_for("data", number)
    return {
        "latents": torch.randn(items, 4, *size, generator=generator),
        "encoder_hidden_states": torch.randn(items, 7, 24, generator=generator),
    }


def sharp() -> torch.nn.Module:
    """A tiny Wan whose attention is peaked and matters, so that three quarters of its blocks are missed."""
    model = tiny.build("wan")
    with torch.no_grad():
        for block in model.blocks:
            for weight, gain in (
                (block.attn1.norm_q.weight, 2.5), (block.attn1.norm_k.weight, 2.5),
                (block.attn1.to_v.weight, 4.0), (block.attn1.to_out[0].weight, 6.0),
            ):  # fmt: skip
                weight.mul_(gain)
    hf_accel.apply(model, "sla", topk=0.25)
    return model


def finetuner(out, model=None, *, resume=None, topk=0.25, **settings) -> Finetuner:
    if model is None:
        model = tiny.build("wan")
        hf_accel.apply(model, "sla", topk=topk)
    return Finetuner(model, FinetuneConfig(**{**QUICK, **settings}), out=out, resume=resume)


def forward(model, number: int = 7) -> torch.Tensor:
    given = batch(number)
    with torch.no_grad():
        return forward_for(model)(
            model, given["latents"], torch.tensor([0.6]), {"encoder_hidden_states": given["encoder_hidden_states"]}
        )


# -- noise ---------------------------------------------------------------------------------------------------------


def test_noise_levels_have_the_distribution_they_say():
    generator = generator_for(0)
    config = FinetuneConfig(sigma_mean=1.5, sigma_std=1.6, sigma_shift=5.0)
    sigma = noise_levels(20000, config, generator)
    logits = torch.logit(sigma.double())
    assert sigma.min() > 0
    assert sigma.max() < 1
    assert logits.mean() == pytest.approx(1.5 + math.log(5), abs=0.05)
    assert logits.std() == pytest.approx(1.6, abs=0.05)
    # The shift as schedulers write it.
    plain = noise_levels(100, config.replace(sigma_shift=1.0), generator_for(1))
    shifted = noise_levels(100, config, generator_for(1))
    assert torch.allclose(shifted, 5 * plain / (1 + 4 * plain), atol=1e-6)


def test_noise_is_a_function_of_its_key():
    draws = [
        torch.randn(4, generator=generator_for(*key)) for key in ((0, "a", 1), (0, "a", 1), (0, "a", 2), (1, "a", 1))
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[3])


def test_mixture_and_target_are_a_straight_line():
    latents, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    at = [mix(latents, torch.full((2,), s), noise) for s in (0.0, 0.25, 0.5, 1.0)]
    assert torch.equal(at[0], latents)
    assert torch.equal(at[3], noise)
    assert torch.allclose((at[2] - at[1]) / 0.25, noise - latents, atol=1e-6)


def test_learning_rate():
    config = FinetuneConfig(steps=12, warmup_steps=2, schedule="cosine")
    factors = [learning_rate_factor(step, config) for step in range(12)]
    assert factors[:3] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]
    assert factors[7] == pytest.approx(0.5)
    assert factors[2:] == sorted(set(factors[2:]), reverse=True)
    constant = config.replace(schedule="constant")
    assert [learning_rate_factor(step, constant) for step in range(2, 12)] == [1.0] * 10


# -- teacher -------------------------------------------------------------------------------------------------------


def test_adapter_and_patch_off_is_the_teacher_bit_for_bit(tmp_path):
    model = tiny.build("wan")
    dense = forward(model)
    applied = hf_accel.apply(model, "sla", topk=0.25)
    finetuner(tmp_path, model).fit(batch)
    student = forward(model)
    counted = applied.report().entries[0].run.forwards
    with teacher(model):
        assert torch.equal(forward(model), dense)
        assert not torch.is_grad_enabled()
    assert applied.report().entries[0].run.forwards == counted
    assert not torch.equal(student, dense)
    assert torch.equal(forward(model), student)
    # What is left after revert is a plain adapter.
    applied.revert()
    model.delete_adapters(trained.ADAPTER)
    assert torch.equal(forward(model), dense)


def test_the_teacher_keeps_other_adapters():
    from peft import LoraConfig

    model = tiny.build("wan")
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "style")
    styled = forward(model)
    hf_accel.apply(model, "sla", topk=0.25)
    adapters.add_lora(model, trained.ADAPTER, rank=2, alpha=2, targets=["to_q", "to_k"])
    for name, parameter in adapters.lora_parameters(model, trained.ADAPTER).items():
        assert parameter.dtype == torch.float32, name
        torch.nn.init.normal_(parameter, std=0.1)
    assert adapters.active(model) == ["style", trained.ADAPTER]
    student = forward(model)
    with teacher(model):
        assert torch.equal(forward(model), styled)
    assert torch.equal(forward(model), student)
    assert not torch.equal(student, styled)


def test_the_teacher_is_left_after_an_exception():
    model = tiny.build("wan")
    hf_accel.apply(model, "sla", topk=0.25)
    student = forward(model)
    with pytest.raises(KeyError), teacher(model):
        raise KeyError
    assert torch.equal(forward(model), student)


def test_lora_start_does_not_move_the_global_generator():
    state = torch.get_rng_state()
    model = tiny.build("wan")
    torch.set_rng_state(state)
    adapters.add_lora(model, "x", rank=2, alpha=2, targets=["to_q"])
    assert torch.equal(torch.get_rng_state(), state)


# -- losses and gradients ------------------------------------------------------------------------------------------


def test_losses_are_their_definitions(tmp_path):
    model = tiny.build("wan")
    clean = copy.deepcopy(model)
    hf_accel.apply(model, "sla", topk=0.25)
    given = batch(3)
    latents = given["latents"]
    generator = generator_for(0, "train", 3)
    config = FinetuneConfig(**QUICK)
    sigma = noise_levels(1, config, generator)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = (1 - sigma) * latents + sigma * noise

    def velocity(of):
        text = given["encoder_hidden_states"]
        return of(hidden_states=noisy, timestep=sigma * 1000, encoder_hidden_states=text, return_dict=False)[0]

    with torch.no_grad():
        expected = {
            "diffusion": F.mse_loss(velocity(model), noise - latents),
            "distill": F.mse_loss(velocity(model), velocity(clean)),
        }
    for loss, value in expected.items():
        twin = copy.deepcopy(model)
        ours = finetuner(tmp_path, twin, loss=loss).loss(given, ("train", 3))
        assert float(ours.detach()) == pytest.approx(float(value), rel=1e-5)


def test_only_adapter_and_projection_get_gradients(tmp_path):
    tuner = finetuner(tmp_path)
    with tuner.training():
        tuner.loss(batch(0), ("train", 0)).backward()
        with_gradient = {n for n, p in tuner.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient
    assert with_gradient <= set(tuner.parameters)
    for layer in range(2):
        assert f"blocks.{layer}.attn1.proj_l.weight" in with_gradient
        assert f"blocks.{layer}.attn1.to_q.lora_B.{trained.ADAPTER}.weight" in with_gradient
    assert all("lora_" in name or "proj_l" in name for name in tuner.parameters)


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path):
    gradients = []
    for checkpointing in (False, True):
        tuner = finetuner(tmp_path, gradient_checkpointing=checkpointing)
        with torch.no_grad():
            for parameter in tuner.parameters.values():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator_for("p", parameter.numel())))
        with tuner.training():
            assert tuner.model.is_gradient_checkpointing == checkpointing
            tuner.loss(batch(0), ("train", 0)).backward()
            gradients.append([p.grad.clone() for p in tuner.parameters.values() if p.grad is not None])
        assert not tuner.model.is_gradient_checkpointing
    assert len(gradients[0]) == len(tuner.parameters)
    for plain, repeated in zip(*gradients, strict=True):
        assert torch.allclose(plain, repeated, atol=1e-6)


def test_accumulated_batches_are_one_large_batch(tmp_path):
    given = [batch(i) for i in range(2)]
    tuners = [finetuner(tmp_path, accumulate=2, steps=1), finetuner(tmp_path, steps=1)]
    with tuners[0].training():
        for number in range(2):
            (tuners[0].loss(given[number], ("train", number)) / 2).backward()
        expected = {n: p.grad.clone() for n, p in tuners[0].parameters.items() if p.grad is not None}
        tuners[0].optimizer.zero_grad()
        kept = []
        tuners[0].optimizer.register_step_pre_hook(
            lambda *_: kept.append({n: p.grad.clone() for n, p in tuners[0].parameters.items() if p.grad is not None})
        )
        tuners[0].train_step(tuners[0].model, Batches(given, 1, 0))
    assert kept[0].keys() == expected.keys()
    assert all(torch.allclose(kept[0][n], expected[n], atol=1e-7) for n in expected)


# -- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["distill", "diffusion"])
def test_training_lowers_the_loss_on_held_out_batches(tmp_path, loss):
    history = finetuner(tmp_path, sharp(), loss=loss, steps=10, validate_every=5, checkpoint_every=10).fit(
        batch, [batch(100), batch(101)]
    )
    losses = [entry["loss"] for entry in history.validation]
    assert [entry["step"] for entry in history.validation] == [0, 5, 10]
    assert losses[2] < 0.95 * losses[0]
    assert len(history.train) == 10
    told = json.loads((tmp_path / "loss.json").read_text())
    assert told["validation"] == history.validation
    assert told["about"]["method"]["settings"]["topk"] == 0.25
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_all_weights_follow_a_frozen_copy(tmp_path):
    model = sharp()
    with teacher(model):
        dense = forward(model)
    tuner = finetuner(tmp_path, model, lora_rank=None, steps=8, lr=3e-4, method_lr=1e-2, validate_every=8)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    history = tuner.fit(batch, [batch(100)])
    assert torch.equal(forward(tuner._teacher), dense)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {"patch_embedding.weight", "proj_out.weight", "blocks.0.attn1.proj_l.weight"} <= moved
    assert history.validation[-1]["loss"] < 0.95 * history.validation[0]["loss"]


def test_the_model_is_otherwise_as_before(tmp_path):
    model = tiny.build("wan")
    hf_accel.apply(model, "sla", topk=0.25)
    model.blocks[0].requires_grad_(False)
    tuner = finetuner(tmp_path, model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    base = {n: p.detach().clone() for n, p in model.named_parameters() if n not in tuner.parameters}
    state = torch.get_rng_state()
    tuner.fit(batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert all(torch.equal(dict(model.named_parameters())[n], value) for n, value in base.items())


@pytest.mark.parametrize("settings", [{}, {"ema_decay": 0.9, "accumulate": 2, "schedule": "cosine", "warmup_steps": 1}])
def test_a_resumed_run_has_the_curve_of_an_uninterrupted_one(tmp_path, settings):
    held_out = [batch(100)]
    whole = finetuner(tmp_path / "whole", steps=6, **settings)
    whole_history = whole.fit(batch, held_out)

    first = finetuner(tmp_path / "cut", steps=6, **settings)
    seen = iter(range(10**6))

    def interrupted(number):
        if next(seen) == 4 * first.config.accumulate + 1:
            raise KeyboardInterrupt
        return batch(number)

    with pytest.raises(KeyboardInterrupt):
        first.fit(interrupted, held_out)
    second = finetuner(tmp_path / "cut", steps=6, resume="latest", **settings)
    assert second.step == 4
    history = second.fit(batch, held_out)
    assert history.train == whole_history.train
    assert history.validation == whole_history.validation
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, second.parameters[name]), name


def test_resume_refuses_another_run(tmp_path):
    with pytest.raises(PresetError, match="nothing to resume"):
        finetuner(tmp_path, resume="latest")
    finetuner(tmp_path).fit(batch)
    with pytest.raises(WeightsMismatch, match=r"lr=0.01; this run has 0.02 \(training\)"):
        finetuner(tmp_path, resume="latest", lr=2e-2)
    with pytest.raises(WeightsMismatch, match=r"topk=0.25; this run has 0.5 \(method\)"):
        finetuner(tmp_path, resume="latest", topk=0.5)
    with pytest.raises(PresetError, match="is no checkpoint"):
        finetuner(tmp_path, resume=tmp_path)
    longer = finetuner(tmp_path, resume="latest", steps=6)
    assert [entry["step"] for entry in longer.fit(batch).train] == [1, 2, 3, 4, 5, 6]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000004", "step-000006"]


def test_what_is_free_on_resume_exists():
    assert set(FREE_ON_RESUME) <= set(FinetuneConfig().to_dict()["settings"])


def test_a_time_budget_stops_and_can_be_resumed(tmp_path):
    history = finetuner(tmp_path).fit(batch, seconds=0.0)
    assert [entry["step"] for entry in history.train] == [1]
    assert finetuner(tmp_path, resume="latest").step == 1


def test_averages_are_what_is_left_on_the_model(tmp_path):
    plain, averaged = finetuner(tmp_path / "a"), finetuner(tmp_path / "b", ema_decay=0.5)
    start = {n: p.detach().clone() for n, p in plain.parameters.items()}
    plain.fit(batch)
    averaged.fit(batch)
    for name, value in start.items():
        # Between the start and the last weights, which the averages hold now.
        assert torch.equal(averaged.averages[name], plain.parameters[name])
        assert not torch.equal(averaged.parameters[name], plain.parameters[name]) or torch.equal(
            value, plain.parameters[name]
        )


def test_bf16_autocast_trains(tmp_path):
    tuner = finetuner(tmp_path, sharp(), precision="bf16", steps=8, validate_every=8)
    history = tuner.fit(batch, [batch(100)])
    assert history.validation[-1]["loss"] < 0.95 * history.validation[0]["loss"]
    assert all(p.dtype == torch.float32 for p in tuner.parameters.values())


def test_another_family_trains(tmp_path):
    model = tiny.build("flux")
    hf_accel.apply(model, "sla", topk=0.25)
    inputs = tiny.TINY["flux"].inputs(model, size=(1, 16, 16))
    given = {"latents": inputs.pop("hidden_states"), **{k: v for k, v in inputs.items() if k != "timestep"}}
    tuner = finetuner(tmp_path, model, steps=2)
    first = tuner.fit(lambda number: given).train
    assert all(math.isfinite(entry["loss"]) for entry in first)
    assert first[0]["loss"] > 0
    assert model.transformer_blocks[0].attn.proj_l.weight.any()


# -- saving --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, None])
def test_everything_trained_is_saved_and_loaded(tmp_path, rank):
    tuner = finetuner(tmp_path / "run", lora_rank=rank)
    tuner.fit(batch)
    student = forward(tuner.model)
    folder = hf_accel.save_trained(tuner.model, tmp_path / "saved", base_weights=rank is None)
    if rank is not None:  # the file is one that diffusers reads by itself
        with pytest.raises(Conflict, match="Leave base_weights out"):
            hf_accel.save_trained(tuner.model, tmp_path / "both", base_weights=True)
        plain = tiny.build("wan")
        plain.load_lora_adapter(str(folder), weight_name=adapters.FILE, prefix=None, adapter_name="x")
        ours = adapters.lora_parameters(tuner.model, trained.ADAPTER)
        theirs = adapters.lora_parameters(plain, "x")
        assert len(ours) == len(theirs) > 0
        assert all(torch.equal(ours[n.replace(".x.", f".{trained.ADAPTER}.")], p) for n, p in theirs.items())
    model = tiny.build("wan")
    applied = hf_accel.load_trained(model, folder)
    beside = adapters.FILE if rank is not None else trained.BASE_FILE
    assert f"trained together with {beside}" in str(applied.report())
    assert torch.equal(forward(model), student)
    applied.revert()
    with teacher(model):
        left = forward(model)
    assert torch.equal(left, forward(tiny.build("wan"))) == (rank is not None)


# -- data ----------------------------------------------------------------------------------------------------------


class Examples(torch.utils.data.Dataset):
    def __len__(self):
        return 7

    def __getitem__(self, index):
        return {"latents": torch.tensor([float(index)])}


def test_a_dataset_is_shuffled_by_epoch_and_numbered():
    batches = Batches(Examples(), 2, seed=0)
    epochs = [[batches[e * 3 + i]["latents"].flatten().tolist() for i in range(3)] for e in range(2)]
    for epoch in epochs:
        assert len({index for pair in epoch for index in pair}) == 6
    assert epochs[0] != epochs[1]
    assert Batches(Examples(), 2, seed=0)[4]["latents"].flatten().tolist() == epochs[1][1]
    with pytest.raises(InvalidSetting, match="at most the 7 examples"):
        Batches(Examples(), 8, seed=0)


def test_an_iterable_begins_again_and_is_walked_to_a_number():
    batches = Batches([{"n": 0}, {"n": 1}, {"n": 2}], 1, seed=0)
    assert [batches[i]["n"] for i in range(5)] == [0, 1, 2, 0, 1]
    assert Batches([{"n": 0}, {"n": 1}, {"n": 2}], 1, seed=0)[4]["n"] == 1
    once = Batches(iter([{"n": 0}]), 1, seed=0)
    assert once[0]["n"] == 0
    with pytest.raises(InvalidSetting, match="runs out after one epoch"):
        once[1]


# -- refusals ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_trained_is_refused(tmp_path):
    model = tiny.build("wan")
    with pytest.raises(NotApplicable, match="found none"):
        finetuner(tmp_path, model)
    hf_accel.apply(model, "dense")
    with pytest.raises(NotApplicable, match="found none"):
        finetuner(tmp_path, model)
    hf_accel.apply(model := tiny.build("wan"), "sla", on_slow="dense")
    with pytest.raises(InvalidSetting, match="'keep' while it is trained"):
        finetuner(tmp_path, model)
    hf_accel.apply(model := tiny.build("cogvideox"), "sla")
    with pytest.raises(NotApplicable, match="Pass forward="):
        finetuner(tmp_path, model)
    hf_accel.apply(model := tiny.build("wan"), "sla")
    with pytest.raises(NotApplicable, match="LoRA on nowhere"):
        finetuner(tmp_path, model, lora_targets="nowhere")
    with pytest.raises(InvalidSetting, match="without proj_l"):
        finetuner(tmp_path, model, lora_targets="to_q, proj_l")
    with pytest.raises(InvalidSetting, match="latents"):
        finetuner(tmp_path).fit([{"hidden_states": torch.zeros(1)}])


def test_history_round_trip(tmp_path):
    history = History({"a": 1}, [{"step": 1, "loss": 0.5, "lr": 0.1}], [{"step": 0, "loss": 1.0}], 2.0)
    history.write(tmp_path)
    assert History.read(tmp_path / "loss.json") == history
