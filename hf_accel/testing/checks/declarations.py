"""Promises that a method keeps by itself: what it declares, and which models it refuses."""

from __future__ import annotations

import json

import torch

import hf_accel
from hf_accel.errors import NotApplicable
from hf_accel.hosts.target import Model
from hf_accel.testing.case import Case, Checks
from hf_accel.testing.outcome import Skipped, expect, expect_refusal

CHECKS = Checks()


@CHECKS.promise()
def settings_round_trip_and_declarations(case: Case) -> None:
    cls = case.cls
    config = cls.Config()
    told = f"The settings class is of {cls.Config.METHOD!r}, the class is named {cls.name!r}"
    expect(cls.Config.METHOD == cls.name == case.method, f"{told}, the registry has it as {case.method!r}.")
    again = cls.Config.from_dict(json.loads(json.dumps(config.to_dict())))
    expect(again == config, f"Settings come back from JSON as {again}; they were {config}.")
    # An adapter is no approximation of the model that it stands on; a recipe stands on a training.
    exact = case.facts.exact or case.facts.at("adapter") or case.facts.kind == "recipe"
    expect(exact or case.facts.full_budget, "An approximate method names the settings at which it is dense.")
    cls.Config.build(case.facts.full_budget)


@CHECKS.promise()
def wrong_models_are_refused_in_words(case: Case) -> None:
    from diffusers import AutoencoderKL
    from transformers import UMT5Config, UMT5EncoderModel

    if case.facts.kind == "recipe":
        raise Skipped("a recipe stands on a training, not on a model")
    encoder = UMT5EncoderModel(UMT5Config(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, vocab_size=16))
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2)
    wrong = [(encoder, "text encoder"), (vae, "autoencoder"), (torch.nn.Linear(2, 2), "module")]
    if case.facts.at("linear") and case.cls.why_not(Model("model", encoder)) is None:
        del wrong[0]  # a text encoder has linears like any other
    for model, word in wrong:
        with expect_refusal(NotApplicable, word):
            hf_accel.apply(model, case.method)
    for thing in (None, "a path", {"transformer": 1}):
        with expect_refusal(NotApplicable, "Load the model first"):
            hf_accel.apply(thing, case.method)
