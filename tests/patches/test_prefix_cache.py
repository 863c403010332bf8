"""The prefix cache on diffusers' real ``LLaDA2Pipeline`` around stand-ins of its remote code."""

from __future__ import annotations

import copy
import functools
import inspect

import pytest
import torch
from diffusers import LLaDA2Pipeline
from torch._dynamo.testing import CompileCounter

import hf_accel
from hf_accel.errors import InvalidSetting, NotApplicable
from hf_accel.patches.prefix_cache import relative_difference
from hf_accel.sites.kv_cache.llada2 import Verdict, Window
from hf_accel.sites.kv_cache.transformers import new_cache
from hf_accel.testing.models import dream, llada, llada2
from hf_accel.testing.models.llada2_pipeline import BLOCK, MASK, Recorder, Tokenizer, generate, pipeline, prompt


def run_of(applied):
    return applied.report().entries[0].run


def close(ours, theirs, limit=2e-5):
    assert len(ours) == len(theirs)
    return all(torch.allclose(a, b, atol=limit, rtol=limit) for a, b in zip(ours, theirs, strict=True))


# -- the same tokens ---------------------------------------------------------------------------------------------------

CASES = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "top_k": 20},
    "no editing": {"editing_threshold": None},
    "much editing": {"editing_threshold": 0.05, "max_post_steps": 4},
    "one step": {"num_inference_steps": 1},
    "length no multiple of the block": {"gen_length": 19},
    "another block length of many": {"gen_length": 33},
    "end of sequence": {"eos_early_stop": True, "eos_token_id": 7},
    "two prompts": {"ids": prompt(21, 2)},
    "prompt of whole blocks": {"ids": prompt(24)},
    "prompt shorter than a block": {"ids": prompt(3)},
    "no prompt": {"ids": prompt(0)},
    "padded prompts": {"prompt": ["a short one", "and one that is a good deal longer than it"]},
    "right padding": {"ids": prompt(21, 2), "attention_mask": (torch.arange(21) < torch.tensor([[21], [13]])).long()},
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_logits_are_those_of_the_pipeline(name):
    settings = dict(CASES[name])
    ids = settings.pop("ids", None)
    pipe = pipeline()
    tokens, logits = generate(pipe, ids, **settings)
    with hf_accel.apply(pipe, "prefix-cache") as applied:
        for _ in range(2):  # verified in the first call, all cached in the second
            ours, read = generate(pipe, ids, **settings)
            assert torch.equal(ours, tokens)
            assert close([r[:, -BLOCK:] for r in read], logits)
        run = run_of(applied)
    assert run.verified >= 1
    assert run.cached_forwards > 0
    assert run.forwards == 2 * len(logits)
    allowed = {"the first block: nothing is in front of it"}  # where the prompt fills no block
    assert set(run.dense_calls) <= allowed
    assert run.cached_forwards + run.verified + run.dense_calls.total() == run.forwards


def test_tokens_depend_on_the_prefix():
    """Or equal tokens would say nothing."""
    pipe = pipeline()
    other = prompt(21).clone()
    other[0, 2] += 1
    assert not torch.equal(generate(pipe)[0], generate(pipe, other)[0])


