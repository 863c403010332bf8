"""Presets from a file, a folder or a repo on the Hub."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from hf_accel.declared import FILE_ENDINGS
from hf_accel.errors import PresetError
from hf_accel.presets.files import PRESET_FILE, read_file
from hf_accel.presets.preset import Preset

_REPO_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*\Z")


def is_reference(text: str) -> bool:
    """Whether a text names a preset's place (path or Hub repo) rather than a method or a shipped preset."""
    return "/" in text or "\\" in text or text.endswith(FILE_ENDINGS)


def load(reference: str, revision: str | None = None) -> Preset:
    """Read a preset from a file, from a folder with ``hf_accel.yaml``, or from a Hub repo with that file.

    Args:
        reference: a path that exists, else ``"owner/name"`` on the Hub.
        revision: branch, tag or commit of the Hub repo; the commit it resolved to is in the preset's origin.
            ``HF_HUB_OFFLINE``, ``HF_HOME`` and ``HF_ENDPOINT`` are honoured as huggingface_hub does.

    Raises:
        PresetError: no such place, or a file that is not a preset.
        InvalidSetting, UnknownMethod: with the file named.
    """
    path = Path(reference).expanduser()
    if path.exists():
        if revision is not None:
            raise PresetError(
                f"revision={revision!r} was given with {reference!r}, a local path. Revisions exist on the Hub only: "
                "leave it out, or call from a folder where no such path exists."
            )
        file = path / PRESET_FILE if path.is_dir() else path
        if not file.is_file():
            raise PresetError(f"Folder {reference!r} has no {PRESET_FILE}. Add one, or give the path of the YAML file.")
        return _beside(read_file(file, str(file)), str(file.parent))
    if not _REPO_ID.match(reference) or reference.endswith(FILE_ENDINGS):
        raise PresetError(
            f"No preset file {reference!r} here (looked in {Path.cwd()}). Give an existing path, or 'owner/name' of a "
            "Hub repo."
        )
    file = _download(reference, revision)
    # Cached files lie in snapshots/<commit>/: the one place that names the commit without another request.
    commit = file.parent.name
    return _beside(read_file(file, f"{reference} at commit {commit}"), f"{reference}@{commit}")


def _beside(preset: Preset, place: str) -> Preset:
    """``weights: .`` in a preset means the folder or repo it stands in."""
    wanted = tuple(
        replace(w, config=w.config.replace(weights=place)) if getattr(w.config, "weights", None) == "." else w
        for w in preset.wanted
    )
    return replace(preset, wanted=wanted)


def _download(repo: str, revision: str | None) -> Path:
    # Here, because they load an HTTP client, which whoever names a method or a file can do without.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision {revision!r}" if revision is not None else ""
    try:
        return Path(hf_hub_download(repo, PRESET_FILE, revision=revision))
    except GatedRepoError as error:
        why = "the repo is gated: ask for access on its page, then log in with `hf auth login`"
        raise PresetError(f"Preset {repo!r}{at}: {why}.") from error
    except RepositoryNotFoundError as error:
        why = (
            "there is no local path and no Hub repo of that name. Check the spelling; a private repo needs "
            "`hf auth login`"
        )
        raise PresetError(f"Preset {repo!r}{at}: {why}.") from error
    except RevisionNotFoundError as error:
        why = "the Hub repo has no such revision. Give a branch, a tag or a full commit hash"
        raise PresetError(f"Preset {repo!r}{at}: {why}.") from error
    except LocalEntryNotFoundError as error:  # before its base class EntryNotFoundError
        why = (
            "it is not in the local cache and the Hub could not be asked (offline mode, or no connection). Load it "
            "once online, or give a local file"
        )
        raise PresetError(f"Preset {repo!r}{at}: {why}.") from error
    except EntryNotFoundError as error:
        why = f"the Hub repo has no file {PRESET_FILE}, so it is no preset"
        raise PresetError(f"Preset {repo!r}{at}: {why}.") from error
    except (HFValidationError, HTTPError, OSError) as error:  # HTTPError: of the HTTP library the Hub client uses
        raise PresetError(f"Preset {repo!r}{at}: the download failed: {error}") from error
