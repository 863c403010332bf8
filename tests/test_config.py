"""Settings: what is accepted, what is refused and in which words, and that nothing is lost in a file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from hf_accel import registry
from hf_accel.config import Config, describe_allowed, setting
from hf_accel.errors import HFAccelError, InvalidSetting, PresetError


@dataclass(frozen=True)
class Example(Config):
    METHOD = "example"
    VERSION = 2

    top_p: float = setting(0.9, "a budget", gt=0, le=1)
    clusters: int = setting(300, "a count", ge=1)
    cold: bool = setting(False, "a switch")
    dense_steps: int | float = setting(0.2, "a share", share=True)
    backend: str = setting("auto", "a choice", choices=("auto", "torch"))
    label: str | None = setting(None, "a text or nothing")
    shift: float = setting(0.0, "a number without bounds")


REFUSED = [
    ("top_p", 0.0, "float > 0 and <= 1"),
    ("top_p", 1.5, "float > 0 and <= 1"),
    ("top_p", float("nan"), "float > 0 and <= 1"),
    ("top_p", "0.9", "float > 0 and <= 1"),
    ("top_p", True, "float > 0 and <= 1"),
    ("top_p", None, "float > 0 and <= 1"),
    ("clusters", 0, "int >= 1"),
    ("clusters", 3.0, "int >= 1"),
    ("clusters", True, "int >= 1"),
    ("clusters", [300], "int >= 1"),
    ("cold", 1, "bool"),
    ("cold", "yes", "bool"),
    ("dense_steps", -1, "a count (int >= 0) or a fraction (float in 0..1)"),
    ("dense_steps", 1.2, "a count (int >= 0) or a fraction (float in 0..1)"),
    ("dense_steps", -0.1, "a count (int >= 0) or a fraction (float in 0..1)"),
    ("dense_steps", float("nan"), "a count (int >= 0) or a fraction (float in 0..1)"),
    ("dense_steps", True, "a count (int >= 0) or a fraction (float in 0..1)"),
    ("backend", "cuda", "one of 'auto', 'torch'"),
    ("backend", 1, "one of 'auto', 'torch'"),
    ("label", 3, "str | None"),
    ("shift", float("nan"), "float"),
]


@pytest.mark.parametrize(("field", "value", "allowed"), REFUSED)
def test_a_wrong_value_is_refused_with_field_value_and_range(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        Example.build({field: value})
    error = caught.value
    assert (error.owner, error.field, error.allowed) == ("example", field, allowed)
    assert error.value is value
    assert str(error) == (f"example: setting {field!r} must be {allowed}; got {value!r} ({type(value).__name__}).")
    assert isinstance(error, HFAccelError)
    assert isinstance(error, ValueError)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_p", 1.0), ("top_p", 1e-9), ("clusters", 1), ("cold", True), ("dense_steps", 0), ("dense_steps", 50),
        ("dense_steps", 0.0), ("dense_steps", 1.0), ("backend", "torch"), ("label", "x"), ("label", None),
    ],
)  # fmt: skip
def test_the_ends_of_a_range_are_accepted_as_given(field: str, value: Any) -> None:
    kept = getattr(Example.build({field: value}), field)
    assert kept == value
    assert type(kept) is type(value)


def test_an_int_is_taken_for_a_float_where_only_floats_are_meant() -> None:
    kept = Example(top_p=1).top_p
    assert (kept, type(kept)) == (1.0, float)


def test_a_share_keeps_the_difference_between_a_count_and_a_fraction() -> None:
    assert type(Example(dense_steps=1).dense_steps) is int
    assert type(Example(dense_steps=1.0).dense_steps) is float


def test_an_unknown_setting_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidSetting, match="'topp' must be one of top_p, clusters, cold") as caught:
        Example.build({"topp": 0.5})
    assert caught.value.field == "topp"


def test_replace_checks_like_the_constructor_and_leaves_the_original() -> None:
    config = Example()
    assert config.replace(top_p=0.5) == Example(top_p=0.5)
    assert config == Example()
    with pytest.raises(InvalidSetting, match="top_p"):
        config.replace(top_p=2.0)
    with pytest.raises(InvalidSetting, match="density"):
        config.replace(density=0.1)


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Example().top_p = 0.1  # type: ignore[misc]


CHANGED = Example(top_p=0.123456789, clusters=7, cold=True, dense_steps=1.0, backend="torch", label="0.5")


@pytest.mark.parametrize("config", [Example(), CHANGED, Example(dense_steps=3, top_p=1e-7)])
@pytest.mark.parametrize("format", ["json", "yaml"])
def test_a_file_gives_back_the_same_settings(config: Example, format: str) -> None:
    data = config.to_dict()
    read = json.loads(json.dumps(data)) if format == "json" else yaml.safe_load(yaml.safe_dump(data))
    back = Example.from_dict(read)
    assert back == config
    assert [type(v) for v in vars(back).values()] == [type(v) for v in vars(config).values()]


def test_a_file_may_name_some_settings_only() -> None:
    assert Example.from_dict({"settings": {"top_p": 0.5}}) == Example(top_p=0.5)
    assert Example.from_dict({"method": "example", "version": 1}) == Example()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"method": "example", "setting": {}}, "unknown key 'setting'; expected method, version, settings"),
        ({"method": "other"}, "method 'other' were given to 'example'"),
        ({"version": 3}, "version 3; this hf_accel knows 1 to 2. Upgrade"),
        ({"version": 0}, "version 0"),
        ({"version": "1"}, "version '1'"),
        ({"settings": [1]}, "'settings' must be a mapping; got list"),
    ],
)
def test_a_file_that_is_not_understood_is_refused(data: dict[str, Any], words: str) -> None:
    with pytest.raises(PresetError) as caught:
        Example.from_dict(data)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", sorted(registry.methods()))
def test_every_method_has_sound_settings(name: str) -> None:
    cls = registry.get(name).Config
    assert cls().to_dict()["method"] == name
    default = cls()
    assert cls.from_dict(json.loads(json.dumps(default.to_dict()))) == default
    for field in dataclasses.fields(cls):
        assert field.metadata["help"], f"{name}.{field.name} has no help"
        assert describe_allowed(field, field.type)


@dataclass(frozen=True)
class Shapes(Config):
    METHOD = "shapes"

    tile: tuple[int, int, int] | None = setting(None, "three counts or nothing")
    names: str | tuple[str, ...] = setting((), "a name or several")
    spans: tuple[tuple[int, int], ...] = setting((), "pairs")
    weights: tuple[float, ...] = setting((), "numbers")
    by_layer: dict[str, tuple[int, int]] | None = setting(None, "pairs by name")  # noqa: RUF009 (frozen all the same)
    order: list[int] | None = setting(None, "a list, as such")  # noqa: RUF009 (frozen all the same)
    either: list[int] | tuple[int, ...] | None = setting(None, "a list or a tuple or nothing")  # noqa: RUF009 (frozen all the same)
    strength: float | None = setting(None, "a number or nothing", gt=0)


LISTS = [
    ("tile", [1, 2, 3], (1, 2, 3)),
    ("names", ["a", "b"], ("a", "b")),
    ("names", "a", "a"),
    ("spans", [[1, 2], [3, 4]], ((1, 2), (3, 4))),
    ("spans", ([1, 2],), ((1, 2),)),
    ("weights", [1, 0.5], (1.0, 0.5)),
    ("by_layer", {"a": [1, 2]}, {"a": (1, 2)}),
    ("order", [3, 1], [3, 1]),
    ("either", [3, 1], [3, 1]),
    ("strength", 1, 1.0),
]


@pytest.mark.parametrize(("field", "given", "kept"), LISTS)
def test_a_list_is_a_tuple_where_a_tuple_is_meant_and_only_there(field: str, given: Any, kept: Any) -> None:
    built = (
        Shapes(**{field: given}),
        Shapes.build({field: given}),
        Shapes().replace(**{field: given}),
        Shapes.from_dict(yaml.safe_load(yaml.safe_dump({"settings": {field: json.loads(json.dumps(given))}}))),
    )
    for config in built:
        assert repr(getattr(config, field)) == repr(kept)
        assert Shapes.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_tuple_that_fits_stays_the_same_object() -> None:
    spans = ((1, 2), (3, 4))
    assert Shapes(spans=spans).spans is spans


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tile", [1, 2]), ("tile", [1, 2, 3, 4]), ("tile", [1, 2, "3"]), ("tile", [1, 2, True]), ("tile", "123"),
        ("names", [1]), ("names", {"a": 1}), ("spans", [1, 2]), ("spans", [[1, 2, 3]]), ("weights", [None]),
        ("by_layer", {"a": [1]}), ("order", (3, 1)), ("strength", 0), ("strength", True), ("strength", 10**400),
    ],
)  # fmt: skip
def test_a_list_that_cannot_be_the_tuple_is_refused_as_it_was_given(field: str, value: Any) -> None:
    with pytest.raises(InvalidSetting) as caught:
        Shapes.build({field: value})
    assert caught.value.value is value
