"""Settings of language models: what is shipped, and what apply and explain make of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, MistralForCausalLM

import hf_accel
from hf_accel import zoo
from hf_accel.errors import InvalidSetting, NotApplicable
from hf_accel.hosts.target import resolve
from hf_accel.patches.gptq import GPTQConfig
from hf_accel.presets import families
from hf_accel.quant.packed_linear import PackedLinear

VARIANTS = {variant.name: variant for variant in families.variants()}


# -- what is shipped -----------------------------------------------------------------------------------------------


def test_the_adapters_of_the_paper_have_its_budget() -> None:
    rows = {n: s.wanted.config for n, v in VARIANTS.items() for s in v.methods if s.wanted.method == "qwha"}
    published = {n for n in rows if {s.wanted.method: s.status for s in VARIANTS[n].methods}["qwha"] == "published"}
    assert published == {"llama-3.1-8b", "llama-3.2-3b", "mistral-7b-v0.3"}
    for name in published:
        config: Any = rows[name]
        assert (config.r, config.sequence_length, config.alpha) == (64, 4096, 1.0)
        assert (config.allocation, config.selection, config.refine) == ("paper", "paper", True)


@pytest.mark.parametrize("name", ["mini-llama", "mini-llama-2bit"])
def test_measured_bits_are_those_of_the_figures(name: str) -> None:
    """Chosen among all settings that were measured at these bits; what the reason quotes is what the file holds."""
    row = VARIANTS[name].methods[0]
    config: Any = row.wanted.config
    file = Path(__file__).parents[2] / "benchmarks" / "results" / "gptq_quality.json"
    records = [r for r in json.loads(file.read_text())["records"] if r["bits"] == config.bits]
    bare = GPTQConfig().to_dict()["settings"] | {"bits": None}
    changed = {key: value for key, value in config.to_dict()["settings"].items() if value != bare[key]}
    (mine,) = [r for r in records if {"bits": r["bits"], "group_size": r["group_size"], **r["settings"]} == changed]
    assert row.status == "measured"
    assert mine["perplexity"] <= 1.001 * min(r["perplexity"] for r in records)
    quoted = [float(number) for number in re.findall(r"\d+\.\d+", row.reason)]
    assert quoted[0] == round(mine["perplexity"], 2)
    assert set(quoted) <= {round(r["perplexity"], 2) for r in records}


# -- what is made of it --------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> Any:
    """mini-llama's configuration and random weights; both it and its file with one layer, for the sake of time."""
    file = families.folder() / "mini-llama.yaml"
    found = tuple(families.parse(file.read_text().replace("num_hidden_layers: 6", "num_hidden_layers: 1"), file.name))
    monkeypatch.setattr(families, "variants", lambda classes=None: found)
    families.shipped_presets.cache_clear()
    yield lambda cls=LlamaForCausalLM: mini(cls, num_hidden_layers=1)
    families.shipped_presets.cache_clear()


def mini(cls: Any = LlamaForCausalLM, **changes: int) -> Any:
    torch.manual_seed(0)
    return cls(LlamaConfig.from_pretrained(zoo.path("mini-llama"), **changes)).eval()


def ids(rows: int = 2, length: int = 48) -> torch.Tensor:
    return torch.randint(0, 60, (rows, length), generator=torch.Generator().manual_seed(0))


def recognised(model: Any) -> str | None:
    (found,) = resolve(model).models
    variant = families.recommend(found)
    return variant.name if variant is not None else None


def said(model: Any) -> dict[str, hf_accel.api.Verdict]:
    return {verdict.method: verdict for verdict in hf_accel.explain(model)}


@pytest.mark.parametrize(
    ("cls", "other"),
    [
        (LlamaForCausalLM, "num_hidden_layers is 2, not 32"),
        (MistralForCausalLM, "class is MistralForCausalLM, not Llama"),
    ],
)
def test_a_model_of_other_sizes_is_told_so_and_gets_defaults(cls: Any, other: str) -> None:
    torch.manual_seed(0)
    model = cls(cls.config_class(**SMALL)).eval()
    assert recognised(model) is None
    with pytest.raises(NotApplicable, match=r"No shipped config recommends a method.*Name a method yourself"):
        hf_accel.apply(model, calibration=ids())
    with pytest.raises(NotApplicable, match=other):
        hf_accel.apply(model, "llama-3.1-8b-2bit", calibration=ids())
    assert "the method's defaults; no tuned settings" in said(model)["gptq"].reason
    with hf_accel.apply(model, "gptq", group_size=32, rounding="nearest") as applied:
        assert applied.report().entries[0].origin == "settings given by the caller"


def test_a_known_model_takes_its_first_method_and_asks_for_what_that_needs(shallow: Any) -> None:
    model = shallow()
    with pytest.raises(InvalidSetting, match="'calibration' must be texts"):
        hf_accel.apply(model)
    before = dict(model.named_parameters())
    with hf_accel.apply(model, calibration=ids()) as applied:
        entry = applied.report().entries[0]
        assert (entry.method, entry.settings["bits"], entry.settings["group_size"]) == ("gptq", 4, 64)
        assert entry.origin == "configs/mini-llama.yaml: mini-llama (measured)"
        assert recognised(model) == "mini-llama"
    assert all(before[name] is parameter for name, parameter in model.named_parameters())


def test_fewer_bits_are_reached_by_name_and_adapters_come_with_them(shallow: Any) -> None:
    model = shallow()
    with pytest.raises(InvalidSetting, match="brings its own settings"):
        hf_accel.apply(model, "mini-llama-2bit", bits=3, calibration=ids())
    applied = hf_accel.apply(model, ["mini-llama-2bit", "qwha"], calibration=ids())
    bits, adapter = applied.report().entries
    assert (bits.settings["bits"], bits.settings["search"], bits.settings["coordinate_descent"]) == (2, True, 30)
    assert bits.origin == "configs/mini-llama.yaml: mini-llama-2bit (measured)"
    assert (adapter.settings["r"], adapter.origin) == (4, "configs/mini-llama.yaml: mini-llama (untuned)")
    applied.revert()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks by the old name
def test_any_head_and_adapters_leave_it_the_same_model(shallow: Any) -> None:
    assert recognised(shallow(LlamaModel)) == "mini-llama"
    wrapped = get_peft_model(shallow(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert recognised(wrapped) == "mini-llama"
    with hf_accel.apply(wrapped, "gptq", rounding="nearest") as applied:
        entry = applied.report().entries[0]
        assert entry.origin == "configs/mini-llama.yaml: mini-llama (measured), changed by the caller: rounding"
        assert entry.settings["group_size"] == 64


def test_what_is_quantised_already_keeps_its_family(shallow: Any, tmp_path: Path) -> None:
    model = shallow()
    hf_accel.apply(model, "gptq", rounding="nearest", progress=False)
    model.save_pretrained(tmp_path)
    again = hf_accel.load_quantized(tmp_path)
    assert sum(isinstance(module, PackedLinear) for module in again.modules()) == 7
    assert recognised(again) == "mini-llama"
    with pytest.raises(NotApplicable, match="packed already"):
        hf_accel.apply(again, calibration=ids())
    verdicts = said(again)
    assert not verdicts["gptq"].applies
    assert verdicts["qwha"].applies
    assert "configs/mini-llama.yaml: mini-llama (untuned)" in verdicts["qwha"].reason
