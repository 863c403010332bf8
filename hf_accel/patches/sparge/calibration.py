"""Thresholds of single heads from what attention really saw.

The paper tunes a head by bisection, input after input, for a day and more. Here every probed call is replayed at a grid
of thresholds at once, on a sample of its query blocks, and only the curves are kept: error and density of each head
over the grid. Fitting is a walk over curves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hf_accel.attention.call import AttentionCall
from hf_accel.patches.sparge.thresholds import HeadSettings

if TYPE_CHECKING:
    from hf_accel.patches.sparge import Sparge

MASSES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98, 0.99, 1.0)
SHARES = (0.03, 0.06, 0.1, 0.14, 0.18, 0.22, 0.26, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# Thresholds that are tried: (budget, similarity bar), with at least one point at which everything is kept. In topk mode
# the bar stays out of play, as the authors have it.
GRIDS: dict[str, tuple[tuple[float, float], ...]] = {
    "cdf": tuple((mass, bar) for bar in (-1.0, 0.3, 0.6) for mass in MASSES),
    "topk": tuple((share, -1.0) for share in SHARES),
}
SAMPLED_BLOCKS = 24
# A head that keeps more than this gains nothing: it runs dense (0.9 in the paper).
MOST_DENSITY = 0.9


@dataclass(frozen=True)
class Curves:
    """Of one call.

    Attributes:
        mode: whose grid it is, of :data:`GRIDS`.
        density: fp32 ``[points, H]`` on the CPU.
        error: likewise, relative L1 error of a head, ``sum|O - O'| / sum|O|`` against exact attention; 0 where every
            head keeps more than :data:`MOST_DENSITY`.
        loss: likewise, a head's part in the relative squared error of the layer, ``sum (O - O')^2`` of the head over
            ``sum O^2`` of all heads.
    """

    mode: str
    density: torch.Tensor
    error: torch.Tensor
    loss: torch.Tensor


def measure(method: Sparge, call: AttentionCall) -> Curves:
    """Replay a call at every threshold. The arithmetic is the method's, the reference is exact."""
    plan, config = method.plan(call), method.config
    tokens = method.tokens(call, plan)
    seen = method.predict(tokens, plan)
    blocks, places = _sample(tokens.query.shape[2], config.block_q, call)
    sampled = dataclasses.replace(tokens, query=tokens.query.index_select(2, places))
    everything = seen.visible.expand(seen.scores.shape)[:, :, blocks]
    exact = method.attend_blocks(sampled, everything).float()
    size, energy = (exact.abs().pow(power).sum((0, 2, 3)).clamp(min=1e-12) for power in (1, 2))
    densities, errors, losses = [], [], []
    for budget, bar in GRIDS[config.mode]:
        keep = method.choose(seen, plan, HeadSettings(config.mode, budget, bar, None))
        density = method.density(keep, plan, tokens.valid).mean(0)
        error = loss = torch.zeros_like(density)
        if bool((density <= MOST_DENSITY).any()):  # else all heads would run dense: nothing to compute
            out = method.attend_blocks(sampled, keep[:, :, blocks], config.pvthreshd, config.numerics)
            apart = (out.float() - exact).abs()
            error = apart.sum((0, 2, 3)) / size
            loss = apart.square().sum((0, 2, 3)) / energy.sum()
        densities.append(density)
        errors.append(error)
        losses.append(loss)
    return Curves(config.mode, *(torch.stack(curve).cpu() for curve in (densities, errors, losses)))


