"""diffusers' real ``LLaDA2Pipeline`` around the model of ``llada2``, with a tokenizer of letters."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline

from hf_accel.testing.models import llada2

MASK, EOS, BLOCK = 63, 62, 8


class Tokenizer:
    """Letters to ids, padded on the left."""

    mask_token_id, eos_token_id, chat_template = MASK, EOS, None

    def __call__(self, text, return_tensors, padding):
        rows = [[ord(letter) % 60 for letter in one] for one in ([text] if isinstance(text, str) else text)]
        length = max(map(len, rows))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row.tolist())) for row in rows]


class Recorder(BlockRefinementScheduler):
    """Keeps the logits that the pipeline has read."""

    read: list[torch.Tensor]

    def step(self, model_output, *args, **kwargs):
        self.__dict__.setdefault("read", []).append(model_output.clone())
        return BlockRefinementScheduler.step(self, model_output, *args, **kwargs)


def pipeline(model: torch.nn.Module | None = None, **fields: Any) -> Any:
    pipe: Any = LLaDA2Pipeline(model or llada2.build(**fields), Recorder(block_length=BLOCK), Tokenizer())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt(length: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(pipe: Any, ids: torch.Tensor | None = None, **settings: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Tokens of one call, and the logits of the active block at every step. Few tokens are committed at once."""
    given: dict[str, Any] = {
        "gen_length": 24, "num_inference_steps": 4, "threshold": 0.9, "editing_threshold": 0.9, "max_post_steps": 1,
        "eos_early_stop": False, "output_type": "seq", "generator": torch.Generator().manual_seed(0),
    }  # fmt: skip
    pipe.scheduler.__dict__["read"] = []
    if ids is not None:
        given["input_ids"] = ids
    elif "prompt" not in settings:
        given["input_ids"] = prompt(21)
    tokens = pipe(**given | settings).sequences
    return tokens, pipe.scheduler.read
