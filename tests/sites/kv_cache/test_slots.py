"""Codecs and policies on the K/V cache: any one of them, in every mode of ``generate``, on and off again."""

from __future__ import annotations

import copy
import unittest
from dataclasses import dataclass

import pytest
import torch

import hf_accel
from hf_accel import registry
from hf_accel.config import Config, setting
from hf_accel.errors import Conflict, NotApplicable
from hf_accel.method import CodecMethod, Facts, PolicyMethod

TEXT = {"media": frozenset({"text"}), "hosts": frozenset({"language model"})}


@dataclass(frozen=True)
class ToyConfig(Config):
    METHOD = "toy-identity"
    window: int = setting(4, "exact tokens", ge=0)
    group_size: int = setting(4, "tokens encoded at a time", ge=1)


@dataclass(frozen=True)
class EightBitsConfig(ToyConfig):
    METHOD = "toy-8-bits"


@dataclass(frozen=True)
class SinksConfig(Config):
    METHOD = "toy-sinks"
    recent: int = setting(8, "newest tokens that stay", ge=1)


class Identity(CodecMethod):
    name, paper, summary = "toy-identity", "none", "codes are the numbers themselves"
    facts = Facts(sites=frozenset({"kv cache: codec"}), exact=True, **TEXT)
    Config = ToyConfig

    def encode(self, keys, values, layer):
        return {"both": [keys, values]}

    def decode(self, codes, layer):
        return tuple(codes["both"])


class EightBits(CodecMethod):
    name, paper, summary = "toy-8-bits", "none", "every token of a head rounded to 8 bits"
    facts = Facts(sites=frozenset({"kv cache: codec"}), full_budget={"window": 10**6}, **TEXT)
    Config = EightBitsConfig

    def encode(self, keys, values, layer):
        scales = [x.abs().amax(-1, keepdim=True) / 127 for x in (keys, values)]
        codes = [(x / s).round().to(torch.int8) for x, s in zip((keys, values), scales, strict=True)]
        return codes, scales

    def decode(self, codes, layer):
        return tuple(c * s for c, s in zip(*codes, strict=True))


class Sinks(PolicyMethod):
    name, paper, summary = "toy-sinks", "none", "the first four tokens and the newest"
    facts = Facts(sites=frozenset({"kv cache: policy"}), **TEXT)
    Config = SinksConfig

    def keep(self, positions, layer):
        return (positions < 4) | (positions > positions[-1] - self.config.recent)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    registry.methods()
    for cls in (Identity, EightBits, Sinks):
        monkeypatch.setitem(registry._METHODS, cls.name, cls)


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes | heads | changes)).eval()


def prompt(rows: int = 1, length: int = 21, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


MODES = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


def generated(model, ids, **more):
    torch.manual_seed(5)
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "pad_token_id": 0, "do_sample": False}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings | more)


@pytest.mark.parametrize("mode", MODES)
def test_an_identity_codec_gives_the_same_tokens(mode):
    model, ids = llama(), prompt(1 if mode == "prompt lookup" else 2)
    plain = generated(model, ids, **MODES[mode])
    with hf_accel.apply(model, "toy-identity") as applied:
        assert torch.equal(generated(model, ids, **MODES[mode]), plain)
        assert applied.report().entries[0].run.caches == 1
    assert torch.equal(generated(model, ids, **MODES[mode]), plain)
    assert not model._forward_pre_hooks


@torch.no_grad()
def test_a_codec_is_used_behind_the_window_and_holds_less():
    model, ids = llama(), prompt(2, 40)
    plain = model(ids, use_cache=True)
    with hf_accel.apply(model, "toy-8-bits") as applied:
        coded = model(ids, use_cache=True)
        assert torch.equal(coded.logits, plain.logits)  # a prefill reads what it computed
        step = model(prompt(2, 1, 7), past_key_values=coded.past_key_values).logits
        stats = applied.stats()["model"]["toy-8-bits"]
        assert stats["held_bytes"] < 0.5 * stats["plain_bytes"]
    exact = model(prompt(2, 1, 7), past_key_values=plain.past_key_values).logits
    assert torch.allclose(step, exact, atol=2e-2)
    assert not torch.equal(step, exact)


@torch.no_grad()
def test_codes_do_not_depend_on_how_tokens_arrived():
    model, ids = llama(), prompt(1, 30)
    hf_accel.apply(model, "toy-8-bits")
    whole = model(ids, use_cache=True).past_key_values
    parts = model(ids[:, :7], use_cache=True).past_key_values
    for start, stop in ((7, 8), (8, 20), (20, 30)):
        model(ids[:, start:stop], past_key_values=parts)
    assert [[first for first, _ in layer.groups] for layer in whole.layers] == [
        [first for first, _ in layer.groups] for layer in parts.layers
    ]
    assert whole.get_seq_length() == parts.get_seq_length() == 30


@torch.no_grad()
def test_crop_is_as_if_the_tokens_had_never_come():
    model, ids = llama(), prompt(1, 30)
    hf_accel.apply(model, "toy-identity")
    short = model(ids[:, :13], use_cache=True).past_key_values
    long = model(ids, use_cache=True).past_key_values
    long.crop(-17)
    token = prompt(1, 1, 3)
    assert torch.allclose(
        model(token, past_key_values=long).logits, model(token, past_key_values=short).logits, atol=1e-5
    )
    long.crop(-14)
    assert long.get_seq_length() == 0


