"""QWHA's weight and its activation-side twin: identities, then both backends against the definition in fp64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from kernel_helpers import kernel_dtypes

from hf_accel.errors import UnsupportedByKernel
from hf_accel.kernels import qwha_weight as package
from hf_accel.kernels.hadamard import hadamard
from hf_accel.kernels.quantized_linear import Packed
from hf_accel.kernels.quantized_linear import reference as quantized
from hf_accel.kernels.quantized_linear.layout import UNIT_CODES
from hf_accel.kernels.qwha_weight import qwha_activation, qwha_weight, reference
from hf_accel.kernels.qwha_weight.layout import row_of, unsigned_columns

BACKENDS = ["triton", "torch"]
# Rows, and how many coefficients: more than one step of a kernel at 70, none at 0.
SHAPES = [(5, 96, None, 7), (3, 128, None, 70), (7, 36, None, 4), (4, 76, 4, 9), (3, 17, 1, 3), (4, 192, 64, 0)]


class Sparse(NamedTuple):
    indptr: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor


def sparse_of(m, n, per_row, *, kind=torch.int16, dtype=torch.float32, device="cpu", seed=0) -> Sparse:
    """About ``per_row`` coefficients in a row, at random places; rows differ in how many, and some may have none."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(m * n, generator=generator)[: m * per_row].sort().values
    indptr = torch.searchsorted(places, torch.arange(m + 1) * n).int()
    values = 3 * torch.randn(len(places), generator=generator)
    return Sparse(indptr.to(device), (places % n).to(device, kind), values.to(device, dtype))


