"""mini-sdar: the tasks, the training objective, and the shipped weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import hf_accel_zoo.sdar  # noqa: F401  registers the class
from hf_accel import zoo
from hf_accel.errors import InvalidSetting
from hf_accel_zoo.sdar import SDARConfig, SDARForCausalLM, block_causal_mask
from hf_accel_zoo.training.mini_sdar import judge, tasks, train
from hf_accel_zoo.training.mini_sdar.assemble import tokenizer

FOLDERS = tuple(name for name in zoo.names() if name in ("mini-sdar", "mini-seqd", "mini-rcd"))


def tiny(**changes: object) -> SDARForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = SDARConfig(**{**shape, **heads, "block_size": 4, "mask_token_id": 96, **changes})
    return SDARForCausalLM(config).eval()


# --- the model ---


@torch.no_grad()
def test_prefix_cache_equals_full_recompute_and_denoising_leaves_it_alone():
    model, ids = tiny(), torch.randint(0, 96, (2, 19), generator=torch.Generator().manual_seed(1))
    whole = model(ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    model(ids[:, :12], past_key_values=cache, store_kv=True)
    kept = cache.layers[0].keys.clone()
    for stop in (16, 19):
        step = model(ids[:, 12:stop], past_key_values=cache, store_kv=False).logits
        torch.testing.assert_close(step, whole[:, 12:stop], atol=1e-5, rtol=0)
    assert cache.get_seq_length() == 12
    assert torch.equal(cache.layers[0].keys, kept)


@torch.no_grad()
def test_a_left_padded_row_computes_what_it_does_alone():
    model, ids = tiny(), torch.randint(0, 96, (1, 13), generator=torch.Generator().manual_seed(2))
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.long), ids), dim=1)
    mask = torch.cat((torch.zeros(1, 5), torch.ones(1, 13)), dim=1)
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 5:], model(ids).logits, atol=1e-5, rtol=0)


def test_block_causal_mask_by_hand():
    mask = block_causal_mask(3, 2, past=2)[0, 0]
    assert mask.tolist() == [[True] * 4 + [False], [True] * 4 + [False], [True] * 5]
    padded = block_causal_mask(3, 2, padding=torch.tensor([[0, 1, 1]]))[0, 0]
    assert padded.tolist() == [[False, True, True]] * 3
    with pytest.raises(InvalidSetting, match="attention_mask"):
        block_causal_mask(3, 2, past=2, padding=torch.ones(1, 3))


def test_embeddings_and_ids_are_refused_together():
    model = tiny()
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(InvalidSetting, match="exactly one"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))


# --- the tasks ---


def test_documents_are_deterministic_and_whole():
    one, two, other = (tasks.document(np.random.default_rng(seed), 128, 320) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one[0], other[0])
    ids, roles, kinds = one
    assert ids.shape == roles.shape == kinds.shape == (320,)
    assert not roles[:128].any()
    assert (roles[128:] == 1).any()
    assert ((roles == 2) <= (ids == tasks.EOS)).all()
    assert not (ids == tasks.MASK).any()


@pytest.mark.parametrize("task", tasks.TASKS)
def test_checker_right_and_wrong(task):
    item = tasks.heldout(task, 256, 5)
    assert len(item.prompt) == 256
    assert tasks.check(item, [*item.answer, tasks.EOS, 3, 3])
    assert not tasks.check(item, item.answer)  # no end
    assert not tasks.check(item, [*item.answer[:-1], tasks.EOS])
    assert not tasks.check(item, [*item.answer[:-1], item.answer[0] if task != "add" else 3, tasks.EOS])
    assert not tasks.check(item, [])


def test_answers_stand_in_the_context():
    words = {index for index, word in enumerate(tasks.VOCABULARY) if word in tasks.VOCABULARY[-tasks.FILLER :]}
    for task in ("recall", "copy"):
        item = tasks.heldout(task, 256, 1)
        text, found = item.prompt[:-3], [item.prompt[-2:], item.answer, [tasks.IDS[";"]]]
        entry = [index for part in found for index in part]
        assert any(text[at : at + len(entry)] == entry for at in range(len(text)))
        assert words & set(text)
    linked = tasks.heldout("link", 256, 1)
    key, (target, *value) = linked.prompt[-1], linked.answer
    text = tasks.decode(linked.prompt)
    assert f"> {tasks.decode([key, target])} ;" in text
    assert f"# {tasks.decode([target, *value])} ;" in text
    ordered = tasks.heldout("sort", 256, 1)
    assert f"{{ {tasks.decode([ordered.prompt[-1]])} " in tasks.decode(ordered.prompt[:-3])
    assert ordered.answer == sorted(ordered.answer)


def test_every_heldout_item_can_be_drawn():
    """Some names have no reserved number to begin a list with; drawing on for one would never end."""
    for seed in range(128):
        assert len(tasks.heldout("sort", 64, seed).answer) >= 8


def test_sums_are_right():
    for seed in range(5):
        item = tasks.heldout("add", 64, seed)
        question = tasks.decode(item.prompt).rsplit("? + ", 1)[1]
        a, b = (int(part.replace(" ", "")) for part in question.split("&"))
        assert int(tasks.decode(item.answer).split("= ")[1].replace(" ", "")) == a + b


def pairs(ids: list[int]) -> list[tuple[int, int]]:
    """(name, what follows it) of every entry; not of questions, where the smallest number follows a list's name."""
    keys = [tasks.IDS[marker] for task, marker in tasks.MARKERS.items() if task != "add"]
    places = [at for at in range(len(ids) - 2) if ids[at] in keys and (at == 0 or ids[at - 1] != tasks.IDS["?"])]
    return [(ids[at + 1], ids[at + 2]) for at in places]


