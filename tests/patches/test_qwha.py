"""QWHA on one layer, against the paper's own form of it: a root of the Gram matrix, a dictionary, a solve."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_accel.errors import QuantizationError
from hf_accel.kernels.hadamard import block_size, hadamard, hadamard_matrix
from hf_accel.patches.qwha import allocate, correction, fit, select, sparse_correction, spectral_gram
from hf_accel.quant.formats import format_of
from hf_accel.quant.grid import Scheme, fit_grid, round_to_grid

VARIANTS = [(a, s) for a in ("paper", "code") for s in ("paper", "code")]


class Layer:
    """Inputs, a weight and its rounding, and the paper's quantities in fp64."""

    def __init__(self, m=24, n=32, seed=0, tokens=200, decay=1.0, bits=2, group=16):
        generator = torch.Generator().manual_seed(seed)
        self.m, self.n = m, n
        mixed = torch.randn(tokens, n, generator=generator, dtype=torch.float64)
        spread = torch.arange(1, n + 1, dtype=torch.float64) ** -decay
        turn = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
        self.x = mixed * spread @ turn
        self.weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
        scheme = Scheme.grouped(format_of(f"int{bits}"), group)
        grid = fit_grid(self.weight.float(), scheme)
        self.rounded = round_to_grid(self.weight.float(), grid, scheme).double()
        self.error = self.weight - self.rounded
        self.gram = self.x.T @ self.x
        self.block = block_size(n)
        self.spectrum = spectral_gram(self.gram, self.block)
        whole = [hadamard_matrix(self.block, torch.float64)] * (n // self.block)
        self.h = torch.block_diag(*whole)
        # The dictionary: what each coefficient does to the outputs of the calibration tokens.
        self.root = torch.linalg.cholesky(self.gram).T
        self.dictionary = self.root @ self.h.T / self.block

    def output_error(self, update):
        return float((self.x @ (self.error - update).T).norm() / (self.x @ self.error.T).norm())

    def dense(self, found):
        out = torch.zeros(self.m, self.n, dtype=torch.float64)
        out[found.kept] = found.values
        return out

    def update(self, found):
        return self.dense(found) @ self.h / self.block

    def correct(self, count, **options):
        return sparse_correction(self.error, self.spectrum, count, self.block, **options)


@pytest.fixture(params=[(24, 32), (10, 48), (9, 40), (12, 76)], ids=lambda size: f"{size[0]}x{size[1]}")
def layer(request):
    return Layer(*request.param, tokens=300)


# -- the transform and the dense coefficients --------------------------------------------------------------------------


@pytest.mark.parametrize("n", [64, 96, 160, 172 * 2])
def test_the_transform_is_orthogonal_and_inverted(n):
    h = hadamard_matrix(n, torch.float64)
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))
    v = torch.randn(3, n, dtype=torch.float64)
    assert torch.allclose(hadamard(hadamard(v), inverse=True), v, atol=1e-13)


def test_dense_coefficients_are_one_transform_and_no_solve(layer):
    targets = layer.root @ layer.error.T
    solved = torch.linalg.solve(layer.dictionary, targets).T
    ours = hadamard(layer.error, blocks=layer.block)
    assert torch.allclose(ours, solved, atol=1e-10 * float(solved.abs().max()))
    assert torch.allclose(ours, layer.error @ layer.h.T, atol=1e-12)
    assert torch.allclose(ours.norm(dim=1), layer.block**0.5 * layer.error.norm(dim=1), rtol=1e-12)


def test_the_spectral_gram_is_that_of_the_dictionary(layer):
    scale = float(layer.spectrum.abs().max())
    assert torch.allclose(layer.spectrum, layer.dictionary.T @ layer.dictionary, atol=1e-12 * scale)
    dense = torch.randn(5, layer.n, dtype=torch.float64)
    outputs = layer.x @ (dense @ layer.h / layer.block).T
    energy = ((dense @ layer.spectrum) * dense).sum(1)
    assert torch.allclose(energy, outputs.square().sum(0), rtol=1e-10)


# -- budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 7, 100, 319, 320])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 3.0])
def test_budgets_add_up_and_stay_below_the_cap(count, temperature):
    errors = torch.tensor([0.0, 1e-9, 0.1, 0.1, 0.5, 1.0, 1.0, 2.0, 30.0, 1e6])
    budgets = allocate(errors, count, 32, temperature)
    assert int(budgets.sum()) == count
    assert int(budgets.min()) >= 0
    assert int(budgets.max()) <= 32


