"""Means and self-similarity of blocks: identities, then every backend against the definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_helpers import kernel_dtypes

from hf_accel.errors import UnsupportedByKernel
from hf_accel.kernels import block_summary as package
from hf_accel.kernels.block_summary import block_summary, reference

BACKENDS = ["triton", "torch"]
LIMIT = 1e-5  # sums are fp32 in every dtype


def tokens(*shape: int, dtype=torch.float32, device="cpu", seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Two kinds of blocks: of one direction each, and of none.
    x = torch.randn(shape, generator=generator)
    x[:, ::2] += 3 * torch.randn(*shape[:1], -(-shape[1] // 2), 1, shape[3], generator=generator)
    return x.to(device, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_similarity_is_the_mean_cosine_over_all_pairs(backend, device):
    x = tokens(2, 3, 150, 40, device=device)
    ours = block_summary(x, 64, backend=backend)
    for block, (start, stop) in enumerate([(0, 64), (64, 128), (128, 150)]):
        part = x[:, :, start:stop]
        cosines = F.cosine_similarity(part[:, :, :, None], part[:, :, None, :], dim=-1)
        torch.testing.assert_close(ours.similarity[:, :, block], cosines.mean((-1, -2)), atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.mean[:, :, block], part.mean(2), atol=1e-5, rtol=0)
    assert (ours.similarity >= 0).all()
    assert (ours.similarity <= 1 + 1e-6).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_identical_tokens_are_alike_and_zero_rows_are_not(backend, device):
    row = torch.randn(1, 1, 1, 16, device=device)
    assert block_summary(row.expand(1, 2, 70, 16), 64, backend=backend).similarity.sub(1).abs().max() < 1e-5
    assert block_summary(torch.zeros(1, 1, 70, 16, device=device), 64, backend=backend).similarity.eq(0).all()
    opposite = torch.cat([row, -row], 2)
    assert block_summary(opposite, 64, backend=backend).similarity.abs().max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_centring_removes_a_constant(backend, device):
    x = tokens(1, 2, 131, 24, device=device)
    ours = block_summary(x + 5, 64, center=True, backend=backend)
    theirs = block_summary(x, 64, center=True, backend=backend)
    torch.testing.assert_close(ours.mean, theirs.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.similarity, theirs.similarity, atol=1e-5, rtol=0)
    sizes = torch.tensor([64.0, 64, 3], device=device)[:, None]
    assert (ours.mean * sizes).sum(2).abs().max() < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize(
    ("length", "block", "head_dim"), [(131, 64, 40), (129, 128, 64), (64, 64, 80), (97, 32, 128), (50, 24, 16)]
)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_against_the_definition(backend, dtype, length, block, head_dim, center, masked, device):
    x = tokens(2, 3, length, head_dim, dtype=dtype, device=device)
    valid = None
    if masked:
        valid = torch.arange(length, device=device)[None] < torch.tensor([[length - 3], [block // 2]], device=device)
        x = torch.where(valid[:, None, :, None], x, float("nan"))  # what does not count is not read
    mean, similarity = block_summary(x, block, center=center, key_valid=valid, backend=backend)
    clean = x.double().nan_to_num(0)
    weight = (torch.ones(2, length, device=device) if valid is None else valid)[:, None, :, None].double()
    if center:
        clean = (clean - (clean * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True)) * weight
    for start in range(0, length, block):
        rows, counted = clean[:, :, start : start + block], weight[:, :, start : start + block]
        size = counted.sum(2).clamp(min=1)
        cell = start // block
        expected = rows.sum(2) / size
        direction = F.normalize(rows, dim=-1).sum(2) / size
        torch.testing.assert_close(mean[:, :, cell].double(), expected, atol=LIMIT, rtol=1e-5)
        torch.testing.assert_close(similarity[:, :, cell].double(), direction.square().sum(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend, device):
    x = torch.randn(2, 70, 3, 32, device=device).transpose(1, 2)
    ours = block_summary(x, 64, backend=backend)
    theirs = reference.block_summary(x.contiguous(), 64, False, None)
    torch.testing.assert_close(ours.mean, theirs[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.similarity, theirs[1], atol=1e-6, rtol=0)


def test_refuses_what_does_not_fit():
    x = torch.randn(1, 2, 70, 16)
    with pytest.raises(UnsupportedByKernel, match=r"\[B, H, S, D\]"):
        block_summary(x[0], 64)
    with pytest.raises(UnsupportedByKernel, match="at least 1"):
        block_summary(x, 0)
    with pytest.raises(UnsupportedByKernel, match="float32, float16 or bfloat16"):
        block_summary(x.double(), 64)
    with pytest.raises(UnsupportedByKernel, match="key_valid must be"):
        block_summary(x, 64, key_valid=torch.ones(1, 69, dtype=torch.bool))
    with pytest.raises(UnsupportedByKernel, match="contiguous"):
        block_summary(x.transpose(2, 3), 64)
    with pytest.raises(UnsupportedByKernel, match="empty"):
        block_summary(x[:, :, :0], 64)


def test_custom_ops_keep_their_promises():
    x = torch.randn(2, 3, 70, 8)
    torch.library.opcheck(package._block_summary, (x, 64, True, torch.ones(2, 70, dtype=torch.bool), "torch"))


def test_carries_no_gradient_and_compiles():
    x = torch.randn(1, 2, 70, 16, requires_grad=True)
    summary = torch.compile(lambda x: block_summary(x, 64, center=True), fullgraph=True, backend="aot_eager")(x)
    assert not summary.mean.requires_grad
    torch.testing.assert_close(summary.mean, block_summary(x, 64, center=True).mean)
