"""Train `mini-sd` on a CPU: first the autoencoder, then U-Net and text encoder together.

A phase ends by the clock, saves a checkpoint every two minutes and goes on from it when started again::

    python -m hf_accel_zoo.training.mini_sd.train vae --out DIR --minutes 6
    python -m hf_accel_zoo.training.mini_sd.train unet --out DIR --minutes 60 --half

`DIR` then holds `vae.safetensors`, `model.safetensors` (averaged weights, what `assemble.py` reads), `*.state` to go
on from, and `*.log` with one JSON line per report.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import data, grammar
from . import model as parts

SAVE_EVERY = 120.0  # seconds
SCALING = 0.18215  # Stable Diffusion's; `standardise` makes it true of ours


class Phase:
    """Clock, checkpoints and log of one phase; `state` is what a checkpoint holds."""

    def __init__(self, args: argparse.Namespace, name: str, state: dict) -> None:
        self.file, self.log = args.out / f"{name}.state", args.out / f"{name}.log"
        self.state, self.seconds, self.spent, self.step = state, 60 * args.minutes, 0.0, 0
        if self.file.exists():
            saved = torch.load(self.file, weights_only=True)
            self.spent, self.step = saved.pop("spent"), saved.pop("step")
            for key, value in saved.items():
                state[key].load_state_dict(value)
            print(f"{name} goes on from step {self.step}, {self.spent:.0f}s", flush=True)

    def __iter__(self) -> Iterator[float]:
        """Yields the share of the time that is spent, until it is."""
        start, saved = time.monotonic() - self.spent, time.monotonic()
        while self.spent < self.seconds:
            yield self.spent / self.seconds
            self.step += 1
            self.spent = time.monotonic() - start
            if time.monotonic() - saved > SAVE_EVERY:
                saved = time.monotonic()
                self.save()
        self.save()

    def save(self) -> None:
        part = self.file.with_suffix(".part")
        state = {key: value.state_dict() for key, value in self.state.items()}
        torch.save({**state, "spent": self.spent, "step": self.step}, part)
        part.replace(self.file)

    def report(self, **values: float) -> None:
        line = json.dumps({"step": self.step, "seconds": round(self.spent), **values})
        print(line, flush=True)
        with self.log.open("a") as file:
            file.write(line + "\n")


def rate(share: float, step: int, peak: float, flat: float = 0.35) -> float:
    """Learning rate: warm-up by steps, flat, then linear to a fiftieth by the clock."""
    fall = 1 - 0.98 * max(0.0, share - flat) / (1 - flat)
    return peak * min((step + 1) / 200, 1.0) * fall


class Average(nn.Module):
    """Exponential average of a module's parameters, with a shorter memory in the beginning."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay, self.source = decay, list(module.parameters())
        self.names = [name for name, _ in module.named_parameters()]
        for index, parameter in enumerate(self.source):
            self.register_buffer(f"p{index}", parameter.detach().clone())

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.buffers()), [p.detach() for p in self.source], 1 - decay)

    def weights(self) -> dict[str, Tensor]:
        return {name: value.contiguous() for name, value in zip(self.names, self.buffers(), strict=True)}


# --- autoencoder ---


def edges(picture: Tensor) -> tuple[Tensor, Tensor]:
    return picture.diff(dim=-1), picture.diff(dim=-2)


def train_vae(args: argparse.Namespace) -> None:
    """L1 on pixels and on their differences (outlines and stripes are most of what is to be kept), and a small KL."""
    vae, generator = parts.build_vae(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    average = Average(vae, 0.995)
    phase = Phase(args, "vae", {"vae": vae, "optimizer": optimizer, "average": average})
    generator.manual_seed(1 + phase.step)
    losses = []
    for share in phase:
        picture = data.render(grammar.sample(args.batch, generator), generator, free=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.half):
            posterior = vae.encode(picture).latent_dist
            out = vae.decode(posterior.mean + posterior.std * torch.randn(posterior.mean.shape)).sample.float()
        kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        l1 = F.l1_loss(out, picture)
        edge = torch.stack([F.l1_loss(ours, true) for ours, true in zip(edges(out), edges(picture), strict=True)]).sum()
        loss = l1 + 0.5 * edge + 1e-4 * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate(share, phase.step, args.lr)
        optimizer.step()
        average.update(phase.step)
        losses.append((l1.item(), edge.item(), kl.item()))
        if phase.step % 100 == 0:
            l1, edge, kl = (sum(column) / len(losses) for column in zip(*losses, strict=True))
            phase.report(l1=round(l1, 5), edge=round(edge, 5), kl=round(kl, 3))
            losses.clear()
    vae.load_state_dict(average.weights())
    pictures = data.render(grammar.sample(512, generator), generator, free=True)
    print("channels before", standardise(vae, pictures))
    again = reconstruct(vae, pictures)
    phase.report(psnr=round(float(psnr(again, pictures)), 2))
    save_file(vae.state_dict(), args.out / "vae.safetensors")


@torch.no_grad()
def encode(vae: Any, pictures: Tensor) -> Tensor:
    """Latents `[N, 4, 16, 16]` as the U-Net sees them, of unit variance."""
    return torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in pictures.split(64)]) * SCALING


@torch.no_grad()
def reconstruct(vae: Any, pictures: Tensor) -> Tensor:
    return torch.cat([vae.decode(vae.encode(chunk).latent_dist.mode()).sample for chunk in pictures.split(64)])


