"""``numerics="int8"`` and ``pv_threshold``: both backends against the definition, and the definition against exact."""

from __future__ import annotations

import pytest
import torch
from block_sparse_cases import BACKENDS, Case

from hf_accel.errors import InvalidSetting, UnsupportedByKernel
from hf_accel.kernels.block_sparse_attention import block_sparse_attention, quantize, reference

FORMATS = [torch.float8_e4m3fn, torch.float16]


@pytest.fixture(autouse=True)
def exact_fp8_casts(monkeypatch, device):
    """Triton's interpreter loses the carry when rounding to FP8 reaches the next power of two: 126.3 becomes 64."""
    if device.type == "cuda":
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def exact(values, source, target, rounding):
        if source == tl.float32 and target == tl.float8e4nv:
            return torch.from_numpy(values.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return convert(values, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", exact)


def run(case, backend="torch", **kwargs):
    return block_sparse_attention(*case.arguments, block_size=case.block_size, backend=backend, **kwargs)


def cosine(one, other):
    return torch.nn.functional.cosine_similarity(one.flatten().double(), other.flatten().double(), 0).item()


def launch_and_definition(case, tile=(32, 32), value_dtype=torch.float8_e4m3fn, key_valid=None, causal=False, **how):
    from hf_accel.kernels.block_sparse_attention import triton_approximate
    from hf_accel.kernels.common.tile import Tile

    arguments = (*case.arguments, case.block_size, 0.25, key_valid, causal)
    got = triton_approximate.launch(*arguments, tile=Tile(*tile, 4, 1), value_dtype=value_dtype, **how)
    return got, reference.approximate_attention(*arguments, tile=tile, value_dtype=value_dtype, **how)


@pytest.mark.parametrize("value_dtype", FORMATS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(1, 2, 2, 131, 197, 32), (2, 4, 2, 70, 131, 80)], ids=str)
def test_int8_kernel_equals_the_definition(shape, causal, value_dtype, device):
    case = Case(shape, density=0.7, device=device)
    (out, lse), (expected, expected_lse, _) = launch_and_definition(
        case, value_dtype=value_dtype, causal=causal, int8=True
    )
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)
    # Where a weight lies between two numbers of the format, the last bit of exp2 decides: one step of one key.
    difference = (out - expected).abs()
    assert difference.max().item() < (2e-2 if value_dtype == torch.float8_e4m3fn else 5e-4)
    assert (difference < 1e-5).float().mean().item() > 0.9
    assert bool((out[expected_lse.isneginf()] == 0).all())


