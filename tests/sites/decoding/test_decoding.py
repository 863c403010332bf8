"""Drafters and gates in plain ``generate``: the model's own text, honest counts, exact undo."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria

import hf_accel
from hf_accel import errors, registry
from hf_accel.config import Config
from hf_accel.facts import Facts
from hf_accel.sites.decoding.base import DecodingMethod, GateMethod
from hf_accel.sites.decoding.draft import Draft
from hf_accel.testing.models import tiny

PROMPT = torch.arange(1, 6).repeat(3)[None]  # without the padding token, which generate would mask
LONG = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def facts(*slots):
    places = frozenset(f"decoding: {slot}" for slot in slots) if slots else frozenset({"decoding"})
    return Facts(sites=places, media=frozenset({"text"}), hosts=frozenset({"language model"}), exact=True)


def config(name):
    return dataclass(frozen=True)(type("ToyConfig", (Config,), {"METHOD": name}))


class Toy:
    paper, summary = "none", "a toy"


class Lookup(Toy, DecodingMethod):
    """What followed the last two tokens when they came before."""

    name, facts, Config = "toy-lookup", facts("drafter"), config("toy-lookup")

    def draft(self, state, tokens):
        text = tokens[0].tolist()
        for start in range(len(text) - 3, -1, -1):
            if text[start : start + 2] == text[-2:]:
                return Draft.chain(text[start + 2 : start + 6])
        return Draft.nothing()


class Oracle(Toy, DecodingMethod):
    """Knows the text, which the test hands over; three tokens each round."""

    name, facts, Config, inputs = "toy-oracle", facts("drafter"), config("toy-oracle"), ("answer",)

    def new_state(self):
        return []

    def draft(self, state, tokens):
        place = tokens.shape[1]
        return Draft.chain(self.given["answer"][place : place + 3])

    def verified(self, state, tokens, draft, accepted):
        state.append(accepted)
        self.last = state


class Wrong(Oracle):
    """Knows the text, and drafts another: every token is one too high."""

    name, facts, Config = "toy-wrong", facts("drafter"), config("toy-wrong")

    def draft(self, state, tokens):
        place = tokens.shape[1]
        return Draft.chain([(token + 1) % 50 for token in self.given["answer"][place : place + 3]])


class Tree(Oracle):
    """Two tokens of the text, in a tree whose first branch is theirs."""

    name, facts, Config = "toy-tree", facts("drafter"), config("toy-tree")

    def draft(self, state, tokens):
        right = self.given["answer"][tokens.shape[1] : tokens.shape[1] + 2]
        parents = [-1, -1, 0][: len(right) + 1]
        return Draft(torch.tensor([*right[:1], 7, *right[1:]]), torch.tensor(parents))


class Sampled(Toy, DecodingMethod):
    """Draws from logits of its own and hands them over."""

    name, facts, Config = "toy-sampled", facts("drafter"), config("toy-sampled")

    def draft(self, state, tokens):
        logits = torch.zeros(2, 50)
        return Draft(torch.multinomial(logits.softmax(-1), 1)[:, 0], None, logits)


class EverySecond(Toy, GateMethod):
    name, facts, Config = "toy-gate", facts("gate"), config("toy-gate")

    def new_state(self):
        return {"round": 0}

    def worth_drafting(self, state, tokens):
        state["round"] += 1
        return state["round"] % 2 == 0


class Both(Oracle, GateMethod):
    name, facts, Config = "toy-both", facts(), config("toy-both")

    def worth_drafting(self, state, tokens):
        return len(state) != 1


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    registry.methods()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    for cls in (Lookup, Oracle, Wrong, Tree, Sampled, EverySecond, Both):
        registry.register(cls)


def llama(seed: int = 0) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=128, **sizes)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model


@pytest.fixture
def model():
    return llama()


@pytest.fixture
def answer(model):
    return model.generate(PROMPT, **LONG)[0].tolist()


def stats(applied, place=0):
    return applied.report().entries[place].run.to_dict()


def test_a_perfect_drafter_is_believed(model, answer):
    applied = hf_accel.apply(model, "toy-oracle", answer=answer)
    assert model.generate(PROMPT, **LONG)[0].tolist() == answer
    told = stats(applied)
    # 24 tokens, four a round: three drafted and the model's own.
    assert (told["generations"], told["rounds"], told["tokens"]) == (1, 6, 24)
    assert told["drafted_by_position"] == told["accepted_by_position"] == [6, 6, 6]
    assert told["tokens_per_round"] == 4
    assert model.__dict__["_hf_accel"][0].method.last == [3] * 6
    assert "accepted  share by position: 1.00, 1.00, 1.00" in str(applied.report())


def test_a_useless_drafter_costs_rounds_not_text(model, answer):
    applied = hf_accel.apply(model, "toy-wrong", answer=answer)
    assert model.generate(PROMPT, **LONG)[0].tolist() == answer
    told = stats(applied)
    assert (told["rounds"], told["tokens"], told["accepted"]) == (24, 24, 0)
    assert told["drafted_by_position"][0] == 23  # no room in the last round
    assert told["empty_rounds"] == 1


def test_a_drafter_that_is_right_sometimes(model, answer):
    applied = hf_accel.apply(model, "toy-lookup")
    assert model.generate(PROMPT, **LONG)[0].tolist() == answer
    told = stats(applied)
    assert told["tokens"] == 24 == told["rounds"] + told["accepted"]
    assert told["drafted"] >= told["accepted"]


def test_the_end_of_the_text_ends_it_inside_a_draft(model, answer):
    end = answer[len(PROMPT[0]) + 5]
    settings = {**LONG, "eos_token_id": end}
    plain = model.generate(PROMPT, **settings)
    applied = hf_accel.apply(model, "toy-oracle", answer=answer)
    assert torch.equal(model.generate(PROMPT, **settings), plain)
    assert stats(applied)["tokens"] == plain.shape[1] - PROMPT.shape[1]


def test_a_tree_is_cut_to_its_first_path_and_counted(model, answer):
    applied = hf_accel.apply(model, "toy-tree", answer=answer)
    assert model.generate(PROMPT, **LONG)[0].tolist() == answer
    told = stats(applied)
    assert told["tree_drafts"] == 8
    assert told["accepted_by_position"] == [8, 8]


def test_logits_processors_and_scores_are_those_of_plain_decoding(model, answer):
    wanted = {**LONG, "repetition_penalty": 1.3, "return_dict_in_generate": True, "output_scores": True}
    plain = model.generate(PROMPT, **wanted)
    hf_accel.apply(model, "toy-oracle", answer=plain.sequences[0].tolist())
    assisted = model.generate(PROMPT, **wanted)
    assert torch.equal(assisted.sequences, plain.sequences)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(assisted.scores, plain.scores, strict=True))


def test_gate_and_drafter_of_two_methods_in_any_order(model, answer):
    both = hf_accel.apply(model, ["toy-gate", "toy-oracle"], answer=answer)
    assert model.generate(PROMPT, **LONG)[0].tolist() == answer
    told = stats(both)
    assert (told["gated_rounds"], told["rounds"]) == (5, 10)  # 1 and 4 tokens in turn
    both.revert()
    first = hf_accel.apply(model, "toy-oracle", answer=answer)
    second = hf_accel.apply(model, "toy-gate")
    first.revert()
    assert model.generate(PROMPT, **LONG)[0].tolist() == answer
    assert stats(second)["plain_generations"] == {"no drafter on the model": 1}
    second.revert()
    assert not {"generate", "_get_candidate_generator", "_hf_accel_decoding"} & vars(model).keys()


def test_one_method_can_be_both_and_two_drafters_cannot(model, answer):
    with pytest.raises(errors.Conflict, match="both own the drafter of the decoding site"):
        hf_accel.apply(model, ["toy-lookup", "toy-oracle"], answer=answer)
    applied = hf_accel.apply(model, "toy-both", answer=answer)
    with pytest.raises(errors.Conflict, match="decoding site"):
        hf_accel.apply(model, "toy-gate")
    assert model.generate(PROMPT, **LONG)[0].tolist() == answer
    assert stats(applied)["gated_rounds"] == 1


def test_sampling_with_a_seed(model):
    sampling = {**LONG, "do_sample": True, "temperature": 0.8}
    for name in ("toy-lookup", "toy-sampled"):
        with hf_accel.apply(model, name) as applied:
            texts = []
            for _ in range(2):
                torch.manual_seed(3)
                texts.append(model.generate(PROMPT, **sampling))
            assert torch.equal(*texts)
            assert stats(applied)["generations"] == 2
            assert stats(applied)["tokens"] == 48


def test_sampled_drafts_leave_the_distribution_of_the_first_token(model):
    """Rejection must give the model's distribution, not the drafter's, which is flat."""
    sampling = {**LONG, "do_sample": True, "max_new_tokens": 3, "temperature": 0.25}
    with torch.no_grad():
        wanted = (model(PROMPT).logits[0, -1] / 0.25).softmax(-1)
    assert (wanted - 1 / 50).abs().sum() > 0.8
    hf_accel.apply(model, "toy-sampled")
    torch.manual_seed(0)
    counts = torch.zeros(50)
    for _ in range(400):
        counts[model.generate(PROMPT, **sampling)[0, PROMPT.shape[1]]] += 1
    assert (counts / 400 - wanted).abs().sum() < 0.4


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"inputs": PROMPT.repeat(2, 1)}, "batch > 1"),
        ({"num_beams": 2}, "generation mode beam_search"),
        ({"num_return_sequences": 2, "do_sample": True}, "several texts for one prompt"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"use_cache": False}, "no key-value cache (use_cache=False)"),
        ({"stopping_criteria": [Never()]}, "stopping criteria beside length and end of text"),
        ({"max_time": 60.0}, "stopping criteria beside length and end of text"),
        ({"guidance_scale": 1.5}, "a logits processor with a state of its own (guidance_scale, watermarking_config)"),
        ({"prompt_lookup_num_tokens": 2}, "transformers' own assistant was asked for"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
    ],
)
def test_what_cannot_be_assisted_runs_plain_and_is_counted(model, answer, arguments, reason):
    arguments = {"inputs": PROMPT, **LONG, "max_new_tokens": 6, **arguments}
    torch.manual_seed(0)
    plain = model.generate(**arguments)
    applied = hf_accel.apply(model, "toy-oracle", answer=answer)
    torch.manual_seed(0)
    assert torch.equal(model.generate(**arguments), plain)
    assert stats(applied)["plain_generations"] == {reason: 1}
    assert stats(applied)["generations"] == 0
    assert f"1 x {reason}" in str(applied.report())


def test_a_prompt_given_as_embeddings_and_a_mistake_of_the_caller(model, answer):
    applied = hf_accel.apply(model, "toy-oracle", answer=answer)
    model.generate(inputs_embeds=model.get_input_embeddings()(PROMPT), **LONG)
    assert stats(applied)["plain_generations"] == {"the prompt was given as inputs_embeds": 1}
    with pytest.raises(ValueError, match="not_an_argument"):
        model.generate(PROMPT, **LONG, not_an_argument=1)


class Stream:
    def __init__(self):
        self.seen, self.ended = [], False

    def put(self, value):
        self.seen += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_a_streamer_sees_the_whole_text(model, answer):
    hf_accel.apply(model, "toy-oracle", answer=answer)
    stream = Stream()
    model.generate(PROMPT, streamer=stream, **LONG)
    assert stream.seen == answer
    assert stream.ended
    two = Stream()
    model.generate(PROMPT, streamer=two, use_cache=False, **LONG)
    assert two.seen == answer


def test_undo_is_exact(model, answer):
    before = dict(vars(model))
    applied = hf_accel.apply(model, "toy-oracle", answer=answer)
    assert "generate" in vars(model)
    applied.revert()
    assert vars(model) == before
    assert model.generate.__func__ is type(model).generate
    hf_accel.apply(model, "toy-oracle", answer=answer)
    model.generate = other = lambda *args: None
    with pytest.raises(errors.RevertRefused, match=r"LlamaForCausalLM\.generate was replaced by a function"):
        hf_accel.revert(model)
    assert model.generate is other


def test_a_wrapper_around_ours_outlives_it(model, answer):
    applied = hf_accel.apply(model, "toy-oracle", answer=answer)
    ours = model.generate
    model.generate = other = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM\.generate"):
        assert applied.revert(force=True) == ("LlamaForCausalLM.generate was replaced by a function",)
    assert model.generate is other
    assert "_get_candidate_generator" not in vars(model)
    assert model.generate(PROMPT, **LONG)[0].tolist() == answer
    del model.generate
    hf_accel.apply(model, "toy-oracle", answer=answer).revert()


def test_a_foreign_generate_is_left_alone(model):
    model.generate = lambda *args: None
    with pytest.raises(errors.NotApplicable, match="was replaced on the instance"):
        hf_accel.apply(model, "toy-lookup")


def test_deepcopy_and_two_models(model, answer):
    applied = hf_accel.apply(model, "toy-oracle", answer=answer)
    twin, other = copy.deepcopy(model), llama(1)
    assert twin.generate.__self__ is twin
    twin.generate(PROMPT, **LONG)
    assert stats(applied)["generations"] == 0
    plain = other.generate(PROMPT, **LONG)
    with hf_accel.apply(other, "toy-wrong", answer=answer):
        assert torch.equal(other.generate(PROMPT, **LONG), plain)
    hf_accel.revert(twin)
    assert "generate" not in vars(twin)
    assert "generate" in vars(model)
    assert model.generate(PROMPT, **LONG)[0].tolist() == answer


def test_two_threads_on_one_model(model):
    prompts = [PROMPT, torch.arange(20, 35)[None]]
    plain = [model.generate(prompt, **LONG) for prompt in prompts]
    hf_accel.apply(model, "toy-lookup")
    found: dict[int, torch.Tensor] = {}

    def work(number):
        found[number] = model.generate(prompts[number], **LONG)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], plain[number]) for number in range(2))


def test_together_with_a_patch_of_another_site(model, answer):
    with hf_accel.apply(model, ["sparge", "toy-lookup"]):
        model.generate(PROMPT, **LONG)
    assert model.generate(PROMPT, **LONG)[0].tolist() == answer


def test_ids_outside_of_the_vocabulary(model, answer):
    hf_accel.apply(model, "toy-oracle", answer=[99] * 64)
    with pytest.raises(errors.HFAccelError, match=r"expected ids of 0\.\.49"):
        model.generate(PROMPT, **LONG)


def test_models_without_a_decoding_site():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    with pytest.raises(errors.NotApplicable, match="encoder-decoder"):
        hf_accel.apply(T5ForConditionalGeneration(T5Config(**sizes)), "toy-lookup")
    with pytest.raises(errors.NotApplicable, match="without transformers' generate"):
        hf_accel.apply(tiny.build("wan"), "toy-lookup")


def test_drafts_are_checked():
    tree = Draft(torch.tensor([4, 5, 6, 7]), torch.tensor([-1, -1, 0, 2]), torch.zeros(4, 9))
    path = tree.first_path()
    assert path.tokens.tolist() == [4, 6, 7]
    assert path.logits.shape == (3, 9)
    assert path.shortened(1).tokens.tolist() == [4]
    for wrong in (
        lambda: Draft(torch.tensor([1.0])),
        lambda: Draft(torch.tensor([[1]])),
        lambda: Draft(torch.tensor([1]), torch.tensor([0])),
        lambda: Draft(torch.tensor([1]), torch.tensor([-1, 0])),
        lambda: Draft(torch.tensor([1]), None, torch.zeros(2, 3)),
    ):
        with pytest.raises(errors.HFAccelError, match="Draft: "):
            wrong()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft asks transformers
def test_the_kit_holds_a_drafter_to_its_promises():
    import unittest

    from hf_accel.testing import promises

    asked = promises("toy-lookup", "llama")
    assert len(asked) > 10
    for promise in asked:
        try:
            promise()
        except unittest.SkipTest:
            continue
