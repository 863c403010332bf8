"""Runs a network block by block over samples and gathers the Gram matrices of its linears' inputs on the way.

A block is reached through the model's own forward: blocks that are done give their kept output without computing, the
block in question runs, and the forward is broken off. So a block gets exactly what the model gives it, every keyword
and whatever the code between blocks makes (masks per kind of layer, rotary embeddings, streams of text and image, long
skips), and nothing of that is kept; what is kept are the outputs that a later block reads, on the CPU, in the model's
dtype. Which ones a block reads is asked of the model: NaN in the output of an earlier block shows up in the inputs of
those that read it.

Linears with one input have one Gram matrix (query, key and value; gate and up). That they have is seen when they run:
it is the same tensor, unchanged, in every sample.

Cost: the code between blocks runs twice per block and sample. Blocks that write to a cache which others read (the
encoder of DiffusionGemma) run anew whenever a later one is asked for. Where a block runs more than once per forward
(ALBERT), or there are none, the whole network is one block and all inputs come from the model as it was.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.errors import InvalidSetting
from hf_accel.hosts.layer_lists import layer_list
from hf_accel.quant.gram import Gram
from hf_accel.sites.linear.gates import (
    Gate,
    Mover,
    Reached,
    contents,
    differ,
    evaluating,
    gated,
    poisoned_tree,
)
from hf_accel.sites.linear.places import LinearSite
from hf_accel.sites.linear.samples import Sample, kept_tokens, masks_of


@dataclass(frozen=True)
class Gathered:
    """Linears with one input, and its second moments. ``gram.tokens`` is 0 if no sample reached them."""

    sites: tuple[LinearSite, ...]
    gram: Gram


class LayerStream:
    """The blocks of a model one after another::

        with LayerStream(model, samples, sites) as stream:
            for unit in stream:
                for stage in unit.stages():
                    for gathered in stage:
                        ...  # gathered.sites, gathered.gram; replace the linears here, or leave them
                # from here on later blocks see what the block now computes

    Inside the ``with`` the model is in eval mode, its blocks are held back, and with ``device`` it lies partly there;
    afterwards everything is as it was, but for what the caller replaced.

    Args:
        model: the network; ``unwrap`` it first.
        samples: forwards to run.
        sites: linears to gather for, from ``find_linears(model)``.
        device: where to compute; blocks are brought there one at a time, everything else at once. None: where they are.
        true_sequential: gather linear by linear in the order of execution (linears with one input at once), each time
            with those before it as the caller left them. Else all linears of a block see the block as it was.
        gram_dtype: of the sums: fp32 or fp64.
        progress: a bar, if tqdm is installed.
        title: of the bar.

    Raises:
        NotApplicable: the order of blocks depends on the sample; or ``device`` is given and the model is spread over
            devices by accelerate.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        samples: Sequence[Sample],
        sites: Sequence[LinearSite],
        *,
        device: torch.device | str | None = None,
        true_sequential: bool = False,
        gram_dtype: torch.dtype = torch.float32,
        progress: bool = True,
        title: str = "calibrating",
    ):
        if not samples:
            raise InvalidSetting("LayerStream", "samples", samples, "at least one forward")
        self.model, self.samples, self.sites = model, samples, sites
        self.true_sequential, self.gram_dtype = true_sequential, gram_dtype
        self.progress, self.title = progress, title
        self._masks = [masks_of(sample, model) for sample in samples]
        self._mover = Mover(model, None if device is None else torch.device(device))
        self.device = self._mover.device or _device_of(model)
        self._gates = {id(block): Gate(self, name, block) for name, block in _blocks(model)}
        self._order: list[Gate] = []
        self._last_use: list[int] = []
        self._at = 0
        self._sample = 0
        self._poisoned = False
        self._stack = ExitStack()

    def __enter__(self) -> LayerStream:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(evaluating(self.model))
            stack.enter_context(self._mover.holding([gate.block for gate in self._gates.values()]))
            stack.enter_context(gated(self._gates.values()))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.__exit__(*exc)
        for gate in self._gates.values():
            gate.outputs = {}

    def __iter__(self) -> Iterator[Unit]:
        units = self._survey()
        with _bar(len(units), self.title, self.progress) as bar:
            for self._at, unit in enumerate(units):
                if unit.gate is None:
                    yield unit
                else:
                    with self._mover.inside(unit.gate.block):
                        yield unit
                        self._advance(unit.gate)
                bar.update(1)

    # -- one forward ---------------------------------------------------------------------------------------------

    def forward(self, number: int) -> None:
        """Run sample ``number`` as far as the block in question."""
        self._sample = number
        for gate in self._gates.values():
            gate.calls = 0
        args, kwargs = self.samples[number].on(self.device)
        with suppress(Reached):
            self.model(*args, **kwargs)

    def passed(self, gate: Gate, args: tuple, kwargs: dict) -> Any:
        """A block was called."""
        gate.calls += 1
        if gate.action == "answer" and not gate.writes:
            return gate.answer(self._sample, self.device)
        if gate.action == "look":
            self._poisoned |= poisoned_tree((args, kwargs))
            raise Reached
        given = (*args, *kwargs.values())
        before = contents(given) if gate.action == "note" else []
        with self._mover.inside(gate.block):
            out = gate.forward(*args, **kwargs)
        if gate.action == "note":
            gate.writes |= differ(before, contents(given))
            gate.note(self._sample, out)
            if gate not in self._order:
                self._order.append(gate)
        elif gate.action == "keep":
            gate.keep(self._sample, out)
        if gate.action in ("keep", "stop"):
            raise Reached
        return out

    # -- before the first block ----------------------------------------------------------------------------------

    def _survey(self) -> list[Unit]:
        """Run the first sample through the whole model: which blocks there are in what order, and what they read."""
        reached: set[str] = set()
        for gate in self._gates.values():
            gate.action = "note"
        with _hooked(self.sites, lambda site, _: reached.add(site.name)):
            self.forward(0)
        if any(gate.calls > 1 for gate in self._gates.values()):
            self._order = []
        for gate in self._gates.values():
            gate.action = "run"
        units = self._units(reached)
        self._last_use = self._readers(units)
        return units

    def _units(self, reached: set[str]) -> list[Unit]:
        """One for each block that ran, and one for the linears that stand in none."""
        left = list(self.sites)
        units = []
        for gate in self._order:
            inside = set(map(id, gate.block.modules()))
            own = [site for site in left if any(id(place.module) in inside for place in (site, *site.tied))]
            left = [site for site in left if site not in own]
            units.append(Unit(self, gate.name, own, gate))
        if left:
            reachable = not self._order or any(site.name in reached for site in left)
            units.append(Unit(self, "outside of blocks", left, None, reachable))
        return units

    def _readers(self, units: list[Unit]) -> list[int]:
        """By block, the last unit that reads its output: at least the next, if there is one."""
        count = len(units) - (not units[-1].reachable)
        if any(gate.writes for gate in self._order):  # they run again and again, and read what they read
            return [count - 1] * len(self._order)
        last = [min(i + 1, count - 1) for i in range(len(self._order))]
        for reader in range(2, count):
            earlier = range(reader - 1)
            if self._reads(units[reader], earlier):
                for i in earlier:
                    if self._reads(units[reader], [i]):
                        last[i] = reader
        return last

    def _reads(self, unit: Unit, earlier: Iterable[int]) -> bool:
        """Whether NaN in the outputs of these blocks reaches the inputs of that unit."""
        earlier = set(earlier)
        stop = len(self._order) if unit.gate is None else self._order.index(unit.gate)
        for i, gate in enumerate(self._order):
            gate.action = "answer" if i < stop else "look"
            gate.poison = i in earlier
        self._poisoned = False

        def look(_: LinearSite, x: torch.Tensor) -> None:
            self._poisoned |= poisoned_tree(x)

        with _hooked([] if unit.gate else unit.sites, look):
            self.forward(0)
        for gate in self._order:
            gate.poison = False
        return self._poisoned

    # -- block by block ------------------------------------------------------------------------------------------

    def run_unit(self, number: int) -> None:
        """Run a sample through the block in question as it is now, from what the blocks before it put out."""
        self._set_actions("stop")
        self.forward(number)

    @property
    def masks(self) -> list[torch.Tensor]:
        """Which tokens of the sample that runs are no pads."""
        return self._masks[self._sample]

    def _set_actions(self, at: str) -> None:
        for i, gate in enumerate(self._order):
            gate.action = "answer" if i < self._at else at if i == self._at else "run"

    def _advance(self, gate: Gate) -> None:
        """Keep the outputs of a block as it is now, and let go of those that nobody reads any more."""
        if self._last_use[self._at] > self._at:
            self._set_actions("keep")
            for number in range(len(self.samples)):
                self.forward(number)
        for i, earlier in enumerate(self._order[: self._at]):
            if self._last_use[i] <= self._at:
                earlier.let_go()


