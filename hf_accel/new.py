"""``python -m hf_accel.new NAME --site SITE``: an installable package with a method of one's own, to be filled in.

What is written computes what the model computes, and its tests pass as they are; a comment shows where the idea goes.
The texts are in ``skeletons/``, one for each site.
"""

from __future__ import annotations

import argparse
import importlib.util
import keyword
import re
import string
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_accel import __version__, registry
from hf_accel.errors import HFAccelError

SKELETONS = Path(__file__).parent / "skeletons"
# The grammar of names in Python's packaging specifications, without what could be no name of a method.
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\Z")


@dataclass(frozen=True)
class Skeleton:
    """What is written for one site.

    Attributes:
        about: what a method there does, in a few words.
        family: of tiny models in ``hf_accel.testing``, of which the tests ask the promises.
        settings: of these tests, as Python.
        test: the file with the tests, in :data:`SKELETONS`.
        door: how the method is put on, for the readme.
        needs: what the tests need beside pytest.
    """

    about: str
    family: str = ""
    settings: str = "{}"
    test: str = "test.txt"
    door: str = "hf_accel.apply(model, {method!r})"
    needs: tuple[str, ...] = ()


SITES: dict[str, Skeleton] = {
    "attention": Skeleton("computes self-attention", "wan"),
    "prefix-attention": Skeleton("attends from a block to its frozen prefix (block diffusion)", "diffusion-gemma"),
    "step-cache": Skeleton("begins a step inside of a U-Net, from what was kept", "unet", '{"interval": 2}'),
    "step-cache-output": Skeleton("leaves steps out and forecasts their output", "wan", '{"interval": 2}'),
    "kv-cache": Skeleton("stores keys and values as codes", "llama", '{"window": 4, "group_size": 4}'),
    "kv-policy": Skeleton("says which tokens stay in the K/V cache", "llama"),
    "embedding": Skeleton("mixes the last prediction into open positions (masked diffusion)", "llada"),
    "linear": Skeleton("puts something else in the place of linears", "llama"),
    "decoding": Skeleton("drafts the next tokens", "llama"),
    "training": Skeleton(
        "changes a training", test="test-training.txt", door="hf_accel.apply(trainer, {method!r})",
        needs=("accelerate>=1.10",),
    ),
    "surgery": Skeleton(
        "makes a new model of an old one", test="test-surgery.txt", door="hf_accel.convert(model, {method!r})"
    ),
}  # fmt: skip


def files_of(name: str, site: str) -> dict[str, str]:
    """The files of a package with one method, by their path in it.

    Args:
        name: of the distribution. The method has the same in lower case, with ``-`` between words; the module with
            ``_``.
        site: one of :data:`SITES`.

    Raises:
        HFAccelError: no such site; ``name`` can be no name of a distribution, of a module or of a method; or there is
            a method of that name, or a module.
    """
    if site not in SITES:
        told = "; ".join(f"{known} ({skeleton.about})" for known, skeleton in SITES.items())
        raise HFAccelError(f"There is no site {site!r} to write a method for. There are: {told}.")
    method, module = _names(name)
    skeleton = SITES[site]
    words = {
        "name": name,
        "method": method,
        "module": module,
        "cls": "".join(part[:1].upper() + part[1:] for part in module.split("_")),
        "site": site,
        "version": __version__,
        "family": skeleton.family,
        "settings": skeleton.settings,
        "test_needs": "".join(f', "{need}"' for need in skeleton.needs),
        "door": skeleton.door.format(method=method).replace("'", '"'),
        "call": "" if site == "surgery" else "()",
    }
    sources = {
        "pyproject.toml": "pyproject.txt",
        "README.md": "readme.txt",
        f"{module}/__init__.py": "init.txt",
        f"{module}/method.py": f"{site}.txt",
        f"tests/test_{module}.py": skeleton.test,
    }
    return {
        path: string.Template((SKELETONS / source).read_text(encoding="utf-8")).substitute(words)
        for path, source in sources.items()
    }


def _names(name: str) -> tuple[str, str]:
    """The names of the method and of the module in a distribution of that name."""
    if not _NAME.match(name) or not name[0].isalpha():
        raise HFAccelError(
            f"{name!r} cannot be the name of a package: letters, digits, '-', '_' and '.', it begins with a letter and "
            "ends with a letter or digit."
        )
    method = re.sub(r"[-_.]+", "-", name).lower()
    module = method.replace("-", "_")
    if keyword.iskeyword(module) or not module.isidentifier():
        raise HFAccelError(f"{name!r} cannot be the name of a package: its module {module!r} is a word of Python.")
    if method in registry.methods():
        raise HFAccelError(f"There is a method {method!r} already, of {registry.get(method).__module__}. Name it anew.")
    if module in sys.stdlib_module_names or importlib.util.find_spec(module) is not None:
        raise HFAccelError(f"There is a module {module!r} already, which the new one would hide. Name it anew.")
    return method, module


def write(files: Mapping[str, str], folder: Path) -> None:
    """Write files into a folder, all or none.

    Args:
        files: texts by their path in the folder.
        folder: made if it is not there.

    Raises:
        HFAccelError: one of them is there already, or cannot be written; then nothing is left of the others.
    """
    if there := [path for path in files if (folder / path).exists()]:
        raise HFAccelError(f"{folder} has {', '.join(there)} already; nothing was written. Choose another --into.")
    made: list[Path] = []
    try:
        for path, text in files.items():
            file = folder / path
            missing = [parent for parent in file.parents if not parent.exists()]
            for parent in reversed(missing):
                parent.mkdir()
                made.append(parent)
            with file.open("x", encoding="utf-8", newline="\n") as opened:
                made.append(file)
                opened.write(text)
    except OSError as error:
        for path_made in reversed(made):
            path_made.rmdir() if path_made.is_dir() else path_made.unlink()
        raise HFAccelError(f"{folder} cannot be written to ({error}); nothing was written.") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hf_accel.new",
        description="Write an installable package with a method of your own, to be filled in.",
    )
    parser.add_argument("name", metavar="NAME", help="of the package and of the method, such as my-window")
    parser.add_argument("--site", required=True, help=f"what the method changes: {', '.join(SITES)}")
    parser.add_argument("--into", type=Path, metavar="DIR", help="the package's folder; default: ./NAME")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. A mistake of the user prints its message, not a traceback."""
    options = _parser().parse_args(arguments)
    folder = options.into if options.into is not None else Path(options.name)
    try:
        files = files_of(options.name, options.site)
        write(files, folder)
    except HFAccelError as error:
        print(f"hf_accel.new: {error}", file=sys.stderr)
        return 2
    for path in files:
        print(folder / path)
    print(f'Next: cd {folder} && pip install -e ".[test]" && python -m pytest')
    return 0


if __name__ == "__main__":
    sys.exit(main())
