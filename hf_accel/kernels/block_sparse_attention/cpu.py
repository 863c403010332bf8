"""Block-sparse attention in plain torch: gather kept key blocks for a few query blocks at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hf_accel.errors import UnsupportedByKernel
from hf_accel.kernels.block_sparse_attention import quantize, reference
from hf_accel.kernels.block_sparse_attention.index import causal_blocks, listed
from hf_accel.kernels.common.softmax_attention import attention_with_lse
from hf_accel.kernels.common.tile import compute_capability

LOG2_E = math.log2(math.e)
# Gathered keys and values of one call, in bytes: more falls out of the cache, fewer calls cost less.
GATHER_BYTES = 8 * 2**20
# Scores of one backward step, likewise. Four matrices of this size are alive at a time.
SCORE_BYTES = 2**20


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_index: torch.Tensor,
    block_count: torch.Tensor,
    block_size: tuple[int, int],
    scale: float,
    key_valid: torch.Tensor | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Time is near density * dense. Query blocks of any head that keep the same number of keys share a call.

    The counts are read on the host, so on another device than the CPU this waits for it.
    """
    num_queries, head_dim = query.shape[2:]
    plan = _Plan(query, key, block_index, block_count, block_size, key_valid, causal)
    key_blocks, value_blocks = plan.key_blocks(key), plan.key_blocks(value)
    query_blocks = plan.query_blocks(query)
    out_blocks = torch.zeros_like(query_blocks)
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    lse_blocks = query.new_full(query_blocks.shape[:2], float("-inf"), dtype=lse_dtype)
    for group in plan.groups(GATHER_BYTES, 2 * head_dim * key.element_size()):
        chunk_key, chunk_value = (plan.gather(x, group)[:, None] for x in (key_blocks, value_blocks))
        chunk_query = query_blocks[group.rows, None, : group.queries]
        mask = None if group.mask is None else group.mask[:, None]
        chunk_out, chunk_lse = attention_with_lse(chunk_query, chunk_key, chunk_value, scale, mask)
        out_blocks[group.rows, : group.queries] = chunk_out[:, 0]
        lse_blocks[group.rows, : group.queries] = chunk_lse[:, 0]
    out = torch.empty_like(query).copy_(plan.from_query_blocks(out_blocks, num_queries))
    return out, plan.from_query_blocks(lse_blocks, num_queries).contiguous()


def block_sparse_attention_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    block_index: torch.Tensor,
    block_count: torch.Tensor,
    block_size: tuple[int, int],
    scale: float,
    key_valid: torch.Tensor | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value: the weights are computed again from the LSE, in fp32 (fp64 for fp64).

    On a CPU two runs are bit-equal. On a GPU this form adds with atomics; the Triton form does not.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    dtype = lse.dtype
    plan = _Plan(query, key, block_index, block_count, block_size, key_valid, causal)
    query_blocks, grad_blocks = (plan.query_blocks(x.to(dtype)) for x in (query, grad_out))
    key_blocks, value_blocks = (plan.key_blocks(x.to(dtype)) for x in (key, value))
    # d(loss)/d(score) = weight * (grad_out . value - delta); the LSE's own gradient is part of delta.
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1) - grad_lse
    delta_blocks = plan.query_blocks(delta[..., None])
    # In base 2, whose exponential takes a quarter of the time. A row that kept nothing: exp2(score - inf) is 0.
    lse_blocks = plan.query_blocks((lse * LOG2_E).masked_fill(lse.isneginf(), float("inf"))[..., None])
    grad_query = torch.zeros_like(query_blocks)
    # Contiguous: scatter_add writes through a flattened view, which for strided blocks would be a copy.
    grad_key, grad_value = (
        torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (key_blocks, value_blocks)
    )
    for group in plan.groups(SCORE_BYTES, block_size[0] * query_blocks.element_size()):
        rows, queries = group.rows, group.queries
        chunk_query, chunk_grad, chunk_lse, chunk_delta = (
            x[rows, :queries] for x in (query_blocks, grad_blocks, lse_blocks, delta_blocks)
        )
        chunk_key, chunk_value = (plan.gather(x, group) for x in (key_blocks, value_blocks))
        weights = torch.bmm(chunk_query * (scale * LOG2_E), chunk_key.mT).sub_(chunk_lse).exp2_()
        if group.mask is not None:
            weights.masked_fill_(~group.mask, 0)
        grad_scores = torch.bmm(chunk_grad, chunk_value.mT).sub_(chunk_delta).mul_(weights).mul_(scale)
        grad_query[rows, :queries] = torch.bmm(grad_scores, chunk_key)
        plan.scatter_add(grad_value, torch.bmm(weights.mT, chunk_grad), group)
        plan.scatter_add(grad_key, torch.bmm(grad_scores.mT, chunk_query), group)
    return (
        torch.empty_like(query).copy_(plan.from_query_blocks(grad_query, num_queries)),
        torch.empty_like(key).copy_(plan.from_key_blocks(grad_key, num_keys)),
        torch.empty_like(value).copy_(plan.from_key_blocks(grad_value, num_keys)),
    )


