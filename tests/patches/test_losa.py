"""losa and quest: the identities of the papers' algorithms, on calls made by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from hf_accel.attention.call import Layer
from hf_accel.errors import InvalidSetting
from hf_accel.patches.losa import LoSA, LoSAConfig
from hf_accel.patches.quest import Quest, QuestConfig
from hf_accel.sites.prefix_attention.base import PrefixRunner
from hf_accel.sites.prefix_attention.call import PrefixCall
from hf_accel.sites.prefix_attention.pages import PageBounds

B, HQ, HKV, BLOCK, P, D, PAGE = 2, 4, 2, 8, 70, 16, 8


def losa(**settings) -> LoSA:
    return LoSA(LoSAConfig(**{"min_prefix": 0, "page_size": PAGE, "budget": 2 * PAGE, "k_act": 3, **settings}))


def quest(**settings) -> Quest:
    return Quest(QuestConfig(**{"min_prefix": 0, "page_size": PAGE, "budget": 2 * PAGE, **settings}))


class Scene:
    """A prefix and a few steps of a block, in some of which a few rows move."""

    def __init__(self, seed=0, *, heads=(HQ, HKV), prefix=P, block=BLOCK, padding=None, moving=2, rows=B):
        self.random = torch.Generator().manual_seed(seed)
        self.heads, self.block, self.rows, self.moving = heads, block, rows, moving
        self.key, self.value = self.normal(rows, heads[1], prefix, D), self.normal(rows, heads[1], prefix, D)
        self.valid = None
        if padding is not None:
            self.valid = torch.arange(prefix) >= torch.tensor(padding)[:, None]
            self.key[~self.valid[:, None].expand(-1, heads[1], -1)] = float("nan")
            self.value[~self.valid[:, None].expand(-1, heads[1], -1)] = float("nan")
        self.query = 2 * self.normal(rows, heads[0], block, D)
        self.generation = self.number = 0

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.random)

    def call(self, index, *, layer=0, changed=None, move=True):
        """The next step; ``move`` lets some rows of the query jump and all others tremble."""
        if index and move:
            jump = torch.rand(self.rows, self.block, generator=self.random).topk(self.moving, 1).indices
            size = torch.full((self.rows, self.block), 0.01).scatter(1, jump, 1.5)
            self.query = self.query + size[:, None, :, None] * self.normal(*self.query.shape)
        return PrefixCall(
            query=self.query,
            key=self.normal(self.rows, self.heads[1], self.block, D),
            value=self.normal(self.rows, self.heads[1], self.block, D),
            prefix_key=self.key,
            prefix_value=self.value,
            prefix_valid=self.valid,
            block_mask=None,
            scale=D**-0.5,
            layer=Layer("attention", layer, 4),
            index=index,
            changed=changed,
            most_changed=int(changed.sum(1).max()) if changed is not None else 0,
            dense=lambda: pytest.fail("the model's own attention was asked"),
            generation=self.generation,
            block=self.number,
        )

    def grow(self, tokens):
        self.key = torch.cat([self.key, self.normal(self.rows, self.heads[1], tokens, D)], 2)
        self.value = torch.cat([self.value, self.normal(self.rows, self.heads[1], tokens, D)], 2)
        if self.valid is not None:
            self.valid = torch.cat([self.valid, torch.ones(self.rows, tokens, dtype=torch.bool)], 1)
        self.query = 2 * self.normal(*self.query.shape)
        self.number += 1


def attend(method, call, state):
    """As the runner does for a request of which this method is all."""
    if not hasattr(method, "of_request"):
        method.of_request = method.new_request_state()
    call.request_state = method.of_request
    return method.attend(call, state)


def oracle(call, pages=None):
    """Dense attention in fp64 over [prefix, block]; with ``pages`` bool ``[B, Hkv, n]`` only over those of the prefix.
    Returns the output and (output, log-sum-exp) of the prefix alone."""
    group = call.query.shape[1] // call.key.shape[1]
    wide = [x.double().nan_to_num().repeat_interleave(group, 1) for x in (call.prefix_key, call.prefix_value)]
    seen = torch.ones(call.query.shape[0], call.query.shape[1], 1, call.prefix, dtype=torch.bool)
    if call.prefix_valid is not None:
        seen = seen & call.prefix_valid[:, None, None]
    if pages is not None:
        seen = seen & pages.repeat_interleave(PAGE, -1)[..., : call.prefix].repeat_interleave(group, 1)[:, :, None]
    front = (call.query.double() @ wide[0].mT * call.scale).masked_fill(~seen, -math.inf)
    back = call.query.double() @ call.key.double().repeat_interleave(group, 1).mT * call.scale
    both = torch.cat([wide[1], call.value.double().repeat_interleave(group, 1)], 2)
    return torch.cat([front, back], -1).softmax(-1) @ both, (front.softmax(-1) @ wide[1], front.logsumexp(-1))


def union(call, rows, count):
    """Pages that rows ``[B, A]`` pick, by the definition: bool ``[B, Hkv, n]``."""
    out = torch.zeros(*call.key.shape[:2], -(-call.prefix // PAGE), dtype=torch.bool)
    group = call.query.shape[1] // call.key.shape[1]
    for b in range(out.shape[0]):
        for h in range(call.query.shape[1]):
            for row in rows[b].tolist():
                scores = []
                for j in range(out.shape[2]):
                    keys = call.prefix_key[b, h // group, j * PAGE : (j + 1) * PAGE]
                    if call.prefix_valid is not None:
                        keys = keys[call.prefix_valid[b, j * PAGE : (j + 1) * PAGE]]
                    q = call.query[b, h, row]
                    bound = torch.maximum(q * keys.amin(0), q * keys.amax(0)).sum() if len(keys) else None
                    scores.append(-math.inf if bound is None else float(bound))
                best = sorted(range(len(scores)), key=lambda j: -scores[j])[:count]
                out[b, h // group, [j for j in best if scores[j] > -math.inf]] = True
    return out


def merged(call, out, lse):
    """fp64 merge of a prefix part with the block's attention to itself."""
    group = call.query.shape[1] // call.key.shape[1]
    logits = call.query.double() @ call.key.double().repeat_interleave(group, 1).mT * call.scale
    inside = logits.softmax(-1) @ call.value.double().repeat_interleave(group, 1)
    weight = torch.sigmoid(lse.double() - logits.logsumexp(-1))[..., None]
    return weight * out.double() + (1 - weight) * inside


