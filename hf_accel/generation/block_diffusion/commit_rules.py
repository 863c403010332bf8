"""Which tokens of a block-diffusion step are drawn, and which of them stay.

A denoising step has logits for every position of the active block. :func:`propose` draws one candidate per position and
says how sure the model is of it; :func:`commit` picks the open positions whose candidates stay. Both are plain tensor
code over ``[B, b]``: nothing here waits for the device.

Confidence is the probability of the candidate: under the model's own distribution if greedy, under the one that was
drawn from (temperature, top-k, top-p) if sampled, as SDAR's (arXiv 2510.06303) released sampler has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from hf_accel.kernels.soft_embedding import entropy_lse

Rule = Literal["dynamic", "static", "sequential", "threshold", "entropy"]
RULES: tuple[str, ...] = get_args(Rule)

# What the rules were published with: SDAR, Fast-dLLM (arXiv 2505.22618), DiffusionGemma. The others have none.
DEFAULT_THRESHOLD: dict[str, float] = {"dynamic": 0.85, "threshold": 0.9, "entropy": 0.1}


class Proposal(NamedTuple):
    """Candidates of one step.

    Attributes:
        token: int64 ``[B, b]``.
        confidence: float32 ``[B, b]``, probability of the candidate.
        entropy: float32 ``[B, b]``, nats, of the distribution the candidate comes from; None unless asked for.
    """

    token: Tensor
    confidence: Tensor
    entropy: Tensor | None


def even_split(length: int, steps: int) -> list[int]:
    """``length`` tokens over ``steps`` steps, the remainder in the first of them."""
    least, remainder = divmod(length, steps)
    return [least + (step < remainder) for step in range(steps)]


def propose(
    logits: Tensor,
    *,
    banned: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    streams: Sequence[torch.Generator | None] = (),
    entropy: bool = False,
) -> Proposal:
    """One candidate token per position.

    Args:
        logits: ``[B, b, V]``; not written (others may have captured them).
        banned: id that is never drawn: a mask token committed as text would stay open for ever.
        temperature: 0 takes the most probable token; ``top_k`` and ``top_p`` then change nothing.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the most probable tokens until their probabilities, at this temperature, reach this sum.
        streams: one generator per row if ``temperature > 0``, on the device of the logits. A row whose stream is None
            is not drawn (it gets its most probable token): its block is finished.
        entropy: whether the rule wants it.
    """
    if banned is not None:
        logits = logits.clone()
        logits[..., banned] = -torch.inf
    if temperature == 0:
        found = entropy_lse(logits.float() if logits.dtype == torch.float64 else logits)
        confidence = (found.top_logit - found.lse).exp()
        return Proposal(found.top_index, confidence, found.entropy if entropy else None)
    logits = logits.float()
    # Against the row's maximum: a small temperature must not push the logits out of float's range.
    log_p = _keep_top((logits - logits.amax(-1, keepdim=True)) / temperature, top_k, top_p).log_softmax(-1)
    noise = torch.ones_like(log_p)
    for row, stream in zip(noise, streams, strict=True):
        if stream is not None:
            row.exponential_(generator=stream)
    # argmax of p/E with E ~ Exp(1) draws from p (exponential race), with one stream per row and no prefix sums over V.
    token = (log_p - noise.clamp_min(torch.finfo(noise.dtype).tiny).log()).argmax(-1)
    confidence = log_p.gather(-1, token[..., None])[..., 0].exp()
    return Proposal(token, confidence, torch.special.entr(log_p.exp()).sum(-1) if entropy else None)


def commit(
    rule: str,
    open_: Tensor,
    confidence: Tensor,
    *,
    count: int,
    threshold: float = 1.0,
    entropy: Tensor | None = None,
) -> Tensor:
    """The open positions whose candidates stay: bool ``[B, b]``.

    Every rule commits at least ``count`` positions of a row, or all that are open: with ``count`` from
    :func:`even_split` a block is done after its steps at the latest. On top of that,

    * ``static``: nothing (low-confidence remasking: the ``count`` most confident);
    * ``sequential``: nothing (the ``count`` leftmost);
    * ``dynamic``: all with confidence > ``threshold`` (SDAR);
    * ``threshold``: all with confidence >= ``threshold`` (Fast-dLLM, for which ``count`` is 1);
    * ``entropy``: in order of rising entropy, those before which less than or exactly ``threshold`` nats were summed
      up (entropy bound, arXiv 2505.24857, for which ``count`` is 1).

    Of equally good positions the leftmost goes first, on every device and in every batch: the confidences of a trained
    model are often exactly 1.

    Args:
        open_: bool ``[B, b]``, the positions that still hold the mask token.
        confidence: ``[B, b]``.
        entropy: ``[B, b]`` nats; only for ``rule="entropy"``.
    """
    if rule == "sequential":
        return open_ & (open_.cumsum(-1) <= count)
    if rule == "entropy" and entropy is not None:
        # Not-a-number counts as least sure, but before what is closed: every step must commit something.
        closed_last = torch.where(open_, entropy.clamp_min(0).nan_to_num(torch.finfo(entropy.dtype).max), torch.inf)
        ascending, order = closed_last.sort(dim=-1, stable=True)
        # The sum before a position; taken by difference it would be inf - inf behind the open ones.
        before = torch.nn.functional.pad(ascending.cumsum(-1)[:, :-1], (1, 0))
        taken = (before <= threshold) | (torch.arange(order.shape[-1], device=order.device) < count)
        return open_ & torch.zeros_like(open_).scatter(-1, order, taken)
    order = torch.where(open_, confidence.nan_to_num(0.0), -torch.inf).argsort(dim=-1, descending=True, stable=True)
    best = torch.zeros_like(open_).scatter(-1, order[:, :count], True)
    if rule == "dynamic":
        best = best | (confidence > threshold)
    elif rule == "threshold":
        best = best | (confidence >= threshold)
    return open_ & best


def _keep_top(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """``scores`` ``[..., V]`` with -inf for what top-k, then top-p, leave out; the most probable token always stays."""
    if 0 < top_k < scores.shape[-1]:
        least = scores.topk(top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if top_p < 1:
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p
        beyond[..., 0] = False
        scores = scores.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return scores
