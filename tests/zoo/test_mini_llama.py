"""mini-llama: the text, the task, the training objective, the judge, and the shipped weights."""

from __future__ import annotations

import copy
import math
import re
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_accel import zoo
from hf_accel.errors import InvalidSetting
from hf_accel.zoo import llama
from hf_accel_zoo.training.mini_llama import judge, task, text, train
from hf_accel_zoo.training.mini_llama import model as parts

NAME = "mini-llama"


@pytest.fixture(scope="module")
def tokens() -> Tokenizer:
    """A tokenizer of this machine's text, from a few files."""
    files = list(text.documents("train").values())[:20]
    return parts.learn_tokens([*files, "".join(item.text for item in task.items("train", 50))])


@pytest.fixture(scope="module")
def tokenizer(tokens) -> PreTrainedTokenizerFast:
    return parts.wrap(tokens)


def tiny(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": parts.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **heads, **changes})).eval()


# --- the text ---


def test_files_are_split_by_the_name_of_their_module():
    split = {name: text.documents(name) for name in text.SPLITS}
    assert not set(split["train"]) & set(split["heldout"])
    assert all(text.heldout(name) == (held == "heldout") for held, files in split.items() for name in files)
    # the hash, pinned: a change would put files that weights have seen among the held-out ones
    assert {name for name in ("argparse", "ast", "subprocess", "json", "heapq", "os") if text.heldout(name)} == {
        "argparse",
        "ast",
        "subprocess",
    }
    sizes = {name: sum(map(len, files.values())) for name, files in split.items()}
    assert sizes["train"] > 5e6
    assert 0.03 < sizes["heldout"] / sizes["train"] < 0.2


def test_what_is_no_text_to_learn_from_goes(tmp_path):
    body = "".join(f"def function_number_{index}(argument):\n    return {index}\n\n\n" for index in range(20))
    other = body.replace("function", "procedure").replace("argument", "parameter")
    files = {
        "kept.py": "# Copyright 1999 Someone.\n# All of it.\n\n" + body,
        "package/__init__.py": other.replace("procedure", "operation"),
        "package/again.py": "'''A copy with a new first line.'''\n" + body,
        "test/test_kept.py": other,
        "encodings/cp9.py": other,
        "short.py": "x = 1\n",
        "template.py": "# coding: no-such-coding\n" + other,
    }
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    found = text.read(tmp_path)
    assert list(found) == ["kept", "package"]
    assert found["kept"] == body.strip("\n") + "\n"


def test_clean_leaves_comments_that_are_not_about_rights():
    source = "# licensed to nobody\n\n# how it works   \nx = 1  # copyright of x\n\f\ny = 2\n\n\n"
    assert text.clean(source) == "# how it works\nx = 1  # copyright of x\n\ny = 2\n"


def test_windows_are_even_and_within_the_text():
    ids = np.arange(100)
    found = text.windows(ids, 4, 10)
    assert found[:, 0].tolist() == [0, 30, 60, 90]
    assert (found - found[:, :1] == np.arange(10)).all()


def test_tokens_give_the_text_back_and_digits_stand_alone(tokens):
    for source in ("x = [10, 2]\n    if y:\n\n\n\treturn 'é→'\n", task.items("train", 1)[0].text):
        assert tokens.decode(tokens.encode(source).ids) == source
    assert tokens.encode("1234").tokens == list("1234")
    assert all(len(token) == 1 for token in tokens.get_vocab() if set(token) & set("0123456789"))
    assert tokens.token_to_id(text.EOS) == 0
    assert tokens.get_vocab_size() == parts.VOCABULARY


# --- the task ---


@pytest.mark.parametrize("name", task.TASKS)
def test_answers_are_right_and_the_checker_knows(name):
    for item in task.items("heldout", 20, tasks=(name,)):
        assert item.task == name
        assert item.prompt.startswith(">>> ")
        assert item.prompt.count("\n") == item.answer.count("\n") == 1
        assert repr(eval(item.prompt[4:])) + "\n" == item.answer
        assert task.check(item, item.answer)
        assert task.check(item, item.answer + ">>> 1 + 1\n2\n")
        assert not task.check(item, item.answer.rstrip("\n"))
        assert not task.check(item, item.answer.replace("'\n", "0'\n"))
        assert not task.check(item, "")


def test_items_follow_from_their_seed():
    assert task.items("train", 12, 3) == task.items("train", 12, 3)
    assert task.items("train", 12, 3) != task.items("train", 12, 4)
    assert [item.task for item in task.items("train", 8)] == [*task.TASKS, next(iter(task.TASKS))]


def digits_of(item: task.Item) -> str:
    """The string that an item is about: the longest of its prompt, put together where it is shown in two parts."""
    return max(re.findall(r"\d+", item.prompt.replace("' + '", "")), key=len)


def test_strings_of_heldout_items_are_never_trained_on():
    rng = np.random.default_rng(0)
    related = [item for item in (task.related(rng) for _ in range(300)) if item.task != "larger"]  # which shows none
    trained = {digits_of(item) for item in (*task.items("train", 300), *related)}
    held = {digits_of(item) for item in task.items("heldout", 300)}
    assert len(trained) > 400
    assert len(held) > 200
    assert not trained & held
    assert all(task.reserved(digits) for digits in held)
    assert not any(task.reserved(digits) for digits in trained)


def test_related_expressions_are_not_those_of_the_task():
    rng = np.random.default_rng(1)
    shown = "".join(task.related(rng).prompt for _ in range(400))
    assert not any(part in shown for part in ("reverse", "::", " for ", "set(", "replace", ") +"))


@pytest.mark.parametrize("given", [{"split": "test"}, {"tasks": ("descending", "shuffled")}, {"tasks": ()}])
def test_unknown_items_are_refused_with_words(given):
    with pytest.raises(InvalidSetting, match=r"mini_llama\.task\.items"):
        task.items(**{"split": "train", "count": 3, **given})


# --- the training ---


def test_the_objective_is_the_models_own_loss():
    model, ids = tiny(), torch.randint(0, 2048, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own = model(ids, labels=ids, use_cache=False).loss
        torch.testing.assert_close(train.loss(model, ids), own, atol=1e-5, rtol=1e-5)


def test_batches_are_whole_windows_of_the_text(tokens, monkeypatch):
    file = {"a": "alpha = 1\n" * 60, "b": "beta = 2\n" * 60}
    monkeypatch.setattr(text, "documents", lambda split: file)
    joined = text.ids(tokens, "train")
    one, two = (list(islice(train.stream(tokens, 32, seed), 24)) for seed in (5, 5))
    assert one == two
    assert one != list(islice(train.stream(tokens, 32, 6), 24))
    assert {len(window) for window in one} == {33}
    once = one[: (len(joined) - 32) // 32]  # of one time round
    assert len({tuple(window) for window in once}) > 1
    rows = next(train.batches(tokens, 200, 32, 0.08, 0))
    assert rows.shape == (200, 33)
    assert 4 <= sum(">>>" in tokens.decode(row.tolist()) for row in rows) <= 40  # 16 of 200 are sessions


def test_a_training_goes_on_from_its_state(tmp_path, monkeypatch):
    """Two steps, then the same command again: nothing is lost, nothing begins anew."""
    monkeypatch.setattr(train, "fresh", lambda: tiny().train())
    learn = parts.learn_tokens
    monkeypatch.setattr(train, "learn_tokens", lambda texts: learn(list(texts)[:10]))
    small = dict(islice(text.documents("train").items(), 10))
    monkeypatch.setattr(text, "documents", lambda split: small)
    command = ["train", "--out", str(tmp_path), "--rows", "2", "--length", "32", "--warm", "1", "--steps"]
    states = []
    for steps in (2, 3, 3):
        monkeypatch.setattr("sys.argv", [*command, str(steps)])
        train.main()
        states.append(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [state["step"] for state in states] == [2, 3, 3]
    name = "model.layers.0.mlp.up_proj.weight"
    moved = [(a["model"][name] - b["model"][name]).abs().max() for a, b in pairwise(states)]
    assert 0 < moved[0] < 0.1
    assert moved[1] == 0
    assert not list(tmp_path.glob("*.new"))


# --- the judge ---


def test_perplexity_is_that_of_the_models_loss():
    model, ids = tiny(), torch.randint(0, 2048, (5, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        own = math.exp(model(ids, labels=ids, use_cache=False).loss)
    assert judge.perplexity(model, ids, batch=2) == pytest.approx(own, rel=1e-5)


def test_counts_by_hand():
    counts = judge.Counts(np.array([0, 1, 0, 1, 0, 2]), 4)
    assert counts.unigram == pytest.approx(np.array([4, 3, 2, 1]) / 10)
    # behind 0: 1 twice and 2 once, two kinds in three; behind 3, never seen: the unigram
    unigram, bigram = counts.perplexity(torch.tensor([[0, 1], [3, 2]]))
    assert unigram == pytest.approx((0.3 * 0.2) ** -0.5)
    assert bigram == pytest.approx(((2 + 2 * 0.3) / 5 * 0.2) ** -0.5)
    total = [(counts.pairs[0, i] + 2 * counts.unigram[i]) / 5 for i in range(4)]
    assert sum(total) == pytest.approx(1)


def test_writing_in_batches_is_what_generate_writes(tokenizer):
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # far from ties
    prompts = [item.prompt for item in task.items("heldout", 6)]
    written = judge.write(model, tokenizer, prompts, most=8)
    for prompt, line in zip(prompts, written, strict=True):
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        new = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
        assert line == "".join(tokenizer.decode(new).partition("\n")[:2])


def test_rounding_touches_only_linears_inside_the_layers():
    model, before = tiny(), tiny().state_dict()
    after = judge.round_linears(model, 2, 16).state_dict()
    for name, value in before.items():
        inside = "layers" in name and name.endswith("proj.weight")
        assert torch.equal(after[name], value) != inside
        if inside:
            assert max(len(row.unique()) for row in after[name].view(-1, 16)) <= 4


# --- what goes to others ---


def test_encoded_items_ask_for_answers_only(tokenizer):
    items = task.items("train", 8)
    batch = llama.encode_items(tokenizer, items)
    columns = (batch[key] for key in ("input_ids", "labels", "attention_mask"))
    for item, ids, labels, seen in zip(items, *columns, strict=True):
        assert tokenizer.decode(ids[seen.bool()]) == item.text
        assert tokenizer.decode(ids[labels >= 0]) == item.answer
        assert torch.equal(labels[labels >= 0], ids[labels >= 0])
        assert not seen[seen.sum() :].any()
        assert (ids[~seen.bool()] == tokenizer.pad_token_id).all()
    assert (batch["attention_mask"].sum(1) == batch["input_ids"].shape[1]).any()


def test_more_windows_than_there_is_text_are_refused(tokenizer):
    with pytest.raises(InvalidSetting, match="within"):
        llama.windows(tokenizer, "heldout", 100_000, 512)
    with pytest.raises(InvalidSetting, match="'train'"):
        llama.windows(tokenizer, "test", 4)


# --- the shipped weights ---


@pytest.fixture(scope="module")
def shipped():
    return llama.load()


def test_the_folder_is_small_and_stock_transformers_loads_it(shipped):
    folder = Path(zoo.path(NAME))
    assert sum(file.stat().st_size for file in folder.iterdir()) < 7.2e6
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model) is LlamaForCausalLM
    assert model.dtype == torch.float16
    assert model.num_parameters() < 8e6
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokenizer("import os\n", return_tensors="pt", return_token_type_ids=False)
    assert torch.equal(ids["input_ids"], shipped[1]("import os\n", return_tensors="pt")["input_ids"])
    with torch.no_grad():
        assert torch.equal(model.float()(**ids).logits, shipped[0](**ids).logits)


def test_the_shipped_tokens_are_those_of_the_recipe(shipped):
    tokens = shipped[1].backend_tokenizer
    assert tokens.get_vocab_size() == parts.VOCABULARY == shipped[0].config.vocab_size
    assert text.end(tokens) == shipped[0].config.eos_token_id == shipped[1].eos_token_id
    assert shipped[0].config.pad_token_id == shipped[1].pad_token_id
    assert all(len(token) == 1 for token in tokens.get_vocab() if set(token) & set("0123456789"))


def test_it_knows_heldout_files_and_two_bits_hurt(shipped):
    """The bounds leave room for the files of another Python; those of 3.11 are in the results."""
    model, tokenizer = shipped
    ids = llama.windows(tokenizer, "heldout", 8, 256)
    rounded = {bits: judge.perplexity(judge.round_linears(copy.deepcopy(model), bits), ids) for bits in (4, 2)}
    plain = judge.perplexity(model, ids)
    assert plain < 15
    assert rounded[4] < 1.1 * plain
    assert rounded[2] > 1.4 * plain


def test_it_evaluates_what_it_was_trained_on_and_not_the_tasks(shipped):
    related = [task.related(np.random.default_rng([11, index])) for index in range(96)]
    assert judge.accuracy(*shipped, related)["all"] > 0.7
    assert judge.accuracy(*shipped, task.items("heldout", 49))["all"] < 0.3


def test_the_file_of_heldout_items_is_what_the_task_makes():
    held = zoo.heldout(NAME)
    drawn = task.items("heldout", len(held))
    assert [(item.task, item.prompt, item.answer) for item in drawn] == [
        (entry["task"], entry["prompt"], entry["answer"]) for entry in held
    ]
    assert {entry["task"] for entry in held} == set(task.TASKS)
