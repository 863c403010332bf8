"""mini-llama with its tokenizer, and the text that it is judged, calibrated and tuned on.

::

    from hf_accel.zoo import llama

    model, tokenizer = llama.load()
    windows = llama.windows(tokenizer, "heldout", count=64, length=512)
    items = llama.task.items("train", 1000)

Stock transformers loads the folder as well: `AutoModelForCausalLM.from_pretrained(zoo.path("mini-llama"))`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hf_accel.errors import InvalidSetting

from . import path
from .training.mini_llama import task, text

__all__ = ["documents", "encode_items", "load", "perplexity", "task", "windows"]


def load(dtype: torch.dtype = torch.float32) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model in eval mode and its tokenizer. The weights are stored in fp16."""
    folder = path("mini-llama")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model, PreTrainedTokenizerFast.from_pretrained(folder)


def documents(split: str) -> dict[str, str]:
    """Module name to text of the library's files of `split`: "train" to calibrate on, "heldout" to judge on."""
    if split not in text.SPLITS:
        raise InvalidSetting("zoo.llama.documents", "split", split, f"one of {', '.join(map(repr, text.SPLITS))}")
    return text.documents(split)


def windows(tokenizer: PreTrainedTokenizerFast, split: str, count: int, length: int = 512) -> Tensor:
    """`[count, length]` ids, evenly over the files of `split` laid one behind the other, `<eos>` behind each file.

    Raises InvalidSetting if the files hold fewer than `count * length` tokens, so windows never overlap.
    """
    documents(split)
    ids = text.ids(tokenizer.backend_tokenizer, split)
    if count < 1 or length < 1 or count * length > len(ids):
        given = f"{count} of {length} tokens"
        raise InvalidSetting("zoo.llama.windows", "count, length", given, f"windows within the {len(ids):,} tokens")
    return torch.from_numpy(text.windows(ids, count, length))


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids: Tensor, batch: int = 8) -> float:
    """Per token, of `[B, L]` ids, every row read from its start; its first token is given and not counted."""
    total = 0.0
    for rows in ids.split(batch):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
        total += float(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / ids[:, 1:].numel())


def encode_items(tokenizer: PreTrainedTokenizerFast, items: Sequence[task.Item]) -> dict[str, Tensor]:
    """A batch to tune on: `input_ids`, `attention_mask` and `labels`, `[B, L]`, padded on the right.

    Labels are -100 at prompts and pads, so that a loss is that of the answers with the newline that ends them.
    """
    prompts = tokenizer([item.prompt for item in items], add_special_tokens=False)["input_ids"]
    answers = tokenizer([item.answer for item in items], add_special_tokens=False)["input_ids"]
    longest = max(len(a) + len(b) for a, b in zip(prompts, answers, strict=True))
    ids = torch.full((len(items), longest), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    seen = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor([*prompt, *answer])
        labels[row, len(prompt) : end] = torch.tensor(answer)
        seen[row, :end] = 1
    return {"input_ids": ids, "attention_mask": seen, "labels": labels}
