"""A learning-rate recipe: its curve, and that a Trainer follows it and is itself again after."""

import pytest
import torch
from own_method.wsd import WarmupStableDecay, WSDConfig
from transformers import Trainer, TrainingArguments

import hf_accel
from hf_accel.testing.models import tiny


def test_the_curve():
    recipe = WarmupStableDecay(WSDConfig(warmup=0.2, decay=0.4, floor=0.1))
    factors = [recipe.schedule(step, 10) for step in range(10)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 0.775, 0.55, 0.325, 0.1])
    assert recipe.schedule(0, 1) == pytest.approx(1.0)


class Counting(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, item):
        ids = (torch.arange(8) + item) % 50
        return {"input_ids": ids, "labels": ids}


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_a_trainer_follows_it_and_is_itself_again(tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, learning_rate=1e-2, max_steps=5, logging_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(tiny.build("llama"), arguments, train_dataset=Counting())
    assert trainer.lr_scheduler is None
    applied = hf_accel.apply(trainer, "wsd", warmup=0.2, decay=0.4, floor=0.0)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.005, 0.0])
    applied.revert()
    assert trainer.lr_scheduler is None
    assert "create_scheduler" not in vars(trainer)
