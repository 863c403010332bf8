"""prefix-split on DiffusionGemma: the decoder's own result, without a copy of the prefix."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

import hf_accel
from hf_accel import registry
from hf_accel.sites.prefix_attention.gemma import NO_MASK, OTHER_MASK, ROLLED
from hf_accel.testing.models import gemma
from hf_accel.testing.models.sdar import BLOCK, Graphs, denoise, prompt, sdar

CANVAS, LAYERS, FULL, WINDOW = 8, 4, 2, 8
PAD = 5


def run_of(applied):
    return applied.report().entries[0].run


@pytest.fixture(scope="module")
def shared():
    return gemma.diffusion_gemma()


@pytest.fixture(params=["sdpa", "eager"])
def model(request, shared):
    shared.set_attn_implementation(request.param)
    return shared


def tokens(length, rows=2, seed=0):
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def encoded(model, length, padded=False, static=False, rows=2):
    """A cache with a prompt in it, and the decoder's masks (None if it needs none)."""
    text = model.config.text_config
    cache = StaticCache(config=text, max_cache_len=length + 16) if static else DynamicCache(config=text)
    mask = torch.ones(rows, length, dtype=torch.bool)
    if padded:
        mask[1, :PAD] = False
    with torch.no_grad():
        model.model.encoder(tokens(length, rows), attention_mask=mask, past_key_values=cache)
    if not padded and not static:
        return cache, None
    told = torch.nn.functional.pad(mask, (0, CANVAS), value=True)
    return cache, model.model.decoder.create_diffusion_decoder_attention_mask(
        config=model.config, inputs_embeds=torch.empty(rows, CANVAS, 0), past_key_values=cache,
        decoder_attention_mask=told,
    )  # fmt: skip


@torch.no_grad()
def decoded(model, cache, mask, **kwargs):
    """Logits of a first step, and of a later one."""
    given = {"past_key_values": cache, "decoder_attention_mask": mask, "decoder_input_ids": tokens(CANVAS, seed=1)}
    before = torch.randn(2, CANVAS, 97, generator=torch.Generator().manual_seed(2))
    return torch.stack([model(**given, self_conditioning_logits=x, **kwargs).logits for x in (None, before)])


def contents(cache):
    return [x.clone() for layer in cache.layers for x in (layer.keys, layer.values)]


@pytest.mark.parametrize("length", [6, 23])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_logits_of_the_decoder(model, length, padded, static):
    cache, mask = encoded(model, length, padded, static)
    before = contents(cache)
    theirs = decoded(model, cache, mask)
    with hf_accel.apply(model, "prefix-split") as applied:
        ours = decoded(model, cache, mask)
        run = run_of(applied)
    assert (ours - theirs).abs().max() <= 1e-5
    assert all(torch.equal(a, b) for a, b in zip(contents(cache), before, strict=True))
    rolled = 2 * (LAYERS - FULL) if static and length > WINDOW else 0
    assert run.dense_calls == ({ROLLED: rolled} if rolled else {})
    assert run.calls == 2 * LAYERS - rolled


def test_hidden_prompt_tokens_have_no_influence(model):
    with hf_accel.apply(model, "prefix-split"):
        cache, mask = encoded(model, 23, padded=True)
        whole = decoded(model, cache, mask)
        for layer in cache.layers:
            hidden = PAD - (23 - layer.keys.shape[2])
            layer.keys[1, :, : max(0, hidden)] = float("nan")
            layer.values[1, :, : max(0, hidden)] = float("nan")
        assert torch.equal(decoded(model, cache, mask), whole)


@torch.no_grad()
def generated(model, ids, seed=0, **kwargs):
    torch.manual_seed(seed)
    return model.generate(ids, max_new_tokens=2 * CANVAS, max_denoising_steps=3, **kwargs).sequences


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
def test_generate_gives_the_same_tokens(shared, static, padded):
    shared.set_attn_implementation("sdpa")
    kwargs = {"cache_implementation": "static", "disable_compile": True} if static else {}
    if padded:
        kwargs["attention_mask"] = torch.arange(11)[None] >= torch.tensor([[0], [PAD]])
    theirs = generated(shared, tokens(11), **kwargs)
    with hf_accel.apply(shared, "prefix-split") as applied:
        assert torch.equal(generated(shared, tokens(11), **kwargs), theirs)
        run = run_of(applied)
    assert not torch.equal(generated(shared, tokens(11), seed=1, **kwargs), theirs)  # tokens tell something
    assert run.forwards == {"prefill": 1, "denoise": 6, "commit": 1}
    assert (run.generations, run.blocks) == (1, 2)
    assert run.calls == 6 * (FULL if static else LAYERS)


