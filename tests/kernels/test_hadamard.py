"""The Hadamard transform: identities, then both backends against the product with the whole matrix."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from kernel_helpers import kernel_dtypes

from hf_accel.errors import InvalidSetting, UnsupportedByKernel
from hf_accel.kernels import hadamard as package
from hf_accel.kernels.hadamard import block_size, factor, hadamard, hadamard_matrix, reference
from hf_accel.kernels.hadamard.orders import ORDERS, order_matrix, sylvester
from hf_accel.kernels.hadamard.triton import to_tf32

BACKENDS = ["triton", "torch"]
LENGTHS = [1, 2, 8, 12, 16, 20, 24, 64, 96, 128, 160, 172, 256, 344, 512, 2048]


def rows_of(*shape: int, dtype=torch.float32, device="cpu", seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize("order", [1, *ORDERS])
def test_stored_orders_are_hadamard_matrices(order):
    matrix = order_matrix(order).long()
    assert matrix.shape == (order, order)
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.long))


def test_factors_of_the_models_in_the_paper():
    assert factor(3072) == (12, 256)
    assert factor(8192) == (1, 8192)
    assert factor(14336) == (28, 512)
    assert factor(11008) == (172, 64)
    assert factor(40) == (40, 1)
    assert factor(80) == (40, 2)
    assert factor(20) == (20, 1)
    assert [factor(n) for n in (0, -4, 3, 6, 4864, 76)] == [None] * 6
    assert all(
        factor(order << m) == (order, 1 << m) for order in ORDERS for m in range(4) if order << m not in (40, 80, 160)
    )


def test_blocks_are_the_longest_that_divide():
    assert block_size(4096) == 4096
    assert block_size(4864) == 256
    assert block_size(18944) == 512
    assert block_size(11520) == 3840  # 60 * 64, although the power of two in it is 256
    assert block_size(257) == 1
    for n in range(1, 200):
        block = block_size(n)
        assert n % block == 0
        assert factor(block)
        assert not any(factor(d) for d in range(block + 1, n + 1) if n % d == 0)


def test_sylvester_is_its_own_transpose_and_counts_bits():
    matrix = sylvester(32)
    assert torch.equal(matrix, matrix.T)
    i = torch.arange(32)
    bits = sum((i[:, None] & i) >> b & 1 for b in range(5))
    assert torch.equal(matrix, (1 - 2 * (bits % 2)).to(torch.int8))


@pytest.mark.parametrize("n", [64, 96, 160, 344, 240, 624, 2240])
def test_undoes_itself(n):
    v = rows_of(3, n, dtype=torch.float64)
    torch.testing.assert_close(hadamard(hadamard(v), inverse=True), v, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(hadamard(hadamard(v, inverse=True)), v, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(hadamard(v).norm(dim=-1), math.sqrt(n) * v.norm(dim=-1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize("n", LENGTHS)
def test_against_the_whole_matrix(backend, dtype, n, device):
    x = rows_of(5, n, dtype=dtype, device=device)
    for inverse in (False, True):
        ours = hadamard(x, inverse=inverse, scale=0.5, backend=backend)
        theirs = reference.hadamard(x.double(), inverse=inverse, scale=0.5)
        assert ours.dtype == dtype
        assert relative(ours, theirs) < {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]


@pytest.mark.parametrize("n", [192, 344, 2560, 2048])
def test_rows_too_long_for_one_pass(n, monkeypatch, device):
    """The second and third pass, over what is left of the length and over the order."""
    from hf_accel.kernels.hadamard import triton as kernels

    monkeypatch.setattr(kernels, "LONGEST", 64)
    x = rows_of(3, n, device=device)
    for inverse in (False, True):
        ours = hadamard(x, inverse=inverse, backend="triton")
        assert relative(ours, reference.hadamard(x.double(), inverse=inverse)) < 1e-6


@triton.jit
def split_kernel(X, High, Low, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i)
    high = to_tf32(x)
    tl.store(High + i, high)
    tl.store(Low + i, to_tf32(x - high))


def test_two_numbers_of_11_bits_hold_22(device):
    """What the tensor cores would cut off is gone before they see it. The interpreter multiplies all 24 bits."""
    x = rows_of(256, device=device) * 10.0 ** torch.randint(-30, 30, (256,), device=device)
    high, low = torch.empty_like(x), torch.empty_like(x)
    split_kernel[(1,)](x, high, low, N=256)
    for part in (high, low):
        assert (part.view(torch.int32) & 0x1FFF).eq(0).all()
    assert ((x.double() - high.double() - low.double()).abs() <= 2.0**-22 * x.double().abs()).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "block"), [(76, 4), (192, 64), (36, 12), (17, 1), (120, 40)])
def test_blocks_transform_alone(backend, n, block, device):
    x = rows_of(4, n, device=device)
    ours = hadamard(x, blocks=block, backend=backend)
    parts = [hadamard(part, backend=backend) for part in x.split(block, -1)]
    torch.testing.assert_close(ours, torch.cat(parts, -1))
    torch.testing.assert_close(hadamard(ours, inverse=True, blocks=block, backend=backend), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_axes(backend, device):
    wide = rows_of(2, 48, 3, device=device)
    x = wide.mT
    assert not x.is_contiguous()
    before = x.clone()
    torch.testing.assert_close(hadamard(x, backend=backend), hadamard(before, backend=backend))
    assert torch.equal(x, before)
    assert hadamard(x[0, 0], backend=backend).shape == (48,)
    assert hadamard(x[:0], backend=backend).shape == (0, 3, 48)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_row_sees_another(backend, device):
    x = rows_of(9, 12, device=device)
    x[4, 3] = math.nan
    out = hadamard(x, backend=backend)
    assert out.isnan().any(-1).tolist() == [i == 4 for i in range(9)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_sums_do_not_overflow_before_the_scale(backend, device):
    x = torch.full((1, 256), 1000.0, dtype=torch.float16, device=device)
    out = hadamard(x, inverse=True, backend=backend)
    assert out[0, 0] == 1000
    assert out[0, 1:].eq(0).all()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("n", "block"), [(12, None), (16, 8)])
def test_gradient(inverse, n, block):
    x = rows_of(2, n, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: hadamard(x, inverse=inverse, scale=1.3, blocks=block), x)
    assert torch.autograd.gradgradcheck(lambda x: hadamard(x, inverse=inverse, blocks=block).square(), x)


def test_gradient_on_the_triton_path(device):
    x = rows_of(3, 24, device=device).requires_grad_()
    direction = rows_of(3, 24, device=device, seed=1)
    (hadamard(x, backend="triton") * direction).sum().backward()
    torch.testing.assert_close(x.grad, 24 * reference.hadamard(direction, inverse=True))


def test_refuses_what_has_no_transform():
    with pytest.raises(UnsupportedByKernel, match="blocks=256"):
        hadamard(torch.zeros(1, 4864))
    with pytest.raises(UnsupportedByKernel, match="divide"):
        hadamard(torch.zeros(1, 64), blocks=48)
    with pytest.raises(UnsupportedByKernel, match="K \\* 2"):
        hadamard(torch.zeros(1, 64 * 7), blocks=7)
    with pytest.raises(UnsupportedByKernel, match="float64"):
        hadamard(torch.zeros(1, 64, dtype=torch.int32))
    with pytest.raises(UnsupportedByKernel, match="finite"):
        hadamard(torch.zeros(1, 64), scale=math.inf)
    with pytest.raises(UnsupportedByKernel, match="at least 1"):
        hadamard(torch.zeros(1, 0))
    with pytest.raises(UnsupportedByKernel, match="no matrix of order"):
        order_matrix(16)
    with pytest.raises(InvalidSetting):
        hadamard(torch.zeros(1, 64), backend="cuda")
    with pytest.raises(UnsupportedByKernel):
        hadamard_matrix(6)


def test_a_matrix_given_out_is_the_callers_own():
    first = hadamard_matrix(12)
    first.zero_()
    assert hadamard_matrix(12).abs().eq(1).all()


def test_custom_op_and_compile():
    x = rows_of(2, 24).requires_grad_()
    torch.library.opcheck(package._transform, (x, True, 0.5, 12, "torch"))

    def loss(x):
        return hadamard(x, inverse=True).square().sum()

    ours = torch.compile(loss, fullgraph=True, backend="aot_eager")(x)
    ours.backward()
    torch.testing.assert_close(ours, loss(x))
    torch.testing.assert_close(x.grad, 2 * x.detach() / 24)
