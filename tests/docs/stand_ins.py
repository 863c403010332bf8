"""What stands in for the Hub, the GPU and the hours of work that the pages take for granted. This is the whole list:

1. **Models.** The cache of the Hub holds the miniatures of ``hf-accel-zoo`` and tiny random models under the names
   that the pages use (``fill_hub``), and the Hub is offline. ``from_pretrained`` is that of diffusers and transformers.
   ``configs/`` reads a model's sizes to know it; there it sees the sizes of the checkpoint that is stood for.
2. **GPU.** Where there is none, ``.to("cuda")`` leaves things on the CPU.
3. **Size.** Pipelines of diffusers make pictures of at most 16 x 16 pixels and 5 frames, from at most 32 tokens, in at
   most 3 steps; our trainings take at most 2 steps, k-means 5; the text of mini-llama is one folder of the standard
   library.
4. **Files.** The folder in which a page runs holds what its reader would have: ``corpus.txt`` (a few thousand words),
   ``fast.yaml`` (a preset) and ``clips.pt`` (two batches of latents with the embeddings of their captions).

Everything else is what a user has who pastes the blocks of a page one after the other.
"""

from __future__ import annotations

import functools
import inspect
import json
import shutil
import string
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

LAYERS = 2
COMMIT = "0f3c2a9d1b7e4c5f8a6d0e9b3c7f1a2d4e5b6c78"  # of every repository in the cache
PRESET = """hf_accel: 1
name: wan-fast
models: [{class: WanTransformer3DModel}]
apply: [{method: svg2, version: 1, settings: {top_p: 0.8, dense_steps: 0.25}}]
"""


@dataclass(frozen=True)
class Stand:
    """``write(folder)`` fills the repository; ``reads_as``: the fields by which ``configs/`` knows the real model."""

    write: Callable[[Path], Any]
    reads_as: Mapping[str, Any] = field(default_factory=dict)


# -- repositories ------------------------------------------------------------------------------------------------------


def _miniature(name: str) -> Callable[[Path], Any]:
    def write(folder: Path) -> None:
        from hf_accel import zoo

        shutil.copytree(zoo.path(name), folder, dirs_exist_ok=True)

    return write


def _wan(folder: Path) -> None:
    """The miniature's first two layers of six: a page generates several times."""
    from diffusers import WanPipeline

    from hf_accel import zoo

    pipe = WanPipeline.from_pretrained(zoo.path("mini-wan"))
    pipe.transformer.blocks = pipe.transformer.blocks[:LAYERS]
    pipe.transformer.register_to_config(num_layers=LAYERS)
    pipe.save_pretrained(folder)


