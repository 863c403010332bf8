"""Break-even: what the table says, what a measurement does, and that neither changes a result that nobody asked for."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import pytest
import torch

import hf_accel
from hf_accel.attention.call import AttentionCall
from hf_accel.config import setting
from hf_accel.facts import Facts
from hf_accel.sites.attention import break_even
from hf_accel.sites.attention.base import AttentionMethod, AttentionRunner, SparseAttentionConfig
from hf_accel.sites.attention.break_even import Shape, look_up
from hf_accel.testing.models import tiny

HERE = torch.device("cpu")
GRID_TOKENS = 48  # of the tiny Wan at its default size: 3 x 4 x 4


def row(tokens, budget, ratio, **changes):
    return {
        "method": "svg2", "budget": budget, "settings": {"top_p": budget, "num_k_centroids": 1000}, "tokens": tokens,
        "heads": 12, "head_dim": 128, "dtype": "bfloat16", "density": budget, "ratio": ratio, "relative_error": 0.1,
    } | changes  # fmt: skip


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """``shipped(rows, device)`` puts a table in place of the package's."""

    def put(rows, device="a measured device"):
        file = tmp_path / "table.json"
        file.write_text(json.dumps({"schema": 1, "devices": {device: {"machine": {}, "rows": rows}}}))
        monkeypatch.setattr(break_even, "TABLE", file)
        break_even.table.cache_clear()

    yield put
    break_even.table.cache_clear()


def ask(tokens, top_p, head_dim=128, dtype="bfloat16", device="a measured device", **settings):
    shape = Shape(device, tokens, head_dim, dtype)
    return look_up("svg2", {"top_p": top_p, "num_k_centroids": 1000, **settings}, "top_p", shape)


def test_the_shipped_table_can_be_read_and_every_row_is_whole():
    table = break_even.table()
    assert table["schema"] == break_even.SCHEMA
    for device in table["devices"].values():
        assert device["machine"]
        for entry in device["rows"]:
            assert set(entry) >= set(row(1, 0.5, 1.0))
            assert entry["ratio"] > 0


def test_time_is_linear_in_the_budget_and_in_the_logarithm_of_the_length(shipped):
    # Costs (1 / ratio) at 1024 tokens: 0.5 and 1.0; at 4096 tokens: 0.25 and 0.5.
    shipped([row(1024, 0.2, 2.0), row(1024, 0.6, 1.0), row(4096, 0.2, 4.0), row(4096, 0.6, 2.0)])
    assert ask(1024, 0.2).ratio == pytest.approx(2.0)
    assert ask(1024, 0.4).ratio == pytest.approx(1 / 0.75)
    assert ask(2048, 0.2).ratio == pytest.approx(1 / 0.375)
    assert ask(4096, 0.6).ratio == pytest.approx(2.0)
    assert not ask(1024, 0.2).slower


def test_slower_is_said_in_words(shipped):
    shipped([row(2304, 0.5, 0.8)])
    verdict = ask(2304, 0.5)
    assert verdict.slower
    assert verdict.words == "svg2 is 0.80x dense at 2304 tokens (table, top_p=0.5): slower"
    assert "measured with num_k_centroids=1000" in ask(2304, 0.5, num_k_centroids=64).words


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ({"tokens": 2048, "top_p": 0.3, "device": "another"}, r"not measured on this device \(another\)"),
        ({"tokens": 2048, "top_p": 0.3, "dtype": "float32"}, "not measured on this device in float32"),
        ({"tokens": 2048, "top_p": 0.9}, "not measured at top_p=0.9"),
        ({"tokens": 9000, "top_p": 0.3}, "measured only between 1024 and 4096 tokens"),
    ],
)
def test_nothing_is_extrapolated(shipped, question, words):
    shipped([row(tokens, budget, 2.0) for tokens in (1024, 4096) for budget in (0.2, 0.6)])
    assert ask(2048, 0.3).ratio == pytest.approx(2.0)
    verdict = ask(**question)
    assert verdict.ratio is None
    assert not verdict.slower
    assert re.search(words, verdict.words)


def test_the_nearest_head_dim_answers(shipped):
    shipped([row(1024, 0.5, 3.0), row(1024, 0.5, 0.5, head_dim=32)])
    assert ask(1024, 0.5, head_dim=40).ratio == pytest.approx(0.5)
    assert ask(1024, 0.5, head_dim=96).ratio == pytest.approx(3.0)


def test_a_budget_that_is_no_number_must_be_equal(shipped):
    shipped([row(1024, "X", 1.5, settings={"variant": "X"}), row(1024, "B", 4.0, settings={"variant": "B"})])
    shape = Shape("a measured device", 1024, 128, "bfloat16")
    assert look_up("svg2", {"variant": "B"}, "variant", shape).ratio == pytest.approx(4.0)
    assert look_up("svg2", {"variant": "C"}, "variant", shape).ratio is None


def test_without_a_budget_the_settings_must_be_equal(shipped):
    shipped([row(1024, None, 1.5, settings={"variant": "X", "dense_steps": 0})])
    shape = Shape("a measured device", 1024, 128, "bfloat16")
    assert look_up("svg2", {"variant": "X", "dense_steps": 5}, None, shape).ratio == pytest.approx(1.5)
    assert look_up("svg2", {"variant": "B", "dense_steps": 0}, None, shape).words.endswith(
        "not measured at these settings"
    )


# -- in a model ----------------------------------------------------------------------------------------------------

