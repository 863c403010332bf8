"""Time of deepcache on the architectures of Stable Diffusion 1.5 and XL, on a GPU: eager and compiled, batch of one.

    python benchmarks/deepcache_gpu.py --json benchmarks/results/deepcache_gpu.json
    python benchmarks/deepcache_gpu.py --dry        # every line of it in tiny sizes, on the CPU

Weights are random (nothing is downloaded), so pictures mean nothing and only time and memory are taken; quality is
measured on mini-sd (``deepcache.py``). Timed is the pipeline call with guidance and decoding; prompts come embedded.
Every variant has a U-Net of its own, which shares the weights, and is warmed up first, compilation included. Plain runs
first and last, so that drift shows; ratios are against plain of the same run and against the best dense variant.
What is done is saved after every variant: a run that is cut off has its figures.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from common import save

import hf_accel
from hf_accel.measure.machine import describe_machine
from hf_accel.sites.attention.break_even import wait_for

NEGATIVE = {"prompt_embeds": "negative_prompt_embeds", "pooled_prompt_embeds": "negative_pooled_prompt_embeds"}
VAE_CHANNELS = (128, 256, 512, 512)
DRY_CHANNELS = {320: 32, 640: 32, 1280: 64, 128: 32, 256: 32, 512: 32}


@dataclass(frozen=True)
class Architecture:
    """A published checkpoint's configuration: ``unet`` where it differs from the class's defaults."""

    name: str
    pipeline: str
    side: int
    unet: dict[str, Any]
    embeddings: dict[str, tuple[int, ...]]  # argument of the pipeline call -> shape
    scaling_factor: float


SD15 = Architecture(
    "sd-1.5",
    "StableDiffusionPipeline",
    512,
    {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768},
    {"prompt_embeds": (1, 77, 768)},
    0.18215,
)
SDXL = Architecture(
    "sdxl",
    "StableDiffusionXLPipeline",
    1024,
    {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    {"prompt_embeds": (1, 77, 2048), "pooled_prompt_embeds": (1, 1280)},
    0.13025,
)
ARCHITECTURES = {architecture.name: architecture for architecture in (SD15, SDXL)}


@dataclass(frozen=True)
class Variant:
    """A way to run the pipeline: ``mode`` of torch.compile, ``interval`` of deepcache; None: without."""

    mode: str | None = None
    interval: int | None = None

    @property
    def label(self) -> str:
        parts = [f"deepcache I={self.interval}" if self.interval else "plain", self.mode and f"compiled ({self.mode})"]
        return " + ".join(part for part in parts if part)


@dataclass
class Bench:
    """One architecture on one device, and the records of what was timed on it."""

    architecture: Architecture
    device: torch.device
    dtype: torch.dtype
    steps: int
    rounds: int
    dry: bool
    parts: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        import diffusers

        torch.manual_seed(0)
        shape = self.architecture
        with self.device:
            unet = diffusers.UNet2DConditionModel(**self._unet_config())
            vae = diffusers.AutoencoderKL(
                block_out_channels=self._small(VAE_CHANNELS),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                sample_size=shape.side,
                scaling_factor=shape.scaling_factor,
            )
        if self.device.type == "cuda":
            unet, vae = (module.to(memory_format=torch.channels_last) for module in (unet, vae))
        self.parts = {"unet": unet.to(self.dtype).eval(), "vae": vae.to(self.dtype).eval()}

    @property
    def side(self) -> int:
        return 64 if self.dry else self.architecture.side

    def _small(self, channels: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(DRY_CHANNELS[c] for c in channels) if self.dry else channels

    def _unet_config(self) -> dict[str, Any]:
        config = dict(self.architecture.unet)
        config["block_out_channels"] = self._small(config["block_out_channels"])
        return config

    def pipeline(self) -> Any:
        """A pipeline whose U-Net is new and has the same weights."""
        import diffusers

        with torch.device("meta"):
            unet = diffusers.UNet2DConditionModel(**self._unet_config())
        unet.load_state_dict(self.parts["unet"].state_dict(), assign=True)
        scheduler = diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        )
        text = {"text_encoder": None, "tokenizer": None}
        if self.architecture is SDXL:
            text |= {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
        else:
            text |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        cls = getattr(diffusers, self.architecture.pipeline)
        pipe = cls(unet=unet.eval().requires_grad_(False), vae=self.parts["vae"], scheduler=scheduler, **text)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(self, pipe: Any) -> Callable[[], Any]:
        """One picture, with guidance, from the same noise every time."""
        draw = torch.Generator().manual_seed(1)
        given: dict[str, Any] = {}
        for name, shape in self.architecture.embeddings.items():
            for argument in (name, NEGATIVE[name]):
                given[argument] = torch.randn(shape, generator=draw).to(self.device, self.dtype)
        given |= {"height": self.side, "width": self.side, "num_inference_steps": self.steps, "output_type": "pt"}
        return lambda: pipe(**given, generator=torch.Generator().manual_seed(0))

    def seconds(self, call: Callable[[], Any]) -> float:
        wait_for(self.device)
        begin = time.perf_counter()
        call()
        wait_for(self.device)
        return time.perf_counter() - begin

    def measure(self, variant: Variant) -> dict[str, Any]:
        """Time and memory of a variant, warmed up by two calls, of which the first compiles."""
        pipe = self.pipeline()
        applied = None
        if variant.interval:
            settings = {"cache_interval": variant.interval, "cache_branch_id": 0, "skip_mode": "uniform"}
            applied = hf_accel.apply(pipe, "deepcache", **settings)
        if variant.mode:
            pipe.unet.compile(**({"backend": "eager"} if self.dry else {"mode": variant.mode}))
        call = self.call(pipe)
        first = self.seconds(call)
        call()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        times = [self.seconds(call) for _ in range(self.rounds)]
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        run: Any = applied.report().entries[0].run if applied is not None else None
        del call, applied, pipe
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {
            "architecture": self.architecture.name,
            "side": self.side,
            "dtype": str(self.dtype).removeprefix("torch."),
            "steps": self.steps,
            "variant": variant.label,
            "mode": variant.mode,
            "interval": variant.interval,
            "first_seconds": first,
            "seconds": times,
            "median_seconds": statistics.median(times),
            "peak_bytes": peak,
            "mac_share": run.mac_share if run is not None else 1.0,
            "kept_bytes": run.kept_bytes if run is not None else 0,
        }

    def add_ratios(self) -> None:
        """Against plain (the faster of first and last), and against the fastest dense variant so far."""
        dense = [r["median_seconds"] for r in self.records if not r["interval"]]
        plain = min(r["median_seconds"] for r in self.records if not r["interval"] and not r["mode"])
        for record in self.records:
            record["ratio_to_plain"] = plain / record["median_seconds"]
            record["ratio_to_best_dense"] = min(dense) / record["median_seconds"]


def variants(modes: list[str], intervals: list[int]) -> Iterator[Variant]:
    """Plain first and last; what compiles fastest before what tunes for minutes."""
    for mode in (None, *modes):
        yield Variant(mode)
        yield from (Variant(mode, interval) for interval in intervals)
    yield Variant()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", choices=sorted(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--intervals", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--modes", nargs="*", default=["reduce-overhead", "max-autotune-no-cudagraphs"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, compiled without a compiler")
    parser.add_argument("--json")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        print("This benchmark needs a GPU; --dry runs it in tiny sizes on the CPU.")
        return 1
    device = torch.device("cpu" if options.dry else "cuda")
    dtype = torch.float32 if options.dry else torch.bfloat16
    steps, rounds = (10, 1) if options.dry else (options.steps, options.rounds)
    torch._dynamo.config.recompile_limit = 64  # every variant has a U-Net of its own, all with the same code
    machine = describe_machine(device)
    done: list[dict[str, Any]] = []
    for name in options.architectures:
        bench = Bench(ARCHITECTURES[name], device, dtype, steps, rounds, options.dry)
        for variant in variants(options.modes, options.intervals):
            record = bench.measure(variant)
            bench.records.append(record)
            bench.add_ratios()
            save(options.json, machine, done + bench.records)
            memory = f", {record['peak_bytes'] / 2**30:.2f} GiB" if record["peak_bytes"] is not None else ""
            print(
                f"{name:<7} {variant.label:<58} {record['median_seconds']:7.3f} s (first {record['first_seconds']:.1f})"
                f"  {record['ratio_to_plain']:.2f}x plain, {record['ratio_to_best_dense']:.2f}x best dense, "
                f"{1 / record['mac_share']:.2f}x by MACs{memory}",
                flush=True,
            )
        done += bench.records
    return 0


if __name__ == "__main__":
    sys.exit(main())
