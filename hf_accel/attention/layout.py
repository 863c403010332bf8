"""Arithmetic on blocks of tokens: where they begin, what share of the pairs a map keeps, the mask it stands for;
and where a video stands in a sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_accel.attention.call import AttentionCall, Span


def offsets(sizes: torch.Tensor) -> torch.Tensor:
    """First sorted position of every block: ``sizes`` int ``[..., C]`` -> same dtype, same shape."""
    return sizes.cumsum(-1, dtype=sizes.dtype) - sizes


def density(block_map: torch.Tensor, query_sizes: torch.Tensor, key_sizes: torch.Tensor) -> torch.Tensor:
    """Share of the query-key pairs that a map keeps, per head.

    Args:
        block_map: bool ``[B, H, Cq, Ck]``.
        query_sizes, key_sizes: int ``[B, H, Cq]`` and ``[B, H, Ck]``.

    Returns:
        fp32 ``[B, H]``, in ``[0, 1]``; 0 where there are no pairs. Pairs are counted exactly, in int64.
    """
    kept_keys = torch.where(block_map, key_sizes.int()[..., None, :], 0).sum(-1)  # torch sums int32 in int64
    kept = (kept_keys * query_sizes.long()).sum(-1)
    pairs = query_sizes.sum(-1) * key_sizes.sum(-1)
    return kept / pairs.clamp(min=1)


def expand_block_map(block_map: torch.Tensor, query_labels: torch.Tensor, key_labels: torch.Tensor) -> torch.Tensor:
    """The token mask that a block map stands for: ``mask[.., i, j] = map[.., query_labels[i], key_labels[j]]``.

    It is quadratic in the length: an oracle for tests, no part of a fast path.

    Args:
        block_map: bool ``[B, H, Cq, Ck]``.
        query_labels, key_labels: int ``[B, H, Sq]`` and ``[B, H, Sk]``, the block of every token.

    Returns:
        bool ``[B, H, Sq, Sk]``.
    """
    queries, keys = query_labels.long(), key_labels.long()
    rows = block_map.gather(2, queries[..., None].expand(*queries.shape, block_map.shape[-1]))
    return rows.gather(3, keys[..., None, :].expand(*queries.shape, keys.shape[-1]))


def block_sizes(sequence: int, block_size: int) -> torch.Tensor:
    """Tokens in each block when a sequence is cut into equal blocks: int64 ``[ceil(sequence / block_size)]``, the
    last one ragged."""
    return (sequence - torch.arange(0, sequence, block_size)).clamp(max=block_size)


def blocks_touching(start: int, stop: int, sequence: int, block_size: int) -> torch.Tensor:
    """Which blocks of a sequence hold a token of ``[start, stop)``: bool ``[ceil(sequence / block_size)]``."""
    first = torch.arange(0, sequence, block_size)
    return (first < stop) & (first + block_size > start) & (start < stop)


def text_blocks(span: Span | None, sequence: int, block_size: int) -> torch.Tensor:
    """Which blocks of a sequence hold a token that is not of ``span``, the video or the image: bool
    ``[ceil(sequence / block_size)]``. None of them where the span is not known."""
    start, stop = (0, sequence) if span is None else span
    return blocks_touching(0, start, sequence, block_size) | blocks_touching(stop, sequence, sequence, block_size)


@dataclass(frozen=True)
class VideoLayout:
    """Where the video stands in a sequence, frame by frame; what is before and behind it is text.

    Attributes:
        frames, frame_tokens: size of the video.
        start: its first token.
        sequence: length of the whole sequence.
    """

    frames: int
    frame_tokens: int
    start: int
    sequence: int

    @classmethod
    def of(cls, call: AttentionCall) -> VideoLayout:
        """The layout of a self-attention call.

        Raises:
            ValueError: the call has no token grid, or one that disagrees with its length, or its tokens do not stand
                frame by frame.
        """
        if call.order is not None:
            raise ValueError("the tokens do not stand frame by frame")
        grid, sequence = call.grid, call.query.shape[2]
        span = grid.video_span(sequence) if grid is not None else None
        if grid is None or span is None:
            raise ValueError(f"{sequence} tokens disagree with the grid {grid}")
        return cls(grid.frames, grid.height * grid.width, span[0], sequence)

    @property
    def stop(self) -> int:
        """The first token behind the video."""
        return self.start + self.frames * self.frame_tokens

    @property
    def text_tokens(self) -> int:
        """Tokens of the sequence that are no video."""
        return self.sequence - self.frames * self.frame_tokens

    def blocks_touching(self, start: int, stop: int, block_size: int) -> torch.Tensor:
        """Which blocks hold a token of ``[start, stop)``: bool ``[ceil(sequence / block_size)]``."""
        return blocks_touching(start, stop, self.sequence, block_size)

    def text_blocks(self, block_size: int) -> torch.Tensor:
        """Which blocks hold text: bool ``[ceil(sequence / block_size)]``."""
        return text_blocks((self.start, self.stop), self.sequence, block_size)

    def token_major_order(self) -> torch.Tensor:
        """The order that brings the same place of all frames together: ``x[order]`` is ``x`` token-major.

        Place p of frame f stands at ``start + f * frame_tokens + p``, and token-major at ``start + p * frames + f``.
        Text stays where it is. int32 ``[sequence]``; for the way back see :func:`inverse_order`.
        """
        order = torch.arange(self.sequence, dtype=torch.int32)
        video = order[self.start : self.stop].view(self.frames, self.frame_tokens)
        return torch.cat([order[: self.start], video.T.flatten(), order[self.stop :]])


def inverse_order(order: torch.Tensor) -> torch.Tensor:
    """``inverse[order[r]] = r`` for a permutation ``order`` int ``[S]``."""
    return torch.empty_like(order).scatter_(0, order.long(), torch.arange(len(order), dtype=order.dtype))


def expand_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """``[B, Hkv, S, D]`` as ``[B, H, S, D]``; a copy only under grouped-query attention."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
