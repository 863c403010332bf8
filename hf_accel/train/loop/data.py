"""From whatever the user has to the batch of a given number, so that a resumed run sees what it would have seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, TypeAlias

import torch
from torch.utils.data import Dataset, default_collate

from hf_accel.errors import InvalidSetting
from hf_accel.train.loop.random import generator_for

Batch: TypeAlias = Mapping[str, Any]
Data: TypeAlias = Callable[[int], Batch] | Dataset | Iterable[Batch]
Order: TypeAlias = Callable[[Any, int, int], Callable[[int], Sequence[Sequence[int]]]]


class Batches:
    """Batch number ``n`` of the training data, for rising ``n``.

    A function is asked for ``data(n)``. A torch ``Dataset`` of single examples is shuffled by (seed, epoch). Any other
    iterable (a ``DataLoader``, a list) yields whole batches in its own order, epoch after epoch; when a run is resumed
    the batches before are drawn and thrown away, and only an order that repeats gives the same curve.

    Args:
        order: of a recipe: ``(dataset, batch_size, seed) -> (epoch -> batches of indices)``, in place of the shuffle.

    Raises:
        InvalidSetting: fewer examples than a batch, or an order for something that has no numbered examples.
    """

    def __init__(self, data: Data, batch_size: int, seed: int, order: Order | None = None):
        self._data: Any = data
        self._batch_size, self._seed = batch_size, seed
        self._epoch, self._order = -1, torch.empty(0)
        self._iterator: Iterator[Batch] = iter(())
        self._next = 0
        # A class may be callable and iterable; what can be numbered needs no walk.
        self._kind = "dataset" if is_dataset(data) else "function" if callable(data) else "iterable"
        if isinstance(data, Sized) and self._kind == "dataset" and len(data) < batch_size:
            raise InvalidSetting("finetune", "batch_size", batch_size, f"at most the {len(data)} examples given")
        if order is not None and self._kind != "dataset":
            allowed = "a map-style torch Dataset of single examples, which a recipe here puts in order"
            raise InvalidSetting("finetune", "data", type(data).__name__, allowed)
        self._of_epoch = order(data, batch_size, seed) if order is not None else None
        self._batches: Sequence[Sequence[int]] = ()

    def __getitem__(self, number: int) -> Batch:
        if self._kind == "function":
            return self._data(number)
        if self._kind == "dataset":
            return self._examples(number)
        while self._next < number:
            self._draw()
        return self._draw()

    def _examples(self, number: int) -> Batch:
        if self._of_epoch is not None:
            return default_collate([self._data[i] for i in self._ordered(self._of_epoch, number)])
        epoch, place = divmod(number, len(self._data) // self._batch_size)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(len(self._data), generator=generator_for(self._seed, "epoch", epoch))
        chosen = self._order[place * self._batch_size : (place + 1) * self._batch_size].tolist()
        return default_collate([self._data[i] for i in chosen])

    def _ordered(self, of_epoch: Callable[[int], Sequence[Sequence[int]]], number: int) -> Sequence[int]:
        """The examples of batch ``number`` in a recipe's order, whose epochs have as many batches as the first."""
        if self._epoch < 0:
            self._epoch, self._batches = 0, of_epoch(0)
        if not self._batches:
            raise InvalidSetting("finetune", "recipe", "no batch in an epoch", "an order of one batch or more")
        epoch, place = divmod(number, len(self._batches))
        if epoch != self._epoch:
            batches = of_epoch(epoch)
            if len(batches) != len(self._batches):
                allowed = f"an order of {len(self._batches)} batches in every epoch, as in the first"
                raise InvalidSetting("finetune", "recipe", f"{len(batches)} batches in epoch {epoch}", allowed)
            self._epoch, self._batches = epoch, batches
        return self._batches[place]

    def _draw(self) -> Batch:
        try:
            batch = next(self._iterator)
        except StopIteration:
            self._iterator = iter(self._data)
            try:
                batch = next(self._iterator)
            except StopIteration:
                allowed = "something that yields batches each time it is iterated; a generator runs out after one epoch"
                raise InvalidSetting("finetune", "data", self._data, allowed) from None
        self._next += 1
        return batch


def is_dataset(data: Any) -> bool:
    """Whether ``data`` is a map-style torch Dataset of single examples."""
    return isinstance(data, Dataset) and hasattr(data, "__getitem__") and hasattr(data, "__len__")


def moved(value: Any, device: torch.device) -> Any:
    """A batch with its tensors on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: moved(inner, device) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(moved(inner, device) for inner in value)
    return value
