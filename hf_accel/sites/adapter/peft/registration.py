"""The adapter type in peft, whose list of types is a closed enum without entry points."""

from __future__ import annotations

from typing import Any

from peft import PeftType


def add_peft_type(name: str) -> Any:
    """A member ``name`` of ``peft.PeftType``: the one that is there, or a new one."""
    members: Any = PeftType
    if name in members._value2member_map_:
        return PeftType(name)
    member: Any = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    members._member_map_[name] = members._value2member_map_[name] = member
    members._member_names_.append(name)
    type.__setattr__(PeftType, name, member)
    return member


__all__ = ["add_peft_type"]
