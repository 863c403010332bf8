"""From a pipeline in memory to a folder of the zoo."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn


def write_pipeline(pipe: Any, folder: Path) -> None:
    """Save `pipe` to `folder` in fp16, replacing what is there, and print its size. Converts the modules in place."""
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.half()
    if folder.exists():
        shutil.rmtree(folder)
    pipe.save_pretrained(folder)
    # diffusers loads in fp32 whatever the files hold; transformers loads in what the config says
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    for file in folder.rglob("*"):  # safetensors writes its files for the owner alone
        if file.is_file():
            file.chmod(0o644)
    total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {total / 1e6:.2f} MB")
