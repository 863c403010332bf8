from __future__ import annotations

import math

import pytest
import torch
from kernel_helpers import kernel_dtypes, permutations, random_sizes

from hf_accel.errors import InvalidSetting, UnsupportedByKernel
from hf_accel.kernels import variable_block_attention as package
from hf_accel.kernels.variable_block_attention import backend_for, reference, variable_block_attention

# Rounding of P and of the output to the dtype; fp32 only reorders sums.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Case:
    """Random inputs of one call: unequal blocks, a random map, both orders."""

    def __init__(
        self,
        shape=(1, 2, 101, 131, 64),
        blocks=(5, 9),
        density=0.4,
        dtype=torch.float32,
        device="cpu",
        query_sizes=None,
        key_sizes=None,
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)
        batch, heads, num_queries, num_keys, head_dim = shape
        rows = [(batch, heads, length, head_dim) for length in (num_queries, num_keys, num_keys)]
        self.qkv = [torch.randn(r, generator=generator).to(device, dtype) for r in rows]

        def sizes(given, count, length):
            if given is None:
                return random_sizes((batch, heads), count, length, generator)
            return torch.tensor(given, dtype=torch.int32).expand(batch, heads, -1).contiguous()

        self.query_sizes = sizes(query_sizes, blocks[0], num_queries).to(device)
        self.key_sizes = sizes(key_sizes, blocks[1], num_keys).to(device)
        self.block_map = (torch.rand(batch, heads, *blocks, generator=generator) < density).to(device)
        self.query_order = permutations((batch, heads), num_queries, generator).to(device)
        self.key_order = permutations((batch, heads), num_keys, generator).to(device)

    @property
    def arguments(self):
        return (*self.qkv, self.block_map, self.query_sizes, self.key_sizes)

    def reference(self, query_order=None, scale=None):
        qkv = [x.float() for x in self.qkv]
        scale = scale or qkv[0].shape[-1] ** -0.5
        return reference.variable_block_attention(*qkv, *self.arguments[3:], scale, query_order)


def check(case: Case, backend: str, query_order=None, **kwargs):
    out, lse = variable_block_attention(*case.arguments, query_order=query_order, backend=backend, **kwargs)
    expected, expected_lse = case.reference(query_order, kwargs.get("scale"))
    dtype = case.qkv[0].dtype
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    # The scores are fp32 in every form. PyTorch's flash attention on a CPU takes their exponentials to about 2e-5 in
    # the half types, on processors for which it has a fast exponential; a kernel of ours does not.
    limit = 1e-4 if backend == "torch" and dtype != torch.float32 and out.device.type == "cpu" else 1e-5
    torch.testing.assert_close(lse, expected_lse, atol=limit, rtol=limit)
    empty = expected_lse.isneginf()
    assert bool((out[empty] == 0).all())
    return out, lse


