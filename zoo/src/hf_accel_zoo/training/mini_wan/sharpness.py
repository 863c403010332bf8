"""How sparse the attention of a trained `mini-wan` is, and what leaving pairs out costs.

Two questions, asked without any method of hf_accel: which share of the keys holds 90 % of a row's mass, per
layer and head; and how far a sampling strays from the dense one (PSNR, same noise) when each row keeps its
true top-p tokens, its true top-p tiles, or what k-means clusters of queries and keys suggest (SVG2's idea).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .model import Attend, Transformer, Vae, decode_clip, dense, predict, sample_latents, tile_index

MASSES = {"clusters": (0.8, 0.9, 0.95), "tokens": (0.9,), "tiles": (0.9,)}
BLOCK = 64  # tokens, in raster order: the block of a method that does not permute


def _kept_share(p: Tensor, mass: float) -> Tensor:
    """Share of the entries of each row of `p` `[..., N]` needed for `mass`, averaged over rows: `[...]`."""
    ordered = p.sort(-1, descending=True).values
    return ((ordered.cumsum(-1) - ordered) < mass).float().mean((-1, -2))


def _pool(p: Tensor, index: Tensor) -> Tensor:
    """Sum of the key columns of `p` `[..., S]` by `index` `[S]`."""
    out = p.new_zeros(*p.shape[:-1], int(index.max()) + 1)
    return out.index_add_(-1, index, p)


def _pool_both(p: Tensor, index: Tensor) -> Tensor:
    """Attention mass from query group to key group `[..., G, G]`; rows sum to 1."""
    rows = _pool(p.transpose(-1, -2), index)
    counts = torch.bincount(index).to(p.dtype)
    return _pool((rows / counts).transpose(-1, -2), index)


@torch.no_grad()
def shares(
    model: Transformer, latents: Tensor, text: Tensor, grid: tuple[int, int, int], mass: float = 0.9
) -> dict[str, dict[str, list[list[float]]]]:
    """Share of tokens, raster blocks and 3-D tiles for `mass`, by sigma, layer and head."""
    tiles = tile_index(grid, latents.device)
    blocks = torch.arange(tiles.numel(), device=latents.device) // BLOCK
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents)
    report: dict[str, dict[str, list[list[float]]]] = {}
    for sigma in (0.3, 0.5, 0.8):
        found: dict[str, list[list[float]]] = {"tokens": [], "blocks": [], "tiles": []}

        def look(query: Tensor, key: Tensor, value: Tensor, found: dict = found) -> Tensor:
            p = ((query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5).softmax(-1)
            for name, pooled in (
                ("tokens", p),
                ("blocks", _pool_both(p, blocks)),
                ("tiles", _pool_both(p, tiles)),
            ):
                found[name].append([round(x, 4) for x in _kept_share(pooled, mass).mean(0).tolist()])
            return dense(query, key, value)

        mixed = (1 - sigma) * latents + sigma * noise
        predict(model, mixed, torch.full((len(latents),), sigma, device=latents.device), text, look)
        report[str(sigma)] = found
    return report


def _top_p(p: Tensor, mass: float) -> Tensor:
    """Boolean mask of the entries of each row kept in descending order until `mass` is covered."""
    ordered, order = p.sort(-1, descending=True)
    kept = (ordered.cumsum(-1) - ordered) < mass
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def _clusters(x: Tensor, count: int, rounds: int = 10) -> tuple[Tensor, Tensor]:
    """Lloyd k-means of `x` `[..., S, D]`: centroids `[..., count, D]` and labels `[..., S]`."""
    x = x.float()
    start = torch.linspace(0, x.shape[-2] - 1, count, device=x.device).long()
    centroids = x[..., start, :]
    for _ in range(rounds):
        labels = (centroids.square().sum(-1)[..., None, :] - 2 * x @ centroids.transpose(-1, -2)).argmin(-1)
        one_hot = torch.nn.functional.one_hot(labels, count).to(x.dtype)
        sizes = one_hot.sum(-2)[..., None]
        means = (one_hot.transpose(-1, -2) @ x) / sizes.clamp(min=1)
        centroids = torch.where(sizes > 0, means, centroids)
    labels = (centroids.square().sum(-1)[..., None, :] - 2 * x @ centroids.transpose(-1, -2)).argmin(-1)
    return centroids, labels


class Selected:
    """Attention over selected pairs only; `densities` collects the share of pairs kept by each call."""

    def __init__(self, kind: str, mass: float, grid: tuple[int, int, int], device: torch.device | str):
        self.kind, self.mass = kind, mass
        self.tiles = tile_index(grid, device)
        self.densities: list[Tensor] = []

    def mask(self, query: Tensor, key: Tensor) -> Tensor:
        """`[B, H, S, S]` bool: the pairs to keep."""
        scale = query.shape[-1] ** -0.5
        if self.kind == "clusters":
            tokens = key.shape[-2]
            query_centres, query_label = _clusters(query, max(tokens // 72, 2))
            key_centres, key_label = _clusters(key, max(tokens // 24, 2))
            sizes = torch.nn.functional.one_hot(key_label, key_centres.shape[-2]).sum(-2).float()
            logits = query_centres @ key_centres.transpose(-1, -2) * scale + sizes.log()[..., None, :]
            kept = _top_p(logits.softmax(-1), self.mass)  # an empty cluster has log 0 and weight 0
            kept = kept.gather(-2, query_label[..., None].expand(*query_label.shape, kept.shape[-1]))
            return kept.gather(-1, key_label[..., None, :].expand(*query_label.shape, tokens))
        p = ((query @ key.transpose(-1, -2)).float() * scale).softmax(-1)
        if self.kind == "tokens":
            return _top_p(p, self.mass)
        kept = _top_p(_pool_both(p, self.tiles), self.mass)
        return kept[..., self.tiles, :][..., self.tiles]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        outs = []
        for one in range(len(query)):  # one clip at a time: the masks are quadratic
            mask = self.mask(query[one : one + 1], key[one : one + 1])
            self.densities.append(mask.float().mean())
            logits = (query[one : one + 1] @ key[one : one + 1].transpose(-1, -2)).float()
            logits = (logits * query.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
            outs.append(logits.softmax(-1).to(value.dtype) @ value[one : one + 1])
        return torch.cat(outs)


def psnr(video: Tensor, reference: Tensor) -> Tensor:
    """Decibels per clip `[B]`, of videos `[B, 3, F, H, W]` in -1..1."""
    error = ((video.clamp(-1, 1) - reference.clamp(-1, 1)) / 2).float().square().mean((1, 2, 3, 4))
    return -10 * error.clamp(min=1e-12).log10()


@torch.no_grad()
def budget_curve(
    model: Transformer,
    vae: Vae,
    decode_scale: Callable[[Tensor], Tensor],
    text: Tensor,
    no_text: Tensor,
    noise: Tensor,
    grid: tuple[int, int, int],
    steps: int = 20,
    masses: dict[str, tuple[float, ...]] | None = None,
    dense_steps: int = 4,
) -> list[dict]:
    """PSNR against dense and density, for each kind and top-p mass; the first `dense_steps` steps stay dense.

    `vae` must be :func:`model.over_whole_clips`; `decode_scale` undoes the normalisation of latents.
    """

    def video(attend: Callable[[int], Attend]) -> Tensor:
        latents = sample_latents(model, text, no_text, noise, steps, attend=attend)
        return decode_clip(vae, decode_scale(latents))

    reference = video(lambda step: dense)
    rows = []
    for kind, tried in (masses or MASSES).items():
        for mass in tried:
            selected = Selected(kind, mass, grid, noise.device)
            schedule = [dense] * dense_steps + [selected] * (steps - dense_steps)
            result = psnr(video(schedule.__getitem__), reference)
            rows.append(
                {
                    "kind": kind,
                    "top_p": mass,
                    "density": round(float(torch.stack(selected.densities).mean()), 4),
                    "psnr_mean": round(float(result.mean()), 2),
                    "psnr_worst": round(float(result.min()), 2),
                }
            )
            print(rows[-1], flush=True)
    return rows