def test_rows_are_those_of_the_docstring():
    pipe = pipeline()
    with hf_accel.apply(pipe, "prefix-cache") as applied:
        generate(pipe)
        before = copy.deepcopy(run_of(applied))
        windows = []
        hook = pipe.model.register_forward_pre_hook(
            lambda module, args, kwargs: windows.append(args[0].shape[1]), with_kwargs=True
        )
        inner = []
        inside = pipe.model.model.register_forward_pre_hook(
            lambda module, args, kwargs: inner.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        generate(pipe)
        run = run_of(applied)
        hook.remove(), inside.remove()
    # A prompt of 21 in blocks of 8: the first window is 24 long, its prefix 16.
    steps = [windows.count(end) for end in sorted(set(windows))]
    assert sorted(set(windows)) == [24, 32, 40, 48]
    later = [rows for n in steps[1:] for rows in [2 * BLOCK] + [BLOCK] * (n - 1)]
    expected = [16] + [BLOCK] * steps[0] + later
    assert inner == expected
    assert run.rows_computed - before.rows_computed == sum(expected)
    assert run.rows_native - before.rows_native == sum(windows)
    assert run.prefills == {"the first block of a request": 2}
    assert run.generations == 2


def test_compares_until_every_later_prefix_is_a_multiple():
    pipe = pipeline()
    with hf_accel.apply(pipe, "prefix-cache") as applied:
        generate(pipe, gen_length=27)  # prefixes 16, 24, 32 and 40; all whole
        assert run_of(applied).verified == 2
        generate(pipe, gen_length=27)
        assert run_of(applied).verified == 2
        generate(pipe, gen_length=24)  # the last three tokens of the last window are hidden: another form
        assert run_of(applied).verified == 3


def test_works_on_the_bare_model_too():
    model = llada2.build()
    tokens, _ = generate(pipeline(model))
    with hf_accel.apply(model, "prefix-cache") as applied:
        assert torch.equal(generate(pipeline(model))[0], tokens)
        assert run_of(applied).cached_forwards > 0


# -- who else calls ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_other_callers_get_all_rows_bit_for_bit():
    pipe, x = pipeline(), prompt(32)
    given = {"attention_mask": torch.ones_like(x), "position_ids": torch.arange(32)[None]}
    dense = pipe.model(x, **given).logits
    inside = []

    def score(pipe, step, index, tensors):
        inside.append(pipe.model(x, **given).logits)
        return {}

    with hf_accel.apply(pipe, "prefix-cache") as applied:
        generate(pipe)
        assert torch.equal(pipe.model(x, **given).logits, dense)
        ours, _ = generate(pipe, callback_on_step_end=score)
        run = run_of(applied)
    assert inside
    assert all(torch.equal(logits, dense) for logits in inside)
    assert torch.equal(ours, generate(pipe)[0])
    assert run.dense_calls["not called by LLaDA2Pipeline: the logits of all rows may be wanted"] == 1 + len(inside)


def test_callback_that_changes_the_prefix():
    def change(pipe, step, index, tensors):
        if step in (3, 6):
            x = tensors["block_x"].clone()
            x[:, step] = 5 + step
            return {"block_x": x}
        return {}

    pipe = pipeline()
    tokens, logits = generate(pipe, callback_on_step_end=change)
    with hf_accel.apply(pipe, "prefix-cache") as applied:
        generate(pipe)
        ours, read = generate(pipe, callback_on_step_end=change)
        assert run_of(applied).prefills["the prefix changed"] == 2
    assert torch.equal(ours, tokens)
    assert close([r[:, -BLOCK:] for r in read], logits)
    assert not torch.equal(tokens, generate(pipe)[0])


# -- not block-causal: left alone --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"two_d_mask": "bidirectional"},
        {"two_d_mask": "causal"},
        {"block_size": 16},
        {"block_size": 4},
        {"block_size": 5},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_a_prefix_that_is_not_frozen_is_left_alone(fields):
    pipe = pipeline(**fields)
    tokens, logits = generate(pipe, gen_length=27)
    with hf_accel.apply(pipe, "prefix-cache") as applied:
        generate(pipe, gen_length=27)
        before = run_of(applied).rows_computed, run_of(applied).rows_native
        ours, read = generate(pipe, gen_length=27)
        after = run_of(applied).rows_computed, run_of(applied).rows_native
        report = str(applied.report())
    assert torch.equal(ours, tokens)
    refused = fields != {"block_size": 16}
    if refused:  # from the first window on: the model's own bits
        assert all(torch.equal(a, b) for a, b in zip(read, logits, strict=True))
        assert run_of(applied).cached_forwards == 0
        assert after[0] - before[0] == after[1] - before[1]
    assert "the prefix is not frozen under this mask: logits of the active block differ by" in report


def test_blocks_of_the_model_larger_than_those_of_the_pipeline():
    """A prefix of 16 is frozen in a model of block size 16, one of 24 is not: the first comparison must not be all."""
    pipe = pipeline(block_size=16)
    tokens, logits = generate(pipe)
    with hf_accel.apply(pipe, "prefix-cache") as applied:
        for _ in range(2):
            ours, read = generate(pipe)
            assert torch.equal(ours, tokens)
            assert close([r[:, -BLOCK:] for r in read], logits)
        assert run_of(applied).verified == 1
        assert any("not frozen" in reason for reason in run_of(applied).dense_calls)


def test_remote_code_that_wants_4d_masks_raises_as_it_did():
    pipe = pipeline(two_d_mask="4-D only")
    with pytest.raises(ValueError, match="only a block attention mask"):
        generate(pipe)
    with hf_accel.apply(pipe, "prefix-cache"), pytest.raises(ValueError, match="only a block attention mask"):
        generate(pipe)


class Square(llada2.LLaDA2MoeModelLM):
    """Remote code that takes no more keys than queries."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        if attention_mask.ndim == 4 and attention_mask.shape[2] != attention_mask.shape[3]:
            raise ValueError("square masks only")
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, use_cache=use_cache)


class Forgetful(llada2.LLaDA2MoeModelLM):
    """Remote code that has a cache in its signature only."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        return super().forward(input_ids, attention_mask, position_ids, use_cache=False)


Square.__name__ = Forgetful.__name__ = "LLaDA2MoeModelLM"


@pytest.mark.parametrize(
    ("cls", "words"), [(Square, "raised ValueError: square masks only"), (Forgetful, "left 0 positions in the cache")]
)
def test_remote_code_that_cannot_use_a_cache_is_left_alone(cls, words):
    model = cls(llada2.LLaDA2MoeConfig(initializer_range=0.25)).eval()
    pipe = pipeline(model)
    tokens, logits = generate(pipe)
    with hf_accel.apply(pipe, "prefix-cache") as applied:
        ours, read = generate(pipe)
        assert words in str(applied.report())
    assert torch.equal(ours, tokens)
    assert all(torch.equal(a, b) for a, b in zip(read, logits, strict=True))


def test_tolerance_decides():
    pipe = pipeline()
    with hf_accel.apply(pipe, "prefix-cache", tolerance=1e-12) as applied:
        generate(pipe)
        assert run_of(applied).cached_forwards == 0
    with pytest.raises(InvalidSetting, match="tolerance"):
        hf_accel.apply(pipe, "prefix-cache", tolerance=0.0)


class NoCache(llada2.LLaDA2MoeModelLM):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None):
        return super().forward(input_ids, attention_mask, position_ids, use_cache=False)


