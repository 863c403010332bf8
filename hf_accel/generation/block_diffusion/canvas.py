"""The rows of a batch laid out in blocks, for block-causal generation.

Rows of a batch count their blocks from their own first token. In this layout their *active* blocks align::

    [ padding, whole blocks | whole prompt blocks | rest of the prompt, mask tokens | mask tokens | ... ]
                                                  ^ start

so one cache of one length serves all rows, and every row sees what it would see alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """``ids`` ``[B, L]`` as given, padded in front, and the number of real tokens at the end of each row."""

    ids: Tensor
    lengths: list[int]


class Canvas:
    """The batch while it is being written. "Slot" is a place in the layout, "position" what the model counts.

    Args:
        prompt: padded in front.
        block: tokens per block.
        max_new_tokens: per row.
        mask_token: marks what is still to be written.
        pad: what stands in front of shorter rows and behind their ends; 0 where the model has none.
        stops: ids after which a row is finished.
        device: where the model takes its input.

    Attributes:
        start: slot of the first active block, a multiple of ``block``.
        blocks: number of blocks the longest row may need.
        rows: numbers of the prompt's rows that are still being written.
    """

    def __init__(
        self,
        prompt: Prompt,
        block: int,
        max_new_tokens: int,
        mask_token: int,
        pad: int,
        stops: list[int],
        device: torch.device,
    ):
        self._block, self._mask_token, self._pad = block, mask_token, pad
        self._prompt = prompt.ids.to(device)
        self._stops = torch.tensor(stops, dtype=torch.int64, device=device)
        heads = [length % block for length in prompt.lengths]
        whole = [length - head for length, head in zip(prompt.lengths, heads, strict=True)]
        self.start = max(whole)
        self.blocks = max(-(-(head + max_new_tokens) // block) for head in heads)
        self.rows = list(range(len(heads)))
        # Per row of the prompt: slots of its first token, of its first new one, and past the last new one.
        self._firsts = [self.start - length for length in whole]
        self._begins = [self.start + head for head in heads]
        self._ends = [begin + max_new_tokens for begin in self._begins]
        size = self.start + self.blocks * block
        self._written = torch.full((len(heads), size), mask_token, dtype=torch.int64, device=device)
        for row, (first, begin) in enumerate(zip(self._firsts, self._begins, strict=True)):
            self._written[row, :first] = pad
            self._written[row, first:begin] = self._prompt[row, first - begin :]
        self._select(list(range(len(heads))))

    def _select(self, rows: list[int]) -> None:
        self.rows = rows
        device = self._written.device
        self._index = torch.tensor(rows, device=device)
        self._tokens = self._written[self._index]
        self._padded = any(self._firsts[row] > 0 for row in rows)
        self._first, self._begin, self._end = (
            torch.tensor([slots[row] for row in rows], device=device)[:, None]
            for slots in (self._firsts, self._begins, self._ends)
        )

    @property
    def positions_needed(self) -> int:
        """Positions up to the end of the last block of any row."""
        return max(
            -(-(end - first) // self._block) * self._block for first, end in zip(self._firsts, self._ends, strict=True)
        )

    def slot(self, number: int) -> int:
        """Where active block ``number`` begins."""
        return self.start + number * self._block

    def _slots(self, low: int, high: int) -> Tensor:
        return torch.arange(low, high, device=self._written.device)

    def _positions(self, low: int, high: int) -> Tensor:
        return (self._slots(low, high) - self._first).clamp_min(0)

    def _is_stop(self, tokens: Tensor) -> Tensor:
        return (tokens[..., None] == self._stops).any(-1)

    def prefix(self, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens ``[B, n]``, block-causal mask bool ``[B, 1, n, high]`` and positions of whole blocks of the prompt."""
        slots = self._slots(0, high)
        key, query = slots // self._block, (slots[low:] // self._block)[:, None]
        visible = (key <= query)[None]
        if self._padded:
            # Padding sees its own block: a softmax over nothing would put NaN into the cache.
            visible = visible & ((slots >= self._first)[:, None] | (key == query))
        mask = visible[:, None].expand(len(self.rows), -1, -1, -1)
        return self._tokens[:, low:high], mask, self._positions(low, high)

    def block(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens ``[B, b]``, mask bool ``[B, 1, b, prefix + b]`` and positions of an active block.

        There is a mask even where it hides nothing: SDAR's released attention reads it without asking. It is one
        object for all forwards of the block, so that what others derive from it can be kept.
        """
        low = self.slot(number)
        high = low + self._block
        visible = self._slots(0, high) >= self._first
        mask = visible[:, None, None].expand(-1, 1, self._block, -1)
        # A copy: hooks may keep what a forward was given, and the canvas is written to afterwards.
        return self._tokens[:, low:high].clone(), mask, self._positions(low, high)

    def so_far(self, number: int, tokens: Tensor) -> Tensor:
        """``[B, prefix + b]``: everything up to the end of the active block, which now holds ``tokens``."""
        return torch.cat([self._tokens[:, : self.slot(number)], tokens], dim=1)

    def look(self, number: int, tokens: Tensor) -> tuple[list[int], list[bool]]:
        """Per row: how many wanted positions of the block are open, and whether it holds a stop token. Waits.

        Wanted is what the output will hold: up to ``max_new_tokens``, nothing behind a committed stop token.
        """
        low = self.slot(number)
        slots = self._slots(low, low + self._block)
        stop = self._is_stop(tokens) & (slots >= self._begin)
        wanted = (slots < self._end) & (stop.cumsum(-1) == 0)
        pending = (tokens == self._mask_token) & wanted
        left, stopped = torch.stack([pending.sum(-1), stop.any(-1)]).tolist()
        return left, [bool(seen) for seen in stopped]

    def write(self, number: int, tokens: Tensor) -> None:
        """The active block is finished and holds ``tokens``."""
        low = self.slot(number)
        self._tokens[:, low : low + self._block] = tokens
        self._written[self._index, low : low + self._block] = tokens

    def going_on(self, number: int, stopped: list[bool]) -> list[int]:
        """Which of the current rows, counted among themselves, have more to write behind this block."""
        high = self.slot(number + 1)
        return [i for i, row in enumerate(self.rows) if not stopped[i] and high < self._ends[row]]

    def keep(self, kept: list[int]) -> None:
        """Go on with these of the current rows only."""
        self._select([self.rows[i] for i in kept])

    def new_tokens(self, number: int) -> Tensor:
        """What block ``number`` adds to the text of the first row, int64 ``[n]`` on the CPU."""
        low, high = self.slot(number), self.slot(number + 1)
        text = self._written[0, max(low, self._begins[0]) : min(high, self._ends[0])]
        stop = self._is_stop(text)
        return text[stop.cumsum(-1) - stop.long() == 0].cpu()

    def text(self) -> tuple[Tensor, list[int]]:
        """The prompts as given with the new tokens behind, ``[B, L + n]``, and each row's number of new ones. Waits."""
        new = self._ends[0] - self._begins[0]
        begin = torch.tensor(self._begins, device=self._written.device)[:, None]
        tokens = self._written.gather(1, begin + self._slots(0, new))
        stop = self._is_stop(tokens).long()
        valid = stop.cumsum(-1) - stop == 0
        lengths = valid.sum(-1).tolist()
        tokens = torch.where(valid, tokens, self._pad)[:, : max(lengths)]
        return torch.cat([self._prompt.long(), tokens], dim=1), lengths
