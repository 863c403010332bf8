"""Train `mini-wan` within a time budget: first the VAE, then text encoder and transformer together.

Data are rendered on the fly and never repeat. The schedule follows the clock, not a step count, so a slower
machine gets a shorter training and never an unfinished one. `--stages` walks from single pictures over short
clips to whole ones: what a shape looks like is learned where a sample has 256 tokens, not 2,304. What is
unusual here is the attention: the miniature stands in for large models, whose attention is sparse, so training
asks for that. Query and key norms start above 1, two entropies of randomly chosen attention rows are held below
a bound (:func:`model.row_entropies`), and, with `--drop-share`, a share of the later steps runs with attention
over the top-p tiles only.

Written to `--out`: `vae.safetensors`, `model.safetensors` (averaged weights of transformer and text encoder,
fp16), `log.json`, `data.png`, `samples.png`, `attention.json`. `--resume DIR` starts from such a folder,
keeps its VAE, and starts the optimiser afresh.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import data, grammar, sharpness
from . import model as parts

VAE_RATE = 1.2e-3
SHORT_TEXT, LONG_TEXT = 64, 512  # `max_sequence_length` of the pipeline: a small one, and its default


class Clock:
    """Elapsed share of a phase; `share` runs from 0 to 1."""

    def __init__(self, seconds: float):
        self.start, self.seconds = time.monotonic(), seconds

    @property
    def share(self) -> float:
        return min((time.monotonic() - self.start) / self.seconds, 1.0)


@dataclass(frozen=True)
class Stage:
    """Clips of `frames` frames in batches of `batch`, while the elapsed share of training is below `until`."""

    frames: int
    batch: int
    until: float


def stages(text: str) -> list[Stage]:
    """`1:32:15,17:3:25` as stages; the last figures are relative durations."""
    rows = [[float(x) for x in part.split(":")] for part in text.split(",")]
    total = sum(row[2] for row in rows)
    ends = [sum(row[2] for row in rows[: i + 1]) / total for i in range(len(rows))]
    return [Stage(int(frames), int(batch), end) for (frames, batch, _), end in zip(rows, ends, strict=True)]


def window(frames: int, generator: torch.Generator) -> int | None:
    """Where in a full clip a shorter one begins; None for whole clips."""
    if frames == data.FRAMES:
        return None
    return int(torch.randint(data.FRAMES - frames + 1, (), generator=generator))


def crop(video: Tensor, side: int | None, generator: torch.Generator) -> Tensor:
    """A random square of `side` pixels, the same in every frame; all of it without a side."""
    if side is None:
        return video
    y, x = (int(torch.randint((video.shape[-1] - side) // 4 + 1, (), generator=generator)) * 4 for _ in range(2))
    return video[..., y : y + side, x : x + side]


def learning_rate(share: float, peak: float, warm: float = 0.02, hold: float = 0.35) -> float:
    """Linear warm-up, a plateau, then a cosine down to 1 % of the peak."""
    if share < warm:
        return peak * (share / warm + 1e-3)
    if share < hold:
        return peak
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (share - hold) / (1 - hold))))


def save(tensors: dict[str, Tensor], path: Path) -> None:
    """Half precision, written beside and renamed, so that a kill leaves the last whole file."""
    beside = path.with_suffix(".part")
    save_file({name: value.detach().half().cpu().contiguous() for name, value in tensors.items()}, beside)
    beside.rename(path)


def latent_scale(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, `[1, C, 1, 1, 1]`, as measured after VAE training."""
    return vae.centre, vae.spread


@torch.no_grad()
def half_is_faster(size: parts.Size, device: torch.device, batch: int) -> bool:
    """Is bfloat16 the faster precision for the VAE here? cuDNN's 3-D convolutions differ much by version."""
    if device.type != "cuda":
        return False
    vae = parts.over_whole_clips(parts.build_vae(size)).to(device)
    clip, seconds = torch.zeros(batch, 3, size.frames, size.side, size.side, device=device), {}
    for half in (True, False):
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            for turn in range(4):
                if turn == 1:
                    torch.cuda.synchronize()
                    start = time.monotonic()
                parts.decode_clip(vae, parts.encode_clip(vae, clip)[0])
        torch.cuda.synchronize()
        seconds[half] = (time.monotonic() - start) / 3
    print(f"VAE on {batch} clips: {seconds[True]:.4f} s in bf16, {seconds[False]:.4f} s in fp32")
    return seconds[True] < seconds[False]


