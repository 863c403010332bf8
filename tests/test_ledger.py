"""Undo is exact, refuses to destroy later changes, and works on a deep copy."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_accel.errors import RevertRefused
from hf_accel.ledger import MISSING, Ledger


class Thing:
    kind = "class attribute"


class Hook:
    def __init__(self):
        self.calls = 0

    def __call__(self, module, args, kwargs, *output):
        self.calls += 1


def test_absent_attribute_is_absent_again_and_the_class_shows_through():
    thing, ledger = Thing(), Ledger()
    ledger.set(thing, "kind", "mine")
    assert thing.kind == "mine"
    ledger.undo()
    assert "kind" not in thing.__dict__
    assert thing.kind == "class attribute"


def test_own_attribute_is_the_same_object_again():
    thing, ledger = Thing(), Ledger()
    thing.kind = original = object()
    ledger.set(thing, "kind", "a")
    ledger.set(thing, "kind", "b")
    ledger.undo()
    assert thing.kind is original
    assert len(ledger) == 0


def test_what_was_undone_is_made_again_as_it_was():
    class Lease:
        held = 0

        def __init__(self):
            Lease.held += 1

        def release(self):
            Lease.held -= 1

        def renew(self):
            return Lease()

    model, thing, hook, after, ledger = torch.nn.Linear(2, 2), Thing(), Hook(), Hook(), Ledger()
    ledger.set(thing, "kind", "ours")
    ledger.set(thing, "new", ours := object())
    ledger.pre_hook(model, hook)
    ledger.post_hook(model, after)
    ledger.hold(Lease())
    for _ in range(2):
        undone = ledger.undo()
        assert len(undone) == 5
        assert (thing.kind, hasattr(thing, "new"), Lease.held) == ("class attribute", False, 0)
        model(torch.ones(1, 2))
        ledger.redo(undone)
        assert (thing.kind, thing.new, Lease.held, len(ledger)) == ("ours", ours, 1, 5)
        model(torch.ones(1, 2))
    assert (hook.calls, after.calls) == (2, 2)
    ledger.undo()
    assert not model._forward_pre_hooks
    assert not model._forward_hooks_always_called
    assert (vars(thing), Lease.held) == ({}, 0)


def test_submodule_swap_keeps_state_dict_keys():
    model, ledger = torch.nn.Sequential(torch.nn.Linear(2, 2)), Ledger()
    keys, original = list(model.state_dict()), model[0]
    ledger.set(model, "0", torch.nn.Identity())
    assert not list(model.state_dict())
    ledger.undo()
    assert model[0] is original
    assert list(model.state_dict()) == keys


def test_later_change_by_somebody_else_is_not_destroyed():
    thing, other, ledger = Thing(), Thing(), Ledger()
    ledger.set(other, "kind", "ours")
    ledger.set(thing, "kind", "ours")
    thing.kind = "theirs"
    with pytest.raises(RevertRefused, match=r"Thing\.kind was replaced by a str"):
        ledger.undo()
    assert (thing.kind, other.kind) == ("theirs", "ours")  # nothing was undone
    thing.kind = "ours"
    ledger.undo()
    assert "kind" not in other.__dict__


def test_hooks_leave_no_trace():
    model, ledger = torch.nn.Linear(2, 2), Ledger()
    before = {k: dict(v) for k, v in model.__dict__.items() if "hooks" in k and v is not None}
    pre, post = Hook(), Hook()
    ledger.pre_hook(model, pre)
    ledger.post_hook(model, post)
    model(torch.zeros(1, 2))
    ledger.undo()
    model(torch.zeros(1, 2))
    assert (pre.calls, post.calls) == (1, 1)
    assert {k: dict(v) for k, v in model.__dict__.items() if "hooks" in k and v is not None} == before


def test_post_hook_runs_after_an_exception():
    class Failing(torch.nn.Module):
        def forward(self):
            raise KeyError("x")

    model, ledger, post = Failing(), Ledger(), Hook()
    ledger.post_hook(model, post)
    with pytest.raises(KeyError):
        model()
    assert post.calls == 1


def test_a_copied_ledger_undoes_the_copy_only():
    model, ledger = torch.nn.Linear(2, 2), Ledger()
    ledger.set(model, "tag", "patched")
    ledger.pre_hook(model, Hook())
    model.ledger = ledger
    twin = copy.deepcopy(model)
    twin.ledger.undo()
    assert not hasattr(twin, "tag")
    assert not twin._forward_pre_hooks
    assert model.tag == "patched"
    assert len(model._forward_pre_hooks) == 1


def test_the_mark_of_absence_survives_copies():
    assert copy.deepcopy(MISSING) is MISSING
