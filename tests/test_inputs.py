"""What a method takes beside settings: handed over by keyword to those that take it, refused where nobody does."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest

import hf_accel
from hf_accel import errors, registry
from hf_accel.base import Method
from hf_accel.config import Config, setting
from hf_accel.facts import Facts
from hf_accel.report import Patched
from hf_accel.testing.models import tiny


@pytest.fixture
def calibrated(monkeypatch):
    """A method that takes texts, and one that takes nothing."""
    registry.methods()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    class Tag(Method):
        name, paper, summary = "tag", "none", "for tests"
        facts = Facts(site="linear", exact=True)
        Config = type("TagConfig", (Config,), {"METHOD": "tag"})

        @classmethod
        def why_not(cls, model: Any) -> str | None:
            return None

        def install(self, model: Any, ledger: Any, report: Any, clock: Any) -> Any:
            if self.given.get("texts") == "bad":
                raise errors.NotApplicable("bad texts")
            ledger.set(model.module, self.name, self.given)
            report.patched.append(Patched(model.name, "", "tag"))

    class Calibrated(Tag):
        name, inputs = "calibrated", ("texts",)
        Config = type("CalibratedConfig", (Config,), {"METHOD": "calibrated"})

    registry.register(Tag)
    registry.register(Calibrated)


def test_inputs_reach_the_methods_that_take_them(calibrated):
    model, texts = tiny.build("wan"), ["a"]
    with hf_accel.apply(model, ["tag", "calibrated"], texts=texts):
        assert model.calibrated["texts"] is texts
        assert model.tag == {}
    with hf_accel.apply(model, {"calibrated": {"texts": texts}, "tag": {}}):
        assert model.calibrated["texts"] is texts
    with hf_accel.apply(model, "calibrated") as applied:
        assert model.calibrated == {}
        assert "texts" not in applied.report().entries[0].settings


def test_an_input_that_nobody_takes_is_refused(calibrated):
    for asked in ("tag", ["tag"]):
        with pytest.raises(errors.InvalidSetting, match="texts"):
            hf_accel.apply(tiny.build("wan"), asked, texts=["a"])
    with pytest.raises(errors.InvalidSetting, match="wrong"):
        hf_accel.apply(tiny.build("wan"), "calibrated", wrong=1)


def test_a_setting_may_be_called_as_the_input_of_another_method(calibrated):
    class Named(registry.get("tag")):
        name = "named"
        Config = dataclass(frozen=True)(
            type(
                "NamedConfig",
                (Config,),
                {"METHOD": "named", "__annotations__": {"texts": str}, "texts": setting("a", "")},
            )
        )

    registry.register(Named)
    model = tiny.build("wan")
    with hf_accel.apply(model, "named", texts="b") as applied:
        assert applied.report().entries[0].settings["texts"] == "b"
    with hf_accel.apply(model, {"named": {"texts": "b"}, "calibrated": {}}, texts=["c"]) as applied:
        assert model.calibrated["texts"] == ["c"]
        assert applied.report().entries[0].settings == {"texts": "b"}


def test_a_failed_replacement_hands_the_inputs_over_again(calibrated):
    model = tiny.build("wan")
    hf_accel.apply(model, "calibrated", texts=["a"])
    with pytest.raises(errors.NotApplicable, match="bad texts"):
        hf_accel.apply(model, "calibrated", texts="bad")
    assert model.calibrated == {"texts": ["a"]}


def test_copies_share_inputs_and_pickles_leave_them_out(calibrated):
    model, texts = tiny.build("wan"), iter(["a"])
    hf_accel.apply(model, "calibrated", texts=texts)
    assert copy.deepcopy(model).calibrated["texts"] is texts
    assert pickle.loads(pickle.dumps(model.calibrated)) == {}