BACKENDS = ["triton", "torch"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_integers_that_all_heads_share_need_no_copies(backend):
    case = Case(density=1.0)
    case.query_sizes, case.key_sizes, case.query_order = (
        x[:1, :1].expand_as(x) for x in (case.query_sizes, case.key_sizes, case.query_order)
    )
    case.block_map = case.block_map[:1, :1].expand_as(case.block_map)
    check(case, backend, case.query_order)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", kernel_dtypes(), ids=str)
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128])
def test_equals_the_reference(backend, dtype, head_dim, device):
    case = Case((1, 2, 101, 131, head_dim), dtype=dtype, device=device)
    check(case, backend)
    check(case, backend, case.query_order)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("lengths", "query_sizes", "key_sizes"),
    [
        pytest.param((33, 97), (32, 1), (96, 1), id="last block of one"),
        pytest.param((7, 11), (1,) * 7, (1,) * 11, id="all of size one"),
        pytest.param((67, 127), (0, 60, 0, 0, 7), (0, 0, 120, 7, 0), id="empty clusters"),
        pytest.param((90, 200), (1, 88, 1), (2, 1, 190, 1, 6), id="giant cluster"),
        pytest.param((64, 64), (32, 16, 16), (16, 16, 32), id="multiples of the tile"),
        pytest.param((1, 1), (1,), (1,), id="one token"),
        pytest.param((50, 70), (10, 20), (31, 2), id="rows that no block owns"),
        pytest.param((50, 70), (0, 0), (0, 0, 0), id="no block owns anything"),
    ],
)
def test_awkward_sizes(backend, lengths, query_sizes, key_sizes, device):
    shape, blocks = (1, 1, *lengths, 16), (len(query_sizes), len(key_sizes))
    for density in (0.5, 1.0):
        case = Case(shape, blocks, density, device=device, query_sizes=query_sizes, key_sizes=key_sizes)
        check(case, backend)
        check(case, backend, case.query_order)


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_map_is_dense_attention(backend, device):
    case = Case(density=1.1, device=device)
    out, _ = variable_block_attention(*case.arguments, backend=backend)
    dense = torch.nn.functional.scaled_dot_product_attention(*case.qkv)
    torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_in_original_order_give_masked_dense_attention(backend, device):
    """The oracle needs no permutation: token i attends to j iff their clusters are paired in the map."""
    generator = torch.Generator().manual_seed(3)
    clusters, shape = (4, 7), (2, 2, 61, 16)
    query, key, value = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
    labels = [torch.randint(0, count, shape[:3], generator=generator).to(device) for count in clusters]
    block_map = (torch.rand(*shape[:2], *clusters, generator=generator) < 0.5).to(device)
    block_map[..., 0] = True
    b, h = torch.arange(2, device=device)[:, None, None, None], torch.arange(2, device=device)[:, None, None]
    mask = block_map[b, h, labels[0][..., :, None], labels[1][..., None, :]]
    sizes = [torch.nn.functional.one_hot(x, c).sum(2).int() for x, c in zip(labels, clusters, strict=True)]
    query_order, key_order = (x.argsort(dim=-1, stable=True).int() for x in labels)
    out, _ = variable_block_attention(
        query, key, value, block_map, *sizes, query_order=query_order, key_order=key_order, backend=backend
    )
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_key_order_is_the_same_as_sorting_first(backend, device):
    case = Case(device=device)
    query, key, value = case.qkv
    places = case.key_order.long()[..., None].expand_as(key)
    scattered = [torch.empty_like(x).scatter_(2, places, x) for x in (key, value)]
    sorted_out = variable_block_attention(*case.arguments, backend=backend)
    out = variable_block_attention(query, *scattered, *case.arguments[3:], key_order=case.key_order, backend=backend)
    torch.testing.assert_close(out, sorted_out, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_and_strides_of_a_transformer(backend, device):
    """diffusers hands views of [B, S, H, D], here cut from one fused projection."""
    case = Case((2, 2, 53, 71, 16), device=device)

    def as_view(x):
        batch, heads, rows, head_dim = x.shape
        fused = torch.full((batch, rows, heads, 3 * head_dim), float("nan"), device=x.device)
        fused[..., head_dim : 2 * head_dim] = x.transpose(1, 2)
        return fused[..., head_dim : 2 * head_dim].transpose(1, 2)

    case.qkv = [as_view(x) for x in case.qkv]
    assert not case.qkv[0].is_contiguous()
    check(case, backend, case.query_order)
    case.qkv = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.qkv]
    out, _ = check(case, backend, case.query_order)
    assert out.stride() == case.qkv[0].stride()


@pytest.mark.parametrize("wide", [True, False])
def test_key_and_value_laid_out_differently(wide, device, monkeypatch):
    from hf_accel.kernels.variable_block_attention import triton

    case = Case((2, 2, 40, 60, 16), device=device)
    case.qkv[1] = case.qkv[1].transpose(1, 2).contiguous().transpose(1, 2)
    assert triton.key_layout(*case.qkv[1:]) == (False, False)
    monkeypatch.setattr(triton, "key_layout", lambda key, value: (False, wide))
    check(case, "triton")


