"""``hf-accel bench attention``: the attention methods on one shape, against the best dense attention of the machine."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_accel import registry
from hf_accel.attention.call import AttentionCall, Layer, Step, TokenGrid
from hf_accel.errors import HFAccelError, InvalidSetting
from hf_accel.measure.budget import Dial, ungated
from hf_accel.measure.machine import describe_machine
from hf_accel.measure.pareto import Point, draw
from hf_accel.measure.synthetic import video_tokens
from hf_accel.measure.tables import align, times
from hf_accel.measure.timing import Timing, in_turn
from hf_accel.sites.attention.base import AttentionMethod, AttentionRunner

DENSITIES = (0.5, 0.3, 0.15)


@dataclass(frozen=True)
class Row:
    """One method at one budget.

    Attributes:
        wanted, density: asked for, and reached.
        settings: all of the method's.
        first_ms: the first call of a generation, with cold state; the kernels are compiled already.
        method_ms: later calls, selection included.
        dense_ms: the best dense attention, timed in turn with the method.
        ratio: dense over method; cannot exceed ``bound``, one over the density.
        relative_l1, cosine: of the output against dense attention in fp32.
        kernels: op -> backend.
    """

    method: str
    wanted: float
    density: float
    settings: dict[str, Any]
    first_ms: float
    method_ms: Timing
    dense_ms: Timing
    ratio: float
    bound: float
    relative_l1: float
    cosine: float
    kernels: dict[str, str]


@dataclass
class AttentionBench:
    """What :func:`bench_attention` found. ``skipped``: method -> why it has no rows."""

    shape: dict[str, Any]
    machine: dict[str, Any]
    dense: str = ""
    dense_ms: dict[str, Timing] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def save(self, file: Path) -> None:
        """Write JSON."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    def picture(self, file: Path) -> None:
        """Error against speed, one line per method; rows that turned out dense are left out."""
        points = [
            Point(row.method, row.ratio, row.relative_l1, f"{row.density:.2f}")
            for row in self.rows
            if row.density < 0.995
        ]
        title = f"{self._words()}\nnumbers: density; grey: not beaten in both; left of 1 dense is faster"
        x = f"speed: time of {self.dense} / time of the method, selection included"
        draw(file, points, x=x, y="relative L1 error", title=title, lower_y=True, log_y=True)

    def _words(self) -> str:
        shape = self.shape
        grid = "x".join(map(str, shape["grid"])) + " = " if shape["grid"] else ""
        return (
            f"{grid}{shape['tokens']} tokens, {shape['heads']} heads x {shape['head_dim']}, {shape['dtype']}, "
            f"{self.machine['device']}"
        )

    def __str__(self) -> str:
        head = ["method", "budget", "density", "dense ms", "ms", "first ms", "ratio", "bound", "L1 error", "cosine"]
        rows = []
        for row in self.rows:
            name = registry.get(row.method).facts.budget
            dial = f"{name}={_short(row.settings[name])}" if name is not None else "-"
            rows.append(
                [
                    row.method,
                    dial,
                    f"{row.density:.3f}",
                    f"{row.dense_ms.p50_ms:.2f}",
                    f"{row.method_ms.p50_ms:.2f}",
                    f"{row.first_ms:.2f}",
                    times(row.ratio),
                    times(row.bound),
                    f"{row.relative_l1:.3f}",
                    f"{row.cosine:.4f}",
                ]
            )
        lines = [self._words(), f"best dense: {self.dense}", align(head, rows)]
        lines += [f"{method}: {reason}" for method, reason in self.skipped.items()]
        return "\n".join(lines)


