"""The seam of causal language models: prefill through the method, everything else as it was."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

import hf_accel
from hf_accel.attention.call import AttentionCall
from hf_accel.errors import NotApplicable
from hf_accel.hosts.clocks.steps import clocks
from hf_accel.hosts.target import Model
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport
from hf_accel.sites.attention import transformers as language
from tiny_deepseek import DEEPSEEK


def llama(seed: int = 0, **extra) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, **extra,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokens(batch: int = 1, length: int = 20) -> torch.Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(0))


def run_of(applied):
    return applied.report().entries[0].run


class Recorder:
    """A core that writes down what it is handed, and computes the reference from the call's own words."""

    differentiable = True

    def __init__(self):
        self.calls: list[AttentionCall] = []

    def reset(self):
        pass

    def fork(self):
        return self

    def attend(self, call):
        self.calls.append(call)
        groups = call.query.shape[1] // call.key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (call.key, call.value))
        rows, columns = call.query.shape[2], key.shape[2]
        mask = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows) if call.causal else None
        valid = call.key_validity()
        if valid is not None:
            mask = mask & valid[:, None, None]
            mask = mask | ~mask.any(-1, keepdim=True)  # rows of padding see something, nobody reads it
        return torch.nn.functional.scaled_dot_product_attention(
            call.query, key, value, attn_mask=mask, scale=call.scale
        )


def record(model):
    core, ledger, report = Recorder(), Ledger(), MethodReport("test", {}, "model", type(model).__name__)
    language.install(Model("model", model), core, ledger, report, clocks())
    return core, ledger, report


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_padding_is_split_off_the_causal_mask(implementation, side):
    model = llama(attn_implementation=implementation)
    ids, mask = tokens(2), torch.ones(2, 20, dtype=torch.long)
    if side == "left":
        mask[1, :7] = 0
    elif side == "right":
        mask[1, 13:] = 0
    dense = model(ids, attention_mask=mask).logits
    core, ledger, report = record(model)
    ours = model(ids, attention_mask=mask).logits
    ledger.undo()
    assert len(core.calls) == 2
    assert not report.run.dense_calls
    assert all(call.causal for call in core.calls)
    assert [call.layer.index for call in core.calls] == [0, 1]
    assert all((call.mask is None) == (side is None) for call in core.calls)
    seen = mask.bool()
    assert torch.allclose(ours[seen], dense[seen], atol=1e-5)


@torch.no_grad()
def test_generation_decodes_with_the_models_own_attention():
    model, ids = llama(), tokens()
    plain = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    with hf_accel.apply(model, "dense") as applied:
        ours = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        run = run_of(applied)
    assert torch.equal(ours, plain)
    assert run.sparse_calls == 2
    assert run.dense_calls == {"decoding: one query": 8}
    assert run.generations == 1


@torch.no_grad()
def test_a_static_cache_is_cut_to_what_the_queries_see():
    model, ids = llama(), tokens()
    dense = model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=64)).logits
    core, ledger, _ = record(model)
    ours = model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=64)).logits
    ledger.undo()
    assert [call.key.shape[2] for call in core.calls] == [20, 20]
    assert torch.allclose(ours, dense, atol=1e-5)


@torch.no_grad()
def test_a_prefill_in_pieces_is_aligned_to_the_end_of_its_keys():
    model, ids = llama(), tokens()
    dense = model(ids).logits
    core, ledger, _ = record(model)
    first = model(ids[:, :12], use_cache=True)
    second = model(ids[:, 12:], past_key_values=first.past_key_values).logits
    ledger.undo()
    assert [(c.query.shape[2], c.key.shape[2]) for c in core.calls] == [(12, 12)] * 2 + [(8, 20)] * 2
    assert torch.allclose(second, dense[:, 12:], atol=1e-5)


@torch.no_grad()
def test_a_sliding_window_runs_dense_and_is_counted():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    dense = model(tokens()).logits
    core, ledger, report = record(model)
    ours = model(tokens()).logits
    ledger.undo()
    assert [call.layer.index for call in core.calls] == [1]
    assert sum(report.run.dense_calls.values()) == 1
    assert "sliding window" in next(iter(report.run.dense_calls))
    assert torch.allclose(ours, dense, atol=1e-5)


