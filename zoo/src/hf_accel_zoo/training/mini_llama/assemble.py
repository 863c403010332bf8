"""From the state of :mod:`train` to a folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

::

    python -m hf_accel_zoo.training.mini_llama.assemble --state DIR --out zoo/src/hf_accel_zoo/mini-llama

Weights are stored in fp16 to keep the folder small; ask for `dtype=torch.float32` when loading.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from . import task
from .model import config, wrap


def assemble(state: Path, out: Path, kept: str = "average") -> None:
    """Write the model and its tokenizer, both of the training's folder `state`, to `out`."""
    model = LlamaForCausalLM(config())
    model.load_state_dict(torch.load(state / "state.pt", weights_only=True)[kept])
    model.half().save_pretrained(out)
    wrap(Tokenizer.from_file(str(state / "tokenizer.json"))).save_pretrained(out)
    for file in out.iterdir():  # safetensors writes its files for the owner alone
        file.chmod(0o644)


def heldout_file(per_task: int = 8) -> list[dict]:
    """A few held-out items as text, for those who want no code of ours; :func:`task.items` makes any number."""
    drawn = task.items("heldout", per_task * len(task.TASKS))
    return [{"task": item.task, "seed": 0, "prompt": item.prompt, "answer": item.answer} for item in drawn]


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--state", type=Path, required=True, help="folder of the training")
    ask.add_argument("--out", type=Path, required=True)
    given = ask.parse_args()
    assemble(given.state, given.out)
    (Path(__file__).parent / "heldout.json").write_text(json.dumps(heldout_file(), indent=1) + "\n")


if __name__ == "__main__":
    main()