def run(method, scene, steps=4, **more):
    runner, outputs = PrefixRunner(method).fork(), []
    for index in range(steps):
        call = scene.call(index, **more)
        outputs.append((call, runner.attend(call)))
    return outputs


def close(ours, theirs):
    torch.testing.assert_close(ours.double(), theirs.double(), atol=1e-5, rtol=1e-5)


SCENES = {
    "gqa": {},
    "mha": {"heads": (4, 4)},
    "mqa": {"heads": (4, 1)},
    "padded": {"padding": (0, 19)},
    "half a page": {"prefix": 5},
    "prime": {"prefix": 67, "block": 7},
    "no prefix": {"prefix": 0},
}


# -- identities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("reference", ["prev", "anchor"])
def test_full_budget_is_dense_at_every_step(name, reference):
    for method in (losa(**LoSA.facts.full_budget, reference=reference), quest(**Quest.facts.full_budget)):
        for call, out in run(method, Scene(1, **SCENES[name])):
            close(out, oracle(call)[0])


@pytest.mark.parametrize("name", SCENES)
def test_the_first_step_is_dense_at_any_settings(name):
    for method in (losa(budget=1, k_act=0), losa(budget=1, k_act=1), quest(budget=1)):
        (call, out), *_ = run(method, Scene(2, **SCENES[name]), 1)
        close(out, oracle(call)[0])


@pytest.mark.parametrize("name", ["gqa", "mha", "mqa", "padded", "prime"])
@pytest.mark.parametrize("reference", ["prev", "anchor"])
def test_losa_is_its_definition(name, reference):
    """Every step against fp64 code that shares nothing with the method but the paper."""
    scene, method = Scene(3, **SCENES[name]), losa(reference=reference)
    runner, kept, before = PrefixRunner(method).fork(), None, None
    for index in range(5):
        call = scene.call(index)
        ours = runner.attend(call)
        if index == 0:
            kept, before = oracle(call)[1], call.query
        else:
            delta = (call.query - before).square().sum((1, 3))
            rows = delta.topk(3, 1).indices
            _, (out, lse) = oracle(call, union(call, rows, 2))
            active = torch.zeros_like(delta, dtype=torch.bool).scatter(1, rows, True)[:, None, :]
            kept = torch.where(active[..., None], out, kept[0]), torch.where(active, lse, kept[1])
            before = torch.where(active[..., None], call.query, before) if reference == "anchor" else call.query
        close(ours, merged(call, *kept))


