"""The operators of paged attention under torch.compile (outside of kernels/, whose fixtures wrap allocation)."""

from __future__ import annotations

import torch

from hf_accel.kernels import paged_attention as ops


def test_operators_are_one_graph():
    torch.manual_seed(0)
    q, q_ref = torch.randn(2, 4, 5, 16), torch.randn(2, 4, 5, 16)
    k, v, k_block, v_block = (torch.randn(2, 2, n, 16) for n in (37, 37, 5, 5))

    def step(q, q_ref, k, v, k_block, v_block):
        low, high = ops.page_minmax(k, 8)
        index, _ = ops.active_topk(q, q_ref, 2)
        active = q.gather(2, index[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        pages = ops.select_pages(ops.page_score(active, low, high), 2, k.shape[1])
        some = ops.page_attention(active, k, v, pages, 8, 0.25)
        every = ops.page_attention(q, k, v, None, 8, 0.25)
        return *ops.lse_merge(*some, *some), ops.block_merge(q, k_block, v_block, *every, 0.25)

    arguments = q, q_ref, k, v, k_block, v_block
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for traced, eager in zip(compiled(*arguments), step(*arguments), strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-6)
