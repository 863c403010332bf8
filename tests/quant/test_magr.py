"""MagR: the proximal step by its definition, then what it is for."""

from __future__ import annotations

import pytest
import torch

from hf_accel.errors import InvalidSetting, QuantizationError
from hf_accel.quant.magr import largest_eigenvalue, shrink_groups, shrink_largest


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated_gram(n: int, rank: int, noise: float = 0.02) -> torch.Tensor:
    x = gaussian(400, rank, seed=8) @ gaussian(rank, n, seed=9) + noise * gaussian(400, n, seed=10)
    return x.t() @ x / 200


def l1_projection(x: torch.Tensor, radius: float) -> torch.Tensor:
    """Of one vector, by bisection for the level: nothing sorted."""
    if float(x.abs().sum()) <= radius:
        return x.clone()
    low, high = 0.0, float(x.abs().max())
    for _ in range(100):
        level = (low + high) / 2
        low, high = (level, high) if float((x.abs() - level).clamp(min=0).sum()) > radius else (low, level)
    return x.sign() * (x.abs() - low).clamp(min=0)


@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.3, 2.0, 50.0])
@pytest.mark.parametrize(("n", "group"), [(24, 8), (24, 24), (23, 7)])
def test_the_proximal_step_is_what_the_projection_leaves(alpha, n, group):
    x = gaussian(5, n)
    ours = shrink_largest(x, group, alpha)
    for i in range(5):
        for start in range(0, n, group):
            one = x[i, start : start + group]
            torch.testing.assert_close(
                ours[i, start : start + group], one - l1_projection(one, alpha), atol=1e-10, rtol=0
            )


def test_the_proximal_step_minimises():
    x, alpha = gaussian(1, 10), 0.7

    def objective(y):
        return 0.5 * (y - x).square().sum(-1) + alpha * y.abs().amax(-1)

    best = objective(shrink_largest(x, 10, alpha))
    others = shrink_largest(x, 10, alpha) + 0.05 * gaussian(500, 10, seed=3)
    assert bool((objective(others) >= best).all())
    assert float(best) < float(objective(x))
    assert bool((shrink_largest(x, 10, 100.0) == 0).all())


def test_white_inputs_are_one_proximal_step():
    weight = gaussian(6, 32)
    ours = shrink_groups(weight, 3 * torch.eye(32, dtype=torch.float64), 8, 0.1, iterations=5)
    torch.testing.assert_close(ours, shrink_largest(weight, 8, 0.1), atol=1e-9, rtol=0)


def test_alpha_zero_changes_nothing():
    weight = gaussian(6, 32)
    assert torch.equal(shrink_groups(weight, correlated_gram(32, 8), 8, 0.0), weight)


@pytest.mark.parametrize(("group", "alpha"), [(16, 1e-3), (-1, 1e-2), (24, 1e-3)])
def test_the_objective_never_rises(group, alpha):
    weight, gram = gaussian(8, 64), correlated_gram(64, 20)
    normal = gram / torch.linalg.eigvalsh(gram)[-1]
    width = 64 if group == -1 else group

    def objective(v):
        edge = torch.nn.functional.pad(v, (0, -64 % width)).view(8, -1, width).abs().amax(-1).sum()
        return float(0.5 * ((v - weight) @ normal * (v - weight)).sum() + alpha * edge)

    values = [objective(shrink_groups(weight, gram, group, alpha, iterations=i)) for i in (0, 1, 2, 5, 20, 80)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]


def test_the_largest_weights_shrink_and_the_output_hardly_changes():
    weight, gram = gaussian(16, 64), correlated_gram(64, 20)
    shrunk = shrink_groups(weight, gram, 16, 1e-2)
    output = ((shrunk - weight) @ gram * (shrunk - weight)).sum() / (weight @ gram * weight).sum()
    before, after = weight.view(16, 4, 16).abs().amax(-1), shrunk.view(16, 4, 16).abs().amax(-1)
    assert float(output) ** 0.5 < 0.01
    assert float((after / before).mean()) < 0.75
    strong = shrink_groups(weight, gram, 16, 3e-2)
    assert float(strong.view(16, 4, 16).abs().amax(-1).mean()) < float(after.mean())


def test_the_scale_of_the_gram_does_not_matter_and_zero_says_nothing():
    weight, gram = gaussian(4, 32).float(), correlated_gram(32, 8).float()
    torch.testing.assert_close(shrink_groups(weight, gram, 8, 1e-3), shrink_groups(weight, 1e4 * gram, 8, 1e-3))
    assert torch.equal(shrink_groups(weight, 0 * gram, 8, 1e-3), weight)
    assert shrink_groups(weight.half(), gram, 8, 1e-3).dtype == torch.float32


def test_largest_eigenvalue():
    gram = correlated_gram(40, 10)
    exact = float(torch.linalg.eigvalsh(gram)[-1])
    assert 0.95 * exact < largest_eigenvalue(gram) <= exact * (1 + 1e-12)
    assert largest_eigenvalue(torch.zeros(4, 4)) == 0


def test_what_cannot_be():
    weight, gram = gaussian(4, 32), correlated_gram(32, 8)
    with pytest.raises(InvalidSetting, match="'alpha' must be 0 or more"):
        shrink_groups(weight, gram, 8, -1.0)
    with pytest.raises(InvalidSetting, match="positive, or -1"):
        shrink_groups(weight, gram, 0, 1.0)
    with pytest.raises(QuantizationError, match=r"gram \[n, n\]; got \[4, 32\] and \[31, 32\]"):
        shrink_groups(weight, gram[1:], 8, 1.0)