def operands(ids: list[int]) -> list[tuple[int, int]]:
    """Of every sum that is asked: digits behind `+`, `&`, digits; the working's first pair tells how many."""
    found = []
    text = tasks.decode(ids).split()
    for at in (index for index, word in enumerate(text) if word == "+"):
        middle = text.index("&", at)
        a = "".join(text[at + 1 : middle])
        found.append((int(a), int("".join(text[middle + 1 : middle + 1 + len(a)]))))
    return found


def test_heldout_pairs_never_occur_in_training():
    rng = np.random.default_rng(0)
    documents = [tasks.document(rng, 256, 512)[0].tolist() for _ in range(80)]
    seen = {pair for ids in documents for pair in pairs(ids)}
    sums = {pair for ids in documents for pair in operands(ids)}
    assert len(seen) > 500
    assert len(sums) > 40
    assert not any(tasks.reserved(*pair) for pair in seen | sums)
    assert tasks.reserved(*operands(tasks.heldout("add", 64, 0).prompt)[-1])
    for task in ("recall", "link", "copy", "sort"):
        item = tasks.heldout(task, 256, 0)
        asked = dict(pairs(item.prompt[:-3]))[item.prompt[-1]]
        assert tasks.reserved(item.prompt[-1], asked)


# --- the objective ---


@torch.no_grad()
def test_the_split_attention_of_training_equals_the_doubled_sequence():
    model = train.fresh().eval()
    data = train.batch(np.random.default_rng(0), 48, 2, full=0.2, skip=0.5)
    clean = data.clean.shape[1]
    inputs = train.plain(model, data)
    causal = block_causal_mask(clean, tasks.BLOCK).expand(2, 1, -1, -1)
    old = torch.cat((causal, causal.new_zeros(2, 1, clean, inputs.shape[1] - clean)), dim=-1)
    whole = model.model(
        inputs_embeds=inputs,
        position_ids=data.positions,
        attention_mask=torch.cat((old, data.visible), dim=2),
        use_cache=False,
    ).last_hidden_state[:, clean:]
    torch.testing.assert_close(train.noisy_hidden(model, inputs, data), whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_noisy_block_is_computed_as_at_inference():
    model = train.fresh().eval()
    data = train.batch(np.random.default_rng(1), 48, 1, full=0.5)
    hidden = train.noisy_hidden(model, train.plain(model, data), data)
    slot = 3
    start = int(data.block[0, slot]) * tasks.BLOCK
    cache = DynamicCache(config=model.config)
    model(data.clean[:, :start], past_key_values=cache, store_kv=True)
    step = model(data.noisy[:, slot], past_key_values=cache, store_kv=False).logits
    rows = hidden[:, slot * tasks.BLOCK : (slot + 1) * tasks.BLOCK]
    torch.testing.assert_close(model.lm_head(rows), step, atol=1e-4, rtol=1e-4)


def test_only_masked_answers_count():
    data = train.batch(np.random.default_rng(2), 48, 3, full=0.2)
    masked = data.noisy == tasks.MASK
    assert masked.any()
    assert torch.equal(data.weight > 0, masked)
    assert torch.equal(data.noisy[~masked], data.truth[~masked])


def test_residuals_change_masks_of_the_noisy_half_alone():
    model, reference = train.fresh(), train.fresh()
    data = train.batch(np.random.default_rng(3), 48, 2, full=0.2)
    with torch.no_grad():
        changed = (train.with_residuals(model, reference, data) != train.plain(model, data)).any(-1)
    assert not changed[:, : data.clean.shape[1]].any()
    assert torch.equal(changed[:, data.clean.shape[1] :], (data.noisy == tasks.MASK).flatten(1))


# --- what is shipped ---


@pytest.fixture(scope="module", params=FOLDERS)
def shipped(request):
    folder = zoo.path(request.param)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return request.param, model, AutoTokenizer.from_pretrained(folder)


def test_folders_load(shipped):
    name, model, words = shipped
    assert type(model) is SDARForCausalLM
    assert (model.config.block_size, model.config.mask_token_id) == (tasks.BLOCK, words.mask_token_id)
    assert (getattr(model.config, "rcd", None) is not None) == (name == "mini-rcd")
    text = tasks.decode(tasks.heldout("recall", 64, 0).prompt)
    assert words(text).input_ids == tasks.encode(text)
    assert words.decode(words(text).input_ids) == text


def test_tokenizer_marks_unknown_words():
    assert tokenizer()("zebra 7").input_ids == [tasks.IDS["<unk>"], tasks.IDS["7"]]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_mini_sdar_answers_heldout_items(task):
    """Measured over 64 items a task, 0.94 to 1.00 at 1,024 tokens; six of eight leaves room for chance alone."""
    model = judge.load(zoo.path("mini-sdar"))
    assert judge.accuracy(model, task, 256, 8, batch=8)["accuracy"] >= 0.75


def test_untrained_weights_answer_nothing():
    assert judge.accuracy(train.fresh().eval(), "recall", 256, 4)["accuracy"] == 0.0