NoCache.__name__ = "LLaDA2MoeModelLM"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (llada.build, "every token sees all others"),
        (dream.build, "every token sees all others"),
        (lambda: NoCache(llada2.LLaDA2MoeConfig()), "does not take past_key_values and use_cache"),
        (lambda: torch.nn.Linear(2, 2), "not a block-diffusion language model"),
    ],
    ids=["llada", "dream", "no cache", "module"],
)
def test_refusals_say_why(model, words):
    with pytest.raises(NotApplicable, match=words):
        hf_accel.apply(model(), "prefix-cache")


def test_forward_replaced_by_another_library():
    model = llada2.build()
    model.forward = lambda *args, **kwargs: None
    with pytest.raises(NotApplicable, match="was replaced by another library"):
        hf_accel.apply(model, "prefix-cache")


# -- undo, copies, errors, memory --------------------------------------------------------------------------------------


def test_revert_leaves_no_trace():
    pipe = pipeline()
    before, (tokens, logits) = dict(pipe.model.__dict__), generate(pipe)
    applied = hf_accel.apply(pipe, "prefix-cache")
    assert inspect.signature(pipe.model.forward).parameters.keys() == inspect.signature(
        type(pipe.model).forward
    ).parameters.keys() - {"self"}
    generate(pipe)
    applied.revert()
    applied.revert()
    assert pipe.model.__dict__.keys() == before.keys()
    assert all(pipe.model.__dict__[name] is value for name, value in before.items())
    again, read = generate(pipe)
    assert torch.equal(again, tokens)
    assert all(torch.equal(a, b) for a, b in zip(read, logits, strict=True))


def test_a_wrapper_that_outlives_it_runs_the_models_own():
    pipe = pipeline()
    tokens, _ = generate(pipe)
    applied = hf_accel.apply(pipe, "prefix-cache")
    ours = pipe.model.forward
    pipe.model.forward = functools.wraps(ours)(lambda *args, **kwargs: ours(*args, **kwargs))
    with pytest.warns(UserWarning, match="left as it is now"):
        applied.revert(force=True)
    again, _ = generate(pipe)
    assert torch.equal(again, tokens)


def test_copies_are_apart():
    pipe = pipeline()
    tokens, _ = generate(pipe)
    applied = hf_accel.apply(pipe, "prefix-cache")
    generate(pipe)
    forwards = run_of(applied).forwards
    twin = LLaDA2Pipeline(copy.deepcopy(pipe.model), Recorder(block_length=BLOCK), Tokenizer())
    twin.set_progress_bar_config(disable=True)
    with torch.no_grad():
        twin.model.lm_head.weight.neg_()
    other, _ = generate(twin)
    assert run_of(applied).forwards == forwards
    assert not torch.equal(other, tokens)
    hf_accel.revert(twin)
    assert torch.equal(generate(twin)[0], other)
    assert applied.active
    assert torch.equal(generate(pipe)[0], tokens)