@torch.no_grad()
def test_models_that_share_a_configuration_do_not_see_each_other():
    first, ids = llama(), tokens()
    second = LlamaForCausalLM(first.config).eval()
    plain = second(ids).logits
    with hf_accel.apply(first, "dense") as applied:
        assert torch.equal(second(ids).logits, plain)
        assert run_of(applied).forwards == 0


def test_undo_is_exact_and_nothing_of_ours_stays_registered():
    model, ids = llama(), tokens()
    before = dict(vars(model.config))
    with torch.no_grad():
        dense = model(ids).logits
    applied = hf_accel.apply(model, "dense")
    twin = copy.deepcopy(model)
    assert model.config._attn_implementation == "sdpa"
    applied.revert()
    assert vars(model.config) == before
    with torch.no_grad():
        assert torch.equal(model(ids).logits, dense)
        assert torch.allclose(twin(ids).logits, dense, atol=1e-6)  # the copy is still patched
    hf_accel.revert(twin)
    assert not [name for name in AttentionInterface._global_mapping if name.startswith("hf_accel")]
    assert not [name for name in AttentionMaskInterface._global_mapping if name.startswith("hf_accel")]


@torch.no_grad()
def test_the_configuration_is_the_users():
    model, ids = llama(attn_implementation="eager"), tokens()
    dense = model(ids, output_attentions=True)
    shown = model.config.to_dict(), repr(model.config)
    with hf_accel.apply(model, "sparge", density=1.0) as applied:
        assert (model.config.to_dict(), repr(model.config)) == shown
        taken = copy.deepcopy(model.config)
        of_layer = copy.copy(model.model.layers[0].self_attn.config)
        model.config.output_attentions = True
        ours = model(ids)
        model.config.output_attentions = False
        assert torch.equal(torch.stack(ours.attentions), torch.stack(dense.attentions))
        assert run_of(applied).dense_calls == {"attention weights are asked for": 2}
        model.model.layers[0].self_attn.config.rms_norm_eps = 0.5
        assert model.config.rms_norm_eps == 0.5
    for config in (taken, of_layer):
        assert config._attn_implementation == "eager"
        LlamaForCausalLM(config)(ids)


@torch.no_grad()
@pytest.mark.parametrize("there", ["sdpa", "eager"])
@pytest.mark.parametrize("then", ["sdpa", "eager", "another"])
def test_another_implementation_after_apply(there, then, another_implementation):
    model, ids = llama(attn_implementation=there), tokens(2)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :7] = 0
    dense = model(ids, attention_mask=mask).logits
    applied = hf_accel.apply(model, "dense")
    twin = copy.deepcopy(model)
    for one in (model, twin):
        one.set_attn_implementation(then)
        said = warnings_of(lambda one=one: one(ids, attention_mask=mask), dense[mask.bool()], mask.bool())
        assert len(said) == (then == "another")
    run = run_of(applied)
    if then == "another":
        assert run.dense_calls == {"model.set_attn_implementation('another') was called after apply()": 2}
    else:
        assert run.sparse_calls == 2
    applied.revert()
    assert model.config._attn_implementation == then


