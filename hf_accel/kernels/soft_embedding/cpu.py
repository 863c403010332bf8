"""Statistics and soft embeddings in plain torch, a stretch of the vocabulary at a time.

Nothing as large as the logits is made: temporaries of a stretch stay in the cache of a CPU. Right on any device.
"""

from __future__ import annotations

import torch

# So many logits are worked on at a time: fp32 temporaries of 1 MiB on a CPU; few launches on a GPU.
_ELEMENTS = 1 << 18
_ELEMENTS_GPU = 1 << 24
_LEAST = 1024


def entropy_lse(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`hf_accel.kernels.soft_embedding._entropy_lse`."""
    z = logits.reshape(-1, logits.shape[-1])
    top = z.new_full((len(z),), -torch.inf, dtype=torch.float32)
    index = z.new_zeros(len(z), dtype=torch.int64)
    inverses = [1.0] if temperature == 1 else [1.0, 1.0 / temperature]
    # Per temperature: sum of exp(x) and of x exp(x), where x is what a logit lies below the largest so far.
    sums = [(torch.zeros_like(top), torch.zeros_like(top)) for _ in inverses]
    for start, stop in _stretches(z, len(z)):
        part = z[:, start:stop].float()
        part_top, place = part.max(-1)
        new = torch.maximum(top, part_top)
        index = torch.where(part_top > top, place + start, index)
        base = torch.where(new == -torch.inf, 0.0, new)
        below = part - base[:, None]
        drop = top - base
        for i, inverse in enumerate(inverses):
            total, lost = sums[i]
            x = below if inverse == 1 else below * inverse
            fallen = drop * inverse
            decay = fallen.exp()
            weight = x.exp()
            lost = decay * (lost + torch.where(total == 0, 0.0, fallen * total))
            # The smallest number times its exp() is 0, like -inf; NaN stays NaN.
            sums[i] = decay * total + weight.sum(-1), lost + (weight * x.clamp(min=-1e30)).sum(-1)
        top = new
    base = torch.where(top == -torch.inf, 0.0, top)
    values = [top]
    for inverse, (total, lost) in zip(inverses, sums, strict=True):
        entropy = torch.where(total == 0, 0.0, total.log() - lost / total).clamp(min=0)
        values += [base * inverse + total.log(), entropy]
    return torch.stack(values), index


def soft_embed(
    logits: torch.Tensor,
    weight: torch.Tensor,
    lse: torch.Tensor,
    rows: torch.Tensor | None,
    temperature: float,
    scale: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """See :func:`hf_accel.kernels.soft_embedding._soft_embed`."""
    z = logits.reshape(-1, logits.shape[-1])
    lse = lse if rows is None else lse[rows]
    out = z.new_zeros(len(lse), weight.shape[1], dtype=torch.float32)
    for start, stop in _stretches(z, len(lse)):
        # In fp32: the product of a stretch alone would be rounded to a half dtype before it is added.
        out.addmm_(probabilities(_part(z, rows, start, stop), lse, temperature), weight[start:stop].float())
    return out.mul_(scale).to(out_dtype)


def soft_embed_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    weight: torch.Tensor,
    lse: torch.Tensor,
    rows: torch.Tensor | None,
    temperature: float,
    scale: float,
) -> torch.Tensor:
    """``scale * p^T grad`` ``[Vw, D]``: every row of it is written once."""
    z = logits.reshape(-1, logits.shape[-1])
    lse = lse if rows is None else lse[rows]
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    out[z.shape[1] :] = 0
    # bf16 has the range of fp32 and tensor cores; in fp16 the probabilities of a flat distribution are subnormal.
    dtype = torch.bfloat16 if weight.dtype == torch.bfloat16 and weight.is_cuda else torch.float32
    grad = (grad.float() * scale).to(dtype)
    for start, stop in _stretches(z, len(lse)):
        out[start:stop] = probabilities(_part(z, rows, start, stop), lse, temperature).to(dtype).mT @ grad
    return out


def probabilities(logits: torch.Tensor, lse: torch.Tensor, temperature: float) -> torch.Tensor:
    """``exp(z / T - lse)`` in fp32, 0 for banned tokens, ``[N, n]`` and ``[N]``. ``lse`` is finite wherever a token
    of the row is not banned."""
    finite = torch.where(lse == -torch.inf, 0.0, lse)
    x = logits.float() if temperature == 1 else logits.float() / temperature
    return (x - finite[:, None]).exp_()


def _part(z: torch.Tensor, rows: torch.Tensor | None, start: int, stop: int) -> torch.Tensor:
    part = z[:, start:stop]
    return part if rows is None else part[rows]


def _stretches(z: torch.Tensor, rows: int) -> list[tuple[int, int]]:
    """Begin and end of every stretch of columns."""
    elements = _ELEMENTS_GPU if z.is_cuda else _ELEMENTS
    length = max(_LEAST, elements // max(rows, 1))
    return [(start, min(start + length, z.shape[1])) for start in range(0, z.shape[1], length)]
