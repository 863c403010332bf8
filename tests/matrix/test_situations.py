"""Situations from other people's code: every attention method at full budget is exact, or runs dense and is counted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, PAGIdentitySelfAttnProcessor2_0
from torch.overrides import TorchFunctionMode

import hf_accel
from hf_accel import registry
from hf_accel.hosts.target import Model
from hf_accel.testing.kit import TINY_SETTINGS as QUICK
from hf_accel.testing.models import tiny
from tiny_deepseek import DEEPSEEK

METHODS = {
    name: cls
    for name, cls in registry.methods().items()
    if cls.facts.sites == {"attention"} and (cls.facts.full_budget or cls.facts.exact)
}
TEXT = 70  # tokens: more than a block


@dataclass
class Situation:
    """``run()`` computes the output; ``around`` is entered around it."""

    model: torch.nn.Module
    run: Callable[[], torch.Tensor]
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    atol: float = 1e-4


def plain(family: str, **kwargs: Any) -> Situation:
    model = tiny.build(family)
    return Situation(model, lambda: tiny.run(model, family, **kwargs))


# -- guidance by perturbed attention -------------------------------------------------------------------------------


def guider(family: str) -> Situation:
    """A guider of modular diffusers: hooks of its own for the third of its forwards."""
    from diffusers.guiders import PerturbedAttentionGuidance

    found = plain(family)
    guidance = PerturbedAttentionGuidance(
        perturbed_guidance_layers=[0], perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0
    )
    guidance.set_state(step=1, num_inference_steps=4, timestep=torch.tensor(500.0))
    without = found.run()

    @contextlib.contextmanager
    def around():
        guidance._count_prepared = 2
        guidance.prepare_models(found.model)
        assert not torch.allclose(found.run(), without, atol=1e-3)
        try:
            yield
        finally:
            guidance.cleanup_models(found.model)

    found.around = around
    return found


def layer_skip(family: str, fqn: str) -> Situation:
    found = plain(family)
    skipped = LayerSkipConfig([0], fqn, skip_attention=False, skip_ff=False, skip_attention_scores=True)
    apply_layer_skip(found.model, skipped)
    return found


def pag() -> Situation:
    """What PAG pipelines do for a call: other processors in some layers, then the first ones again."""
    found = plain("sdxl", batch=2)
    attention = found.model.mid_block.attentions[0].transformer_blocks[0].attn1

    @contextlib.contextmanager
    def around():
        there = attention.processor
        attention.processor = PAGIdentitySelfAttnProcessor2_0()
        try:
            yield
        finally:
            attention.processor = there

    found.around = around
    return found


# -- who looks on --------------------------------------------------------------------------------------------------


class Watch(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def watched(family: str) -> Situation:
    found = plain(family)
    found.around = Watch
    return found


class Maps(AttnProcessor):
    """A recorder of attention maps, as prompt-to-prompt editing has it."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        self.seen = hidden_states.shape
        return super().__call__(attn, hidden_states, *args, **kwargs)


def recorder_of_maps() -> Situation:
    found = plain("sdxl")
    found.model.set_attn_processor(Maps())
    return found


def ip_adapter() -> Situation:
    class WithImage(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            out = super().__call__(attn, hidden_states, *args, **kwargs)
            own = hidden_states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            image = torch.ones_like(own[:, :, :4])
            return out + F.scaled_dot_product_attention(own, image, image).transpose(1, 2).flatten(2)

    found = plain("sdxl")
    found.model.set_attn_processor(WithImage())
    return found


# -- several pictures in one sequence ------------------------------------------------------------------------------


def kontext(ids_of_reference: str) -> Situation:
    """FLUX.1-Kontext: the reference image's tokens behind those of the picture, with ids of their own."""
    model = tiny.build("flux")
    ids = tiny.TINY["flux"].inputs(model, size=(1, 8, 8))["img_ids"]
    reference = ids + torch.tensor([1.0, 0, 0] if ids_of_reference == "another image" else [0.0, 8, 0])
    inputs = tiny.TINY["flux"].inputs(model, size=(1, 8, 16))
    inputs["img_ids"] = torch.cat([ids, reference])
    inputs["encoder_hidden_states"] = torch.randn(1, TEXT, 24, generator=torch.Generator().manual_seed(1))
    inputs["txt_ids"] = torch.zeros(TEXT, 3)
    return Situation(model, lambda: model(**inputs, return_dict=False)[0])


def qwen_edit(*shapes: tuple[int, int, int]) -> Situation:
    """Qwen-Image-Edit, and with more pictures Qwen-Image-Edit-Plus."""
    model = tiny.build("qwen-image")
    tokens = sum(f * h * w for f, h, w in shapes)
    inputs = {
        "hidden_states": torch.randn(1, tokens, 4, generator=torch.Generator().manual_seed(1)),
        "encoder_hidden_states": torch.randn(1, TEXT, 24, generator=torch.Generator().manual_seed(2)),
        "encoder_hidden_states_mask": torch.ones(1, TEXT, dtype=torch.bool),
        "timestep": torch.tensor([0.5]), "img_shapes": [list(shapes)],
    }  # fmt: skip
    return Situation(model, lambda: model(**inputs, return_dict=False)[0])


# -- language models -----------------------------------------------------------------------------------------------


def flattened() -> Situation:
    """A trainer's packed batch: ``DataCollatorWithFlattening`` puts all texts into one row."""
    from transformers import DataCollatorWithFlattening

    model = tiny.build("llama")
    draw = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(3, 50, (n,), generator=draw).tolist()} for n in (70, 9, 45)]
    batch = DataCollatorWithFlattening(return_tensors="pt")(rows)
    return Situation(model, lambda: model(**batch, use_cache=False).logits)


