"""Presets: files, folders and Hub repos that are read, and everything that is refused with words that help."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from hub_server import HubServer

from hf_accel.errors import InvalidSetting, PresetError, UnknownMethod
from hf_accel.hosts.target import Model
from hf_accel.patches.svg2 import SVG2Config
from hf_accel.presets import files
from hf_accel.presets.files import PRESET_FILE, dump, to_yaml
from hf_accel.presets.loading import is_reference, load
from hf_accel.presets.preset import Match, Preset, Wanted

GOOD = """\
hf_accel: 1
name: wan-fast
description: Two sentences. For people.
requires: {hf_accel: ">=0.1"}
models:
  - class: WanTransformer3DModel
    config: {num_layers: 40, image_dim: null}
    source: 720p
apply:
  - method: svg2
    version: 1
    settings: {top_p: 8e-1, num_q_centroids: 100, dense_steps: 10}
evidence:
  machine: one H100
  measured: 2026-01-31
  quality: {psnr_db: 27.5, prompts: [1, 2]}
"""
SHORT = "hf_accel: 1\nname: short\napply:\n  - {method: svg2, version: 1}\n"


def write(folder: Path, text: str, name: str = "fast.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


# -- what is read --------------------------------------------------------------------------------------------------


def test_a_file_is_read_in_full(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    read = load(path)
    assert read.name == "wan-fast"
    assert read.description == "Two sentences. For people."
    assert read.requires == ">=0.1"
    assert read.origin == f"preset {path}"
    assert read.wanted == (
        Wanted("svg2", SVG2Config(top_p=0.8, num_q_centroids=100, dense_steps=10), f"preset {path}"),
    )
    assert read.models == (Match("WanTransformer3DModel", {"num_layers": 40, "image_dim": None}, "720p"),)
    assert read.evidence == {
        "machine": "one H100",
        "measured": datetime.date(2026, 1, 31),
        "quality": {"psnr_db": 27.5, "prompts": [1, 2]},
    }


def test_a_folder_is_read_by_its_preset_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme" / "wan-fast").mkdir(parents=True)
    write(tmp_path / "acme" / "wan-fast", SHORT, PRESET_FILE)
    monkeypatch.chdir(tmp_path)
    read = load("acme/wan-fast")  # looks like a Hub repo; what lies here comes first
    assert read.wanted[0].config == SVG2Config()
    assert read.origin == f"preset acme/wan-fast/{PRESET_FILE}"


def test_a_preset_comes_back_from_its_own_file(tmp_path: Path) -> None:
    first = load(write(tmp_path, GOOD))
    second = load(str(dump(first, tmp_path / "again.yaml")))
    assert to_yaml(second) == to_yaml(first)
    assert second.evidence == first.evidence
    assert second.models == first.models
    assert [w.config for w in second.wanted] == [w.config for w in first.wanted]


def test_methods_are_written_under_the_name_of_the_file(tmp_path: Path) -> None:
    config = SVG2Config(top_p=np.float64(0.7), dense_steps=1.0)
    assert dump([Wanted("svg2", config, "")], tmp_path) == tmp_path / PRESET_FILE
    file = dump([Wanted("svg2", config, "")], tmp_path / "mine.yaml")
    read = load(str(file))
    assert read.name == "mine"
    assert read.wanted[0].config == config
    assert type(read.wanted[0].config.dense_steps) is float  # 1.0 is all steps, 1 is one step


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    wanted = (Wanted("svg2", SVG2Config(), ""),)
    for bad, words in (
        (Preset("two words", wanted), "'two words'"),
        (Preset("empty", ()), "a list with at least one entry"),
        (Preset("odd", wanted, evidence={"psnr": torch.zeros(())}), "holds a Tensor"),
    ):
        with pytest.raises(PresetError, match=words):
            dump(bad, tmp_path / "bad.yaml")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("svg2", False), ("wan2.1-t2v-14b-720p", False), ("acme/wan-fast", True), ("./fast", True),
        ("fast.yaml", True), ("fast.yml", True), ("..\\fast", True), ("", False),
    ],
)  # fmt: skip
def test_a_bare_word_is_no_reference(text: str, expected: bool) -> None:
    assert is_reference(text) is expected


class Denoiser(torch.nn.Module):
    def __init__(self, **config: Any):
        super().__init__()
        self.config = config


class Derived(Denoiser):
    pass


@pytest.mark.parametrize(
    ("match", "words"),
    [
        (Match("Denoiser"), None),
        (Match("Denoiser", {"layers": 40, "image": None, "patch": [1, 2, 2]}, "WAN"), None),
        (Match("Other"), "class is Derived, not Other"),
        (Match("Denoiser", {"layers": 30}), "layers is 40, not 30"),
        (Match("Denoiser", {"layers": 40, "image": 1280}), "image is None, not 1280"),
        (Match("Denoiser", source="cog"), "loaded from 'acme/Wan2.1', which does not contain 'cog'"),
    ],
)
def test_a_model_is_recognised_or_its_difference_named(match: Match, words: str | None) -> None:
    model = Model("transformer", Derived(layers=40, patch=(1, 2, 2), _name_or_path="acme/Wan2.1"))
    assert match.why_not(model) == words


def test_a_preset_is_meant_for_any_of_its_models() -> None:
    model = Model("transformer", Denoiser(layers=40))
    assert Preset("p", ()).why_not(model) is None
    assert Preset("p", (), (Match("Other"), Match("Denoiser"))).why_not(model) is None
    reason = Preset("p", (), (Match("Other"), Match("Denoiser", {"layers": 30}))).why_not(model)
    assert reason == ("preset 'p' is meant for other models: class is Denoiser, not Other; layers is 40, not 30")


# -- what is refused -----------------------------------------------------------------------------------------------

REFUSED = {
    "an unknown key": (
        SHORT + "aply: 1\n",
        "unknown key 'aply'; expected hf_accel, name, apply",
        "Did you mean 'apply'?",
    ),
    "an unknown inner key": (
        SHORT.replace("version: 1", "version: 1, seting: {}"),
        "unknown key 'apply[0].seting'",
        "Did you mean 'settings'?",
    ),
    "a duplicate key": (SHORT + "name: other\n", "duplicate key 'name'", "line 5"),
    "a duplicate setting": (
        SHORT.replace("version: 1", "version: 1, settings: {top_p: 0.8, top_p: 0.9}"),
        "duplicate key 'top_p'",
        "line 4",
    ),
    "a newer schema": (SHORT.replace("hf_accel: 1", "hf_accel: 2"), "written in schema 2", "reads up to 1. Upgrade"),
    "schema 0": (
        SHORT.replace("hf_accel: 1", "hf_accel: 0"),
        "at 'hf_accel'",
        "expected a schema version from 1 to 1; got 0",
    ),
    "a schema in words": (
        SHORT.replace("hf_accel: 1", "hf_accel: one"),
        "at 'hf_accel'",
        "expected a whole number; got 'one'",
    ),
    "a boolean schema": (SHORT.replace("hf_accel: 1", "hf_accel: true"), "at 'hf_accel'", "got True (bool)"),
    "no schema": (SHORT.replace("hf_accel: 1\n", ""), "expected a preset, which begins with 'hf_accel: 1'", "(dict)"),
    "a list": ("- 1\n", "expected a preset, which begins with 'hf_accel: 1'", "(list)"),
    "an empty file": ("", "expected a preset", "(NoneType)"),
    "no YAML": ("a: [1\n", "not a readable YAML file", 'fast.yaml", line 2'),
    "an impossible date": (SHORT + "evidence: {when: 2026-02-31}\n", "not a readable YAML file", "day"),
    "a Python object": (SHORT + "evidence: {x: !!python/name:os.system }\n", "not a readable YAML file", "python/name"),
    "an alias": (SHORT + "evidence: {a: &a [1], b: *a}\n", "aliases are not allowed", "line 5"),
    "deep nesting": ("[" * 2000, "not a readable YAML file", "recursion"),
    "no name": (SHORT.replace("name: short\n", ""), "key 'name' is missing", ""),
    "a name that is a number": (SHORT.replace("short", "3"), "at 'name'", "got 3 (int)"),
    "a name that is a path": (SHORT.replace("short", "../x"), "at 'name'", "expected a name of letters"),
    "nothing to apply": (
        SHORT.split("apply")[0] + "apply: []\n",
        "at 'apply'",
        "a list with at least one entry; got []",
    ),
    "a mapping to apply": (
        SHORT.split("apply")[0] + "apply: {svg2: 1}\n",
        "at 'apply'",
        "a list with at least one entry",
    ),
    "a bare method": (
        SHORT.split("apply")[0] + "apply: [svg2]\n",
        "at 'apply[0]'",
        "a mapping with method, version, settings",
    ),
    "no method": (SHORT.replace("method: svg2, ", ""), "key 'apply[0].method' is missing", ""),
    "no version": (SHORT.replace(", version: 1", ""), "key 'apply[0].version' is missing", ""),
    "a newer version": (
        SHORT.replace("version: 1", "version: 9"),
        "at 'apply[0]'",
        "version 9; this hf_accel knows 1 to 1",
    ),
    "a boolean version": (SHORT.replace("version: 1", "version: true"), "at 'apply[0].version'", "got True (bool)"),
    "settings in a list": (
        SHORT.replace("version: 1", "version: 1, settings: []"),
        "at 'apply[0].settings'",
        "expected a mapping with text keys; got []",
    ),
    "a method twice": (SHORT + "  - {method: svg2, version: 1}\n", "at 'apply[1].method'", "'svg2' stands there twice"),
    "another hf_accel": (SHORT + "requires: {hf_accel: '>=99'}\n", "needs hf_accel >=99; this is 0", ""),
    "a range that is none": (
        SHORT + "requires: {hf_accel: newest}\n",
        "at 'requires.hf_accel'",
        "expected a version range",
    ),
    "another package": (SHORT + "requires: {torch: '>=2'}\n", "unknown key 'requires.torch'", "expected hf_accel"),
    "a model without class": (SHORT + "models: [{config: {a: 1}}]\n", "key 'models[0].class' is missing", ""),
    "a model's config in a list": (SHORT + "models: [{class: A, config: [1]}]\n", "at 'models[0].config'", "(list)"),
    "a broken pattern": (
        SHORT + "models: [{class: A, source: '('}]\n",
        "at 'models[0].source'",
        "no regular expression",
    ),
    "evidence in words": (
        SHORT + "evidence: fast\n",
        "at 'evidence'",
        "expected a mapping with text keys; got 'fast' (str)",
    ),
    "an empty description": (SHORT + "description: ' '\n", "at 'description'", "expected text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_file_is_refused_with_file_and_key(case: str, tmp_path: Path) -> None:
    text, *words = REFUSED[case]
    path = write(tmp_path, text)
    with pytest.raises(PresetError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(path)
    for part in words:
        assert part in message


def test_a_wrong_setting_names_the_file_and_keeps_its_parts(tmp_path: Path) -> None:
    path = write(tmp_path, SHORT.replace("version: 1", "version: 1, settings: {top_p: 1.5}"))
    with pytest.raises(InvalidSetting) as caught:
        load(path)
    error = caught.value
    assert str(error) == (f"{path} at 'apply[0]': svg2: setting 'top_p' must be float > 0 and <= 1; got 1.5 (float).")
    assert (error.field, error.value, error.allowed) == ("top_p", 1.5, "float > 0 and <= 1")


def test_an_unknown_setting_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, SHORT.replace("version: 1", "version: 1, settings: {topp: 0.5}"))
    with pytest.raises(InvalidSetting, match=r"'topp' must be one of .*top_p, min_kc_ratio") as caught:
        load(path)
    assert str(caught.value).startswith(path)


def test_an_unknown_method_names_the_file_and_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, SHORT.replace("svg2", "sgv2"))
    with pytest.raises(UnknownMethod, match=r"'sgv2' is neither a method nor .* Did you mean 'svg2'") as caught:
        load(path)
    assert str(caught.value).startswith(f"{path} at 'apply[0].method': ")
    assert caught.value.near[0] == "svg2"


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path, SHORT + "#" * files.MAX_BYTES)
    with pytest.raises(PresetError, match=f"larger than {files.MAX_BYTES} bytes"):
        load(path)


def test_a_binary_file_is_no_preset(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(PresetError, match="cannot be read as text"):
        load(str(tmp_path / "x.yaml"))


@pytest.mark.parametrize(
    "reference", ["./x.yaml", "x.yml", "a/x.yaml", "./x", "/no/such/place", "~/no-such-preset", "a/b/c"]
)
def test_a_missing_path_is_never_looked_for_on_the_hub(
    reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("asked the Hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PresetError, match=r"No preset file .* Give an existing path, or 'owner/name'"):
        load(reference)


def test_a_folder_without_preset_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(PresetError, match=f"has no {PRESET_FILE}"):
        load(str(tmp_path))


def test_a_revision_of_a_local_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PresetError, match="Revisions exist on the Hub only"):
        load(write(tmp_path, SHORT), revision="main")


# -- the Hub -------------------------------------------------------------------------------------------------------

# Answers one JSON line per request, so that several loads share the cost of importing torch.
CLIENT = """
import json, sys
import torch
torch.set_num_threads(1)
from hf_accel import preset
from hf_accel.presets import files, loading
from hf_accel.errors import HFAccelError
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    try:
        read = preset.load(*json.loads(line))
        out = {"origin": read.origin, "top_p": read.wanted[0].config.top_p}
    except HFAccelError as error:
        out = {"error": type(error).__name__, "message": str(error), "cause": type(error.__cause__).__name__}
    print(json.dumps(out), flush=True)
