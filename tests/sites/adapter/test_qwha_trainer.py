"""Training with transformers' Trainer: checkpoints, resume, what is kept in a checkpoint."""

from __future__ import annotations

import copy
import shutil

import adapted
import pytest
import torch
from adapted import run
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from training import Sequences, trainer
from transformers import Trainer, TrainingArguments

from hf_accel.patches.qwha import initialize_qwha
from hf_accel.peft import QWHAConfig, QWHALinear

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


def values_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "qwha_values" in name}


@pytest.fixture(scope="module")
def started():
    """A 2-bit Llama with an initialised adapter."""
    full, packed = adapted.packed_llama()
    model = get_peft_model(packed, QWHAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = torch.stack([Sequences()[i]["input_ids"] for i in range(16)])
    initialize_qwha(model, rows, full, progress=False)
    return model


def test_train_save_resume(started, tmp_path):
    model = copy.deepcopy(started)
    whole = trainer(model, tmp_path / "whole")
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(v, values_of(started)[name]) for name, v in values_of(model).items())

    checkpoint = tmp_path / "whole" / "checkpoint-3"
    stored = load_file(checkpoint / "adapter_model.safetensors")
    assert not [key for key in stored if "base_layer" in key]
    assert "import hf_accel.peft" in (checkpoint / "README.md").read_text()

    again = copy.deepcopy(started)
    with torch.no_grad():
        for module in again.modules():
            if isinstance(module, QWHALinear):
                module.qwha_values["default"].zero_()
    folder = tmp_path / "again"
    shutil.copytree(checkpoint, folder / "checkpoint-3")
    resumed = trainer(again, folder)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert resumed.state.global_step == 6
    for name, value in values_of(model).items():
        assert torch.equal(values_of(again)[name], value), name

    resumed.save_model(str(tmp_path / "final"))
    _, packed = adapted.packed_llama()
    loaded = PeftModel.from_pretrained(packed, tmp_path / "final")
    assert torch.equal(run(loaded.eval(), "llama"), run(model.eval(), "llama"))


def test_checkpointing_and_accumulation_train_the_same(started, tmp_path):
    plain, saving = copy.deepcopy(started), copy.deepcopy(started)
    trainer(plain, tmp_path / "a", max_steps=2).train()
    trainer(
        saving, tmp_path / "b", max_steps=2, gradient_checkpointing=True, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, gradient_checkpointing_kwargs={"use_reentrant": False},
    ).train()  # fmt: skip
    for name, value in values_of(plain).items():
        assert torch.allclose(values_of(saving)[name], value, atol=2e-4), name


def test_best_model_is_loaded_at_the_end(started, tmp_path):
    model = copy.deepcopy(started)
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 4, "learning_rate": 5e-2}
    run_ = Trainer(
        model,
        TrainingArguments(
            str(tmp_path), **settings, load_best_model_at_end=True, report_to=[], use_cpu=True, disable_tqdm=True,
            save_strategy="steps", per_device_train_batch_size=4,
        ),
        train_dataset=Sequences(), eval_dataset=Sequences(),
    )  # fmt: skip
    run_.train()
    best = run_.state.best_model_checkpoint
    _, packed = adapted.packed_llama()
    loaded = PeftModel.from_pretrained(packed, best)
    assert torch.equal(run(model.eval(), "llama"), run(loaded.eval(), "llama"))