def context(pipe):
    return pipe.model._hf_accel_prefix_cache.now()


@pytest.mark.parametrize("verified", [False, True])
def test_an_exception_leaves_nothing_behind(verified):
    def fail(pipe, step, index, tensors):
        if step == 5:
            raise KeyError("stop here")
        return {}

    pipe = pipeline()
    tokens, _ = generate(pipe)
    with hf_accel.apply(pipe, "prefix-cache"):
        if verified:
            generate(pipe)
        with pytest.raises(KeyError, match="stop here"):
            generate(pipe, callback_on_step_end=fail)
        assert torch.equal(generate(pipe)[0], tokens)

        hook = pipe.model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(pipe)
        hook.remove()
        assert context(pipe)._frozen is None
        assert torch.equal(generate(pipe)[0], tokens)


def test_keys_and_values_end_with_the_call():
    pipe, kept = pipeline(), []

    def look(pipe, step, index, tensors):
        kept.append(context(pipe)._frozen.cache.nbytes)
        return {}

    with hf_accel.apply(pipe, "prefix-cache") as applied:
        result = generate(pipe, callback_on_step_end=look)  # a view of the pipeline's tokens, held
        assert context(pipe)._frozen is None
        assert run_of(applied).kept_bytes == max(kept)
        assert result[0].shape == (1, 24)


def test_weights_may_change_between_calls():
    pipe = pipeline()
    with hf_accel.apply(pipe, "prefix-cache"):
        first, _ = generate(pipe)
        with torch.no_grad():
            pipe.model.model.layers[0].attention.query_key_value.weight.mul_(-1.5)
        ours, _ = generate(pipe)
    assert torch.equal(generate(pipe)[0], ours)
    assert not torch.equal(first, ours)


