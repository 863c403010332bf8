"""Training of RCD: noise and the doubled sequence, gradients by formula and finite differences, both stages."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

import hf_accel
from hf_accel.checkpoints.declaration import declaration_of, file_name
from hf_accel.errors import InvalidSetting, NotApplicable, PresetError, WeightsMismatch
from hf_accel.patches.rcd import RCDConfig, residual_embeddings
from hf_accel.testing.models import dream, llada
from hf_accel.train.masked import Noisy, answer_tokens, denoising_loss, doubled, mask_tokens
from hf_accel.train.rcd import RCDTrainer, RCDTrainingConfig
from hf_accel_zoo.sdar import SDARConfig, SDARForCausalLM

MASK, BLOCK = 36, 4


def sdar(seed=0, hidden=32, **fields):
    settings = {
        "vocab_size": 37, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "block_size": BLOCK,
        "mask_token_id": MASK, "pad_token_id": None, "tie_word_embeddings": False,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SDARForCausalLM(SDARConfig(**(settings | fields)))


def batch(rows=4, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, MASK, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "labels": labels}


def tuner(model, out, *, reference=None, residual=None, resume=None, **settings):
    config = RCDTrainingConfig.build({"progress": False, "steps": 3, "lr": 1e-2, **settings})
    return RCDTrainer(model, config, out=out, reference=reference, residual=residual, resume=resume)


def lora(model, **settings):
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **settings}))


# -- noise and layout ----------------------------------------------------------------------------------------------


def test_only_answer_tokens_are_masked_at_the_level_told():
    ids = batch(64, 256)["input_ids"]
    answer = torch.zeros_like(ids, dtype=torch.bool)
    answer[:, 16:] = True
    for block, levels in ((None, 1), (32, 8)):
        noisy = mask_tokens(ids, answer, MASK, torch.Generator().manual_seed(3), block=block)
        again = mask_tokens(ids, answer, MASK, torch.Generator().manual_seed(3), block=block)
        assert torch.equal(noisy.ids, again.ids)
        assert not noisy.masked[:, :16].any()
        assert torch.equal(noisy.ids == MASK, noisy.masked)
        assert torch.equal(noisy.ids[~noisy.masked], ids[~noisy.masked])
        assert all(len(row.unique()) == levels for row in noisy.level)
        assert ((noisy.level > 0) & (noisy.level <= 1)).all()
        assert abs(float((noisy.masked[:, 16:].float() - noisy.level[:, 16:]).mean())) < 0.02
        assert abs(float(noisy.level.mean()) - 0.5) < 0.15


def test_the_loss_by_hand():
    ids, logits = batch(2, 3)["input_ids"], torch.randn(2, 3, 37)
    masked = torch.tensor([[True, False, True], [False, False, True]])
    level = torch.tensor([[0.5] * 3, [0.25] * 3])
    answer = torch.tensor([[True, True, True], [False, True, True]])
    loss = denoising_loss(logits, ids, Noisy(ids, masked, level), answer)
    by_hand = sum(
        F.cross_entropy(logits[i, j], ids[i, j]) / level[i, j] for i in range(2) for j in range(3) if masked[i, j]
    )
    assert torch.allclose(loss, by_hand / 5)


def test_the_doubled_mask_by_its_definition():
    length = 10
    mask, positions = doubled(length, BLOCK)
    for i in range(2 * length):
        for j in range(2 * length):
            query, key = i % length // BLOCK, j % length // BLOCK
            if i < length:
                expected = query == key if j < length else key < query
            else:
                expected = j >= length and key <= query
            assert bool(mask[0, 0, i, j]) == expected, (i, j)
    assert positions.tolist() == [[*range(length), *range(length)]]
    with pytest.raises(InvalidSetting):
        doubled(length, 0)


@torch.no_grad()
def test_one_doubled_forward_denoises_every_block_behind_its_clean_prefix():
    model, ids = sdar(initializer_range=0.2).eval(), batch(2, 12)["input_ids"]
    noisy = ids.clone()
    noisy[:, [1, 4, 6, 9, 10, 11]] = MASK
    layout = doubled(12, BLOCK)
    both = model(input_ids=torch.cat([noisy, ids], 1), use_cache=False, **layout._asdict()).logits
    for start in range(0, 12, BLOCK):
        alone = torch.cat([ids[:, :start], noisy[:, start : start + BLOCK]], 1)
        expected = model(input_ids=alone, use_cache=False).logits[:, start:]
        assert torch.allclose(both[:, start : start + BLOCK], expected, atol=1e-5)
    assert torch.allclose(both[:, 12:], model(input_ids=ids, use_cache=False).logits, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_on_either_side(side):
    model, ids = sdar(initializer_range=0.2).eval(), batch(1, 10)["input_ids"]
    noisy = ids.clone()
    noisy[:, [2, 5, 6]] = MASK
    alone = model(input_ids=torch.cat([noisy, ids], 1), use_cache=False, **doubled(10, BLOCK)._asdict()).logits
    pad, where = (3, 0) if side == "left" else (0, 3), slice(3, 13) if side == "left" else slice(0, 10)
    valid = F.pad(torch.ones_like(ids), pad)
    halves = [F.pad(half, pad) for half in (noisy, ids)]
    layout = doubled(13, BLOCK, valid)
    padded = model(input_ids=torch.cat(halves, 1), use_cache=False, **layout._asdict()).logits
    assert torch.isfinite(padded).all()
    assert torch.allclose(padded[:, :13][:, where], alone[:, :10], atol=1e-5)


def test_answers_without_labels_are_all_but_padding():
    ids = batch(1, 4)["input_ids"]
    valid = torch.tensor([[0, 1, 1, 1]])
    assert answer_tokens(ids, None, valid).tolist() == [[False, True, True, True]]
    assert answer_tokens(ids, None, None).all()
    labels = torch.tensor([[3, 3, -100, 3]])
    assert answer_tokens(ids, labels, valid).tolist() == [[False, True, False, True]]


# -- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("settings", [{}, {"t_res": 0.7, "temper_delta": True}])
def test_gradient_of_the_embeddings_by_formula_and_finite_differences(detach, settings):
    generator = torch.Generator().manual_seed(0)
    embedding = torch.nn.Embedding(11, 5)
    ids = torch.tensor([[3, 10, 10, 1], [10, 2, 2, 10]])
    logits = (torch.randn(2, 4, 11, generator=generator) * 2).requires_grad_(True)
    wanted = torch.randn(2, 4, 5, generator=generator)
    residual = RCDConfig(**settings)

    def loss():
        e = residual_embeddings(embedding, ids, logits.detach(), 10, residual, detach_residual=detach)
        return (e * wanted).sum() + 0.5 * (e * e).sum(), e

    value, e = loss()
    e.retain_grad()
    value.backward()
    assert logits.grad is None
    p = (logits.detach() / residual.t_res).softmax(-1)
    alpha = -(p * p.log()).sum(-1) / torch.tensor(11.0).log()
    if not residual.temper_delta:
        p = logits.detach().softmax(-1)
    by_formula = torch.zeros(11, 5)
    for row, column in [(i, j) for i in range(2) for j in range(4)]:
        token, g = ids[row, column], e.grad[row, column]
        if token == 10:
            a = alpha[row, column]
            by_formula[10] += (1 - a) * g
            if not detach:
                by_formula += a * p[row, column][:, None] * g
        else:
            by_formula[token] += g
    assert torch.allclose(embedding.weight.grad, by_formula, atol=1e-5)
    if detach:
        return
    for token, column in ((10, 0), (3, 2), (7, 4)):  # the mask, a token of the text, one of residuals alone
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                embedding.weight[token, column] += sign * 0.05
                values.append(float(loss()[0]))
                embedding.weight[token, column] -= sign * 0.05
        slope = (values[0] - values[1]) / 0.1
        assert abs(slope - float(embedding.weight.grad[token, column])) < 1e-3


def test_stage_two_reaches_the_target_alone(tmp_path):
    model, reference = sdar(), sdar(1, 16)
    reference.train()
    trainer = tuner(model, tmp_path, reference=reference)
    trainer.loss(batch()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert all(p.grad is None and p.requires_grad for p in reference.parameters())
    assert all(m.training for m in reference.modules())


def test_stage_two_is_stage_one_where_the_residual_is_off(tmp_path):
    model, reference = sdar(), sdar(1, 16)
    plain = tuner(model, tmp_path, stage=1).loss(batch())
    off = tuner(model, tmp_path, reference=reference, residual=RCDConfig(alpha_scale=0.0)).loss(batch())
    on = tuner(model, tmp_path, reference=reference).loss(batch())
    assert torch.equal(plain, off)
    assert not torch.isclose(plain, on)


def test_the_objective_by_hand(tmp_path):
    from hf_accel.train.loop.random import generator_for

    model, reference, given = sdar(initializer_range=0.2), sdar(1, 16, initializer_range=0.2), batch()
    ids, answer = given["input_ids"], given["labels"] != -100
    noisy = mask_tokens(ids, answer, MASK, generator_for(0, "x", 7))
    layout = doubled(12, BLOCK)._asdict()
    with torch.no_grad():
        z = reference(input_ids=torch.cat([noisy.ids, ids], 1), use_cache=False, **layout).logits[:, :12]
    p = z.softmax(-1)
    alpha = (-(p * p.log()).sum(-1) / torch.tensor(37.0).log())[..., None]
    weight = model.get_input_embeddings().weight
    e = torch.where(noisy.masked[..., None], (1 - alpha) * weight[noisy.ids] + alpha * (p @ weight), weight[noisy.ids])
    logits = model(inputs_embeds=torch.cat([e, weight[ids]], 1), use_cache=False, **layout).logits[:, :12]
    expected = denoising_loss(logits, ids, noisy, answer)
    assert torch.allclose(tuner(model, tmp_path, reference=reference).loss(given, ("x", 7)), expected, atol=1e-5)


@pytest.mark.parametrize("family", [llada, dream], ids=["llada", "dream"])
def test_full_bidirectional_models_learn_on_the_noisy_sequence(family, tmp_path):
    from hf_accel.train.loop.random import generator_for

    model, reference, given = family.build(), family.build(1), batch()
    ids, answer = given["input_ids"], given["labels"] != -100
    noisy = mask_tokens(ids, answer, 63, generator_for(0, "x", 7))
    roll = (lambda z: torch.cat([z[:, :1], z[:, :-1]], 1)) if family is dream else (lambda z: z)
    with torch.no_grad():
        e = residual_embeddings(model.get_input_embeddings(), noisy.ids, roll(reference(noisy.ids).logits), 63)
    expected = denoising_loss(roll(model(inputs_embeds=e).logits), ids, noisy, answer)
    assert torch.allclose(tuner(model, tmp_path, reference=reference).loss(given, ("x", 7)), expected, atol=1e-5)


def test_gradient_checkpointing_and_autocast(tmp_path):
    model, reference = sdar(), sdar(1, 16)
    trainer = tuner(model, tmp_path, reference=reference, gradient_checkpointing=True)

    def gradients():
        model.zero_grad()
        loss = trainer.loss(batch())
        loss.backward()
        return float(loss.detach()), [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    with trainer.training():
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        assert all(torch.equal(a, b) for a, b in zip(plain[1], gradients()[1], strict=True))
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    low = tuner(model, tmp_path, reference=reference, precision="bf16")
    loss = low.loss(batch())
    loss.backward()
    assert abs(float(loss.detach()) - plain[0]) < 2e-2 * plain[0]
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


# -- runs ----------------------------------------------------------------------------------------------------------


def test_residuals_of_a_good_reference_lower_the_loss(tmp_path):
    data = [batch(8, 16)]
    reference = sdar(0, 32)
    tuner(reference, tmp_path / "1", stage=1, steps=80, lr=5e-3).fit(data)

    def learned(**more):
        trainer = tuner(sdar(1, 24), tmp_path / "2", steps=40, lr=5e-3, **more)
        trainer.fit(data)
        with torch.no_grad():
            return sum(float(trainer.loss(data[0], ("held out", i))) for i in range(8)) / 8

    assert learned(stage=2, reference=reference) < 0.7 * learned(stage=1)


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(tmp_path):
    data, reference = [batch(seed=i) for i in range(3)], sdar(1, 16)
    whole = sdar()
    straight = tuner(whole, tmp_path / "a", reference=reference, steps=6).fit(data)
    stopped = sdar()
    seen = []

    def stop(trainer):
        seen.append(trainer.step)
        return trainer.step == 3

    tuner(stopped, tmp_path / "b", reference=reference, steps=6).fit(data, callback=stop)
    assert seen == [1, 2, 3]
    resumed = sdar()
    history = tuner(resumed, tmp_path / "b", reference=reference, steps=6, resume="latest").fit(data)
    assert [e["loss"] for e in history.train] == [e["loss"] for e in straight.train]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(WeightsMismatch, match="lr="):
        tuner(sdar(), tmp_path / "b", reference=reference, steps=6, lr=1e-3, resume="latest")
    with pytest.raises(PresetError, match="nothing to resume"):
        tuner(sdar(), tmp_path / "c", reference=reference, resume="latest")


class Examples(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {name: value[0] for name, value in batch(1, 12, index).items()}


def test_datasets_validation_and_what_is_put_back(tmp_path):
    model, reference = sdar().eval(), sdar(1, 16).eval()
    state = torch.get_rng_state()
    trainer = tuner(model, tmp_path, reference=reference, batch_size=4, accumulate=2, validate_every=2)
    history = trainer.fit(Examples(), validation=[batch(seed=9)])
    assert [e["step"] for e in history.validation] == [0, 2, 3]
    assert json.loads((tmp_path / "loss.json").read_text())["train"] == history.train
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(InvalidSetting, match="input_ids"):
        trainer.loss({"tokens": batch()["input_ids"]})


def test_the_declaration_goes_with_the_saved_model(tmp_path):
    model, reference = sdar(), sdar(1, 16)
    reference.config._name_or_path = "owner/reference"
    trainer = tuner(model, tmp_path / "run", reference=reference, residual=RCDConfig(t_res=0.9))
    trainer.fit([batch()])
    trainer.save(tmp_path / "saved")
    again = SDARForCausalLM.from_pretrained(tmp_path / "saved").eval()
    told = declaration_of(again, "rcd")
    assert told["stage"] == 2
    assert told["reference"] == "owner/reference"
    assert told["t_res"] == 0.9
    assert told["alpha_mode"] == "normalized-entropy"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_accel.apply(again, "rcd", t_res=0.9).revert()
    first = tuner(reference, tmp_path / "first", stage=1)
    first.fit([batch()])
    assert declaration_of(reference, "rcd") == {"stage": 1, "mask_token_id": MASK}


# -- LoRA ----------------------------------------------------------------------------------------------------------


# peft still asks transformers by an old name
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("embeddings", ["frozen", "lora", "whole"])
def test_lora_with_and_without_the_embeddings(embeddings, tmp_path):
    from peft import PeftModel

    more = {
        "frozen": {},
        "lora": {"target_modules": ["q_proj", "embed_tokens"]},
        "whole": {"modules_to_save": ["embed_tokens"]},
    }
    model, reference = lora(sdar(), **more[embeddings]), sdar(1, 16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = tuner(model, tmp_path / "run", reference=reference)
    trainer.fit([batch()])
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert moved <= {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("embed_tokens" in name for name in moved) == (embeddings != "frozen")
    trainer.save(tmp_path / "adapter")
    told = json.loads((tmp_path / "adapter" / file_name("rcd")).read_text())
    assert told["rcd"]["stage"] == 2

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*Unexpected keyword.*")
        again = PeftModel.from_pretrained(sdar(), str(tmp_path / "adapter")).eval()
    with pytest.warns(UserWarning, match="not declared RCD's"):
        hf_accel.apply(again, "rcd").revert()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        applied = hf_accel.apply(again, "rcd", weights=str(tmp_path / "adapter"))
    ids = batch(1, 8)["input_ids"]
    ids[:, 4:] = MASK
    with torch.no_grad():
        again(input_ids=ids, use_cache=False)
        ids[:, 5] = 7
        hooked = again(input_ids=ids, use_cache=False).logits
        assert applied.report().entries[0].run.rows == 3
    applied.revert()
    assert torch.isfinite(hooked).all()
    with pytest.raises(WeightsMismatch, match="declares no rcd weights"):
        hf_accel.apply(again, "rcd", weights=str(tmp_path / "run"))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_adapter_added_by_transformers_and_merged_adapter_keep_the_declaration(tmp_path):
    from peft import LoraConfig

    model, reference = sdar(), sdar(1, 16)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = tuner(model, tmp_path / "run", reference=reference)
    trainer.fit([batch()])
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert json.loads((tmp_path / "adapter" / file_name("rcd")).read_text())["rcd"]["stage"] == 2

    peft_model = lora(sdar())
    tuner(peft_model, tmp_path / "run2", reference=reference).fit([batch()])
    merged = peft_model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert declaration_of(SDARForCausalLM.from_pretrained(tmp_path / "merged"), "rcd")["stage"] == 2


# -- errors --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_trained_is_refused_in_words(tmp_path):
    with pytest.raises(NotApplicable, match="needs reference="):
        tuner(sdar(), tmp_path)
    model = sdar()
    with pytest.raises(NotApplicable, match="the target itself"):
        tuner(model, tmp_path, reference=model)
    with pytest.raises(WeightsMismatch, match="not in vocabulary"):
        tuner(model, tmp_path, reference=sdar(vocab_size=40))
    with pytest.raises(WeightsMismatch, match="mask token"):
        tuner(model, tmp_path, reference=sdar(mask_token_id=3))
    with pytest.raises(NotApplicable, match="requires a gradient"):
        tuner(sdar().requires_grad_(False), tmp_path, stage=1)
    no_mask = llada.build()
    no_mask.config.mask_token_id = None
    with pytest.raises(NotApplicable, match="mask token"):
        tuner(no_mask, tmp_path, stage=1)
    with pytest.raises(InvalidSetting, match="block_length"):
        tuner(llada.build(), tmp_path, stage=1, layout="doubled")
    with pytest.warns(UserWarning, match="bfloat16"):
        tuner(sdar().bfloat16(), tmp_path, stage=1)
    with pytest.raises(InvalidSetting):
        RCDTrainingConfig(stage=3)