@pytest.mark.parametrize("block_size", [(64, 64), (128, 64), (64, 128), (128, 128)])
def test_int8_scales_belong_to_blocks(block_size, device):
    case = Case((1, 1, 1, 131, 259, 16), block_size, 0.8, device=device)
    case.qkv[0][:, :, 70:] *= 100
    case.qkv[1][:, :, 140:] *= 0.01
    (out, lse), (expected, expected_lse, _) = launch_and_definition(case, value_dtype=torch.float16, int8=True)
    torch.testing.assert_close(lse, expected_lse, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_int8_is_close_to_exact(head_dim, causal, backend, device):
    case = Case((1, 1, 1, 131, 197, head_dim), density=1.1, dtype=torch.float16, device=device)
    # Keys far from 0 in some channels, as in a real model: they cost nothing, because their mean is taken off.
    case.qkv[1][..., :4] += 20
    out, lse = run(case, backend, numerics="int8", causal=causal)
    expected, expected_lse = case.reference(causal=causal)
    assert out.dtype == torch.float16
    assert 0.999 < cosine(out, expected) < 1 - 1e-7
    torch.testing.assert_close(lse, expected_lse, atol=2e-2, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_does_not_see_a_constant_added_to_all_keys(backend, device):
    case = Case((1, 1, 1, 70, 131, 32), density=1.1, device=device)
    out, lse = run(case, backend, numerics="int8")
    shift = torch.randn(32, generator=torch.Generator().manual_seed(3)).to(device)
    case.qkv[1] = case.qkv[1] + shift
    other, other_lse = run(case, backend, numerics="int8")
    # An integer on the border between two may move.
    torch.testing.assert_close(other, out, atol=2e-2, rtol=0)
    torch.testing.assert_close(other_lse - lse, case.qkv[0] @ shift * 32**-0.5, atol=1e-2, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_keeps_constant_values(backend, device):
    case = Case((1, 1, 1, 70, 131, 32), density=1.1, device=device)
    case.qkv[2] = torch.linspace(-3, 3, 32, device=device).expand_as(case.qkv[2]).contiguous()
    out, _ = run(case, backend, numerics="int8")
    torch.testing.assert_close(out, case.qkv[2][:, :, :70], atol=0, rtol=2e-2)


@pytest.mark.parametrize("int8", [False, True])
def test_padding_keys_may_hold_anything(int8, device):
    case = Case((2, 2, 1, 70, 197, 32), density=0.8, device=device)
    valid = (torch.rand(2, 197, generator=torch.Generator().manual_seed(1)) < 0.6).to(device)
    valid[0, :64] = False
    for x in case.qkv[1:]:
        x.masked_fill_(~valid[:, None, :, None], float("inf"))
    how = {"int8": int8, "pv_threshold": None if int8 else 50.0}
    (out, lse), (expected, expected_lse, _) = launch_and_definition(
        case, value_dtype=torch.float16, key_valid=valid, **how
    )
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, expected, atol=5e-4, rtol=1e-3)
    case.qkv[1:] = [x.nan_to_num(posinf=0.0) for x in case.qkv[1:]]
    exact, _ = case.reference(key_valid=valid, scale=0.25)
    assert cosine(out, exact) > 0.995


def peaked(device, **kwargs):
    """A case in which key blocks differ much in their largest score, so that some are skipped."""
    case = Case((1, 2, 2, 131, 259, 16), density=1.1, device=device, **kwargs)
    case.qkv[1] = (
        case.qkv[1] * torch.tensor([4.0, 0.05, 2.0, 0.05, 0.05], device=device).repeat_interleave(64)[:259, None]
    )
    case.qkv[0] = case.qkv[0] + 1.5
    return case


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("threshold", [0.5, 4.0])
def test_skipping_equals_the_definition(threshold, causal, int8, device):
    case = peaked(device)
    case.index = case.index.clone().clamp(max=4)
    (out, lse), (expected, expected_lse, skipped) = launch_and_definition(
        case, causal=causal, int8=int8, pv_threshold=threshold, value_dtype=torch.float16
    )
    if not causal:
        assert int(skipped.sum()) > 0
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, expected, atol=1e-3 if int8 else 1e-5, rtol=1e-3 if int8 else 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_very_large_threshold_skips_nothing(backend, causal, device):
    case = Case((1, 2, 1, 131, 197, 40), density=0.7, device=device)
    out, lse = run(case, backend, pv_threshold=1e4, causal=causal)
    expected, expected_lse = case.reference(causal=causal)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


def test_skipped_mass_is_bounded(device):
    """Each skipped key has less than 2**-threshold of the largest weight; the more is skipped, the larger the error."""
    case = peaked(device)
    arguments = (*case.arguments, case.block_size, 0.25)
    exact, exact_lse = case.reference(scale=0.25)
    before, errors = None, []
    for threshold in (1.0, 4.0, 16.0):
        out, lse, skipped = reference.approximate_attention(*arguments, int8=False, pv_threshold=threshold)
        lost = 1 - (lse - exact_lse).exp()
        assert bool((lost >= -1e-5).all())
        assert lost.max().item() <= 259 * 2**-threshold + 1e-5
        assert before is None or int(skipped.sum()) <= before
        before = int(skipped.sum())
        errors.append((out - exact).abs().max().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-3


def test_integers_and_scales_bring_the_input_back():
    x = torch.randn(1, 2, 131, 16, generator=torch.Generator().manual_seed(0)) * 3
    integers, scale = quantize.quantize_blocks(x, 64)
    assert torch.equal(integers, integers.round())
    assert integers.abs().max().item() == 127
    back = (integers.unflatten(2, (-1, 64)) * scale[..., None, None]).flatten(2, 3)
    step = scale.repeat_interleave(64, 2)[..., None]
    assert bool(((back[:, :, :131] - x).abs() <= step[:, :, :131] * 0.5001).all())
    assert bool((back[:, :, 131:] == 0).all())
    half = torch.tensor([[[[127.0, 0.5, -0.5, -1.5]]]])
    assert quantize.quantize_blocks(half, 64)[0][0, 0, 0].tolist() == [127.0, 1.0, -1.0, -2.0]


@pytest.mark.parametrize("how", [{"numerics": "int8"}, {"pv_threshold": 10.0}], ids=str)
def test_gradients_are_refused_in_words(how):
    case = Case((1, 1, 1, 66, 70, 16), density=1.1)
    case.qkv[1].requires_grad_()
    with pytest.raises(UnsupportedByKernel, match=r"is for inference.*numerics='native'"):
        run(case, **how)
    with torch.no_grad():
        assert bool(run(case, **how)[0].isfinite().all())


@pytest.mark.parametrize(
    ("how", "words"),
    [({"numerics": "int4"}, "'native', 'int8'"), ({"pv_threshold": 0.0}, "above 0"), ({"pv_threshold": -1}, "above 0")],
)
def test_wrong_settings_are_refused(how, words):
    with pytest.raises(InvalidSetting, match=words):
        run(Case((1, 1, 1, 66, 70, 16), density=1.1), **how)


@pytest.mark.parametrize("backend", BACKENDS)
def test_custom_op(backend, device):
    case = Case((1, 1, 1, 66, 70, 16), density=1.1, device=device)
    case.index.clamp_(max=1)
    torch.library.opcheck(
        torch.ops.hf_accel.block_sparse_attention_approximate.default,
        (*case.arguments, 64, 64, 0.25, None, False, True, 20.0, backend),
    )