def approximate_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_index: torch.Tensor,
    block_count: torch.Tensor,
    block_size: tuple[int, int],
    scale: float,
    key_valid: torch.Tensor | None = None,
    causal: bool = False,
    *,
    int8: bool,
    pv_threshold: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition itself, on whole blocks: it is here to show what the roundings cost, not to be fast."""
    _check_index(block_index, block_count, -(-key.shape[2] // block_size[1]))
    result, lse, _ = reference.approximate_attention(
        query, key, value, block_index, block_count, block_size, scale, key_valid, causal,
        int8=int8, pv_threshold=pv_threshold, value_dtype=quantize.value_dtype(compute_capability(query)),
    )  # fmt: skip
    return torch.empty_like(query).copy_(result), lse


@dataclass(frozen=True)
class _Group:
    """Query blocks that are worked on together: each has ``queries`` rows and keeps ``kept`` keys."""

    rows: torch.Tensor  # int64 [n], ids of query blocks of all heads
    ids: torch.Tensor  # int64 [n * blocks], ids of key blocks of all heads
    queries: int
    kept: int
    mask: torch.Tensor | None  # bool [n, queries, kept]


class _Plan:
    """Which query blocks share a call. Blocks of all batch entries and heads are numbered through."""

    def __init__(self, query, key, block_index, block_count, block_size, key_valid, causal) -> None:
        self.batch, self.heads, self.num_queries, _ = query.shape
        self.key_heads, self.num_keys = key.shape[1:3]
        self.block_size, self.causal = block_size, causal
        self.query_count, self.key_count = (-(-n // b) for n, b in zip(self.lengths, block_size, strict=True))
        _check_index(block_index, block_count, self.key_count)
        self.valid = key_valid
        if key_valid is not None:
            surplus = self.key_count * block_size[1] - self.num_keys
            self.valid = torch.nn.functional.pad(key_valid, (0, surplus)).view(self.batch, self.key_count, -1)
        self._prepare(block_index, block_count)

    @property
    def lengths(self) -> tuple[int, int]:
        return self.num_queries, self.num_keys

    def _prepare(self, block_index: torch.Tensor, block_count: torch.Tensor) -> None:
        device, nk = block_index.device, self.key_count
        shape = (self.batch, self.heads, *block_index.shape[2:])
        kept = listed(block_index, block_count).expand(shape)
        index = block_index.expand(shape)
        row = torch.arange(self.query_count, device=device)[:, None]
        if self.causal:
            kept = kept & causal_blocks(row, index, self.block_size, self.lengths)[0]
        if self.valid is not None:
            # A column more for the ids that do not count.
            some, every = (torch.nn.functional.pad(x, (0, 1)) for x in (self.valid.any(-1), self._whole_blocks()))
            entry = torch.arange(self.batch, device=device)[:, None, None, None]
            kept = kept & some[entry, torch.where(kept, index, nk).long()]
        # Ascending, so that only the last kept block can be the ragged one.
        ids = torch.where(kept, index, nk).sort(-1).values.long()
        count = kept.sum(-1)
        # A column more, so that there is a last one where nothing can be kept.
        last = torch.nn.functional.pad(ids, (0, 1), value=nk).gather(-1, (count - 1).clamp(min=0)[..., None])
        surplus = nk * self.block_size[1] - self.num_keys
        keys = count * self.block_size[1] - surplus * (last[..., 0] == nk - 1)
        masked = torch.zeros_like(count, dtype=torch.bool)
        if self.causal:
            masked |= ~causal_blocks(row, last, self.block_size, self.lengths)[1][..., 0] & (count > 0)
        if self.valid is not None:
            masked |= ((ids < nk) & ~every[entry, ids]).any(-1)
        queries = (self.num_queries - row[:, 0] * self.block_size[0]).clamp(max=self.block_size[0])
        self.ids = ids.view(-1, shape[-1])
        # What the members of a group have in common, as one number.
        code = (keys * 2 + masked) * (self.block_size[0] + 1) + queries
        self.code = torch.where(count > 0, code, 0).flatten()

    def _whole_blocks(self) -> torch.Tensor:
        """bool ``[B, nk]``: every key of the block that exists is valid."""
        exists = torch.arange(self.key_count * self.block_size[1], device=self.valid.device) < self.num_keys
        return (self.valid | ~exists.view(self.key_count, -1)).all(-1)

    def groups(self, limit: int, bytes_per_key: int) -> Iterator[_Group]:
        """Groups of at most ``limit`` bytes (at least one member), if a kept key takes ``bytes_per_key``."""
        codes, order = self.code.sort(stable=True)
        values, sizes = torch.unique_consecutive(codes, return_counts=True)
        start = 0
        for code, size in zip(values.tolist(), sizes.tolist(), strict=True):
            start += size
            if code == 0:
                continue
            rest, queries = divmod(code, self.block_size[0] + 1)
            kept, masked = divmod(rest, 2)
            blocks = -(-kept // self.block_size[1])
            step = max(1, limit // (bytes_per_key * kept))
            for rows in order[start - size : start].split(step):
                ids = self.ids[rows, :blocks]
                mask = self._mask(rows, ids, queries, kept) if masked else None
                head = rows // self.query_count
                key_head = head // self.heads * self.key_heads + head % self.heads * self.key_heads // self.heads
                yield _Group(rows, (ids + key_head[:, None] * self.key_count).flatten(), queries, kept, mask)

    def _mask(self, rows: torch.Tensor, ids: torch.Tensor, queries: int, kept: int) -> torch.Tensor:
        size = self.block_size[1]
        mask = torch.ones(len(rows), queries, kept, dtype=torch.bool, device=ids.device)
        if self.causal:
            place = (ids[..., None] * size + torch.arange(size, device=ids.device)).flatten(1)[:, :kept]
            first = rows % self.query_count * self.block_size[0] + self.num_keys - self.num_queries
            last_seen = first[:, None] + torch.arange(queries, device=ids.device)
            mask &= place[:, None] <= last_seen[..., None]
        if self.valid is not None:
            entry = rows // (self.query_count * self.heads)
            mask &= self.valid[entry[:, None], ids].flatten(1)[:, None, :kept]
        return mask

    def query_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, Sq, C]`` as ``[B * H * nq, bq, C]``; what is missing in the last block is 0."""
        return _blocks(x, self.block_size[0])

    def key_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, Hkv, Sk, D]`` as ``[B * Hkv * nk, bk, D]``; rows that are missing or not valid are 0."""
        if self.valid is not None:
            # A weight of 0 does not cancel an infinite value.
            x = x.masked_fill(~self.valid.flatten(1)[:, None, : self.num_keys, None], 0)
        return _blocks(x, self.block_size[1])

    def from_query_blocks(self, blocks: torch.Tensor, length: int) -> torch.Tensor:
        return blocks.reshape(self.batch, self.heads, -1, *blocks.shape[2:])[:, :, :length]

    def from_key_blocks(self, blocks: torch.Tensor, length: int) -> torch.Tensor:
        return blocks.reshape(self.batch, self.key_heads, -1, *blocks.shape[2:])[:, :, :length]

    def gather(self, blocks: torch.Tensor, group: _Group) -> torch.Tensor:
        """The kept rows of each member, ``[n, kept, D]``."""
        # Whole blocks are copied, which is a few times faster than a gather row by row.
        flat = blocks.flatten(1).index_select(0, group.ids)
        return flat.view(len(group.rows), -1, blocks.shape[-1])[:, : group.kept]

    def scatter_add(self, blocks: torch.Tensor, rows: torch.Tensor, group: _Group) -> None:
        """Add ``[n, kept, D]`` to the blocks that :meth:`gather` took them from."""
        surplus = -group.kept % self.block_size[1]
        if surplus:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, surplus))
        blocks.flatten(1).index_add_(0, group.ids, rows.reshape(len(group.ids), -1))


def _blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    surplus = -x.shape[2] % size
    if surplus:
        x = torch.nn.functional.pad(x, (0, 0, 0, surplus))
    return x.reshape(-1, size, x.shape[-1])


def _check_index(index: torch.Tensor, count: torch.Tensor, key_blocks: int) -> None:
    if index.numel() == 0 or count.numel() == 0:
        return
    if int(count.max()) > index.shape[-1] or int(count.min()) < 0:
        raise UnsupportedByKernel(
            f"block_sparse_attention: block_count must be between 0 and {index.shape[-1]}, the length of the "
            f"rows of block_index; got {int(count.min())} to {int(count.max())}."
        )
    ids = index[listed(index, count)]
    if ids.numel() and (int(ids.max()) >= key_blocks or int(ids.min()) < 0):
        raise UnsupportedByKernel(
            f"block_sparse_attention: block_index must hold ids from 0 to {key_blocks - 1}; "
            f"got {int(ids.min())} to {int(ids.max())}."
        )
