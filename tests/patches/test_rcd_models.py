"""RCD on models that run the whole sequence at every step; what is refused, warned of, declared."""

from __future__ import annotations

import warnings

import pytest
import torch

import hf_accel
from hf_accel.errors import InvalidSetting, NotApplicable, WeightsMismatch
from hf_accel.patches.rcd import residual_embeddings, set_reference
from hf_accel.testing.models import dream, llada, llada2
from hf_accel.testing.models.gemma import diffusion_gemma
from hf_accel_zoo.sdar import SDARForCausalLM
from rcd_models import MASK, close, commit, prompt, put, sample, sdar

# -- models that run the whole sequence ----------------------------------------------------------------------------


@torch.no_grad()
def refine(model, ids, count, steps=None, read=None, by_hand=False, shift=0):
    """``count`` masks behind the prompt, filled one by one; logits of every step."""
    tokens = torch.cat([ids, torch.full((len(ids), count), MASK)], 1)
    last, out = None, []
    weight = model.get_input_embeddings().weight
    for _ in range(steps or count):
        if by_hand and last is not None:
            logp = last.log_softmax(-1)
            alpha = (-(logp.exp() * logp).sum(-1) / torch.tensor(64.0).log())[..., None]
            e = weight[tokens]
            e = torch.where((tokens == MASK)[..., None], (1 - alpha) * e + alpha * (logp.exp() @ weight), e)
            logits = model(inputs_embeds=e).logits
        else:
            logits = model(input_ids=tokens).logits
        last = logits if not shift else torch.cat([logits[:, :1], logits[:, :-1]], 1)
        out.append(logits)
        tokens = commit(tokens, last)
    return out, tokens


@pytest.mark.parametrize("family", [llada, dream], ids=["llada", "dream"])
def test_full_bidirectional_models(family):
    model, shift = family.build(), int(family is dream)
    by_hand = refine(model, prompt(2, 5), 6, by_hand=True, shift=shift)
    plain = refine(model, prompt(2, 5), 6, shift=shift)
    with put(model) as applied:
        first = refine(model, prompt(2, 5), 6, shift=shift)
        refine(model, prompt(2, 5, 1), 6, steps=3, shift=shift)  # abandoned
        again = refine(model, prompt(2, 5), 6, shift=shift)
        run = applied.report().entries[0].run
    assert torch.equal(first[1], by_hand[1])
    # A step is fed what the last one gave, so that the rounding of one is added to that of the next.
    for step, (ours, theirs) in enumerate(zip(first[0], by_hand[0], strict=True), 1):
        assert close([ours], [theirs], 2e-5 * step), f"step {step}"
    assert not close(first[0], plain[0], 1e-3)
    assert torch.equal(first[0][0], plain[0][0])
    assert all(torch.equal(a, b) for a, b in zip(first[0], again[0], strict=True))
    assert run.forwards == {"whole": 15}
    assert run.blocks == 3
    assert not run.dense_calls


def test_the_same_tokens_again_are_another_request():
    model, ids = llada.build(), prompt(1, 8)
    ids[0, 4:] = MASK
    plain = model(input_ids=ids).logits
    with put(model), torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(input_ids=ids).logits, plain)


def test_a_row_that_holds_another_text_begins_anew_and_others_go_on():
    model, ids = llada.build(), prompt(2, 8)
    ids[:, 4:] = MASK
    with put(model), torch.no_grad():
        tokens = commit(ids, model(input_ids=ids).logits)
        going_on = model(input_ids=tokens).logits
        model(input_ids=ids)
        other = tokens.clone()
        other[1] = prompt(1, 8, 9)
        other[1, 4:] = MASK
        mixed = model(input_ids=other).logits
    fresh = model(input_ids=other).logits
    assert close([mixed[0]], [going_on[0]])
    assert torch.allclose(mixed[1], fresh[1], atol=1e-6)
    assert not torch.allclose(mixed[0], fresh[0], atol=1e-3)


def windows(model, ids, by_hand=False):
    """LLaDA2's sampler: a growing window, logits of its last block read."""
    steps, text = [], ids
    for _ in range(2):
        tokens, last = torch.cat([text, torch.full((len(ids), 8), MASK)], 1), None
        while (tokens == MASK).any():
            given = {"attention_mask": torch.ones_like(tokens), "position_ids": torch.arange(tokens.shape[1])[None]}
            if by_hand and last is not None:
                e = residual_embeddings(model.get_input_embeddings(), tokens, last, MASK)
                last = model(inputs_embeds=e, **given).logits
            else:
                last = model(input_ids=tokens, **given).logits
            steps.append(last[:, -8:])
            tokens = commit(tokens, last, 3)
        text = tokens
    return steps, text


