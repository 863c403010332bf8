"""Methods of other packages: what breaks one breaks no other, and what one declares is checked in words."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import hf_accel
from hf_accel import errors, registry
from hf_accel.base import Method
from hf_accel.config import Config, setting
from hf_accel.facts import Facts
from hf_accel.report import Skipped
from hf_accel.testing.models import tiny

GOOD = """
from dataclasses import dataclass
from hf_accel.config import Config
from hf_accel.method import AttentionMethod, Facts


@dataclass(frozen=True)
class {cls}Config(Config):
    METHOD = {name!r}


class {cls}(AttentionMethod):
    name, paper, summary = {name!r}, "none", "for tests"
    facts = Facts(site="attention", exact=True)
    Config = {cls}Config

    def attend(self, call, state):
        return call.dense()
"""


def plug_in(folder: Path, name: str, code: str, value: str | None = None, version: str = "1.2") -> None:
    """What an installer leaves behind: a module, and a distribution whose entry point names it."""
    module = f"outsider_{name.replace('-', '_').replace('.', '_')}"
    (folder / f"{module}.py").write_text(textwrap.dedent(code))
    info = folder / f"{module}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[hf_accel.methods]\n{name} = {value or f'{module}:Mine'}\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of packages that are installed when ``registry.methods()`` is called the first time."""
    registry.methods()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(registry, "_loaded", [])
    monkeypatch.setattr(registry, "_left_out", {})
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for module in [module for module in sys.modules if module.startswith("outsider_")]:
        del sys.modules[module]


OURS = set(registry.methods())


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import no_such_module", r"ModuleNotFoundError: No module named 'no_such_module'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("", "AttributeError: module 'outsider_broken' has no attribute 'Mine'"),
        ("Mine = 3", r"got 3, a int"),
        (GOOD.format(cls="Mine", name="svg2"), r"The name 'svg2' is taken by hf_accel\.patches\.svg2\.SVG2"),
        (GOOD.format(cls="Mine", name="a/b"), r"name must be a text .* got 'a/b'"),
        (GOOD.format(cls="Mine", name="mine").replace('"attention"', '"atention"'), "unknown site atention"),
    ],
)
def test_a_plug_in_that_cannot_be_used_is_left_out_by_name(site, code, words):
    plug_in(site, "broken", code)
    plug_in(site, "whole", GOOD.format(cls="Mine", name="whole"))
    with pytest.warns(
        RuntimeWarning, match=rf"(?s)'broken' = 'outsider_broken:Mine' of outsider_broken 1\.2 .*{words}"
    ):
        listed = hf_accel.methods()
    assert set(listed) == OURS | {"whole"}
    with hf_accel.apply(tiny.build("wan"), "whole") as applied:
        assert applied.active
    with pytest.raises(
        errors.UnknownMethod, match=rf"(?s)'broken' .* of outsider_broken 1\.2 cannot be used: .*{words}"
    ):
        hf_accel.apply(tiny.build("wan"), "broken")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_accel.methods()


def test_nothing_of_a_module_that_failed_half_way_stays(site):
    code = "import hf_accel\n" + GOOD.format(cls="Mine", name="half").replace(
        "class Mine(", "@hf_accel.register\nclass Mine("
    )
    plug_in(site, "half", code + "\n\nraise OSError('no licence')\n")
    with pytest.warns(RuntimeWarning, match="OSError: no licence"):
        assert set(hf_accel.methods()) == OURS


def test_of_two_with_one_name_the_first_stays(site):
    for name in ("one", "two"):
        plug_in(site, name, GOOD.format(cls="Mine", name="same"))
    with pytest.warns(RuntimeWarning, match=r"The name 'same' is taken by outsider_(one|two)\.Mine"):
        assert set(hf_accel.methods()) == OURS | {"same"}


