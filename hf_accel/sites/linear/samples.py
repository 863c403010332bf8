"""What a model is calibrated on: texts, token ids, or forwards, brought into the form of forwards.

Texts and token ids become sequences of a batch of their own without any padding, so that no pad can reach a statistic,
not even behind a router that mixes tokens. Forwards that the caller gives keep their form; which of their tokens are
pads, their own masks say (:func:`masks_of`).
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from hf_accel.errors import InvalidSetting, NotApplicable
from hf_accel.hosts.denoisers import describe
from hf_accel.hosts.target import is_a, kind

LONGEST = 2048  # tokens of a sequence, if the model takes as many: what GPTQ and most after it calibrate on
_SPARE = 4  # windows of a text are drawn from so many times as many as are needed
_TOKEN_KEYS = {"input_ids", "attention_mask", "token_type_ids", "special_tokens_mask", "labels", "length"}


@dataclass(frozen=True)
class Sample:
    """The arguments of one forward, tensors on the CPU."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` to call with: tensors on ``device``; what is no tensor is a copy (a cache would grow)."""
        args, kwargs = pytree.tree_map(lambda leaf: _fresh(leaf, device), (self.args, dict(self.kwargs)))
        return args, kwargs

    def digest(self) -> str:
        """Tells samples apart."""
        leaves, spec = pytree.tree_flatten((self.args, dict(self.kwargs)))
        sha = hashlib.sha256(str(spec).encode())
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                sha.update(f"{leaf.dtype}{list(leaf.shape)}".encode())
                sha.update(leaf.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            else:
                sha.update(type(leaf).__name__.encode())
        return sha.hexdigest()


@dataclass
class Calibration:
    """What to run, and in words what became of what was given."""

    samples: list[Sample]
    notes: list[str] = field(default_factory=list)


def calibration_from(
    given: Any,
    module: torch.nn.Module,
    tokenizer: Any = None,
    *,
    owner: str,
    samples: int = 128,
    sequence_length: int | None = None,
    windows: str = "auto",
    seed: int = 0,
) -> Calibration:
    """The forwards to calibrate a model on.

    Args:
        given: texts: a list of strings, a ``datasets`` data set (or any iterable of rows) with a column ``text`` or one
            column of strings; token ids: a tensor ``[N, S]``, a list of lists or 1-D tensors, what a tokenizer
            returns, or rows of that; forwards: a list of dicts of the model's keyword arguments; or a function without
            arguments that runs the model, such as a whole pipeline, whose forwards are recorded.
        module: the model.
        tokenizer: for texts.
        owner: the method, for the words of errors.
        samples: sequences (forwards) at most.
        sequence_length: tokens of a sequence at most; None: 2048, or as many as the model takes.
        windows: what becomes of texts. ``"joined"``: one after the other with the end-of-sequence token between, cut
            into sequences, of which some are drawn; as the paper does. ``"separate"``: each for itself. ``"auto"``:
            joined for language models, separate for text encoders, which see one prompt at a time.
        seed: of the draw.

    Raises:
        InvalidSetting: nothing is left of what was given, or it is not what this model takes.
    """
    if isinstance(given, str):
        raise InvalidSetting(owner, "calibration", given[:40], "a list of texts, not one string: calibration=[text]")
    if callable(given):
        return _thin(record_forwards(given, module, owner), samples)
    if isinstance(given, Mapping) and any(hasattr(value, "column_names") for value in given.values()):
        raise InvalidSetting(owner, "calibration", list(given), "one split of the data set: calibration=data['train']")
    if isinstance(given, Mapping):
        given = _rows_of(given) if "input_ids" in given else [given]
    first, items = _peek(given, owner)
    if isinstance(first, Mapping) and not _is_text_row(first) and not set(first) <= _TOKEN_KEYS:
        return _forwards(items, module, samples, owner)
    length = _sequence_length(module, sequence_length, owner)
    reader = _Reader(module, tokenizer, owner, samples, length, seed)
    if isinstance(first, str) or _is_text_row(first):
        joined = windows == "joined" or (windows == "auto" and kind(module) != "text encoder")
        return reader.joined(items) if joined else reader.separate(items)
    return reader.tokens(items)


def record_forwards(run: Callable[[], Any], module: torch.nn.Module, owner: str) -> Calibration:
    """The forwards that ``module`` gets while ``run()`` runs."""
    found: list[Sample] = []

    def note(_: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        found.append(Sample(*pytree.tree_map(_kept, (args, _uncached(kwargs, module)))))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.compiler.set_stance("force_eager"):
            run()
    finally:
        handle.remove()
    if not found:
        raise InvalidSetting(
            owner,
            "calibration",
            run,
            f"a function that runs the model: no forward of this {type(module).__name__} came",
        )
    return Calibration(found, [f"{len(found)} forwards recorded"])


def masks_of(sample: Sample, module: torch.nn.Module) -> list[torch.Tensor]:
    """Which tokens of a sample are no pads: bool ``[B, T]``, one for each argument that says so.

    Where text stands in one sequence with video, as the table of denoisers tells, that sequence has a mask too.
    """
    spec = describe(module)
    arguments = spec.arguments(sample.args, sample.kwargs) if spec is not None else dict(sample.kwargs)
    masks = [
        value.bool()
        for name, value in arguments.items()
        if "mask" in name and isinstance(value, torch.Tensor) and value.dim() == 2 and _is_binary(value)
    ]
    if spec is not None and spec.text != "none" and masks:
        dims = spec.dims(module, arguments)
        if dims is not None:
            video = torch.ones(len(masks[0]), dims[0] * dims[1] * dims[2], dtype=torch.bool)
            masks += [torch.cat([mask, video] if spec.text == "first" else [video, mask], 1) for mask in masks]
    return masks


def kept_tokens(x: torch.Tensor, masks: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Which tokens of ``x`` ``[..., n]`` are no pads, as its own shape tells; None: no mask speaks of them.

    Where several masks fit, a token counts that none of them hides.
    """
    lead = x.shape[:-1]
    fitting = [mask for mask in masks if mask.shape == lead] or [
        mask for mask in masks if len(lead) == 1 and mask.numel() == lead[0]
    ]
    if not fitting:
        return None
    return torch.stack([mask.reshape(lead) for mask in fitting]).all(0)


class _Reader:
    """Sequences of token ids from texts or ids."""

    def __init__(self, module: torch.nn.Module, tokenizer: Any, owner: str, samples: int, length: int, seed: int):
        self.module, self.tokenizer, self.owner = module, tokenizer, owner
        self.samples, self.length, self.seed = samples, length, seed
        self.names = _forward_parameters(module)
        self.notes: list[str] = []
        if "input_ids" not in self.names:
            raise InvalidSetting(
                owner, "calibration", "texts or token ids",
                f"forwards: {type(module).__name__} takes no input_ids. Give a list of dicts of its keyword arguments, "
                "or a function that runs the pipeline",
            )  # fmt: skip
        if "decoder_input_ids" in self.names:
            raise InvalidSetting(
                owner, "calibration", "texts or token ids",
                f"forwards: {type(module).__name__} needs decoder_input_ids too. Give a list of dicts of its keyword "
                "arguments",
            )  # fmt: skip

    def joined(self, items: Iterable[Any]) -> Calibration:
        """Texts one after the other, cut into windows."""
        begin, between = self._specials()
        window = self.length - len(begin)
        enough = _SPARE * self.samples * window
        stream: list[int] = []
        read = 0
        for ids in self._tokenised(items, special=False):
            stream += ids + between
            read += 1
            if len(stream) >= enough:
                break
        windows = [begin + stream[at : at + window] for at in range(0, len(stream), window)]
        whole = [ids for ids in windows if len(ids) == self.length]
        # What is left at the end is worth a sequence only where there is nothing longer.
        chosen = self._drawn(whole) if whole else windows
        self.notes.append(f"{len(chosen)} of {max(len(whole), 1)} windows of {read} texts")
        return self._calibration(chosen)

    def separate(self, items: Iterable[Any]) -> Calibration:
        return self._calibration(self._cut(self._tokenised(items, special=True)))

    def tokens(self, items: Iterable[Any]) -> Calibration:
        return self._calibration(self._cut(_ids_of(item, self.owner) for item in items))

    def _tokenised(self, items: Iterable[Any], special: bool) -> Iterator[list[int]]:
        if self.tokenizer is None:
            raise InvalidSetting(self.owner, "tokenizer", None, "the model's tokenizer, where calibration is texts")
        quiet = {"verbose": False} if is_a(self.tokenizer, "transformers", "PreTrainedTokenizerBase") else {}
        empty = 0
        for item in items:
            text = _text_of(item, self.owner)
            if text.strip():
                yield list(self.tokenizer(text, add_special_tokens=special, **quiet)["input_ids"])
            else:
                empty += 1
        if empty:
            self.notes.append(f"{empty} empty texts left out")

    def _specials(self) -> tuple[list[int], list[int]]:
        """What begins a sequence, and what stands between texts."""
        first, last = (getattr(self.tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
        starts = self.tokenizer is not None and list(self.tokenizer("a")["input_ids"][:1]) == [first]
        return [first] if first is not None and starts else [], [] if last is None else [last]

    def _cut(self, rows: Iterable[list[int]]) -> list[list[int]]:
        """Sequences of at most the length, as many as are wanted, in order; too long ones in several pieces."""
        out: list[list[int]] = []
        long = short = 0
        for ids in rows:
            if len(ids) < 2:
                short += 1
                continue
            long += len(ids) > self.length
            out += [ids[at : at + self.length] for at in range(0, len(ids), self.length)]
            if len(out) >= self.samples:
                break
        if long:
            self.notes.append(f"{long} sequences of more than {self.length} tokens cut")
        if short:
            self.notes.append(f"{short} sequences of less than two tokens left out")
        return [ids for ids in out if len(ids) > 1][: self.samples]

    def _drawn(self, windows: list[list[int]]) -> list[list[int]]:
        if len(windows) <= self.samples:
            return windows
        generator = torch.Generator().manual_seed(self.seed)
        places = torch.randperm(len(windows), generator=generator)[: self.samples].sort().values
        return [windows[place] for place in places.tolist()]

    def _calibration(self, sequences: list[list[int]]) -> Calibration:
        sequences = [ids for ids in sequences if len(ids) > 1]
        if not sequences:
            told = f" ({'; '.join(self.notes)})" if self.notes else ""
            raise InvalidSetting(
                self.owner, "calibration", "nothing", f"texts or ids of two tokens and more: none is left{told}"
            )
        config = getattr(self.module, "config", None)
        size = getattr(getattr(config, "text_config", None) or config, "vocab_size", None)
        largest = max(max(ids) for ids in sequences)
        if isinstance(size, int) and largest >= size:
            raise InvalidSetting(
                self.owner, "calibration", largest, f"token ids below {size}, the model's vocabulary: is the tokenizer "
                "this model's",
            )  # fmt: skip
        extra: dict[str, Any] = {"use_cache": False} if "use_cache" in self.names else {}
        samples = [Sample(kwargs={"input_ids": torch.tensor([ids])} | extra) for ids in sequences]
        tokens = sum(map(len, sequences))
        self.notes.insert(0, f"{len(samples)} sequences, {tokens} tokens, {max(map(len, sequences))} in the longest")
        return Calibration(samples, self.notes)


def _forwards(items: Iterable[Any], module: torch.nn.Module, samples: int, owner: str) -> Calibration:
    found = []
    for item in items:
        if not isinstance(item, Mapping):
            raise InvalidSetting(
                owner, "calibration", type(item).__name__, "all dicts of keyword arguments, like the first"
            )
        found.append(Sample(kwargs=pytree.tree_map(_kept, _uncached(item, module))))
    return _thin(Calibration(found, [f"{len(found)} forwards given"]), samples)


def _uncached(kwargs: Mapping[str, Any], module: torch.nn.Module) -> dict[str, Any]:
    """A forward without a cache of its own, where the caller says nothing of one: nobody would read it."""
    silent = "use_cache" in _forward_parameters(module) and not {"use_cache", "past_key_values"} & set(kwargs)
    return dict(kwargs) | ({"use_cache": False} if silent else {})


def _thin(calibration: Calibration, samples: int) -> Calibration:
    """At most ``samples`` forwards, evenly spread: neighbouring denoising steps are alike."""
    found = calibration.samples
    if len(found) > samples:
        calibration.samples = [found[i * len(found) // samples] for i in range(samples)]
        calibration.notes.append(f"{samples} of them kept, evenly spread")
    return calibration


def _sequence_length(module: torch.nn.Module, wanted: int | None, owner: str) -> int:
    config: Any = getattr(module, "config", None)
    config = getattr(config, "text_config", None) or config
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    limit = next((value for value in limits if isinstance(value, int)), None)
    if wanted is None:
        return min(LONGEST, limit or LONGEST)
    if limit is not None and wanted > limit:
        raise InvalidSetting(owner, "sequence_length", wanted, f"at most {limit}, the positions of this model")
    return wanted


def _forward_parameters(module: torch.nn.Module) -> set[str]:
    """Names that the model's forward takes; with ``**kwargs`` a cache that the config has can be turned off too."""
    parameters = inspect.signature(type(module).forward).parameters
    names = set(parameters)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and hasattr(
        getattr(module, "config", None), "use_cache"
    ):
        names.add("use_cache")
    return names


def _peek(given: Any, owner: str) -> tuple[Any, Iterator[Any]]:
    """The first item, and an iterator over all of them."""
    if isinstance(given, torch.Tensor):
        given = given[None] if given.dim() == 1 else given
    try:
        iterator = iter(given)
    except TypeError as error:
        raise InvalidSetting(
            owner, "calibration", type(given).__name__, "texts, token ids, dicts of arguments, or a function"
        ) from error
    first = next(iterator, None)
    if first is None:
        raise InvalidSetting(owner, "calibration", "nothing", "at least one text, sequence of ids, or forward")
    if isinstance(first, int):  # one sequence
        return [first], iter([[first, *iterator]])

    def chained() -> Iterator[Any]:
        yield first
        yield from iterator

    return first, chained()


def _rows_of(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a tokenizer returns for several texts, row by row; with arguments of another kind it is one forward."""
    ids = batch["input_ids"]
    if not set(batch) <= _TOKEN_KEYS:
        return [dict(batch)]
    if isinstance(ids, Sequence) and ids and isinstance(ids[0], int):
        return [dict(batch)]
    if isinstance(ids, torch.Tensor) and ids.dim() == 1:
        return [dict(batch)]
    return [{name: batch[name][i] for name in batch} for i in range(len(ids))]


def _is_text_row(item: Any) -> bool:
    return isinstance(item, Mapping) and any(isinstance(value, str) for value in item.values())


def _text_of(item: Any, owner: str) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, Mapping):
        texts = [name for name, value in item.items() if isinstance(value, str)]
        column = "text" if "text" in texts else texts[0] if len(texts) == 1 else None
        if column is not None:
            return item[column]
        raise InvalidSetting(
            owner, "calibration", list(item), "rows with a column 'text' or one column of strings: data.select_columns"
        )
    raise InvalidSetting(owner, "calibration", type(item).__name__, "all texts, like the first")


def _ids_of(item: Any, owner: str) -> list[int]:
    """Token ids of one sequence, without pads."""
    mask = None
    if isinstance(item, Mapping):
        mask, item = item.get("attention_mask"), item.get("input_ids")
    ids = item if isinstance(item, torch.Tensor) else torch.as_tensor(item)
    if ids.dim() == 2 and len(ids) == 1:
        ids, mask = ids[0], None if mask is None else torch.as_tensor(mask)[0]
    if ids.dim() != 1 or ids.is_floating_point() or (ids.numel() and int(ids.min()) < 0):
        raise InvalidSetting(
            owner, "calibration", f"{ids.dtype} {list(ids.shape)}", "sequences of token ids: whole numbers from 0 on"
        )
    if mask is not None:
        ids = ids[torch.as_tensor(mask).bool().to(ids.device)]
    return ids.tolist()


def _is_binary(value: torch.Tensor) -> bool:
    return value.dtype == torch.bool or bool(((value == 0) | (value == 1)).all())


def _kept(leaf: Any) -> Any:
    """A copy that later changes of the original do not reach."""
    if isinstance(leaf, torch.Tensor):
        return leaf.detach().to("cpu", copy=True)
    return _copied(leaf)


def _fresh(leaf: Any, device: torch.device) -> Any:
    return leaf.to(device, copy=True) if isinstance(leaf, torch.Tensor) else _copied(leaf)


def _copied(leaf: Any) -> Any:
    if leaf is None or isinstance(leaf, bool | int | float | str | torch.dtype | torch.device):
        return leaf
    try:
        return copy.deepcopy(leaf)
    except TypeError as error:
        raise NotApplicable(
            f"An argument of the calibration's forwards, a {type(leaf).__name__}, cannot be copied ({error}). Leave it "
            "out of the forwards."
        ) from error


__all__ = [
    "LONGEST", "Calibration", "Sample", "calibration_from", "kept_tokens", "masks_of", "record_forwards",
]  # fmt: skip
