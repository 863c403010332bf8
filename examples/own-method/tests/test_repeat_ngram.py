"""A drafter that repeats: the kit's promises, what it drafts, and that it saves forwards."""

import pytest
import torch
from own_method.repeat_ngram import RepeatNgram, RepeatNgramConfig

import hf_accel
from hf_accel.testing import promises
from hf_accel.testing.models import tiny

SETTINGS = {"n": 2, "draft_tokens": 4}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft asks transformers
@pytest.mark.parametrize("promise", promises("repeat-ngram", "llama", settings=SETTINGS), ids=str)
def test_promises(promise):
    promise()


def test_it_drafts_what_followed_last_time():
    drafter = RepeatNgram(RepeatNgramConfig(n=2, draft_tokens=3))
    state = drafter.new_state()

    def drafted(*text):
        return drafter.draft(state, torch.tensor([text])).tokens.tolist()

    assert drafted(1, 2, 3, 4, 1, 2) == [3, 4, 1]
    assert drafted(1, 2, 3, 4, 1, 2, 9) == []
    assert drafted(1, 2, 3, 4, 1, 2, 9, 1, 2) == [9, 1, 2]  # the newest occurrence, not the first
    assert drafter.draft(drafter.new_state(), torch.tensor([[1, 2]])).tokens.tolist() == []


def test_a_text_that_repeats_itself_takes_fewer_rounds():
    model = tiny.build("llama")
    prompt = torch.tensor([[5, 6, 7, 8] * 4])
    settings = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(prompt, **settings)  # a tiny random model soon writes in circles
    with hf_accel.apply(model, "repeat-ngram", **SETTINGS) as applied:
        assert torch.equal(model.generate(prompt, **settings), plain)
        stats = applied.stats()["model"]["repeat-ngram"]
    assert stats["accepted"] > 0
    assert stats["rounds"] + stats["accepted"] == 32
