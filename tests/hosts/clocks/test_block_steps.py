"""The block clock: which forward is a prefill, a step or a commit; when what is remembered is void."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_accel.hosts import block_families as block_context
from hf_accel.hosts.block_families import (
    DIFFUSION_GEMMA,
    FULL,
    LLADA2,
    SDAR,
    arguments_of,
    cache_length,
    family_of,
    mask_token_of,
)
from hf_accel.hosts.clocks.block_steps import BlockClock, follow
from hf_accel.ledger import Ledger
from hf_accel.testing.models import dream, gemma, llada, llada2
from hf_accel_zoo.sdar import SDARConfig, SDARForCausalLM

MASK = 96
BLOCK = 4


def sdar(seed=0, **fields):
    config = {
        "vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "block_size": BLOCK, "mask_token_id": MASK,
        "max_position_embeddings": 256, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(seed)
    return SDARForCausalLM(SDARConfig(**(config | fields))).eval()


class Watch:
    """What the clock said of every forward, while it ran."""

    def __init__(self, model):
        family = family_of(model)
        self.context = BlockClock(family, mask_token_of(model))
        self.seen, self.ledger = [], Ledger()
        follow(model, self.context, self.ledger)
        for watched, _ in family.watched(model):
            watched.register_forward_pre_hook(lambda *_: self.note())

    def note(self):
        s = self.context.step
        self.seen.append((s.phase, s.generation, s.block, s.index, s.prefix, s.length))

    def taken(self):
        seen, self.seen = self.seen, []
        return seen


class Steps:
    """Forwards of an SDAR-class model one by one."""

    def __init__(self, model=None, cache=None):
        self.model = model if model is not None else sdar()
        self.watch = Watch(self.model)
        self.cache = cache if cache is not None else DynamicCache()

    def prompt(self, tokens, rows=1, cache=None, **kwargs):
        self.cache = cache if cache is not None else self.cache
        self.forward(torch.arange(rows * tokens).view(rows, tokens) % 90 + 1, store_kv=True, **kwargs)

    @torch.no_grad()
    def forward(self, ids, store_kv=False, **kwargs):
        return self.model(ids, past_key_values=self.cache, use_cache=True, store_kv=store_kv, **kwargs)

    def said(self):
        return self.watch.taken()

    @property
    def changed(self):
        return self.watch.context.changed


def open_block(rows=1, *committed):
    """A block of mask tokens with token 7 at the committed places."""
    ids = torch.full((rows, BLOCK), MASK)
    ids[:, list(committed)] = 7
    return ids


def test_families_are_found_by_structure():
    assert family_of(sdar()) is SDAR
    assert family_of(gemma.diffusion_gemma()) is DIFFUSION_GEMMA
    assert family_of(llada2.LLaDA2MoeModelLM(llada2.LLaDA2MoeConfig())) is LLADA2
    assert family_of(llada.LLaDAModelLM(llada.LLaDAConfig())) is FULL
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 64}
    config = dream.DreamConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    assert family_of(dream.DreamModel(config)) is FULL
    assert family_of(torch.nn.Linear(2, 2)) is None


def test_a_like_network_without_store_kv_is_no_family():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    assert family_of(Qwen3ForCausalLM(config)) is None


def test_the_class_name_does_not_make_an_sdar_model():
    class SDARForCausalLM(torch.nn.Module):
        pass

    assert family_of(SDARForCausalLM()) is None


def test_renamed_classes_are_found():
    model = sdar()
    model.__class__ = type("TraDoForCausalLM", (SDARForCausalLM,), {})
    assert family_of(model) is SDAR


def test_mask_token():
    model = sdar()
    assert mask_token_of(model) == MASK
    assert mask_token_of(gemma.diffusion_gemma()) is None
    model.config.mask_token_id = None
    model.config.mask_id = 5
    assert mask_token_of(model) == 5


def test_a_request_of_two_blocks():
    run = Steps()
    run.prompt(8)
    run.forward(open_block())
    assert run.changed is None or not run.changed.any()
    run.forward(open_block(1, 2))
    run.forward(open_block(1, 0, 2))
    run.forward(open_block(1, 0, 1, 2, 3), store_kv=True)
    run.forward(open_block())
    assert run.said() == [
        ("prefill", 0, -1, 0, 0, 8),
        ("denoise", 0, 0, 0, 8, 4),
        ("denoise", 0, 0, 1, 8, 4),
        ("denoise", 0, 0, 2, 8, 4),
        ("commit", 0, 0, 0, 8, 4),
        ("denoise", 0, 1, 0, 12, 4),
    ]
    assert run.watch.context.step is None


def test_a_prompt_in_two_parts_and_one_shorter_than_a_block():
    run = Steps()
    run.prompt(8)
    run.prompt(4)
    run.forward(open_block())
    assert [s[:4] for s in run.said()] == [("prefill", 0, -1, 0), ("prefill", 0, -1, 0), ("denoise", 0, 0, 0)]
    run = Steps()
    run.forward(open_block(1, 0))
    run.forward(open_block(1, 0, 1, 2, 3))
    run.forward(open_block(1, 0, 1, 2, 3), store_kv=True)
    run.forward(open_block())
    assert run.said() == [
        ("denoise", 0, 0, 0, 0, 4),
        ("denoise", 0, 0, 1, 0, 4),
        ("commit", 0, 0, 0, 0, 4),
        ("denoise", 0, 1, 0, 4, 4),
    ]


def test_changed_tokens_and_how_many():
    run = Steps()
    context = run.watch.context
    run.prompt(8, rows=2)
    seen = []
    run.model.model.register_forward_pre_hook(lambda *_: seen.append((context.changed, context.most_changed)))
    run.forward(open_block(2))
    ids = open_block(2, 1)
    ids[1, 3] = 7
    run.forward(ids)
    run.forward(ids)
    assert seen[0] == (None, 0)
    assert seen[1][0].tolist() == [[False, True, False, False], [False, True, False, True]]
    assert seen[1][1] == 2
    assert not seen[2][0].any()
    assert seen[2][1] == 0


def test_the_tokens_are_those_of_the_call_though_the_sampler_writes_into_them():
    run = Steps()
    run.prompt(8)
    ids = open_block()
    run.forward(ids)
    ids[0, 2] = 7
    run.forward(ids)
    assert run.watch.context.most_changed == 1


def test_another_length_or_an_edit_in_the_same_block():
    run = Steps()
    run.prompt(8)
    run.forward(open_block(1, 0))
    edited = open_block(1, 0)
    edited[0, 0] = 9
    run.forward(edited)
    run.forward(edited[:, :2])
    assert [s[:4] for s in run.said()][1:] == [("denoise", 0, 0, 0), ("denoise", 0, 0, 1), ("denoise", 0, 1, 0)]


def test_a_new_cache_is_a_new_request():
    run = Steps()
    for generation in range(2):
        run.prompt(8, cache=DynamicCache())
        run.forward(open_block())
        assert [s[:4] for s in run.said()] == [("prefill", generation, -1, 0), ("denoise", generation, 0, 0)]


def test_a_cache_that_shrank_or_was_emptied_is_a_new_request():
    run = Steps()
    run.prompt(8)
    run.forward(open_block())
    run.forward(open_block(1, 1))
    run.cache.crop(-4)
    run.forward(open_block(1, 1))
    assert run.said()[-1] == ("denoise", 1, 0, 0, 4, 4)
    run.cache.reset()
    run.prompt(8)
    run.forward(open_block(1, 1))
    assert [s[:4] for s in run.said()] == [("prefill", 2, -1, 0), ("denoise", 2, 0, 0)]


def test_an_emptied_cache_is_filled_to_the_same_length():
    """A static cache is kept by transformers from one call to the next."""
    model = sdar()
    run = Steps(model, StaticCache(config=model.config, max_cache_len=32))
    for generation in range(2):
        run.cache.reset()
        run.prompt(8)
        run.forward(open_block())
        run.forward(open_block(1, 1))
        assert [s[:4] for s in run.said()] == [
            ("prefill", generation, -1, 0),
            ("denoise", generation, 0, 0),
            ("denoise", generation, 0, 1),
        ]


def test_another_batch_size_is_a_new_request():
    run = Steps()
    run.prompt(8, rows=2)
    run.forward(open_block(2))
    run.cache.batch_select_indices(torch.tensor([1]))
    run.forward(open_block(1))
    assert run.said()[-1][:4] == ("denoise", 1, 0, 0)


def test_rows_of_another_request_under_the_same_shape():
    """Somebody put other rows into the cache: places that were committed are open again."""
    run = Steps()
    run.prompt(8)
    run.forward(open_block(1, 0, 1))
    run.forward(open_block(1, 0))
    assert run.said()[-1][:4] == ("denoise", 1, 0, 0)
    assert run.changed is None


def test_an_exception_ends_the_request():
    """Also where the next forward would pass for its next step."""
    run = Steps()
    run.prompt(8)
    run.forward(open_block())

    def fail(*_):
        raise ArithmeticError

    handle = run.model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        run.forward(open_block())
    handle.remove()
    assert run.watch.context.step is None
    run.forward(open_block(1, 1))
    assert run.said()[-1][:4] == ("denoise", 1, 0, 0)


def test_a_prompt_after_a_prompt_that_nobody_went_on_with():
    run = Steps()
    for generation in range(2):
        run.cache.reset()
        run.prompt(8)
        assert run.said() == [("prefill", generation, -1, 0, 0, 8)]


def test_forwards_without_a_cache():
    run = Steps()
    with torch.no_grad():
        run.model(open_block(), use_cache=False)
        run.model(open_block(), use_cache=False)
    assert [s[:4] for s in run.said()] == [("whole", 0, -1, 0), ("whole", 1, -1, 0)]


def test_embeddings_in_place_of_tokens_are_never_a_second_step():
    run = Steps()
    run.prompt(8)
    for _ in range(2):
        given = {"inputs_embeds": run.model.get_input_embeddings()(open_block()).detach()}
        run.forward(None, **given)
    assert [s[:4] for s in run.said()][1:] == [("denoise", 0, 0, 0), ("denoise", 0, 1, 0)]


def test_positional_arguments_and_the_singular_name_of_the_cache():
    model = sdar()
    ids = open_block()
    assert arguments_of(model, (ids, None), {"store_kv": True})["input_ids"] is ids
    cache = DynamicCache()
    read = SDAR.read({"input_ids": ids, "past_key_value": cache, "store_kv": True})
    assert read.cache is cache
    assert read.stores
    # transformers' former caches were tuples, of which the clock knows nothing
    assert SDAR.read({"input_ids": ids, "past_key_values": ((ids, ids),)}).cache is None


def test_forwards_past_the_models_own_hooks_are_seen():
    run = Steps()
    run.prompt(8)
    with torch.no_grad():
        run.model.forward(open_block(), past_key_values=run.cache, use_cache=True)
    assert run.said()[-1][:4] == ("denoise", 0, 0, 0)


def test_a_generation_of_diffusion_gemma():
    model = gemma.diffusion_gemma()
    watch = Watch(model)
    ids = torch.arange(10)[None]
    for generation in range(2):
        torch.manual_seed(0)
        model.generate(ids, max_new_tokens=16, max_denoising_steps=2)
        assert watch.taken() == [
            ("prefill", generation, -1, 0, 0, 10),
            ("denoise", generation, 0, 0, 10, 8),
            ("denoise", generation, 0, 1, 10, 8),
            ("commit", generation, 0, 0, 10, 8),
            ("denoise", generation, 1, 0, 18, 8),
            ("denoise", generation, 1, 1, 18, 8),
        ]


def test_diffusion_gemma_with_a_static_cache_that_outlives_the_call():
    model = gemma.diffusion_gemma()
    watch = Watch(model)
    for generation in range(2):
        torch.manual_seed(0)
        model.generate(
            torch.arange(6)[None], max_new_tokens=8, max_denoising_steps=2, cache_implementation="static",
            disable_compile=True,
        )  # fmt: skip
        assert [s[:5] for s in watch.taken()] == [
            ("prefill", generation, -1, 0, 0),
            ("denoise", generation, 0, 0, 6),
            ("denoise", generation, 0, 1, 6),
        ]


def test_a_canvas_that_begins_anew_behind_the_same_prefix():
    model = gemma.diffusion_gemma()
    watch = Watch(model)
    cache = DynamicCache(config=model.config.text_config)
    canvas = torch.arange(8)[None]
    with torch.no_grad():
        out = model(torch.arange(10)[None], past_key_values=cache, decoder_input_ids=canvas)
        for logits in (out.logits, out.logits, None, out.logits):
            model(past_key_values=cache, decoder_input_ids=canvas, self_conditioning_logits=logits)
    assert [s[1:4] for s in watch.taken()[1:]] == [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1)]


def test_a_random_canvas_may_hold_any_token():
    """No token means an open position: a change of one is no sign of another request."""
    context = BlockClock(DIFFUSION_GEMMA, 3)
    cache = DynamicCache()
    read = {"past_key_values": cache, "decoder_input_ids": torch.zeros(1, 4, dtype=torch.long)}
    context.begin(read, block_context._read_decoder)
    context.begin(read | {"decoder_input_ids": torch.full((1, 4), 3)}, block_context._read_decoder)
    assert context.step.index == 1
    assert context.most_changed == 4


def test_whole_calls_of_diffusion_gemma_are_read():
    cache = DynamicCache()
    ids = torch.zeros(2, 5, dtype=torch.long)
    read = DIFFUSION_GEMMA.read({"input_ids": ids, "past_key_values": cache})
    assert (read.shape, read.prefix, read.stores) == ((2, 0), 5, False)
    read = DIFFUSION_GEMMA.read({"past_key_values": cache, "decoder_input_ids": ids})
    assert (read.shape, read.prefix, read.stores) == ((2, 5), 0, False)


def test_no_tokens_are_kept_where_nobody_needs_them():
    model = sdar()
    context = BlockClock(SDAR, MASK, tokens=False)
    follow(model, context, Ledger())
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.ones(1, 8, dtype=torch.long), past_key_values=cache, store_kv=True)
        for _ in range(2):
            model(open_block(), past_key_values=cache)
    assert context._tokens is None
    assert context.changed is None
    assert context._last.index == 1


def test_a_copy_has_a_clock_of_its_own():
    run = Steps()
    run.prompt(8)
    run.forward(open_block())
    twin = copy.deepcopy(run.watch.context)
    assert twin.step is None
    assert twin.begin({"input_ids": open_block(), "past_key_values": run.cache}).generation == 0
    run.forward(open_block(1, 1))
    assert run.said()[-1][:4] == ("denoise", 0, 0, 1)


def test_clocks_of_two_models_in_two_threads():
    runs = [Steps(sdar(seed)) for seed in range(2)]

    def go(run):
        run.prompt(8)
        for n in range(BLOCK):
            run.forward(open_block(1, *range(n)))

    threads = [threading.Thread(target=go, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for run in runs:
        assert [s[3] for s in run.said()] == [0, *range(BLOCK)]


def test_hooks_leave_with_the_ledger():
    model = sdar()
    watched = SDAR.watched(model)[0][0]
    ledger = Ledger()
    follow(model, BlockClock(SDAR), ledger)
    assert watched._forward_pre_hooks
    assert watched._forward_hooks
    ledger.undo()
    assert not watched._forward_pre_hooks
    assert not watched._forward_hooks


def test_cache_length():
    assert cache_length(None) == 0
    assert cache_length(DynamicCache()) == 0