def test_budgets_follow_the_errors():
    assert allocate(torch.tensor([1.0, 2.0, 5.0]), 80, 100).tolist() == [10, 20, 50]
    assert allocate(torch.tensor([1.0, 2.0, 5.0]), 90, 100, 0).tolist() == [30, 30, 30]
    assert allocate(torch.tensor([1.0, 3.0]), 40, 100, 2.0).tolist() == [4, 36]
    assert allocate(torch.zeros(4), 8, 5).tolist() == [2, 2, 2, 2]


def test_what_the_cap_cuts_off_is_divided_among_the_others_evenly():
    # Shares 80, 10, 10 with a cap of 20: 60 are left for two, but only 10 more fit into each.
    assert allocate(torch.tensor([8.0, 1.0, 1.0]), 50, 20).tolist() == [20, 15, 15]
    assert allocate(torch.tensor([8.0, 1.0, 1.0]), 60, 20).tolist() == [20, 20, 20]


def test_the_last_few_go_to_those_that_have_fewest():
    # Shares 1.25, 3.75, 5: floors 1, 3, 5, one is left.
    assert allocate(torch.tensor([1.0, 3.0, 4.0]), 10, 100).tolist() == [2, 3, 5]
    # Four equal ones and six coefficients: two of them have one more.
    assert sorted(allocate(torch.ones(4), 6, 100).tolist()) == [1, 1, 2, 2]


def test_budgets_of_extreme_errors_are_finite():
    for errors in (torch.full((3,), 1e-30), torch.tensor([1e30, 1e-30, 0.0])):
        assert int(allocate(errors, 5, 4).sum()) == 5
    with pytest.raises(QuantizationError, match="do not fit"):
        allocate(torch.ones(3), 13, 4)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_allocation_variants(layer, variant):
    """By the error of the output's activations, or of its weights."""
    count = 3 * layer.m
    found = layer.correct(count, allocation=variant)
    by_definition = {"paper": (layer.x @ layer.error.T).norm(dim=0), "code": layer.error.norm(dim=1)}[variant]
    assert torch.equal(found.kept.sum(1), allocate(by_definition, count, layer.n))


# -- places ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_selection_variants(layer, variant):
    """By magnitude, or by the energy that a coefficient has in the activations."""
    found = layer.correct(4 * layer.m, selection=variant, damping=0.0)
    dense = hadamard(layer.error, blocks=layer.block)
    scores = dense.abs()
    if variant == "code":
        scores = layer.dictionary.square().sum(0) * dense.square()
    for row in range(layer.m):
        own = int(found.kept[row].sum())
        best = scores[row].topk(own).indices.sort().values
        assert torch.equal(found.kept[row].nonzero()[:, 0], best)


def test_select_in_parts_and_with_ties(monkeypatch):
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 3.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
    budgets = torch.tensor([2, 3, 0])
    expected = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]]).bool()
    assert torch.equal(select(scores, budgets), expected)
    monkeypatch.setattr(correction, "_ELEMENTS", 4)
    assert torch.equal(select(scores, budgets), expected)


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 1e-4])
def test_refinement_is_least_squares_on_the_dictionary(layer, damping):
    found = layer.correct(5 * layer.m, damping=damping)
    added = damping * float(layer.spectrum.diagonal().mean())
    dense = hadamard(layer.error, blocks=layer.block)
    damped = layer.spectrum + added * torch.eye(layer.n, dtype=torch.float64)
    values = layer.dense(found)
    for row in range(layer.m):
        own = found.kept[row]
        expected = torch.linalg.solve(damped[own][:, own], (damped @ dense[row])[own])
        assert torch.allclose(values[row][own], expected, atol=1e-8 * float(expected.abs().max()))
    if not damping:
        row = int(found.kept.sum(1).argmax())
        own = found.kept[row]
        solved = torch.linalg.lstsq(layer.dictionary[:, own], layer.root @ layer.error[row]).solution
        assert torch.allclose(values[row][own], solved, atol=1e-7 * float(solved.abs().max()))


