"""From the state of :mod:`train` to a folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

::

    python -m hf_accel_zoo.training.mini_sdar.assemble --state DIR/state.pt --out zoo/src/hf_accel_zoo/mini-sdar

Weights are stored in fp16 to keep the folder small; ask for `dtype=torch.float32` when loading.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from hf_accel.checkpoints.declaration import declare

from . import tasks
from .judge import load

REFERENCE = "mini-sdar"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, words split at spaces; decoding joins them with spaces."""
    words = Tokenizer(WordLevel(dict(tasks.IDS), unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="<eos>",
        pad_token="<eos>",
        mask_token="<mask>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=4096,
    )


def assemble(state: Path, out: Path, rcd: bool = False) -> None:
    """Write the model and its tokenizer to `out`. `rcd`: declare the weights as those of RCD's second stage."""
    model = load(state).half()
    if rcd:
        told = {"stage": 2, "mask_token_id": tasks.MASK, "reference": REFERENCE, "alpha_mode": "normalized-entropy"}
        declare(model, "rcd", told | {"t_res": 1.0, "temper_delta": False})
    model.save_pretrained(out)
    tokenizer().save_pretrained(out)


def heldout_file(per_task: int = 4, length: int = 256) -> list[dict]:
    """A few held-out items as text, for those who want no code of ours; :func:`tasks.heldout` makes any number."""
    found = []
    for task in tasks.TASKS:
        for seed in range(per_task):
            item = tasks.heldout(task, length, seed)
            texts = {"prompt": tasks.decode(item.prompt), "answer": tasks.decode(item.answer)}
            found.append({"task": task, "length": length, "seed": seed, **texts})
    return found


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--state", type=Path, required=True)
    ask.add_argument("--out", type=Path, required=True)
    ask.add_argument("--rcd", action="store_true")
    given = ask.parse_args()
    assemble(given.state, given.out, given.rcd)
    text = json.dumps(heldout_file(), indent=1)
    (Path(__file__).parent / "heldout.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
