"""Presets as YAML: read strictly, written whole."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Never

from hf_accel import registry
from hf_accel.declared import NAME_PATTERN
from hf_accel.errors import InvalidSetting, PresetError, UnknownMethod
from hf_accel.presets.preset import Match, Preset, Wanted, plain

PRESET_FILE = "hf_accel.yaml"  # in a folder or at the root of a Hub repo
SCHEMA = 1  # value of the key `hf_accel`; rises when an older reader would misread a file
MAX_BYTES = 1 << 20  # a preset is a page of text; anything larger is a wrong file


def to_yaml(preset: Preset) -> str:
    """The text of a preset file; :func:`load` reads it back to an equal preset, origins aside.

    Raises:
        PresetError: something in it cannot be written, or could not be read back.
    """
    from hf_accel.presets import dialect  # PyYAML takes its time to load, and most who import this module read no file

    data: dict[str, Any] = {"hf_accel": SCHEMA, "name": preset.name}
    if preset.description:
        data["description"] = preset.description
    if preset.requires:
        data["requires"] = {"hf_accel": preset.requires}
    if preset.models:
        data["models"] = [match.to_dict() for match in preset.models]
    data["apply"] = [wanted.config.to_dict() for wanted in preset.wanted]
    if preset.evidence:
        data["evidence"] = preset.evidence
    try:
        text = dialect.dump(plain(data))
    except dialect.RepresenterError as error:
        raise PresetError(
            f"preset {preset.name!r} holds a {type(error.args[1]).__name__}; a file can hold text, numbers, dates, "
            "lists and mappings. Convert it first."
        ) from error
    parse(text, preset.name)
    return text


def dump(what: Preset | Iterable[Wanted], path: str | Path) -> Path:
    """Write a preset, or methods with their settings, as a preset file; a folder gets ``hf_accel.yaml``.

    Returns:
        Path: the file that was written.
    """
    path = Path(path).expanduser()
    file = path / PRESET_FILE if path.is_dir() else path
    if not isinstance(what, Preset):
        what = Preset(name=path.resolve().stem, wanted=tuple(what))
    file.write_text(to_yaml(what), encoding="utf-8")
    return file


@dataclass(frozen=True)
class Node:
    """A value in a YAML file that knows where it stands, so that a complaint can name file and key."""

    value: Any
    file: str
    path: str = ""

    def fail(self, expected: str) -> Never:
        at = f" at {self.path!r}" if self.path else ""
        raise PresetError(
            f"{self.file}{at}: expected {expected}; got {shorten(self.value)} ({type(self.value).__name__})."
        )

    def mapping(self, required: Iterable[str] = (), optional: Iterable[str] = ()) -> dict[str, Node]:
        """The entries of a mapping that has all required keys and none but the optional ones."""
        required, known = tuple(required), (*required, *optional)
        if not isinstance(self.value, dict):
            self.fail(f"a mapping with {', '.join(known)}")
        for key in self.value:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise PresetError(f"{self.file}: unknown key {self._join(key)!r}; expected {', '.join(known)}.{hint}")
        for key in required:
            if key not in self.value:
                raise PresetError(f"{self.file}: key {self._join(key)!r} is missing.")
        return {key: Node(value, self.file, self._join(key)) for key, value in self.value.items()}

    def any_mapping(self) -> dict[str, Any]:
        """A mapping of text to anything."""
        if not isinstance(self.value, dict) or not all(isinstance(key, str) for key in self.value):
            self.fail("a mapping with text keys")
        return self.value

    def items(self) -> list[Node]:
        """The entries of a list that is not empty."""
        if not isinstance(self.value, list) or not self.value:
            self.fail("a list with at least one entry")
        return [Node(value, self.file, f"{self.path}[{i}]") for i, value in enumerate(self.value)]

    def text(self, choices: tuple[str, ...] = ()) -> str:
        if not isinstance(self.value, str) or not self.value.strip():
            self.fail("text")
        if choices and self.value not in choices:
            self.fail("one of " + ", ".join(choices))
        return self.value.strip()

    def name(self) -> str:
        if not isinstance(self.value, str) or not NAME_PATTERN.match(self.value):
            self.fail("a name of letters, digits, '.', '_' and '-' that begins with a letter or digit")
        return self.value

    def integer(self) -> int:
        if not isinstance(self.value, int) or isinstance(self.value, bool):
            self.fail("a whole number")
        return self.value

    def _join(self, key: Any) -> str:
        return f"{self.path}.{key}" if self.path else str(key)


def read(text: str, file: str) -> Node:
    """Parse a YAML text of ours and check its schema version; ``file`` names it in complaints.

    Raises:
        PresetError: no YAML, a duplicate key, or a schema that this hf_accel does not know.
    """
    from hf_accel.presets import dialect  # as in to_yaml

    if len(text) > MAX_BYTES:
        raise PresetError(f"{file}: {len(text)} characters; a preset has at most {MAX_BYTES}. Is it another file?")
    try:
        value = dialect.load(text, file)
    except (dialect.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2026-02-31
        raise PresetError(f"{file}: not a readable YAML file: {error}") from error
    root = Node(value, file)
    if not isinstance(value, dict) or "hf_accel" not in value:
        root.fail(f"a preset, which begins with 'hf_accel: {SCHEMA}'")
    version = Node(value["hf_accel"], file, "hf_accel").integer()
    if version > SCHEMA:
        raise PresetError(
            f"{file}: written in schema {version}; this hf_accel {_version()} reads up to {SCHEMA}. Upgrade hf_accel."
        )
    if version < 1:
        Node(version, file, "hf_accel").fail(f"a schema version from 1 to {SCHEMA}")
    return root


def read_match(node: Node) -> Match:
    """``{class, config, source}``, the last two optional."""
    entries = node.mapping(required=("class",), optional=("config", "source"))
    source = entries["source"].text() if "source" in entries else ""
    try:
        re.compile(source)
    except re.error as error:
        raise PresetError(f"{node.file} at {entries['source'].path!r}: no regular expression: {error}.") from error
    config = entries["config"].any_mapping() if "config" in entries else {}
    return Match(entries["class"].text(), config, source)


def read_method(entries: Mapping[str, Node], origin: str) -> Wanted:
    """``{method, version, settings}`` with the settings checked by the method's own Config.

    The version is mandatory: without it a file would change its meaning when a method's settings do.
    """
    method = entries["method"]
    name = method.text()
    try:
        cls = registry.get(name)
    except UnknownMethod as error:
        error.args = (f"{method.file} at {method.path!r}: {error}",)
        raise
    where = f"{method.file} at {method.path.removesuffix('.method')!r}"
    data = {
        "method": name,
        "version": entries["version"].integer(),
        "settings": entries["settings"].any_mapping() if "settings" in entries else {},
    }
    try:
        config = cls.Config.from_dict(data)
    except InvalidSetting as error:
        owner = f"{where}: {error.owner}"
        raise InvalidSetting(owner, error.field, error.value, error.allowed) from error
    except PresetError as error:
        raise PresetError(f"{where}: {error}") from error
    return Wanted(name, config, origin)


def read_file(file: Path, label: str) -> Preset:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise PresetError(f"{label}: larger than {MAX_BYTES} bytes. Is it another file?")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PresetError(f"{label}: cannot be read as text: {error}") from error
    return parse(text, label)


def parse(text: str, label: str) -> Preset:
    """The preset in a YAML text; ``label`` names the text in complaints and in the origin.

    Raises:
        PresetError, InvalidSetting, UnknownMethod: as :func:`load`.
    """
    root = read(text, label)
    origin = f"preset {label}"
    entries = root.mapping(
        required=("hf_accel", "name", "apply"), optional=("description", "requires", "models", "evidence")
    )
    requires = _read_requires(entries["requires"]) if "requires" in entries else ""
    wanted = tuple(
        read_method(item.mapping(("method", "version"), ("settings",)), origin) for item in entries["apply"].items()
    )
    names = [w.method for w in wanted]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise PresetError(f"{label} at 'apply[{i}].method': {name!r} stands there twice; keep one.")
    return Preset(
        name=entries["name"].name(),
        wanted=wanted,
        models=tuple(map(read_match, entries["models"].items())) if "models" in entries else (),
        evidence=entries["evidence"].any_mapping() if "evidence" in entries else {},
        origin=origin,
        requires=requires,
        description=entries["description"].text() if "description" in entries else "",
    )


def _read_requires(node: Node) -> str:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet  # few presets say which versions they need

    wanted = node.mapping(required=("hf_accel",))["hf_accel"]
    try:
        specifier = SpecifierSet(wanted.text())
    except InvalidSpecifier:
        wanted.fail('a version range such as ">=0.1"')
    if not specifier.contains(_version(), prereleases=True):
        raise PresetError(
            f"{node.file}: needs hf_accel {wanted.text()}; this is {_version()}. Install a version that fits."
        )
    return wanted.text()


def _version() -> str:
    import importlib.metadata  # reads files of every package; wanted in complaints, and where versions are required

    return importlib.metadata.version("hf_accel")


def shorten(value: Any, width: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."
