"""Toy recipes, one for each thing that a recipe can change, and a tiny training to put them on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_accel.config import Config, setting
from hf_accel.facts import Facts
from hf_accel.sites.training.base import LossCall, Recipe


class Sequences(torch.utils.data.Dataset):
    """Counting up, from token ids that differ."""

    def __len__(self):
        return 16

    def __getitem__(self, item):
        ids = (torch.arange(8) + 3 * item) % 31
        return {"input_ids": ids, "labels": ids}


def llama(seed: int = 0) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(vocab_size=31, max_position_embeddings=32, **sizes))


def trainer(folder, model=None, cls=Trainer, **settings: Any) -> Trainer:
    arguments = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 6,
        "logging_steps": 1, "report_to": [], "use_cpu": True, "seed": 0, "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    arguments = TrainingArguments(**{**arguments, **settings})
    return cls(model if model is not None else llama(), arguments, train_dataset=Sequences())


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Toy(Recipe):
    paper, summary = "none", "a toy"


def facts(*slots: str) -> Facts:
    return Facts(sites=frozenset(f"training: {slot}" for slot in slots), kind="recipe")


@dataclass(frozen=True)
class ScheduleConfig(Config):
    METHOD = "toy-schedule"
    low: float = setting(0.25, "last factor", ge=0)


class Schedule(Toy):
    name, facts, Config = "toy-schedule", facts("schedule"), ScheduleConfig

    def schedule(self, step, total):
        return 1 - (1 - self.config.low) * step / max(total - 1, 1)


@dataclass(frozen=True)
class PlainConfig(Config):
    METHOD = "toy"


class Backwards(Toy):
    """Examples from the last to the first; in odd epochs from the first to the last."""

    name, facts, Config = "toy-order", facts("data"), PlainConfig

    def sampler(self, dataset, batch_size, epoch, seed):
        order = range(len(dataset))
        return order if epoch % 2 else order[::-1]


class Growing(Toy):
    """Batches that grow: multigrid in small."""

    name, facts, Config = "toy-batches", facts("data"), PlainConfig

    def batch_sampler(self, dataset, batch_size, epoch, seed):
        return [range(0, 2), range(2, 6), range(6, 16)]


class Penalty(Toy):
    """The training's loss and a pull of all weights to zero."""

    name, facts, Config = "toy-loss", facts("loss"), PlainConfig

    def loss(self, call: LossCall):
        squares = sum(p.square().sum() for p in call.network.parameters())
        return call.plain(call.inputs).loss + call.scale * 0.1 * squares


class HalfMoments(Toy):
    """Moments in bfloat16."""

    name, facts, Config = "toy-moments", facts("optimizer"), PlainConfig

    def encode_state(self, key, value):
        return {"half": value.bfloat16()}

    def decode_state(self, key, code):
        return code["half"].float()


class Notes(TrainerCallback):
    def __init__(self):
        self.events: list[str] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append("begin")

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(f"step {state.global_step}")
        if state.global_step == 3:
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append("end")


class StopsAtThree(Toy):
    name, facts, Config = "toy-callback", facts("callback"), PlainConfig

    def callback(self):
        self.notes = Notes()
        return self.notes


class Doubling(Toy):
    """All-reduce, and twice the mean, so that it shows."""

    name, facts, Config = "toy-hook", facts("communication"), PlainConfig

    def comm_hook(self, group, bucket):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        return allreduce_hook(group, bucket).then(lambda future: 2 * future.value())


class Everything(Toy):
    """Takes the whole site, and changes schedule and communication."""

    name, facts, Config = "toy-all", Facts(sites=frozenset({"training"}), kind="recipe"), PlainConfig

    def schedule(self, step, total):
        return 0.5

    def comm_hook(self, group, bucket):
        return Doubling.comm_hook(self, group, bucket)


TOYS = (Schedule, Backwards, Growing, Penalty, HalfMoments, StopsAtThree, Doubling, Everything)
for _cls in TOYS:
    if _cls.Config is PlainConfig:
        _cls.Config = dataclass(frozen=True)(type(f"{_cls.__name__}Config", (Config,), {"METHOD": _cls.name}))
