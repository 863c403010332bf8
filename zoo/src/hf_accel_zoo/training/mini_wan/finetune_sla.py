"""Fine-tune `sla` on mini-wan: rendered clips, encoded once, and the dense model as the teacher.

    python -m hf_accel_zoo.training.mini_wan.finetune_sla --out sla-15 --topk 0.15 --minutes 8

Written to `--out`: checkpoints, `loss.json`, `loss.png` (all of :class:`hf_accel.train.Finetuner`), `trained/` (what
`hf_accel.load_trained(pipe, ...)` takes), `report.json` (minutes, validation loss and PSNR against dense on held-out
prompts, before and after). `--resume` goes on from the newest checkpoint for `--minutes` more; the clips are drawn
from the seed, so the curve is that of one run.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import hf_accel
from hf_accel import zoo
from hf_accel.measure.demo import native_call
from hf_accel.measure.quality import psnr
from hf_accel.measure.sampling import generate
from hf_accel.train import FinetuneConfig, Finetuner

from . import data, grammar
from . import model as parts

TEXT_LENGTH = 64  # what the demo's pipeline call asks for
SILENT_SHARE = 0.12  # as in training: the unconditional branch of guidance is fine-tuned too
SEED = 7000  # no clip of the training of the weights themselves


@torch.no_grad()
def encode_clips(pipe: Any, count: int, seed: int) -> dict[str, Tensor]:
    """`latents` `[N, C, F, H, W]`, normalised, and `encoder_hidden_states` `[N, 64, text_dim]` of rendered clips.

    Pairs of shapes that held-out prompts name do not occur. Some captions are empty.
    """
    vae = parts.over_whole_clips(copy.deepcopy(pipe.vae))  # the pipeline goes on decoding with its own
    config, generator = vae.config, torch.Generator().manual_seed(seed)
    centre, spread = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    scenes = grammar.sample(count, generator, grammar.heldout_pairs())
    latents = []
    for item in range(count):
        clip = data.render(scenes[item : item + 1], "cpu", generator)
        latents.append((parts.encode_clip(vae, clip)[0] - centre) / spread)
    silent = (torch.rand(count, generator=generator) < SILENT_SHARE).tolist()
    captions = ["" if mute else grammar.caption(scenes, item) for item, mute in enumerate(silent)]
    text = parts.encode_text(pipe.text_encoder, grammar.encode(captions), TEXT_LENGTH)
    return {"latents": torch.cat(latents), "encoder_hidden_states": text}


def clips(pipe: Any, out: Path, count: int, seed: int) -> dict[str, Tensor]:
    """:func:`encode_clips`, kept in `out` for the next run."""
    file = out / f"clips-{seed}-{count}.safetensors"
    if not file.is_file():
        save_file({name: value.contiguous() for name, value in encode_clips(pipe, count, seed).items()}, file)
    return load_file(file)


class Examples(torch.utils.data.Dataset):
    """The encoded clips one by one."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors["latents"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[index] for name, value in self.tensors.items()}


def heldout_psnr(pipe: Any, dense: list[Tensor], prompts: list[dict], steps: int) -> float | None:
    """Mean PSNR in dB of the pipeline as it stands against its dense videos, same seeds."""
    if not prompts:
        return None
    values = [
        psnr(generate(pipe, p["prompt"], p["seed"], num_inference_steps=steps, **native_call()).frames, reference)
        for p, reference in zip(prompts, dense, strict=True)
    ]
    return sum(values) / len(values)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="pipeline folder; default: the shipped mini-wan")
    parser.add_argument("--topk", type=float, default=0.15)
    parser.add_argument("--linear-scope", default="rest", choices=("rest", "marginal", "all"))
    parser.add_argument("--minutes", type=float, default=8.0, help="of training; encoding and reports not counted")
    parser.add_argument("--steps", type=int, default=100_000, help="in all; usually the minutes end first")
    parser.add_argument("--loss", default="distill", choices=("distill", "diffusion"))
    parser.add_argument("--lora-rank", type=int, default=32, help="0: all weights")
    parser.add_argument("--lora-targets", default="to_q,to_k,to_v,to_out.0")
    parser.add_argument("--lr", type=float, help="default: 1e-3 with LoRA, 2e-4 for all weights")
    parser.add_argument("--method-lr", type=float, default=3e-3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--validation-clips", type=int, default=8)
    parser.add_argument("--average", type=float, default=0.98, help="decay of the averaged weights")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--validate-every", type=int, default=100)
    parser.add_argument("--checkpoint-every", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=2, help="held-out prompts for the PSNR before and after")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


def main() -> None:
    from diffusers import WanPipeline

    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = WanPipeline.from_pretrained(args.model or zoo.path("mini-wan"))
    pipe.set_progress_bar_config(disable=True)
    prompts = grammar.heldout()[: args.prompts]
    dense = [
        generate(pipe, p["prompt"], p["seed"], num_inference_steps=args.sampling_steps, **native_call()).frames
        for p in prompts
    ]
    training = Examples(clips(pipe, args.out, args.clips, SEED + args.seed))
    held_out = clips(pipe, args.out, args.validation_clips, SEED - 1)
    validation = [{name: value[i : i + 1] for name, value in held_out.items()} for i in range(args.validation_clips)]

    hf_accel.apply(pipe, "sla", topk=args.topk, linear_scope=args.linear_scope)
    before = None if args.resume else heldout_psnr(pipe, dense, prompts, args.sampling_steps)
    config = FinetuneConfig(
        loss=args.loss,
        steps=args.steps,
        batch_size=args.batch,
        lr=args.lr or (1e-3 if args.lora_rank else 2e-4),
        method_lr=args.method_lr,
        warmup_steps=20,
        max_grad_norm=1.0,
        lora_rank=args.lora_rank or None,
        lora_targets=args.lora_targets,
        precision=args.precision,
        ema_decay=args.average,
        sigma_mean=0.0,
        sigma_std=1.0,
        sigma_shift=parts.FLOW_SHIFT,
        validate_every=args.validate_every,
        checkpoint_every=args.checkpoint_every,
        seed=args.seed,
    )
    tuner = Finetuner(pipe, config, out=args.out, resume="latest" if args.resume else None)
    history = tuner.fit(training, validation, seconds=60 * args.minutes)
    hf_accel.save_trained(pipe, args.out / "trained", base_weights=not args.lora_rank)

    start = time.monotonic()
    after = heldout_psnr(pipe, dense, prompts, args.sampling_steps)
    report = {
        "topk": args.topk,
        "steps": tuner.step,
        "minutes": history.seconds / 60,
        "validation_loss_before": history.validation[0]["loss"],
        "validation_loss_after": history.validation[-1]["loss"],
        "psnr_db_before": before,
        "psnr_db_after": after,
        "prompts": [p["prompt"] for p in prompts],
        "sampling_minutes": (time.monotonic() - start) / 60,
        "arguments": {name: str(value) for name, value in vars(args).items()},
    }
    old = args.out / "report.json"
    if args.resume and old.is_file():
        report["psnr_db_before"] = json.loads(old.read_text())["psnr_db_before"]
    old.write_text(json.dumps(report, indent=2))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
