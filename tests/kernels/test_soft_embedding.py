"""Entropy statistics and soft embeddings: identities, then every backend against the definition in fp64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from kernel_helpers import kernel_dtypes

from hf_accel.errors import InvalidSetting, UnsupportedByKernel
from hf_accel.kernels import soft_embedding as package
from hf_accel.kernels.soft_embedding import entropy_lse, normalized_entropy, reference, soft_embed

BACKENDS = ["triton", "torch"]
INF = math.inf


def logits_of(*shape: int, dtype=torch.float32, device="cpu", seed=0, spread=3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(shape, generator=generator)).to(device, dtype)


def weight_of(vocabulary: int, dim: int, dtype=torch.float32, device="cpu", seed=1) -> torch.Tensor:
    return torch.randn(vocabulary, dim, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def exact(logits, weight, temperature=1.0, scale=1.0) -> torch.Tensor:
    """Softmax and product in fp64, of what the dtypes of the arguments hold."""
    return scale * (logits.double() / temperature).softmax(-1) @ weight[: logits.shape[-1]].double()


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs).abs().max() / theirs.abs().max())


# -- entropy_lse ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 257), (3, 1), (5, 131), (9, 64), (2, 65)])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_statistics_against_fp64(backend, dtype, rows, vocabulary, temperature, device):
    z = logits_of(rows, vocabulary, dtype=dtype, device=device)
    ours = entropy_lse(z, temperature, backend=backend)
    values, index = reference.entropy_lse(z.double(), temperature)
    for name, theirs in zip(("top_logit", "lse", "entropy", "lse_t", "entropy_t"), values, strict=True):
        torch.testing.assert_close(getattr(ours, name).double(), theirs, atol=1e-5, rtol=1e-5, msg=name)
    assert torch.equal(ours.top_index, index)
    assert torch.equal(index, z.argmax(-1))
    log_p = (z.double() / temperature).log_softmax(-1)
    torch.testing.assert_close(ours.entropy_t.double(), -(log_p.exp() * log_p).sum(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_entropy_of_uniform_and_certain_rows(backend, device):
    vocabulary = 131
    z = torch.full((3, vocabulary), -7.5, device=device)
    z[1, 100] = 200.0
    z[2] = -INF
    z[2, 3] = z[2, 5] = 1.0
    ours = entropy_lse(z, backend=backend)
    expected = torch.tensor([math.log(vocabulary), 0.0, math.log(2)], device=device)
    torch.testing.assert_close(ours.entropy, expected, atol=1e-5, rtol=0)
    assert ours.entropy[1] == 0
    assert ours.top_index.tolist() == [0, 100, 3]
    share = normalized_entropy(ours.entropy, vocabulary)
    torch.testing.assert_close(share[:2], torch.tensor([1.0, 0.0], device=device), atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_banned_tokens_add_nothing(backend, device):
    z = logits_of(4, 200, device=device)
    banned = z.clone()
    banned[:, 64:] = -INF  # whole tiles and splits of them
    ours, short = entropy_lse(banned, 0.5, backend=backend), entropy_lse(z[:, :64].contiguous(), 0.5, backend=backend)
    for name in ours._fields:
        torch.testing.assert_close(getattr(ours, name), getattr(short, name), msg=name)
    front = z.clone()
    front[:, :130] = -INF
    ours, short = entropy_lse(front, 0.5, backend=backend), entropy_lse(z[:, 130:].contiguous(), 0.5, backend=backend)
    torch.testing.assert_close(ours.lse_t, short.lse_t)
    torch.testing.assert_close(ours.entropy_t, short.entropy_t, atol=1e-6, rtol=1e-5)
    assert torch.equal(ours.top_index, short.top_index + 130)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_banned_tokens_only(backend, device):
    z = logits_of(2, 150, device=device)
    z[1] = -INF
    ours = entropy_lse(z, 2.0, backend=backend)
    assert [float(x[1]) for x in ours] == [-INF, 0, -INF, 0, -INF, 0]
    weight = weight_of(150, 24, device=device)
    out = soft_embed(z, weight, ours.lse_t, 2.0, backend=backend)
    assert out[1].eq(0).all()
    assert relative(out[:1], exact(z[:1], weight, 2.0)) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_that_are_large_together_do_not_spoil_the_entropy(backend, device):
    z = logits_of(3, 131, device=device).mul(8).round().div(8)  # the sum is exact in fp32
    near, far = entropy_lse(z, backend=backend), entropy_lse(z + 1e5, backend=backend)
    assert torch.equal(near.entropy, far.entropy)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row(backend, device):
    z = logits_of(3, 131, device=device)
    z[1, 70] = math.nan
    ours = entropy_lse(z, 0.5, backend=backend)
    for name in ("lse", "entropy", "lse_t", "entropy_t"):
        assert getattr(ours, name).isnan().tolist() == [False, True, False], name


def test_normalized_entropy_stays_in_its_range():
    entropy = torch.tensor([0.0, 1.0, math.log(50) * (1 + 1e-6)])
    assert normalized_entropy(entropy, 50).tolist() == [0.0, pytest.approx(1 / math.log(50)), 1.0]
    assert normalized_entropy(torch.zeros(2), 1).tolist() == [0.0, 0.0]
    with pytest.raises(UnsupportedByKernel, match="at least 1"):
        normalized_entropy(entropy, 0)


def test_entropy_rises_with_temperature():
    z = logits_of(6, 131)
    entropies = [entropy_lse(z, t).entropy_t for t in (0.25, 0.5, 1.0, 2.0, 8.0)]
    assert all((low < high).all() for low, high in itertools.pairwise(entropies))


# -- soft_embed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize(
    ("rows", "vocabulary", "dim"), [(1, 131, 40), (5, 64, 64), (17, 97, 80), (16, 33, 128), (2, 1, 1), (35, 70, 17)]
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_soft_embed_against_fp64(backend, dtype, rows, vocabulary, dim, temperature, device):
    z = logits_of(rows, vocabulary, dtype=torch.float32, device=device)
    weight = weight_of(vocabulary, dim, dtype, device)
    lse = entropy_lse(z, temperature).lse_t
    ours = soft_embed(z, weight, lse, temperature, 5.0, out_dtype=torch.float32, backend=backend)
    limit = 1e-5 if dtype == torch.float32 else 2.0 ** (-10 if dtype == torch.float16 else -7)
    assert relative(ours, exact(z, weight, temperature, 5.0)) < limit
    own = soft_embed(z, weight, lse, temperature, 5.0, backend=backend)
    assert own.dtype == dtype
    torch.testing.assert_close(own, ours.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [20, 140])  # fused, and by way of written probabilities
@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize("picked", [False, True])
def test_all_forms_agree_with_the_definition(backend, rows, dtype, picked, device):
    z, weight = logits_of(rows, 101, dtype=dtype, device=device), weight_of(101, 48, dtype, device)
    lse = entropy_lse(z).lse
    chosen = torch.randperm(rows, generator=torch.Generator().manual_seed(2)).to(device) if picked else None
    ours = soft_embed(z, weight, lse, rows=chosen, out_dtype=torch.float32, backend=backend)
    theirs = reference.soft_embed(z, weight, lse, 1.0, 1.0)
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(ours, theirs if chosen is None else theirs[chosen], atol=limit, rtol=limit)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token_and_all_alike(backend, device):
    """A certain distribution gives the embedding itself, a flat one their mean."""
    weight = weight_of(131, 40, device=device)
    z = torch.zeros(2, 131, device=device)
    z[0] = -INF
    z[0, 77] = 3.0
    out = soft_embed(z, weight, backend=backend)
    torch.testing.assert_close(out[0], weight[77], atol=1e-6, rtol=0)
    torch.testing.assert_close(out[1], weight.mean(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_flat_distributions_in_fp16(backend, device):
    """Probabilities that fp16 holds as subnormals of two digits, or as 0, do not shift the result."""
    vocabulary = 250
    z = torch.zeros(1, vocabulary, device=device)
    z[0, 0] = math.log(1e5)  # the others have a probability of 1e-5 each
    weight = torch.ones(vocabulary, 16, dtype=torch.float16, device=device)
    weight[0] = 0
    out = soft_embed(z, weight, out_dtype=torch.float32, backend=backend)
    expected = (vocabulary - 1) / (1e5 + vocabulary - 1)
    torch.testing.assert_close(out, torch.full_like(out, expected), atol=0, rtol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chosen_rows(backend, device):
    z, weight = logits_of(2, 6, 131, device=device), weight_of(131, 40, device=device)
    every = soft_embed(z, weight, backend=backend).view(12, 40)
    rows = torch.tensor([11, 0, 5, 5], device=device)
    lse = entropy_lse(z).lse
    torch.testing.assert_close(soft_embed(z, weight, lse, rows=rows, backend=backend), every[rows])
    assert soft_embed(z, weight, lse, rows=rows[:0], backend=backend).shape == (0, 40)
    torch.testing.assert_close(soft_embed(z, weight, lse, rows=rows, top_k=131), every[rows])


def test_rows_that_do_not_exist_are_nan_on_a_gpu(device):
    z, weight = logits_of(3, 50, device=device), weight_of(50, 16, device=device)
    rows = torch.tensor([1, 3, -1], device=device)
    out = soft_embed(z, weight, rows=rows, backend="triton")
    assert out.isnan().all(1).tolist() == [False, True, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_and_strides(backend, device):
    """A window of a sequence is not copied, embeddings may be part of a wider matrix, and have rows to spare."""
    z, wide = logits_of(2, 9, 131, device=device), weight_of(150, 64, device=device)
    window, weight = z[:, 3:7], wide[:, :40]
    assert not window.is_contiguous()
    ours = entropy_lse(window, 0.5, backend=backend)
    theirs = entropy_lse(window.contiguous(), 0.5, backend="torch")
    for name in ours._fields:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), msg=name)
    out = soft_embed(window, weight, ours.lse_t, 0.5, backend=backend)
    assert out.shape == (2, 4, 40)
    assert relative(out, exact(window, weight, 0.5)) < 1e-5
    assert soft_embed(window[0, 0], weight, backend=backend).shape == (40,)
    assert soft_embed(window[None], weight, backend=backend).shape == (1, 2, 4, 40)


def test_what_lies_behind_the_vocabulary_is_not_read(device):
    z, weight = logits_of(3, 70, device=device), weight_of(90, 24, device=device)
    weight[70:] = math.nan
    for backend in BACKENDS:
        assert soft_embed(z, weight, backend=backend).isfinite().all()


@pytest.mark.parametrize("top_k", [1, 8, 64, 131])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_truncation_keeps_its_bound(top_k, temperature):
    z, weight = logits_of(7, 131), weight_of(131, 40)
    lse = entropy_lse(z, temperature).lse_t
    ours = soft_embed(z, weight, lse, temperature, 2.0, top_k=top_k).double()
    theirs = exact(z, weight, temperature, 2.0)
    tail = 1 - (z.double() / temperature).softmax(-1).sort(-1, descending=True).values[:, :top_k].sum(-1)
    bound = 2 * tail * weight.norm(dim=1).max()
    error = (ours - theirs).norm(dim=1)
    assert (error <= bound + 1e-5).all()
    assert (error.max() < 1e-5) == (top_k == 131)


@pytest.mark.parametrize("picked", [False, True])
def test_gradient_of_the_weight_by_finite_differences(picked):
    z, weight = logits_of(5, 23, spread=1.0), weight_of(27, 6).requires_grad_()
    rows = torch.tensor([4, 0, 4]) if picked else None
    lse = entropy_lse(z, 0.8).lse_t
    direction = torch.randn(3 if picked else 5, 6, generator=torch.Generator().manual_seed(3))

    def loss(weight):
        return (soft_embed(z, weight, lse, 0.8, 1.7, rows=rows) * direction).sum()

    loss(weight).backward()
    for place in [(0, 0), (3, 5), (22, 2), (26, 1)]:
        step = torch.zeros_like(weight)
        step[place] = 0.5  # the function is linear in the weight
        with torch.no_grad():
            difference = loss(weight + step) - loss(weight - step)
        assert abs(weight.grad[place] - difference) < 2e-5
    assert weight.grad[23:].eq(0).all()
    assert weight.grad[:23].ne(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradient_against_torch(dtype):
    z, weight = logits_of(9, 131, dtype=dtype), weight_of(131, 24, dtype).requires_grad_()
    direction = torch.randn(9, 24, dtype=torch.float64)
    (soft_embed(z, weight) * direction.to(dtype)).sum().backward()
    theirs = z.double().softmax(-1).mT @ direction.to(dtype).double()
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert weight.grad.dtype == dtype
    assert relative(weight.grad, theirs) < limit


def test_refuses_what_does_not_fit():
    z, weight = torch.randn(4, 50), torch.randn(50, 8)
    with pytest.raises(UnsupportedByKernel, match=r"\[\.\.\., V\]"):
        entropy_lse(torch.zeros(3, 0))
    with pytest.raises(UnsupportedByKernel, match="float32, float16 or bfloat16"):
        entropy_lse(z.double())
    with pytest.raises(UnsupportedByKernel, match="contiguous"):
        entropy_lse(torch.randn(50, 4).mT)
    for temperature in (0.0, -1.0, INF, math.nan):
        with pytest.raises(UnsupportedByKernel, match="positive finite"):
            entropy_lse(z, temperature)
    with pytest.raises(InvalidSetting):
        entropy_lse(z, backend="cuda")
    with pytest.raises(UnsupportedByKernel, match=r"logits\[\.\.\., :40\]"):
        soft_embed(z, weight[:40])
    with pytest.raises(UnsupportedByKernel, match="lse must be"):
        soft_embed(z, weight, torch.zeros(3))
    with pytest.raises(UnsupportedByKernel, match="int64"):
        soft_embed(z, weight, rows=torch.zeros(2, dtype=torch.int32))
    with pytest.raises(UnsupportedByKernel, match=r"1\.\.50"):
        soft_embed(z, weight, top_k=51)
    with pytest.raises(UnsupportedByKernel, match="out_dtype"):
        soft_embed(z, weight, out_dtype=torch.float16)
    with pytest.raises(UnsupportedByKernel, match=r"logits\.detach\(\)"):
        soft_embed(z.requires_grad_(), weight)
    with torch.no_grad():
        assert soft_embed(z, weight).shape == (4, 8)


def test_arguments_are_left_as_they_were():
    z, weight = logits_of(4, 131), weight_of(131, 8)
    before = z.clone(), weight.clone()
    lse = entropy_lse(z, 0.5).lse_t
    soft_embed(z, weight, lse, 0.5)
    assert torch.equal(z, before[0])
    assert torch.equal(weight, before[1])


def test_custom_ops_keep_their_promises():
    z, weight, rows = torch.randn(2, 3, 70), torch.randn(75, 8, requires_grad=True), torch.tensor([1, 4])
    lse = entropy_lse(z).lse.flatten()
    torch.library.opcheck(package._entropy_lse, (z, 0.5, "torch"))
    torch.library.opcheck(package._entropy_lse, (z, 1.0, "torch"))
    torch.library.opcheck(package._soft_embed, (z, weight, lse, rows, 1.0, 2.0, torch.float32, "torch"))
    torch.library.opcheck(package._soft_embed, (z, weight, lse, None, 1.0, 2.0, torch.float32, "torch"))


def test_compiles_with_its_gradient():
    z, weight = logits_of(2, 5, 70), weight_of(70, 8).requires_grad_()

    def feedback(z, weight):
        found = entropy_lse(z, 0.5)
        return normalized_entropy(found.entropy_t, 70)[..., None] * soft_embed(z, weight, found.lse_t, 0.5)

    ours = torch.compile(feedback, fullgraph=True, backend="aot_eager")(z, weight)
    ours.square().sum().backward()
    compiled, weight.grad = weight.grad, None
    theirs = feedback(z, weight)
    theirs.square().sum().backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(compiled, weight.grad)
