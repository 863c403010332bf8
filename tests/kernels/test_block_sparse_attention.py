from __future__ import annotations

import pytest
import torch
from block_sparse_cases import BACKENDS, Case
from kernel_helpers import kernel_dtypes

from hf_accel.errors import UnsupportedByKernel
from hf_accel.kernels.block_sparse_attention import (
    backend_for,
    block_map_to_index,
    block_sparse_attention,
    index_to_block_map,
    transpose_index,
)
from hf_accel.kernels.block_sparse_attention.index import split_index

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def check(case, backend, **kwargs):
    out, lse = block_sparse_attention(*case.arguments, block_size=case.block_size, backend=backend, **kwargs)
    expected, expected_lse = case.reference(**kwargs)
    dtype = case.qkv[0].dtype
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)
    assert bool((out[expected_lse.isneginf()] == 0).all())
    return out, lse


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", kernel_dtypes(), ids=str)
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128])
def test_equals_the_reference(backend, dtype, head_dim, device):
    check(Case((1, 2, 2, 131, 197, head_dim), dtype=dtype, device=device), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_size", [(64, 64), (128, 64), (64, 128), (128, 128)])
@pytest.mark.parametrize(
    "lengths", [(129, 257), (128, 256), (257, 127), (1, 1), (64, 1)], ids=lambda x: f"{x[0]}x{x[1]}"
)
def test_ragged_last_blocks(backend, block_size, lengths, device):
    for density in (0.5, 1.1):
        check(Case((1, 1, 1, *lengths, 16), block_size, density, device=device), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index_lead", [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_grouped_query_heads_and_shared_index(backend, index_lead, device):
    check(Case((2, 4, 2, 70, 131, 16), index_lead=index_lead, device=device), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_map_is_dense_attention(backend, device):
    case = Case(density=1.1, device=device)
    out, _ = check(case, backend)
    dense = torch.nn.functional.scaled_dot_product_attention(*case.qkv)
    torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_keys_take_no_part(backend, device):
    case = Case((2, 2, 2, 70, 197, 16), device=device)
    valid = torch.rand(2, 197, generator=torch.Generator().manual_seed(1)) < 0.6
    valid[0, :64] = False  # a whole block
    valid[1] = False  # a whole batch entry
    for x in case.qkv[1:]:
        x.masked_fill_(~valid.to(device)[:, None, :, None], float("inf"))
    out, lse = block_sparse_attention(*case.arguments, block_size=64, key_valid=valid.to(device), backend=backend)
    case.qkv[1:] = [x.nan_to_num(posinf=0.0) for x in case.qkv[1:]]
    expected, expected_lse = case.reference(valid.to(device))
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)
    assert bool((out[1] == 0).all())
    assert bool(lse[1].isneginf().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_keep_nothing(backend, device):
    case = Case(device=device)
    block_map = case.block_map.clone()
    block_map[:, 0, 1] = False
    case.set_map(block_map)
    out, lse = check(case, backend)
    assert bool((out[:, 0, 64:128] == 0).all())
    assert bool(lse[:, 0, 64:128].isneginf().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_of_a_transformer(backend, device):
    case = Case((2, 2, 2, 70, 131, 16), device=device)
    case.qkv = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.qkv]
    out, _ = check(case, backend)
    assert out.stride() == case.qkv[0].stride()


@pytest.mark.parametrize("wide", [True, False])
def test_key_and_value_laid_out_differently(wide, device, monkeypatch):
    from hf_accel.kernels.block_sparse_attention import triton

    case = Case((2, 2, 2, 70, 131, 16), device=device)
    case.qkv[1] = case.qkv[1].transpose(1, 2).contiguous().transpose(1, 2)
    assert triton.key_layout(*case.qkv[1:]) == (False, False)
    monkeypatch.setattr(triton, "key_layout", lambda key, value: (False, wide))
    check(case, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale(backend, device):
    check(Case((1, 1, 1, 70, 70, 16), device=device), backend, scale=0.7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_error_falls_as_density_rises(backend, device):
    case = Case((1, 1, 1, 128, 256, 16), device=device)
    dense = torch.nn.functional.scaled_dot_product_attention(*case.qkv)
    mass = torch.softmax(case.qkv[0] @ case.qkv[1].mT * 0.25, -1).view(1, 1, 2, 64, 4, 64).sum((3, 5))
    rank = mass.argsort(-1, descending=True).argsort(-1)
    errors = []
    for kept in range(1, 5):
        case.set_map(rank < kept)
        out, _ = block_sparse_attention(*case.arguments, block_size=64, backend=backend)
        errors.append((out - dense).norm().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1 * dense.norm().item()
    assert errors[-1] < 1e-5 * dense.norm().item()


@pytest.mark.parametrize("density", [0.1, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_form_at_a_larger_size(density, dtype):
    check(Case((1, 2, 1, 1531, 1783, 64), (128, 128), density, dtype=dtype), "torch")


def test_map_and_index_are_inverse():
    block_map = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    block_map[0, 0, 0] = False
    index, count = block_map_to_index(block_map)
    assert index.dtype == count.dtype == torch.int32
    assert torch.equal(index_to_block_map(index, count, 7), block_map)
    row = index[1, 1, 1, : count[1, 1, 1]]
    assert torch.equal(row.long(), block_map[1, 1, 1].nonzero().squeeze(1))


@pytest.mark.parametrize("lead", [(1, 1), (2, 3)])
def test_transposed_index_is_the_index_of_the_transposed_map(lead):
    block_map = torch.rand(*lead, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    block_map[0, 0, :, 2] = False
    index, count = block_map_to_index(block_map)
    # Order and surplus entries of the given lists must not matter.
    index = torch.where(torch.arange(7) < count[..., None], index, 10**6)
    transposed, transposed_count = transpose_index(index[..., :6], count.clamp(max=6), 7)
    expected, expected_count = block_map_to_index(block_map.mT)
    assert torch.equal(transposed, expected)
    assert torch.equal(transposed_count, expected_count)


@pytest.mark.parametrize("causal", [True, False])
def test_split_index_puts_the_blocks_that_need_a_mask_last(causal):
    lengths, size = (150, 300), (64, 64)
    index = torch.tensor([4, 0, 3, 2, 1], dtype=torch.int32).expand(1, 1, 3, 5)
    count = torch.tensor([5, 4, 5], dtype=torch.int32).expand(1, 1, 3)
    split, plain, masked = split_index(index, count, size, lengths, causal)
    tokens = torch.ones(150, 300, dtype=torch.bool).tril(150 if causal else 300)
    for row in range(3):
        kept = index[0, 0, row, : count[0, 0, row]].tolist()
        parts = {block: tokens[row * 64 : row * 64 + 64, block * 64 : block * 64 + 64] for block in kept}
        whole = [b for b in kept if bool(parts[b].all()) and b != 4]
        crossed = [b for b in kept if bool(parts[b].any()) and b not in whole]
        got = split[0, 0, row].tolist()
        numbers = int(plain[0, 0, row]), int(masked[0, 0, row])
        assert numbers == (len(whole), len(crossed))
        assert got[: numbers[0]] == whole
        assert got[numbers[0] : sum(numbers)] == crossed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_size", [(64, 64), (128, 64), (64, 128), (128, 128)])
@pytest.mark.parametrize(
    "lengths", [(129, 257), (128, 128), (257, 127), (1, 130), (64, 1)], ids=lambda x: f"{x[0]}x{x[1]}"
)
def test_causal(backend, block_size, lengths, device):
    """More keys than queries is a prefill behind a cache; fewer leaves the first queries without any."""
    for density in (0.5, 1.1):
        check(Case((1, 1, 1, *lengths, 16), block_size, density, device=device), backend, causal=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_with_padding_grouped_heads_and_shared_index(backend, device):
    case = Case((2, 4, 2, 70, 197, 40), index_lead=(1, 4), device=device)
    valid = torch.rand(2, 197, generator=torch.Generator().manual_seed(1)).to(device) < 0.6
    check(case, backend, causal=True, key_valid=valid)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_above_the_diagonal_may_hold_anything(backend, device):
    """Queries do not read keys behind them: neither the values there nor whether the blocks are listed matter."""
    case = Case((1, 1, 1, 192, 192, 16), density=1.1, device=device)
    case.index = torch.arange(3, dtype=torch.int32, device=device).flip(0).expand(1, 1, 3, 3)
    out, lse = block_sparse_attention(*case.arguments, block_size=64, causal=True, backend=backend)
    case.set_map(torch.ones(1, 1, 3, 3, dtype=torch.bool, device=device).tril())
    case.qkv[1][:, :, 128:] = case.qkv[2][:, :, 128:] = float("nan")
    other, other_lse = block_sparse_attention(*case.arguments, block_size=64, causal=True, backend=backend)
    torch.testing.assert_close(other[:, :, :128], out[:, :, :128])
    torch.testing.assert_close(other_lse[:, :, :128], lse[:, :, :128])


@pytest.mark.parametrize("with_valid", [True, False])
def test_custom_op(with_valid, device):
    case = Case((1, 1, 1, 66, 70, 16), device=device)
    case.index.clamp_(max=1)
    valid = torch.ones(1, 70, dtype=torch.bool, device=device) if with_valid else None
    for backend in BACKENDS:
        torch.library.opcheck(
            torch.ops.hf_accel.block_sparse_attention.default,
            (*case.arguments, 64, 64, 0.25, valid, False, backend),
        )


def test_compiles_without_a_graph_break(device):
    case = Case((1, 1, 1, 66, 70, 16), device=device)

    def layer(*arguments):
        out, lse = block_sparse_attention(*arguments, block_size=64, backend="torch")
        return out * 2, lse

    out, lse = torch.compile(layer, fullgraph=True, backend="aot_eager")(*case.arguments)
    expected, expected_lse = layer(*case.arguments)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


def test_backend_is_chosen_with_a_reason(device):
    query = torch.zeros(1, 1, 4, 16, device=device)
    assert backend_for(query).backend == ("triton" if device.type == "cuda" else "torch")
    with pytest.raises(UnsupportedByKernel, match="head dim 512"):
        backend_for(torch.zeros(1, 1, 4, 512, device=device), "triton")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key": lambda c: c.qkv[1][..., :8]}, "key must be .*D=16.*got .*8"),
        ({"key": lambda c: c.qkv[1].expand(1, 3, 70, 16)}, "value must be .*Hkv=3"),
        ({"value": lambda c: c.qkv[2].half()}, "value must be float32; got float16"),
        ({"block_index": lambda c: c.index.long()}, "block_index must be int32"),
        ({"block_index": lambda c: c.index[:, :, :1]}, "block_index must be .*2"),
        ({"block_count": lambda c: c.count[..., :1]}, "block_count must be"),
        ({"block_count": lambda c: c.count + 5}, "block_count must be between"),
        ({"block_index": lambda c: c.index * 0 + 9}, "must hold ids from 0 to 1"),
        ({"block_size": lambda c: 48}, "64 or 128"),
        ({"key_valid": lambda c: torch.ones(1, 70)}, "key_valid must be bool"),
        ({"scale": lambda c: 0.0}, "scale must be a positive"),
        ({"query": lambda c: c.qkv[0].mT.contiguous().mT}, "last axis of query"),
        ({"key_valid": lambda c: torch.ones(1, 70, dtype=torch.bool, device="meta")}, "one device"),
    ],
)
def test_wrong_inputs_are_refused_in_words(change, words):
    case = Case((1, 1, 1, 66, 70, 16), density=1.1)
    names = ("query", "key", "value", "block_index", "block_count")
    keywords = dict(zip(names, case.arguments, strict=True)) | {"block_size": 64, "backend": "torch"}
    keywords |= {name: changed(case) for name, changed in change.items()}
    with pytest.raises(UnsupportedByKernel, match=words):
        block_sparse_attention(**keywords)


def test_query_heads_must_be_a_multiple():
    q, kv = torch.zeros(1, 3, 4, 16), torch.zeros(1, 2, 4, 16)
    index, count = block_map_to_index(torch.ones(1, 1, 1, 1, dtype=torch.bool))
    with pytest.raises(UnsupportedByKernel, match="multiple"):
        block_sparse_attention(q, kv, kv, index, count)