@pytest.mark.parametrize("name", ["gqa", "padded"])
def test_quest_is_its_definition(name):
    for call, out in run(quest(dense_first=False), Scene(4, **SCENES[name])):
        rows = torch.arange(BLOCK).expand(B, -1)
        close(out, oracle(call, union(call, rows, 2))[0])


@pytest.mark.parametrize("active", [1.0, BLOCK, 10**6])
def test_losa_with_all_tokens_active_is_quest(active):
    for (_, ours), (_, theirs) in zip(run(losa(k_act=active), Scene(5)), run(quest(), Scene(5)), strict=True):
        assert torch.equal(ours, theirs)


def test_nothing_active_and_nothing_moved_is_the_step_before():
    scene, runner = Scene(6), PrefixRunner(losa(k_act=0)).fork()
    first = scene.call(0)
    again = scene.call(1, move=False)
    again.key, again.value = first.key, first.value
    assert torch.equal(runner.attend(first), runner.attend(again))
    assert (again.notes["density"], again.notes["active"], again.notes["pages"]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("reference", ["prev", "anchor"])
def test_stable_rows_keep_their_bits(reference):
    scene, method = Scene(7), losa(reference=reference)
    state = method.new_state()
    attend(method, scene.call(0), state)
    for index in range(1, 4):
        out, lse, before = state.part.out.clone(), state.part.lse.clone(), state.part.reference
        call = scene.call(index)
        attend(method, call, state)
        rows = (call.query - before).square().sum((1, 3)).topk(3, 1).indices
        stable = torch.ones(B, BLOCK, dtype=torch.bool).scatter(1, rows, False)[:, None, :].expand(-1, HQ, -1)
        assert torch.equal(state.part.out[stable], out[stable])
        assert torch.equal(state.part.lse[stable], lse[stable])
        assert not (state.part.lse == lse)[~stable].any()


def test_prev_forgets_a_slow_drift_and_anchor_does_not():
    """One row creeps, another jumps to and fro a little farther than one step of the creeping."""
    creeping, jumping = 2, 5
    refreshed = {}
    for reference in ("prev", "anchor"):
        scene, method = Scene(8, rows=1), losa(k_act=1, reference=reference)
        state, start, way = method.new_state(), scene.query, scene.normal(HQ, D)
        for index in range(6):
            scene.query = start.clone()
            scene.query[:, :, creeping] += 0.1 * index * way
            scene.query[:, :, jumping] += 0.15 * (index % 2) * way
            before = state.part.lse if index else None
            attend(method, scene.call(index, move=False), state)
            if index:
                changed = (state.part.lse != before).any(1)[0].nonzero().flatten().tolist()
                refreshed.setdefault(reference, set()).update(changed)
    assert refreshed == {"prev": {jumping}, "anchor": {creeping, jumping}}


# -- active tokens -------------------------------------------------------------------------------------------------


def test_changed_tokens_are_active_though_their_queries_rest():
    changed = torch.zeros(B, BLOCK, dtype=torch.bool)
    changed[0, [0, 3, 4, 6]] = True  # more than k_act
    changed[1, 7] = True
    for force, expected in ((True, 4), (False, 3)):
        scene, method = Scene(9), losa(force_changed=force)
        state = method.new_state()
        attend(method, scene.call(0), state)
        before = state.part.lse
        call = scene.call(1, changed=changed)
        attend(method, call, state)
        renewed = (state.part.lse != before).any(1)
        assert call.notes["active"] == expected / BLOCK
        assert renewed.sum(1).tolist() == [expected, expected]
        assert bool((renewed | ~changed).all()) is force


@pytest.mark.parametrize(
    ("k_act", "expected"), [(0, 0), (1, 1), (5, 5), (99, 16), (0.3, 5), (0.5, 8), (1.0, 16), (0.0, 0)]
)
def test_active_tokens_by_count_and_by_share(k_act, expected):
    scene = Scene(10, block=16)
    (_, _), (call, _) = run(losa(k_act=k_act), scene, 2)
    assert call.notes["active"] == expected / 16


# -- budgets and statistics ----------------------------------------------------------------------------------------


def mean_error(**settings):
    """Over scenes and later steps, relative to dense."""
    errors = []
    for seed in range(8):
        for call, out in run(losa(**settings), Scene(seed, prefix=96, moving=3), 5)[1:]:
            dense = oracle(call)[0]
            errors.append(float((out - dense).norm() / dense.norm()))
    return sum(errors) / len(errors)


def test_error_falls_as_the_budget_rises():
    errors = [mean_error(budget=pages * PAGE, k_act=3) for pages in (1, 3, 6, 12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.7 * errors[0]


def test_error_falls_as_more_tokens_are_active():
    errors = [mean_error(budget=10 * PAGE, k_act=k) for k in (0, 1, 3, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.3 * errors[0]


def test_density_and_pages_are_those_of_the_union():
    scene = Scene(11, padding=(0, 19))
    before = scene.query
    (_, _), (call, _) = run(losa(), scene, 2)
    rows = (call.query - before).square().sum((1, 3)).topk(3, 1).indices
    chosen = union(call, rows, 2).sum(-1).double()
    assert math.isclose(float(call.notes["pages"]), float(chosen.mean()), rel_tol=1e-6)
    keys = torch.tensor([P, P - 19])[:, None]
    assert math.isclose(float(call.notes["density"]), float((chosen * PAGE / keys).clamp(max=1).mean()), rel_tol=1e-6)
    assert int(chosen.max()) <= 3 * (HQ // HKV) * 2


def test_fewer_active_tokens_read_fewer_pages():
    pages = [float(run(losa(k_act=k), Scene(12, prefix=200), 2)[1][0].notes["pages"]) for k in (1, 2, 4, 8)]
    assert pages == sorted(set(pages))


# -- what is kept, and when it is void -----------------------------------------------------------------------------


def fresh_bounds(call):
    bounds = PageBounds.empty(call.prefix_key, PAGE)
    bounds.bound(call.prefix_key, call.prefix_valid)
    return bounds


@pytest.mark.parametrize("padding", [None, (0, 19)])
@pytest.mark.parametrize("added", [1, 3, 8, 21, 400])
def test_bounds_grow_by_what_a_commit_added(padding, added, monkeypatch):
    import hf_accel.sites.prefix_attention.pages as module

    firsts, whole = [], module.page_minmax_into
    monkeypatch.setattr(module, "page_minmax_into", lambda *a, **k: (firsts.append(a[4]), whole(*a, **k)))
    scene, method = Scene(13, padding=padding), losa()
    runner = PrefixRunner(method).fork()
    for _ in range(3):
        runner.reset()
        for index in range(3):
            call = scene.call(index)
            runner.attend(call)
        ours, theirs = call.request_state.bounds(call), fresh_bounds(call)
        for a, b in zip(ours.filled(), theirs.filled(), strict=True):
            assert torch.equal(a, b)
        assert (ours.visible is None and theirs.visible is None) or torch.equal(ours.visible, theirs.visible)
        firsts.pop()  # that of the fresh ones
        scene.grow(added)
    assert firsts == [0, P // PAGE, (P + added) // PAGE]


def void(what, scene):
    """Make what a method keeps of the prefix void, in one of the ways there are."""
    if what == "other request":
        scene.generation += 1
        scene.key, scene.value = scene.normal(*scene.key.shape), scene.normal(*scene.value.shape)
        scene.grow(30)
    elif what == "same length":
        scene.key, scene.value = scene.normal(*scene.key.shape), scene.normal(*scene.value.shape)
    elif what == "crop":
        scene.key, scene.value = scene.normal(*scene.key.shape)[:, :, :44], scene.value[:, :, :44]
    elif what == "rows swapped":
        scene.key, scene.value, scene.query = (x.flip(0) for x in (scene.key, scene.value, scene.query))
    elif what == "rows dropped":
        scene.generation += 1
        scene.rows = 1
        scene.key, scene.value, scene.query = (x[1:] for x in (scene.key, scene.value, scene.query))
    elif what == "dtype":
        scene.key, scene.value, scene.query = (x.half().float() for x in (scene.key, scene.value, scene.query))


@pytest.mark.parametrize("what", ["other request", "same length", "crop", "rows swapped", "rows dropped", "dtype"])
@pytest.mark.parametrize("make", [losa, quest])
def test_nothing_leaks_into_another_block(make, what):
    used, new, outputs = PrefixRunner(make()).fork(), PrefixRunner(make()).fork(), []
    for runner in (used, new):
        scene = Scene(14)
        calls = [scene.call(index) for index in range(3)]
        if runner is used:
            for call in calls:
                runner.attend(call)
        void(what, scene)
        scene.number += 1
        runner.reset()
        outputs.append([runner.attend(scene.call(index)) for index in range(3)])
    for ours, theirs in zip(*outputs, strict=True):
        assert torch.equal(ours, theirs)


def test_a_missed_step_starts_anew():
    scene, runner = Scene(15), PrefixRunner(losa(budget=1, k_act=1)).fork()
    runner.attend(scene.call(0))
    scene.call(1)  # computed by the model's own code
    call = scene.call(2)
    close(runner.attend(call), oracle(call)[0])
    assert call.notes["density"] == 1.0


def test_another_prefix_length_without_a_reset_starts_anew():
    scene, method = Scene(16), losa(budget=1, k_act=1)
    state = method.new_state()
    attend(method, scene.call(0), state)
    scene.grow(8)
    call = scene.call(1)
    close(attend(method, call, state), oracle(call)[0])


def test_layers_do_not_share():
    together, apart = PrefixRunner(losa()).fork(), {}
    scenes = {layer: Scene(17 + layer) for layer in range(3)}
    ours = {layer: [] for layer in scenes}
    for index in range(3):
        for layer, scene in scenes.items():
            ours[layer].append(together.attend(scene.call(index, layer=layer)))
    for layer in scenes:
        apart[layer] = [out for _, out in run(losa(), Scene(17 + layer), 3, layer=layer)]
        assert all(torch.equal(a, b) for a, b in zip(ours[layer], apart[layer], strict=True))


def test_a_copy_keeps_nothing():
    method = losa()
    run(method, Scene(18))
    twin = copy.deepcopy(method)
    for (_, ours), (_, theirs) in zip(run(twin, Scene(19)), run(losa(), Scene(19)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("reference", ["prev", "anchor"])
def test_steps_in_and_out_of_inference_mode(reference):
    expected = [out for _, out in run(losa(reference=reference), Scene(20), 5)]
    scene, runner, ours = Scene(20), PrefixRunner(losa(reference=reference)).fork(), []
    for index in range(5):
        with torch.inference_mode(index in (0, 1, 3)):
            ours.append(runner.attend(scene.call(index)).clone())
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


# -- gates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("closed", "opened"),
    [
        ({"min_prefix": P}, {"min_prefix": P - 1}),
        ({"dense_layers": 2}, {"dense_layers": 1}),
        ({"dense_layers": 0.5}, {"dense_layers": 0.25}),
    ],
)
@pytest.mark.parametrize("make", [losa, quest])
def test_gates_run_exact(make, closed, opened):
    """On the second of four layers."""
    for call, out in run(make(budget=1, **closed), Scene(21), layer=1):
        close(out, oracle(call)[0])
        assert call.notes["density"] == 1.0
        assert next(iter(closed)) in call.notes["exact"]
    (_, _), (call, _) = run(make(budget=1, **opened), Scene(21), 2, layer=1)
    assert call.notes["density"] < 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": 0}, "int >= 1"),
        ({"k_act": -1}, "a count .* or a fraction"),
        ({"k_act": 1.5}, "a count .* or a fraction"),
        ({"page_size": 12}, "one of 8, 16"),
        ({"reference": "first"}, "'prev', 'anchor'"),
        ({"min_prefix": -5}, ">= 0"),
        ({"sparsity": 0.9}, "one of .*budget"),
    ],
)
def test_settings_out_of_range_are_refused_in_words(settings, words):
    with pytest.raises(InvalidSetting, match=words):
        LoSAConfig.build(settings)