def test_key_layout_of_tensors_too_long_for_32_bits():
    from hf_accel.kernels.common.tile import key_layout

    long = torch.empty(1, 1, 2**24, 128, device="meta")
    assert key_layout(long, long) == (True, True)
    short = torch.empty(1, 1, 2**23, 128, device="meta")
    assert key_layout(short, short) == (True, False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_do_not_count_may_hold_anything(backend, device):
    case = Case((1, 1, 40, 60, 16), (2, 3), 1.1, device=device, query_sizes=(20, 9), key_sizes=(10, 21, 2))
    case.block_map[..., 0] = False  # the very first key row is among those that nobody keeps
    for x in case.qkv[1:]:
        x[:, :, 33:] = float("nan")
        x[:, :, :10] = float("inf")
    out, lse = variable_block_attention(*case.arguments, backend=backend)
    assert bool(out.isfinite().all())
    assert bool(lse[:, :, :29].isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_of_any_size(backend, device):
    """Large scores of either sign neither overflow nor vanish."""
    for factor in (300.0, -300.0):
        case = Case((1, 1, 40, 60, 16), (3, 5), 0.7, device=device)
        case.qkv[0] = case.qkv[0].abs()
        case.qkv[1] = case.qkv[1].abs() * factor
        out, lse = variable_block_attention(*case.arguments, backend=backend)
        expected, expected_lse = case.reference()
        torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale(backend, device):
    check(Case((1, 1, 40, 60, 16), device=device), backend, scale=0.7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_error_falls_as_density_rises(backend, device):
    """Nested maps: the heaviest key clusters of each row first. At full density the error is rounding."""
    case = Case((1, 1, 64, 128, 16), (4, 16), device=device)
    dense = torch.nn.functional.scaled_dot_product_attention(*case.qkv)
    mass = torch.softmax(case.qkv[0] @ case.qkv[1].mT * 0.25, -1)
    of_query = torch.nn.functional.one_hot(reference.block_of_row(case.query_sizes, 64), 4).float()
    of_key = torch.nn.functional.one_hot(reference.block_of_row(case.key_sizes, 128), 16).float()
    rank = (of_query.mT @ mass @ of_key).argsort(-1, descending=True).argsort(-1)
    errors = []
    for kept in (2, 6, 10, 16):
        case.block_map = rank < kept
        out, _ = variable_block_attention(*case.arguments, backend=backend)
        errors.append((out - dense).norm().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1 * dense.norm().item()
    assert errors[-1] < 1e-5 * dense.norm().item()


@pytest.mark.parametrize("run", [1, 2, 8, 16])
@pytest.mark.parametrize("with_tail", [True, False])
def test_every_tiling_gives_the_same(run, with_tail, device):
    from hf_accel.kernels.variable_block_attention import triton

    case = Case((1, 2, 101, 131, 16), density=0.6, device=device)
    main, tail = triton.Tile(32, 32, 4, 2), triton.Tile(16, 16, 4, 1) if with_tail else None
    out, lse = triton.launch(*case.arguments, 0.25, case.query_order, tiles=triton.Tiles(main, tail, run))
    expected, expected_lse = case.reference(case.query_order)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


def test_heads_in_several_launches(monkeypatch, device):
    from hf_accel.kernels.variable_block_attention import triton

    monkeypatch.setattr(triton, "LIST_BYTES", 1)
    check(Case((2, 2, 40, 60, 16), device=device), "triton")


def test_sizes_that_are_too_large_stay_inside_the_tensors(device):
    """The GPU form cannot check them without waiting; the result is then wrong, but nothing else is read."""
    case = Case((1, 1, 40, 60, 16), (3, 4), 1.1, device=device, query_sizes=(30, 30, 9), key_sizes=(50, 70, 3, 9))
    out, _ = variable_block_attention(*case.arguments, backend="triton")
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("density", [0.1, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_form_at_a_larger_size(density, dtype):
    case = Case((1, 2, 1531, 1783, 64), (16, 40), density, dtype=dtype)
    check(case, "torch", case.query_order)


@pytest.mark.parametrize("with_order", [True, False])
def test_custom_op(with_order, device):
    case = Case((1, 2, 21, 31, 16), (3, 4), device=device)
    order = case.query_order if with_order else None
    for backend in BACKENDS:
        torch.library.opcheck(
            torch.ops.hf_accel.variable_block_attention.default, (*case.arguments, 0.25, order, None, backend)
        )


def test_compiles_without_a_graph_break(device):
    case = Case((1, 2, 21, 31, 16), (3, 4), device=device)

    def layer(*arguments):
        out, lse = variable_block_attention(*arguments, backend="torch")
        return out * 2, lse

    out, lse = torch.compile(layer, fullgraph=True, backend="aot_eager")(*case.arguments)
    expected, expected_lse = layer(*case.arguments)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


def test_backend_is_chosen_with_a_reason(device):
    query = torch.zeros(1, 1, 4, 16, device=device)
    assert backend_for(query, "torch").backend == "torch"
    assert backend_for(query, "triton").backend == "triton"
    auto = backend_for(query)
    assert auto.backend == ("triton" if device.type == "cuda" else "torch")
    assert auto.reason
    with pytest.raises(InvalidSetting, match="backend"):
        backend_for(query, "cuda")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key": lambda c: c.qkv[1][..., :8]}, "key must be .*D=16.*got .*8"),
        ({"value": lambda c: c.qkv[2][:, :, 1:]}, "value must be .*Sk=31"),
        ({"query": lambda c: c.qkv[0][0]}, "query must be"),
        ({"value": lambda c: c.qkv[2].half()}, "value must be float32; got float16"),
        ({"block_map": lambda c: c.block_map.int()}, "block_map must be bool"),
        ({"query_sizes": lambda c: c.query_sizes.long()}, "query_sizes must be int32"),
        ({"key_sizes": lambda c: c.key_sizes[..., 1:]}, "key_sizes must be .*Ck=4"),
        ({"query_order": lambda c: c.query_order[..., 1:]}, "query_order must be .*Sq=21"),
        ({"key_order": lambda c: c.key_order.long()}, "key_order must be int32"),
        ({"key": lambda c: c.qkv[1].mT.contiguous().mT}, "last axis of key must be contiguous"),
        ({"value": lambda c: c.qkv[2].to("meta")}, "one device"),
        ({"scale": lambda c: -1.0}, "scale must be a positive"),
    ],
)
def test_wrong_inputs_are_refused_in_words(change, words):
    case = Case((1, 2, 21, 31, 16), (3, 4))
    names = ("query", "key", "value", "block_map", "query_sizes", "key_sizes")
    keywords = dict(zip(names, case.arguments, strict=True))
    keywords |= {name: changed(case) for name, changed in change.items()}
    with pytest.raises(UnsupportedByKernel, match=words):
        variable_block_attention(**keywords)


def test_torch_form_refuses_sizes_that_do_not_fit():
    case = Case((1, 1, 40, 60, 16), (3, 4), query_sizes=(30, 30, 9), key_sizes=(10, 20, 3, 9))
    with pytest.raises(UnsupportedByKernel, match="add up to at most 40 rows"):
        variable_block_attention(*case.arguments, backend="torch")


def test_head_dim_beyond_the_kernel_is_refused_by_name(device):
    query = torch.zeros(1, 1, 4, 512, device=device)
    assert "head dim 512" in backend_for(query).reason
    with pytest.raises(UnsupportedByKernel, match="head dim 512"):
        backend_for(query, "triton")


def test_tiles_fit_the_head_dims_that_are_declared():
    from hf_accel.kernels.variable_block_attention import triton

    for cc in (80, 86, 89, 90, 100, 120):
        for head_dim in (16, 64, 80, 128, package.LIMITS.max_head_dim):
            for dtype in package.LIMITS.dtypes:
                tiles = triton.tiles_for(cc, head_dim, dtype)
                assert tiles.tail is None or tiles.tail.m < tiles.main.m
                for tile in filter(None, (tiles.main, tiles.tail)):
                    assert tile.n % tiles.run == 0
                    assert math.log2(tile.m).is_integer()
