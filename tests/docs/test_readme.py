"""The README's own code runs."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import torch

import hf_accel
from hf_accel import registry
from hf_accel.testing.models import tiny

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_a_method_of_your_own(monkeypatch):
    registry.methods()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "class Window" in block)
    code = code.replace('video = pipe("rain on a window").frames\n', "")  # here ``pipe`` is a network
    pipe = tiny.build("wan")
    with torch.no_grad():
        dense = tiny.run(pipe, "wan")
        module = types.ModuleType("readme")
        monkeypatch.setitem(sys.modules, "readme", module)  # dataclasses look their module up
        module.__dict__["pipe"] = pipe
        exec(compile(code, "README.md", "exec"), module.__dict__)
        assert torch.allclose(tiny.run(pipe, "wan"), dense, atol=1e-5)  # the window is wider than the video
        hf_accel.revert(pipe)
        with hf_accel.apply(pipe, "window", width=3, dense_steps=0):
            assert not torch.allclose(tiny.run(pipe, "wan"), dense, atol=1e-3)


def test_links_lead_somewhere():
    root = Path(__file__).parents[2]
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (root / link).exists(), link


def test_every_method_has_a_page_or_a_line():
    for name in registry.methods():
        assert f"`{name}`" in README, name