def test_the_pipeline_of_diffusers(shared):
    from diffusers import DiffusionGemmaPipeline, EntropyBoundScheduler

    class Processor:
        eos_token_id = None

        def __call__(self, *args, **kwargs):
            return self.apply_chat_template()

        def apply_chat_template(self, *args, **kwargs):
            ids = tokens(11)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    shared.set_attn_implementation("sdpa")
    pipe = DiffusionGemmaPipeline(shared, EntropyBoundScheduler(), Processor())
    pipe.set_progress_bar_config(disable=True)

    def call(**kwargs):
        generator = torch.Generator().manual_seed(0)
        return pipe(
            ["a", "b"], gen_length=2 * CANVAS, num_inference_steps=3, generator=generator, output_type="seq", **kwargs
        ).sequences

    for kwargs in ({}, {"cache_implementation": "static"}):
        theirs = call(**kwargs)
        with hf_accel.apply(pipe, "prefix-split") as applied:
            assert torch.equal(call(**kwargs), theirs)
            assert applied.report().entries[0].model == "model"
            assert run_of(applied).forwards["prefill"] == 1
            assert run_of(applied).calls >= 6 * FULL


class Sizes(TorchDispatchMode):
    """Every size that a dimension of a new tensor has."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.ndim == 4:
                self.seen.add(x.shape[2])
        return out


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_no_tensor_holds_prefix_and_canvas(shared, static):
    """Not even one of the prefix alone is made anew: what a view shows has the prefix's storage."""
    shared.set_attn_implementation("sdpa")
    length = 7 if static else 23
    cache, mask = encoded(shared, length, static=static)
    joined = {length + 16 + CANVAS, min(WINDOW, length + 16) + CANVAS} if static else {23 + CANVAS, WINDOW - 1 + CANVAS}
    with Sizes() as theirs:
        decoded(shared, cache, mask)
    assert joined <= theirs.seen
    with hf_accel.apply(shared, "prefix-split"), Sizes() as ours:
        decoded(shared, cache, mask)
    assert not joined & ours.seen


def test_nothing_of_the_prefix_is_copied_on_the_sdar_class():
    model, cache = sdar(), DynamicCache()
    with torch.no_grad():
        model(prompt(12), past_key_values=cache, store_kv=True)
        with Sizes() as theirs:
            model(prompt(BLOCK), past_key_values=cache)
        assert 12 + BLOCK in theirs.seen
        with hf_accel.apply(model, "prefix-split"):
            model(prompt(BLOCK), past_key_values=cache)  # the first call also runs the model's own code
            with Sizes() as ours:
                model(prompt(BLOCK), past_key_values=cache)
    assert 12 + BLOCK not in ours.seen


# -- compiled ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def small():
    """A sliding and a full layer, two experts: compiling takes its time."""
    return gemma.diffusion_gemma(
        num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], num_experts=2, top_k_experts=1
    )


@pytest.mark.parametrize(
    ("static", "length"), [(False, 23), (True, 6), (True, 23)], ids=["dynamic", "static", "rolled"]
)
def test_the_decoder_compiles_to_one_graph(small, static, length, fresh_dynamo):
    cache, mask = encoded(small, length, padded=static, static=static)
    theirs = decoded(small, cache, mask)
    with hf_accel.apply(small, "prefix-split"):
        graphs = Graphs()
        ours = decoded(torch.compile(small, backend=graphs, fullgraph=True), cache, mask)
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-5)
    assert any("page_attention" in name for name in graphs.called)


def test_a_compiled_decoder_stops_at_a_mask_it_cannot_look_into(small, fresh_dynamo):
    cache, mask = encoded(small, 6, static=True)
    name = next(iter(mask)) if isinstance(mask, dict) else None
    changed = (mask[name] if name else mask).clone()
    changed[0, 0, 1] = changed.roll(1, -1)[0, 0, 1]
    with hf_accel.apply(small, "prefix-split"):
        compiled = torch.compile(small, backend="eager", fullgraph=True)
        decoded(compiled, cache, mask)
        with pytest.raises(RuntimeError, match="some positions of the canvas"):
            decoded(compiled, cache, {**mask, name: changed} if name else changed)


@torch.no_grad()
@pytest.mark.parametrize("then", ["eager", "sdpa", "another"])
def test_another_implementation_after_apply(small, then, another_implementation):
    cache, mask = encoded(small, 11)
    theirs = decoded(small, cache, mask)
    with hf_accel.apply(small, "prefix-split") as applied:
        small.set_attn_implementation(then)
        cache, mask = encoded(small, 11)
        assert torch.allclose(decoded(small, cache, mask), theirs, atol=1e-5)
        run = applied.report().entries[0].run
        counted = [reason for reason in run.dense_calls if "set_attn_implementation" in reason]
        assert bool(counted) == (then == "another")
    small.set_attn_implementation("sdpa")


def test_generate_compiles_its_forward(small, monkeypatch, fresh_dynamo):
    """transformers compiles the model's forward itself for a static cache; here without its code generator."""
    compile_, asked = torch.compile, []

    def plain(function=None, **kwargs):
        asked.append(kwargs)
        return compile_(function, backend="eager", fullgraph=kwargs.get("fullgraph", False))

    monkeypatch.setattr(torch, "compile", plain)
    theirs = generated(small, tokens(6), cache_implementation="static", disable_compile=True)
    with hf_accel.apply(small, "prefix-split"):
        assert torch.equal(generated(small, tokens(6), cache_implementation="static"), theirs)
    assert any(kwargs.get("fullgraph") for kwargs in asked)


