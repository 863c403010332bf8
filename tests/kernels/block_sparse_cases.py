"""Random calls of block_sparse_attention that its test files share."""

from __future__ import annotations

import torch

from hf_accel.kernels.block_sparse_attention import block_map_to_index, reference

BACKENDS = ["triton", "torch"]


class Case:
    """Random inputs of one call. ``shape`` is (B, H, Hkv, Sq, Sk, D)."""

    def __init__(
        self,
        shape=(1, 2, 2, 131, 197, 32),
        block_size=(64, 64),
        density=0.5,
        dtype=torch.float32,
        device="cpu",
        index_lead=None,
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)
        batch, heads, key_heads, num_queries, num_keys, head_dim = shape
        rows = [(heads, num_queries), (key_heads, num_keys), (key_heads, num_keys)]
        self.qkv = [torch.randn(batch, *r, head_dim, generator=generator).to(device, dtype) for r in rows]
        lead = index_lead or (batch, heads)
        blocks = [-(-num_queries // block_size[0]), -(-num_keys // block_size[1])]
        self.block_size = block_size
        self.set_map((torch.rand(*lead, *blocks, generator=generator) < density).to(device))

    def set_map(self, block_map):
        self.block_map = block_map
        self.index, self.count = block_map_to_index(block_map)
        # Neither the order of a row nor what stands behind its end may matter.
        kept = torch.arange(self.index.shape[-1], device=self.index.device) < self.count[..., None]
        self.index = torch.where(kept, self.index, 10**6)
        self.index = self.index.roll(1, -1) if bool(kept.all()) else self.index

    @property
    def arguments(self):
        return (*self.qkv, self.index, self.count)

    def reference(self, key_valid=None, scale=None, causal=False, qkv=None):
        """The definition in fp32; ``qkv`` replaces the inputs."""
        qkv = [x.float() for x in self.qkv] if qkv is None else qkv
        scale = scale or qkv[0].shape[-1] ** -0.5
        return reference.block_sparse_attention(*qkv, self.index, self.count, self.block_size, scale, key_valid, causal)