def _llama(folder: Path) -> None:
    """One layer with random weights, and the tokenizer of the miniature."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from hf_accel import zoo

    tokenizer = AutoTokenizer.from_pretrained(zoo.path("mini-llama"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=8192,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _letters(folder: Path, mask: int | None, size: int) -> None:
    """A tokenizer with one token per letter, and special tokens at the ids that the tiny models take for such."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {0: "<pad>", size - 2: "<eos>"} | ({mask: "<mask>"} if mask is not None else {})
    rest = iter(string.ascii_letters + string.digits + string.punctuation)
    vocabulary = {special.get(i) or next(rest): i for i in range(size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=vocabulary and "a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "eos_token": "<eos>"} | ({"mask_token": "<mask>"} if mask is not None else {})
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names).save_pretrained(folder)


def _diffusion_gemma(folder: Path) -> None:
    from hf_accel.testing.models.gemma import diffusion_gemma

    diffusion_gemma(canvas_length=64).save_pretrained(folder)
    _letters(folder, mask=None, size=90)


def _llada2(folder: Path) -> None:
    """As on the Hub: the code of the model lies beside its weights."""
    from hf_accel.testing.models import llada2, llada2_pipeline

    model: Any = llada2.build(mask_token_id=llada2_pipeline.MASK, block_size=32)
    model.save_pretrained(folder)
    shutil.copy(llada2.__file__, folder / "modeling_llada2_moe.py")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "modeling_llada2_moe.LLaDA2MoeConfig",
        "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    _letters(folder, mask=llada2_pipeline.MASK, size=64)


def _trained(folder: Path) -> None:
    """What ``sla`` learned in these two layers."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from hf_accel import zoo

    shutil.copytree(zoo.trained("mini-wan", "sla"), folder, dirs_exist_ok=True)
    kept = tuple(f"blocks.{layer}." for layer in range(LAYERS))
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys() if any(name in key for name in kept)}  # noqa: SIM118
            metadata = stored.metadata()
        save_file(tensors, file, metadata)


def _preset(folder: Path) -> None:
    (folder / "hf_accel.yaml").write_text(PRESET)


HUB = {
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": Stand(
        _wan, {"num_layers": 40, "num_attention_heads": 40, "in_channels": 16, "image_dim": None}
    ),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": Stand(
        _miniature("mini-sd"), {"cross_attention_dim": 768, "block_out_channels": [320, 640, 1280, 1280]}
    ),
    "meta-llama/Llama-3.1-8B": Stand(
        _llama,
        {
            "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
        },
    ),
    "JetLM/SDAR-8B-Chat": Stand(
        _miniature("mini-sdar"),
        {"num_hidden_layers": 36, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8},
    ),
    "google/diffusiongemma-26B-A4B-it": Stand(_diffusion_gemma),
    "inclusionAI/LLaDA2.1-mini": Stand(_llada2),
    "acme/wan-fast": Stand(_preset),
    "acme/wan-sla": Stand(_trained),
}  # fmt: skip


def fill_hub(cache: Path) -> None:
    """Write the repositories into a cache folder of huggingface_hub, as if they had been downloaded."""
    import hf_accel_zoo.sdar  # noqa: F401 (registers its class: the real one is remote code)

    for name, stand in HUB.items():
        repo = cache / f"models--{name.replace('/', '--')}"
        snapshot = repo / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        stand.write(snapshot)
        (repo / "refs").mkdir()
        for ref in ("main", "v1"):
            (repo / "refs" / ref).write_text(COMMIT)


def fill_folder(folder: Path) -> None:
    """Write the files that a reader would have beside the code."""
    from hf_accel.zoo import llama

    (folder / "fast.yaml").write_text(PRESET)
    source = Path(llama.__file__).read_text() + Path(inspect.getfile(inspect)).read_text()
    (folder / "corpus.txt").write_text(source[:9_000])
    generator = torch.Generator().manual_seed(0)
    torch.save(
        [
            {
                "latents": torch.randn(1, 12, 3, 8, 8, generator=generator),
                "encoder_hidden_states": torch.randn(1, 8, 64, generator=generator),
            }
            for _ in range(2)
        ],
        folder / "clips.pt",
    )


# -- the process -------------------------------------------------------------------------------------------------------


def install() -> None:
    """Put the stand-ins 1 (the sizes), 2 and 3 on the libraries. For a process that does nothing else."""
    _read_sizes()
    if not torch.cuda.is_available():
        _no_gpu()
    _small()


def _read_sizes() -> None:
    from hf_accel.hosts.target import Model

    own = Model.config.fget

    def config(self: Model) -> dict[str, Any]:
        names = (name for name in HUB if name in self.source or name.replace("/", "--") in self.source)
        return own(self) | HUB[name].reads_as if (name := next(names, None)) else own(self)

    Model.config = property(config)


def _no_gpu() -> None:
    from diffusers import DiffusionPipeline

    def on_cpu(to: Callable[..., Any]) -> Callable[..., Any]:
        def moved(value: Any) -> Any:
            is_device = isinstance(value, str | torch.device)
            return "cpu" if is_device and torch.device(value).type == "cuda" else value

        @functools.wraps(to)
        def instead(self: Any, *given: Any, **named: Any) -> Any:
            return to(self, *map(moved, given), **{key: moved(value) for key, value in named.items()})

        return instead

    for cls in (torch.nn.Module, torch.Tensor, DiffusionPipeline):
        cls.to = on_cpu(cls.to)


LARGEST = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 3, "max_sequence_length": 32}


def _small() -> None:
    from diffusers import StableDiffusionPipeline, WanPipeline

    from hf_accel.patches import svg2
    from hf_accel.train.loop.training_loop import TrainingLoop
    from hf_accel_zoo import llama
    from hf_accel_zoo.training.mini_llama import text

    def limited(call: Callable[..., Any], **largest: int) -> Callable[..., Any]:
        """The function, with arguments (and defaults) of at most these values."""
        parameters = inspect.signature(call).parameters

        @functools.wraps(call)
        def instead(*given: Any, **named: Any) -> Any:
            for name, most in largest.items():
                if name in parameters:
                    asked = named.get(name, parameters[name].default)
                    named[name] = min(most, asked) if isinstance(asked, int | float) else most
            return call(*given, **named)

        return instead

    for cls in (WanPipeline, StableDiffusionPipeline):
        cls.__call__ = limited(cls.__call__, **LARGEST)
    svg2.kmeans = limited(svg2.kmeans, iterations=5)
    text._library = functools.cache(lambda: text.read(Path(sysconfig.get_path("stdlib")) / "asyncio"))
    llama.windows = limited(llama.windows, count=4)
    fit = TrainingLoop.fit

    @functools.wraps(fit)
    def short_fit(self: TrainingLoop, *given: Any, **named: Any) -> Any:
        self.config = self.config.replace(steps=min(2, self.config.steps))
        return fit(self, *given, **named)

    TrainingLoop.fit = short_fit