@torch.no_grad()
def test_growing_windows_of_llada2():
    model, ids = llada2.build(), prompt(2, 8)
    by_hand = windows(model, ids, by_hand=True)
    plain = windows(model, ids)
    with put(model, mask_token_id=MASK):
        ours = windows(model, ids)
    assert torch.equal(ours[1], by_hand[1])
    assert close(ours[0], by_hand[0])
    assert torch.equal(ours[0][0], plain[0][0])
    assert not close(ours[0], plain[0], 1e-3)


# -- refusals, warnings, declarations ------------------------------------------------------------------------------


def test_models_without_a_mask_token_are_refused_in_words():
    with pytest.raises(NotApplicable, match=r"no mask token.*self-conditioning.*'soft-embed'"):
        hf_accel.apply(diffusion_gemma(), "rcd")
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(NotApplicable, match="not a masked diffusion language model"):
        hf_accel.apply(LlamaForCausalLM(tiny), "rcd")
    model = llada2.build()
    with pytest.raises(NotApplicable, match="mask_token_id="):
        put(model)
    assert not model._forward_hooks


def test_bad_settings_are_refused():
    for bad in ({"init": "hot"}, {"t_res": 0.0}, {"alpha": 1.5}, {"top_k": 0}, {"alpha_mode": "top-1"}):
        with pytest.raises(InvalidSetting):
            put(sdar(), **bad)


def test_warm_start_needs_a_reference_of_the_same_vocabulary():
    model = sdar()
    with put(model, init="warm"):
        with pytest.raises(NotApplicable, match="set_reference"):
            sample(model, prompt())
        with pytest.raises(WeightsMismatch, match="vocabulary"):
            set_reference(model, sdar(vocab_size=70))
        with pytest.raises(WeightsMismatch, match="mask token"):
            set_reference(model, sdar(mask_token_id=5))
    with pytest.raises(NotApplicable, match="not on this"):
        set_reference(model, sdar())


def test_reference_by_folder_equals_the_object_and_survives_applying_again(tmp_path):
    model, reference = sdar(), sdar(1, 16)
    reference.save_pretrained(tmp_path)
    with put(model, init="warm", reference=str(tmp_path)):
        by_folder = sample(model, prompt())
    with put(model, init="warm"):
        set_reference(model, reference)
        hf_accel.apply(model, "rcd", init="warm", trained=True, t_res=1.0)
        by_object = sample(model, prompt())
    hf_accel.revert(model)
    assert close(by_folder[0], by_object[0])
    with pytest.raises(NotApplicable, match="cannot be loaded"):
        put(model, init="warm", reference=str(tmp_path / "nothing"))


def test_weights_that_nothing_declares_are_warned_of_once():
    model = sdar()
    with pytest.warns(UserWarning, match="not declared RCD's"):
        applied = hf_accel.apply(model, "rcd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_accel.apply(model, "rcd", t_res=0.9)
        sample(model, prompt())
    assert any("not declared" in note for note in applied.report().entries[0].notes)
    hf_accel.revert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for settings in ({"trained": True}, {"alpha_scale": 0.0}):
            hf_accel.apply(model, "rcd", **settings).revert()


def test_declared_weights_are_known_after_loading(tmp_path):
    from hf_accel.checkpoints.declaration import declaration_of, declare

    model = sdar()
    told = {"stage": 2, "reference": "a/b", "alpha_mode": "fixed", "alpha": 0.2, "t_res": 1.0, "top_k": None}
    declare(model, "rcd", told)
    model.save_pretrained(tmp_path)
    again = SDARForCausalLM.from_pretrained(tmp_path).eval()
    assert declaration_of(again, "rcd") == told
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        applied = hf_accel.apply(again, "rcd", alpha_mode="fixed", alpha=0.2)
    assert any("a/b" in note for note in applied.report().entries[0].notes)
    applied.revert()
    with pytest.warns(UserWarning, match="alpha_mode='fixed'.*alpha_mode='normalized-entropy'"):
        hf_accel.apply(again, "rcd").revert()
    declare(again, "rcd", {"stage": 1})
    with pytest.warns(UserWarning, match="stage 1"):
        hf_accel.apply(again, "rcd").revert()


def test_llada2_pipeline_with_and_without_its_prefix_cache():
    from hf_accel.testing.models.llada2_pipeline import generate, pipeline

    settings = {"trained": True, "mask_token_id": MASK}
    pipe = pipeline()
    plain = generate(pipe)
    with hf_accel.apply(pipe, "rcd", **settings) as applied:
        alone = generate(pipe)
        assert applied.report().entries[0].run.steps
    with hf_accel.apply(pipe, {"prefix-cache": {}, "rcd": settings}) as applied:
        cached = generate(pipe)
        runs = [entry.run for entry in applied.report()]
    assert torch.equal(cached[0], alone[0])
    assert close(cached[1], alone[1], 1e-4)
    assert not close(alone[1][:3], plain[1][:3], 1e-3)
    (cache,) = [run for run in runs if hasattr(run, "cached_forwards")]
    assert cache.cached_forwards
    assert not any(run.dense_calls for run in runs)
