from __future__ import annotations

import pytest
import torch
from kernel_helpers import kernel_dtypes

from hf_accel.errors import InvalidSetting, UnsupportedByKernel
from hf_accel.kernels.block_sparse_attention import block_map_to_index, block_sparse_attention, index_to_block_map
from hf_accel.kernels.sparse_linear_attention import (
    FEATURE_MAPS,
    LINEAR_SCOPES,
    _linear_attention,
    backend_for,
    feature_map,
    reference,
    scope,
    sparse_linear_attention,
)

TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
BACKENDS = ["triton", "torch"]


class Case:
    """Random inputs and classes of block pairs. ``shape`` is (B, H, Hkv, Sq, Sk, D)."""

    def __init__(
        self,
        shape=(1, 2, 2, 131, 261, 32),
        block_size=(64, 64),
        dtype=torch.float32,
        device="cpu",
        lead=None,
        shares=(0.3, 0.2),
        seed=0,
    ):
        self.generator = torch.Generator().manual_seed(seed)
        batch, heads, key_heads, num_queries, num_keys, head_dim = shape
        rows = [(heads, num_queries), (key_heads, num_keys), (key_heads, num_keys)]
        self.qkv = [torch.randn(batch, *r, head_dim, generator=self.generator).to(device, dtype) for r in rows]
        self.block_size = block_size
        blocks = [-(-num_queries // block_size[0]), -(-num_keys // block_size[1])]
        draw = torch.rand(*(lead or (batch, heads)), *blocks, generator=self.generator).to(device)
        self.critical, self.skipped = draw < shares[0], draw > 1 - shares[1]
        self.gradients = [torch.randn(self.qkv[0].shape, generator=self.generator).to(device, dtype) for _ in "sl"]

    def included(self, linear_scope):
        if linear_scope == "all":
            return torch.ones_like(self.critical)
        return ~self.critical & ~self.skipped if linear_scope == "marginal" else ~self.critical

    def run(self, backend, *, linear_scope="rest", qkv=None, **kwargs):
        index, count = block_map_to_index(self.critical)
        # Neither the order of a row nor what stands behind its end may matter.
        kept = torch.arange(index.shape[-1], device=index.device) < count[..., None]
        index = torch.where(kept, index, 10**6)
        if linear_scope == "marginal":
            kwargs["skip_index"], kwargs["skip_count"] = block_map_to_index(self.skipped)
        return sparse_linear_attention(
            *(qkv or self.qkv), index, count,
            linear_scope=linear_scope, block_size=self.block_size, backend=backend, **kwargs,
        )  # fmt: skip

    def reference(self, *, linear_scope="rest", qkv=None, **kwargs):
        qkv = qkv or [x.double() for x in self.qkv]
        included = self.included(linear_scope)
        return reference.sparse_linear_attention(*qkv, self.critical, included, block_size=self.block_size, **kwargs)

    def leaves(self, dtype=None):
        return [x.detach().to(dtype or x.dtype).requires_grad_() for x in self.qkv]


def close(got, expected, dtype, factor=1):
    tolerance = factor * TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), expected.double(), atol=tolerance, rtol=tolerance)


def check(case, backend, **kwargs):
    dtype = case.qkv[0].dtype
    outs = case.run(backend, **kwargs)
    for out, expected in zip(outs, case.reference(**kwargs), strict=True):
        assert out.dtype == dtype
        close(out, expected, dtype)
    return outs


