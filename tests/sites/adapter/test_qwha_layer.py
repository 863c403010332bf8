"""One layer with QWHA adapters: places, sides, gradients, memory, and the bases that it stands on."""

from __future__ import annotations

import adapted
import pytest
import torch
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, QuantizationBackend
from torch import nn
from torch.nn import functional as F

from hf_accel.errors import NotApplicable, WeightsMismatch
from hf_accel.kernels.hadamard import hadamard_matrix
from hf_accel.kernels.quantized_linear import MOST_FUSED_TOKENS
from hf_accel.kernels.qwha_weight import reference
from hf_accel.peft import QWHAConfig, QWHALinear
from hf_accel.quant.formats import format_of
from hf_accel.quant.grid import Scheme, encode, fit_grid
from hf_accel.quant.packed_linear import PackedLinear
from hf_accel.sites.adapter.peft import backends
from hf_accel.sites.adapter.peft.qwha.coefficients import (
    Coefficients,
    add_up,
    check_positions,
    combine,
    from_places,
    spread,
)

SIZES = [(40, 64), (40, 96), (7, 80), (48, 76), (5, 13)]  # 2^6, 12 * 2^3, 20 * 2^2, blocks of 4, blocks of 1


def layer_on(base: nn.Module, adapters: tuple[str, ...] = ("default",), **settings) -> QWHALinear:
    base.requires_grad_(False)
    made = None
    for number, name in enumerate(adapters):
        chosen = QWHAConfig(**{"r": 2, "init_weights": False, "alpha": 0.3, "seed": number, **settings})
        if made is None:
            made = QWHALinear(base, name, chosen, "layer")
        else:
            made.update_layer(name, chosen)
    assert made is not None
    made.set_adapter(list(adapters))
    return made