def train_vae(args: argparse.Namespace, size: parts.Size, device: torch.device, log: dict) -> Any:
    """L1 + L2 reconstruction with a light KL; ends with the latent statistics that the pipeline needs."""
    vae: Any = parts.over_whole_clips(parts.build_vae(size)).to(device)
    vae.register_buffer("centre", torch.zeros(1, size.channels, 1, 1, 1, device=device))
    vae.register_buffer("spread", torch.ones(1, size.channels, 1, 1, 1, device=device))
    if args.resume:
        vae.load_state_dict({k: v.float() for k, v in load_file(args.resume / "vae.safetensors").items()})
        return vae.eval()
    if args.vae_start:
        vae.load_state_dict({k: v.float() for k, v in load_file(args.vae_start / "vae.safetensors").items()})
    cpu, gpu = torch.Generator().manual_seed(1 + args.seed), torch.Generator(device).manual_seed(1 + args.seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_RATE, weight_decay=1e-3, fused=device.type == "cuda")
    clock, step, history = Clock(60 * args.vae_minutes), 0, []
    while clock.share < 1 and step < args.max_steps:
        optimizer.param_groups[0]["lr"] = learning_rate(clock.share, VAE_RATE)
        frames = args.vae_frames or size.frames
        scenes = grammar.sample(args.vae_batch, cpu)
        video = crop(data.render(scenes, device, gpu, frames, size.side, window(frames, cpu)), args.vae_crop, cpu)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.vae_half):
            mean, log_variance = parts.encode_clip(vae, video)
            noise = torch.randn(mean.shape, generator=gpu, device=device)
            rebuilt = parts.decode_clip(vae, mean + noise * (0.5 * log_variance).exp()).float()
        mean, log_variance = mean.float(), log_variance.float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        squared = F.mse_loss(rebuilt, video)
        loss = F.l1_loss(rebuilt, video) + squared + 2e-4 * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            history.append([step, round(float(squared.detach()), 6), round(float(kl.detach()), 3)])
            print(f"vae {step} {time.monotonic() - clock.start:.0f}s mse {history[-1][1]} kl {history[-1][2]}")
        step += 1
    vae.eval()
    with torch.no_grad():
        clips = [data.render(grammar.sample(4, cpu), device, gpu, size.frames, size.side) for _ in range(8)]
        means = torch.cat([parts.encode_clip(vae, clip)[0] for clip in clips])
        vae.centre.copy_(means.mean((0, 2, 3, 4), keepdim=True))
        vae.spread.copy_(means.std((0, 2, 3, 4), keepdim=True))
        quality = sharpness.psnr(parts.decode_clip(vae, means[:4]), clips[0])
    log["vae"] = {"steps": step, "history": history, "psnr": round(float(quality.mean()), 2)}
    print("vae psnr", log["vae"]["psnr"], "latent std", [round(x, 2) for x in vae.spread.flatten().tolist()])
    save(vae.state_dict(), args.out / "vae.safetensors")
    return vae


