"""The families of models that promises are asked of, and which of them a method claims; no model is built for that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from hf_accel.errors import HFAccelError
from hf_accel.facts import HOSTS_OF, Facts, Host, Medium
from hf_accel.testing.models import block_diffusion, encoders, tiny

Loop = Literal["forward", "blocks", "encoder", "text"]


@dataclass(frozen=True)
class Family:
    """Models of one architecture, as the package reads them.

    Attributes:
        name: of the family.
        loop: how it is run: in forwards, by writing blocks, or as an encoder beside a generation. Language models are
            run in forwards, and in calls of ``generate`` ("text") for methods on what only these have.
        build: makes a tiny model from a seed, in eval mode.
        host: the kind of network; None for encoders, which only methods that change weights take.
        medium: what its tokens show; None where nobody reads them.
        reads_as: the name of its block-diffusion family; None for others.
    """

    name: str
    loop: Loop
    build: Callable[[int], torch.nn.Module]
    host: Host | None = None
    medium: Medium | None = None
    reads_as: str | None = None


def _all() -> dict[str, Family]:
    out = [
        Family(name, "forward", lambda seed, name=name: tiny.build(name, seed=seed), model.host, model.medium)  # type: ignore[misc]
        for name, model in tiny.TINY.items()
    ]
    out += [
        Family(name, "blocks", family.build, "block diffusion", "text", family.reads_as)
        for name, family in block_diffusion.FAMILIES.items()
    ]
    out += [
        Family(name, "encoder", lambda seed, name=name: encoders.build(name, seed))  # type: ignore[misc]
        for name in encoders.ENCODERS
    ]
    return {family.name: family for family in out}


FAMILIES: dict[str, Family] = _all()
# One of each kind of network: a video transformer, one that mixes text and video, an image transformer of two streams,
# a U-Net, a language model, each class of block-diffusion models, an encoder.
REPRESENTATIVES = (
    "wan", "hunyuan-video", "flux", "unet", "llama", "sdar", "diffusion-gemma", "llada2", "llada", "umt5",
)  # fmt: skip


def family_named(name: str) -> Family:
    """The family of that name.

    Raises:
        HFAccelError: there is none; the message lists all.
    """
    if name not in FAMILIES:
        raise HFAccelError(f"No family {name!r} in the kit. There are {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def loop_of(facts: Facts) -> Loop | None:
    """How a method is run in its promises; None where it can only be asked for its declarations.

    Adapters stand on another method, recipes on a training, a surgery gives back another model.
    """
    if facts.kind != "patch" or any(facts.at(site) for site in ("adapter", "training", "surgery")):
        return None
    if facts.hosts == {"language model"} and (facts.at("kv cache") or facts.at("decoding")):
        return "text"
    if facts.at("linear"):
        return "encoder"
    return "blocks" if facts.hosts == {"block diffusion"} else "forward"


def claims(facts: Facts, family: Family) -> bool:
    """Whether a method takes models of a family, by its facts alone."""
    loop = loop_of(facts)
    if loop == "encoder":
        return family.loop != "blocks" and (family.host is None or _in_place(facts, family))
    if loop == "text":
        return family.host == "language model"
    if loop is None or loop != family.loop:
        return False
    if loop == "blocks":
        return not facts.families or family.reads_as in facts.families
    if family.host == "unet" and family.medium is None and facts.at("attention"):
        return False  # nobody reads its tokens
    return _in_place(facts, family)


def _in_place(facts: Facts, family: Family) -> bool:
    shown = {family.medium} if family.medium is not None else set(HOSTS_OF)
    return any(host == family.host and medium in shown for host, medium in facts.places)