def _sample(queries: int, block: int, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Query blocks spread over the sequence, and the places of their tokens.

    A causal mask counts queries from the end of the keys, so that they cannot be taken out of their row: then all.
    """
    device = call.query.device
    full = queries // block
    if call.causal or full <= SAMPLED_BLOCKS:
        return torch.arange(-(-queries // block), device=device), torch.arange(queries, device=device)
    blocks = ((torch.arange(SAMPLED_BLOCKS, device=device) + 0.5) * full / SAMPLED_BLOCKS).long()
    return blocks, (blocks[:, None] * block + torch.arange(block, device=device)).flatten()


def fit(
    records: Mapping[int, Sequence[Curves]], heads: Sequence[int], *, l1: float | None, density: float | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Per head a budget and a similarity bar.

    With ``l1``, as in the paper: the least density at which the head's error is within the bound on every sample. With
    ``density``: every layer gets the mean density asked for, and its heads share it so that the squared error of the
    layer is least. Shares are not moved between layers: nothing that is seen here says which layer matters more. On
    mini-wan that, and one bound of the relative error for all heads, was worse than equal shares.

    Args:
        records: layer -> curves of its calls; a layer that is absent stays dense.
        heads: number of heads of every layer.

    Returns:
        settings and evidence: the density expected, mean and worst relative error of the heads that are sparse, the
        mean loss of a layer, and how many heads stay dense.
    """
    widths = [heads[layer] for layer in records]
    samples = list(records.values())
    # Layers may differ in their number of heads: side by side they are one long row.
    cost = torch.cat([torch.stack([c.density for c in curves]).mean(0) for curves in samples], 1)
    error = torch.cat([torch.stack([c.error for c in curves]).amax(0) for curves in samples], 1)
    loss = torch.cat([torch.stack([c.loss for c in curves]).mean(0) for curves in samples], 1)
    # What keeps nearly all runs dense: it costs all and loses nothing.
    dense = cost > MOST_DENSITY
    cost, error, loss = cost.masked_fill(dense, 1.0), error.masked_fill(dense, 0.0), loss.masked_fill(dense, 0.0)
    if l1 is not None:
        choice = cost.masked_fill(error > l1, float("inf")).argmin(0)
    else:
        wanted = density if density is not None else 1.0
        layers = zip(loss.split(widths, 1), cost.split(widths, 1), strict=True)
        choice = torch.cat([_least_loss(*layer, wanted) for layer in layers])
    reached, found, lost = (x.gather(0, choice[None])[0] for x in (cost, error, loss))
    sparse = ~dense.gather(0, choice[None])[0]
    rows = dict(zip(records, zip(choice.split(widths), sparse.split(widths), strict=True), strict=True))
    mode = samples[0][0].mode
    budgets, bars = zip(*GRIDS[mode], strict=True)
    name = "cdfthreshd" if mode == "cdf" else "topk"
    table: dict[str, list[list[Any]]] = {name: [], "simthreshd1": [], "is_sparse": []}
    for layer, count in enumerate(heads):
        chosen, flags = rows[layer] if layer in rows else (torch.zeros(count).long(), torch.zeros(count).bool())
        columns = ([budgets[i] for i in chosen.tolist()], [bars[i] for i in chosen.tolist()], flags.tolist())
        for key, column in zip(table, columns, strict=True):
            table[key].append(column)
    evidence = {
        "density": float(reached.mean()),
        "l1_mean": float(found[sparse].mean()) if bool(sparse.any()) else 0.0,
        "l1_worst": float(found.max()),
        "layer_loss": float(lost.sum()) / len(widths),
        "sparse_heads": int(sparse.sum()),
        "dense_heads": int((~sparse).sum()),
    }
    return {"mode": mode, "density": None, "thresholds": table}, evidence


def _least_loss(loss: torch.Tensor, cost: torch.Tensor, wanted: float) -> torch.Tensor:
    """Per head, of ``[points, heads]``, the points that make the sum of losses small at a mean cost of ``wanted``.

    A price on density is raised until the heads, each by itself, buy no more than there is. Heads are few and points
    far between, so that some is left over: it goes, step by step, where it saves most.
    """
    low, high = 1e-12, 1e6
    best = (loss + high * cost).argmin(0)
    for _ in range(100):
        price = (low * high) ** 0.5
        choice = (loss + price * cost).argmin(0)
        if float(cost.gather(0, choice[None]).mean()) <= wanted + 1e-6:
            high, best = price, choice
        else:
            low = price
    left = wanted * cost.shape[1] - float(cost.gather(0, best[None]).sum()) + 1e-6
    while True:
        more = cost - cost.gather(0, best[None])
        saves = loss.gather(0, best[None]) - loss
        worth = torch.where((more > 0) & (more <= left), saves / more.clamp(min=1e-9), float("-inf"))
        point, head = divmod(int(worth.argmax()), cost.shape[1])
        if not worth[point, head] > 0:
            return best
        left -= float(more[point, head])
        best[head] = point
