"""From logits over a vocabulary to what diffusion language models feed back: entropy, top token, expected embedding.

RCD (arXiv 2601.22954) weighs the expected embedding of a position by its entropy; DiffusionGemma's self-conditioning
takes the embedding alone. With the log-sum-exp known, no kernel here writes a probability to memory unless that is
the cheaper way.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

from hf_accel.errors import UnsupportedByKernel
from hf_accel.kernels.common import checks
from hf_accel.kernels.common.dispatch import Choice, TritonLimits, choose, take

__all__ = ["EntropyStatistics", "backend_for", "entropy_lse", "normalized_entropy", "soft_embed"]

LIMITS = TritonLimits()


class EntropyStatistics(NamedTuple):
    """What one pass over logits ``z`` finds, each ``[...]``: fp32, the index int64. In nats.

    Attributes:
        lse: ``log sum exp(z)``; -inf for a row of which every token is banned (all logits -inf).
        entropy: of ``softmax(z)``, never negative; 0 for a banned row.
        lse_t: ``log sum exp(z / T)``; ``lse`` itself at T = 1.
        entropy_t: of ``softmax(z / T)``; ``entropy`` itself at T = 1.
        top_logit: the largest ``z``; ``exp(top_logit - lse)`` is the confidence of commit rules.
        top_index: where it stands, the lowest of equals.
    """

    lse: torch.Tensor
    entropy: torch.Tensor
    lse_t: torch.Tensor
    entropy_t: torch.Tensor
    top_logit: torch.Tensor
    top_index: torch.Tensor


def backend_for(logits: torch.Tensor, backend: str = "auto", weight: torch.Tensor | None = None) -> Choice:
    """What would run for ``logits``, and why; for :func:`soft_embed` with its ``weight``."""
    op = "entropy_lse" if weight is None else "soft_embed"
    return choose(op, logits if weight is None else weight, LIMITS, backend, head_dim=1)


def entropy_lse(logits: torch.Tensor, temperature: float = 1.0, *, backend: str = "auto") -> EntropyStatistics:
    """Log-sum-exp, entropy and top token of every row, in one pass over the logits.

    Sums are fp32 and relative to the largest logit, so that the entropy does not suffer from logits that are large
    together. A banned token (logit -inf) has probability 0 and adds nothing.

    Args:
        logits: ``[..., V]``, last axis contiguous; fp32, fp16 or bf16; below +inf. NaN makes its row NaN.
        temperature: T of ``lse_t`` and ``entropy_t``.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        EntropyStatistics: carries no gradient.

    Raises:
        UnsupportedByKernel: shapes, dtypes or a temperature that cannot be.
    """
    op = "entropy_lse"
    _check_logits(op, logits, temperature)
    values, index = _entropy_lse(_three_axes(logits.detach()), temperature, backend)
    lead = logits.shape[:-1]
    top_logit, lse, entropy, *tempered = (value.view(lead) for value in values.unbind())
    lse_t, entropy_t = tempered or (lse, entropy)
    return EntropyStatistics(lse, entropy, lse_t, entropy_t, top_logit, index.view(lead))


def normalized_entropy(entropy: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Entropy in nats as a share of the largest possible, ``H / log V`` in [0, 1] (RCD, eq. 3).

    Args:
        entropy: any shape.
        vocabulary: V, which for a padded head is what training took; 1 token has no entropy, and the share is 0.
    """
    if vocabulary < 1:
        raise UnsupportedByKernel(f"normalized_entropy: vocabulary must be at least 1; got {vocabulary}.")
    return (entropy / math.log(max(vocabulary, 2))).clamp(0, 1)


