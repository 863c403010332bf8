"""convert: what users call for a surgery, which gives back a new model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hf_accel import registry
from hf_accel.base import Given
from hf_accel.errors import Conflict, NotApplicable
from hf_accel.hosts.target import Model, resolve
from hf_accel.installing import marks_of
from hf_accel.presets.request import hand_over, wanted_by
from hf_accel.report import MethodReport
from hf_accel.sites.surgery.base import Fingerprint, Surgery, check_conversion


@dataclass(frozen=True)
class Converted:
    """What a surgery made.

    Attributes:
        model: the new network. In a pipeline it takes the old one's place by ``pipe.transformer = converted.model``.
        report: what was exchanged, what was left alone and why, with which settings.
    """

    model: torch.nn.Module
    report: MethodReport


def convert(model: Any, method: str, /, **settings: Any) -> Converted:
    """Make a new model by a surgery. The old one stays as it is, and shares no memory with the new one.

    Args:
        model: a diffusers or transformers model, or a pipeline in which one network suits the method. Of a model in a
            wrapper (``PeftModel``, ``torch.compile``, DDP) the network inside is converted.
        method: the name of a surgery; ``hf_accel.methods()`` has their kinds.
        **settings: of the method; they change those that ``configs/`` has for this model, or else the defaults. Also
            what the method takes beside settings (data, a teacher, ...).

    Returns:
        Converted: the new network and the report.

    Raises:
        UnknownMethod: no such method; names the nearest.
        InvalidSetting: a setting of the wrong type or range.
        NotApplicable: the method is no surgery, suits no network, or suits several.
        Conflict: methods stand on the model, so it is not what it was when it was loaded.
        HFAccelError: the method did not keep its promise: it changed the old model or gave back parts of it.
    """
    cls = registry.get(method)
    found = resolve(model)
    if cls.facts.kind != "surgery" or not issubclass(cls, Surgery):
        raise NotApplicable(
            f"{method} is a {cls.facts.kind}, which goes on and comes off again: hf_accel.apply(..., {method!r}). "
            f"Surgeries: {', '.join(n for n, c in registry.methods().items() if c.facts.kind == 'surgery') or 'none'}."
        )
    given = {name: settings.pop(name) for name in list(settings) if name in cls.inputs}
    wanted = hand_over(wanted_by(found, method, None, settings), given)[method]
    place = _the_one(found.description, [m for m in found.models if m.trainer is None], cls)
    if standing := ", ".join(i.method.name for i in marks_of(place.carrier)):
        raise Conflict(
            f"{standing} on {place.name}: {method} converts models as they were loaded. Take it off first: "
            "hf_accel.revert(...); apply it to the new model."
        )
    surgery = cls(wanted[place.name].config)
    surgery.given = Given(wanted[place.name].given)
    report = MethodReport(
        method, surgery.config.to_dict()["settings"], place.name, place.class_name, wanted[place.name].origin
    )
    before = Fingerprint(place.module)
    new = surgery.convert(place, report)
    check_conversion(method, place.module, new, before)
    return Converted(new, report)


def _the_one(target: str, networks: list[Model], cls: type[Surgery]) -> Model:
    reasons = {network.name: cls.why_not(network) for network in networks}
    suited = [network for network in networks if reasons[network.name] is None]
    if len(suited) == 1:
        return suited[0]
    if suited:
        names = ", ".join(network.name for network in suited)
        raise NotApplicable(f"{cls.name} suits several networks of {target}: {names}. Pass one of them.")
    words = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise NotApplicable(f"{cls.name} suits no network of {target}. {words}. See hf_accel.explain(...).")
