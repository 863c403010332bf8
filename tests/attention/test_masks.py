"""Masks as what they hide: every structure that looks like another one in some of its rows."""

from __future__ import annotations

import pytest
import torch

from hf_accel.attention import masks
from hf_accel.attention.masks import MaskMemo, hidden_keys, split_causal

TOKENS = 12
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
PLACE = torch.arange(TOKENS)


def additive(mask, dtype=torch.float32):
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def document(*lengths):
    """Causal inside each of the texts that are packed into a row."""
    text = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return CAUSAL & (text[:, None] == text)


def window(size):
    return CAUSAL & (PLACE[:, None] - PLACE < size)


def image(start, stop):
    """Causal, but the tokens of an image see each other."""
    inside = (start <= PLACE) & (stop > PLACE)
    return CAUSAL | (inside[:, None] & inside)


def prefix(length):
    return CAUSAL | (length > PLACE)


@pytest.fixture(params=[1 << 26, 1], ids=["at once", "row by row"])
def piecewise(request, monkeypatch):
    monkeypatch.setattr(masks, "_AT_ONCE", request.param)


NOT_CAUSAL = {
    "documents": document(7, 5),
    "a document of one token last": document(11, 1),
    "a short document first": document(1, 11),
    "a window": window(4),
    "a window that only the last rows feel": window(11),
    "an image": image(3, 8),
    "an image at the end": image(8, 12),
    "a prefix seen both ways": prefix(4),
    "nothing is causal": torch.ones(TOKENS, TOKENS, dtype=torch.bool),
    "one pair is missing": CAUSAL & ~((PLACE[:, None] == 9) & (PLACE == 4)),
    "nobody sees themselves": CAUSAL.tril(-1),
}


@pytest.mark.parametrize("kind", NOT_CAUSAL)
@pytest.mark.parametrize("form", [lambda mask: mask, additive], ids=["bool", "additive"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a causal row"])
def test_what_is_not_causal_is_not_taken_for_it(piecewise, kind, form, beside):
    rows = [NOT_CAUSAL[kind], CAUSAL] if beside else [NOT_CAUSAL[kind]]
    assert split_causal(form(torch.stack(rows)[:, None])) is None


@pytest.mark.parametrize("form", [lambda mask: mask, additive], ids=["bool", "additive"])
@pytest.mark.parametrize("empty", [0, 5])
@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("hide", ["nothing", "left", "right", "holes", "both rows, left"])
def test_causal_with_hidden_keys(piecewise, form, empty, past, hide):
    valid = torch.ones(2, past + TOKENS, dtype=torch.bool)
    if hide == "left":
        valid[1, : past + 2] = False
    elif hide == "both rows, left":
        valid[:, :2] = False
    elif hide == "right":
        valid[1, -4:] = False
    elif hide == "holes":
        valid[0, [1, past + 5]] = False
    key = torch.arange(past + TOKENS)
    mask = valid[:, None] & (key <= PLACE[:, None] + past)
    mask = torch.nn.functional.pad(mask, (0, empty))[:, None]
    keys, shown = split_causal(form(mask))
    assert keys == past + TOKENS
    assert shown is None if hide == "nothing" else torch.equal(shown, valid)


def test_a_bias_is_no_mask():
    biased = additive(CAUSAL[None, None])
    biased[0, 0, 5, 2] = -1.5
    assert split_causal(biased) is None
    assert split_causal(additive(CAUSAL[None, None]) - 0.25 * CAUSAL) is None
    assert split_causal(CAUSAL[None, None].expand(1, 2, -1, -1)) is None
    assert split_causal(CAUSAL[:0][None, None]) is None
    assert split_causal(torch.zeros(1, 1, TOKENS, TOKENS, dtype=torch.bool)) is None


def test_keys_that_are_hidden_from_all(piecewise):
    valid = torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(0)) > 0.3
    same = valid[:, None, None].expand(-1, 1, 7, -1)
    assert torch.equal(hidden_keys(same)[:, 0, 0], valid)
    outer = (valid[:, None] & valid[:, :, None])[:, None]
    assert hidden_keys(outer) is None
    assert torch.equal(hidden_keys(outer, outer=True)[:, 0, 0], valid)
    for changed in (same.clone(), outer.clone()):
        changed[1, 0, 5, 3] ^= True
        assert hidden_keys(changed, outer=True) is None
    blocks = torch.block_diag(torch.ones(5, 5), torch.ones(7, 7)).bool()[None, None]
    assert hidden_keys(blocks, outer=True) is None
    assert hidden_keys(CAUSAL[None, None], outer=True) is None


def test_a_memo_knows_a_mask_by_its_identity_while_it_is_unchanged():
    memo, asked = MaskMemo(), []
    one, other = CAUSAL.clone(), CAUSAL.clone()

    def find(mask):
        return memo.get(mask, lambda: asked.append(id(mask)) or len(asked))

    assert [find(one), find(other), find(one), find(other)] == [1, 2, 1, 2]
    one[0, 0] = False
    assert find(one) == 3
    memo.begin_forward()
    assert find(other) == 2
    with torch.inference_mode():  # where nobody counts changes
        unseen = CAUSAL.clone()
        assert find(unseen) == find(unseen) == 4
        memo.begin_forward()
        assert find(unseen) == 5
