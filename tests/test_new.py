"""``python -m hf_accel.new``: what it writes is whole, and passes its own tests as written."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hf_accel
from hf_accel import new, registry
from hf_accel.errors import HFAccelError
from hf_accel.testing import promises

# One promise of each that runs the method, and does not take long.
CHEAP = {
    "attention": "full_budget_is_dense",
    "prefix-attention": "full_budget_is_dense",
    "step-cache": "full_budget_is_dense",
    "step-cache-output": "full_budget_is_dense",
    "kv-cache": "full_budget_writes_the_same_text-greedy",
    "kv-policy": "full_budget_writes_the_same_text-greedy",
    "embedding": "full_budget_is_dense",
    "linear": "full_budget_is_as_close_as_declared_and_undone_exactly",
    "decoding": "full_budget_writes_the_same_text-greedy",
    "training": None,
    "surgery": None,
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """An empty folder that is the current one and can be imported from; what is registered goes again."""
    registry.methods()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(("own_", "test_own_")):
            del sys.modules[name]


def test_every_site_has_a_text_and_every_text_a_site():
    shared = {"pyproject", "readme", "init", "test", "test-training", "test-surgery"}
    assert {file.stem for file in new.SKELETONS.glob("*.txt")} == shared | set(new.SITES)
    assert set(CHEAP) == set(new.SITES)


@pytest.mark.parametrize("site", new.SITES)
def test_what_is_written_registers_and_keeps_a_promise(own, monkeypatch, capsys, site):
    name = f"own-{site}"
    assert new.main([name, "--site", site]) == 0
    told = capsys.readouterr().out.splitlines()
    module = name.replace("-", "_")
    root = own / name
    written = ["pyproject.toml", "README.md", f"{module}/__init__.py", f"{module}/method.py", f"tests/test_{module}.py"]
    assert told[:-1] == [str(Path(name) / file) for file in written]
    assert all("$" not in (root / file).read_text() for file in written)
    assert (root / module / "method.py").read_text().count("Your idea goes here") == 1
    # What an installer would read, and what registers it.
    declared = tomllib.loads((root / "pyproject.toml").read_text())
    assert declared["project"]["name"] == name
    ((entry, value),) = declared["project"]["entry-points"]["hf_accel.methods"].items()
    home, _, cls = value.partition(":")
    monkeypatch.syspath_prepend(str(root))
    hf_accel.register(getattr(__import__(home, fromlist=[cls]), cls))
    assert registry.get(name).name == entry == name
    # Its own tests are the kit's promises, of this family.
    skeleton = new.SITES[site]
    tests = (root / "tests" / f"test_{module}.py").read_text()
    compile(tests, module, "exec")
    if CHEAP[site] is None:
        # The test that it brings, without pytest around it.
        space: dict = {"__name__": f"test_{module}"}
        exec(tests, space)
        arguments = (own,) if site == "training" else ()
        next(f for n, f in space.items() if n.startswith("test_as_written"))(*arguments)
        return
    assert f'promises("{name}", "{skeleton.family}", settings=SETTINGS)' in tests
    asked = promises(name, skeleton.family, settings=eval(skeleton.settings))
    next(one for one in asked if one.name == CHEAP[site])()
    for one in promises(name):
        if one.family is None:
            one()


def test_one_of_them_as_an_author_runs_it(own):
    """In a process of its own, where nothing is installed."""
    assert new.main(["Own.Drafter", "--site", "decoding", "--into", "here/there"]) == 0
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", "-k", "greedy or declarations"]
    found = subprocess.run(words, cwd=own / "here" / "there", capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "3 passed" in found.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my method", "'my method' cannot be the name of a package"),
        ("-mine", "begins with a letter"),
        ("mine-", "ends with a letter or digit"),
        ("../mine", "cannot be the name"),
        ("2fast", "begins with a letter"),
        ("", "cannot be the name"),
        ("größe", "cannot be the name"),
        ("import", "word of Python"),
        ("SVG2", "There is a method 'svg2' already"),
        ("torch", "There is a module 'torch' already"),
        ("json", "There is a module 'json' already"),
        ("hf.accel", "There is a module 'hf_accel' already"),
    ],
)
def test_names_that_cannot_be_are_refused_in_words(own, capsys, name, words):
    assert new.main(["--site", "attention", "--", name]) == 2
    assert words in capsys.readouterr().err
    assert not [*own.iterdir()]


def test_an_unknown_site_is_answered_with_all_sites(own, capsys):
    assert new.main(["mine", "--site", "atention"]) == 2
    told = capsys.readouterr().err
    assert "There is no site 'atention'" in told
    assert all(f"{site} (" in told for site in new.SITES)
    assert not [*own.iterdir()]


def test_nothing_is_overwritten_and_nothing_half_written(own, capsys, monkeypatch):
    (own / "mine").mkdir()
    (own / "mine" / "README.md").write_text("mine")
    assert new.main(["mine", "--site", "linear"]) == 2
    assert "has README.md already; nothing was written" in capsys.readouterr().err
    assert [file.name for file in (own / "mine").iterdir()] == ["README.md"]
    (own / "file").write_text("a file")
    assert new.main(["mine", "--site", "linear", "--into", "file"]) == 2
    assert "cannot be written to" in capsys.readouterr().err
    # The disk is full at the last file.
    opened = Path.open

    def full(path, *arguments, **more):
        if path.name.startswith("test_"):
            raise OSError(28, "No space left on device")
        return opened(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(HFAccelError, match="No space left on device"):
        new.write(new.files_of("mine", "linear"), own / "new" / "place")
    assert not (own / "new").exists()
