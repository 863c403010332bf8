"""k-means: the two pieces against their definition, then what Lloyd's algorithm promises as a whole."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from kernel_helpers import kernel_dtypes

from hf_accel.errors import InvalidSetting, UnsupportedByKernel
from hf_accel.kernels import kmeans as op
from hf_accel.kernels.kmeans import reference
from hf_accel.kernels.permute import reference as permute_reference

BACKENDS = ["triton", "torch"]
MEAN_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def points(*shape: int, dtype=torch.float32, device="cpu", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def assert_nearest(labels: torch.Tensor, x: torch.Tensor, centroids: torch.Tensor) -> None:
    """Labels are the argmin of explicit fp64 distances, wherever the two best differ by more than 1e-5."""
    distance = torch.cdist(x.double(), centroids.double()).square()
    best = distance.topk(min(2, distance.shape[-1]), largest=False).values
    scale = distance.amax(-1)
    decided = (best[..., -1] - best[..., 0] > 1e-5 * scale) | (distance.shape[-1] == 1)
    assert decided.float().mean() > 0.9
    assert torch.equal(labels[decided], distance.argmin(-1).int()[decided])
    chosen = distance.gather(-1, labels.long()[..., None])[..., 0]
    assert (chosen - best[..., 0] <= 1e-5 * scale).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize(
    ("length", "num_clusters", "head_dim"),
    [(251, 37, 64), (130, 65, 40), (64, 1, 16), (97, 10, 80), (33, 40, 96), (1, 3, 128), (70, 7, 192)],
)
def test_assign_finds_the_nearest(backend, dtype, length, num_clusters, head_dim, device):
    x = points(1, 2, length, head_dim, dtype=dtype, device=device)
    centroids = points(1, 2, num_clusters, head_dim, dtype=dtype, device=device, seed=1)
    labels = op.assign(x, centroids, backend=backend)
    assert labels.dtype == torch.int32
    assert_nearest(labels, x, centroids)


@pytest.mark.parametrize("tile", [(16, 16), (64, 32), (32, 128), (16, 256)], ids=str)
@pytest.mark.parametrize("num_clusters", [3, 100, 128, 300])
def test_assign_with_every_width_of_tile(tile, num_clusters, device):
    from hf_accel.kernels.common.tile import Tile
    from hf_accel.kernels.kmeans import triton as kernels

    x = points(1, 1, 70, 32, dtype=torch.float16, device=device)
    centroids = points(1, 1, num_clusters, 32, dtype=torch.float16, device=device, seed=1)
    assert_nearest(kernels.assign(x, centroids, tile=Tile(*tile, num_warps=4, num_stages=2)), x, centroids)


def test_assign_in_bf16_on_the_cpu():
    x, centroids = (
        points(1, 2, 1000, 64, dtype=torch.bfloat16),
        points(1, 2, 50, 64, dtype=torch.bfloat16, seed=1),
    )
    assert_nearest(op.assign(x, centroids), x, centroids)


# Not in the interpreter: its matrix product is NumPy's, which rounds the last columns of a tile otherwise.
@pytest.mark.parametrize("backend", ["torch", *["triton"] * torch.cuda.is_available()])
@pytest.mark.parametrize("num_clusters", [2, 6, 34, 100])
def test_of_equal_centroids_the_second_stays_empty(backend, num_clusters, device):
    """A random draw with replacement gives such twins; their scores must not differ by a rounding."""
    x = points(1, 1, 90, 32, device=device)
    centroids = points(1, 1, num_clusters // 2, 32, device=device, seed=1).repeat(1, 1, 2, 1)
    assert op.assign(x, centroids, backend=backend).max() < num_clusters // 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_clusters", [5, 70, 200])
def test_ties_go_to_the_lowest_index(backend, num_clusters, device):
    """Small integers: every score is exact in fp32, and many are equal, within a tile and across tiles."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (1, 1, 120, 16), generator=generator).float().to(device)
    centroids = torch.randint(-1, 2, (1, 1, 4, 16), generator=generator).float().to(device)
    centroids = centroids.repeat(1, 1, num_clusters // 4 + 1, 1)[:, :, :num_clusters]
    labels = op.assign(x, centroids, backend=backend)
    assert torch.equal(labels, reference.assign(x, centroids))
    assert labels.max() < 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_from_the_origin_small_differences_count(backend, device):
    """||x||^2 is 1e4 times the differences of the distances: in the score it would drown them."""
    base = torch.full((64,), 4.0, device=device)
    directions = torch.eye(64, device=device)[:8] * 0.25
    centroids = (base + directions)[None, None]
    x = base + 0.5 * directions.repeat(20, 1)
    labels = op.assign(x[None, None], centroids, backend=backend)
    assert torch.equal(labels[0, 0], torch.arange(8, dtype=torch.int32, device=device).repeat(20))


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_stay_in_range_when_points_are_not_numbers(backend, device):
    x = points(1, 1, 20, 16, device=device)
    x[0, 0, 3] = float("nan")
    x[0, 0, 5] = float("inf")
    labels = op.assign(x, points(1, 1, 5, 16, device=device, seed=1), backend=backend)
    assert ((labels >= 0) & (labels < 5)).all()


def means_by_hand(x, labels, centroids):
    expected = centroids.clone()
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            for k in range(centroids.shape[2]):
                members = x[b, h][labels[b, h] == k]
                if len(members):
                    expected[b, h, k] = members.double().mean(0).to(x.dtype)
    return expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize(
    ("length", "num_clusters", "head_dim"),
    [(251, 19, 64), (64, 1, 40), (50, 64, 80), (90, 4, 192), (1, 2, 16)],
)
def test_update_is_the_mean_of_the_members(backend, dtype, length, num_clusters, head_dim, device):
    x = points(2, 2, length, head_dim, dtype=dtype, device=device)
    old = points(2, 2, num_clusters, head_dim, dtype=dtype, device=device, seed=1)
    generator = torch.Generator().manual_seed(2)
    # The lower three quarters of the labels only: some clusters are empty.
    used = max(1, 3 * num_clusters // 4)
    labels = torch.randint(used, (2, 2, length), generator=generator, dtype=torch.int32).to(device)
    centroids, sizes = op.update(x, labels, old, backend=backend)
    expected = means_by_hand(x, labels, old)
    assert centroids.dtype == dtype
    assert (centroids.float() - expected.float()).abs().max() <= MEAN_TOLERANCE[dtype]
    empty = sizes == 0
    assert torch.equal(centroids[empty], old[empty])
    for b in range(2):
        for h in range(2):
            counts = torch.bincount(labels[b, h], minlength=num_clusters)
            assert torch.equal(sizes[b, h].long(), counts)


def giant_clusters(device) -> tuple[torch.Tensor, torch.Tensor]:
    """Sizes round 1024, in runs that begin and end inside, at and beside the borders of chunks of 512."""
    sizes = [100, 1024, 0, 1025, 411, 1536, 1, 1535, 2049, 700]
    labels = torch.cat([torch.full((n,), k, dtype=torch.int32) for k, n in enumerate(sizes)])
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    return shuffled.to(device)[None, None], torch.tensor(sizes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_update_of_giant_clusters(backend, device):
    """Split over programs, and still the mean; cut at every multiple of 512 that the sorted runs cross."""
    labels, sizes = giant_clusters(device)
    x = points(1, 1, labels.shape[-1], 16, device=device) + 3
    old = points(1, 1, len(sizes), 16, device=device, seed=1)
    centroids, counted = op.update(x, labels, old, backend=backend)
    assert torch.equal(counted[0, 0].cpu().long(), sizes)
    assert (centroids - means_by_hand(x, labels, old)).abs().max() <= 1e-5


@pytest.mark.parametrize("first", [0, 511, 512, 513, 1023])
def test_giant_cluster_at_every_offset_of_a_chunk(first, device):
    labels = torch.zeros(1, 1, 3000, dtype=torch.int32, device=device)
    labels[..., first:] = 1
    labels[..., first + 1200 :] = 2
    x = points(1, 1, 3000, 16, device=device)
    old = points(1, 1, 4, 16, device=device, seed=1)
    centroids, _ = op.update(x, labels, old, backend="triton")
    assert (centroids - means_by_hand(x, labels, old)).abs().max() <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_bit_equal(backend, device):
    labels, sizes = giant_clusters(device)
    x = points(1, 1, labels.shape[-1], 16, dtype=torch.float16, device=device)
    old = points(1, 1, len(sizes), 16, dtype=torch.float16, device=device, seed=1)
    first, second = (op.update(x, labels, old, backend=backend)[0] for _ in range(2))
    assert torch.equal(first, second)
    x = points(2, 2, 120, 32, device=device)
    runs = [op.kmeans(x, 9, iterations=3, backend=backend) for _ in range(2)]
    for one, other in zip(*(run[:4] for run in runs), strict=True):
        assert torch.equal(one, other)


def layouts(device):
    fused = points(2, 45, 3, 3, 32, device=device)
    return {
        "heads inside": points(2, 45, 3, 32, device=device).transpose(1, 2),
        "slice of a fused projection": fused[:, :, 1].transpose(1, 2),
        "head dim not innermost": points(2, 3, 32, 45, device=device).mT,
        "rows off the grid": points(2, 3, 45, 33, device=device)[..., 1:],
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", list(layouts("cpu")))
def test_strides_do_not_matter(backend, layout, device):
    x = layouts(device)[layout]
    strided = op.kmeans(x, 6, iterations=2, backend=backend)
    plain = op.kmeans(x.contiguous(), 6, iterations=2, backend=backend)
    for one, other in zip(strided[:4], plain[:4], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)])
def test_any_number_of_leading_dims(backend, lead, device):
    x = points(*lead, 40, 16, device=device)
    result = op.kmeans(x, 5, iterations=2, backend=backend)
    assert result.labels.shape == result.order.shape == (*lead, 40)
    assert result.centroids.shape == (*lead, 5, 16)
    assert result.sizes.shape == (*lead, 5)
    assert result.iterations == 2
    one_head = op.kmeans(
        x.view(-1, 40, 16)[-1], 5, centroids=op.seed(x, 5).view(-1, 5, 16)[-1], iterations=2, backend=backend
    )
    assert torch.equal(result.labels.view(-1, 40)[-1], one_head.labels)
    assert torch.equal(result.centroids.view(-1, 5, 16)[-1], one_head.centroids)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", kernel_dtypes())
def test_kmeans_is_assign_and_update_in_turn(backend, dtype, device):
    x = points(1, 2, 150, 32, dtype=dtype, device=device)
    start = points(1, 2, 12, 32, dtype=dtype, device=device, seed=1)
    result = op.kmeans(x, 12, centroids=start, iterations=3, backend=backend)
    old = start
    for _ in range(3):
        labels = op.assign(x, old, backend=backend)
        old, sizes = op.update(x, labels, old, backend=backend)
    assert torch.equal(result.labels, labels)
    assert torch.equal(result.centroids, old)
    assert torch.equal(result.sizes, sizes)
    assert torch.equal(result.order, permute_reference.sort_by_label(labels, 12)[0])
    assert (result.sizes.sum(-1) == 150).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inertia_never_rises(backend, device):
    length = 200 if backend == "triton" and device.type == "cpu" else 5000
    x = points(1, 2, length, 16, device=device)
    centroids, inertia = op.seed(x, 20), []
    for _ in range(6):
        labels = op.assign(x, centroids, backend=backend)
        nearest = centroids.gather(2, labels.long()[..., None].expand(x.shape))
        inertia.append((x - nearest).double().square().sum().item())
        centroids, _ = op.update(x, labels, centroids, backend=backend)
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(inertia))
    assert inertia[-1] < 0.9 * inertia[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_cluster_is_the_mean(backend, device):
    x = points(1, 2, 77, 16, device=device)
    result = op.kmeans(x, 1, iterations=1, backend=backend)
    assert (result.labels == 0).all()
    assert (result.centroids[:, :, 0] - x.mean(2)).abs().max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_point_its_own_cluster(backend, device):
    x = points(1, 2, 50, 32, device=device)
    result = op.kmeans(x, 50, centroids=x, iterations=10, tolerance=1e-6, backend=backend)
    assert torch.equal(result.labels, torch.arange(50, dtype=torch.int32, device=device).expand(1, 2, 50))
    assert torch.equal(result.centroids, x)
    assert result.iterations == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_stop_by_tolerance_returns_the_centroids_before_the_move(backend, device):
    x = points(1, 2, 100, 16, device=device)
    start = op.kmeans(x, 4, iterations=30, backend=backend).centroids
    stopped = op.kmeans(x, 4, centroids=start, iterations=5, tolerance=100.0, backend=backend)
    assert stopped.iterations == 1
    assert torch.equal(stopped.centroids, start)
    settled = op.kmeans(x, 4, centroids=start, iterations=5, backend=backend)
    assert settled.iterations == 5
    assert torch.equal(settled.labels, op.assign(x, start, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_of_points_only_permutes_labels(backend, device):
    x = points(1, 1, 90, 16, device=device)
    shuffle = torch.randperm(90, generator=torch.Generator().manual_seed(3)).to(device)
    start = op.seed(x, 7)
    plain = op.kmeans(x, 7, centroids=start, iterations=2, backend=backend)
    shuffled = op.kmeans(x[:, :, shuffle], 7, centroids=start, iterations=2, backend=backend)
    assert torch.equal(shuffled.labels, plain.labels[..., shuffle])
    assert (shuffled.centroids - plain.centroids).abs().max() < 1e-6


def test_cpu_form_at_a_larger_size():
    x, start = points(1, 2, 6000, 64), points(1, 2, 100, 64, seed=1)
    labels = op.assign(x, start, backend="torch")
    assert_nearest(labels, x, start)
    centroids, sizes = op.update(x, labels, start, backend="torch")
    expected, expected_sizes = reference.update(x, labels, start)
    assert torch.equal(sizes, expected_sizes)
    assert (centroids - expected).abs().max() <= 1e-5


def clumped(device) -> torch.Tensor:
    """Nearly all points in one tight clump, a few in fifteen others: a uniform draw sees the clump alone."""
    centers = 10 * points(16, 16, seed=4)
    which = torch.zeros(2, 1, 800, dtype=torch.int64)
    which[..., 680:] = torch.arange(120) % 15 + 1
    return (centers[which] + 0.05 * points(2, 1, 800, 16)).to(device)


def test_plus_plus_finds_the_rare_clumps(device):
    x = clumped(device)
    uniform = op.kmeans(x, 16, iterations=3, backend="torch")
    spread = op.kmeans(x, 16, iterations=3, init="kmeans++", backend="torch")
    inertia = [
        (x - r.centroids.gather(2, r.labels.long()[..., None].expand(x.shape))).square().sum()
        for r in (uniform, spread)
    ]
    assert inertia[1] < 0.01 * inertia[0]
    assert (spread.sizes > 0).sum(-1).min() == 16


@pytest.mark.parametrize("init", ["random", "kmeans++"])
def test_seeds_are_points_and_the_global_generator_is_left_alone(init, device):
    x = points(2, 3, 60, 16, device=device)
    before = torch.get_rng_state()
    centroids = op.seed(x, 8, init=init)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(centroids, op.seed(x, 8, init=init))
    assert (torch.cdist(centroids, x, compute_mode="donot_use_mm_for_euclid_dist").amin(-1) == 0).all()
    generator = torch.Generator(device).manual_seed(1)
    first, second = (op.seed(x, 8, init=init, generator=generator) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("num_clusters", [1, 5, 40])
def test_plus_plus_with_fewer_distinct_points_than_clusters(num_clusters, device):
    x = points(1, 1, 3, 16, device=device).repeat(1, 1, 5, 1)
    result = op.kmeans(x, num_clusters, iterations=2, init="kmeans++", backend="torch")
    assert torch.isfinite(result.centroids).all()
    if num_clusters >= 3:
        nearest = result.centroids.gather(2, result.labels.long()[..., None].expand(x.shape))
        assert (nearest - x).abs().max() < 1e-6


def test_refuses_what_it_cannot_do():
    x = points(1, 2, 20, 16)
    with pytest.raises(InvalidSetting, match="iterations"):
        op.kmeans(x, 4, iterations=0)
    with pytest.raises(InvalidSetting, match="num_clusters"):
        op.kmeans(x, 0, iterations=1)
    with pytest.raises(InvalidSetting, match="tolerance"):
        op.kmeans(x, 4, iterations=1, tolerance=-1.0)
    with pytest.raises(InvalidSetting, match="kmeans\\+\\+"):
        op.kmeans(x, 4, iterations=1, init="farthest")
    with pytest.raises(UnsupportedByKernel, match="num_clusters=4"):
        op.kmeans(x, 4, iterations=1, centroids=x[:, :, :3])
    with pytest.raises(UnsupportedByKernel, match="need centroids"):
        op.assign(x, x[:, :1])
    with pytest.raises(UnsupportedByKernel, match="like the points"):
        op.assign(x, x.half())
    with pytest.raises(UnsupportedByKernel, match="float32, float16 or bfloat16"):
        op.assign(x.double(), x.double())
    with pytest.raises(UnsupportedByKernel, match="above 0"):
        op.assign(x[:, :, :0], x)
    with pytest.raises(UnsupportedByKernel, match="labels must be int32"):
        op.update(x, torch.zeros(1, 2, 20, dtype=torch.int64), x)


def test_custom_ops_keep_their_promises():
    x, centroids = points(2, 3, 30, 8), points(2, 3, 5, 8, seed=1)
    labels = op.assign(x, centroids)
    torch.library.opcheck(op._assign, (x, centroids, "auto"))
    torch.library.opcheck(op._update, (x, labels, centroids, "auto"))
    torch.library.opcheck(op._seed, (x, 4, "kmeans++"))


def test_compiles_without_a_graph_break():
    def cluster(x):
        result = op.kmeans(x, 6, iterations=2)
        return result.labels, result.centroids

    x = points(1, 2, 64, 16)
    labels, centroids = torch.compile(cluster, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(labels, cluster(x)[0])
    assert torch.equal(centroids, cluster(x)[1])
