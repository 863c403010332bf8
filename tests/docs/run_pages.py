"""A process that runs the Python blocks of pages: it imports the libraries once and forks for every page.

A line comes in as JSON, the path of a page or the words of a command; what came of it goes out on a line, as JSON:
``error`` (None, or the traceback), ``output`` and ``seconds``. Blocks of one page share a namespace and a fresh folder;
pages share nothing. Of a command only the arguments are read.

    python tests/docs/run_pages.py README.md docs/svg2.md     # by hand: all that is printed is shown
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import importlib
import json
import os
import runpy
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path

ROOT = Path(__file__).parents[2]


def prepare(home: Path) -> None:
    """Environment first: what is read there is read when the libraries are imported."""
    os.environ |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name in ("HF_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN", "TRANSFORMERS_CACHE"):
        os.environ.pop(name, None)
    import stand_ins

    stand_ins.install()
    stand_ins.fill_hub(home / "hub")
    for module in (
        "matplotlib.pyplot",
        "peft",
        "torchmetrics",
        "transformers.trainer",
        "hf_accel.cli",
        "hf_accel.train",
    ):
        importlib.import_module(module)  # once here, not once for every page

    from hf_accel import registry

    registry.methods()
    gc.freeze()  # a page that collects garbage need not go through all that was imported


def run(page: str) -> None:
    """Run the blocks of a page in the current folder."""
    import stand_ins
    from code_blocks import python_blocks

    stand_ins.fill_folder(Path.cwd())
    module = types.ModuleType("page")
    sys.modules["page"] = module  # dataclasses look up the module of a class
    for block in python_blocks(page):
        if block.runs:
            began = time.monotonic()
            tree = ast.increment_lineno(ast.parse(block.code), block.line - 1)
            exec(compile(tree, page, "exec"), module.__dict__)
            print(f"--- {block}: {time.monotonic() - began:.1f} s", flush=True)


class ArgumentsRead(Exception):
    """The parser took them; what the program does with them is not asked here."""


def read_arguments(words: list[str]) -> None:
    """Start ``hf-accel ...``, ``python -m module ...`` or ``python file.py ...``, and stop when arguments are read.

    Raises:
        SystemExit: the program's parser refuses them.
    """
    understand = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        try:
            understand(self, args, namespace)
        except SystemExit as end:  # 0: it was asked for help
            if end.code:
                raise
        raise ArgumentsRead

    argparse.ArgumentParser.parse_args = parse_args
    program, *rest = words
    with contextlib.suppress(ArgumentsRead):
        if Path(program).name == "hf-accel":
            sys.argv = words
            importlib.import_module("hf_accel.cli").main()
        elif rest[0] == "-m":
            sys.argv = rest[1:]
            sys.path.append(str(ROOT / "zoo" / "src" / "hf_accel_zoo" / "training"))  # where one page says to go
            runpy.run_module(rest[1], run_name="__main__")
        else:
            sys.argv = [str(ROOT / rest[0]), *rest[1:]]
            sys.path.insert(0, str(Path(sys.argv[0]).parent))
            runpy.run_path(sys.argv[0], run_name="__main__")


def in_a_fork(work: str | list[str], home: Path) -> dict[str, object]:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=home) as folder:
        log = Path(folder) / "log"
        child = os.fork()
        if child == 0:
            place = Path(folder) / "page"
            place.mkdir()
            os.chdir(place)
            file = os.open(log, os.O_WRONLY | os.O_CREAT)
            os.dup2(file, 1)
            os.dup2(file, 2)
            code = 1
            try:
                run(work) if isinstance(work, str) else read_arguments(work)
                code = 0
            except SystemExit as end:  # 0: a program that was asked for help and is content
                code = 1 if end.code or isinstance(work, str) else 0
            except BaseException:  # noqa: BLE001 (whatever a page does ends here and is told)
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        output = log.read_text(errors="replace")
    error = output[-6000:] if status else None
    return {"error": error, "output": output, "seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        out = os.fdopen(os.dup(1), "w")  # libraries may print while they are prepared
        os.dup2(2, 1)
        prepare(Path(home))
        if sys.argv[1:]:
            for page in sys.argv[1:]:
                found = in_a_fork(page, Path(home))
                print(found["output"], f"=== {page}: {'failed' if found['error'] else 'ran'} in {found['seconds']} s\n")
        else:
            for line in sys.stdin:
                print(json.dumps(in_a_fork(json.loads(line), Path(home))), file=out, flush=True)
    sys.stderr.flush()
    os._exit(0)  # the libraries' own ends take seconds and print what concerns nobody


if __name__ == "__main__":
    main()
