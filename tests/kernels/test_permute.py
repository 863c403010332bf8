"""The stable counting sort and the row moves, every backend against the definition."""

from __future__ import annotations

import pytest
import torch

from hf_accel.errors import InvalidSetting, UnsupportedByKernel
from hf_accel.kernels import permute
from hf_accel.kernels.permute import reference

BACKENDS = ["triton", "torch"]


def random_labels(*shape: int, num_labels: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(num_labels, shape, generator=generator, dtype=torch.int32).to(device)


def random_order(*shape: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(shape, generator=generator).argsort(-1).int().to(device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("lead", "length", "num_labels"),
    [
        ((2, 3), 251, 7),
        ((2,), 64, 1),
        ((), 130, 130),
        ((1, 2), 1, 5),
        ((1,), 65, 300),
        ((1,), 1030, 3),  # more than one segment: counts must carry over
        ((3,), 0, 4),
    ],
)
def test_sort_is_the_stable_sort(backend, lead, length, num_labels, device):
    labels = random_labels(*lead, length, num_labels=num_labels, device=device)
    order, sizes = permute.sort_by_label(labels, num_labels, backend=backend)
    expected_order, expected_sizes = reference.sort_by_label(labels, num_labels)
    assert order.dtype == sizes.dtype == torch.int32
    assert torch.equal(order, expected_order)
    assert torch.equal(sizes, expected_sizes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sort_of_one_label_only(backend, device):
    labels = torch.full((1, 700), 5, dtype=torch.int32, device=device)
    order, sizes = permute.sort_by_label(labels, 9, backend=backend)
    assert torch.equal(order[0], torch.arange(700, dtype=torch.int32, device=device))
    assert sizes[0].tolist() == [0, 0, 0, 0, 0, 700, 0, 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_sort_takes_a_strided_view(backend, device):
    labels = random_labels(90, 2, num_labels=6, device=device).transpose(0, 1)
    order, _ = permute.sort_by_label(labels, 6, backend=backend)
    assert torch.equal(order, reference.sort_by_label(labels, 6)[0])


def test_sort_over_many_segments(device, monkeypatch):
    """As many segments as a long sequence on a GPU would have, at a length the interpreter can bear."""
    if device.type != "cpu":
        length = 75_600
    else:
        from hf_accel.kernels.permute import triton as kernels

        monkeypatch.setattr(kernels, "COUNT_BLOCK", 64)
        monkeypatch.setattr(kernels, "_segment_length", lambda groups, length, num_labels: 64)
        length = 500
    labels = random_labels(2, length, num_labels=11, device=device)
    order, sizes = permute.sort_by_label(labels, 11, backend="triton")
    expected_order, expected_sizes = reference.sort_by_label(labels, 11)
    assert torch.equal(order, expected_order)
    assert torch.equal(sizes, expected_sizes)


def test_segments_fill_the_gpu_but_bound_the_table():
    pytest.importorskip("triton")
    from hf_accel.kernels.permute.triton import COUNT_BLOCK, _segment_length

    for groups, length, num_labels in [(40, 75_600, 1000), (12, 32_760, 300), (1, 1000, 1000), (1, 1, 1)]:
        segment = _segment_length(groups, length, num_labels)
        assert segment % COUNT_BLOCK == 0
        assert -(-length // segment) * num_labels <= 4 * length + num_labels


def test_triton_sort_survives_labels_out_of_range(device):
    labels = torch.tensor([[3, -7, 1, 99]], dtype=torch.int32, device=device)
    order, sizes = permute.sort_by_label(labels, 4, backend="triton")
    assert order[0].sort().values.tolist() == [0, 1, 2, 3]
    assert sizes[0].sum() == 4


def test_cpu_sort_refuses_labels_out_of_range():
    with pytest.raises(UnsupportedByKernel, match=r"in \[0, 4\); got 1 to 4"):
        permute.sort_by_label(torch.tensor([1, 4], dtype=torch.int32), 4, backend="torch")


def test_sort_refuses_what_it_cannot_do():
    with pytest.raises(UnsupportedByKernel, match="int32"):
        permute.sort_by_label(torch.zeros(3, dtype=torch.int64), 2)
    with pytest.raises(InvalidSetting, match="num_labels"):
        permute.sort_by_label(torch.zeros(3, dtype=torch.int32), 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 40, 80, 128, 192])
def test_scatter_undoes_gather(backend, dtype, head_dim, device):
    x = torch.randn(2, 3, 61, head_dim, device=device).to(dtype)
    order = random_order(2, 3, 61, device=device)
    moved = permute.gather_rows(x, order, backend=backend)
    assert moved.is_contiguous()
    assert torch.equal(moved, reference.gather_rows(x, order))
    assert torch.equal(permute.scatter_rows(moved, order, backend=backend), x)


def views_of_four(device):
    heads_inside = torch.randn(2, 37, 3, 32, device=device).transpose(1, 2)
    fused = torch.randn(2, 37, 3, 3, 32, device=device)[:, :, 1].transpose(1, 2)
    return {
        "heads inside": heads_inside,
        "slice of a fused projection": fused,
        "head dim not innermost": torch.randn(2, 3, 32, 37, device=device).transpose(2, 3),
        "expanded batch": torch.randn(1, 3, 37, 32, device=device).expand(2, 3, 37, 32),
        "rows off the grid": torch.randn(2, 3, 37, 33, device=device)[..., 1:],
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", list(views_of_four("cpu")))
def test_rows_of_any_strides(backend, view, device):
    x = views_of_four(device)[view]
    order = random_order(2, 3, 37, device=device)
    assert torch.equal(permute.gather_rows(x, order, backend=backend), reference.gather_rows(x, order))
    assert torch.equal(permute.scatter_rows(x, order, backend=backend), reference.scatter_rows(x, order))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_several_tensors_share_one_order(backend, count, device):
    views = list(views_of_four(device).values())[:count]
    order = random_order(2, 3, 37, device=device)
    moved = permute.gather_rows(tuple(views), order, backend=backend)
    assert isinstance(moved, tuple)
    assert len(moved) == count
    for x, y in zip(views, moved, strict=True):
        assert torch.equal(y, reference.gather_rows(x, order))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gather_may_take_fewer_or_more_rows(backend, device):
    x = torch.randn(1, 2, 10, 16, device=device)
    for rows in (0, 3, 25):
        order = random_labels(1, 2, rows, num_labels=10, device=device)
        assert torch.equal(permute.gather_rows(x, order, backend=backend), reference.gather_rows(x, order))


def test_rows_refuse_what_does_not_fit():
    x, order = torch.randn(1, 2, 8, 16), torch.zeros(1, 2, 8, dtype=torch.int32)
    with pytest.raises(UnsupportedByKernel, match=r"\[B, H, S, D\]"):
        permute.gather_rows(x[0], order)
    with pytest.raises(UnsupportedByKernel, match="int32"):
        permute.gather_rows(x, order.long())
    with pytest.raises(UnsupportedByKernel, match="alike"):
        permute.gather_rows((x, x.half()), order)
    with pytest.raises(UnsupportedByKernel, match="at least one"):
        permute.gather_rows((), order)
    with pytest.raises(UnsupportedByKernel, match="every row once"):
        permute.scatter_rows(x, order[..., :3])


def test_custom_ops_keep_their_promises():
    x = torch.randn(2, 3, 20, 8)
    labels = random_labels(6, 20, num_labels=4, device=torch.device("cpu"))
    order = random_order(2, 3, 20, device=torch.device("cpu"))
    torch.library.opcheck(permute._sort_by_label, (labels, 4, "auto"))
    torch.library.opcheck(permute._gather_rows, ([x, x.transpose(0, 1).contiguous().transpose(0, 1)], order, "auto"))
    torch.library.opcheck(permute._scatter_rows, (x, order, "auto"))


def test_compiles_without_a_graph_break():
    def group(x, labels):
        order, sizes = permute.sort_by_label(labels, 5)
        return permute.scatter_rows(permute.gather_rows((x, x), order)[1] * 2, order), sizes

    x = torch.randn(1, 2, 33, 16)
    labels = random_labels(1, 2, 33, num_labels=5, device=torch.device("cpu"))
    y, sizes = torch.compile(group, fullgraph=True, backend="aot_eager")(x, labels)
    assert torch.equal(y, x * 2)
    assert torch.equal(sizes, group(x, labels)[1])
