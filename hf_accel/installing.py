"""The transaction that puts methods on models and takes them off: all of it, or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hf_accel import registry
from hf_accel.base import Given, Method
from hf_accel.errors import (
    NotApplicable,
    NothingPatched,
    RevertRefused,
)
from hf_accel.hosts.clocks.steps import Clocks, clocks
from hf_accel.hosts.foreign import standing
from hf_accel.hosts.target import Model, Target, resolve
from hf_accel.ledger import (
    MARK,
    AttributeChange,
    Change,
    Ledger,
    in_few_words,
    is_same,
    own_attribute,
    refusal,
    shortened,
)
from hf_accel.pickling import Hands, PutOn, picklable
from hf_accel.presets.preset import Wanted
from hf_accel.report import MethodReport


@dataclass
class Installation:
    """One method on one model: what is needed to report it and to undo it."""

    method: Method
    ledger: Ledger
    report: MethodReport
    handle: Any = None
    carrier: Any = None  # the model or training that it stands on


def installed(carrier: Any) -> tuple[Installation, ...]:
    """What stands on a model (not a pipeline) or on a training, in the order of application."""
    return tuple(marks_of(carrier))


def marks_of(carrier: Any) -> list[Installation]:
    return carrier.__dict__.get(MARK, [])


def install(target: Target, plan: list[tuple[Model, Wanted]]) -> list[tuple[Model, Installation]]:
    replaced = [
        (model, old) for model, wanted in plan for old in marks_of(model.carrier) if old.method.name == wanted.method
    ]
    # Put back as they are, not made anew, if what replaces them fails: some took hours, or were trained since.
    standing = [(model, marks_of(model.carrier), [*marks_of(model.carrier)]) for model, _ in replaced]
    undone = undo(replaced)
    # One clock per method, shared by the models of a pipeline: every installation accounts for every forward itself.
    of_method = {wanted.method: clocks(target.pipeline) for _, wanted in plan}
    former = {(model.name, old.method.name): old.method for model, old in replaced}
    done: list[tuple[Model, Installation]] = []
    try:
        for model, wanted in plan:
            earlier = former.get((model.name, wanted.method))
            done.append((model, _put(model, wanted, of_method[wanted.method], earlier)))
    except BaseException:
        undo(done)
        for (_, old), changes in zip(replaced, undone, strict=True):
            old.ledger.redo(changes)
        for model, marks, before in standing:
            model.carrier.__dict__[MARK] = marks  # the very list that was there
            _mark(model, before)
        raise
    return done


def _put(model: Model, wanted: Wanted, clock: Clocks, former: Method | None = None) -> Installation:
    config = wanted.config
    method = registry.get(config.METHOD)(config)
    method.given = Given(wanted.given)
    if former is not None:
        method.take_over(former)
    settings = config.to_dict()["settings"]
    report = MethodReport(method.name, settings, model.name, model.class_name, wanted.origin)
    installation = Installation(method, Ledger(), report, carrier=model.carrier)
    if method.stands_on and former is None and (reason := method.why_not(model)) is not None:
        raise NotApplicable(f"{method.name} on {model.name} ({model.class_name}): {reason}.")
    try:
        installation.handle = method.install(model, installation.ledger, report, clock)
        if not report.patched:
            raise NothingPatched(_nothing_in_words(installation))
        if model.trainer is None:
            installation.ledger.hold(picklable(type(model.module), Hands(_take_off, put_on_again)))
    except BaseException:
        installation.ledger.undo()
        raise
    foreign = standing(model.module) if model.trainer is None else []
    report.notes += [f"{entry.name} on the model: {entry.note}" for entry in foreign if entry.note]
    _mark(model, [*marks_of(model.carrier), installation])
    return installation


def _mark(model: Model, marks: list[Installation]) -> None:
    """Write down on a model, or on a training, what stands on it."""
    own = model.carrier.__dict__
    if not marks:
        own.pop(MARK, None)
        return
    own.setdefault(MARK, [])[:] = list(marks)


def _take_off(module: torch.nn.Module, installed: list[Installation]) -> None:
    undo([(Model("model", module), installation) for installation in installed])


def put_on_again(module: torch.nn.Module, plan: list[PutOn]) -> torch.nn.Module:
    """Put methods on a model that came out of a pickle, with what they had learned; returns the model.

    Raises:
        UnknownMethod: one is not installed here.
    """
    found = resolve(module)
    for wanted in plan:
        name = wanted.config.METHOD
        ((_, installation),) = install(found, [(found.models[0], Wanted(name, wanted.config, wanted.origin))])
        for key in installation.method.trainable_parameters():
            owner, _, leaf = key.rpartition(".")
            # The very objects: an optimizer in the same pickle has them too.
            setattr(module.get_submodule(owner), leaf, wanted.learned[key])
    return module


def _nothing_in_words(installation: Installation) -> str:
    """What a method says of a model in which it patched nothing, and what to do."""
    report, changes = installation.report, len(installation.ledger)
    skipped = [f"{one.module or 'the model itself'}: {one.reason}" for one in report.skipped]
    more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
    told = "; ".join(skipped[:5]) + more if skipped else "it looked at no module, or did not say which"
    words = f"{report.method} patched nothing in {report.model} ({report.model_class}). Left alone: {told}. "
    if changes:
        words += (
            f"It made {changes} changes through the ledger and reported none, so that nobody could tell what it did; "
            "they were undone. Its author adds a Patched to report.patched for every module it changes."
        )
    else:
        words += "Give it a model in which there is something to patch; hf_accel.explain(...) says which methods apply."
    return words


def undo(installed: list[tuple[Model, Installation]]) -> list[list[Change]]:
    """Undo in reverse order, all or nothing. Returns what was undone of each.

    Raises:
        RevertRefused: somebody changed the same later, or a method cannot be undone now; nothing was undone.
    """
    found = changed_since(installed)
    if found:
        where = dict.fromkeys(f"{installation.method.name} on {model.name}" for (model, installation), _, _ in found)
        raise refusal((words for _, _, words in found), in_few_words(where, 60))
    return _undo(installed)


def undo_the_rest(installed: list[tuple[Model, Installation]]) -> tuple[str, ...]:
    """Undo in reverse order and leave what somebody changed later. Returns what was left, in words, each by itself.

    Raises:
        RevertRefused: a method cannot be undone now, whoever changed what; nothing was undone.
    """
    found = changed_since(installed)
    _undo(installed)
    for _, change, _ in found:
        if isinstance(change, AttributeChange) and _made_a_class(change):
            change.new.__class__ = type(change.old)  # whoever kept it may put it back
    return tuple(words for _, _, words in found)


Found = tuple[tuple[Model, Installation], Change, str]


def changed_since(installed: list[tuple[Model, Installation]]) -> list[Found]:
    """What somebody else changed after these methods did: where, which change of ours, and what they made of it.

    Raises:
        RevertRefused: what stands above is another method of ours, or a method cannot be undone now.
    """
    found = []
    for place, (model, installation) in enumerate(installed):
        inside: set[int] = set()
        for change, words in installation.ledger.blocked([later.ledger for _, later in installed[place + 1 :]]):
            for other in marks_of(model.carrier):
                if other.ledger.restores(change) and not any(other is one for _, one in installed):
                    raise RevertRefused(
                        f"Cannot undo {installation.method.name} on {model.name}: {other.method.name} was applied on "
                        f"top of it ({shortened(words, 120)}). Nothing was changed. Take off both: "
                        "hf_accel.revert(model)"
                    )
            changed = getattr(change, "target", getattr(change, "module", None))
            inside = inside or {id(module) for module in model.module.modules()}
            # A module that is not in the model any more is nobody's concern.
            if not isinstance(changed, torch.nn.Module) or id(changed) in inside:
                found.append(((model, installation), change, words))
    return found


def _undo(installed: list[tuple[Model, Installation]]) -> list[list[Change]]:
    undone = []
    for model, installation in reversed(installed):
        undone.append(installation.ledger.undo(force=True))
        _mark(model, [other for other in marks_of(model.carrier) if other is not installation])
        _forget_in_copies(model.module, [change for change in undone[-1] if isinstance(change, AttributeChange)])
    return undone[::-1]


def _forget_in_copies(module: torch.nn.Module, undone: list[AttributeChange]) -> None:
    """Undo the same in copies that somebody made of what we had patched and put into the model: ``copy.copy(found)``,
    or ``type(found)()`` as the code of IP-adapters does. The ledger does not know them, and what they call is gone."""
    classes = {type(change.new): type(change.old) for change in undone if _made_a_class(change)}
    values: dict[type, dict[str, AttributeChange]] = {}
    for change in undone:
        if isinstance(change.new, str) and not isinstance(change.target, torch.nn.Module):
            values.setdefault(type(change.target), {})[change.name] = change
    if not classes and not values:
        return
    for sub in module.modules():
        for found in list(vars(sub).values()):
            if type(found) in classes:
                found.__class__ = classes[type(found)]
            for name, change in values.get(type(found), {}).items():
                if is_same(own_attribute(found, name), change.new):
                    AttributeChange(found, name, change.old, change.new).undo()


def _made_a_class(change: AttributeChange) -> bool:
    """Whether ``new`` is of a class that was made at run time to stand for that of ``old``."""
    ours, theirs = type(change.new), type(change.old)
    return ours.__base__ is theirs and (ours.__module__, ours.__name__) == (theirs.__module__, theirs.__name__)
