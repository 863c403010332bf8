"""Two methods on one block-diffusion model. What each promises by itself is in ``test_promises``."""

from __future__ import annotations

import itertools

import pytest

import hf_accel
from hf_accel import registry
from hf_accel.composition import apart, conflict, sites_of
from hf_accel.errors import Conflict
from hf_accel.facts import overlap
from hf_accel.testing import FAMILIES
from hf_accel.testing.case import Case
from hf_accel.testing.checks.blocks import close
from hf_accel.testing.claims import claims, loop_of
from hf_accel.testing.compare import fingerprint
from hf_accel.testing.kit import TINY_SETTINGS
from hf_accel.testing.models.block_diffusion import generate

pytestmark = pytest.mark.filterwarnings("ignore:.*RCD:UserWarning")  # weights here are random

METHODS = [name for name, cls in registry.methods().items() if loop_of(cls.facts) == "blocks"]
PAIRS = list(itertools.combinations(METHODS, 2))


def case(method: str, family: str) -> Case:
    return Case(method, family, TINY_SETTINGS.get(method, {}), FAMILIES[family].build)


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_pairs(pair):
    """What is allowed works in both orders and leaves one by one; what is refused changes nothing."""
    a, b = (registry.get(name) for name in pair)
    assert conflict(a, b) == conflict(b, a)
    both = [name for name, f in FAMILIES.items() if f.loop == "blocks" and claims(a.facts, f) and claims(b.facts, f)]
    assert (apart(a, b) is None) == bool(both)
    both_own = overlap(sites_of(a), sites_of(b)) is not None
    assert (conflict(a, b) is not None) == (both_own and bool(both))
    for family in both:
        model = FAMILIES[family].build(0)
        before = fingerprint(model)
        for first, second in (pair, pair[::-1]):
            if both_own:
                with hf_accel.apply(model, first), pytest.raises(Conflict, match=rf"{first} is on model already"):
                    hf_accel.apply(model, second)
            else:
                together(model, case(first, family), case(second, family))
            assert fingerprint(model) == before


def together(model, first: Case, second: Case):
    """With ``second`` at full budget, both give what ``first`` gives alone."""
    with hf_accel.apply(model, first.method, **first.settings):
        alone = generate(model, first.family)
    for leaves in (0, 1):
        stand = [
            hf_accel.apply(model, first.method, **first.settings),
            hf_accel.apply(model, second.method, **second.full_budget),
        ]
        assert close(generate(model, first.family), alone)
        stand[leaves].revert()
        if leaves == 1:
            assert close(generate(model, first.family), alone)
        stand[1 - leaves].revert()


def test_what_goes_with_what():
    """Attention and embedding are sites of their own: residual contexts go with sparse prefixes."""
    for attention in ("prefix-split", "quest", "losa"):
        assert conflict(registry.get(attention), registry.get("rcd")) is None
        assert conflict(registry.get(attention), registry.get("soft-embed")) is None
    assert conflict(registry.get("losa"), registry.get("quest")) is not None
