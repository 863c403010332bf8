"""Gram: one mean however the tokens come, pads left out, bad tokens named."""

from __future__ import annotations

import pytest
import torch

from hf_accel.errors import QuantizationError
from hf_accel.quant.gram import Gram


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_twice_the_mean_outer_product_in_whatever_pieces_tokens_come():
    x = gaussian(50, 12)
    exact = 2 * x.double().t() @ x.double() / 50
    whole, pieces = Gram(12), Gram(12, dtype=torch.float64)
    whole.add(x)
    for piece in (x[:7], x[7:8], x[8:8], x[8:50].view(2, 3, 7, 12)):
        pieces.add(piece)
    assert whole.tokens == pieces.tokens == 50
    torch.testing.assert_close(whole.matrix().double(), exact, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(pieces.matrix(), exact, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(pieces.matrix(), pieces.matrix().t(), atol=1e-12, rtol=1e-12)


def test_pads_never_enter_even_if_they_are_nan():
    x = gaussian(2, 5, 8)
    keep = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    x[~keep] = float("nan")
    ours, theirs = Gram(8), Gram(8)
    ours.add(x, keep)
    theirs.add(x[keep])
    assert ours.tokens == 7
    assert torch.equal(ours.matrix(), theirs.matrix())
    flat = Gram(8)
    flat.add(x.view(10, 8), keep)
    assert torch.equal(flat.matrix(), theirs.matrix())


def test_half_inputs_are_summed_in_fp32():
    x = 300 * gaussian(100, 4).half()  # a square is beyond float16
    gram = Gram(4)
    gram.add(x)
    torch.testing.assert_close(gram.matrix(), 2 * x.float().t() @ x.float() / 100, rtol=1e-5, atol=1)


def test_bad_tokens_and_empty_sums_name_the_layer():
    gram = Gram(4, "model.layers.3.mlp.down_proj")
    with pytest.raises(QuantizationError, match=r"model\.layers\.3\.mlp\.down_proj: no token reached this layer"):
        gram.matrix()
    x = gaussian(6, 4)
    x[2, 1], x[4, 0], x[4, 3] = float("nan"), float("inf"), float("nan")
    with pytest.raises(QuantizationError, match=r"down_proj: 2 of 6 input tokens hold NaN or infinity.*bfloat16"):
        gram.add(x)
    assert gram.tokens == 0
    gram.add(x[:2])
    assert repr(gram) == "Gram('model.layers.3.mlp.down_proj', features=4, tokens=2)"
    huge = Gram(4, "layer 9")
    huge.add(torch.full((2, 4), 1e25))
    with pytest.raises(QuantizationError, match="layer 9: the sum over 2 tokens overflowed"):
        huge.matrix()


def test_what_does_not_fit():
    gram = Gram(4, "here")
    with pytest.raises(QuantizationError, match=r"here: inputs must be \[\.\.\., 4\]; got \[2, 5\]"):
        gram.add(gaussian(2, 5))
    with pytest.raises(QuantizationError, match=r"bool with 6 elements.*torch\.int64 \[2, 3\]"):
        gram.add(gaussian(2, 3, 4), torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(QuantizationError, match="bool with 6 elements"):
        gram.add(gaussian(2, 3, 4), torch.ones(7).bool())
    with pytest.raises(QuantizationError, match=r"float32 or float64; got torch\.float16"):
        Gram(4, dtype=torch.float16)