@torch.no_grad()
def test_a_policy_drops_tokens_and_positions_stay_absolute():
    model, ids = llama(), prompt(1, 30)
    with hf_accel.apply(model, "toy-sinks"):
        cache = model(ids, use_cache=True).past_key_values
        assert [layer.exact for layer in cache.layers] == [[*range(4), *range(22, 30)]] * 2
        step = model(prompt(1, 1, 9), past_key_values=cache).logits
        assert cache.get_seq_length() == 31
        generated(model, ids)
    # The same by a mask over a plain cache: hidden tokens take no part, the others have their positions.
    plain = model(ids, use_cache=True).past_key_values
    mask = torch.ones(1, 31, dtype=torch.long)
    mask[:, 4:22] = 0
    expected = model(
        prompt(1, 1, 9), past_key_values=plain, attention_mask=mask, position_ids=torch.tensor([[30]])
    ).logits
    assert torch.allclose(step, expected, atol=1e-5)


def test_a_policy_refuses_padding_in_words():
    model = llama()
    hf_accel.apply(model, "toy-sinks")
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, :3] = 0
    with pytest.raises(NotApplicable, match="padded"):
        model(prompt(2), attention_mask=mask, use_cache=True)


@torch.no_grad()
@pytest.mark.parametrize("first", ["codec", "policy"])
def test_a_codec_and_a_policy_stand_together_and_come_off_in_any_order(first):
    model, ids = llama(), prompt(1, 30)
    plain = generated(model, ids)
    codec, policy = hf_accel.apply(model, "toy-identity"), hf_accel.apply(model, "toy-sinks")
    cache = model(ids, use_cache=True).past_key_values
    layer = cache.layers[0]
    assert layer.codec is not None
    assert layer.policy is not None
    assert layer.held < 30
    generated(model, ids)
    (codec if first == "codec" else policy).revert()
    generated(model, ids)
    (policy if first == "codec" else codec).revert()
    assert torch.equal(generated(model, ids), plain)


def test_two_codecs_do_not_go_together():
    model = llama()
    hf_accel.apply(model, "toy-identity")
    with pytest.raises(Conflict, match="codec of the kv cache site"):
        hf_accel.apply(model, "toy-8-bits")


@torch.no_grad()
def test_turns_and_batches():
    """The caller's cache from turn to turn, and rows taken out of it."""
    model, ids = llama(), prompt(2, 20)
    turns = []
    for patched in (False, True):
        applied = hf_accel.apply(model, "toy-identity") if patched else None
        cache = model(ids, use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(2)
        turns.append(model(prompt(2, 3, 4), past_key_values=cache).logits)
        if applied:
            applied.revert()
    assert torch.equal(*turns)


@torch.no_grad()
def test_sliding_layers_stay_and_are_counted():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8, "sliding_window_pattern": 2}
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes | heads)).eval()
    plain = generated(model, prompt())
    applied = hf_accel.apply(model, "toy-identity")
    assert torch.equal(generated(model, prompt()), plain)
    assert applied.stats()["model"]["toy-identity"]["plain_layers"] == {"DynamicSlidingWindowLayer": 2}


@torch.no_grad()
def test_what_it_has_no_say_in_is_counted():
    model, ids = llama(), prompt()
    begun = model(ids, use_cache=True).past_key_values
    applied = hf_accel.apply(model, "toy-8-bits")
    model(prompt(1, 1), past_key_values=begun)
    generated(model, ids, cache_implementation="static")
    counted = applied.stats()["model"]["toy-8-bits"]["dense_calls"]
    assert any("began before" in reason for reason in counted)
    assert any("StaticCache" in reason for reason in counted)


def test_copies_and_other_models_have_their_own():
    model = llama()
    applied = hf_accel.apply(model, "toy-8-bits")
    twin = copy.deepcopy(model)
    generated(twin, prompt())
    assert applied.report().entries[0].run.forwards == 0
    hf_accel.revert(twin)
    generated(model, prompt())
    assert applied.report().entries[0].run.forwards > 0


@pytest.mark.parametrize("family", ["wan", "unet", "t5"])
def test_other_models_are_refused_in_words(family):
    import tiny_hosts
    from hf_accel.testing.models import tiny

    model = tiny_hosts.build("t5") if family == "t5" else tiny.build(family)
    with pytest.raises(NotApplicable, match=r"not a language model|encoder-decoder"):
        hf_accel.apply(model, "toy-identity")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft asks transformers
@pytest.mark.parametrize("method", ["toy-identity", "toy-8-bits"])
def test_the_kit_holds_a_codec_to_its_promises(method):
    """As an author would: at full budget (here: nothing is encoded) the text is the model's own."""
    from hf_accel.testing import families, promises

    assert families(method) == ["llama"]
    asked = promises(method)
    assert len(asked) > 12
    for promise in asked:
        try:
            promise()
        except unittest.SkipTest:
            continue