@dataclass
class Unit:
    """A block with its sites, or the sites that stand in no block.

    Attributes:
        name: of the block.
        sites: in the order of modules.
    """

    stream: LayerStream
    name: str
    sites: list[LinearSite]
    gate: Gate | None = None
    reachable: bool = True

    def stages(self) -> Iterator[list[Gathered]]:
        """Gather Gram matrices. Linears are replaced between stages: those of a later one see what is there then."""
        if not self.sites:
            return
        if not self.reachable:
            yield _Collector(self.stream, self.sites, set()).result()
            return
        for sites in self._stages_by_execution() if self.stream.true_sequential else [self.sites]:
            yield self._gather(sites, range(len(self.stream.samples)))

    def _gather(self, sites: Sequence[LinearSite], numbers: Iterable[int]) -> list[Gathered]:
        """One pass over the samples; another one where linears that shared their input turn out not to."""
        alone: set[str] = set()
        while True:
            collector = _Collector(self.stream, sites, alone)
            with _hooked(sites, collector.hear):
                for number in numbers:
                    self.stream.run_unit(number)
                    apart = collector.end_of_forward()
                    if apart:
                        break
                else:
                    return collector.result()
            alone |= apart

    def _stages_by_execution(self) -> list[list[LinearSite]]:
        """Linears with one input at a time, in the order in which the first sample reaches them.

        Siblings, whose names differ in numbers only (experts), do not wait for each other; what is not reached comes
        last.
        """
        stages: dict[int, list[LinearSite]] = {}
        stage_of: dict[str, int] = {}
        late: list[LinearSite] = []
        for number, gathered in enumerate(self._gather(self.sites, [0])):
            if gathered.gram.tokens == 0:
                late += gathered.sites
                continue
            kinds = [re.sub(r"\d+", "*", site.name.removeprefix(self.name)) for site in gathered.sites]
            stage = min(stage_of.get(kind, number) for kind in kinds)
            stage_of |= dict.fromkeys(kinds, stage)
            stages.setdefault(stage, []).extend(gathered.sites)
        return [*stages.values(), *([late] if late else [])]


