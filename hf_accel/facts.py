"""What methods declare of themselves: the places they take, what they need, what they can do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from hf_accel.errors import HFAccelError

Medium = Literal["video", "image", "text"]
Host = Literal["transformer", "unet", "language model", "block diffusion"]
HOSTS: frozenset[Host] = frozenset({"transformer", "unet", "language model", "block diffusion"})
# Kinds of networks whose self-attention shows a medium. The frames of a video are batch items to a U-Net's attention.
# Block diffusion models are text too, but what is put on their attention is written for them and names them.
HOSTS_OF: dict[Medium, frozenset[Host]] = {
    "video": frozenset({"transformer"}),
    "image": frozenset({"transformer", "unet"}),
    "text": frozenset({"language model"}),
}


Need = Literal["token grid", "step", "branch", "text span", "prefix cache", "trained weights"]
Kind = Literal["patch", "recipe", "surgery"]


@dataclass(frozen=True)
class Site:
    """A place in a model, or in its training, that a method can take. Its folder is ``sites/NAME``.

    Attributes:
        name: as registry, reports and documentation have it.
        exclusive: two methods there would compute the same thing twice, so it has one owner per model.
        slots: parts that different methods can own side by side, each part again with one owner; empty: it is one
            place.
        shared: further parts, which any number of methods can take.
    """

    name: str
    exclusive: bool
    slots: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()


# In the order of installation: what lies deeper in the network first, so that outer sites wrap finished inner ones.
SITES: dict[str, Site] = {
    site.name: site
    for site in (
        Site("linear", exclusive=False),
        Site("adapter", exclusive=False),
        Site("attention", exclusive=True),
        Site("embedding", exclusive=True),
        Site("kv cache", exclusive=True, slots=("codec", "policy")),
        Site("step cache", exclusive=True, slots=("inside", "output")),
        Site("decoding", exclusive=True, slots=("drafter", "gate")),
        Site(
            "training",
            exclusive=True,
            slots=("communication", "data", "schedule", "loss", "optimizer"),
            shared=("callback",),
        ),
        Site("surgery", exclusive=False),
    )
}


def place_known(place: str) -> bool:
    """Whether ``place`` is the name of a site, or ``"site: slot"`` of one."""
    name, _, slot = place.partition(": ")
    site = SITES.get(name)
    return site is not None and (place == name or slot in (*site.slots, *site.shared))


def place_in_words(place: str) -> str:
    """``"attention"`` as "attention site", ``"kv cache: codec"`` as "codec of the kv cache site"."""
    name, _, slot = place.partition(": ")
    return f"{slot} of the {name} site" if slot else f"{name} site"


def overlap(first: Iterable[str], second: Iterable[str]) -> str | None:
    """The first exclusive place that both take, a site (``"attention"``) or a slot of one (``"kv cache: codec"``);
    None if there is none. Whoever takes a site as a whole takes each of its slots."""
    ours, theirs = set(first), set(second)
    for name, site in SITES.items():
        if not site.exclusive:
            continue
        slots = {f"{name}: {slot}" for slot in site.slots}
        if name in ours & theirs or (name in ours and slots & theirs) or (name in theirs and slots & ours):
            return name
        if both := sorted(slots & ours & theirs):
            return both[0]
    return None


@dataclass(frozen=True)
class Facts:
    """What a method owns, needs and can do. The generic tests hold every method to its facts.

    Attributes:
        sites: the places in the model it takes: names of :data:`SITES`, or slots of one (``"kv cache: codec"``). One
            name may be given as a plain string.
        site: the one place, where it is one; None where a method takes several. Another way to give ``sites``.
        kind: a ``"patch"`` stands on a model and comes off again; a ``"recipe"`` stands on a training; a ``"surgery"``
            gives back a new model.
        needs: what the host must be able to tell it.
        media: kinds of hosts it is meant for; image hosts have one frame or no grid at all, text hosts are causal
            language models, where only the prefill is attended by a method.
        hosts: kinds of networks it works on; empty: all whose attention shows its media.
        families: of block-diffusion models (:data:`hf_accel.hosts.block_families.FAMILIES`) it works on, by name;
            empty: all.
        backward: gradients flow through it; otherwise calls that need gradients run dense and are counted.
        compile: works in a model under ``torch.compile(fullgraph=True)``.
        batched: handles batch > 1; other calls run dense and are counted.
        causal: an attention method that honours a causal mask; others run dense there.
        exact: computes the unpatched result (to rounding) at every setting.
        full_budget: settings at which an approximate method equals the unpatched model.
        full_budget_error: relative error of the output there, in fp32. Above 1e-5 only where no setting is exact
            (8-bit weights are 8-bit weights).
        budget: the setting that dials the density, all else equal; density rises or falls with it. Benchmarks search
            along it, the break-even table is keyed by it. None: no single setting does.
        dtypes: accepted by its kernels; calls in others run dense and are counted.
        max_head_dim: of its GPU kernels; larger heads take the torch form, and the report says so.
    """

    sites: frozenset[str] = frozenset()
    needs: frozenset[Need] = frozenset()
    media: frozenset[Medium] = frozenset({"video"})
    hosts: frozenset[Host] = frozenset()
    families: frozenset[str] = frozenset()
    backward: bool = False
    compile: bool = True
    batched: bool = True
    causal: bool = False
    exact: bool = False
    full_budget: dict[str, Any] = field(default_factory=dict)
    full_budget_error: float = 1e-5
    budget: str | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    max_head_dim: int = 256
    kind: Kind = "patch"
    site: str | None = None

    def __post_init__(self) -> None:
        given = {self.sites} if isinstance(self.sites, str) else set(self.sites)
        if self.site is not None and given - {self.site}:
            raise HFAccelError(f"Facts: site={self.site!r} beside sites={sorted(given)}; give one of the two.")
        sites = frozenset(given or ({self.site} if self.site is not None else ()))
        object.__setattr__(self, "sites", sites)
        object.__setattr__(self, "site", next(iter(sites)) if len(sites) == 1 else None)

    def at(self, site: str) -> bool:
        """Whether it takes a site, or a slot of it."""
        return any(place.partition(":")[0] == site for place in self.sites)

    @property
    def order(self) -> int:
        """Where it stands in the order of installation: with the outermost of its sites."""
        order = [*SITES]
        return max((order.index(site.partition(":")[0]) for site in self.sites), default=0)

    @property
    def sites_in_words(self) -> str:
        """The places it takes, for people, from the inside out."""
        return ", ".join(sorted(self.sites, key=lambda site: [*SITES].index(site.partition(":")[0])))

    @property
    def places(self) -> frozenset[tuple[Host, Medium]]:
        """The kinds of networks it works on, each with what their tokens show. A recipe stands on a training, whatever
        is trained, unless it names hosts."""
        if self.kind == "recipe":
            return frozenset((host, medium) for host in self.hosts or HOSTS for medium in HOSTS_OF)
        return frozenset((host, medium) for medium in self.media for host in self.hosts or HOSTS_OF[medium])