def test_inference_mode_and_training_mode():
    pipe = pipeline()
    tokens, _ = generate(pipe)
    with hf_accel.apply(pipe, "prefix-cache") as applied:
        with torch.inference_mode():
            assert torch.equal(generate(pipe)[0], tokens)
        assert run_of(applied).cached_forwards > 0
        assert torch.equal(generate(pipe)[0], tokens)
        before = run_of(applied).cached_forwards
        pipe.model.train()
        assert torch.equal(generate(pipe)[0], tokens)  # nothing in the stand-in drops out
        assert run_of(applied).cached_forwards == before
        assert run_of(applied).dense_calls["training mode or gradients"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    pipe = pipeline(llada2.build(initializer_range=0.1).to(dtype))
    _, logits = generate(pipe, gen_length=8, num_inference_steps=1)
    with hf_accel.apply(pipe, "prefix-cache") as applied:
        for _ in range(2):
            _, read = generate(pipe, gen_length=8, num_inference_steps=1)
        assert run_of(applied).cached_forwards > 0
    assert relative_difference(logits[0], read[0][:, -BLOCK:]) < 0.05


def test_under_torch_compile():
    pipe = pipeline()
    tokens, _ = generate(pipe, num_inference_steps=2)
    with hf_accel.apply(pipe, "prefix-cache") as applied:
        graphs = CompileCounter()
        pipe.model = torch.compile(pipe.model, backend=graphs, dynamic=True, fullgraph=True)
        for length in (24, 40):
            ours, _ = generate(pipe, gen_length=length, num_inference_steps=2)
            assert torch.equal(ours[:, :16], tokens[:, :16])
        assert run_of(applied).cached_forwards > 0
        assert 0 < graphs.frame_count <= 5  # prefill, steps, first steps of a block, the model's own: of any length
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft's
def test_inside_peft():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(
        llada2.build(), peft.LoraConfig(target_modules=["query_key_value"], init_lora_weights=False)
    )
    pipe = pipeline(wrapped.eval())
    tokens, _ = generate(pipe)
    with hf_accel.apply(pipe, "prefix-cache") as applied:
        assert torch.equal(generate(pipe)[0], tokens)
        assert run_of(applied).cached_forwards > 0


@pytest.mark.parametrize("first", ["hooks", "method"])
def test_beside_hooks_of_accelerate(first):
    hooks = pytest.importorskip("accelerate.hooks")
    pipe = pipeline()
    tokens, _ = generate(pipe)
    if first == "hooks":
        hooks.add_hook_to_module(pipe.model, hooks.ModelHook())
    applied = hf_accel.apply(pipe, "prefix-cache")
    if first == "method":
        hooks.add_hook_to_module(pipe.model, hooks.ModelHook())
    assert torch.equal(generate(pipe)[0], tokens)
    assert run_of(applied).cached_forwards > 0
    applied.revert()
    forwards = run_of(applied).forwards
    assert torch.equal(generate(pipe)[0], tokens)
    assert run_of(applied).forwards == forwards


@pytest.mark.filterwarnings("ignore:.*RCD")  # the weights are not declared RCD's
def test_beside_residuals_on_the_embeddings():
    """rcd sees embeddings of fewer rows and logits of the last block only, and must find the same positions."""
    pipe = pipeline()
    plain, _ = generate(pipe)
    with hf_accel.apply(pipe, "rcd", mask_token_id=MASK):
        tokens, _ = generate(pipe)
    with hf_accel.apply(pipe, {"rcd": {"mask_token_id": MASK}, "prefix-cache": {}}) as applied:
        assert torch.equal(generate(pipe)[0], tokens)
        assert applied.stats()["model"]["prefix-cache"]["cached_forwards"] > 0
    assert not torch.equal(tokens, plain)


def test_one_model_in_two_pipelines():
    model = llada2.build()
    first, second = pipeline(model), pipeline(model)
    tokens = [generate(pipe, prompt(21, seed=seed))[0] for seed, pipe in enumerate((first, second))]

    def nest(pipe, step, index, tensors):
        if step == 4:
            assert torch.equal(generate(second, prompt(21, seed=1))[0], tokens[1])
        return {}

    with hf_accel.apply(first, "prefix-cache"):
        assert torch.equal(generate(first, prompt(21, seed=0), callback_on_step_end=nest)[0], tokens[0])


# -- parts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("g", range(1, 13))
def test_verdicts_cover_only_what_is_frozen(g):
    """Against a model of block size g, in which a prefix is frozen if it is a multiple of g."""
    for block in (4, 6, 8):
        for start in range(block, 100, block):
            verdict = Verdict()
            for prefix in range(start, 200, block):
                if verdict.covers(prefix, grows=prefix > start):
                    assert prefix % g == 0
                elif prefix % g:
                    break  # the comparison fails
                else:
                    verdict.learn(prefix, grows=prefix > start)


def test_comparisons_are_few():
    verdict, compared = Verdict(), []
    for prefix in range(32, 2000, 32):
        if not verdict.covers(prefix, grows=prefix > 32):
            compared.append(prefix)
            verdict.learn(prefix, grows=prefix > 32)
    assert compared == [32, 64]


def test_cache_equals_concatenation_and_writes_in_place():
    generator = torch.Generator().manual_seed(0)
    cache, kept, values = new_cache(), [torch.zeros(2, 3, 0, 4)] * 2, None
    for rows, keep in ((40, 40), (8, 40), (8, 40), (16, 48), (8, 48), (200, 248)):
        new = [torch.randn(2, 3, rows, 4, generator=generator) for _ in range(2)]
        values = [torch.cat([old, x], dim=2) for old, x in zip(kept, new, strict=True)]
        before = cache.layers[0]._buffers[0].data_ptr() if len(cache.layers) else None
        got = cache.update(*new, layer_idx=0)
        assert all(torch.equal(a, b) for a, b in zip(got, values, strict=True))
        assert cache.get_seq_length() == values[0].shape[2]
        if rows < 40:
            assert got[0].data_ptr() == before
        cache.truncate(keep)
        assert cache.get_seq_length() == keep
        kept = [x[:, :, :keep] for x in values]


def test_mask_is_block_causal_and_hides_padding():
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :3] = 0
    window = Window(torch.zeros(2, 12, dtype=torch.long), mask, torch.arange(12)[None], 4)
    got = window.visible(4, torch.float32) == 0
    assert got.shape == (2, 1, 8, 12)
    for row in range(8):
        for key in range(12):
            seen = key < 8 if row < 4 else True
            assert bool(got[0, 0, row, key]) == seen
            assert bool(got[1, 0, row, key]) == (seen and key >= 3)


def test_relative_difference():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    assert relative_difference(logits, logits + 7) < 1e-6
    worse = logits.clone()
    worse[1] *= 1.1  # the worst item counts, not the mean
    assert relative_difference(logits, worse) == pytest.approx(0.1, rel=1e-3)
    worse[0, 0, 0] = float("nan")
    assert not relative_difference(logits, worse) <= 0.5
