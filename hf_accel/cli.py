"""The ``hf-accel`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_accel import __version__, api
from hf_accel.errors import HFAccelError
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
    demo = commands.add_parser("demo", help="dense against accelerated on the miniature Wan pipeline, with pictures")
    demo.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for pictures and figures")
    demo.add_argument("--prompt", default=demonstration.PROMPT)
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--steps", type=int, default=20)
    demo.add_argument("--method", default="svg2")
    demo.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the method")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. A mistake of the user prints its message, not a traceback."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "methods":
            for name, about in api.methods().items():
                print(f"{name:<16} {about['site']:<12} {about['summary']}  [{about['paper']}]")
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
