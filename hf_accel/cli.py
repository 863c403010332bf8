"""The ``hf-accel`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from hf_accel import __version__, api
from hf_accel.errors import HFAccelError
from hf_accel.measure import bench
from hf_accel.measure import demo as demonstration


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    """``["top_p=0.8"]`` as ``{"top_p": 0.8}``; values are read as YAML."""
    out = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise HFAccelError(f"A setting is given as name=value; got {pair!r}.")
        out[name] = yaml.safe_load(value)
    return out


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-accel", description="Acceleration methods on loaded Hugging Face models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("methods", help="list the registered methods")
    demo = commands.add_parser("demo", help="unpatched against accelerated on a miniature pipeline, with pictures")
    demo.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for pictures and figures")
    demo.add_argument("--prompt", help="default: one in the words that the miniature knows")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--steps", type=int, help="default: 20 of mini-wan, 50 of mini-sd")
    demo.add_argument("--method", default="svg2")
    demo.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the method")
    attention = (
        commands.add_parser("bench", help="time methods")
        .add_subparsers(dest="what", required=True)
        .add_parser(
            "attention", help="all attention methods on one shape against the best dense attention, with quality"
        )
    )
    shape = attention.add_mutually_exclusive_group(required=True)
    shape.add_argument("--grid", type=int, nargs=3, metavar=("F", "H", "W"), help="frames, height, width in tokens")
    shape.add_argument("--tokens", type=int, help="a sequence without a grid")
    attention.add_argument("--heads", type=int, default=12)
    attention.add_argument("--head-dim", type=int, default=128)
    attention.add_argument("--dtype", choices=sorted(_DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    attention.add_argument("--methods", nargs="+", metavar="NAME", help="default: all")
    attention.add_argument("--densities", type=_numbers, default=bench.DENSITIES, metavar="0.5,0.3,0.15")
    attention.add_argument("--set", nargs="*", default=[], metavar="METHOD.NAME=VALUE", help="settings of the methods")
    attention.add_argument("--rounds", type=int, default=5, help="timed calls")
    attention.add_argument("--json", type=Path, help="file for the figures")
    attention.add_argument("--picture", type=Path, help="file for the picture of error against speed")
    return parser


_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def _bench(options: argparse.Namespace) -> None:
    settings: dict[str, dict[str, Any]] = {}
    for name, value in _settings(options.set).items():
        method, dot, setting = name.partition(".")
        if not dot:
            raise HFAccelError(f"A setting of a method is given as method.name=value; got {name!r}.")
        settings.setdefault(method, {})[setting] = value
    found = bench.bench_attention(
        grid=tuple(options.grid) if options.grid is not None else None,
        tokens=options.tokens,
        heads=options.heads,
        head_dim=options.head_dim,
        dtype=_DTYPES.get(options.dtype),
        methods=options.methods,
        densities=options.densities,
        settings=settings,
        rounds=options.rounds,
        announce=lambda words: print(f"... {words}", file=sys.stderr, flush=True),
    )
    print(found)
    if options.json is not None:
        found.save(options.json)
    if options.picture is not None:
        found.picture(options.picture)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. A mistake of the user prints its message, not a traceback."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "methods":
            for name, about in api.methods().items():
                print(f"{name:<16} {about['site']:<12} {about['summary']}  [{about['paper']}]")
        elif options.command == "bench":
            _bench(options)
        else:
            demonstration.demo(
                options.out,
                options.prompt,
                options.seed,
                options.method,
                options.steps,
                _settings(options.set),
            )
    except HFAccelError as error:
        print(f"hf-accel: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
