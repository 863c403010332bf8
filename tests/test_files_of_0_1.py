"""What version 0.1 wrote still loads, and gives what it gave; see ``fixtures/write_v0_1.py``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hf_accel
import hf_accel.train

HERE = Path(__file__).parent / "fixtures"
FILES = HERE / "v0_1"
sys.path.insert(0, str(HERE))
import write_v0_1 as writer  # noqa: E402 (it stands beside what it wrote)


@pytest.fixture(scope="module")
def outputs() -> dict[str, torch.Tensor]:
    return load_file(FILES / "outputs.safetensors")


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal but for the order of additions on another processor."""
    return torch.allclose(ours, theirs, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def wan_output(model) -> torch.Tensor:
    return model(**writer.latents(7), return_dict=False)[0]


@torch.no_grad()
def test_a_quantised_language_model(outputs):
    model = hf_accel.load_quantized(FILES / "gptq-llama")
    assert close(model(writer.ids(seed=7)).logits, outputs["gptq-llama"])


@torch.no_grad()
def test_a_quantised_denoiser(outputs):
    model = hf_accel.load_quantized(FILES / "gptq-wan")
    assert close(wan_output(model), outputs["gptq-wan"])


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft asks transformers
def test_an_adapter_on_a_quantised_model(outputs):
    from peft import PeftModel

    import hf_accel.peft

    model = hf_accel.load_quantized(FILES / "qwha-base")
    base = model(writer.ids(seed=7)).logits
    adapted = PeftModel.from_pretrained(model, FILES / "qwha-adapter").eval()
    assert isinstance(adapted.peft_config["default"], hf_accel.peft.QWHAConfig)
    logits = adapted(writer.ids(seed=7)).logits
    assert close(logits, outputs["qwha-llama"])
    assert not close(logits, base)


def base_wan():
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel.from_pretrained(FILES / "wan").eval()


def test_a_folder_of_save_trained(outputs):
    model = base_wan()
    hf_accel.load_trained(model, FILES / "sla-trained")
    assert close(wan_output(model), outputs["sla-wan"])


def test_a_run_is_resumed(outputs, tmp_path):
    run = shutil.copytree(FILES / "sla-run", tmp_path / "run")
    model = base_wan()
    hf_accel.apply(model, "sla", topk=0.25)
    config = hf_accel.train.FinetuneConfig(steps=2, lr=1e-2, lora_rank=2, progress=False, checkpoint_every=1)
    hf_accel.Finetuner(model, config, out=run, resume="latest")
    assert close(wan_output(model), outputs["sla-wan"])


@pytest.mark.parametrize("file", sorted(p.name for p in (FILES / "presets").glob("*.yaml")))
def test_presets(file, tmp_path):
    from hf_accel.presets.files import dump
    from hf_accel.presets.loading import load

    preset = load(str(FILES / "presets" / file))
    names = [wanted.method for wanted in preset.wanted]
    assert names == (["deepcache", "sparge"] if file == "two-methods.yaml" else [file.removesuffix(".yaml")])
    again = load(str(dump(preset, tmp_path / file)))
    assert [wanted.config for wanted in again.wanted] == [wanted.config for wanted in preset.wanted]


def test_public_names():
    """What users of 0.1 import, by every way that its documentation shows."""
    from hf_accel.config import Config, setting  # noqa: F401
    from hf_accel.peft import PackedLoraLinear, QWHAConfig, QWHALinear, QWHAModel, merge_into_dense  # noqa: F401
    from hf_accel.sites.step_cache.base import StepCacheMethod  # noqa: F401
    from hf_accel.train import teacher  # noqa: F401
    from hf_accel.train.rcd import RCDTrainer, RCDTrainingConfig  # noqa: F401

    for name in (
        "Applied", "Finetuner", "QWHAConfig", "__version__", "apply", "calibrate", "compare", "explain",
        "generate_blocks", "initialize_qwha", "load_quantized", "load_trained", "methods", "register",
        "register_quantizers", "revert", "save_trained", "unregister_quantizers",
    ):  # fmt: skip
        assert getattr(hf_accel, name) is not None
        assert name in hf_accel.__all__