@pytest.mark.parametrize("budget", [1, 3, 10])
def test_refined_is_never_worse_than_cut(layer, budget):
    dense = hadamard(layer.error, blocks=layer.block)
    kept = layer.correct(budget * layer.m).kept
    cut = fit(dense, layer.spectrum, kept, refine=False)
    refined = fit(dense, layer.spectrum, kept)
    assert bool((refined.errors <= cut.errors * (1 + 1e-9)).all())
    assert float(refined.errors.sum()) < float(cut.errors.sum())
    assert torch.equal(cut.values, dense[kept])


@pytest.mark.parametrize("refine", [False, True])
def test_reported_errors_are_those_of_the_outputs(layer, refine):
    found = layer.correct(4 * layer.m, refine=refine)
    before = float((layer.x @ layer.error.T).square().sum())
    after = float((layer.x @ (layer.error - layer.update(found)).T).square().sum())
    assert found.before == pytest.approx(before, rel=1e-9)
    assert found.after == pytest.approx(after, rel=1e-6)


def test_batches_do_not_change_values(layer, monkeypatch):
    whole = layer.correct(5 * layer.m)
    monkeypatch.setattr(correction, "_ELEMENTS", 40)
    parts = layer.correct(5 * layer.m)
    assert torch.equal(whole.kept, parts.kept)
    assert torch.allclose(whole.values, parts.values, atol=1e-9 * float(whole.values.abs().max()))


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize(("allocation", "selection"), VARIANTS)
def test_full_budget_is_the_full_weight(layer, refine, allocation, selection):
    found = layer.correct(layer.m * layer.n, refine=refine, allocation=allocation, selection=selection)
    assert bool(found.kept.all())
    assert torch.allclose(layer.rounded + layer.update(found), layer.weight, atol=1e-8)
    assert found.after <= 1e-14 * found.before


def test_error_falls_with_the_budget(layer):
    errors = [layer.correct(count * layer.m).after for count in range(layer.n // 2)]
    assert all(b <= a for a, b in itertools.pairwise(errors))
    assert errors[0] == pytest.approx(layer.correct(0).before)


def test_inputs_that_depend_on_one_another():
    """A Gram matrix of rank 5 with 32 inputs: solvable by damping, and by a little of it where none is asked for."""
    layer = Layer(tokens=300)
    low = layer.x[:, :5] @ torch.randn(5, layer.n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gram = spectral_gram(low.T @ low, layer.block)
    for damping in (0.0, 1e-4):
        found = sparse_correction(layer.error, gram, 10 * layer.m, layer.block, damping=damping)
        assert bool(torch.isfinite(found.values).all())
        assert found.unsolved == 0
        assert found.after < 1e-3 * found.before


def test_a_weight_that_was_not_changed_needs_no_repair():
    layer = Layer()
    layer.error = torch.zeros_like(layer.error)
    found = layer.correct(50)
    assert int(found.kept.sum()) == 50
    assert not found.values.any()
    assert found.before == found.after == 0


def test_nan_is_refused():
    layer = Layer()
    layer.error[3, 4] = float("nan")
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        layer.correct(50)


# -- what it is worth --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("allocation", "selection"), VARIANTS)
def test_better_than_the_best_low_rank_update_of_equal_size(allocation, selection):
    """48 x 64 at 2 bits in groups of 16, budget of rank 8, correlated inputs; errors relative to the rounding's."""
    found = []
    for seed in range(5):
        layer = Layer(48, 64, seed, tokens=512, decay=0.75)
        options = {"allocation": allocation, "selection": selection}
        cut, refined = (
            layer.output_error(layer.update(layer.correct(8 * (48 + 64), refine=refine, **options)))
            for refine in (False, True)
        )
        u, s, v = torch.linalg.svd(layer.error @ layer.root.T, full_matrices=False)
        best = torch.linalg.solve(layer.root, (u[:, :8] * s[:8] @ v[:8]).T).T
        found.append((cut, refined, layer.output_error(best)))
        assert refined < found[-1][2]
    # The card's example: 0.46 cut, 0.24 refined, 0.39 for the best LoRA.
    assert torch.tensor(found).mean(0).tolist() == pytest.approx([0.46, 0.24, 0.39], abs=0.03)


def test_f_has_full_rank_where_low_rank_has_eight():
    layer = Layer(48, 64, tokens=512, decay=0.75)
    found = layer.correct(8 * (48 + 64))
    assert torch.linalg.matrix_rank(layer.dense(found)) == 48