def test_a_plug_in_may_ask_for_methods_while_it_is_imported(site, monkeypatch):
    code = "import hf_accel\nseen = set(hf_accel.methods())\n" + GOOD.format(cls="Mine", name="asking")
    plug_in(site, "asking", code)
    assert set(hf_accel.methods()) == OURS | {"asking"}
    # Now the user imports it first: its entry point cannot be loaded yet, and is no mistake.
    for name in ("asking",):
        registry._METHODS.pop(name)
    registry._loaded.clear()
    del sys.modules["outsider_asking"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import outsider_asking

        assert outsider_asking.seen == OURS
        assert set(hf_accel.methods()) == OURS | {"asking"}


TWO_THREADS = """
import threading
import torch
import hf_accel

found, start = [], threading.Barrier(4)

def ask(first):
    start.wait()
    if first:
        import outsider_slow
    found.append(frozenset(hf_accel.methods()))

threads = [threading.Thread(target=ask, args=(i == 0,)) for i in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(120)
assert not any(thread.is_alive() for thread in threads)
assert len(found) == 4 and len(set(found)) == 1, found
assert "slow" in found[0]
"""


def test_four_threads_may_ask_first(tmp_path):
    """One imports the plug-in by itself, which asks for all methods; the others meet it through its entry point."""
    code = "import time\nimport hf_accel\ntime.sleep(0.5)\nhf_accel.methods()\n" + GOOD.format(cls="Mine", name="slow")
    plug_in(tmp_path, "slow", code)
    here = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", TWO_THREADS],
        env=os.environ | {"PYTHONPATH": here}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# -- what is declared ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MineConfig(Config):
    METHOD = "mine"
    width: int = setting(1, "a width")


class Mine(Method):
    name, paper, summary = "mine", "none", "for tests"
    facts = Facts(site="linear", exact=True)
    Config = MineConfig

    @classmethod
    def why_not(cls, model: Any) -> str | None:
        return None

    def install(self, model: Any, ledger: Any, report: Any, clock: Any) -> Any:
        if self.config.width == 2:
            report.skipped.append(Skipped(model.name, "blocks.0", "too wide"))
        if self.config.width == 3:
            ledger.set(model.module, "touched", True)


@dataclass
class Thawed:
    METHOD = "mine"


class Undecorated(MineConfig):
    METHOD = "mine"
    REMARK: ClassVar[str] = "no setting"
    height: int = setting(1, "a height")


REFUSED = [
    ({"name": ""}, "name must be a text"),
    ({"name": "my method"}, "got 'my method'"),
    ({"name": "owner/method"}, "got 'owner/method'"),
    ({"name": "mine.yaml"}, "ends like no file"),
    ({"name": None}, "got None"),
    ({"summary": ""}, "summary must be a text"),
    ({"facts": {"site": "linear"}}, "facts must be a hf_accel.method.Facts; got"),
    ({"facts": Facts()}, "facts name no site"),
    ({"facts": Facts(site="lineal")}, "unknown site lineal; there are linear, adapter, attention"),
    ({"facts": Facts(site="kv cache: codek")}, "unknown site kv cache: codek"),
    (
        {"facts": Facts(site="linear", media=frozenset({"audio"}))},
        "facts.media has audio; there are image, text, video",
    ),
    ({"facts": Facts(site="linear", media="video")}, "facts.media must be a collection of texts; got 'video'"),
    ({"facts": Facts(site="linear", media=frozenset())}, "facts.media is empty"),
    ({"facts": Facts(site="linear", hosts=frozenset({"gan"}))}, "facts.hosts has gan; there are block diffusion"),
    ({"facts": Facts(site="linear", needs=frozenset({"luck"}))}, "facts.needs has luck"),
    ({"facts": Facts(site="linear", families=frozenset({"x"}))}, "facts.families has x; there are"),
    ({"facts": Facts(site="linear", kind="potion")}, "facts.kind must be one of patch, recipe, surgery; got 'potion'"),
    ({"facts": Facts(site="linear", full_budget={"widht": 1})}, "name widht, which MineConfig has not; it has width"),
    ({"facts": Facts(site="linear", budget="depth")}, "name depth, which MineConfig has not"),
    ({"facts": Facts(site="linear", dtypes=("float16",))}, "facts.dtypes must be of torch's"),
    ({"Config": dict}, "Config must be a class derived from hf_accel.config.Config"),
    ({"Config": Thawed}, "Config must be a class derived from hf_accel.config.Config"),
    ({"Config": Undecorated}, "Undecorated.height is annotated and no setting"),
    ({"name": "other"}, "MineConfig.METHOD must be the method's name; got 'mine'"),
    ({"inputs": "texts"}, "inputs must be a collection of texts; got 'texts'"),
    ({"inputs": ("width",)}, "width can be a setting or an input, not both"),
    ({"trained_with": ("depth",)}, "trained_with names depth"),
    ({"stands_on": "gptq"}, "stands_on must be a collection"),
]


@pytest.mark.parametrize(("declared", "words"), REFUSED)
def test_a_wrong_declaration_is_refused_in_words(site, declared, words):
    with pytest.raises(errors.HFAccelError) as caught:
        registry.register(type("Wrong", (Mine,), declared))
    assert words in str(caught.value)
    assert set(registry.methods()) == OURS


def test_what_is_no_method_is_refused(site):
    with pytest.raises(errors.HFAccelError, match="is not derived from"):
        registry.register(
            type("Bare", (), {**{k: vars(Mine)[k] for k in ("name", "paper", "summary", "facts", "Config")}})
        )
    with pytest.raises(errors.HFAccelError, match="does not define install, why_not"):
        registry.register(
            type("Abstract", (Method,), {k: vars(Mine)[k] for k in ("name", "paper", "summary", "facts", "Config")})
        )


@pytest.mark.parametrize(
    ("width", "words"),
    [
        (1, r"mine patched nothing in model \(WanTransformer3DModel\).*looked at no module"),
        (2, r"Left alone: blocks\.0: too wide\. Give it a model"),
        (3, r"It made 1 changes through the ledger and reported none.*report\.patched"),
    ],
)
def test_a_method_that_patches_nothing_says_so_whoever_wrote_it(site, width, words):
    registry.register(Mine)
    model = tiny.build("wan")
    before = dict(vars(model))
    with pytest.raises(errors.NothingPatched, match=words):
        hf_accel.apply(model, "mine", width=width)
    assert vars(model) == before
    with hf_accel.apply(model, "svg2"), pytest.raises(errors.NothingPatched):
        hf_accel.apply(model, "mine", width=width)
    assert isinstance(model, torch.nn.Module)


def test_a_method_with_the_name_of_a_shipped_preset_is_said(site):
    config = dataclass(frozen=True)(type("NamedConfig", (Config,), {"METHOD": "wan2.1-t2v-14b-720p"}))
    registry.register(type("Named", (Mine,), {"name": "wan2.1-t2v-14b-720p", "Config": config}))
    model = tiny.build("wan")
    with pytest.raises(errors.Conflict, match="is a shipped preset and a method of"):
        hf_accel.apply(model, "wan2.1-t2v-14b-720p")
    with hf_accel.apply(model, "svg2") as applied:
        assert applied.active