def psnr(ours: Tensor, true: Tensor) -> Tensor:
    """Mean over pictures, in dB, of pictures in -1..1; ours are clamped as a pipeline clamps them."""
    error = (ours.clamp(-1, 1) - true).square().mean((1, 2, 3)) / 4
    return (-10 * error.log10()).mean()


@torch.no_grad()
def standardise(vae: Any, pictures: Tensor) -> list[list[float]]:
    """Fold mean and spread of each latent channel into the 1 x 1 convolutions at the ends of the latents.

    The autoencoder computes what it did; its latents times :data:`SCALING` have mean 0 and variance 1 in every channel,
    which one `scaling_factor` cannot give. Returns mean and standard deviation before.
    """
    latents = encode(vae, pictures) / SCALING
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    factor = 1 / (std * SCALING)
    channels = len(mean)
    into, out = vae.quant_conv, vae.post_quant_conv
    into.bias[:channels] = (into.bias[:channels] - mean) * factor
    into.weight[:channels] *= factor.view(-1, 1, 1, 1)
    into.bias[channels:] += 2 * factor.log()  # log-variances follow
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight /= factor.view(1, -1, 1, 1)
    return [mean.tolist(), std.tolist()]


# --- U-Net and text encoder ---


class Bank:
    """Latents of N training pictures, encoded once, and their scenes; captions are worded anew every time."""

    def __init__(self, args: argparse.Namespace) -> None:
        vae = parts.build_vae().requires_grad_(False)
        vae.load_state_dict(load_file(args.out / "vae.safetensors"))
        generator, start = torch.Generator().manual_seed(2 + args.seed), time.monotonic()
        file = args.out / f"bank-{args.bank}-{args.seed}.safetensors"
        if file.exists():
            saved = load_file(file)
            self.latents = saved.pop("latents")
            self.scenes = grammar.Scenes(**{name.removeprefix("scenes."): value for name, value in saved.items()})
            return
        self.scenes = grammar.sample(args.bank, generator, grammar.heldout_pairs())
        chunks = []
        for first in range(0, args.bank, 256):
            pictures = data.render(self.scenes[first : first + 256], generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.half):
                chunks.append(encode(vae, pictures).half())
        self.latents = torch.cat(chunks).contiguous()
        scenes = {f"scenes.{name}": value.contiguous() for name, value in vars(self.scenes).items()}
        save_file({"latents": self.latents, **scenes}, file)
        print(
            f"{args.bank} pictures {time.monotonic() - start:.0f}s, latents {self.latents.float().std():.3f}",
            flush=True,
        )

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        index = torch.randint(len(self.latents), (n,), generator=generator)
        scenes = self.scenes[index]
        scenes.said = torch.rand(scenes.said.shape, generator=generator) < 0.85
        silent = (torch.rand(n, generator=generator) < 0.1).tolist()
        return self.latents[index].float(), [
            "" if mute else grammar.caption(scenes, i) for i, mute in enumerate(silent)
        ]


def train_unet(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    unet: Any = parts.build_unet()
    # Fused attention's backward on a CPU is slower than plain matmuls.
    unet.set_attn_processor(AttnProcessor())
    unet.to(memory_format=torch.channels_last)  # before anything copies its layout
    text_encoder = parts.build_text_encoder()
    model = nn.ModuleDict({"unet": unet, "text": text_encoder})
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.99),
        fused=True,
    )
    average = Average(model, 0.998)
    bank = Bank(args)
    phase = Phase(args, "unet", {"model": model, "optimizer": optimizer, "average": average})
    generator = torch.Generator().manual_seed(3 + phase.step)
    alpha_bar = parts.build_scheduler().alphas_cumprod
    predict = torch.compile(unet) if args.compile else unet
    losses, start = [], time.monotonic()
    for share in phase:
        latents, captions = bank.draw(args.batch, generator)
        ids = grammar.encode(captions)
        # One time from each of B equal stretches: less noise in the loss than independent times. The power draws more
        # of them where forms and places are decided.
        times = (torch.arange(args.batch) + torch.rand(args.batch, generator=generator)) / args.batch
        times = (1000 * times**0.7).long()
        noise = torch.randn(latents.shape, generator=generator)
        signal = alpha_bar[times].view(-1, 1, 1, 1)
        mixed = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        velocity = signal.sqrt() * noise - (1 - signal).sqrt() * latents
        with torch.autocast("cpu", torch.bfloat16, enabled=args.half):
            text = text_encoder(ids).last_hidden_state
            out = predict(mixed, times, text, return_dict=False)[0]
        error = (out.float() - velocity).square().mean((1, 2, 3))
        # min-SNR-5 where there is little noise; where there is much, plain velocity rather than min-SNR's
        # snr / (snr + 1), since that is where it is decided what stands where
        weight = (1 - signal.flatten()).mul(6).clamp(max=1)
        loss = (weight * error).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(share, phase.step, args.lr)
        optimizer.step()
        average.update(phase.step)
        losses.append(loss.item())
        if phase.step % 100 == 0:
            pace = (time.monotonic() - start) / len(losses)
            phase.report(loss=round(sum(losses) / len(losses), 5), pace=round(pace, 3))
            losses.clear()
            start = time.monotonic()
            if phase.step % 200 == 0:
                save_file(average.weights(), args.out / "model.safetensors")
    save_file(average.weights(), args.out / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("vae", "unet"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True, help="of this phase, earlier starts included")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--bank", type=int, default=48_000, help="training pictures of the U-Net")
    parser.add_argument("--half", action="store_true", help="bf16 autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile the U-Net")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    (train_vae if args.phase == "vae" else train_unet)(args)


if __name__ == "__main__":
    main()
