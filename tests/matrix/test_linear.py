"""Methods that change weights beside others on one model. What each promises by itself is in ``test_promises``."""

from __future__ import annotations

import itertools

import pytest
import torch

import hf_accel
from hf_accel import registry
from hf_accel.errors import NotApplicable
from hf_accel.testing import FAMILIES
from hf_accel.testing.case import Case
from hf_accel.testing.checks.linears import FEW, run
from hf_accel.testing.claims import claims, loop_of
from hf_accel.testing.compare import fingerprint
from hf_accel.testing.kit import TINY_SETTINGS

LINEAR = [name for name, cls in registry.methods().items() if loop_of(cls.facts) == "encoder"]
OTHERS = [name for name, cls in registry.methods().items() if loop_of(cls.facts) == "forward"]
PAIRS = [
    (method, other, family)
    for method, other in itertools.product(LINEAR, OTHERS)
    for family in FEW
    if all(claims(registry.get(name).facts, FAMILIES[family]) for name in (method, other))
]


@torch.no_grad()
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_beside_other_methods_in_both_orders(pair):
    """The other at full budget changes nothing of what the weights do; either leaves first."""
    method, other, family = pair
    build = FAMILIES[family].build
    model = build(0)
    before, dense = fingerprint(model), run(model, family)
    settings = {name: Case(name, family, TINY_SETTINGS.get(name, {}), build).full_budget for name in (method, other)}
    with hf_accel.apply(model, method, **settings[method]):
        alone = run(model, family)
    for order, leave in itertools.product([(method, other), (other, method)], (0, 1)):
        applied = [hf_accel.apply(model, name, **settings[name]) for name in order]
        assert torch.allclose(run(model, family), alone, atol=1e-5, rtol=1e-5)
        applied[leave].revert()
        left = order[1 - leave]
        assert torch.allclose(run(model, family), alone if left == method else dense, atol=1e-5, rtol=1e-5)
        applied[1 - leave].revert()
        assert fingerprint(model) == before


@pytest.mark.parametrize("method", LINEAR)
def test_models_without_linears_to_change_are_refused(method):
    from diffusers import AutoencoderKL

    class Convolutions(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.Conv2d(3, 3, 3) for _ in range(2))

    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2)
    for model, word in ((vae, "autoencoder"), (Convolutions(), "without linears"), (torch.nn.Linear(32, 32), "module")):
        with pytest.raises(NotApplicable, match=word):
            hf_accel.apply(model, method)
