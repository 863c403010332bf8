"""Everything of peft that goes on packed linears, put on a model with an effect."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from hf_accel.quant.packed_linear import PackedLinear

TARGETS = ["q_proj", "v_proj", "down_proj"]


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings})


KINDS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lora,
    "rslora": lambda: lora(use_rslora=True, init_lora_weights="gaussian"),
    "lora with a bias": lambda: lora(lora_bias=True, init_lora_weights=False),
    "orthogonal": lambda: lora(init_lora_weights="orthogonal"),
    "dora": lambda: lora(use_dora=True),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=["q_proj", "v_proj"]),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=16, target_modules=TARGETS),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS),
    "miss": lambda: peft.MissConfig(r=4, target_modules=TARGETS),
    "shira": lambda: peft.ShiraConfig(r=2, random_seed=3, target_modules=TARGETS),
}


def dequantised(model: torch.nn.Module) -> torch.nn.Module:
    """The same with dense linears of equal weights, under whatever adapters there are."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PackedLinear):
                dense = torch.nn.Linear(child.in_features, child.out_features, child.bias is not None)
                dense.weight = torch.nn.Parameter(child.dequantize_weight(), requires_grad=False)
                if child.bias is not None:
                    dense.bias = torch.nn.Parameter(child.bias, requires_grad=False)
                setattr(parent, name, dense)
    return model


def adapt(model: torch.nn.Module, config: peft.PeftConfig, name: str = "default") -> Any:
    """With an adapter that has an effect: what it trains is moved a little away from its start."""
    torch.manual_seed(11)
    model = get_peft_model(model, config, name)
    return stir(model)


@torch.no_grad()
def stir(model: Any, seed: int = 3) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def tuners_of(model: torch.nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