def masked(kind: str) -> Situation:
    """A 4-D mask of the caller's own."""
    model, length = tiny.build("llama"), 60
    ids = torch.randint(3, 50, (2, length), generator=torch.Generator().manual_seed(0))
    place = torch.arange(length)
    mask = (place <= place[:, None]).repeat(2, 1, 1)
    if kind == "documents":
        mask[0] &= (place >= 30) == (place[:, None] >= 30)
    elif kind == "prefix":
        mask |= place < 12
    elif kind == "image":
        mask |= ((place >= 20) & (place < 36)) & ((place[:, None] >= 20) & (place[:, None] < 36))
    elif kind == "window":
        mask &= place > place[:, None] - 16
    elif kind == "padding":
        mask &= place[None, None] >= torch.tensor([0, 11])[:, None, None]
    seen = mask.any(-1)[..., None]
    return Situation(model, lambda: model(ids, attention_mask=mask[:, None], use_cache=False).logits.where(seen, 0.0))


def deepseek(dtype: torch.dtype = torch.float32) -> Situation:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(**DEEPSEEK)
    model = DeepseekV3ForCausalLM(config).eval().to(dtype)
    ids = torch.randint(3, 96, (1, 150))
    return Situation(model, lambda: model(ids).logits)


def autocast(family: str) -> Situation:
    found = plain(family)
    # Another order of summing in bf16 goes on through the layers.
    return Situation(found.model, found.run, lambda: torch.autocast("cpu", torch.bfloat16), atol=0.1)


SITUATIONS: dict[str, Callable[[], Situation]] = {
    "perturbed-attention guider": lambda: guider("qwen-image"),
    "layer skip, scores": lambda: layer_skip("sdxl", "down_blocks.1.attentions.0.transformer_blocks"),
    "layer skip, scores, dispatcher": lambda: layer_skip("qwen-image", "transformer_blocks"),
    "PAG processors": pag,
    "recorder: function mode": lambda: watched("wan"),
    "recorder: maps": recorder_of_maps,
    "IP adapter": ip_adapter,
    "Flux Kontext": lambda: kontext("another image"),
    "Flux Kontext, side by side": lambda: kontext("the rows below"),
    "Qwen-Image-Edit": lambda: qwen_edit((1, 6, 8), (1, 6, 8)),
    "Qwen-Image-Edit-Plus": lambda: qwen_edit((1, 6, 8), (1, 8, 4), (1, 4, 4)),
    "packed trainer": flattened,
    "mask: documents": lambda: masked("documents"),
    "mask: prefix": lambda: masked("prefix"),
    "mask: image in text": lambda: masked("image"),
    "mask: window": lambda: masked("window"),
    "mask: padding": lambda: masked("padding"),
    "DeepSeek class": deepseek,
    "autocast, video": lambda: autocast("wan"),
    "autocast, U-Net": lambda: autocast("sdxl"),
    "autocast, text": lambda: autocast("llama"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("situation", SITUATIONS)
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:hf_accel")
def test_exact_at_full_budget_or_dense_and_counted(situation, method):
    found = SITUATIONS[situation]()
    cls = METHODS[method]
    if cls.why_not(Model("model", found.model)) is not None:
        assert method not in ("dense", "sparge")  # which take every model here
        return
    with found.around():
        expected = found.run()
    settings = QUICK.get(method, {}) | cls.facts.full_budget
    with hf_accel.apply(found.model, method, **settings) as applied:
        with found.around():
            ours = found.run()
        entry = applied.report().entries[0]
    assert torch.allclose(ours, expected, atol=found.atol, rtol=1e-4)
    told = entry.run.sparse_calls + sum(entry.run.dense_calls.values())
    assert told >= len(entry.patched)
    with found.around():
        assert torch.equal(found.run(), expected)
