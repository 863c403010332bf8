"""losa and quest through real models: a tiny SDAR and DiffusionGemma. Their definitions: ``test_losa.py``."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

import hf_accel
from hf_accel import registry
from hf_accel.errors import NotApplicable
from hf_accel.testing.models import gemma
from hf_accel_zoo.sdar import SDARConfig, SDARForCausalLM

PAGE = 8
MASK, SIZE, VOCAB = 60, 8, 61
SMALL = {"min_prefix": 0, "page_size": PAGE, "budget": PAGE, "k_act": 2}


def sdar(seed=0, kv_heads=2):
    config = SDARConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=8, block_size=SIZE, mask_token_id=MASK, max_position_embeddings=512,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SDARForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(8.0)
    return model


def prompt(seed=0, rows=2, length=80):
    return torch.randint(0, MASK, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def decode(model, ids, blocks=2, padding=None, steps=4, watch=None):
    """Static low-confidence decoding with a cache: new tokens ``[B, blocks * SIZE]``, and the logits of all steps."""
    cache, rows = DynamicCache(config=model.config), ids.shape[0]
    seen = None
    if padding is not None:
        seen = (torch.arange(ids.shape[1]) >= torch.tensor(padding)[:, None]).long()
    model(ids, attention_mask=seen, past_key_values=cache, store_kv=True)
    done, logits = [], []
    for _ in range(blocks):
        if seen is not None:
            seen = torch.cat([seen, seen.new_ones(rows, SIZE)], 1)
        block = torch.full((rows, SIZE), MASK)
        for step in range(steps):
            if watch is not None:
                watch(len(done), step)
            out = model(block, attention_mask=seen, past_key_values=cache, store_kv=False).logits
            logits.append(out)
            confidence, token = out[..., :MASK].softmax(-1).max(-1)
            confidence = confidence.masked_fill(block != MASK, -1)
            commit = confidence.topk(SIZE // steps, 1).indices
            block = block.scatter(1, commit, token.gather(1, commit))
        model(block, attention_mask=seen, past_key_values=cache, store_kv=True)
        done.append(block)
    return torch.cat(done, 1), torch.stack(logits)


def full(method):
    return registry.get(method).facts.full_budget


def statistics(applied):
    return applied.report().entries[0].run


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("padding", [None, (0, 16)])
@pytest.mark.parametrize("method", ["losa", "quest"])
def test_sdar_at_full_budget(method, padding, kv_heads):
    model = sdar(kv_heads=kv_heads)
    tokens, logits = decode(model, prompt(), padding=padding)
    with hf_accel.apply(model, method, **full(method)) as applied:
        ours, others = decode(model, prompt(), padding=padding)
        run = statistics(applied)
    assert torch.equal(ours, tokens)
    torch.testing.assert_close(others, logits, atol=1e-4, rtol=1e-5)
    assert not run.dense_calls
    assert run.calls == 2 * 4 * 3
    assert run.mean("density") == 1.0


@pytest.mark.parametrize("padding", [None, (0, 16)])
def test_sdar_at_a_small_budget(padding):
    model = sdar()
    _, logits = decode(model, prompt(), padding=padding)
    with hf_accel.apply(model, "losa", **SMALL) as applied:
        tokens, ours = decode(model, prompt(), padding=padding)
        run = statistics(applied)
    assert not bool((tokens == MASK).any())
    assert ours.isfinite().all()
    # The first step of the first block is dense; from then on something is left out.
    torch.testing.assert_close(ours[0], logits[0], atol=1e-4, rtol=1e-5)
    assert not torch.allclose(ours[1], logits[1], atol=1e-2)
    assert run.first_calls == 2 * 3
    assert run.mean("later_active") == 2 / SIZE  # as many as a step commits
    assert 0 < run.mean("later_density") < 0.5
    assert run.mean("later_pages") < 4


def test_committed_tokens_are_forced_through_the_model():
    model = sdar()
    with hf_accel.apply(model, "losa", **SMALL | {"k_act": 0}) as applied:
        decode(model, prompt(rows=1))
        assert statistics(applied).mean("later_active") == 2 / SIZE
    with hf_accel.apply(model, "losa", **SMALL | {"k_act": 0, "force_changed": False}) as applied:
        decode(model, prompt(rows=1))
        assert statistics(applied).mean("later_active") == 0


def test_exact_calls_are_counted_with_their_reason():
    model = sdar()
    with hf_accel.apply(model, "losa") as applied:
        decode(model, prompt())
        run, words = statistics(applied), str(applied.report())
    assert run.exact_calls == {"short prefix (min_prefix)": 2 * 4 * 3}
    assert "24 x short prefix (min_prefix)" in words


def test_losa_with_all_tokens_active_is_quest_through_the_model():
    model, settings = sdar(), {"min_prefix": 0, "page_size": PAGE, "budget": PAGE}
    with hf_accel.apply(model, "quest", **settings):
        _, theirs = decode(model, prompt())
    with hf_accel.apply(model, "losa", **settings, k_act=1.0):
        _, ours = decode(model, prompt())
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", ["losa", "quest"])
def test_requests_do_not_see_each_other(method):
    model = sdar()
    settings = {name: value for name, value in SMALL.items() if method == "losa" or name != "k_act"}
    with hf_accel.apply(model, method, **settings):
        decode(model, prompt(1, length=32))
        second = decode(model, prompt(2, rows=3, length=48))
        third = decode(model, prompt(3, length=40), padding=(8, 0))
    for expected, more in ((second, (prompt(2, rows=3, length=48),)), (third, (prompt(3, length=40), 2, (8, 0)))):
        with hf_accel.apply(model, method, **settings):
            alone = decode(model, *more)
        assert all(torch.equal(a, b) for a, b in zip(expected, alone, strict=True))


def test_state_does_not_survive_an_exception():
    class Stop(Exception):
        pass

    def stop(block, step):
        if (block, step) == (1, 2):
            raise Stop

    model = sdar()
    with hf_accel.apply(model, "losa", **SMALL):
        with pytest.raises(Stop):
            decode(model, prompt(1), watch=stop)
        with pytest.raises(IndexError):
            model(torch.full((2, SIZE), VOCAB), past_key_values=DynamicCache(config=model.config))
        after = decode(model, prompt(2))
    with hf_accel.apply(model, "losa", **SMALL):
        assert all(torch.equal(a, b) for a, b in zip(after, decode(model, prompt(2)), strict=True))


@torch.no_grad()
@pytest.mark.parametrize("rows", [[1, 0], [1]])
def test_rows_reordered_in_the_cache_start_anew(rows):
    """A sampler that swaps or drops rows in the middle of a block: the next step reads the whole prefix."""
    model = sdar()
    cache = DynamicCache(config=model.config)
    model(prompt(), past_key_values=cache, store_kv=True)
    block = torch.full((2, SIZE), MASK)
    block[0, :3], block[1, 2:6] = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6, 7])
    expected = model(block[rows], past_key_values=rows_of(cache, rows), store_kv=False).logits
    with hf_accel.apply(model, "losa", **SMALL | {"k_act": 0, "force_changed": False}):
        model(torch.full_like(block, MASK), past_key_values=cache, store_kv=False)
        model(block, past_key_values=cache, store_kv=False)
        cache.batch_select_indices(torch.tensor(rows))
        ours = model(block[rows], past_key_values=cache, store_kv=False).logits
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)


def rows_of(cache, rows):
    twin = copy.deepcopy(cache)
    twin.batch_select_indices(torch.tensor(rows))
    return twin


def test_gemma_reads_fewer_pages_on_its_full_layers_only():
    model = gemma.diffusion_gemma()
    ids = torch.randint(0, 97, (2, 160), generator=torch.Generator().manual_seed(0))

    def generate():
        torch.manual_seed(0)
        return model.generate(ids, max_new_tokens=16, max_denoising_steps=3).sequences

    dense = generate()
    with hf_accel.apply(model, "losa", **full("losa")) as applied:
        assert torch.equal(generate(), dense)
        assert not statistics(applied).dense_calls
    with hf_accel.apply(model, "losa", **SMALL | {"force_changed": False}) as applied:
        ours = generate()
        run = statistics(applied)
    assert ours.shape == dense.shape
    # Half of the four layers slide; they are exact.
    assert 0.5 < run.mean("later_density") < 0.75
    assert run.mean("later_active") == 2 / 8


@torch.no_grad()
@pytest.mark.parametrize("method", ["losa", "quest"])
def test_a_static_cache_tells_its_length_by_a_mask_alone(method):
    """Slots that were empty in the first block hold keys in the next, while the length stays."""
    model = gemma.diffusion_gemma(num_hidden_layers=2, layer_types=["full_attention"] * 2)
    ids = torch.randint(0, 97, (2, 160), generator=torch.Generator().manual_seed(0))

    def generate(implementation):
        torch.manual_seed(0)
        # With a static cache generate() compiles to one graph, which a method with state cannot be in.
        options = {"cache_implementation": implementation, "disable_compile": True}
        return model.generate(ids, max_new_tokens=16, max_denoising_steps=3, **options).sequences

    settings = {"min_prefix": 0, "page_size": PAGE, "budget": 2 * PAGE}
    with hf_accel.apply(model, method, **settings) as applied:
        dynamic, static = generate("dynamic"), generate("static")
        assert not statistics(applied).dense_calls
    assert torch.equal(dynamic, static)


def test_models_without_a_frozen_prefix_are_refused_in_words():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    causal = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    ))  # fmt: skip
    for method in ("losa", "quest"):
        with pytest.raises(NotApplicable, match="block"):
            hf_accel.apply(causal, method)
