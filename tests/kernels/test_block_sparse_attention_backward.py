"""Gradients of block_sparse_attention: against autograd through the definition, and against finite differences."""

from __future__ import annotations

import pytest
import torch
from block_sparse_cases import BACKENDS, Case
from kernel_helpers import kernel_dtypes

from hf_accel.errors import UnsupportedByKernel
from hf_accel.kernels.block_sparse_attention import block_sparse_attention

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def gradients(case, backend, through=("out", "lse"), seed=5, **kwargs):
    """Gradients of query, key, value by ``backend`` and by the fp64 definition, for a random loss."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [x.detach().requires_grad_() for x in case.qkv]
    out, lse = block_sparse_attention(
        *inputs, case.index, case.count, block_size=case.block_size, backend=backend, **kwargs
    )
    exact = [x.detach().double().requires_grad_() for x in case.qkv]
    if kwargs.get("key_valid") is not None:
        # The kernel must not read them; the definition would multiply them by 0.
        exact = [x.detach().nan_to_num(0.0, 0.0, 0.0).requires_grad_() for x in exact]
    expected_out, expected_lse = case.reference(qkv=exact, **kwargs)
    grad_out = torch.randn(out.shape, generator=generator).to(out)
    grad_lse = torch.randn(lse.shape, generator=generator).to(lse)
    loss, expected_loss = 0.0, 0.0
    if "out" in through:
        loss = loss + (out.double() * grad_out.double()).sum()
        expected_loss = expected_loss + (expected_out * grad_out.double()).sum()
    if "lse" in through:
        finite = expected_lse.isfinite()
        loss = loss + (torch.where(finite, lse, 0).double() * grad_lse.double()).sum()
        expected_loss = expected_loss + (torch.where(finite, expected_lse, 0) * grad_lse.double()).sum()
    expected = torch.autograd.grad(expected_loss, exact, materialize_grads=True)
    return torch.autograd.grad(loss, inputs), expected


def check(case, backend, **kwargs):
    got, expected = gradients(case, backend, **kwargs)
    tolerance = TOLERANCE[case.qkv[0].dtype]
    for mine, exact, like in zip(got, expected, case.qkv, strict=True):
        assert mine.dtype == like.dtype
        assert mine.shape == like.shape
        scale = max(1.0, exact.abs().max().item())
        torch.testing.assert_close(mine.double(), exact, atol=tolerance * scale, rtol=tolerance)
    return got


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", kernel_dtypes(), ids=str)
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128])
def test_equals_autograd_of_the_definition(backend, dtype, head_dim, device):
    check(Case((1, 2, 2, 67, 131, head_dim), dtype=dtype, device=device), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block_size", [(64, 64), (128, 64), (64, 128), (128, 128)])
@pytest.mark.parametrize(
    "lengths", [(129, 257), (128, 128), (257, 127), (1, 1), (64, 1)], ids=lambda x: f"{x[0]}x{x[1]}"
)
def test_ragged_last_blocks(backend, causal, block_size, lengths, device):
    check(Case((1, 1, 1, *lengths, 16), block_size, 0.7, device=device), backend, causal=causal)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("index_lead", [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_grouped_query_heads_and_shared_index(backend, causal, index_lead, device):
    check(Case((2, 4, 2, 70, 131, 16), index_lead=index_lead, device=device), backend, causal=causal)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("through", [("out",), ("lse",)])
def test_each_output_alone(backend, through, device):
    got, expected = gradients(Case(device=device), backend, through=through)
    for mine, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.double(), exact, atol=1e-5, rtol=1e-5)
    assert bool((got[2] == 0).all()) == (through == ("lse",))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_padding_keys_get_no_gradient(backend, causal, device):
    case = Case((2, 2, 2, 70, 197, 16), device=device)
    valid = (torch.rand(2, 197, generator=torch.Generator().manual_seed(1)) < 0.6).to(device)
    valid[0, :64] = False  # a whole block
    valid[1] = False  # a whole batch entry
    for x in case.qkv[1:]:
        x.masked_fill_(~valid[:, None, :, None], float("inf"))
    got = check(case, backend, key_valid=valid, causal=causal)
    for x in got[1:]:
        assert bool((x.masked_select(~valid[:, None, :, None]) == 0).all())
    assert all(bool((x[1] == 0).all()) for x in got)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_and_columns_that_keep_nothing(backend, device):
    case = Case(device=device)
    block_map = case.block_map.clone()
    block_map[:, 0, 1] = False
    block_map[:, 1, :, 2] = False
    case.set_map(block_map)
    grad_query, grad_key, grad_value = check(case, backend)
    assert bool((grad_query[:, 0, 64:128] == 0).all())
    assert bool((grad_key[:, 1, 128:192] == 0).all())
    assert bool((grad_value[:, 1, 128:192] == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("large", [100.0, -100.0])
def test_scores_far_from_zero(backend, large, device):
    """exp(score) and exp(-lse) overflow fp32: only their difference may be exponentiated, in ragged blocks too."""
    case = Case((1, 1, 1, 70, 70, 16), density=1.1, device=device)
    case.qkv[0][..., 0], case.qkv[1][..., 0] = 40.0, large / 10
    got, expected = gradients(case, backend)
    for mine, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.double(), exact, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_any_layout(backend, device):
    """A sum hands down a gradient whose strides are all 0; inputs come as a transformer lays them out."""
    case = Case((2, 2, 2, 70, 131, 16), device=device)
    case.qkv = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.qkv]
    check(case, backend)
    inputs = [x.detach().requires_grad_() for x in case.qkv]
    out, _ = block_sparse_attention(*inputs, case.index, case.count, block_size=64, backend=backend)
    got = torch.autograd.grad(out.sum(), inputs)
    exact = [x.detach().requires_grad_() for x in case.qkv]
    expected = torch.autograd.grad(case.reference(qkv=exact)[0].sum(), exact)
    for mine, right, like in zip(got, expected, case.qkv, strict=True):
        torch.testing.assert_close(mine, right, atol=1e-5, rtol=1e-5)
        assert mine.stride() == like.stride()


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_map_is_dense_attention(backend, device):
    case = Case(density=1.1, device=device)
    for causal in (False, True):
        inputs = [x[:, :, :131].detach().requires_grad_() for x in case.qkv]
        index, count = case.index[..., :3].clamp(max=2), case.count.clamp(max=3)
        index = torch.arange(3, dtype=torch.int32, device=device).expand_as(index)
        out, _ = block_sparse_attention(*inputs, index, count, block_size=64, causal=causal, backend=backend)
        dense = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=causal)
        got, expected = (torch.autograd.grad((x**2).sum(), inputs) for x in (out, dense))
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("index_lead", [(1, 1), (1, 2)])
def test_gradcheck_in_fp64(causal, index_lead):
    """Finite differences through the public function, both outputs, ragged on both sides, grouped heads."""
    case = Case((1, 2, 1, 67, 131, 3), dtype=torch.float64, density=0.6, index_lead=index_lead)
    case.set_map(case.block_map.clone().index_fill_(-1, torch.tensor([0]), True))  # every lse is finite
    inputs = [x.requires_grad_() for x in case.qkv]
    valid = torch.ones(1, 131, dtype=torch.bool)
    valid[0, 70:90] = False

    def call(*qkv):
        return block_sparse_attention(*qkv, case.index, case.count, block_size=64, key_valid=valid, causal=causal)

    assert call(*inputs)[1].dtype == torch.float64
    torch.autograd.gradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_bit_equal(backend, device):
    case = Case((1, 4, 2, 131, 197, 32), device=device)
    if backend == "torch" and device.type == "cuda":
        pytest.skip("the torch form adds with atomics on a GPU, as documented; the Triton form is tested")
    first, second = (gradients(case, backend, causal=True)[0] for _ in range(2))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


def test_backends_agree_in_half_precision(device):
    case = Case((1, 2, 1, 131, 197, 64), dtype=torch.float16, device=device)
    first, second = (gradients(case, backend, causal=True)[0] for backend in BACKENDS)
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(one, two, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("density", [0.1, 0.4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_form_at_a_larger_size(density, causal, dtype):
    check(Case((1, 2, 1, 1031, 1283, 64), (128, 64), density, dtype=dtype), "torch", causal=causal)


def test_training_compiles_without_a_graph_break(device):
    case = Case((1, 1, 1, 66, 70, 16), device=device)

    def loss(query, key, value):
        out, lse = block_sparse_attention(query, key, value, case.index, case.count, block_size=64, backend="torch")
        return (out**2).sum() + torch.where(lse.isfinite(), lse, 0).sum()

    def run(function):
        inputs = [x.detach().requires_grad_() for x in case.qkv]
        return torch.autograd.grad(function(*inputs), inputs)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for one, two in zip(run(compiled), run(loss), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("backend", BACKENDS)
def test_custom_op_with_gradients(backend, device):
    case = Case((1, 1, 1, 66, 70, 16), density=1.1, device=device)
    case.index.clamp_(max=1)
    inputs = [x.requires_grad_() for x in case.qkv]
    torch.library.opcheck(
        torch.ops.hf_accel.block_sparse_attention.default,
        (*inputs, case.index, case.count, 64, 64, 0.25, None, True, backend),
    )


def test_second_derivatives_are_refused():
    case = Case((1, 1, 1, 66, 70, 16), density=1.1)
    inputs = [x.requires_grad_() for x in case.qkv]
    out, _ = block_sparse_attention(*inputs, case.index, case.count, block_size=64)
    first = torch.autograd.grad((out**2).sum(), inputs, create_graph=True)
    second = sum((x**2).sum() for x in first)
    with pytest.raises(RuntimeError, match="block_sparse_attention_backward"):
        torch.autograd.grad(second, inputs)


def test_integers_are_refused():
    case = Case((1, 1, 1, 66, 70, 16), density=1.1)
    with pytest.raises(UnsupportedByKernel, match="query must be float16"):
        block_sparse_attention(*[x.int() for x in case.qkv], case.index, case.count, block_size=64)
