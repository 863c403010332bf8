"""A kernel is chosen once, and what was chosen is told to the log that is open around it."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
import torch

from hf_accel.errors import UnsupportedByKernel
from hf_accel.kernels.block_sparse_attention import backend_for, block_map_to_index, block_sparse_attention
from hf_accel.kernels.common import dispatch, kernel_log
from hf_accel.kernels.hadamard import hadamard
from hf_accel.kernels.kmeans import kmeans
from hf_accel.kernels.permute import gather_rows
from hf_accel.kernels.quantized_linear import quantized_linear
from hf_accel.quant.packing import pack_codes


def attend(backend="torch"):
    query, key, value = (torch.randn(1, 2, 128, 16) for _ in range(3))
    index, count = block_map_to_index(torch.ones(1, 1, 2, 2, dtype=torch.bool))
    return block_sparse_attention(query, key, value, index, count, block_size=64, backend=backend)


def test_a_dispatch_is_told_with_its_reason():
    with kernel_log.logging_to({}) as log:
        attend()
    assert log == {"block_sparse_attention": ("torch", "asked for")}
    choice = backend_for(torch.zeros(1, 2, 4, 16))
    with kernel_log.logging_to({}) as log:
        attend("auto")
    assert log == {"block_sparse_attention": (choice.backend, choice.reason)}


def test_questions_and_refused_calls_are_no_dispatches():
    with kernel_log.logging_to({}) as log:
        backend_for(torch.zeros(1, 1, 4, 16))
        with pytest.raises(UnsupportedByKernel):
            block_sparse_attention(*[torch.zeros(1, 1, 4, 512)] * 3, *block_map_to_index(torch.ones(1, 1, 1, 1) > 0),
                                   block_size=64, backend="triton")  # fmt: skip
    assert log == {}


def test_nothing_is_told_after_the_end_even_after_an_exception():
    log = {}
    with pytest.raises(ZeroDivisionError), kernel_log.logging_to(log):
        raise ZeroDivisionError
    attend()
    assert log == {}


def test_an_inner_log_keeps_its_own():
    with kernel_log.logging_to({}) as outer:
        with kernel_log.logging_to({}) as inner:
            attend()
        assert outer == {}
        kmeans(torch.randn(1, 1, 32, 16), 4, iterations=1, backend="torch")
    assert inner.keys() == {"block_sparse_attention"}
    assert outer.keys() == {"kmeans"}


def test_threads_do_not_hear_each_other():
    with kernel_log.logging_to({}) as log:
        thread = threading.Thread(target=attend)
        thread.start()
        thread.join()
    assert log == {}


def test_moving_rows_speaks_for_no_kernel():
    with kernel_log.logging_to({}) as log:
        gather_rows(torch.randn(1, 1, 8, 4), torch.arange(8, dtype=torch.int32)[None, None], backend="torch")
    assert log == {}


@pytest.mark.parametrize("tokens", [2, 4096])
def test_a_call_is_dispatched_once(monkeypatch, tokens):
    """However many steps or operators it takes."""
    asked = Counter()
    choose = dispatch.choose

    def counting(op, *args, **kwargs):
        asked[op] += 1
        return choose(op, *args, **kwargs)

    for package in ("kmeans", "quantized_linear"):
        monkeypatch.setattr(f"hf_accel.kernels.{package}.choose", counting)
    kmeans(torch.randn(1, 2, 64, 16), 4, iterations=5, backend="torch")
    assert asked["kmeans"] == 1
    m, n = 16, 32
    qweight, qzeros = pack_codes(torch.zeros(n, m, dtype=torch.uint8), 4), torch.zeros(1, m // 8, dtype=torch.int32)
    x = torch.randn(tokens, n)
    quantized_linear(x, qweight, torch.ones(1, m), qzeros, torch.zeros(n, dtype=torch.int32), 4, backend="torch")
    assert asked["quantized_linear"] == 1


def test_a_log_breaks_no_graph_and_hears_what_is_dispatched_inside_an_operator():
    """A dispatch that is traced happens once for many calls, so it is not told; one in an operator is at each."""
    x = torch.randn(1, 1, 32, 16)
    index, count = torch.zeros(1, 1, 1, 1, dtype=torch.int32), torch.ones(1, 1, 1, dtype=torch.int32)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(x):
        return hadamard(block_sparse_attention(x, x, x, index, count, block_size=64)[0])

    for _ in range(2):
        with kernel_log.logging_to({}) as log:
            compiled(x)
        assert log.keys() == {"hadamard"}
