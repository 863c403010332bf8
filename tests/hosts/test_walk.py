"""The walk over a model's modules gives what torch's own gives."""

from __future__ import annotations

import pytest
import torch

from hf_accel.hosts.walk import modules, named_modules, with_attribute
from hf_accel.testing.models import tiny


def tangled():
    """Shared modules, an empty place, and a module inside of itself."""
    shared = torch.nn.Linear(2, 2)
    inner = torch.nn.Sequential(shared, torch.nn.ModuleList([shared, torch.nn.Linear(2, 2)]))
    outer = torch.nn.ModuleDict({"b": inner, "a": shared, "c": torch.nn.Sequential(inner)})
    outer.nothing = None
    outer.register_module("empty", None)
    inner.add_module("loop", outer)
    return outer


@pytest.mark.parametrize("make", [lambda: tiny.build("wan"), tangled, lambda: torch.nn.Linear(1, 1)])
def test_every_module_once_under_its_first_name_in_torchs_order(make):
    model = make()
    assert list(named_modules(model)) == list(model.named_modules())
    assert set(modules(model)) == set(model.modules())
    assert len(modules(model)) == len(list(model.modules()))


def test_an_attribute_is_found_wherever_torch_finds_it():
    class Property(torch.nn.Module):
        @property
        def processor(self):
            return "of the class"

    model = torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(4)), Property())
    model[0].processor = "own"
    model[1].processor = torch.nn.Linear(1, 1)
    model[2].processor = None
    found = {name: value for name, _, value in with_attribute(model, "processor")}
    assert found == {"0": "own", "1": model[1].processor, "4": "of the class"}