def bench_attention(
    *,
    grid: tuple[int, int, int] | None = None,
    tokens: int | None = None,
    heads: int = 12,
    head_dim: int = 128,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    methods: Sequence[str] | None = None,
    densities: Sequence[float] = DENSITIES,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    rounds: int = 5,
    seed: int = 0,
    announce: Callable[[str], Any] | None = None,
) -> AttentionBench:
    """Time attention methods on one shape at several densities, beside dense attention.

    Query, key and value are synthetic (:func:`~hf_accel.measure.synthetic.video_tokens`): times are representative,
    errors compare methods with each other and say little about a model's pictures; ``compare`` does that.

    Args:
        grid: frames, height, width in tokens; or ``tokens`` for a sequence without a grid.
        dtype: default bf16 on a GPU, fp32 on a CPU.
        methods: default: every registered attention method but ``dense``.
        densities: for each, the method's budget setting is searched until the density is near.
        settings: method -> settings other than its budget.
        rounds: timed calls.
        announce: called with words before every method.

    Raises:
        InvalidSetting: no shape, or a density outside of 0..1.
        UnknownMethod: no such method.
    """
    if (grid is None) == (tokens is None):
        raise InvalidSetting("bench", "grid", grid, "given, or tokens, and not both")
    for density in densities:
        if not 0 < density <= 1:
            raise InvalidSetting("bench", "densities", density, "over 0 and at most 1")
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    say = announce or (lambda words: None)
    names = list(methods) if methods is not None else [n for n in registry.methods() if n != "dense"]
    classes = {name: registry.get(name) for name in names}
    size = grid if grid is not None else (1, 1, int(tokens or 0))
    call = synthetic_call(size, heads, head_dim, dtype, device, seed, with_grid=grid is not None)
    shape = {
        "grid": list(grid) if grid is not None else None, "tokens": call.query.shape[2], "heads": heads,
        "head_dim": head_dim, "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    out = AttentionBench(shape, describe_machine(device))
    with torch.no_grad():
        say("dense")
        baselines = dense_baselines(call)
        out.dense_ms = in_turn(baselines, device, rounds)
        out.dense = min(out.dense_ms, key=lambda name: out.dense_ms[name].p50_ms)
        reference = in_fp32(call)
        for name, cls in classes.items():
            if not issubclass(cls, AttentionMethod):
                out.skipped[name] = f"works at the {cls.facts.sites_in_words}, not on attention"
                continue
            given = {**ungated(cls), **((settings or {}).get(name) or {})}
            try:
                dial = Dial(cls, functools.partial(_density, cls, call), given)
                for wanted in densities:
                    say(f"{name} at density {wanted}")
                    reached = dial.reach(wanted)
                    row = _measure(cls, reached.settings, wanted, call, baselines[out.dense], reference, rounds)
                    if not any(row.method == r.method and row.settings == r.settings for r in out.rows):
                        out.rows.append(row)
            except HFAccelError as error:  # this method cannot do this shape; the others may
                out.skipped[name] = str(error)
    return out


def synthetic_call(
    grid: tuple[int, int, int],
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    *,
    with_grid: bool = True,
) -> AttentionCall:
    """An attention call as a host would make it, in the middle of a generation, on synthetic tokens."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = video_tokens(grid, heads, head_dim, generator, device=device, dtype=dtype)
    scale = head_dim**-0.5
    return AttentionCall(
        query, key, value, None, scale, False, Layer("bench", 0, 1), TokenGrid(*grid) if with_grid else None,
        Step(10, 20, 500.0, 0.5, "cond", 0), lambda: F.scaled_dot_product_attention(query, key, value, scale=scale),
    )  # fmt: skip


def dense_baselines(call: AttentionCall) -> dict[str, Callable[[], torch.Tensor]]:
    """The dense attentions of torch that run this call: on a GPU flash, cuDNN, memory-efficient and FlexAttention."""
    if call.query.device.type != "cuda":
        return {"SDPA": call.dense}
    found: dict[str, Callable[[], torch.Tensor]] = {}
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    for name, backend in backends.items():

        def run(backend: SDPBackend = backend) -> torch.Tensor:
            with sdpa_kernel(backend):
                return call.dense()

        with contextlib.suppress(RuntimeError):  # torch has no kernel of this kind for the shape
            run()
            found[f"SDPA {name}"] = run
    from torch.nn.attention.flex_attention import flex_attention

    flex = torch.compile(flex_attention, dynamic=False)
    query, key, value, scale = call.query, call.key, call.value, call.scale
    found["FlexAttention"] = lambda: flex(query, key, value, scale=scale)
    return found


def in_fp32(call: AttentionCall) -> torch.Tensor:
    """Dense attention of a call computed in fp32, head by head."""
    heads = zip(*(x.split(1, dim=1) for x in (call.query, call.key, call.value)), strict=True)
    out = [F.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=call.scale) for q, k, v in heads]
    return torch.cat(out, dim=1)


def relative_l1(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Sum of the absolute differences over the sum of the absolute reference."""
    return float((out.float() - reference).abs().sum() / reference.abs().sum())


def _attend(cls: type[AttentionMethod], settings: Mapping[str, Any], call: AttentionCall) -> Callable[[], torch.Tensor]:
    """A function that runs the call once, with state that lives as long as it; and its last notes."""
    method = cls(cls.Config.build(settings))
    method.stand_alone(call.layer.count, call.query.shape[-1])
    runner = AttentionRunner(method)

    def run() -> torch.Tensor:
        call.notes.clear()
        return runner.attend(call)

    return run


def _density(cls: type[AttentionMethod], call: AttentionCall, settings: Mapping[str, Any]) -> float:
    _attend(cls, settings, call)()
    if "fallback" in call.notes:
        raise HFAccelError(f"runs dense here: {call.notes['fallback']}")
    return float(call.notes["density"].float().mean())


def _measure(
    cls: type[AttentionMethod],
    settings: dict[str, Any],
    wanted: float,
    call: AttentionCall,
    dense: Callable[[], torch.Tensor],
    reference: torch.Tensor,
    rounds: int,
) -> Row:
    device = call.query.device
    _attend(cls, settings, call)()  # kernels are compiled here
    run = _attend(cls, settings, call)
    first = in_turn({"first": run}, device, rounds=1, warmup=0)["first"]
    found = in_turn({"dense": dense, "method": run}, device, rounds)
    out = run()
    density = float(call.notes["density"].float().mean())
    kernels = {op: backend for op, (backend, _) in call.notes.get("kernels", {}).items()}
    return Row(
        cls.name,
        wanted,
        density,
        cls.Config.build(settings).to_dict()["settings"],
        first.p50_ms,
        found["method"],
        found["dense"],
        found["dense"].p50_ms / found["method"].p50_ms,
        1 / density,
        relative_l1(out, reference),
        float(F.cosine_similarity(out.float().flatten(), reference.flatten(), dim=0)),
        kernels,
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