def linear(m: int, n: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(n, m, bias, dtype=dtype)


def packed(m: int = 64, n: int = 96, bits: int = 3, group_size: int = 32, dtype=torch.float32) -> PackedLinear:
    torch.manual_seed(0)
    weight = torch.randn(m, n)
    scheme = Scheme.grouped(format_of(f"int{bits}"), group_size)
    grid = fit_grid(weight, scheme, scale_dtype=dtype)
    codes = encode(weight, grid, scheme)
    return PackedLinear.from_codes(codes, grid.scale, grid.zero, None, bits, group_size, torch.randn(m), dtype=dtype)


def update_by_definition(layer: QWHALinear, name: str = "default") -> torch.Tensor:
    """dW from the dense F and the whole H, in fp64."""
    values = layer.qwha_values[name].double() * layer.factor(name).double()
    parts = layer.qwha_indptr[name], layer.qwha_columns[name], values
    dense = reference.scatter(*parts, layer.in_features)
    h = torch.block_diag(*[hadamard_matrix(layer.block, torch.float64)] * (layer.in_features // layer.block))
    return dense @ h / layer.block


# -- places ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "count"), [(4, 8, 32), (7, 13, 1), (7, 13, 40), (3, 100, 7), (100, 3, 250)])
def test_spread_places_are_distinct_even_and_private(m, n, count):
    state = torch.random.get_rng_state()
    indptr, columns = spread(m, n, count, torch.Generator().manual_seed(1))
    assert torch.equal(torch.random.get_rng_state(), state)
    check_positions("test", indptr, columns, m, n)
    rows = indptr.diff()
    assert len(columns) == count
    assert int(rows.max() - rows.min()) <= 1
    used = torch.bincount(columns.long(), minlength=n)
    assert int(used.max() - used.min()) <= max(2, -(-m // n) + 1)
    assert not torch.equal(columns, spread(m, n, count, torch.Generator().manual_seed(2))[1]) or count in (32, 1)


@pytest.mark.parametrize(("m", "n"), SIZES)
def test_f_of_random_values_has_full_rank(m, n):
    layer = layer_on(linear(m, n))
    assert torch.linalg.matrix_rank(update_by_definition(layer)) == min(m, n)


def test_columns_are_unsigned_in_16_bits_and_32_beyond():
    n = 1 << 16
    indptr, columns = spread(2, n, 20, torch.Generator().manual_seed(0))
    assert columns.dtype == torch.int16
    assert int(columns.min()) < 0  # as signed numbers some are
    check_positions("test", indptr, columns, 2, n)
    assert spread(2, n + 8, 20, torch.Generator().manual_seed(0))[1].dtype == torch.int32


def test_sums_of_f():
    generator = torch.Generator().manual_seed(0)
    parts = []
    for count in (11, 60, 1):
        indptr, columns = spread(6, 16, count, generator)
        parts.append(Coefficients(indptr, columns, torch.randn(count, generator=generator)))
    dense = sum(reference.scatter(*part, 16) for part in parts)
    assert torch.allclose(reference.scatter(*combine(parts), 16), dense)
    once = add_up(parts, 16)
    check_positions("test", once.indptr, once.columns, 6, 16)
    assert torch.allclose(reference.scatter(*once, 16), dense)
    shuffled = torch.randperm(len(once.values), generator=generator)
    rows, columns = once.places
    again = from_places(rows[shuffled], columns[shuffled], once.values[shuffled], 6, 16)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_set_coefficients_checks_and_divides_by_the_factor():
    layer = layer_on(linear(4, 8), alpha=2.0)
    indptr, columns, values = layer.coefficients(["default"])
    layer.set_coefficients("default", Coefficients(indptr, columns, values * 3))
    assert torch.allclose(layer.coefficients(["default"]).values, values * 3)
    with pytest.raises(WeightsMismatch, match="23 were given"):
        layer.set_coefficients("default", Coefficients(indptr, columns[1:], values[1:]))
    with pytest.raises(WeightsMismatch, match="ascend"):
        layer.set_coefficients("default", Coefficients(indptr, columns.flip(0), values))


# -- the update --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n"), SIZES)
@pytest.mark.parametrize("path", ["weight", "activation"])
@pytest.mark.parametrize("adapters", [("a",), ("a", "b", "c")], ids=["one", "three"])
def test_forward_and_gradients_are_those_of_the_dense_update(m, n, path, adapters):
    layer = layer_on(linear(m, n, torch.float64), adapters, path=path)
    x = torch.randn(3, 5, n, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 5, m, dtype=torch.float64)
    out = layer(x)
    (out * weight).sum().backward()
    ours = [x.grad.clone(), *(layer.qwha_values[name].grad.clone() for name in adapters)]
    x.grad = None
    layer.zero_grad()
    base = layer.base_layer
    expected = F.linear(x, base.weight + sum(update_by_definition(layer, a) for a in adapters), base.bias)
    (expected * weight).sum().backward()
    assert torch.allclose(out, expected, atol=1e-12)
    assert torch.allclose(ours[0], x.grad, atol=1e-12)
    for name, gradient in zip(adapters, ours[1:], strict=True):
        assert torch.allclose(gradient, layer.qwha_values[name].grad, atol=1e-11)


def test_two_sides_are_equal_in_fp64():
    x = torch.randn(9, 96, dtype=torch.float64)
    weight, activation = (
        layer_on(linear(40, 96, torch.float64), path=path)(x).detach() for path in ("weight", "activation")
    )
    assert torch.allclose(weight, activation, atol=1e-13, rtol=0)


def test_the_orthonormal_unit_and_the_released_scale():
    n, m = 64, 16
    ours = layer_on(linear(m, n), alpha=1.0, n_coefficients=m * n)
    values = ours.qwha_values["default"].double()
    assert torch.allclose(update_by_definition(ours).norm(), values.norm(), rtol=1e-6)
    theirs = layer_on(linear(m, n), alpha=1.0, scale=150.0, n_coefficients=m * n)
    h = hadamard_matrix(n, torch.float64)
    dense = values.view(m, n)
    assert torch.allclose(update_by_definition(theirs), 150.0 / m**0.5 * dense @ h / n, rtol=1e-6)


def test_auto_takes_the_activations_side_for_few_tokens_only():
    layer = layer_on(linear(256, 256), r=4)
    few, many = torch.randn(1, 256), torch.randn(4096, 256)
    assert (layer.side(few, ["default"]), layer.side(many, ["default"])) == ("activation", "weight")
    for x in (few, many):
        expected = F.linear(x, layer.base_layer.weight + update_by_definition(layer).float(), layer.base_layer.bias)
        assert torch.allclose(layer(x), expected, atol=1e-4)


@pytest.mark.parametrize("base", ["dense", "packed"])
def test_nothing_of_a_weights_size_is_kept_for_backward(base):
    m, n, tokens = 64, 96, 4
    layer = layer_on(linear(m, n) if base == "dense" else packed(m, n), path="weight")
    own = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept = []
    x = torch.randn(tokens, n, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = layer(x)
    strangers = [t for t in kept if t.data_ptr() not in own]
    assert strangers
    assert max(t.numel() for t in strangers) < m * n / 4
    out.sum().backward()
    assert layer.qwha_values["default"].grad is not None


def test_a_trained_base_and_bias_get_their_gradients():
    layer = layer_on(linear(8, 16, torch.float64), path="weight")
    layer.base_layer.requires_grad_(True)
    x = torch.randn(5, 16, dtype=torch.float64)
    layer(x).square().sum().backward()
    ours = layer.base_layer.weight.grad.clone(), layer.base_layer.bias.grad.clone()
    layer.zero_grad()
    base = layer.base_layer
    F.linear(x, base.weight + update_by_definition(layer).detach(), base.bias).square().sum().backward()
    assert torch.allclose(ours[0], base.weight.grad)
    assert torch.allclose(ours[1], base.bias.grad)


# -- dtypes ------------------------------------------------------------------------------------------------------------


def test_the_factor_survives_every_change_of_dtype():
    layer = layer_on(linear(40, 96), alpha=0.123456789)
    before = float(layer.factor("default"))
    layer.bfloat16().half().float()
    assert float(layer.factor("default")) == before
    assert layer.qwha_columns["default"].dtype == torch.int16


@pytest.mark.parametrize("path", ["weight", "activation"])
def test_bfloat16_base_with_fp32_values(path):
    layer = layer_on(linear(40, 96, torch.bfloat16), path=path)
    layer.qwha_values["default"].data = layer.qwha_values["default"].data.float()
    x = torch.randn(6, 96).bfloat16()
    out = layer(x)
    assert out.dtype == torch.bfloat16
    expected = F.linear(x.double(), layer.base_layer.weight.double() + update_by_definition(layer))
    expected = expected + layer.base_layer.bias.double()
    assert (out.double() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("path", ["weight", "activation"])
@pytest.mark.parametrize("base", ["dense", "packed"])
def test_autocast_is_that_of_a_linear(base, path):
    layer = layer_on(linear(64, 96) if base == "dense" else packed(), path=path)
    x = torch.randn(6, 96, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        plain = layer.base_layer(x)
    assert out.dtype == plain.dtype == torch.bfloat16
    exact = layer(x)
    assert (out.float() - exact).norm() < 0.02 * exact.norm()
    out.float().square().sum().backward()
    low, low_x = layer.qwha_values["default"].grad.clone(), x.grad.clone()
    x.grad = None
    layer.zero_grad()
    exact.square().sum().backward()
    assert low.dtype == torch.float32
    assert (low - layer.qwha_values["default"].grad).norm() < 0.05 * low.norm()
    assert (low_x - x.grad).norm() < 0.05 * low_x.norm()


def test_dtypes_that_do_not_fit_fail_as_without_an_adapter():
    for path in ("weight", "activation"):
        with pytest.raises(RuntimeError, match="dtype"):
            layer_on(linear(8, 16, torch.bfloat16), path=path)(torch.randn(3, 16))


# -- bases -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, MOST_FUSED_TOKENS["torch"], MOST_FUSED_TOKENS["torch"] + 1])
@pytest.mark.parametrize("path", ["activation", "weight"])
@torch.no_grad()
def test_zero_coefficients_on_a_packed_base_are_the_base_bit_for_bit(tokens, path):
    base = packed()
    layer = layer_on(base, init_weights=True, path=path)
    x = torch.randn(tokens, 96)
    if path == "activation" or tokens > MOST_FUSED_TOKENS["torch"]:
        assert torch.equal(layer(x), base(x))
    else:  # the base then multiplies codes; the weight's side is the product with the dequantised weight, to the bit
        assert torch.equal(layer(x), F.linear(x, base.dequantize_weight(torch.float32), base.bias))
        assert torch.allclose(layer(x), base(x), atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("path", ["weight", "activation"])
def test_a_packed_base_is_its_dequantised_weight(bits, path):
    base = packed(bits=bits)
    layer, dense = layer_on(base, path=path), linear(64, 96)
    with torch.no_grad():
        dense.weight.copy_(base.dequantize_weight(torch.float32))
        dense.bias.copy_(base.bias)
    other = layer_on(dense, path=path)
    x = torch.randn(30, 96)
    for made in (layer, other):
        made(x).square().sum().backward()
    assert torch.allclose(layer(x), other(x), atol=1e-4)
    gradients = [made.qwha_values["default"].grad for made in (layer, other)]
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4 * float(gradients[1].abs().max()))


@pytest.mark.parametrize("path", ["weight", "activation"])
@torch.no_grad()
def test_conv1d(path):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    base = Conv1D(40, 96)
    layer = layer_on(base, path=path)
    x = torch.randn(2, 7, 96)
    expected = base(x) + x @ update_by_definition(layer).float().T
    assert torch.allclose(layer(x), expected, atol=1e-5)
    before = base.weight.clone()
    layer.merge()
    assert torch.allclose(base(x), expected, atol=1e-5)
    assert torch.equal(layer(x), base(x))
    layer.unmerge()
    assert torch.allclose(base.weight, before, atol=1e-6)
    assert not layer.supports_lora_conversion()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@torch.no_grad()
def test_gpt2_whole():
    from peft import get_peft_model

    dense = adapted.run(adapted.build("gpt2"), "gpt2")
    settings = {"r": 2, "init_weights": False, "alpha": 0.1}
    model = get_peft_model(adapted.build("gpt2"), QWHAConfig(**settings, target_modules=["c_attn", "c_proj"]))
    ours = adapted.run(model, "gpt2")
    assert (ours - dense).abs().max() > 1e-3
    assert torch.allclose(adapted.run(model.merge_and_unload(), "gpt2"), ours, atol=1e-5)


class ForeignLinear(nn.Module):
    """Stands for another library's quantised linear: a forward of its own, no weight."""

    def __init__(self, m: int = 40, n: int = 96):
        super().__init__()
        self.in_features, self.out_features = n, m
        self.register_buffer("qweight", torch.randn(m, n).mul(10).round().to(torch.int8))
        self.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.qweight.to(x.dtype) / 10)


class Readable(QuantizationBackend):
    layer_type, supports_merge, backend_name = "linear", True, "readable"

    def get_base_weight(self, base_layer):
        return base_layer.qweight.float() / 10

    def set_base_weight(self, peft_layer, weight_data):
        peft_layer.get_base_layer().qweight = (weight_data * 10).round().to(torch.int8)


@pytest.mark.parametrize("path", ["weight", "activation"])
@pytest.mark.parametrize("backend", [ForwardOnlyQuantizationBackend("foreign"), Readable()], ids=["closed", "open"])
def test_other_libraries_layers_keep_their_own_forward(monkeypatch, backend, path):
    monkeypatch.setattr(
        backends, "resolve_quantization_backend", lambda layer, **_: backend if type(layer) is ForeignLinear else None
    )
    base = ForeignLinear()
    layer = layer_on(base, path=path)
    x = torch.randn(200, 96, requires_grad=True)
    out = layer(x)
    assert torch.allclose(out, base(x) + x @ update_by_definition(layer).float().T, atol=1e-4)
    out.sum().backward()
    assert layer.qwha_values["default"].grad.abs().max() > 0
    zero = layer_on(base, path=path, init_weights=True)
    assert torch.equal(zero(x), base(x))
    if backend.supports_merge:
        before = base.qweight.clone()
        layer.merge()
        assert not torch.equal(base.qweight, before)
        assert torch.equal(layer.dense_base_weight(), base.qweight / 10)
    else:
        for forbidden in (layer.merge, layer.dense_base_weight):
            with pytest.raises(NotApplicable, match="foreign"):
                forbidden()


def test_a_layer_of_an_unknown_quantiser_is_refused():
    from peft import get_peft_model

    model = nn.Sequential(ForeignLinear())
    with pytest.raises(NotApplicable, match="neither peft nor hf_accel knows"):
        get_peft_model(model, QWHAConfig(r=2, target_modules=["0"]))


def test_hooks_on_the_base_still_run():
    base = linear(40, 96)
    layer = layer_on(base, path="weight")
    x = torch.randn(20, 96)
    expected = layer(x)
    seen = []
    base.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert torch.allclose(layer(x), expected, atol=1e-5)
    assert seen == [(20, 40)]


def test_around_another_tuners_layer():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(96, 40)), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    inner = model.base_model.model[0]
    x = torch.randn(50, 96)
    layer = layer_on(inner, path="weight")
    assert torch.allclose(layer(x), inner(x) + x @ update_by_definition(layer).float().T, atol=1e-5)


@torch.no_grad()
def test_safe_merge_refuses_nan_and_leaves_the_base():
    base = linear(8, 16)
    before = base.weight.clone()
    layer = layer_on(base)
    layer.qwha_values["default"][0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert torch.equal(base.weight, before)
    assert not layer.merged


@torch.no_grad()
def test_a_bfloat16_base_merges_to_the_weight_of_its_forward():
    base = linear(40, 96, torch.bfloat16)
    layer = layer_on(base, ("a", "b"), path="weight")
    for values in layer.qwha_values.values():
        values.data = values.data.float()
    x = torch.randn(70, 96).bfloat16()
    expected = layer(x)
    layer.merge()
    assert torch.equal(layer(x), expected)
    assert layer.merged_adapters == ["a", "b"]