def top_p_tiles(grid: tuple[int, int, int], device: torch.device, mass: float) -> parts.Attend:
    """Attention over the tiles that the mean query and mean key of each tile suggest."""
    index = parts.tile_index(grid, device)
    weight = F.one_hot(index).T.float()
    weight = weight / weight.sum(1, keepdim=True)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with torch.no_grad():
            means_q, means_k = weight @ query.float(), weight @ key.float()
            p = (means_q @ means_k.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
            ordered, order = p.sort(-1, descending=True)
            kept = torch.zeros_like(p, dtype=torch.bool)
            kept.scatter_(-1, order, (ordered.cumsum(-1) - ordered) < mass)
            kept |= torch.eye(kept.shape[-1], dtype=torch.bool, device=kept.device)
            mask = kept[:, :, index][..., index]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    return attend


class Trainer:
    """State of the second phase."""

    def __init__(self, args: argparse.Namespace, size: parts.Size, device: torch.device, vae: Any):
        self.args, self.size, self.device, self.vae = args, size, device, vae
        torch.manual_seed(2)
        self.model: Any = nn.ModuleDict(
            {
                "transformer": parts.build_transformer(size, args.qk_gain),
                "text": parts.build_text_encoder(size),
            }
        ).to(device)
        self.resumed = args.resume is not None and (args.resume / "model.safetensors").exists()
        if self.resumed:
            weights = load_file(args.resume / "model.safetensors")
            self.model.load_state_dict({name: value.float() for name, value in weights.items()})
        self.average = {name: p.detach().clone() for name, p in self.model.state_dict().items()}
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
            lr=args.lr,
            betas=(0.9, 0.98),
            fused=device.type == "cuda",
        )
        self.exclude = grammar.heldout_pairs()
        seed = 100 + args.seed
        self.cpu, self.gpu = torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed)
        self.block_step: Callable = parts.block_forward
        self.enter(Stage(size.frames, args.batch, 1.0))

    def enter(self, stage: Stage) -> None:
        """Go on with clips of another length."""
        self.stage = stage
        self.size = replace(self.size, frames=stage.frames)
        self.one_hot = F.one_hot(parts.tile_index(self.size.grid, self.device)).float()
        self.tiles = top_p_tiles(self.size.grid, self.device, self.args.drop_top_p)

    def rows(self) -> parts.RowSample:
        """A random box of query tokens of one tile's size, anywhere in the grid."""
        box = [min(n, t) for n, t in zip(self.size.grid, parts.TILE, strict=True)]
        start = [
            int(torch.randint(n - t + 1, (), generator=self.cpu)) for n, t in zip(self.size.grid, box, strict=True)
        ]
        f, h, w = (torch.arange(s, s + t) for s, t in zip(start, box, strict=True))
        _, height, width = self.size.grid
        rows = ((f[:, None, None] * height + h[:, None]) * width + w).flatten()
        return parts.RowSample(rows.to(self.device, non_blocking=True), self.one_hot, self.args.entropy_clips)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Normalised latents `[B, C, F, H, W]` and token ids `[B, 40]`; some captions are empty."""
        scenes = grammar.sample(self.stage.batch, self.cpu, self.exclude)
        silent = (torch.rand(self.stage.batch, generator=self.cpu) < 0.12).tolist()
        ids = grammar.encode(["" if mute else grammar.caption(scenes, i) for i, mute in enumerate(silent)])
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.vae_half):
            video = data.render(
                scenes, self.device, self.gpu, self.size.frames, self.size.side, window(self.size.frames, self.cpu)
            )
            latents, _ = parts.encode_clip(self.vae, video)
        centre, scale = latent_scale(self.vae)
        return (latents.float() - centre) / scale, ids.to(self.device, non_blocking=True)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.half)

    def step(self, share: float, sparse: bool = False, text_length: int = LONG_TEXT) -> tuple[Tensor, Tensor, Tensor]:
        """One update; returns flow loss and the two mean entropies as tensors, so that nothing waits."""
        latents, ids = self.batch()
        if sparse:  # a mask per head and clip: half the batch, to bound memory
            latents, ids = latents[: len(latents) // 2], ids[: len(ids) // 2]
        u = torch.sigmoid(torch.randn(len(latents), generator=self.gpu, device=self.device))
        sigma = (2 * u / (1 + u)).view(-1, 1, 1, 1, 1)  # logit-normal, shifted by 2 towards noise
        noise = torch.randn(latents.shape, generator=self.gpu, device=self.device)
        with self.autocast():
            text = parts.encode_text(self.model["text"], ids, text_length)
            mixed = (1 - sigma) * latents + sigma * noise
            velocity, tokens, tiles = parts.predict(
                self.model["transformer"],
                mixed,
                sigma.flatten(),
                text,
                self.tiles if sparse else parts.dense,
                None if sparse else self.rows(),
                parts.block_forward if sparse else self.block_step,
            )
        flow = F.mse_loss(velocity.float(), noise - latents)
        loss = flow
        if not sparse:
            ramp = min(max((share - 0.05) / 0.25, 0.0), 1.0) if not self.resumed else 1.0
            args = self.args
            excess = args.token_weight * F.relu(tokens - args.token_nats).mean()
            excess = excess + args.tile_weight * F.relu(tiles - args.tile_nats).mean()
            loss = flow + ramp * excess
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(share, self.args.lr)
        self.optimizer.step()
        return flow.detach(), tokens.detach().mean(), tiles.detach().mean()

    def update_average(self, step: int) -> None:
        decay = min(self.args.average, (1 + step) / (10 + step))
        ours, new = list(self.average.values()), [p.detach() for p in self.model.state_dict().values()]
        torch._foreach_lerp_(ours, new, 1 - decay)

    def warm_up(self) -> None:
        """Try what may not work on a machine (compiling, masked attention of this size) before it matters."""
        if self.args.compile:
            start = time.monotonic()
            self.block_step = torch.compile(parts.block_forward, dynamic=False)
            try:
                for length in (LONG_TEXT, SHORT_TEXT, LONG_TEXT):
                    self.step(0.0, text_length=length)
            except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
                print("no compiling:", type(error).__name__, str(error)[:500])
                self.block_step = parts.block_forward
                torch._dynamo.reset()
            print(f"compile and first steps {time.monotonic() - start:.0f}s")
        if self.args.drop_share:
            try:
                self.step(0.0, sparse=True)
            except RuntimeError as error:  # out of memory is one of these
                print("no sparse steps:", str(error)[:500])
                self.args.drop_share = 0.0
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")

    def checkpoint(self) -> None:
        save(self.average, self.args.out / "model.safetensors")

    def run(self, seconds: float, log: dict) -> None:
        begin, full = time.monotonic(), self.size
        self.warm_up()
        clock, step, clips, saved = Clock(seconds - (time.monotonic() - begin)), 0, 0, 0.0
        plan = self.args.stages or [self.stage]
        log["stages"] = []
        losses: list[tuple[Tensor, Tensor, Tensor]] = []
        log["history"] = history = []
        while clock.share < 1 and step < self.args.max_steps:
            share = clock.share
            stage = next((s for s in plan if share < s.until), plan[-1])
            if stage != self.stage or not log["stages"]:
                self.enter(stage)
                log["stages"].append({"frames": stage.frames, "batch": stage.batch, "from_step": step})
                losses.clear()
            drawn = torch.rand(2, generator=self.cpu).tolist()
            sparse = share > self.args.drop_from and drawn[0] < self.args.drop_share
            result = self.step(share, sparse, LONG_TEXT if drawn[1] < self.args.long_text else SHORT_TEXT)
            self.update_average(step)
            if not sparse:
                losses.append(result)
            step += 1
            clips += stage.batch
            if step % self.args.log_every == 0 and losses:
                flow, tokens, tiles = (float(torch.stack(x).mean()) for x in zip(*losses, strict=True))
                elapsed = time.monotonic() - clock.start
                history.append([step, round(elapsed), round(flow, 5), round(tokens, 3), round(tiles, 3)])
                print(
                    f"step {step} {elapsed:.0f}s frames {stage.frames} loss {flow:.4f} "
                    f"entropy {tokens:.2f} tiles {tiles:.2f}",
                    flush=True,
                )
                losses.clear()
                if elapsed - saved > 100:
                    saved = elapsed
                    self.checkpoint()
                    (self.args.out / "log.json").write_text(json.dumps(log))
        log["steps"], log["clips"] = step, clips
        self.size = full
        self.checkpoint()

    @torch.no_grad()
    def finish(self) -> None:
        """Samples of held-out prompts, and how sharp the attention became, with the averaged weights."""
        self.model.load_state_dict(self.average)
        entries = grammar.heldout()
        prompts = [entry["prompt"] for entry in entries][: self.args.sheet]
        noise = torch.stack(
            [
                torch.randn(self.size.channels, *self.size.grid, generator=torch.Generator().manual_seed(e["seed"]))
                for e in entries[: len(prompts)]
            ]
        ).to(self.device)
        centre, scale = latent_scale(self.vae)
        text = parts.encode_text(self.model["text"], grammar.encode(prompts).to(self.device), LONG_TEXT)
        silence = parts.encode_text(self.model["text"], grammar.encode([""]).to(self.device), LONG_TEXT)
        silence = silence.expand(len(text), -1, -1)
        transformer = self.model["transformer"]
        latents = parts.sample_latents(transformer, text, silence, noise)
        videos = parts.decode_clip(self.vae, latents * scale + centre)
        Image.fromarray(data.contact_sheet(videos).numpy()).save(self.args.out / "samples.png")
        if not self.args.report:
            return
        few = slice(0, 2)
        report: dict = {"shares_for_90_percent": sharpness.shares(transformer, latents[few], text[few], self.size.grid)}
        for sigma, kinds in report["shares_for_90_percent"].items():
            print(
                "share for 90 % at",
                sigma,
                {k: round(float(torch.tensor(v).mean()), 3) for k, v in kinds.items()},
            )
        (self.args.out / "attention.json").write_text(json.dumps(report))
        report["budget"] = sharpness.budget_curve(
            transformer,
            self.vae,
            lambda z: z * scale + centre,
            text[few],
            silence[few],
            noise[few],
            self.size.grid,
        )
        (self.args.out / "attention.json").write_text(json.dumps(report))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.2, help="both phases together, reports not counted")
    parser.add_argument("--vae-minutes", type=float, default=1.4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--vae-batch", type=int, default=32)
    parser.add_argument(
        "--stages",
        type=stages,
        help="frames:batch:minutes,... e.g. 1:32:15,5:8:20,17:3:25; minutes are shares of --minutes",
    )
    parser.add_argument("--vae-crop", type=int, help="train the VAE on square crops of so many pixels")
    parser.add_argument("--vae-start", type=Path, help="folder whose VAE training goes on")
    parser.add_argument("--vae-frames", type=int, help="frames of the clips the VAE is trained on; default: all")
    parser.add_argument("--long-text", type=float, default=0.75, help="share of steps with text padded to 512")
    parser.add_argument("--average", type=float, default=0.999, help="decay of the averaged weights")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--half", action=argparse.BooleanOptionalAction, help="bf16 transformer; default: on a GPU")
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--qk-gain", type=float, default=1.5)
    parser.add_argument("--token-weight", type=float, default=0.01, help="weight of the row entropy above its bound")
    parser.add_argument("--token-nats", type=float, default=4.0)
    parser.add_argument("--tile-weight", type=float, default=0.02, help="weight of the tile entropy above its bound")
    parser.add_argument("--tile-nats", type=float, default=1.8)
    parser.add_argument("--entropy-clips", type=int, default=16)
    parser.add_argument("--drop-share", type=float, default=0.1, help="share of later steps with top-p tiles only")
    parser.add_argument("--drop-from", type=float, default=0.5)
    parser.add_argument("--drop-top-p", type=float, default=0.9)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--report", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--sheet", type=int, default=12, help="held-out prompts to sample at the end")
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to try the script on a CPU")
    return parser.parse_args()


def main() -> None:
    args, start = parse(), time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.half is None:
        args.half = device.type == "cuda"
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    size = parts.TOY if args.toy else parts.FULL
    torch.manual_seed(0)
    log: dict = {"arguments": {k: str(v) for k, v in vars(args).items()}, "torch": torch.__version__}
    log["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    args.vae_half = half_is_faster(size, device, args.vae_batch)
    cpu, gpu = torch.Generator().manual_seed(0), torch.Generator(device).manual_seed(0)
    clips = data.render(grammar.sample(8, cpu), device, gpu, size.frames, size.side)
    Image.fromarray(data.contact_sheet(clips).numpy()).save(args.out / "data.png")
    vae = train_vae(args, size, device, log)
    vae.requires_grad_(False)
    if args.resume:
        save(vae.state_dict(), args.out / "vae.safetensors")
    trainer = Trainer(args, size, device, vae)
    trainer.run(60 * args.minutes - (time.monotonic() - start), log)
    (args.out / "log.json").write_text(json.dumps(log))
    trainer.finish()
    print(f"{log['steps']} steps, {time.monotonic() - start:.0f}s in all")


if __name__ == "__main__":
    main()