class _Collector:
    """Listens to linears while samples run, and adds up their inputs: once for those that get the same tensor."""

    def __init__(self, stream: LayerStream, sites: Sequence[LinearSite], alone: set[str]):
        self.stream, self.sites, self.alone = stream, sites, alone
        self.leader: dict[str, str] = {}  # by name, in the order in which they are reached first
        self.grams: dict[str, Gram] = {}
        self._since: dict[str, int] = {}  # the forward in which a linear was reached first
        self._forward = 0
        self._inputs: list[tuple[weakref.ref, tuple]] = []
        self._calls: dict[str, list[int]] = {}  # by name, which of the inputs of this forward it got

    def hear(self, site: LinearSite, x: torch.Tensor) -> None:
        """A linear is about to run on ``x``."""
        token, name = self._token(x), site.name
        calls = self._calls.setdefault(name, [])
        if name not in self.leader:
            self._since[name] = self._forward
            self.leader[name] = self._leader(name, token)
        calls.append(token)
        if self.leader[name] == name:
            self._gram(site).add(x, kept_tokens(x, self.stream.masks))

    def end_of_forward(self) -> set[str]:
        """Names of linears that shared a Gram matrix and did not get the same inputs in this forward."""
        calls = self._calls
        apart = {name for name, leader in self.leader.items() if calls.get(name) != calls.get(leader)}
        self._inputs, self._calls = [], {}
        self._forward += 1
        return apart

    def result(self) -> list[Gathered]:
        """In the order in which they were reached; those that were not at the end, one by one."""
        by_name = {site.name: site for site in self.sites}
        groups: dict[str, list[LinearSite]] = {}
        for name, leader in self.leader.items():
            groups.setdefault(leader, []).append(by_name[name])
        missing = [site for site in self.sites if site.name not in self.leader]
        found = [Gathered(tuple(sites), self.grams[leader]) for leader, sites in groups.items()]
        return found + [Gathered((site,), self._gram(site)) for site in missing]

    def _leader(self, name: str, token: int) -> str:
        """The linear whose Gram matrix this one shares: reached first in this very forward too, by the same tensor."""
        if name not in self.alone:
            for other, calls in self._calls.items():
                same = calls[:1] == [token] and self._since[other] == self._forward
                if same and self.leader[other] == other and other not in self.alone:
                    return other
        return name

    def _gram(self, site: LinearSite) -> Gram:
        if site.name not in self.grams:
            self.grams[site.name] = Gram(site.in_features, site.name, self.stream.gram_dtype, self.stream.device)
        return self.grams[site.name]

    def _token(self, x: torch.Tensor) -> int:
        """Number of an input in this forward: the same for the same memory with the same contents."""
        version = -1 if x.is_inference() else x._version
        key = (x.untyped_storage().data_ptr(), x.storage_offset(), x.shape, x.stride(), x.dtype, version)
        for token, (known, its_key) in enumerate(self._inputs):
            if its_key == key and known() is not None:  # while it lives nobody else has its memory
                return token
        self._inputs.append((weakref.ref(x), key))
        return len(self._inputs) - 1


@dataclass(eq=False)
class _Ear:
    """A forward pre-hook of a linear, which takes one tensor."""

    hear: Callable[[LinearSite, torch.Tensor], Any]
    site: LinearSite

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        self.hear(self.site, args[0] if args else next(iter(kwargs.values())))


@contextmanager
def _hooked(sites: Iterable[LinearSite], hear: Callable[[LinearSite, torch.Tensor], Any]) -> Iterator[None]:
    """Meanwhile ``hear(site, input)`` before each of these linears runs, wherever it stands."""
    handles = []
    try:
        for site in sites:
            for place in (site, *site.tied):
                handles.append(place.module.register_forward_pre_hook(_Ear(hear, site), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _blocks(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, blocks in layer_list(model):
        for index, block in enumerate(blocks):
            yield f"{name}.{index}", getattr(block, "_orig_mod", block)


def _device_of(model: torch.nn.Module) -> torch.device:
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def _bar(total: int, title: str, shown: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=title, unit="block", disable=not shown)


__all__ = ["Gathered", "LayerStream", "Unit"]
