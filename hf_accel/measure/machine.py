"""On what a figure was measured: goes beside every figure."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hf_accel.sites.attention.break_even import device_name

PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft")


def describe_machine(device: torch.device | None = None) -> dict[str, Any]:
    """Device, threads, versions, date, and the commit of the source tree with what is changed in it.

    Args:
        device: that the figure is measured on; default: the GPU if there is one.
    """
    gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "changed_files": _git("status", "--porcelain", "--untracked-files=no"),
        "versions": {"python": platform.python_version()} | {p: v for p in PACKAGES if (v := _version(p))},
    }
    if gpu:
        properties = torch.cuda.get_device_properties(device)
        record |= {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    else:
        record |= {
            "device": device_name(torch.device("cpu")),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        }
        # A loaded machine spoils ratios, not only times: small calls wait for threads that are not running.
        record["load_average"] = round(os.getloadavg()[0], 2)
    return record


def _git(*arguments: str) -> str | None:
    """None where git or its directory is absent, as on a machine that got the files only."""
    here = str(Path(__file__).resolve().parent)
    try:
        done = subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
