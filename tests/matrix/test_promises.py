"""Every promise of every registered method on every family that it claims: the cells of the matrix.

The checks are those of :mod:`hf_accel.testing`. A new method is found through the registry and held to all of them
without a line here. Which cells a run asks is chosen in ``tests/cells.py``.
"""

from __future__ import annotations

import pytest

import hf_accel
from hf_accel import registry
from hf_accel.errors import NotApplicable
from hf_accel.hosts import block_families
from hf_accel.hosts.block_families import family_of
from hf_accel.hosts.networks import host_of
from hf_accel.hosts.target import Model
from hf_accel.testing import FAMILIES, promises
from hf_accel.testing.claims import claims, loop_of
from hf_accel.testing.compare import fingerprint


def pytest_generate_tests(metafunc):
    if "promise" in metafunc.fixturenames:
        every = [promise for method in registry.methods() for promise in promises(method)]
        metafunc.parametrize("promise", every, ids=str)


def test_promises(promise):
    promise()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_facts_claim_is_what_methods_take_and_the_rest_is_refused_in_words(family):
    """The kit reads claims from facts and builds no model for it; here they are asked of the model."""
    host = FAMILIES[family]
    model = host.build(0)
    assert host_of(model) == host.host
    if host.loop == "blocks":
        assert family_of(model).name == host.reads_as
    before = fingerprint(model)
    refused = 0
    for method, cls in registry.methods().items():
        reason = cls.why_not(Model("model", model))
        loop = loop_of(cls.facts)
        if loop is not None and not (loop == "encoder" and host.loop == "blocks"):
            assert claims(cls.facts, host) == (reason is None), method
        if reason is None or cls.facts.kind == "recipe":
            continue
        refused += 1
        assert len(reason) > 20
        with pytest.raises(NotApplicable) as caught:
            hf_accel.apply(model, method)
        assert reason in str(caught.value)
        assert fingerprint(model) == before
    assert refused


def test_every_method_on_blocks_has_a_family_and_every_family_a_method():
    methods = {name: cls.facts for name, cls in registry.methods().items() if loop_of(cls.facts) == "blocks"}
    written = {name: family for name, family in FAMILIES.items() if family.loop == "blocks"}
    taken = {(method, name) for method, facts in methods.items() for name in written if claims(facts, written[name])}
    assert {method for method, _ in taken} == set(methods)
    assert {family for _, family in taken} == set(written)
    known = {family.name for family in block_families.FAMILIES}
    assert all(facts.families <= known for facts in methods.values())
    assert {family.reads_as for family in written.values()} == known


def test_every_family_with_packable_linears_is_claimed():
    for cls in registry.methods().values():
        if cls.facts.at("linear"):
            taken = {name for name, family in FAMILIES.items() if claims(cls.facts, family)}
            assert taken >= {"wan", "flux", "unet", "llama", "umt5", "clip-text"}
