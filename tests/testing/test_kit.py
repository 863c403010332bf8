"""The kit as another package uses it, and that it catches methods that break what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
import unittest
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import hf_accel
from hf_accel import registry
from hf_accel.config import Config, setting
from hf_accel.errors import HFAccelError, NotApplicable
from hf_accel.facts import Facts
from hf_accel.sites.attention.base import AttentionMethod
from hf_accel.testing import FAMILIES, BrokenPromise, Skipped, families, promises
from hf_accel.testing.case import fails_at_the_end
from hf_accel.testing.compare import expect_close, expect_same_objects, fingerprint
from hf_accel.testing.models import tiny
from hf_accel.testing.outcome import expect_refusal

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class HalvedConfig(Config):
    METHOD = "halved"
    keep: float = setting(0.5, "share of the output that is kept", gt=0)


@pytest.fixture
def halved(monkeypatch):
    """A registered method that keeps state where it must not, and is not dense at what it calls its full budget."""
    registry.methods()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    @hf_accel.register
    class Halved(AttentionMethod):
        name, paper, summary = "halved", "none", "halves what it sees, and more from call to call"
        facts = Facts(site="attention", full_budget={"keep": 0.9}, backward=True)
        Config = HalvedConfig
        calls = 0

        def attend(self, call, state):
            type(self).calls += 1
            out = torch.nn.functional.scaled_dot_product_attention(call.query, call.key, call.value, scale=call.scale)
            return out * self.config.keep / self.calls

    return Halved


def of(method, family, name, **given):
    return next(promise for promise in promises(method, family, **given) if promise.name == name)


def test_a_broken_promise_says_what_was_expected_and_what_came(halved):
    with pytest.raises(BrokenPromise, match=r"Full budget beside the unpatched model: expected equal up to 1e-05; the"):
        of("halved", "wan", "full_budget_is_dense")()
    with pytest.raises(AssertionError, match="A second prompt beside the same prompt alone"):
        of("halved", "wan", "state_does_not_leak_into_the_next_prompt")()
    of("halved", "wan", "revert_restores_identity_and_bits")()


def test_what_is_excused_is_skipped_with_the_reason(halved):
    excused = {"full_budget_is_dense": "it halves"}
    with pytest.raises(Skipped, match="it halves"):
        of("halved", "wan", "full_budget_is_dense", excused=excused)()
    with pytest.raises(HFAccelError, match=r"Excused are no_such.*promises of halved are .*full_budget_is_dense"):
        promises("halved", excused={"no_such": "reason"})


def test_settings_reach_the_method(halved):
    with pytest.raises(HFAccelError, match="width"):
        of("halved", "wan", "revert_restores_identity_and_bits", settings={"width": 3})()


def test_names():
    chosen = promises("dense", "wan")
    assert str(chosen[0]) == "dense-wan-full_budget_is_dense"
    assert len({str(promise) for promise in promises("dense")}) == len(promises("dense"))
    own = [promise for promise in promises("dense") if promise.family is None]
    assert str(own[0]) == "dense-settings_round_trip_and_declarations"
    assert {promise.family for promise in promises("dense")} == {None, *families("dense")}
    assert families("radial") == [name for name, family in FAMILIES.items() if family.medium == "video"]
    assert promises("radial", "flux") == []
    with pytest.raises(HFAccelError, match="There are wan, "):
        promises("radial", "wann")


def test_a_skipped_promise_is_a_skipped_test_of_unittest():
    class Test(unittest.TestCase):
        def test_it(self):
            of("dense", "wan", "a_step_cache_compiles_to_two_graphs")()

    result = unittest.TestResult()
    Test("test_it").run(result)
    assert not result.errors
    assert [reason for _, reason in result.skipped] == ["attention methods are one graph, whatever they leave out"]


def test_without_a_checkout_and_without_a_test_runner(tmp_path):
    code = (
        "import sys; from hf_accel.testing import promises, families; chosen = promises('dense', 'pixart'); "
        "assert 'pytest' not in sys.modules and families('dense'); "
        "[promise() for promise in chosen if promise.name == 'full_budget_is_dense']; print(len(chosen))"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "zoo" / "src")])
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(promises("dense", "pixart"))


def test_under_pytest_of_another_package(tmp_path):
    (tmp_path / "test_theirs.py").write_text(
        "import pytest\nfrom hf_accel.testing import promises\n"
        "CHOSEN = [p for p in promises('dense', 'pixart') if p.name in ('full_budget_is_dense', "
        "'a_step_cache_compiles_to_two_graphs')]\n"
        "@pytest.mark.parametrize('promise', CHOSEN, ids=str)\ndef test_promises(promise):\n    promise()\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "zoo" / "src")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert "1 passed, 1 skipped" in done.stdout, done.stdout + done.stderr


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_what_differs_is_named():
    model = tiny.build("pixart")
    before = fingerprint(model)
    model.proj_out.extra = object()
    with pytest.raises(BrokenPromise, match="After that, not the same objects as before: proj_out"):
        expect_same_objects(fingerprint(model), before, "After that")
    with pytest.raises(BrokenPromise, match=r"Ours: expected equal up to 1e-05; the largest difference is 2\."):
        expect_close([torch.zeros(2)], [torch.tensor([0.0, 2.0])], "Ours")


def test_a_refusal_is_expected():
    with (
        pytest.raises(BrokenPromise, match="nothing was raised"),
        expect_refusal(NotApplicable),
    ):
        pass
    with pytest.raises(BrokenPromise, match="says 'why'; it says: because"), expect_refusal(NotApplicable, "why"):
        raise NotApplicable("because")


def test_an_installation_that_fails_has_to_be_heard():
    with pytest.raises(BrokenPromise, match="swallowed"), fails_at_the_end("dense"):
        pass
