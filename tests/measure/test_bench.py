"""The attention benchmark and what it is made of: budget search, replay, synthetic tokens, timing, Pareto picture."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch

from hf_accel import registry
from hf_accel.attention.call import TokenGrid
from hf_accel.cli import main
from hf_accel.config import Config, setting
from hf_accel.errors import HFAccelError, InvalidSetting, NotApplicable, UnknownMethod
from hf_accel.facts import Facts
from hf_accel.measure import bench
from hf_accel.measure.budget import TRIES, Dial
from hf_accel.measure.pareto import Point, draw, front
from hf_accel.measure.recording import density_on, record_attention
from hf_accel.measure.synthetic import video_tokens
from hf_accel.measure.timing import in_turn
from hf_accel.testing.models import tiny

CPU = torch.device("cpu")
SVG2 = {"num_q_centroids": 6, "num_k_centroids": 12, "kmeans_iter_init": 3, "min_kc_ratio": 0.0}


# -- budget search -------------------------------------------------------------------------------------------------


def method_with(kind, default, **rules):
    """A stand-in for a method with one setting, ``amount``."""
    namespace = {"__annotations__": {"amount": kind}, "amount": setting(default, "of something", **rules)}
    config = dataclass(frozen=True)(type("AmountConfig", (Config,), namespace | {"METHOD": "amount"}))
    return type("Amount", (), {"name": "amount", "facts": Facts(site="attention", budget="amount"), "Config": config})


@pytest.mark.parametrize(
    ("method", "density_of"),
    [
        (method_with(float, 0.5, gt=0, le=1), lambda x: x**3),
        (method_with(float, 0.5, gt=0, le=1), lambda x: 1 - x**2),  # falls
        (method_with(float, 1.0, gt=0), lambda x: 1 / (1 + x)),  # no upper bound
        (method_with(float, 1.0, ge=0), lambda x: x / (50 + x)),
        (method_with(int, 1, ge=0), lambda x: min(1.0, x / 700)),
    ],
    ids=["cube", "falls", "unbounded", "from-zero", "whole"],
)
def test_a_density_is_found_along_the_budget(method, density_of):
    seen = []

    def measure(settings):
        assert settings["other"] == 7
        seen.append(settings["amount"])
        return density_of(settings["amount"])

    dial = Dial(method, measure, {"other": 7})
    for wanted in (0.5, 0.3, 0.15):
        reached = dial.reach(wanted)
        assert reached.near(wanted), (reached, seen)
        assert reached.density == density_of(reached.settings["amount"])
        assert reached.tries <= TRIES
        assert type(reached.settings["amount"]) is (int if isinstance(seen[-1], int) else float)
    assert len(seen) == len(set(seen))  # nothing is measured twice


def test_the_nearest_is_reported_where_a_density_is_out_of_reach():
    dial = Dial(method_with(float, 0.5, gt=0, le=1), lambda s: 0.4 + 0.6 * s["amount"], {})
    reached = dial.reach(0.15)
    assert reached.density == pytest.approx(0.4, abs=0.01)
    assert not reached.near(0.15)
    choice = method_with(str, "a", choices=("a", "b", "c"))
    dial = Dial(choice, lambda s: {"a": 0.9, "b": 0.35, "c": 0.1}[s["amount"]], {})
    assert dial.reach(0.3).settings == {"amount": "b"}
    steps = Dial(method_with(int, 1, ge=0, le=3), lambda s: s["amount"] / 3, {})
    assert steps.reach(0.5).settings["amount"] in (1, 2)


def test_a_method_without_a_budget_is_measured_once_as_it_is():
    fixed = method_with(float, 0.5, gt=0, le=1)
    fixed.facts = Facts(site="attention")
    reached = Dial(fixed, lambda s: 0.7, {"other": 1}).reach(0.3)
    assert (reached.settings, reached.density, reached.tries) == ({"other": 1}, 0.7, 1)


def test_budgets_that_methods_declare_are_settings_of_theirs():
    for cls in registry.methods().values():
        if cls.facts.budget is not None:
            assert cls.facts.budget in cls.Config().to_dict()["settings"]


# -- recording and replay ------------------------------------------------------------------------------------------


def test_recorded_calls_are_those_of_the_run_and_the_model_is_left_alone():
    model = tiny.build("wan")
    before = set(model.__dict__)
    plain = [tiny.run(model, "wan", timestep=t) for t in (900.0, 600.0, 300.0)]
    outputs = []

    def run():
        for timestep in (900.0, 600.0, 300.0):
            outputs.append(tiny.run(model, "wan", timestep=timestep))

    calls = record_attention(model, run, steps=[0, 2])
    assert all(torch.equal(a, b) for a, b in zip(outputs, plain, strict=True))
    assert set(model.__dict__) == before
    assert not model._forward_pre_hooks
    assert [(call.step.index, call.layer.index) for call in calls] == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert calls[0].query.shape == (1, 4, 48, 16)
    assert calls[0].grid == TokenGrid(3, 4, 4)

    cls = registry.get("svg2")
    measure = density_on(calls, cls)
    settings = {**SVG2, "dense_steps": 0, "dense_layers": 0}
    densities = [measure({**settings, "top_p": p}) for p in (0.2, 0.6, 1.0)]
    assert densities == sorted(densities)
    assert densities[0] < densities[2] == 1
    assert measure({**settings, "top_p": 0.2}) == densities[0]  # a replay leaves nothing behind
    reached = Dial(cls, measure, settings).reach(0.5)
    assert abs(reached.density - 0.5) < 0.1  # 48 tokens in 12 clusters are coarse


def test_recording_is_bounded_and_undone_after_a_failure():
    model = tiny.build("wan")
    one = 3 * 4 * 48 * 16 * 4
    calls = record_attention(model, lambda: tiny.run(model, "wan"), steps=[0], most_bytes=one + 1)
    assert len(calls) == 1

    def broken():
        raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        record_attention(model, broken, steps=[0])
    assert not model._forward_pre_hooks
    with pytest.raises(NotApplicable):
        record_attention(torch.nn.Linear(2, 2), broken, steps=[0])
    with pytest.raises(HFAccelError, match="there are none"):
        density_on([], registry.get("svg2"))(SVG2)


# -- synthetic tokens ----------------------------------------------------------------------------------------------


def test_synthetic_tokens_attend_to_their_neighbourhood_in_space_or_time():
    grid = (8, 8, 8)
    query, key, _ = video_tokens(grid, 2, 64, torch.Generator().manual_seed(0))
    again = video_tokens(grid, 2, 64, torch.Generator().manual_seed(0))[0]
    assert torch.equal(query, again)
    weights = (query @ key.mT / 8).softmax(-1)[0]
    token = torch.arange(512)
    other = token[:, None] != token
    same_frame = other & (token[:, None] // 64 == token // 64)
    same_place = other & (token[:, None] % 64 == token % 64)
    in_frame, along_time = ((weights * same).sum(-1).mean(-1) for same in (same_frame, same_place))
    # Chance is 63 and 7 of 512.
    assert in_frame[0] > 4 * in_frame[1]
    assert along_time[1] > 4 * along_time[0]


# -- timing and the picture ----------------------------------------------------------------------------------------


def test_parts_are_timed_in_turn_after_a_warm_up():
    order = []
    found = in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, rounds=3, warmup=2)
    assert order == ["a", "b"] * 5
    assert found["a"].rounds == 3
    assert found["a"].p20_ms <= found["a"].p50_ms <= found["a"].p80_ms


def test_the_front_is_what_nothing_beats_in_both():
    points = [Point("a", 1, 30), Point("a", 2, 20), Point("b", 1.5, 25), Point("b", 1.9, 19), Point("c", 0.5, 30)]
    assert [(p.x, p.y) for p in front(points)] == [(1, 30), (1.5, 25), (2, 20)]
    errors = [Point("a", 1, 0.1), Point("a", 2, 0.3), Point("b", 1.5, 0.4)]
    assert [(p.x, p.y) for p in front(errors, lower_y=True)] == [(1, 0.1), (2, 0.3)]


def test_the_picture_is_drawn(tmp_path):
    from PIL import Image

    file = tmp_path / "deep" / "pareto.png"
    draw(file, [Point("a", 1, 0.1), Point("a", 2, 0.3)], x="speed", y="error", lower_y=True, log_y=True)
    with Image.open(file) as picture:
        assert picture.width > 400
        assert len(picture.convert("L").getcolors()) > 10


# -- the benchmark -------------------------------------------------------------------------------------------------


def test_bench_attention_measures_quality_beside_time():
    found = bench.bench_attention(
        grid=(3, 8, 8), heads=2, head_dim=16, methods=["svg2", "dense"], densities=(0.5, 0.2), rounds=2,
        settings={"svg2": {**SVG2, "num_q_centroids": 12, "num_k_centroids": 24}},
    )  # fmt: skip
    sparse = [row for row in found.rows if row.method == "svg2"]
    assert [row.wanted for row in sparse] == [0.5, 0.2]
    for row in sparse:
        assert abs(row.density - row.wanted) < 0.1
        assert row.bound == pytest.approx(1 / row.density)
        assert row.ratio == pytest.approx(row.dense_ms.p50_ms / row.method_ms.p50_ms)
        assert row.settings["dense_steps"] == 0
    assert sparse[0].relative_l1 < sparse[1].relative_l1
    assert sparse[0].cosine > sparse[1].cosine
    dense = next(row for row in found.rows if row.method == "dense")  # no budget: one row
    assert dense.relative_l1 < 1e-5
    assert dense.cosine == pytest.approx(1, abs=1e-5)
    assert found.dense == "SDPA"
    assert str(found).count("svg2") == 2


def test_a_method_that_cannot_do_the_shape_says_why_and_the_others_run():
    found = bench.bench_attention(
        tokens=96, heads=1, head_dim=16, methods=["svg2", "dense"], densities=(0.5,), rounds=1
    )
    assert [row.method for row in found.rows] == ["dense"]
    assert found.skipped["svg2"] == "runs dense here: the token grid of this forward is unknown"
    assert "svg2: runs dense here" in str(found)


def test_mistakes_in_words():
    with pytest.raises(InvalidSetting, match="tokens, and not both"):
        bench.bench_attention()
    with pytest.raises(InvalidSetting, match="over 0 and at most 1"):
        bench.bench_attention(tokens=64, densities=(0.0,))
    with pytest.raises(UnknownMethod):
        bench.bench_attention(tokens=64, methods=["svg3"])


def test_the_command_writes_json_and_picture(tmp_path, capsys):
    files = {name: tmp_path / f"bench.{name}" for name in ("json", "png")}
    words = "bench attention --grid 2 6 6 --heads 1 --head-dim 16 --methods svg2 --densities 0.6,0.3 --rounds 1"
    settings = [f"svg2.{name}={value}" for name, value in SVG2.items()]
    given = ["--json", str(files["json"]), "--picture", str(files["png"]), "--set", *settings]
    status = main([*words.split(), *given])
    assert status == 0
    out = capsys.readouterr().out
    assert "2x6x6 = 72 tokens" in out
    assert "L1 error" in out
    stored = json.loads(files["json"].read_text())
    assert stored["rows"][0]["settings"]["num_k_centroids"] == 12
    assert stored["machine"]["device"]
    assert files["png"].stat().st_size > 1000
    assert main(["bench", "attention", "--tokens", "64", "--set", "top_p=1"]) == 2
    assert "method.name=value" in capsys.readouterr().err
