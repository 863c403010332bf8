"""RCD at inference: the identities of the paper, and what the hooks do in the samplers of four kinds of models."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

import hf_accel
from hf_accel.errors import WeightsMismatch
from hf_accel.patches.rcd import RCDConfig, interpolate, interpolation_weight, residual_embeddings, set_reference
from hf_accel.sites.embedding.residual import context_of
from hf_accel.sites.embedding.table import EmbeddingTable, embedding_table
from rcd_models import BLOCK, MASK, close, commit, prompt, put, sample, sdar


@torch.no_grad()
def sample_by_hand(model, ids, settings, blocks=2, starts=None):
    """:func:`sample` with ``inputs_embeds`` made of the definition, on a plain model."""
    cache, steps, weight = DynamicCache(), [], model.get_input_embeddings().weight
    model(input_ids=ids, past_key_values=cache, use_cache=True, store_kv=True)
    out = [ids]
    for number in range(blocks):
        tokens = torch.full((len(ids), BLOCK), MASK)
        last = None if starts is None else starts[number]
        while (tokens == MASK).any():
            e = weight[tokens]
            if last is not None:
                tempered = (last / settings.t_res).log_softmax(-1)
                alpha = (-(tempered.exp() * tempered).sum(-1) / torch.tensor(64.0).log())[..., None]
                p = tempered.exp() if settings.temper_delta else last.softmax(-1)
                e = torch.where((tokens == MASK)[..., None], (1 - alpha) * e + alpha * (p @ weight), e)
            last = model(inputs_embeds=e, past_key_values=cache, use_cache=True, store_kv=False).logits
            steps.append(last)
            tokens = commit(tokens, last)
        model(input_ids=tokens, past_key_values=cache, use_cache=True, store_kv=True)
        out.append(tokens)
    return steps, torch.cat(out, 1)


# -- Eq. 1-3 -------------------------------------------------------------------------------------------------------


def table_of(rows=11, width=6, seed=0):
    return EmbeddingTable(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), 1.0)


def test_a_certain_prediction_is_the_mask_embedding_and_an_uncertain_one_the_mean():
    table, mask = table_of(), torch.randn(2, 6)
    certain = torch.full((2, 11), -torch.inf)
    certain[0, 3] = certain[1, 7] = 5.0
    mixed, alpha = interpolate(mask, certain, table, RCDConfig())
    assert torch.equal(alpha, torch.zeros(2))
    assert torch.equal(mixed, mask)
    mixed, alpha = interpolate(mask, torch.full((2, 11), 1.7), table, RCDConfig())
    assert torch.allclose(alpha, torch.ones(2), atol=1e-6)
    assert torch.allclose(mixed, table.weight.mean(0).expand(2, -1), atol=1e-6)
    mixed, _ = interpolate(mask, certain, table, RCDConfig(alpha_mode="fixed", alpha=1.0))
    assert torch.allclose(mixed, table.weight[[3, 7]], atol=1e-6)


@pytest.mark.parametrize("mode", ["normalized-entropy", "fixed", "max-prob", "one-minus-entropy", "one-minus-max-prob"])
def test_the_weight_of_every_mode(mode):
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(1)) * 2
    logits[0, 2:] = -torch.inf
    for t_res in (1.0, 0.7):
        p = (logits.double() / t_res).softmax(-1)
        entropy = -torch.special.xlogy(p, p).sum(-1) / torch.tensor(11.0).double().log()
        expected = {
            "normalized-entropy": entropy, "fixed": torch.full((5,), 0.3).double(), "max-prob": p.amax(-1),
            "one-minus-entropy": 1 - entropy, "one-minus-max-prob": 1 - p.amax(-1),
        }[mode]  # fmt: skip
        alpha, _ = interpolation_weight(logits, RCDConfig(alpha_mode=mode, t_res=t_res))
        assert torch.allclose(alpha.double(), expected, atol=1e-5)
        assert ((alpha >= 0) & (alpha <= 1)).all()
        scaled, _ = interpolation_weight(logits, RCDConfig(alpha_mode=mode, t_res=t_res, alpha_scale=0.5))
        assert torch.allclose(scaled, alpha / 2)


def test_temperature_moves_the_weight_and_the_residual_only_when_asked_to():
    table, logits = table_of(), torch.randn(4, 11) * 2
    fixed = {"alpha_mode": "fixed", "alpha": 1.0}
    mask = torch.zeros(4, 6)
    plain, _ = interpolate(mask, logits, table, RCDConfig(**fixed))
    same, _ = interpolate(mask, logits, table, RCDConfig(t_res=2.0, **fixed))
    other, _ = interpolate(mask, logits, table, RCDConfig(t_res=2.0, temper_delta=True, **fixed))
    assert torch.equal(plain, same)
    assert torch.allclose(other, (logits / 2).softmax(-1) @ table.weight, atol=1e-5)
    weights = [interpolation_weight(logits, RCDConfig(t_res=t))[0] for t in (0.5, 1.0, 2.0)]
    assert (weights[0] < weights[1]).all()
    assert (weights[1] < weights[2]).all()


def test_truncated_residual_keeps_its_bound_and_is_exact_with_all_tokens():
    table, logits, mask = table_of(), torch.randn(4, 11) * 2, torch.zeros(4, 6)
    fixed = {"alpha_mode": "fixed", "alpha": 1.0}
    whole, _ = interpolate(mask, logits, table, RCDConfig(**fixed))
    assert torch.allclose(interpolate(mask, logits, table, RCDConfig(top_k=11, **fixed))[0], whole, atol=1e-6)
    cut, _ = interpolate(mask, logits, table, RCDConfig(top_k=3, **fixed))
    tail = 1 - logits.softmax(-1).topk(3).values.sum(-1)
    assert ((cut - whole).norm(dim=-1) <= tail * table.weight.norm(dim=-1).max() + 1e-6).all()
    assert not torch.allclose(cut, whole, atol=1e-3)


def test_tables_of_plain_scaled_and_adapted_embeddings():
    from peft import LoraConfig, get_peft_model
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    every = torch.arange(9)
    plain = torch.nn.Embedding(9, 4)
    assert embedding_table(plain, 9, every.device).weight is plain.weight
    scaled = Gemma3TextScaledWordEmbedding(9, 4, None, embed_scale=3.7)
    for dtype in (torch.float32, torch.bfloat16):
        scaled.to(dtype)
        table = embedding_table(scaled, 9, every.device)
        assert table.weight is scaled.weight
        assert torch.equal(table.weight * table.scale, scaled(every))
    holder = torch.nn.Sequential(torch.nn.Embedding(9, 4))
    adapted = get_peft_model(holder, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    layer = adapted.base_model.model[0]
    table = embedding_table(layer, 9, every.device)
    assert torch.equal(table.weight * table.scale, layer(every))
    assert not torch.equal(table.weight, layer.weight)
    with pytest.raises(WeightsMismatch, match="another vocabulary"):
        embedding_table(plain, 10, every.device)


def test_rows_without_a_mask_are_untouched():
    model, ids = sdar(), prompt(2, 6)
    ids[0, 2] = ids[1, 4] = MASK
    out = residual_embeddings(model.get_input_embeddings(), ids, torch.randn(2, 6, 64), MASK)
    plain = model.get_input_embeddings()(ids)
    assert torch.equal(out[ids != MASK], plain[ids != MASK])
    assert not torch.isclose(out[ids == MASK], plain[ids == MASK]).all(-1).any()
    with pytest.raises(WeightsMismatch, match="input_ids"):
        residual_embeddings(model.get_input_embeddings(), ids, torch.randn(2, 5, 64), MASK)


# -- in the sampler of the SDAR class ------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("settings", [{}, {"t_res": 0.8}, {"t_res": 1.3, "temper_delta": True}])
def test_hook_equals_embeddings_made_by_hand(settings, tied):
    model = sdar(tie_word_embeddings=tied)
    by_hand = sample_by_hand(model, prompt(2), RCDConfig(**settings))
    plain = sample(model, prompt(2))
    with put(model, **settings) as applied:
        ours = sample(model, prompt(2))
        run = applied.report().entries[0].run
    assert torch.equal(ours[1], by_hand[1])
    assert close(ours[0], by_hand[0])
    assert not close(ours[0], plain[0], 1e-3)
    # Two blocks of four steps, one commit a step and row: 3 + 2 + 1 rows open still, twice, in two rows of the batch.
    assert run.steps == 6
    assert run.rows == 2 * 2 * 6
    assert 0 < run.mean_weight < 1
    assert run.forwards == {"denoise": 8, "prefill": 1, "commit": 2}
    assert run.blocks == 2
    assert not run.dense_calls


def test_the_first_step_of_every_block_is_cold_and_a_disabled_residual_is_nothing():
    model = sdar()
    plain = sample(model, prompt())
    with put(model):
        ours = sample(model, prompt())
    assert torch.equal(ours[0][0], plain[0][0])
    assert not torch.equal(ours[0][1], plain[0][1])
    with put(model, alpha_scale=0.0):
        off = sample(model, prompt())
    assert all(torch.equal(a, b) for a, b in zip(off[0], plain[0], strict=True))
    with put(model):  # the prefix has the same clean tokens in the first step of its second block
        model_first = sample(model, ours[1][:, :12], blocks=1)[0][0]
    assert close([ours[0][4]], [model_first])


def test_residuals_do_not_cross_blocks_requests_or_exceptions():
    model, ids = sdar(), prompt()
    with put(model):
        alone = sample(model, ids)
        cache = DynamicCache()
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, use_cache=True, store_kv=True)
            masks = torch.full((1, BLOCK), MASK)
            model(input_ids=masks, past_key_values=cache, use_cache=True, store_kv=False)
            assert context_of(model)._kept is not None
        again = sample(model, ids)
        with pytest.raises((RuntimeError, ValueError, IndexError)), torch.no_grad():
            model(input_ids=torch.full((1, 3), 1000), past_key_values=cache, use_cache=True, store_kv=False)
        assert context_of(model)._kept is None
        after = sample(model, ids)
    for other in (again, after):
        assert all(torch.equal(a, b) for a, b in zip(alone[0], other[0], strict=True))


@pytest.mark.parametrize("init", ["cold", "dirichlet", "self", "warm"])
def test_rows_of_a_batch_are_independent(init):
    model, reference = sdar(), sdar(1, 16)
    ids = prompt(3)
    with put(model, init=init):
        set_reference(model, reference)
        together = sample(model, ids)
        alone = [sample(model, ids[i : i + 1]) for i in range(3)]
    assert torch.equal(together[1], torch.cat([tokens for _, tokens in alone]))
    for i, (steps, _) in enumerate(alone):
        assert close([s[i : i + 1] for s in together[0]], steps)


def test_generate_blocks_with_prompts_of_different_lengths_equals_one_by_one():
    model = sdar()
    ids, settings = [prompt(1, n, n) for n in (5, 9, 12)], {"max_new_tokens": 9, "threshold": 0.3, "eos_token_id": []}
    mask = torch.zeros(3, 12, dtype=torch.long)
    padded = torch.zeros(3, 12, dtype=torch.long)
    for i, row in enumerate(ids):
        mask[i, 12 - row.shape[1] :] = 1
        padded[i, 12 - row.shape[1] :] = row
    with put(model) as applied:
        together = hf_accel.generate_blocks(model, padded, attention_mask=mask, **settings)[:, 12:]
        assert applied.report().entries[0].run.steps
        alone = [hf_accel.generate_blocks(model, row, **settings)[:, row.shape[1] :] for row in ids]
    assert torch.equal(together, torch.cat(alone))


def test_logits_that_a_sampler_changes_in_place_do_not_change_the_residual():
    model = sdar()

    @torch.no_grad()
    def two_steps(spoil):
        cache, tokens = DynamicCache(), torch.full((1, BLOCK), MASK)
        first = model(input_ids=tokens, past_key_values=cache, use_cache=True, store_kv=False).logits
        tokens = commit(tokens, first)
        if spoil:
            first[..., :40] = -torch.inf
        return model(input_ids=tokens, past_key_values=cache, use_cache=True, store_kv=False).logits

    with put(model):
        assert torch.equal(two_steps(True), two_steps(False))


def test_warm_and_self_starts_equal_their_definition():
    model, reference, ids = sdar(), sdar(1, 16), prompt(2)

    @torch.no_grad()
    def starts(asked, text):
        """Predictions of ``asked`` on all-mask blocks behind the true prefix."""
        out = []
        for at in (8, 12):
            both = torch.cat([text[:, :at], torch.full((2, BLOCK), MASK)], 1)
            out.append(asked(input_ids=both, use_cache=False).logits[:, at:])
        return out

    for init, asked in (("warm", reference), ("self", model)):
        with put(model, init=init) as applied:
            if init == "warm":
                set_reference(model, reference)
            steps, text = sample(model, ids)
            assert not applied.report().entries[0].run.dense_calls
        by_hand = sample_by_hand(model, ids, RCDConfig(), starts=starts(asked, text))
        assert torch.equal(text, by_hand[1])
        assert close(steps, by_hand[0], 1e-4)


def test_dirichlet_start_is_drawn_by_seed_and_block():
    model, ids = sdar(), prompt()
    state = torch.get_rng_state()
    with put(model, init="dirichlet"):
        first, again = sample(model, ids), sample(model, ids)
    with put(model, init="dirichlet", seed=1):
        other = sample(model, ids)
    plain = sample(model, ids)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first[0], again[0], strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    assert not torch.equal(first[0][0], plain[0][0])


def test_warm_start_in_the_middle_of_a_request_is_cold_and_counted():
    model, cache = sdar(), DynamicCache()
    masks = torch.full((1, BLOCK), MASK)
    with torch.no_grad():
        model(input_ids=prompt(), past_key_values=cache, use_cache=True, store_kv=True)
        plain = model(input_ids=masks, past_key_values=cache, use_cache=True, store_kv=False).logits
        with put(model, init="warm") as applied:
            set_reference(model, sdar(1, 16))
            ours = model(input_ids=masks, past_key_values=cache, use_cache=True, store_kv=False).logits
            (reason,) = applied.report().entries[0].run.dense_calls
    assert "cannot follow" in reason
    assert torch.equal(ours, plain)


def test_static_cache():
    from transformers import StaticCache

    model, masks = sdar(), torch.full((1, BLOCK), MASK)

    @torch.no_grad()
    def two_steps(cache):
        model(input_ids=prompt(), past_key_values=cache, use_cache=True, store_kv=True)
        first = model(input_ids=masks, past_key_values=cache, use_cache=True, store_kv=False).logits
        tokens = commit(masks, first)
        return [first, model(input_ids=tokens, past_key_values=cache, use_cache=True, store_kv=False).logits]

    with put(model):
        assert close(two_steps(StaticCache(config=model.config, max_cache_len=32)), two_steps(DynamicCache()))
    plain = two_steps(DynamicCache())
    with put(model, init="warm") as applied:
        set_reference(model, sdar(1, 16))
        ours = two_steps(StaticCache(config=model.config, max_cache_len=32))
        assert applied.report().entries[0].run.dense_calls.total() == 1
    assert close(ours[:1], plain[:1])
    assert not close(ours[1:], plain[1:], 1e-3)


def test_training_mode_and_given_embeddings_are_left_alone_and_counted():
    model, ids = sdar(), prompt(1, 4)
    ids[0, 1:] = MASK
    plain = model(input_ids=ids, use_cache=False).logits
    with put(model) as applied:
        run = applied.report().entries[0].run
        model.train()
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain)
        model.eval()
        embedded = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embedded, use_cache=False).logits, plain)
    assert run.dense_calls["training mode"] == 1
    assert any("inputs_embeds" in reason for reason in run.dense_calls)


def test_deepcopy_has_a_life_of_its_own_and_asks_the_same_reference():
    model, reference = sdar(), sdar(1, 16)
    with put(model, init="warm") as applied:
        set_reference(model, reference)
        sample(model, prompt())
        twin = copy.deepcopy(model)
        forwards = dict(applied.report().entries[0].run.forwards)
        assert torch.equal(sample(twin, prompt())[1], sample(model, prompt())[1])
        assert context_of(twin).start.model is reference
        assert context_of(twin) is not context_of(model)
        assert applied.report().entries[0].run.forwards == {k: 2 * v for k, v in forwards.items()}
    hf_accel.revert(twin)
    assert context_of(twin) is None
    assert context_of(model) is None


def test_revert_is_exact():
    model, ids = sdar(), prompt()
    plain = sample(model, ids)
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks), set(m.__dict__)) for m in model.modules()]
    applied = put(model)
    sample(model, ids)
    applied.revert()
    assert hooks == [(dict(m._forward_hooks), dict(m._forward_pre_hooks), set(m.__dict__)) for m in model.modules()]
    again = sample(model, ids)
    assert all(torch.equal(a, b) for a, b in zip(plain[0], again[0], strict=True))


def test_compiled_model_computes_the_same():
    model, ids = sdar(), prompt()
    with put(model):
        eager = sample(model, ids)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        ours = sample(compiled, ids)
        torch._dynamo.reset()
    assert torch.equal(ours[1], eager[1])
    assert close(ours[0], eager[0])


def test_beside_exact_attention_it_computes_the_same():
    model, ids = sdar(), prompt(2)
    with put(model):
        alone = sample(model, ids)
    with hf_accel.apply(model, {"prefix-split": {}, "rcd": {"trained": True}}) as applied:
        ours = sample(model, ids)
        assert [entry.run.forwards["denoise"] for entry in applied.report()] == [8, 8]
    assert torch.equal(ours[1], alone[1])
    assert close(ours[0], alone[0])


def test_scaled_embeddings_are_mixed_as_they_leave_the_module():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    model, ids = sdar(), prompt()
    with put(model):
        plain = sample(model, ids)
    scaled = Gemma3TextScaledWordEmbedding(64, 32, None, embed_scale=4.0)
    scaled.weight.data = model.model.embed_tokens.weight.data / 4
    model.model.embed_tokens = scaled
    with put(model):
        ours = sample(model, ids)
    assert torch.equal(ours[1], plain[1])
    assert close(ours[0], plain[0])


def test_an_embedding_that_was_replaced_after_apply_is_counted():
    model = sdar()
    with put(model) as applied:
        model.model.embed_tokens = copy.deepcopy(model.model.embed_tokens)
        model.model.embed_tokens._forward_hooks.clear()
        sample(model, prompt())
        run = applied.report().entries[0].run
    assert run.dense_calls == {"the hooked embedding did not run: it was replaced after apply": 6}
    assert run.steps == 0


def test_offloaded_model_computes_the_same():
    from accelerate import cpu_offload

    model, ids = sdar(), prompt()
    with put(model):
        plain = sample(model, ids)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.get_input_embeddings().weight.is_meta
    with put(model):
        ours = sample(model, ids)
    assert torch.equal(ours[1], plain[1])
    assert close(ours[0], plain[0])
