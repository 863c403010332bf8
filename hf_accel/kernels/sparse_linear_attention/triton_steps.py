"""What the kernels of both branches and both directions share (imports triton)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(
    Base,
    rows,
    exists,  # bool like rows; read only if MASKED
    stride,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,  # a head spans 2**31 elements or more
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows of one head, ``[len(rows), BLOCK_D]``; what does not exist is 0 and is not read."""
    d = tl.arange(0, BLOCK_D)
    if WIDE:
        rows = rows.to(tl.int64)
    # Base + d is the same for every tile of a loop, and an offset of 32 bits is one multiply-add per row.
    pointers = (Base + d)[None, :] + (rows * stride)[:, None]
    if BLOCK_D == D and not MASKED:
        return tl.load(pointers)
    else:
        element = (d[None, :] < D) & exists[:, None] if MASKED else d[None, :] < D
        return tl.load(pointers, mask=element, other=0.0)


@triton.jit
def feature_map(x, FEATURE_MAP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """phi over the last axis of ``[rows, BLOCK_D]``, in fp32; 0 in the columns behind D."""
    x = x.to(tl.float32)
    inside = tl.arange(0, BLOCK_D)[None, :] < D
    if FEATURE_MAP == "softmax":
        if BLOCK_D != D:
            x = tl.where(inside, x, float("-inf"))
        x = tl.exp(x - tl.max(x, 1)[:, None])
        return x * (1.0 / tl.sum(x, 1))[:, None]
    elif FEATURE_MAP == "elu":
        x = tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
        return tl.where(inside, x, 0.0) if BLOCK_D != D else x
    else:
        return tl.maximum(x, 0.0)


@triton.jit
def feature_map_backward(features, gradient, FEATURE_MAP: tl.constexpr):
    """The gradient of x from phi(x) and the gradient of phi, all fp32."""
    if FEATURE_MAP == "softmax":
        return features * (gradient - tl.sum(features * gradient, 1)[:, None])
    elif FEATURE_MAP == "elu":
        return gradient * tl.minimum(features, 1.0)
    else:
        return tl.where(features > 0, gradient, 0.0)


@triton.jit
def add_linear_tile(phi_query, phi_key, value, acc, acc_sum, PRECISION: tl.constexpr):
    """Add one tile of keys to the numerator ``acc`` and the denominator ``acc_sum`` of linear attention."""
    weights = tl.dot(phi_query, tl.trans(phi_key), input_precision=PRECISION)
    acc_sum += tl.sum(weights, 1)
    return tl.dot(weights.to(value.dtype), value, acc, input_precision=PRECISION), acc_sum


@triton.jit
def load_vector(Vector, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """``sum phi`` of one head, fp32 ``[BLOCK_D]``."""
    i = tl.arange(0, BLOCK_D)
    return tl.load(Vector + i, mask=i < D, other=0.0)


@triton.jit
def add_dot_state(
    acc,  # [rows, BLOCK_D] fp32
    x,  # [rows, BLOCK_D]
    State,  # [PARTS, D, D] of one head, in the type of x: the parts add up to ``sum phi^T V``
    TRANSPOSED: tl.constexpr,
    PARTS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``acc + x @ state``, or with the state transposed."""
    i = tl.arange(0, BLOCK_D)
    # A loop and not two statements: registers for one part at a time.
    for part in range(0, PARTS):
        pointers = State + part * D * D + i[:, None] * D + i[None, :]
        if BLOCK_D == D:
            state = tl.load(pointers)
        else:
            state = tl.load(pointers, mask=(i[:, None] < D) & (i[None, :] < D), other=0.0)
        if TRANSPOSED:
            state = tl.trans(state)
        acc = tl.dot(x, state, acc, input_precision=PRECISION)
    return acc


@triton.jit
def finish_linear(
    phi_query,  # operand type
    features,  # phi_query in fp32
    acc,  # sum over the listed blocks, [BLOCK_M, BLOCK_D] fp32
    acc_sum,  # [BLOCK_M] fp32
    direct,  # acc is the result itself; otherwise the total minus acc
    State,
    StateSum,
    PARTS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Normalised output and denominator; both 0 where the scope of a row holds nothing."""
    if direct == 0:
        total_sum = tl.sum(features * load_vector(StateSum, D, BLOCK_D)[None, :], 1)
        acc = add_dot_state(-acc, phi_query, State, False, PARTS, D, BLOCK_D, PRECISION)
        acc_sum = total_sum - acc_sum
        # ReLU features may be orthogonal to all that is included: the difference is then rounding, not 0.
        acc_sum = tl.where(acc_sum > total_sum * 2e-6, acc_sum, 0.0)
    inverse = tl.where(acc_sum > 0, 1.0 / tl.where(acc_sum > 0, acc_sum, 1.0), 0.0)
    return acc * inverse[:, None], acc_sum
