"""The sampler of block-causal models, against a plain loop without a cache, and rows against each other."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb  # noqa: F401  as the released module has it

from hf_accel import generate_blocks
from hf_accel.generation.block_diffusion.commit_rules import commit, even_split, propose
from hf_accel_zoo.sdar import SDARAttention, SDARForCausalLM, block_causal_mask
from tiny_sdar import BLOCK, MASK, PAD, VOCABULARY, padded, prompt, sdar


@pytest.fixture(scope="module")
def model() -> SDARForCausalLM:
    return sdar()


class Watch:
    """Forward hook that keeps arguments and logits of every forward."""

    def __init__(self, model: torch.nn.Module):
        self.calls: list[dict] = []
        self.logits: list[torch.Tensor] = []
        self._handle = model.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs, output):
        self.calls.append({**kwargs, "prefix": kwargs["past_key_values"].get_seq_length()})
        self.logits.append(output.logits.clone())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._handle.remove()

    @property
    def denoising(self) -> list[int]:
        return [i for i, call in enumerate(self.calls) if not call["store_kv"]]


@torch.no_grad()
def plain(model, ids, new, *, steps=BLOCK, rule="dynamic", threshold=0.85, stops=()) -> torch.Tensor:
    """One row, no cache, no early end: every step runs the whole sequence under the block-causal mask."""
    length = ids.shape[1]
    total = -(-(length + new) // BLOCK) * BLOCK
    tokens = torch.cat([ids, torch.full((1, total - length), MASK)], dim=1)
    for low in range(length // BLOCK * BLOCK, total, BLOCK):
        for share in even_split(BLOCK, steps):
            seen = tokens[:, : low + BLOCK]
            mask = block_causal_mask(low + BLOCK, BLOCK)
            logits = model(input_ids=seen, attention_mask=mask, use_cache=False).logits[:, low:]
            token, confidence, entropy = propose(logits, banned=MASK, entropy=True)
            block = tokens[:, low : low + BLOCK]
            chosen = commit(rule, block == MASK, confidence, count=share, threshold=threshold, entropy=entropy)
            tokens[:, low : low + BLOCK] = torch.where(chosen, token, block)
    text = tokens[0, length : length + new].tolist()
    ends = [i + 1 for i, token in enumerate(text) if token in stops]
    return torch.cat([ids, torch.tensor([text[: ends[0] if ends else new]])], dim=1)


# -- what it computes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 3, 4, 5, 17, 24])
@pytest.mark.parametrize("new", [1, 4, 11])
def test_equals_a_loop_without_a_cache(model, length, new):
    ids = prompt(length)
    assert torch.equal(generate_blocks(model, ids, max_new_tokens=new), plain(model, ids, new))


@pytest.mark.parametrize(
    "settings",
    [
        {"rule": "static", "steps": 3},
        {"rule": "static", "steps": 1},
        {"rule": "sequential", "steps": 2},
        {"rule": "dynamic", "threshold": 0.3, "steps": 2},
        {"rule": "threshold", "threshold": 0.2},
        {"rule": "entropy", "threshold": 1.5},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_every_rule_equals_a_loop_without_a_cache(model, settings):
    ids = prompt(10)
    assert torch.equal(generate_blocks(model, ids, max_new_tokens=9, **settings), plain(model, ids, 9, **settings))


def test_prefix_cached_logits_are_those_of_a_full_recompute(model):
    with Watch(model) as watch:
        generate_blocks(model, prompt(10), max_new_tokens=14, rule="static", prefill_chunk=BLOCK)
    cache_of_ids = torch.zeros(1, 0, dtype=torch.long)
    compared = 0
    for call, logits in zip(list(watch.calls), watch.logits, strict=True):
        if call["store_kv"]:
            cache_of_ids = torch.cat([cache_of_ids, call["input_ids"]], dim=1)
            continue
        seen = torch.cat([cache_of_ids, call["input_ids"]], dim=1)
        full = model(input_ids=seen, attention_mask=block_causal_mask(seen.shape[1], BLOCK), use_cache=False).logits
        torch.testing.assert_close(logits, full[:, -BLOCK:], rtol=1e-5, atol=1e-5)
        compared += 1
    assert compared == 2 + 3 * BLOCK


def test_the_model_gives_several_different_tokens(model):
    new = generate_blocks(model, prompt(10), max_new_tokens=32)[0, 10:]
    assert len(new.unique()) > 5
    assert not torch.equal(new, generate_blocks(model, prompt(10, seed=1), max_new_tokens=32)[0, 10:])


def test_static_takes_its_steps_and_commits_its_share(model):
    with Watch(model) as watch:
        out = generate_blocks(model, prompt(8), max_new_tokens=8, rule="static", steps=3, return_dict=True)
    assert out.steps_per_block == [3, 3]
    assert (out.forwards, out.blocks, out.denoising_steps, out.lengths) == (1 + 3 + 1 + 3, 2, [6], [8])
    assert out.tokens_per_forward == 8 / 6
    open_ = [(watch.calls[i]["input_ids"] == MASK).sum().item() for i in watch.denoising]
    assert open_ == [4, 2, 1, 4, 2, 1]


def test_threshold_0_commits_a_block_at_once_and_1_is_static(model):
    ids = prompt(9)
    at_once = generate_blocks(model, ids, max_new_tokens=11, threshold=0.0, return_dict=True)
    assert at_once.steps_per_block == [1, 1, 1]
    one_by_one = generate_blocks(model, ids, max_new_tokens=11, threshold=1.0, return_dict=True)
    static = generate_blocks(model, ids, max_new_tokens=11, rule="static", return_dict=True)
    assert torch.equal(one_by_one.sequences, static.sequences)
    assert one_by_one.steps_per_block == static.steps_per_block == [3, 4, 4]


def test_entropy_limits(model):
    ids = prompt(8)
    one = generate_blocks(model, ids, max_new_tokens=8, rule="entropy", threshold=0.0, return_dict=True)
    everything = generate_blocks(model, ids, max_new_tokens=8, rule="entropy", threshold=1e6, return_dict=True)
    assert (one.steps_per_block, everything.steps_per_block) == ([4, 4], [1, 1])


def test_clean_tokens_enter_the_cache_and_steps_leave_it_alone(model):
    with Watch(model) as watch:
        out = generate_blocks(model, prompt(6), max_new_tokens=10)
    stored = torch.cat([call["input_ids"] for call in watch.calls if call["store_kv"]], dim=1)
    assert torch.equal(stored, out[:, :12])  # prompt block and two finished ones; the last block is not written
    assert not (stored == MASK).any()
    for i in watch.denoising:
        before = watch.calls[i - 1]["prefix"]
        assert watch.calls[i]["prefix"] == before


def test_a_long_prompt_is_read_in_chunks_of_whole_blocks(model):
    ids = prompt(47)
    with Watch(model) as watch:
        out = generate_blocks(model, ids, max_new_tokens=5, prefill_chunk=10)
    stored = [call for call in watch.calls if call["store_kv"]]
    assert [call["input_ids"].shape[1] for call in stored[:6]] == [8, 8, 8, 8, 8, 4]
    assert all(call["attention_mask"].shape[-2] <= 8 for call in stored)
    assert torch.equal(out, plain(model, ids, 5))
    assert torch.equal(out, generate_blocks(model, ids, max_new_tokens=5, prefill_chunk=1))


def test_logits_nobody_reads_are_not_computed(model):
    with Watch(model) as watch:
        generate_blocks(model, prompt(16), max_new_tokens=8)
    assert watch.logits[0].shape[1] == 1
    assert {logits.shape[1] for i, logits in enumerate(watch.logits) if i in watch.denoising} == {BLOCK}


def test_shorter_blocks_than_trained_are_used_as_asked_with_a_warning():
    model = sdar()
    with pytest.warns(UserWarning, match="shorter than the 4"):
        out = generate_blocks(model, prompt(7), block_length=3, max_new_tokens=8)
    model.config.block_size = 3
    assert torch.equal(out, generate_blocks(model, prompt(7), max_new_tokens=8))


class ReleasedAttention(SDARAttention):
    """Reads its mask without asking whether there is one, as the released code does."""

    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **kwargs):
        if torch.all(attention_mask):
            attention_mask = None
        store_kv = kwargs.pop("store_kv", False)
        return super().forward(
            hidden_states, position_embeddings, attention_mask, past_key_values, store_kv=store_kv, **kwargs
        )


def test_released_attention_needs_a_mask_at_every_forward(model):
    released = copy.deepcopy(model)
    for layer in released.model.layers:
        layer.self_attn.__class__ = ReleasedAttention
    for length in (3, 10):
        expected = generate_blocks(model, prompt(length), max_new_tokens=9)
        assert torch.equal(generate_blocks(released, prompt(length), max_new_tokens=9), expected)


# -- batches -------------------------------------------------------------------------------------------------------

LENGTHS = [5, 17, 4, 1, 10]


@pytest.mark.parametrize("given", ["mask", "pad tokens"])
def test_a_batch_equals_its_rows_one_by_one(model, given):
    prompts = [prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    ids, mask = padded(prompts)
    together = generate_blocks(
        model, ids, attention_mask=mask if given == "mask" else None, max_new_tokens=11, return_dict=True
    )
    assert torch.equal(together.sequences[:, : ids.shape[1]], ids)
    for row, one in enumerate(prompts):
        alone = generate_blocks(model, one, max_new_tokens=11, return_dict=True)
        assert torch.equal(together.sequences[row, -11:], alone.sequences[0, -11:])
        assert together.denoising_steps[row] == alone.denoising_steps[0]
        assert together.lengths[row] == 11


def test_logits_of_a_batch_are_those_of_its_rows(model):
    prompts = [prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    ids, mask = padded(prompts)
    with Watch(model) as together:
        generate_blocks(model, ids, attention_mask=mask, max_new_tokens=3, rule="static", prefill_chunk=8)
    for row, one in enumerate(prompts):
        with Watch(model) as alone:
            out = generate_blocks(model, one, max_new_tokens=3, rule="static", return_dict=True)
        first, first_alone = together.denoising[0], alone.denoising[0]
        for step in range(out.steps_per_block[0]):
            ours, theirs = together.logits[first + step][row], alone.logits[first_alone + step][0]
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_rows_count_positions_from_their_own_first_token(model):
    """Rotary attention does not see a shift of a whole row, but the last position of the model does."""
    ids, mask = padded([prompt(2), prompt(11, 1)])
    with Watch(model) as watch:
        generate_blocks(model, ids, attention_mask=mask, max_new_tokens=1)
    prefill, step = (call["position_ids"].tolist() for call in watch.calls[:2])
    assert prefill == [[0] * 8, list(range(8))]
    assert step == [[0, 1, 2, 3], [8, 9, 10, 11]]


def test_padding_reaches_nothing(model):
    """What stands in padded places changes no bit, and nothing there becomes not-a-number."""
    ids, mask = padded([prompt(2), prompt(19, 1)])
    other = torch.where(mask.bool(), ids, 3)
    with Watch(model) as watch:
        out = generate_blocks(model, ids, attention_mask=mask, max_new_tokens=6)
    assert all(logits.isfinite().all() for logits in watch.logits)
    changed = generate_blocks(model, other, attention_mask=mask, max_new_tokens=6)
    assert torch.equal(out[:, 19:], changed[:, 19:])


def stop_that_splits(model, prompts, new) -> tuple[int, list[int]]:
    """A token that ends the rows of a batch at different places, and those places."""
    rows = [generate_blocks(model, one, max_new_tokens=new)[0, -new:].tolist() for one in prompts]
    for token in sorted({t for row in rows for t in row}):
        ends = [row.index(token) + 1 if token in row else new for row in rows]
        if len({-(-end // BLOCK) for end in ends}) >= 3 and min(ends) <= new // 2:
            return token, ends
    raise AssertionError("the model's texts have no such token")


def test_rows_end_at_their_own_stop_token_and_leave_the_batch(model):
    prompts = [prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    ids, mask = padded(prompts)
    stop, ends = stop_that_splits(model, prompts, 40)
    with Watch(model) as watch:
        out = generate_blocks(model, ids, attention_mask=mask, max_new_tokens=40, eos_token_id=stop, return_dict=True)
    assert out.lengths == ends
    assert out.sequences.shape[1] == ids.shape[1] + max(ends)
    for row, (one, end) in enumerate(zip(prompts, ends, strict=True)):
        alone = plain(model, one, 40, stops=(stop,))
        new = out.sequences[row, ids.shape[1] :]
        assert torch.equal(new[:end], alone[0, one.shape[1] :])
        assert (new[end:] == PAD).all()
    rows = [call["input_ids"].shape[0] for call in watch.calls]
    assert rows == sorted(rows, reverse=True)
    assert len(set(rows)) >= 3


def test_rows_whose_prompt_ends_late_in_a_block_need_a_block_more(model):
    prompts = [prompt(8, 0), prompt(7, 1)]
    ids, mask = padded(prompts)
    out = generate_blocks(model, ids, attention_mask=mask, max_new_tokens=4, return_dict=True)
    assert out.blocks == 2
    for row, one in enumerate(prompts):
        assert torch.equal(out.sequences[row, 8:], plain(model, one, 4)[0, one.shape[1] :])


# -- stopping ------------------------------------------------------------------------------------------------------


def test_stop_tokens_come_from_the_configurations_or_the_call(model):
    ids = prompt(10)
    text = generate_blocks(model, ids, max_new_tokens=24)[0, 10:].tolist()
    first, second = text[5], text[9]
    model = copy.deepcopy(model)

    def until(stops: list[int]) -> list[int]:
        return text[: min(text.index(s) for s in stops) + 1]

    def new(**settings) -> list[int]:
        return generate_blocks(model, ids, max_new_tokens=24, **settings)[0, 10:].tolist()

    model.config.eos_token_id = first
    model.generation_config = GenerationConfig()
    assert new() == until([first])
    model.generation_config.eos_token_id = [second, first]
    assert new() == until([first, second])
    assert new(eos_token_id=second) == until([second])
    assert new(eos_token_id=[]) == text


def test_a_stop_token_in_the_prompt_stops_nothing(model):
    ids = prompt(10)
    assert generate_blocks(model, ids, max_new_tokens=8, eos_token_id=[int(ids[0, 9]), int(ids[0, 3])]).shape[1] > 11


def test_a_block_ends_as_soon_as_all_that_is_wanted_of_it_stands(model):
    ids = prompt(8)
    full = generate_blocks(model, ids, max_new_tokens=4, rule="sequential", return_dict=True)
    cut = generate_blocks(model, ids, max_new_tokens=1, rule="sequential", return_dict=True)
    assert (full.steps_per_block, cut.steps_per_block) == ([4], [1])
    assert torch.equal(cut.sequences, full.sequences[:, :9])
    stop = int(full.sequences[0, 9])
    stopped = generate_blocks(model, ids, max_new_tokens=4, rule="sequential", eos_token_id=stop, return_dict=True)
    assert stopped.denoising_steps == stopped.lengths
    assert torch.equal(stopped.sequences, full.sequences[:, : 8 + stopped.lengths[0]])


# -- drawing -------------------------------------------------------------------------------------------------------


def drawn(model, ids, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    settings = {"max_new_tokens": 12, "temperature": 1.5, "generator": generator} | settings
    return generate_blocks(model, ids, **settings)


def test_same_seed_same_tokens_and_the_global_state_is_untouched(model):
    ids, before = prompt(9), torch.random.get_rng_state()
    assert torch.equal(drawn(model, ids, 0), drawn(model, ids, 0))
    assert not torch.equal(drawn(model, ids, 0), drawn(model, ids, 1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_row_with_its_own_generator_draws_the_same_in_any_batch(model):
    prompts = [prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    ids, mask = padded(prompts)
    stop = int(drawn(model, prompts[1], 1)[0, 17 + 2])
    settings = {"threshold": 0.2, "eos_token_id": stop}
    each = [torch.Generator().manual_seed(row) for row in range(len(prompts))]
    together = drawn(model, ids, attention_mask=mask, generator=each, return_dict=True, **settings)
    for row, one in enumerate(prompts):
        alone = drawn(model, one, row, return_dict=True, **settings)
        end = alone.lengths[0]
        assert together.lengths[row] == end
        assert torch.equal(together.sequences[row, 17 : 17 + end], alone.sequences[0, one.shape[1] :])
    assert len(set(together.lengths)) > 1


def test_one_generator_gives_every_row_its_own_stream(model):
    out = drawn(model, prompt(9).expand(3, -1))
    assert len({tuple(row) for row in out.tolist()}) == 3
    assert torch.equal(out[:1], drawn(model, prompt(9)))


def test_top_k_1_and_top_p_0_are_greedy(model):
    ids = prompt(9)
    greedy = generate_blocks(model, ids, max_new_tokens=12, rule="sequential")
    for settings in ({"top_k": 1}, {"top_p": 0.0}, {"temperature": 1e-6}):
        assert torch.equal(drawn(model, ids, rule="sequential", **settings), greedy), settings


class Only(LogitsProcessor):
    """Forbids all but some tokens, and remembers what it was called with."""

    def __init__(self, allowed: list[int]):
        self.allowed, self.seen = allowed, []

    def __call__(self, input_ids, scores):
        self.seen.append((input_ids.clone(), scores.shape, scores.dtype))
        out = torch.full_like(scores, -torch.inf)
        out[:, self.allowed] = scores[:, self.allowed]
        return out


def test_logits_processors_see_and_shape_the_block(model):
    only = Only([3, 5, MASK])
    ids, mask = padded([prompt(9), prompt(3, 1)])
    out = generate_blocks(
        model, ids, attention_mask=mask, max_new_tokens=6, logits_processor=LogitsProcessorList([only])
    )
    assert set(out[:, 9:].unique().tolist()) <= {3, 5}
    seen, shape, dtype = only.seen[0]
    assert (shape, dtype) == ((2 * BLOCK, VOCABULARY), torch.float32)
    assert seen[0].tolist() == [*ids[0].tolist(), MASK, MASK, MASK]
    assert seen[BLOCK].tolist() == [PAD] * 8 + [*ids[1, -3:].tolist(), MASK]


# -- around the loop -----------------------------------------------------------------------------------------------


class Recorder(BaseStreamer):
    def __init__(self, fail_at: int = 10**6):
        self.values, self.ended, self.fail_at = [], False, fail_at

    def put(self, value):
        if len(self.values) == self.fail_at:
            raise KeyboardInterrupt
        self.values.append(value)

    def end(self):
        self.ended = True


def test_the_streamer_gets_the_prompt_then_block_by_block(model):
    ids, recorder = prompt(10), Recorder()
    out = generate_blocks(model, ids, max_new_tokens=9, streamer=recorder)
    assert torch.equal(recorder.values[0], ids)
    assert [len(value) for value in recorder.values[1:]] == [2, 4, 3]
    assert torch.equal(torch.cat(recorder.values[1:]), out[0, 10:])
    assert recorder.ended
    stop = int(out[0, 13])
    stopped = Recorder()
    out = generate_blocks(model, ids, max_new_tokens=9, streamer=stopped, eos_token_id=stop)
    assert torch.equal(torch.cat(stopped.values[1:]), out[0, 10:])
    assert stopped.values[-1][-1] == stop


def test_an_interrupt_leaves_nothing_behind(model):
    ids = prompt(10)
    expected = generate_blocks(model, ids, max_new_tokens=9)
    before = {name: id(value) for name, value in vars(model).items()}
    with pytest.raises(KeyboardInterrupt):
        generate_blocks(model, ids, max_new_tokens=9, streamer=Recorder(fail_at=2))
    assert {name: id(value) for name, value in vars(model).items()} == before
    assert torch.is_grad_enabled()
    assert torch.equal(generate_blocks(model, ids, max_new_tokens=9), expected)


def test_progress_shows_blocks_and_only_when_asked(model, capsys):
    generate_blocks(model, prompt(10), max_new_tokens=9)
    assert capsys.readouterr().err == ""
    generate_blocks(model, prompt(10), max_new_tokens=9, progress=True)
    assert "3/3" in capsys.readouterr().err


def test_nothing_needs_gradients_and_outputs_are_ordinary_tensors(model):
    with Watch(model) as watch:
        out = generate_blocks(model, prompt(10), max_new_tokens=3)
    assert not any(logits.requires_grad for logits in watch.logits)
    assert not out.is_inference()
    assert out.dtype == torch.int64
    assert torch.equal(generate_blocks(model, prompt(10).int(), max_new_tokens=3), out)


def test_a_model_in_training_mode_is_told_and_left_in_it():
    model = sdar().train()
    with pytest.warns(UserWarning, match=r"model\.eval\(\)"):
        generate_blocks(model, prompt(5), max_new_tokens=2)
    assert model.training


def test_one_wait_per_step(model, monkeypatch):
    """What waits for a device: reading a tensor from Python, and making one from Python's numbers."""
    waits = []

    def count(owner, name):
        native = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: (waits.append(name), native(*args, **kwargs))[1])

    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "nonzero"):
        count(torch.Tensor, name)
    count(torch, "tensor")

    def total(new: int, **settings) -> int:
        waits.clear()
        out = generate_blocks(model, prompt(8), max_new_tokens=new, rule="static", return_dict=True, **settings)
        assert out.denoising_steps == [new]
        return len(waits)

    assert total(8) - total(4) == 4
    assert total(16) - total(8) == 8
    drawn = [total(new, temperature=1.0, top_k=5, top_p=0.9, generator=torch.Generator()) for new in (4, 8)]
    assert drawn[1] - drawn[0] == 4
