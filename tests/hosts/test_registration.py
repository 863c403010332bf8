"""Entries that patched models share: made by the first, removed with the last, never in the middle of a compilation."""

from __future__ import annotations

import gc

import torch

from hf_accel.hosts.patching.registration import SharedRegistration


def entry(table, key):
    def register():
        table[key] = True
        return lambda: table.pop(key)

    return SharedRegistration(("test", key), register)


def test_the_last_holder_takes_the_entry_along():
    table = {}
    first, second = entry(table, "a"), entry(table, "a")
    first.release()
    assert table == {"a": True}
    del second
    gc.collect()
    assert table == {}


def test_what_goes_during_a_compilation_is_removed_after_it(monkeypatch):
    table = {}
    held = entry(table, "a")
    with monkeypatch.context() as compiling:
        compiling.setattr(torch._guards.CompileContext, "current_compile_id", classmethod(lambda cls: "0/0"))
        held.release()
        assert table == {"a": True}
    again = entry(table, "a")  # takes what is left over
    other = entry(table, "b")
    again.release()
    assert table == {"b": True}
    other.release()
    assert table == {}
