"""Noise and loss of masked diffusion language models, and the doubled sequence in which block-causal ones learn."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from hf_accel.errors import InvalidSetting

IGNORED = -100  # label of what is not part of the answer, as everywhere in transformers


class Noisy(NamedTuple):
    """A batch with tokens masked.

    Attributes:
        ids: int64 ``[B, S]``, the mask token where ``masked``.
        masked: bool ``[B, S]``.
        level: fp32 ``[B, S]``, probability with which each position was masked.
    """

    ids: torch.Tensor
    masked: torch.Tensor
    level: torch.Tensor


class Doubled(NamedTuple):
    """``[x_t ; x_0]``: noisy blocks and, behind them, the clean ones that they may look back at.

    Attributes:
        attention_mask: bool ``[B or 1, 1, 2S, 2S]``, True = attend.
        position_ids: int64 ``[B or 1, 2S]``, each position twice.
    """

    attention_mask: torch.Tensor
    position_ids: torch.Tensor


def answer_tokens(batch_ids: torch.Tensor, labels: torch.Tensor | None, valid: torch.Tensor | None) -> torch.Tensor:
    """bool ``[B, S]``: the tokens that are learned; without labels all that are no padding."""
    answer = torch.ones_like(batch_ids, dtype=torch.bool) if labels is None else labels != IGNORED
    return answer if valid is None else answer & valid.bool()


def mask_tokens(
    ids: torch.Tensor,
    answer: torch.Tensor,
    mask_token_id: int,
    generator: torch.Generator,
    *,
    level_min: float = 1e-3,
    block: int | None = None,
) -> Noisy:
    """Mask each token of the answer with probability ``t ~ U(level_min, 1)``.

    Args:
        ids: int64 ``[B, S]``.
        answer: bool ``[B, S]``; other tokens are never masked.
        mask_token_id: id of the mask token.
        generator: on the CPU; the result depends on nothing else.
        level_min: keeps ``1 / t`` finite.
        block: draw a ``t`` for every so many positions; None: one per sequence, as in LLaDA and RCD.
    """
    rows, length = ids.shape
    count = 1 if block is None else -(-length // block)
    level = level_min + (1 - level_min) * torch.rand(rows, count, generator=generator)
    level = level.repeat_interleave(length if block is None else block, 1)[:, :length]
    chosen = torch.rand(rows, length, generator=generator) < level
    masked = chosen.to(ids.device) & answer
    return Noisy(ids.masked_fill(masked, mask_token_id), masked, level.to(ids.device))


def denoising_loss(logits: torch.Tensor, ids: torch.Tensor, noisy: Noisy, answer: torch.Tensor) -> torch.Tensor:
    """``sum over masked of CE / t``, over the number of answer tokens in the batch. fp32 scalar.

    Args:
        logits: ``[B, S, V]``, row ``i`` the prediction of token ``i``.
        ids: the clean tokens.
        noisy: what was masked, at which level.
        answer: bool ``[B, S]``.
    """
    entropy = F.cross_entropy(logits[noisy.masked].float(), ids[noisy.masked], reduction="none")
    return (entropy / noisy.level[noisy.masked]).sum() / answer.sum().clamp_min(1)


def doubled(length: int, block: int, valid: torch.Tensor | None = None, device: torch.device | None = None) -> Doubled:
    """Mask and positions of the doubled sequence ``[x_t ; x_0]`` of block-causal training.

    A noisy position sees its own noisy block and all strictly earlier clean blocks; a clean one its own and all earlier
    clean blocks, and nothing noisy. So one forward has every block denoised behind its true prefix.

    Args:
        length: S, tokens of one half.
        block: tokens per block; with padding, blocks and positions are counted over real tokens.
        valid: ``[B, S]``, 0 or False hides padding. Padded positions see themselves alone, which keeps them finite.
        device: of the result, where ``valid`` is None.
    """
    if block < 1:
        raise InvalidSetting("rcd-training", "block_length", block, "an int >= 1")
    if valid is None:
        place = torch.arange(length, device=device)[None]
        seen = torch.ones_like(place, dtype=torch.bool)
    else:
        seen = valid.bool()
        place = (seen.cumsum(-1) - 1).clamp_min(0)
    number = place // block
    same, earlier = number[:, :, None] == number[:, None], number[:, :, None] > number[:, None]
    nothing = torch.zeros_like(same)
    mask = torch.cat([torch.cat([same, earlier], -1), torch.cat([nothing, same | earlier], -1)], -2)
    mask = mask & torch.cat([seen, seen], -1)[:, None]
    mask = mask | torch.eye(2 * length, dtype=torch.bool, device=mask.device)
    return Doubled(mask[:, None], torch.cat([place, place], -1))
