"""Packed linears: the layout against its definition and a hand-packed word, then every backend against fp64."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import kernel_dtypes

from hf_accel.errors import InvalidSetting, UnsupportedByKernel
from hf_accel.kernels import quantized_linear as package
from hf_accel.kernels.quantized_linear import Packed, cpu, dequantize_packed, quantized_linear, reference

BACKENDS = ["triton", "torch"]
BITS = [2, 3, 4, 8]


def packed_of(n, m, bits, group, *, shuffled=False, dtype=torch.float32, device="cpu", seed=0) -> Packed:
    """Random words are random codes: every bit pattern is a valid weight."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-n // group)

    def words(*shape):
        return torch.randint(-(2**31), 2**31 - 1, shape, generator=generator, dtype=torch.int64).int().to(device)

    g_idx = torch.arange(n, dtype=torch.int32) // group
    if shuffled:
        g_idx = g_idx[torch.randperm(n, generator=generator)]
    scales = torch.rand(groups, m, generator=generator) * 0.1 + 0.01
    return Packed(
        words(n * bits // 32, m),
        scales.to(device, dtype),
        words(groups, m * bits // 32),
        g_idx.to(device),
        bits,
        None if shuffled else group,
    )


def call(x, packed, bias=None, backend="auto"):
    return quantized_linear(x, *packed[:5], bias, group_size=packed.group_size, backend=backend)


def rows_of(*shape, dtype=torch.float32, device="cpu", seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def relative(ours, theirs) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def test_codes_of_known_words():
    """By hand: the low nibble is the first input; at 3 bits inputs 10 and 21 span words."""
    word = torch.tensor([[0x76543210], [-0x01234568]], dtype=torch.int32)  # the second is 0xFEDCBA98
    assert reference.unpack(word, 4).flatten().tolist() == list(range(16))
    assert reference.unpack(word[:1], 8).flatten().tolist() == [0x10, 0x32, 0x54, 0x76]
    assert reference.unpack(torch.tensor([[0b11_10_01_00]], dtype=torch.int32), 2).flatten().tolist()[:5] == [
        0,
        1,
        2,
        3,
        0,
    ]
    tens = torch.tensor([[1 << 30], [1 | 1 << 31], [2]], dtype=torch.int64).int()
    codes = reference.unpack(tens, 3).flatten().tolist()
    assert (codes[10], codes[21]) == (0b101, 0b101)
    assert sum(codes) == 10


@pytest.mark.parametrize("bits", BITS)
def test_unpacking_and_dequantising(bits):
    packed = packed_of(160, 64, bits, 64)
    assert torch.equal(cpu.unpack(packed.qweight, bits), reference.unpack(packed.qweight, bits))
    codes = reference.unpack(packed.qweight, bits).T
    assert codes.min() == 0
    assert codes.max() == 2**bits - 1
    weight = dequantize_packed(*packed[:5], dtype=torch.float32)
    zeros = reference.unpack(packed.qzeros.T.contiguous(), bits).T
    for i, j in [(0, 0), (63, 159), (17, 64), (5, 130)]:
        g = j // 64
        assert weight[i, j] == packed.scales[g, i] * float(codes[i, j] - zeros[g, i])
    torch.testing.assert_close(cpu.dequantize_rows(packed, 32, 64, torch.float32), weight[32:], atol=0, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("group", "shuffled"), [(64, False), (48, False), (24, False), (32, True)])
def test_dequantised_weights_are_exact(backend, bits, group, shuffled, device):
    packed = packed_of(96, 32, bits, group, shuffled=shuffled, dtype=torch.float16, device=device)
    for dtype in (torch.float32, torch.float16, None):
        ours = dequantize_packed(*packed[:5], dtype=dtype, group_size=packed.group_size, backend=backend)
        assert torch.equal(ours, reference.dequantize_packed(*packed[:5], dtype=dtype or torch.float16))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(("n", "group", "shuffled"), [(96, 64, False), (64, 24, False), (64, 32, True)])
def test_against_fp64(backend, dtype, bits, tokens, n, group, shuffled, device):
    packed = packed_of(n, 32, bits, group, shuffled=shuffled, dtype=dtype, device=device)
    x, bias = rows_of(tokens, n, dtype=dtype, device=device), rows_of(32, dtype=dtype, device=device, seed=2)
    ours = call(x, packed, bias, backend)
    assert (ours.dtype, ours.shape) == (dtype, (tokens, 32))
    theirs = reference.quantized_linear(x.double(), *packed[:5], bias)
    assert relative(ours, theirs) < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_tokens_dequantise_once(backend, device):
    packed = packed_of(64, 32, 4, 32, device=device)
    x, bias = rows_of(140, 64, device=device), rows_of(32, device=device, seed=2)
    theirs = reference.quantized_linear(x.double(), *packed[:5], bias)
    assert relative(call(x, packed, bias, backend), theirs) < 1e-6
    assert relative(call(x.view(4, 5, 7, 64), packed, bias, backend), theirs.view(4, 5, 7, 32)) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_split_inputs_add_up(backend, monkeypatch, device):
    """More inputs than one stretch or split takes."""
    monkeypatch.setattr(cpu, "_ELEMENTS", 32 * 64)
    packed = packed_of(224, 32, 4, 32, device=device)
    for tokens in (1, 3):
        x = rows_of(tokens, 224, device=device)
        theirs = reference.quantized_linear(x.double(), *packed[:5])
        assert relative(call(x, packed, backend=backend), theirs) < 1e-6


@pytest.mark.parametrize("bits", BITS)
def test_stretches_begin_with_whole_words_where_groups_do_not(bits, monkeypatch):
    monkeypatch.setattr(cpu, "_ELEMENTS", 24 * 32)
    packed = packed_of(96, 32, bits, 24)
    x = rows_of(3, 96)
    assert relative(call(x, packed), reference.quantized_linear(x.double(), *packed[:5])) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_input_selects_one_column(backend, device):
    packed = packed_of(64, 32, 3, 32, device=device)
    weight = reference.dequantize_packed(*packed[:5])
    for j in (0, 10, 21, 31, 63):
        x = torch.zeros(1, 64, device=device)
        x[0, j] = 1
        torch.testing.assert_close(call(x, packed, backend=backend)[0], weight[:, j], atol=1e-7, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend, device):
    packed = packed_of(32, 32, 4, 32, device=device)
    assert call(torch.zeros(0, 32, device=device), packed, backend=backend).shape == (0, 32)
    assert call(torch.zeros(32, device=device), packed, backend=backend).eq(0).all()


@pytest.mark.parametrize("tokens", [2, 130])
def test_gradients(tokens):
    packed = packed_of(32, 32, 4, 16)
    x = rows_of(tokens, 32).double().requires_grad_()
    bias = rows_of(32, seed=2).double().requires_grad_()
    direction = rows_of(tokens, 32, seed=3).double()
    (call(x, packed, bias) * direction).sum().backward()
    weight = reference.dequantize_packed(*packed[:5], dtype=torch.float64)
    torch.testing.assert_close(x.grad, direction @ weight)
    torch.testing.assert_close(bias.grad, direction.sum(0))
    half = bias.detach().half().requires_grad_()
    (call(x, packed, half) * direction).sum().backward()
    assert half.grad.dtype == torch.float16


def test_fp64_is_fp64():
    packed = packed_of(96, 32, 4, 32)
    x = rows_of(3, 96).double()
    weight = reference.dequantize_packed(*packed[:5], dtype=torch.float64)
    torch.testing.assert_close(call(x, packed), x @ weight.T, atol=1e-12, rtol=1e-12)
    for backend in (*BACKENDS, "auto"):
        assert torch.equal(dequantize_packed(*packed[:5], dtype=torch.float64, backend=backend), weight)


def test_refuses_what_does_not_fit():
    packed = packed_of(64, 32, 4, 32)
    x = torch.zeros(1, 64)
    with pytest.raises(UnsupportedByKernel, match="bits must be"):
        call(x, packed._replace(bits=5))
    with pytest.raises(UnsupportedByKernel, match="qweight must be"):
        call(x, packed._replace(bits=8))
    with pytest.raises(UnsupportedByKernel, match="multiple of 8"):
        call(x, packed._replace(g_idx=packed.g_idx[:60]))
    with pytest.raises(UnsupportedByKernel, match="outputs must be a multiple"):
        call(x, packed._replace(qweight=packed.qweight[:, :30]))
    with pytest.raises(UnsupportedByKernel, match="qzeros must be"):
        call(x, packed._replace(qzeros=packed.qzeros[:1]))
    with pytest.raises(UnsupportedByKernel, match="int32"):
        call(x, packed._replace(g_idx=packed.g_idx.long()))
    with pytest.raises(UnsupportedByKernel, match="make 4 groups; scales have 2"):
        call(x, packed._replace(group_size=16))
    for shift in (1, -1):
        with pytest.raises(UnsupportedByKernel, match=r"g_idx must lie in 0\.\.1"):
            call(x, packed._replace(group_size=None, g_idx=packed.g_idx + shift))
    with pytest.raises(UnsupportedByKernel, match=r"\[\.\.\., 64\]"):
        call(torch.zeros(1, 32), packed)
    with pytest.raises(UnsupportedByKernel, match="bias"):
        call(x, packed, torch.zeros(64))
    with pytest.raises(UnsupportedByKernel, match="float64"):
        call(x.int(), packed)
    with pytest.raises(UnsupportedByKernel, match="scales must be float"):
        call(x, packed._replace(scales=packed.scales.double()))
    with pytest.raises(InvalidSetting):
        call(x, packed, backend="cuda")


def test_custom_ops_and_compile():
    packed = packed_of(64, 32, 4, 32)
    x = rows_of(3, 64).requires_grad_()
    parts = (*packed, None, "torch")
    torch.library.opcheck(package._quantized_linear, (x, *parts))
    torch.library.opcheck(package._dequantize, (*packed, torch.float32, "torch"))

    def loss(x):
        return call(x, packed).square().sum()

    torch.compile(loss, fullgraph=True, backend="aot_eager")(x).backward()
    compiled, x.grad = x.grad, None
    loss(x).backward()
    torch.testing.assert_close(compiled, x.grad)
