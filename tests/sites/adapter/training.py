"""A data set and a Trainer of transformers that take seconds."""

from __future__ import annotations

import torch
from transformers import Trainer, TrainingArguments


class Sequences(torch.utils.data.Dataset):
    """Counting up, from token ids that differ."""

    def __len__(self):
        return 16

    def __getitem__(self, item):
        ids = (torch.arange(12) + 5 * item) % 101
        return {"input_ids": ids, "labels": ids}


def trainer(model, folder, **settings) -> Trainer:
    arguments = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "learning_rate": 2e-3, "max_steps": 6,
        "save_steps": 3, "logging_steps": 1, "report_to": [], "use_cpu": True, "seed": 0, "disable_tqdm": True,
        "save_strategy": "steps",
    }  # fmt: skip
    return Trainer(model, TrainingArguments(**{**arguments, **settings}), train_dataset=Sequences())