"""


class Client:
    """A process that loads presets from the server; ``HF_ENDPOINT`` is read at import."""

    def __init__(self, hub: HubServer, home: Path, folder: Path, **env: str):
        clean = {
            k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder,
            env=clean | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"} | env,
        )  # fmt: skip
        assert self._answer() == "ready"

    def load(self, reference: str, revision: str | None = None) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([reference, revision]) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate(timeout=60)


def hub_preset(top_p: float) -> dict[str, str]:
    return {PRESET_FILE: SHORT.replace("version: 1", f"version: 1, settings: {{top_p: {top_p}}}")}


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub_home")


@pytest.fixture(scope="module")
def online(hub: HubServer, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(hub, home, tmp_path_factory.mktemp("online"))
    yield client
    client.close()


@pytest.fixture(scope="module")
def offline(hub: HubServer, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(hub, home, tmp_path_factory.mktemp("offline"), HF_HUB_OFFLINE="1")
    yield client
    client.close()


def test_a_hub_preset_follows_its_branch_and_names_the_commit(hub: HubServer, online: Client) -> None:
    first = hub.commit("acme/moves", hub_preset(0.5), tag="v1")
    assert online.load("acme/moves") == {"origin": f"preset acme/moves at commit {first}", "top_p": 0.5}
    second = hub.commit("acme/moves", hub_preset(0.6))
    assert second != first
    assert online.load("acme/moves") == {"origin": f"preset acme/moves at commit {second}", "top_p": 0.6}
    assert online.load("acme/moves", "v1") == {"origin": f"preset acme/moves at commit {first}", "top_p": 0.5}
    assert online.load("acme/moves", second) == {"origin": f"preset acme/moves at commit {second}", "top_p": 0.6}


def test_a_cached_commit_needs_no_request(hub: HubServer, online: Client) -> None:
    commit = hub.commit("acme/pinned", hub_preset(0.5))
    online.load("acme/pinned")
    before = len(hub.requests)
    assert online.load("acme/pinned", commit)["top_p"] == 0.5
    assert len(hub.requests) == before


def test_offline_reads_the_cache_without_a_request(hub: HubServer, online: Client, offline: Client) -> None:
    commit = hub.commit("acme/cached", hub_preset(0.5))
    online.load("acme/cached")
    hub.commit("acme/cached", hub_preset(0.6))
    before = len(hub.requests)
    expected = {"origin": f"preset acme/cached at commit {commit}", "top_p": 0.5}
    assert offline.load("acme/cached") == expected
    assert offline.load("acme/cached", commit) == expected
    assert len(hub.requests) == before


def test_offline_without_cache_says_what_to_do(hub: HubServer, offline: Client) -> None:
    hub.commit("acme/uncached", hub_preset(0.5))
    before = len(hub.requests)
    answer = offline.load("acme/uncached")
    assert (answer["error"], answer["cause"]) == ("PresetError", "LocalEntryNotFoundError")
    assert "not in the local cache and the Hub could not be asked (offline mode" in answer["message"]
    assert "Load it once online, or give a local file" in answer["message"]
    assert len(hub.requests) == before


def test_a_repo_that_is_not_there(online: Client) -> None:
    answer = online.load("acme/nothing")
    assert (answer["error"], answer["cause"]) == ("PresetError", "RepositoryNotFoundError")
    assert "'acme/nothing'" in answer["message"]
    assert "no local path and no Hub repo of that name" in answer["message"]


def test_a_repo_without_preset(hub: HubServer, online: Client) -> None:
    hub.commit("acme/model", {"config.json": "{}"})
    answer = online.load("acme/model")
    assert (answer["error"], answer["cause"]) == ("PresetError", "RemoteEntryNotFoundError")
    assert f"the Hub repo has no file {PRESET_FILE}" in answer["message"]


def test_a_revision_that_is_not_there(hub: HubServer, online: Client) -> None:
    hub.commit("acme/one", hub_preset(0.5))
    answer = online.load("acme/one", "v9")
    assert (answer["error"], answer["cause"]) == ("PresetError", "RevisionNotFoundError")
    assert "'acme/one' at revision 'v9': the Hub repo has no such revision" in answer["message"]


def test_a_name_that_the_hub_forbids(hub: HubServer, online: Client) -> None:
    before = len(hub.requests)
    answer = online.load("acme/a--b")
    assert (answer["error"], answer["cause"]) == ("PresetError", "HFValidationError")
    assert len(hub.requests) == before


def test_a_wrong_setting_names_repo_and_commit(hub: HubServer, online: Client) -> None:
    commit = hub.commit("acme/wrong", hub_preset(1.5))
    answer = online.load("acme/wrong")
    assert answer["error"] == "InvalidSetting"
    assert answer["message"].startswith(f"acme/wrong at commit {commit} at 'apply[0]': svg2: setting 'top_p'")


def test_a_download_that_breaks_off(hub: HubServer, online: Client) -> None:
    hub.commit("acme/broken", hub_preset(0.5))
    hub.broken.add(f"/acme/broken/resolve/main/{PRESET_FILE}")
    answer = online.load("acme/broken")
    assert answer["error"] == "PresetError"
    assert "'acme/broken': the download failed: " in answer["message"]