def test_a_compiled_decoder_under_the_pipelines_advice(small, fresh_dynamo):
    """``pipe.model.model.decoder = torch.compile(...)``, as diffusers' docstring has it, in both orders."""
    cache, mask = encoded(small, 6, static=True)
    theirs = decoded(small, cache, mask)
    for first in ("compile", "apply"):
        model = copy.deepcopy(small)
        if first == "apply":
            hf_accel.apply(model, "prefix-split")
        model.model.decoder = torch.compile(model.model.decoder, backend="eager", fullgraph=True)
        if first == "compile":
            hf_accel.apply(model, "prefix-split")
        assert torch.allclose(decoded(model, cache, mask), theirs, atol=1e-5, rtol=1e-5)


# -- left to the model ---------------------------------------------------------------------------------------------


def test_a_static_cache_without_a_mask(shared):
    """The model itself attends to the empty slots then; nobody should repair that in passing."""
    shared.set_attn_implementation("sdpa")
    cache, _ = encoded(shared, 6, static=True)
    theirs = decoded(shared, cache, None)
    with hf_accel.apply(shared, "prefix-split") as applied:
        assert torch.equal(decoded(shared, cache, None), theirs)
        assert run_of(applied).dense_calls == {NO_MASK: 2 * LAYERS}


def test_masks_of_ones_own_making(shared):
    shared.set_attn_implementation("sdpa")
    cache, _ = encoded(shared, 6)
    mask = torch.ones(2, 1, CANVAS, 6 + CANVAS, dtype=torch.bool)
    mask[:, :, 3, 2] = False
    both = {"full_attention": mask, "sliding_attention": mask}
    theirs = decoded(shared, cache, both)
    with hf_accel.apply(shared, "prefix-split") as applied:
        assert torch.equal(decoded(shared, cache, both), theirs)
        assert run_of(applied).dense_calls == {OTHER_MASK: 2 * LAYERS}


def test_gradients_and_dropout(shared):
    shared.set_attn_implementation("sdpa")
    cache, mask = encoded(shared, 6)
    given = {"past_key_values": cache, "decoder_input_ids": tokens(CANVAS), "decoder_attention_mask": mask}
    with hf_accel.apply(shared, "prefix-split") as applied:
        shared(**given).logits.sum().backward()
        assert run_of(applied).dense_calls == {"gradients are needed": LAYERS}
    assert shared.model.decoder.layers[0].self_attn.q_proj.weight.grad is not None
    shared.zero_grad()


def test_attention_weights_are_those_of_the_model(shared):
    shared.set_attn_implementation("eager")
    cache, _ = encoded(shared, 6)
    given = {"past_key_values": cache, "decoder_input_ids": tokens(CANVAS), "output_attentions": True}
    with torch.no_grad():
        theirs = shared(**given).attentions
        with hf_accel.apply(shared, "prefix-split"):
            ours = shared(**given).attentions
    assert [a is None for a in ours] == [a is None for a in theirs]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None)


# -- put on and taken off ------------------------------------------------------------------------------------------


def test_revert_leaves_the_model_and_the_registry_as_they_were(shared):
    from transformers import AttentionInterface

    gc.collect()  # patched models of other tests let go of the registry
    shared.set_attn_implementation("sdpa")
    before = {name: dict(m.__dict__) for name, m in shared.named_modules()}
    keys, registered = list(shared.state_dict()), set(AttentionInterface())
    with hf_accel.apply(shared, "prefix-split"):
        assert list(shared.state_dict()) == keys
        assert set(AttentionInterface()) != registered
        assert shared.config._attn_implementation == "sdpa"
        encoder = shared.model.encoder.language_model.layers[0].self_attn
        assert encoder.config._attn_implementation == "sdpa"
    assert before == {name: dict(m.__dict__) for name, m in shared.named_modules()}
    assert set(AttentionInterface()) == registered


def test_saving_and_loading(shared, tmp_path):
    shared.set_attn_implementation("sdpa")
    with hf_accel.apply(shared, "prefix-split"):
        shared.save_pretrained(tmp_path)
    again = type(shared).from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    assert list(again.state_dict()) == list(shared.state_dict())


def test_facts():
    cls = registry.get("prefix-split")
    assert cls.facts.exact
    assert not cls.Config().to_dict()["settings"]
    assert isinstance(cls.traceable, bool)
    assert cls.facts.compile == cls.traceable


def test_sampling_is_the_same_at_a_fixed_seed():
    """Sampled tokens of the SDAR class, and of two requests in turn."""
    model = sdar()
    theirs = [denoise(model, prompt(8, seed=s))[1] for s in (0, 1)]
    with hf_accel.apply(model, "prefix-split") as applied:
        assert all(torch.equal(denoise(model, prompt(8, seed=s))[1], theirs[s]) for s in (0, 1))
        assert run_of(applied).generations == 2
