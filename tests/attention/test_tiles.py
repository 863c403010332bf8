"""Tiles against loops over tokens."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from hf_accel.attention.tiles import Tiling, cross_map, neighbour_map

TILINGS = [
    Tiling((8, 16, 16), (4, 8, 8)),
    Tiling((7, 11, 13), (4, 8, 8)),
    Tiling((5, 3, 2), (2, 2, 2)),
    Tiling((1, 9, 17), (1, 4, 16)),
    Tiling((3, 4, 4), (4, 8, 8)),
    Tiling((4, 4, 4), (1, 1, 1)),
]


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_order_is_a_permutation_that_undoes_itself(tiling):
    order = tiling.order()
    assert torch.equal(order.sort().values, torch.arange(tiling.tokens))
    x = torch.arange(tiling.tokens)
    back = torch.empty_like(x)
    back[order] = x[order]
    assert torch.equal(back, x)


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_order_labels_and_sizes_by_a_loop(tiling):
    tiles: dict[tuple[int, ...], list[int]] = {}
    for token, place in enumerate(itertools.product(*map(range, tiling.grid))):
        tiles.setdefault(tuple(p // s for p, s in zip(place, tiling.size, strict=True)), []).append(token)
    inside = [tiles[tile] for tile in sorted(tiles)]
    assert tiling.order().tolist() == list(itertools.chain(*inside))
    assert tiling.sizes().tolist() == [len(tokens) for tokens in inside]
    assert math.prod(tiling.counts) == len(inside)
    assert tiling.even == (len(inside[0]) if len({len(tokens) for tokens in inside}) == 1 else None)
    labels = tiling.labels()
    assert all((labels[tokens] == i).all() for i, tokens in enumerate(inside))


@pytest.mark.parametrize("counts", [(3, 4, 5), (1, 4, 4), (2, 1, 3), (1, 1, 1)])
@pytest.mark.parametrize("radius", [0, 1, 2, 9])
def test_neighbour_map_by_a_loop(counts, radius):
    tiles = list(itertools.product(*map(range, counts)))
    expected = [[all(abs(a - b) <= radius for a, b in zip(p, m, strict=True)) for m in tiles] for p in tiles]
    assert neighbour_map(counts, radius).tolist() == expected


@pytest.mark.parametrize("counts", [(3, 4, 5), (1, 4, 4), (2, 1, 3), (1, 1, 1)])
@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2)])
def test_cross_map_by_a_loop(counts, axes):
    tiles = list(itertools.product(*map(range, counts)))
    ours = cross_map(counts, axes)
    assert ours.tolist() == [[any(p[a] == m[a] for a in axes) for m in tiles] for p in tiles]
    assert torch.equal(ours, ours.T)
    far = math.prod(counts[a] - 1 if a in axes else counts[a] for a in range(3))
    assert (ours.sum(1) == len(tiles) - far).all()