def packed_of(n, m, bits, group, *, shuffled=False, device="cpu") -> Packed:
    generator = torch.Generator().manual_seed(1)
    groups = -(-n // group)

    def words(*shape):
        return torch.randint(-(2**31), 2**31 - 1, shape, generator=generator, dtype=torch.int64).int().to(device)

    g_idx = torch.arange(n, dtype=torch.int32) // group
    if shuffled:
        g_idx = g_idx[torch.randperm(n, generator=generator)]
    scales = (torch.rand(groups, m, generator=generator) + 0.1).to(device)
    return Packed(
        words(n * bits // 32, m),
        scales,
        words(groups, m * bits // 32),
        g_idx.to(device),
        bits,
        None if shuffled else group,
    )


def rows_of(*shape, dtype=torch.float32, device="cpu", seed=2):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def relative(ours, theirs) -> float:
    norm = theirs.detach().double().norm()
    return float((ours.double() - theirs.double()).norm().detach() / norm) if norm else float(ours.abs().sum())


def double(f: Sparse) -> Sparse:
    return f._replace(values=f.values.double())


# -- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_coefficients_leave_the_base_bit_for_bit(backend, device):
    base = rows_of(4, 96, device=device)
    for f in (sparse_of(4, 96, 0, device=device), sparse_of(4, 96, 5, device=device)):
        ours = qwha_weight(base, f.indptr, f.columns, torch.zeros_like(f.values), 2.0, backend=backend)
        assert torch.equal(ours, base)
    packed = packed_of(96, 8, 4, 32, device=device)
    f = sparse_of(8, 96, 1, device=device)
    ours = qwha_weight(None, f.indptr, f.columns, 0 * f.values, 2.0, packed=packed, backend=backend)
    assert torch.equal(ours, quantized.dequantize_packed(*packed[:5]))


@pytest.mark.parametrize("n", [48, 64, 96])
def test_all_coefficients_make_any_update(n):
    """With p_i = n the coefficients ``H ΔW_i`` reproduce ΔW."""
    update = rows_of(5, n, dtype=torch.float64)
    indptr = (torch.arange(6) * n).int()
    columns = torch.arange(n).repeat(5).short()
    ours = qwha_weight(None, indptr, columns, hadamard(update).flatten(), 1.0, in_features=n)
    torch.testing.assert_close(ours, update, atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize(("m", "n", "blocks", "per_row"), SHAPES)
def test_both_sides_agree(m, n, blocks, per_row):
    f = double(sparse_of(m, n, per_row))
    x = rows_of(3, n, dtype=torch.float64)
    weight = qwha_weight(None, *f, 1.7, in_features=n, blocks=blocks)
    torch.testing.assert_close(qwha_activation(x, *f, 1.7, blocks=blocks), x @ weight.T, atol=1e-13, rtol=1e-12)


def test_rescaling_leaves_the_update():
    f = double(sparse_of(5, 96, 7))
    one = qwha_weight(None, *f, 4e3, in_features=96)
    other = qwha_weight(None, f.indptr, f.columns, f.values * (4e3 / 0.25), 0.25, in_features=96)
    torch.testing.assert_close(one, other)


def test_columns_as_unsigned_bits():
    """n of 65,536 in int16."""
    n = 1 << 16
    columns = torch.tensor([0, 40_000, n - 1])
    indptr = torch.tensor([0, 3], dtype=torch.int32)
    values = torch.tensor([1.0, 2.0, 3.0])
    short = columns.to(torch.int16)
    assert short.min() < 0
    assert torch.equal(unsigned_columns(short), columns)
    ours = qwha_weight(None, indptr, short, values, 1.0, in_features=n)
    assert torch.equal(ours, qwha_weight(None, indptr, columns.int(), values, 1.0, in_features=n))
    assert torch.equal(row_of(torch.tensor([0, 2, 2, 3], dtype=torch.int32), 3), torch.tensor([0, 0, 2]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_coefficients_at_one_place_add_up(backend, device):
    indptr = torch.tensor([0, 3], dtype=torch.int32, device=device)
    columns = torch.tensor([5, 5, 2], dtype=torch.int32, device=device)
    values = torch.tensor([1.0, 2.0, -1.0], device=device)
    ours = qwha_weight(None, indptr, columns, values, 1.0, in_features=16, backend=backend)
    once = torch.tensor([0, 2], dtype=torch.int32, device=device), columns[1:], torch.tensor([3.0, -1.0], device=device)
    theirs = qwha_weight(None, *once, 1.0, in_features=16, backend=backend)
    torch.testing.assert_close(ours, theirs)


# -- against the definition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize(("m", "n", "blocks", "per_row"), SHAPES)
def test_dense_base_and_its_gradients(backend, dtype, m, n, blocks, per_row, device):
    f = sparse_of(m, n, per_row, kind=torch.int32, device=device)
    base = rows_of(m, n, dtype=dtype, device=device).requires_grad_()
    values = f.values.clone().requires_grad_()
    ours = qwha_weight(base, f.indptr, f.columns, values, 5.0, blocks=blocks, backend=backend)
    assert ours.dtype == dtype
    limit = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    exact = f.values.double().requires_grad_()
    theirs = reference.qwha_weight(base.detach().double(), f.indptr, f.columns, exact, 5.0, blocks=blocks)
    assert relative(ours, theirs) < limit
    direction = rows_of(m, n, dtype=dtype, device=device, seed=3)
    (ours * direction).sum().backward()
    (theirs * direction.double()).sum().backward()
    assert torch.equal(base.grad, direction)
    assert relative(values.grad, exact.grad) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("bits", "n", "group", "shuffled", "blocks"),
    [(4, 128, 64, False, None), (2, 64, 64, False, None), (3, 96, 32, False, None), (8, 96, 32, True, None),
     (4, 128, 16, False, None), (3, 64, 32, True, None), (4, 224, 32, False, 32), (2, 160, 32, False, None)],
)  # fmt: skip
def test_packed_base(backend, bits, n, group, shuffled, blocks, device):
    """Groups that lines of the kernel divide and that they do not, codes by words and one by one."""
    m = UNIT_CODES[bits]
    packed = packed_of(n, m, bits, group, shuffled=shuffled, device=device)
    f = sparse_of(m, n, 5, device=device)
    values = f.values.clone().requires_grad_()
    ours = qwha_weight(None, f.indptr, f.columns, values, 30.0, packed=packed, blocks=blocks, backend=backend)
    exact = f.values.double().requires_grad_()
    weight = quantized.dequantize_packed(*packed[:5], dtype=torch.float64)
    theirs = reference.qwha_weight(weight, f.indptr, f.columns, exact, 30.0, blocks=blocks)
    assert relative(ours, theirs) < 1e-6
    half = qwha_weight(None, *f, 30.0, packed=tuple(packed), blocks=blocks, dtype=torch.float16, backend=backend)
    assert relative(half, theirs) < 1e-3
    direction = rows_of(m, n, device=device, seed=3)
    (ours * direction).sum().backward()
    (theirs * direction.double()).sum().backward()
    assert relative(values.grad, exact.grad) < 1e-6


def test_values_of_any_size(device):
    """The kernel's values are fp16 numbers relative to the largest of a row: rows of 1e-20, 1 and 1e20 are as good."""
    f = sparse_of(3, 64, 9, device=device)
    size = torch.tensor([1e-20, 1.0, 1e20], device=device)[row_of(f.indptr, len(f.values))]
    values = f.values * size
    ours = qwha_weight(None, f.indptr, f.columns, values, 1.0, in_features=64, backend="triton")
    theirs = reference.qwha_weight(ours.double() * 0, f.indptr, f.columns, values.double(), 1.0)
    for i in range(3):
        assert relative(ours[i], theirs[i]) < 1e-6


def test_a_column_that_does_not_exist_is_nan_on_a_gpu(device):
    f = sparse_of(3, 64, 4, kind=torch.int32, device=device)
    columns = f.columns.clone()
    columns[f.indptr[1]] = 64
    arguments = (
        None,
        f.indptr,
        columns,
        f.values,
        None,
        None,
        None,
        None,
        0,
        None,
        64,
        1.0,
        64,
        torch.float32,
        "triton",
    )
    assert package._qwha_weight(*arguments).isnan().all(1).tolist() == [False, True, False]


def test_a_column_that_does_not_exist_is_refused_on_a_cpu():
    indptr, columns = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([3, 64], dtype=torch.int32)
    with pytest.raises(UnsupportedByKernel, match=r"0\.\.63; got 3\.\.64"):
        qwha_weight(None, indptr, columns, torch.ones(2), 1.0, in_features=64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize("tokens", [1, 5])
def test_activation_side(backend, dtype, tokens, device):
    f = sparse_of(11, 96, 7, dtype=dtype, device=device)
    x = rows_of(tokens, 96, dtype=dtype, device=device).requires_grad_()
    values = f.values.clone().requires_grad_()
    ours = qwha_activation(x, f.indptr, f.columns, values, 0.3, backend=backend)
    assert (ours.dtype, ours.shape) == (dtype, (tokens, 11))
    exact = [x.detach().double().requires_grad_(), f.values.double().requires_grad_()]
    theirs = reference.qwha_activation(exact[0], f.indptr, f.columns, exact[1], 0.3)
    limit = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert relative(ours, theirs) < limit
    ours.float().square().sum().backward()
    theirs.square().sum().backward()
    assert relative(x.grad, exact[0].grad) < 2 * limit
    assert relative(values.grad, exact[1].grad) < 2 * limit


@pytest.mark.parametrize("blocks", [None, 12])
def test_gradients_by_finite_differences(blocks):
    f = double(sparse_of(3, 24, 4))
    base = rows_of(3, 24, dtype=torch.float64).requires_grad_()
    values = f.values.clone().requires_grad_()
    x = rows_of(2, 24, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda base, values: qwha_weight(base, f.indptr, f.columns, values, 2.0, blocks=blocks), (base, values)
    )
    assert torch.autograd.gradcheck(
        lambda x, values: qwha_activation(x, f.indptr, f.columns, values, 2.0, blocks=blocks), (x, values)
    )


def test_stretches_of_rows(monkeypatch):
    from hf_accel.kernels.qwha_weight import cpu

    f, base = double(sparse_of(70, 12, 3)), rows_of(70, 12, dtype=torch.float64)
    packed = packed_of(64, 96, 4, 32)
    g = double(sparse_of(96, 64, 3))
    direction = rows_of(70, 12, dtype=torch.float64, seed=3)

    def everything():
        gradient = package._qwha_gradient(direction, f.indptr, f.columns, 1.0, 12, torch.float64, "torch")
        return qwha_weight(base, *f, 1.0), qwha_weight(None, *g, 1.0, packed=packed, dtype=torch.float64), gradient

    whole = everything()
    monkeypatch.setattr(cpu, "_ELEMENTS", 12 * 7)
    for ours, theirs in zip(everything(), whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=1e-12)


def test_refuses_what_does_not_fit():
    f = sparse_of(4, 96, 3)
    base = torch.zeros(4, 96)
    with pytest.raises(UnsupportedByKernel, match="not both"):
        qwha_weight(base, *f, 1.0, packed=packed_of(96, 32, 4, 32))
    with pytest.raises(UnsupportedByKernel, match="in_features must say"):
        qwha_weight(None, *f, 1.0)
    with pytest.raises(UnsupportedByKernel, match="in_features says 64"):
        qwha_weight(base, *f, 1.0, in_features=64)
    with pytest.raises(UnsupportedByKernel, match="indptr must be"):
        qwha_weight(torch.zeros(5, 96), *f, 1.0)
    with pytest.raises(UnsupportedByKernel, match="rise from 0"):
        qwha_weight(base, f.indptr.flip(0), f.columns, f.values, 1.0)
    with pytest.raises(UnsupportedByKernel, match="int32"):
        qwha_weight(base, f.indptr.long(), f.columns, f.values, 1.0)
    with pytest.raises(UnsupportedByKernel, match="int16"):
        qwha_weight(base, f.indptr, f.columns.long(), f.values, 1.0)
    with pytest.raises(UnsupportedByKernel, match="65,536"):
        qwha_weight(None, *f, 1.0, in_features=1 << 17)
    with pytest.raises(UnsupportedByKernel, match="columns must be"):
        qwha_weight(base, f.indptr, f.columns[1:], f.values, 1.0)
    with pytest.raises(UnsupportedByKernel, match="blocks=2"):
        qwha_weight(torch.zeros(4, 98), *f, 1.0)
    with pytest.raises(UnsupportedByKernel, match="finite"):
        qwha_weight(base, *f, float("nan"))
    with pytest.raises(UnsupportedByKernel, match="contiguous"):
        qwha_weight(torch.zeros(96, 4).T, *f, 1.0)
    with pytest.raises(UnsupportedByKernel, match="dtype must be"):
        qwha_weight(base, *f, 1.0, dtype=torch.int8)
    with pytest.raises(UnsupportedByKernel, match="int32"):
        qwha_activation(torch.zeros(1, 96), f.indptr.long(), f.columns, f.values, 1.0)


def test_custom_ops_and_compile():
    f = sparse_of(4, 24, 3)
    base, values = rows_of(4, 24), f.values.clone().requires_grad_()
    parts = (None, None, None, None, 0, None, 24, 2.0, 12, torch.float32, "torch")
    torch.library.opcheck(package._qwha_weight, (base, f.indptr, f.columns, values, *parts))
    torch.library.opcheck(package._qwha_gradient, (base, f.indptr, f.columns, 2.0, 12, torch.float32, "torch"))
    torch.library.opcheck(package._sparse_product, (rows_of(3, 24), *f, "torch"))

    def loss(values):
        weight = qwha_weight(base, f.indptr, f.columns, values, 2.0)
        return (weight.square().sum() + qwha_activation(base, f.indptr, f.columns, values, 1.0).square().sum()).sqrt()

    torch.compile(loss, fullgraph=True, backend="aot_eager")(values).backward()
    compiled, values.grad = values.grad, None
    loss(values).backward()
    torch.testing.assert_close(compiled, values.grad)