def warnings_of(forward, expected, seen):
    """What we warn of in a forward whose logits are as expected."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert torch.allclose(forward().logits[seen], expected, atol=1e-5)
    return [str(one.message) for one in said if "hf_accel" in str(one.message)]


@torch.no_grad()
def test_the_network_under_the_head_runs_the_method_by_itself():
    model, ids = llama(), tokens()
    hidden = model.model(ids).last_hidden_state
    with hf_accel.apply(model, "dense") as applied:
        assert torch.equal(model.model(ids).last_hidden_state, hidden)
        assert run_of(applied).sparse_calls == 2
        assert run_of(applied).forwards == 1
        model(ids)
        assert (run_of(applied).sparse_calls, run_of(applied).forwards) == (4, 2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["LlamaModel", "Qwen3Model", "Gemma3TextModel", "LlamaForSequenceClassification"])
def test_a_bare_decoder_is_a_language_model(name):
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    config = cls.config_class(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    model, ids = cls(config).eval(), tokens()
    plain = model(ids)[0]
    with hf_accel.apply(model, "sparge", density=1.0) as applied:
        assert torch.allclose(model(ids)[0], plain, atol=1e-5)
        assert run_of(applied).sparse_calls == 2


@torch.no_grad()
def test_texts_packed_into_one_row_run_dense_and_are_counted():
    model, ids = llama(), tokens()
    places = torch.cat([torch.arange(12), torch.arange(8)])[None]
    dense = model(ids, position_ids=places, use_cache=False).logits
    assert torch.allclose(dense[:, 12:], model(ids[:, 12:]).logits, atol=1e-5)  # transformers sees two texts
    with hf_accel.apply(model, "sparge", density=1.0) as applied:
        ours = model(ids, position_ids=places, use_cache=False).logits
        assert sum(run_of(applied).dense_calls.values()) == 2
    assert torch.allclose(ours, dense, atol=1e-5)


@torch.no_grad()
def test_values_narrower_than_keys_are_exact():
    torch.manual_seed(0)
    config = DeepseekV3Config(**DEEPSEEK)
    model, ids = DeepseekV3ForCausalLM(config).eval(), tokens(1, 192)
    plain = model(ids).logits
    with hf_accel.apply(model, "sparge", density=1.0, block_q=64) as applied:
        assert torch.allclose(model(ids).logits, plain, atol=1e-5)
        assert run_of(applied).sparse_calls == 2


@torch.no_grad()
def test_embeddings_behind_no_tokens_and_attention_that_is_made_bidirectional():
    model, ids = llama(), tokens()
    embedded = model.model.embed_tokens(ids)
    hidden = model.model(ids).last_hidden_state
    with hf_accel.apply(model, "sparge", density=1.0) as applied:
        assert torch.allclose(model.model(None, inputs_embeds=embedded).last_hidden_state, hidden, atol=1e-5)
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
        ours = model.model(ids).last_hidden_state
        assert run_of(applied).sparse_calls == 4
    assert torch.allclose(ours, model.model(ids).last_hidden_state, atol=1e-5)
    assert not torch.allclose(ours, hidden, atol=1e-3)


@torch.no_grad()
def test_eager_attention_of_a_class_from_the_users_file():
    model, ids = llama(attn_implementation="eager"), tokens()
    dense = model(ids).logits

    class Mine(type(model.model.layers[0].self_attn)):
        pass

    for layer in model.model.layers:
        layer.self_attn.__class__ = Mine
    with hf_accel.apply(model, "dense"):
        assert torch.allclose(model(ids).logits, dense, atol=1e-6)


@torch.no_grad()
def test_a_compiled_model_with_narrow_values():
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**DEEPSEEK)).eval()
    ids = tokens(1, 24)
    dense = model(ids, use_cache=False).logits
    torch._dynamo.reset()
    with hf_accel.apply(model, "sparge", density=1.0):
        compiled = torch.compile(model, backend="aot_eager")
        assert torch.allclose(compiled(ids, use_cache=False).logits, dense, atol=1e-5)
    torch._dynamo.reset()


def test_gradients_flow_and_saving_names_no_implementation(tmp_path):
    model, ids = llama(), tokens()

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    dense = gradients()
    with hf_accel.apply(model, "dense"):
        ours = gradients()
        model.save_pretrained(tmp_path)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, dense, strict=True))
    assert LlamaForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@torch.no_grad()
def test_compiled_prefill_is_one_graph():
    model, ids = llama(), tokens()
    dense = model(ids, use_cache=False).logits
    torch._dynamo.reset()
    with hf_accel.apply(model, "dense") as applied:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        ours = [compiled(ids, use_cache=False).logits for _ in range(2)]
        run = run_of(applied)
    assert all(torch.allclose(x, dense, atol=1e-5) for x in ours)
    assert (run.forwards, run.sparse_calls) == (2, 4)
    torch._dynamo.reset()


def test_what_cannot_be_reached_is_said():
    with pytest.raises(NotApplicable, match=r"set_attn_implementation\('sdpa'\)"):
        hf_accel.apply(llama(attn_implementation="flex_attention"), "dense")
    with pytest.raises(NotApplicable, match="language model"):
        hf_accel.apply(llama(), "svg2")
