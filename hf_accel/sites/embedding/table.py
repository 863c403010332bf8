"""The input embeddings of a model as one table, whatever stands in the place of the embedding module."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from hf_accel.errors import WeightsMismatch


class EmbeddingTable(NamedTuple):
    """Input embeddings of all tokens: ``scale * weight``, ``weight`` ``[V, D]``."""

    weight: torch.Tensor
    scale: float


def embedding_table(embedding: torch.nn.Module, vocabulary: int, device: torch.device) -> EmbeddingTable:
    """What the module gives for every token, differentiable like its output.

    A plain embedding, or one that only scales its rows (Gemma's), is its own weight. Anything else (LoRA on it, an
    offloaded or quantised weight) is asked for all tokens at once, which builds the table anew.

    Args:
        embedding: the model's ``get_input_embeddings()``.
        vocabulary: tokens that logits tell of.
        device: where token ids are.

    Raises:
        WeightsMismatch: it has fewer embeddings.
    """
    module: Any = embedding
    weight = getattr(module, "weight", None)
    if weight is not None and (rows := int(weight.shape[0])) < vocabulary:
        raise WeightsMismatch(
            f"Logits over {vocabulary} tokens cannot be mixed of {rows} input embeddings: the prediction is of a model "
            "with another vocabulary."
        )
    if isinstance(module, torch.nn.Embedding) and not module.weight.is_meta and module.max_norm is None:
        own = type(module).forward is torch.nn.Embedding.forward
        scale = 1.0 if own else _scale(module)
        if scale is not None:
            return EmbeddingTable(module.weight, scale)
    return EmbeddingTable(module(torch.arange(vocabulary, device=device)), 1.0)


def _scale(embedding: Any) -> float | None:
    """The number by which an embedding multiplies its rows, where it says so and does so."""
    told = getattr(embedding, "scalar_embed_scale", None) or getattr(embedding, "embed_scale", None)
    if told is None:
        return None
    scale = float(told)
    with torch.no_grad():
        probe = torch.arange(min(3, len(embedding.weight)), device=embedding.weight.device)
        rounded = torch.tensor(scale).to(embedding.weight.dtype).item()
        plain = embedding.weight[probe]
        given = embedding(probe)
        return next((s for s in (rounded, scale) if torch.equal(given, plain * s)), None)