def check_gradients(case, backend, **kwargs):
    """Gradients through both outputs, against fp64 autograd of the definition."""
    dtype = case.qkv[0].dtype
    leaves, exact = case.leaves(), case.leaves(torch.float64)
    outs = case.run(backend, qkv=leaves, **kwargs)
    got = torch.autograd.grad(outs, leaves, case.gradients)
    outs = case.reference(qkv=exact, **kwargs)
    expected = torch.autograd.grad(outs, exact, [x.double() for x in case.gradients])
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        close(a, b, dtype, 3)
    return got


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", kernel_dtypes(), ids=str)
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128])
def test_equals_the_definition(backend, dtype, head_dim, device):
    check(Case((1, 1, 1, 131, 197, head_dim), dtype=dtype, device=device), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("linear_scope", LINEAR_SCOPES)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_scopes_and_feature_maps(backend, linear_scope, feature_map, device):
    check(Case(device=device), backend, linear_scope=linear_scope, feature_map=feature_map)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", kernel_dtypes(), ids=str)
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128])
def test_gradients_equal_the_definition(backend, dtype, head_dim, device):
    check_gradients(Case((1, 1, 1, 70, 131, head_dim), dtype=dtype, device=device), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("linear_scope", LINEAR_SCOPES)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_gradients_of_scopes_and_feature_maps(backend, linear_scope, feature_map, device):
    check_gradients(Case(device=device), backend, linear_scope=linear_scope, feature_map=feature_map)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_size", [(128, 64), (64, 128)])
@pytest.mark.parametrize("lengths", [(129, 257), (128, 256), (1, 1), (64, 1)], ids=lambda x: f"{x[0]}x{x[1]}")
def test_ragged_last_blocks(backend, block_size, lengths, device):
    case = Case((1, 1, 1, *lengths, 16), block_size, device=device, shares=(0.4, 0.3))
    check(case, backend, linear_scope="rest")
    check(case, backend, linear_scope="marginal")
    check_gradients(case, backend, linear_scope="marginal")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_grouped_query_heads_and_shared_lists(backend, lead, device):
    case = Case((2, 4, 2, 66, 70, 16), lead=lead, device=device)
    check(case, backend, linear_scope="marginal")
    check_gradients(case, backend, linear_scope="marginal")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("linear_scope", LINEAR_SCOPES)
def test_hidden_keys_take_no_part(backend, linear_scope, device):
    case = Case((2, 1, 1, 70, 131, 16), device=device)
    valid = torch.rand(2, 131, generator=case.generator) < 0.6
    valid[0, :64] = False  # a whole block
    valid[1] = False  # a whole batch entry
    valid = valid.to(device)
    hidden = ~valid[:, None, :, None]
    case.qkv[1:] = [x.masked_fill(hidden, 0.0) for x in case.qkv[1:]]
    outs = check(case, backend, linear_scope=linear_scope, key_valid=valid)
    assert bool((torch.stack(outs)[:, 1] == 0).all())
    _, grad_key, grad_value = check_gradients(case, backend, linear_scope=linear_scope, key_valid=valid)
    assert bool((grad_key.masked_select(hidden) == 0).all())
    assert bool((grad_value.masked_select(hidden) == 0).all())
    # What the hidden keys hold is not read.
    case.qkv[1:] = [x.masked_fill(hidden, float("inf")) for x in case.qkv[1:]]
    for out, again in zip(outs, case.run(backend, linear_scope=linear_scope, key_valid=valid), strict=True):
        assert torch.equal(out, again)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("linear_scope", ["rest", "marginal"])
@pytest.mark.parametrize("share", [0.2, 0.8])
def test_rows_with_an_empty_scope(backend, linear_scope, share, device):
    case = Case((1, 1, 1, 131, 197, 32), device=device, shares=(share, 0.1))
    case.critical[:, 0, 1] = True
    case.skipped[:, 0, 1] = False
    _, linear_out = check(case, backend, linear_scope=linear_scope)
    assert bool((linear_out[:, 0, 64:128] == 0).all())
    check_gradients(case, backend, linear_scope=linear_scope)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_critical_blocks(backend, device):
    case = Case(device=device)
    case.critical[:, 1, 0] = False
    sparse_out, linear_out = check(case, backend)
    assert bool((sparse_out[:, 1, :64] == 0).all())
    assert bool((linear_out[:, 1, :64] != 0).any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_budget_is_dense_attention(backend, device):
    case = Case(device=device, shares=(1.1, 0.0))
    sparse_out, linear_out = case.run(backend)
    close(sparse_out, torch.nn.functional.scaled_dot_product_attention(*case.qkv), torch.float32)
    assert bool((linear_out == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_branch_is_block_sparse_attention(backend, device):
    case = Case(device=device)
    expected, _ = block_sparse_attention(*case.qkv, *block_map_to_index(case.critical), block_size=64, backend=backend)
    for linear_scope in LINEAR_SCOPES:
        sparse_out, _ = case.run(backend, linear_scope=linear_scope)
        torch.testing.assert_close(sparse_out, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("linear_scope", LINEAR_SCOPES)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_constant_values_come_back(backend, linear_scope, feature_map, device):
    """A wrong denominator shows as a factor. Values of a constant leave no gradient to query and key."""
    case = Case(device=device, shares=(0.3, 0.1))
    case.critical[..., 0] = case.skipped[..., 0] = False  # no scope is empty
    constant = torch.linspace(-2, 3, 32, device=device)
    case.qkv[2] = constant.expand_as(case.qkv[2]).contiguous()
    settings = {"linear_scope": linear_scope, "feature_map": feature_map}
    close(case.run(backend, **settings)[1], constant.expand(1, 2, 131, 32), torch.float32)
    leaves = case.leaves()
    gradients = torch.autograd.grad(case.run(backend, qkv=leaves, **settings)[1], leaves[:2], case.gradients[1])
    for gradient in gradients:
        close(gradient, torch.zeros_like(gradient), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("linear_scope", LINEAR_SCOPES)
def test_fused_and_separate_branches_agree(backend, linear_scope, device):
    """Without gradients a GPU runs one kernel, with them two: the same numbers up to rounding."""
    case = Case(device=device)
    for out, other in zip(
        case.run(backend, linear_scope=linear_scope),
        case.run(backend, linear_scope=linear_scope, qkv=case.leaves()),
        strict=True,
    ):
        assert not out.requires_grad
        assert other.requires_grad
        torch.testing.assert_close(out, other.detach(), atol=2e-6, rtol=2e-6)


def test_index_with_a_bound_on_its_rows(device):
    """With at most half of the blocks critical by shape, the fused kernel needs no second list."""
    from hf_accel.kernels.sparse_linear_attention import _lists_beside_the_critical

    case = Case(device=device)
    case.critical = torch.arange(5, device=device).expand(1, 2, 3, 5) < 2
    index, count = block_map_to_index(case.critical)
    index = index[..., :2].contiguous()
    assert _lists_beside_the_critical(index, count, None, None, "rest", 5) == (None, None, None)
    outs = sparse_linear_attention(*case.qkv, index, count, backend="triton")
    for out, expected in zip(outs, case.reference(), strict=True):
        close(out, expected, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_orthogonal_relu_features_give_nothing(backend, device):
    """All that a query could see is in its critical blocks: 0, not rounding divided by rounding."""
    case = Case((1, 1, 1, 64, 320, 16), device=device)
    case.critical = torch.arange(5, device=device).expand(1, 1, 1, 5) < 2
    sign = torch.where(torch.arange(16, device=device) < 8, 1.0, -1.0)
    case.qkv[0] = case.qkv[0].abs() * sign
    case.qkv[1] = torch.cat([case.qkv[1][:, :, :128], -case.qkv[1][:, :, 128:].abs() * sign], 2)
    _, linear_out = case.run(backend, feature_map="relu")
    assert bool((linear_out == 0).all())
    check_gradients(case, backend, feature_map="relu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_of_a_transformer(backend, device):
    case = Case((2, 2, 2, 70, 131, 16), device=device)
    case.qkv = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.qkv]
    for out in check(case, backend):
        assert out.stride() == case.qkv[0].stride()
    case.qkv[1] = case.qkv[1].contiguous()
    case.gradients = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.gradients]
    check(case, backend)
    check_gradients(case, backend)


def test_offsets_of_64_bits(device, monkeypatch):
    from hf_accel.kernels.sparse_linear_attention import triton

    monkeypatch.setattr(triton, "_wide", lambda *tensors: True)
    case = Case((2, 2, 2, 70, 131, 16), device=device)
    check(case, "triton")
    check_gradients(case, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_are_bit_equal(backend, device):
    case = Case((1, 2, 1, 131, 197, 32), device=device)
    first, second = (case.run(backend, linear_scope="marginal") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    first, second = (check_gradients(case, backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("linear_scope", LINEAR_SCOPES)
@pytest.mark.parametrize("feature_map", ["softmax", "elu"])
def test_gradcheck(linear_scope, feature_map):
    """Finite differences in fp64 through both outputs, with critical, marginal and negligible blocks."""
    case = Case((1, 2, 1, 66, 130, 4), shares=(0.35, 0.35), seed=3)
    for block_map in (case.critical, case.skipped, case.included("marginal")):
        assert bool(block_map.any())
    leaves = case.leaves(torch.float64)

    def run(*qkv):
        return case.run("torch", linear_scope=linear_scope, feature_map=feature_map, qkv=list(qkv))

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("feature_map", ["softmax", "elu"])
@pytest.mark.parametrize("with_map", [True, False])
def test_gradcheck_of_the_linear_branch_in_small_blocks(feature_map, with_map):
    """Every entry of the Jacobian, at 48 tokens in blocks of 8."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, h, 48, 8, generator=generator, dtype=torch.float64).requires_grad_() for h in (2, 1, 1)]
    included = torch.rand(1, 2, 6, 6, generator=generator) < 0.6 if with_map else None

    def run(*qkv):
        return _linear_attention(*qkv, included, 8, 8, feature_map, None, "torch")[0]

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_feature_map_backward(name):
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    features = feature_map.apply_feature_map(x, name)
    gradient = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (expected,) = torch.autograd.grad(features, x, gradient)
    torch.testing.assert_close(feature_map.feature_map_backward(features, gradient, name), expected)


@pytest.mark.parametrize("columns", [1, 2, 7, 8])
def test_shorter_lists(columns):
    included = torch.rand(2, 3, 40, columns, generator=torch.Generator().manual_seed(0)) < 0.5
    included[0, 0, 0], included[0, 0, 1] = True, False
    index, count, direct = scope.shorter_lists(included)
    assert index.dtype == count.dtype == torch.int32
    assert int(count.max()) <= max(1, columns // 2) == index.shape[-1]
    listed = index_to_block_map(index, count, columns)
    assert torch.equal(torch.where(direct.bool()[..., None], listed, ~listed), included)
    done = torch.rand(included.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    index, count, other = scope.shorter_lists(included, subtracted=done)
    assert torch.equal(other, direct)
    expected = torch.where(direct.bool()[..., None], included, ~included & ~done)
    assert torch.equal(index_to_block_map(index, count, columns), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_form_at_a_larger_size(dtype):
    case = Case((1, 2, 1, 1531, 1783, 64), (128, 64), dtype=dtype)
    check(case, "torch")
    check_gradients(case, "torch")


def test_head_dim_256_runs_in_torch(device):
    case = Case((1, 1, 1, 70, 70, 256), device=device)
    check(case, "torch")
    assert backend_for(case.qkv[0]).backend == "torch"
    with pytest.raises(UnsupportedByKernel, match="head dim 256"):
        case.run("triton")


@pytest.mark.parametrize("linear_scope", ["rest", "all"])
def test_compiles_without_a_graph_break(linear_scope, device):
    case = Case((1, 1, 1, 66, 130, 16), device=device)
    index, count = block_map_to_index(case.critical)

    def layer(*qkv):
        sparse_out, linear_out = sparse_linear_attention(*qkv, index, count, linear_scope=linear_scope, backend="torch")
        return sparse_out + 2 * linear_out

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(*case.qkv), layer(*case.qkv))
    leaves = case.leaves()
    expected = torch.autograd.grad(layer(*leaves), leaves, case.gradients[0])
    for got, wanted in zip(torch.autograd.grad(compiled(*leaves), leaves, case.gradients[0]), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_map", [True, False])
def test_custom_op_of_the_linear_branch(backend, with_map, device):
    case = Case((1, 1, 1, 66, 130, 16), device=device)
    included = case.included("rest") if with_map else None
    torch.library.opcheck(
        torch.ops.hf_accel.block_linear_attention.default,
        (*case.leaves(), included, 64, 64, "softmax", None, backend),
    )


def test_fused_custom_op(device):
    case = Case((1, 1, 1, 66, 130, 16), device=device)
    index, count = block_map_to_index(case.critical)
    other = scope.shorter_lists(case.included("rest"), subtracted=case.critical)
    torch.library.opcheck(
        torch.ops.hf_accel.sparse_linear_attention_fused.default,
        (*case.qkv, index, count, *other, True, 64, 64, 0.25, "softmax", None),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_queries(backend, device):
    case = Case((1, 2, 1, 0, 70, 16), device=device)
    assert [out.shape for out in case.run(backend)] == [(1, 2, 0, 16)] * 2
    leaves = case.leaves()
    gradients = torch.autograd.grad(case.run(backend, qkv=leaves)[1].sum(), leaves)
    assert all(bool((x == 0).all()) for x in gradients)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"feature_map": "hedgehog"}, InvalidSetting, "'feature_map' must be one of 'softmax', 'elu', 'relu'"),
        ({"linear_scope": "some"}, InvalidSetting, "'linear_scope' must be one of 'marginal', 'rest', 'all'"),
        ({"linear_scope": "marginal"}, InvalidSetting, "'skip_index' must be the list of negligible blocks"),
        ({"skip_index": torch.zeros(1, 1, 2, 1).int()}, InvalidSetting, "linear_scope='rest' skips no block"),
        ({"block_size": 48}, UnsupportedByKernel, "64 or 128"),
        ({"scale": -1.0}, UnsupportedByKernel, "scale must be a positive"),
        ({"key_valid": torch.ones(1, 131)}, UnsupportedByKernel, "key_valid must be bool"),
        ({"key": torch.zeros(1, 2, 131, 8)}, UnsupportedByKernel, "key must be .*D=16"),
        ({"key": torch.zeros(1, 3, 131, 16)}, UnsupportedByKernel, "value must be .*Hkv=3"),
        ({"block_index": torch.zeros(1, 2, 2, 1)}, UnsupportedByKernel, "block_index must be int32"),
        ({"block_count": torch.zeros(1, 2, 9).int()}, UnsupportedByKernel, "block_count must be"),
        ({"query": torch.zeros(1, 2, 16, 70).mT}, UnsupportedByKernel, "last axis of query"),
        ({"backend": "cuda"}, InvalidSetting, "backend"),
    ],
)
def test_wrong_inputs_are_refused_in_words(change, error, words):
    case = Case((1, 2, 2, 70, 131, 16))
    names = ("query", "key", "value", "block_index", "block_count")
    arguments = dict(zip(names, (*case.qkv, *block_map_to_index(case.critical)), strict=True))
    with pytest.raises(error, match=words):
        sparse_linear_attention(**(arguments | {"backend": "torch"} | change))


def test_skip_lists_are_checked():
    case = Case((1, 2, 2, 70, 131, 16))
    index, count = block_map_to_index(case.critical)
    with pytest.raises(UnsupportedByKernel, match="skip_index must be"):
        sparse_linear_attention(
            *case.qkv, index, count, skip_index=index[:, :, :1], skip_count=count[:, :, :1], linear_scope="marginal"
        )


def test_backend_is_chosen_with_a_reason(device):
    choice = backend_for(torch.zeros(1, 1, 4, 16, device=device))
    assert choice.backend == ("triton" if device.type == "cuda" else "torch")
    assert choice.reason