QUICK = {"kmeans_iter_init": 2, "num_q_centroids": 6, "num_k_centroids": 9, "dense_steps": 0, "dense_layers": 0}


@torch.no_grad()
def denoise(model):
    return [tiny.run(model, "wan", timestep=t) for t in (900.0, 600.0, 300.0)]


def run_with(model, **settings):
    with hf_accel.apply(model, "svg2", **QUICK, **settings) as applied:
        out = denoise(model)
        return out, applied.report().entries[0]


def here(budget, ratio):
    """Rows about the tiny Wan on this machine."""
    return [row(GRID_TOKENS, budget, ratio, head_dim=16, dtype="float32")]


def test_a_slow_shape_is_noted_once_and_kept(shipped):
    model = tiny.build("wan")
    shipped([], "another")
    plain, entry = run_with(model, top_p=0.5)
    assert entry.run.break_even == [
        f"svg2 against dense at 48 tokens: not measured on this device ({break_even.device_name(HERE)})"
    ]
    shipped(here(0.5, 0.8), break_even.device_name(HERE))
    ours, entry = run_with(model, top_p=0.5)
    assert len(entry.run.break_even) == 1
    assert "svg2 is 0.80x dense at 48 tokens" in str(entry)
    assert entry.run.sparse_calls == 6
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_a_slow_shape_runs_dense_where_the_user_wants_it(shipped):
    model = tiny.build("wan")
    dense = denoise(model)
    shipped(here(0.5, 0.8), break_even.device_name(HERE))
    ours, entry = run_with(model, top_p=0.5, on_slow="dense")
    assert entry.run.sparse_calls == 0
    assert entry.run.dense_calls == {"slower than dense at this shape (on_slow)": 6}
    assert all(torch.equal(a, b) for a, b in zip(ours, dense, strict=True))
    shipped(here(0.5, 1.2), break_even.device_name(HERE))
    _, entry = run_with(model, top_p=0.5, on_slow="dense")
    assert entry.run.sparse_calls == 6
    _, entry = run_with(model, top_p=0.5, on_slow="dense", break_even="off")
    assert entry.run.break_even == []


def test_measuring_changes_neither_results_nor_state(shipped):
    model = tiny.build("wan")
    plain, _ = run_with(model, top_p=0.5, break_even="off")
    ours, entry = run_with(model, top_p=0.5, break_even="measure")
    assert len(entry.run.break_even) == 1
    assert "measured here" in entry.run.break_even[0]
    assert entry.run.sparse_calls == 6
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@dataclass(frozen=True)
class CountingConfig(SparseAttentionConfig):
    METHOD = "counting"

    cost: int = setting(1, "how often dense attention runs for one call", ge=1)


class Counting(AttentionMethod):
    """Counts on its state and on the class of work it did."""

    name, paper, summary = "counting", "none", "a test"
    facts = Facts(site="attention")
    Config = CountingConfig

    def __init__(self, config):
        super().__init__(config)
        self.states: list[list[int]] = []

    def new_state(self):
        self.states.append([0])
        return self.states[-1]

    def attend(self, call, state):
        state[0] += 1
        call.record_density(torch.ones(call.query.shape[:2]))
        for _ in range(self.config.cost):
            out = call.dense()
        return out


def call_of(tokens=64, grad=False) -> AttentionCall:
    from hf_accel.attention.call import Layer, Step

    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, tokens, 16, generator=generator).requires_grad_(grad) for _ in range(3))

    def dense():
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    step = Step(1, 4, 500.0, 0.25, "cond", 0)
    return AttentionCall(query, key, value, None, 0.25, False, Layer("a", 0, 1), None, step, dense)


def test_a_measurement_uses_a_state_of_its_own_once_per_shape():
    method = Counting(CountingConfig(break_even="measure"))
    runner = AttentionRunner(method)
    calls = [call_of(), call_of(), call_of(96)]
    for call in calls:
        runner.attend(call)
    # Trials: one untimed call and three timed ones, per shape; the real states, also one per shape, count real calls.
    assert sorted(state[0] for state in method.states) == [1, 2, 4, 4]
    assert ["break_even" in call.notes for call in calls] == [True, False, True]
    assert all("density" in call.notes for call in calls)


def test_a_measured_slow_method_gives_way_to_dense(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(break_even.time, "perf_counter", lambda: clock[0])

    def spend(seconds):
        clock[0] += seconds

    assert break_even.measure(lambda: spend(3.0), lambda: spend(1.5), HERE) == pytest.approx(2.0)

    for cost, slower in ((2, True), (1, False)):
        method = Counting(CountingConfig(cost=cost, break_even="measure", on_slow="dense"))
        call = call_of()
        plain = call.dense

        def dense(plain=plain):
            spend(1.0)
            return plain()

        call.dense = dense
        out = AttentionRunner(method).attend(call)
        assert (call.notes.get("fallback") == "slower than dense at this shape (on_slow)") == slower
        assert ("is 0.50x dense at 64 tokens" in call.notes["break_even"]) == slower
        assert torch.equal(out, plain())


def test_measuring_keeps_gradients():
    method = Counting(CountingConfig(break_even="measure"))
    call = call_of(grad=True)
    AttentionRunner(method).attend(call).sum().backward()
    assert call.query.grad is not None
    assert call.query.grad.abs().sum() > 0


def test_bad_settings_are_refused_in_words():
    with pytest.raises(hf_accel.errors.InvalidSetting, match="'table', 'measure', 'off'"):
        CountingConfig(break_even="maybe")