def soft_embed(
    logits: torch.Tensor,
    weight: torch.Tensor,
    lse: torch.Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    *,
    rows: torch.Tensor | None = None,
    top_k: int | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Expected embedding ``scale * softmax(logits / T) @ weight``.

    Probabilities are made from the logits in fp32, rounded to ``weight``'s precision on a GPU, where tensor cores
    multiply them (in fp16 those below 2^-29 lose digits), and summed in fp32. The result does not depend on the order
    in which programs finish.

    Args:
        logits: ``[..., V]``, last axis contiguous; fp32, fp16 or bf16, whatever ``weight`` is.
        weight: embeddings ``[Vw, D]``, last axis contiguous. ``Vw >= V``: rows from V on (padding) have no part.
        lse: ``log sum exp(logits / T)`` ``[...]`` in fp32, ``lse_t`` of :func:`entropy_lse` at this temperature. None:
            computed here, for all rows.
        temperature: T.
        scale: factor of the result, such as the sqrt(D) of Gemma's embeddings.
        rows: int64 ``[R]``, the rows of the flattened ``[N, V]`` to compute. Not checked on a GPU, where a row
            outside of 0..N-1 comes out as NaN.
        top_k: only so many of the most probable tokens, not renormalised. What is lost is at most the probability
            left out times the largest ``|weight_j|``.
        out_dtype: fp32, or ``weight``'s, which is the default.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; ``top_k`` is torch on every device.

    Returns:
        ``[..., D]``, or ``[R, D]`` with ``rows``. A row of banned tokens only is 0. Differentiable with respect to
        ``weight``.

    Raises:
        UnsupportedByKernel: what does not fit together, or logits that want a gradient.
    """
    op = "soft_embed"
    _check_logits(op, logits, temperature)
    _check_weight(op, logits, weight, out_dtype)
    lead = logits.shape[:-1] if rows is None else rows.shape
    checks.expect_one_device(op, logits=logits, weight=weight, lse=lse, rows=rows)
    if rows is not None:
        checks.expect(op, "rows", rows, {"R": None}, torch.int64)
    if lse is None:
        lse = entropy_lse(logits, temperature, backend=backend).lse_t
    elif lse.shape != logits.shape[:-1]:
        raise UnsupportedByKernel(f"{op}: lse must be {list(logits.shape[:-1])} like logits; got {list(lse.shape)}.")
    out_dtype = out_dtype or weight.dtype
    flat_lse = lse.detach().float().reshape(-1)
    if top_k is not None:
        take(op, Choice("torch", "top_k"))
        return _soft_embed_top(logits, weight, flat_lse, temperature, scale, rows, top_k).to(out_dtype).view(*lead, -1)
    out = _soft_embed(_three_axes(logits), weight, flat_lse, rows, temperature, scale, out_dtype, backend)
    return out.view(*lead, weight.shape[1])


def _soft_embed_top(
    logits: torch.Tensor,
    weight: torch.Tensor,
    lse: torch.Tensor,
    temperature: float,
    scale: float,
    rows: torch.Tensor | None,
    top_k: int,
) -> torch.Tensor:
    """``[R, D]`` from ``top_k`` tokens per row: an embedding bag, which gathers and sums in one pass."""
    if not 1 <= top_k <= logits.shape[-1]:
        raise UnsupportedByKernel(f"soft_embed: top_k must be in 1..{logits.shape[-1]}, the vocabulary; got {top_k}.")
    flat = logits.reshape(-1, logits.shape[-1])
    if rows is not None:
        flat, lse = flat[rows], lse[rows]
    top, index = flat.topk(top_k)
    p = torch.where(top == -torch.inf, 0.0, (top.float() / temperature - lse[:, None]).exp())
    return F.embedding_bag(index, weight, mode="sum", per_sample_weights=p.to(weight.dtype)) * scale


@torch.library.custom_op("hf_accel::entropy_lse", mutates_args=())
def _entropy_lse(logits: torch.Tensor, temperature: float, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``[B, S, V]`` -> fp32 ``[3 or 5, B * S]`` (top logit, lse, entropy, and both at a temperature that is not 1)
    and int64 ``[B * S]``."""
    # Chosen in here and not by the caller, whose code torch.compile traces: asking a GPU its name would break it.
    if take("entropy_lse", backend_for(logits, backend)) == "triton":
        from hf_accel.kernels.soft_embedding import triton

        # Triton launches on the current device, whatever the tensors are on.
        with torch.cuda.device_of(logits):
            return triton.entropy_lse(logits, temperature)
    from hf_accel.kernels.soft_embedding import cpu

    return cpu.entropy_lse(logits, temperature)


@_entropy_lse.register_fake
def _(logits, temperature, backend):
    rows = logits.shape[0] * logits.shape[1]
    values = logits.new_empty(3 if temperature == 1 else 5, rows, dtype=torch.float32)
    return values, logits.new_empty(rows, dtype=torch.int64)


@torch.library.custom_op("hf_accel::soft_embed", mutates_args=())
def _soft_embed(
    logits: torch.Tensor,
    weight: torch.Tensor,
    lse: torch.Tensor,
    rows: torch.Tensor | None,
    temperature: float,
    scale: float,
    out_dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    """``[B, S, V]``, ``[Vw, D]``, ``[B * S]`` -> ``[R, D]``."""
    if take("soft_embed", backend_for(logits, backend, weight)) == "triton":
        from hf_accel.kernels.soft_embedding import triton

        with torch.cuda.device_of(logits):
            return triton.soft_embed(logits, weight, lse, rows, temperature, scale, out_dtype)
    from hf_accel.kernels.soft_embedding import cpu

    return cpu.soft_embed(logits, weight, lse, rows, temperature, scale, out_dtype)


@_soft_embed.register_fake
def _(logits, weight, lse, rows, temperature, scale, out_dtype, backend):
    count = logits.shape[0] * logits.shape[1] if rows is None else rows.shape[0]
    return weight.new_empty(count, weight.shape[1], dtype=out_dtype)


@torch.library.custom_op("hf_accel::soft_embed_backward", mutates_args=())
def _soft_embed_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    weight: torch.Tensor,
    lse: torch.Tensor,
    rows: torch.Tensor | None,
    temperature: float,
    scale: float,
) -> torch.Tensor:
    """Gradient ``[Vw, D]`` of ``weight``, from which only dtype and shape are taken. Torch on every device: it is
    bound by writing what it returns."""
    from hf_accel.kernels.soft_embedding import cpu

    return cpu.soft_embed_backward(grad, logits, weight, lse, rows, temperature, scale)


@_soft_embed_backward.register_fake
def _(grad, logits, weight, lse, rows, temperature, scale):
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _save_for_backward(ctx, inputs, output):
    logits, weight, lse, rows, ctx.temperature, ctx.scale, _, _ = inputs
    ctx.save_for_backward(logits, weight, lse, rows)


def _backward(ctx, grad):
    logits, weight, lse, rows = ctx.saved_tensors
    grad_weight = None
    if ctx.needs_input_grad[1]:
        grad_weight = _soft_embed_backward(grad, logits, weight, lse, rows, ctx.temperature, ctx.scale)
    return None, grad_weight, None, None, None, None, None, None


_soft_embed.register_autograd(_backward, setup_context=_save_for_backward)


def _three_axes(logits: torch.Tensor) -> torch.Tensor:
    """``[..., V]`` as ``[B, S, V]``, without a copy up to three axes: a window of a sequence is common."""
    while logits.dim() < 3:
        logits = logits[None]
    return logits.flatten(0, -3) if logits.dim() > 3 else logits


def _check_logits(op: str, logits: torch.Tensor, temperature: float) -> None:
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise UnsupportedByKernel(f"{op}: logits must be [..., V] with V of at least 1; got {list(logits.shape)}.")
    if logits.dtype not in LIMITS.dtypes:
        raise UnsupportedByKernel(f"{op}: logits must be float32, float16 or bfloat16; got {logits.dtype}.")
    checks.expect_last_axis_contiguous(op, logits=logits)
    if not 0 < temperature < math.inf:
        raise UnsupportedByKernel(f"{op}: temperature must be a positive finite number; got {temperature!r}.")


def _check_weight(op: str, logits: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype | None) -> None:
    checks.expect(op, "weight", weight, {"V": None, "D": None})
    if weight.dtype not in LIMITS.dtypes:
        raise UnsupportedByKernel(f"{op}: weight must be float32, float16 or bfloat16; got {weight.dtype}.")
    if weight.shape[1] < 1:
        raise UnsupportedByKernel(f"{op}: weight has no dimensions: {list(weight.shape)}.")
    if weight.shape[0] < logits.shape[-1]:
        raise UnsupportedByKernel(
            f"{op}: logits are over {logits.shape[-1]} tokens, weight embeds {weight.shape[0]}. Cut the padding of the "
            f"head off: logits[..., :{weight.shape[0]}]."
        )
    if out_dtype not in (None, torch.float32, weight.dtype):
        raise UnsupportedByKernel(f"{op}: out_dtype must be float32 or weight's {weight.dtype}; got {out_dtype}.")
    checks.expect_last_axis_contiguous(op, weight=weight)
    if torch.is_grad_enabled() and logits.requires_grad:
        raise UnsupportedByKernel(
            f"{op}: there is a gradient to weight only, and logits want one. Pass logits.detach(), or compute "
            "softmax(logits) @ weight in torch."
        )
