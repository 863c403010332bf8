"""The attention seam of block-diffusion models: what it takes, what it leaves to the model, and why."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import hf_accel
from hf_accel import registry
from hf_accel.api import applied_methods
from hf_accel.errors import NotApplicable, RevertRefused
from hf_accel.hosts.target import Model
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport
from hf_accel.sites.prefix_attention import install as block_attention
from hf_accel.sites.prefix_attention.base import PrefixAttentionConfig, PrefixAttentionMethod, PrefixRunner
from hf_accel.sites.prefix_attention.masks import SplitMemo, split_mask
from hf_accel.sites.prefix_attention.sdar import OTHER_COMPUTATION, OTHER_MASK
from hf_accel.sites.prefix_attention.seam import SEAT
from hf_accel.sites.prefix_attention.split import split_attention
from hf_accel.testing.models import gemma, llada, llada2
from hf_accel.testing.models import sdar as sdar_models
from hf_accel.testing.models.sdar import BLOCK, Graphs, denoise, prompt, sdar
from hf_accel.zoo import sdar as modeling

LAYERS = sdar_models.SDAR["num_hidden_layers"]
PADDING = torch.arange(12)[None] >= torch.tensor([[0], [8]])


def run_of(applied):
    return applied.report().entries[0].run


def close(ours, theirs, limit=1e-5):
    return all(torch.allclose(a, b, atol=limit, rtol=limit) for a, b in zip(ours, theirs, strict=True))


def compared(model, *args, **kwargs):
    """A loop without and with prefix-split: logits and tokens are the same; what the report says of the second."""
    logits, tokens = denoise(model, *args, **kwargs)
    with hf_accel.apply(model, "prefix-split") as applied:
        ours, our_tokens = denoise(model, *args, **kwargs)
    assert close(ours, logits)
    assert torch.equal(our_tokens, tokens)
    return run_of(applied)


# -- SDAR class: exact under all that samplers pass ----------------------------------------------------------------


@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (4, 1)], ids=["gqa", "mha", "mqa"])
def test_denoising_is_the_models_own(heads):
    model = sdar(num_attention_heads=heads[0], num_key_value_heads=heads[1])
    run = compared(model, prompt(12), form=None)
    assert not run.dense_calls
    assert run.calls == 2 * BLOCK * LAYERS
    assert run.forwards == {"prefill": 1, "denoise": 2 * BLOCK, "commit": 2}
    assert (run.generations, run.blocks) == (1, 2)


@pytest.mark.parametrize("form", ["2-D", "3-D", "4-D", "additive"])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["full", "left-padded"])
def test_masks_of_every_form(form, padding):
    run = compared(sdar(), prompt(12, rows=2), padding=padding, form=form)
    assert not run.dense_calls
    assert run.calls == 2 * BLOCK * LAYERS


def test_a_left_padded_row_equals_the_row_alone():
    model, ids = sdar(), prompt(12, rows=2)
    with hf_accel.apply(model, "prefix-split"):
        both, _ = denoise(model, ids, padding=PADDING)
        alone, _ = denoise(model, ids[1:, 8:])
    assert close([x[1:] for x in both], alone, 1e-4)


def test_no_prefix_at_all():
    run = compared(sdar(), prompt(0), form=None, rest=[3, 4])
    assert not run.dense_calls
    assert run.forwards == {"denoise": 2 * BLOCK - 2, "commit": 2}
    assert (run.generations, run.blocks) == (1, 2)


def test_a_static_cache():
    model = sdar()

    def cache():
        return StaticCache(config=model.config, max_cache_len=32)

    logits, _ = denoise(model, prompt(12), form=None, cache=cache())
    with hf_accel.apply(model, "prefix-split") as applied:
        ours, _ = denoise(model, prompt(12), form=None, cache=cache())
    assert close(ours, logits)
    assert not run_of(applied).dense_calls


def test_the_cache_is_left_as_it_is():
    model, cache = sdar(), DynamicCache()
    with hf_accel.apply(model, "prefix-split"), torch.no_grad():
        model(prompt(12), past_key_values=cache, store_kv=True)
        before = [(layer.keys, layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        model(prompt(BLOCK), past_key_values=cache, store_kv=False)
    for layer, (keys, same, values) in zip(cache.layers, before, strict=True):
        assert layer.keys is keys
        assert torch.equal(layer.keys, same)
        assert torch.equal(layer.values, values)


def test_inference_mode():
    model = sdar()
    logits, _ = denoise(model, prompt(12, 2), padding=PADDING)
    with hf_accel.apply(model, "prefix-split") as applied, torch.inference_mode():
        ours, _ = denoise(model, prompt(12, 2), padding=PADDING)
    assert close(ours, logits)
    assert not run_of(applied).dense_calls


def test_half_precision():
    model = sdar().bfloat16()
    logits, _ = denoise(model, prompt(12))
    with hf_accel.apply(model, "prefix-split") as applied:
        ours, _ = denoise(model, prompt(12))
    assert not run_of(applied).dense_calls
    first, theirs = ours[0], logits[0]
    assert (first - theirs).norm() <= 2e-2 * theirs.norm()


def test_time_is_measured_if_asked_for():
    model = sdar()
    with hf_accel.apply(model, "prefix-split") as applied:
        denoise(model, prompt(4), blocks=1)
        assert applied.stats()["model"]["prefix-split"]["attention_seconds"] == 0
        applied.time_attention()
        denoise(model, prompt(4), blocks=1)
        assert applied.stats()["model"]["prefix-split"]["attention_seconds"] > 0


# -- SDAR class: left to the model, in words -----------------------------------------------------------------------


def steps(model, grad=False, **kwargs):
    """A prefill and a denoising step with the given arguments."""
    cache = DynamicCache()
    with torch.no_grad():
        model(prompt(8), past_key_values=cache, store_kv=True)
    with torch.set_grad_enabled(grad):
        return model(prompt(BLOCK, seed=1), past_key_values=cache, store_kv=False, **kwargs).logits


def left_alone(model, reason, **kwargs):
    """The model's own result, to the bit, with the reason counted once per layer."""
    torch.manual_seed(0)
    theirs = steps(model, **kwargs)
    with hf_accel.apply(model, "prefix-split") as applied:
        torch.manual_seed(0)
        ours = steps(model, **kwargs)
    run = run_of(applied)
    assert torch.equal(ours, theirs)
    assert run.calls == 0
    assert run.dense_calls == {reason: LAYERS}
    assert reason in str(applied.report())


def test_gradients():
    left_alone(sdar(), "gradients are needed", grad=True)
    model = sdar()
    with hf_accel.apply(model, "prefix-split"):
        steps(model, grad=True).sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


# peft still asks transformers by an old name
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_gradients_of_an_adapter_alone():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(sdar(), LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    with hf_accel.apply(model, "prefix-split") as applied:
        steps(model, grad=True).sum().backward()
    assert run_of(applied).dense_calls == {"gradients are needed": LAYERS}
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora" in n)


def test_dropout():
    model = sdar(attention_dropout=0.5)
    left_alone(model.train(), "dropout is on")
    with hf_accel.apply(model.eval(), "prefix-split") as applied:
        steps(model)
    assert not run_of(applied).dense_calls


def test_attention_weights():
    left_alone(sdar(), "attention weights are asked for", output_attentions=True)


@pytest.mark.parametrize("kind", ["bias", "positions"])
def test_masks_that_hide_more_than_padding(kind):
    mask = torch.zeros(1, 1, BLOCK, 8 + BLOCK)
    if kind == "bias":
        mask[..., 3] = -1.5
    else:
        mask[0, 0, 1, 3] = torch.finfo(torch.float32).min
    left_alone(sdar(), OTHER_MASK, attention_mask=mask)


def test_forwards_that_are_no_denoising_steps_are_not_counted_as_such():
    model, ids = sdar(), prompt(8)
    with torch.no_grad():
        theirs = model(ids).logits
        with hf_accel.apply(model, "prefix-split") as applied:
            assert torch.equal(model(ids).logits, theirs)
            assert torch.equal(model(ids, use_cache=False).logits, theirs)
    assert run_of(applied).forwards == {"whole": 2}
    assert run_of(applied).calls == 0


def test_an_attention_called_by_itself():
    model = sdar()
    attention = model.model.layers[0].self_attn
    hidden, cache = torch.randn(1, BLOCK, 32), DynamicCache()
    positions = model.model.rotary_emb(hidden, torch.arange(BLOCK)[None])
    with torch.no_grad(), hf_accel.apply(model, "prefix-split") as applied:
        attention(hidden, positions, None, past_key_values=cache)
    assert run_of(applied).dense_calls == {"called outside a forward of the model": 1}


def test_offloaded_keys():
    """A cache whose layers are elsewhere than the model: on the CPU a meta device stands for that."""
    model = sdar()
    cache = DynamicCache()
    with torch.no_grad(), hf_accel.apply(model, "prefix-split") as applied:
        model(prompt(8), past_key_values=cache, store_kv=True)
        for layer in cache.layers:
            layer.keys = layer.keys.to("meta")
        with pytest.raises(RuntimeError):
            model(prompt(BLOCK), past_key_values=cache)
    assert sum(n for why, n in run_of(applied).dense_calls.items() if "another form" in why) == 1


# -- SDAR class: remote code that differs --------------------------------------------------------------------------


class Scaled(modeling.SDARAttention):
    """Something that its structure does not show."""

    def forward(self, hidden_states, *args, **kwargs):
        out, weights = super().forward(hidden_states, *args, **kwargs)
        return (out if kwargs.get("store_kv") else out * 1.1), weights


class OldCode(modeling.SDARAttention):
    """The signature of transformers 4.5x: the cache in the singular, three values returned."""

    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_value=None, **kwargs):
        store = kwargs.pop("store_kv", False)
        out, weights = super().forward(
            hidden_states, position_embeddings, attention_mask, past_key_values=past_key_value, store_kv=store
        )
        return out, weights, past_key_value


class OldLayer(modeling.SDARDecoderLayer):
    def forward(self, hidden_states, past_key_values=None, **kwargs):
        attended, _, present = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), past_key_value=past_key_values, **kwargs
        )
        assert present is past_key_values
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def with_attention(cls, layer=None, only=None, **fields):
    model = sdar(**fields)
    for index, decoder in enumerate(model.model.layers):
        if only is None or index == only:
            decoder.self_attn.__class__ = cls
            if layer is not None:
                decoder.__class__ = layer
    cls.__module__ = modeling.__name__  # where remote code has its rotary embedding
    return model


def test_a_module_that_computes_something_else_is_left_alone():
    left_alone(with_attention(Scaled), OTHER_COMPUTATION)


def test_one_layer_that_computes_something_else():
    model = with_attention(Scaled, only=1)
    run = compared(model, prompt(12))
    assert run.dense_calls == {OTHER_COMPUTATION: 2 * BLOCK}
    assert run.calls == 2 * BLOCK * (LAYERS - 1)


def test_a_difference_that_shows_only_behind_a_prefix():
    class Windowed(modeling.SDARAttention):
        def forward(self, *args, **kwargs):
            cache = kwargs.get("past_key_values")
            out, weights = super().forward(*args, **kwargs)
            return (out if kwargs.get("store_kv") or not cache.get_seq_length() else out * 0.5), weights

    model = with_attention(Windowed)
    run = compared(model, prompt(0), form=None, rest=[3, 4])
    assert run.calls == (BLOCK - 2) * LAYERS
    assert run.dense_calls == {OTHER_COMPUTATION: BLOCK * LAYERS}


def test_a_bias_in_the_projections_is_the_modules_own():
    run = compared(sdar(attention_bias=True), prompt(12))
    assert not run.dense_calls


def test_remote_code_of_former_transformers():
    run = compared(with_attention(OldCode, OldLayer), prompt(12))
    assert not run.dense_calls
    assert run.calls == 2 * BLOCK * LAYERS


def test_remote_code_from_a_folder(tmp_path):
    """As it is loaded from the Hub: a copy of the code beside the weights, in a module of transformers' making."""
    model = sdar()
    model.save_pretrained(tmp_path)
    code = Path(modeling.__file__).read_text().replace("from hf_accel.errors", "from hf_accel.errors")
    code = code[: code.index("AutoConfig.register(")].replace('model_type = "sdar"', 'model_type = "sdar_remote"')
    (tmp_path / "modeling_sdar.py").write_text(code)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "sdar_remote"
    config["auto_map"] = {
        "AutoConfig": "modeling_sdar.SDARConfig",
        "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    remote = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert type(remote) is not type(model)
    assert type(remote).__module__.startswith("transformers_modules")
    run = compared(remote, prompt(12))
    assert not run.dense_calls
    assert close(denoise(remote, prompt(12))[0], denoise(model, prompt(12))[0])


# -- compiled ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shown", [True, False], ids=["after a step", "at once"])
def test_compiled_to_one_graph(shown):
    """A graph takes layers that have shown that they agree; others stay the model's."""
    model, cache, block = sdar(num_hidden_layers=1), DynamicCache(), prompt(BLOCK, seed=1)
    with torch.no_grad():
        model(prompt(8), past_key_values=cache, store_kv=True)
        theirs = model(block, past_key_values=cache).logits
        with hf_accel.apply(model, "prefix-split") as applied:
            if shown:
                model(block, past_key_values=cache)
            torch._dynamo.reset()
            graphs = Graphs()
            ours = torch.compile(model, backend=graphs, fullgraph=True)(block, past_key_values=cache).logits
            assert "under torch.compile" in str(applied.report())
    torch._dynamo.reset()
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-5)
    assert any("page_attention" in name for name in graphs.called) == shown


# -- put on, taken off, copied -------------------------------------------------------------------------------------


def test_revert_and_apply_twice():
    model = sdar()
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    logits, _ = denoise(model, prompt(8))
    first = hf_accel.apply(model, "prefix-split")
    hf_accel.apply(model, "prefix-split")
    assert not first.active
    assert applied_methods(model) == [("model", "prefix-split")]
    hf_accel.revert(model)
    assert before == {name: dict(m.__dict__) for name, m in model.named_modules()}
    assert all(torch.equal(a, b) for a, b in zip(denoise(model, prompt(8))[0], logits, strict=True))


def test_somebody_elses_forward_in_between():
    model = sdar()
    attention = model.model.layers[1].self_attn
    applied = hf_accel.apply(model, "prefix-split")
    ours = attention.forward
    attention.forward = lambda *a, **k: ours(*a, **k)
    with pytest.raises(RevertRefused, match="forward was replaced"):
        applied.revert()
    attention.forward = ours
    applied.revert()


def test_a_copy_has_a_life_of_its_own():
    model = sdar()
    logits, _ = denoise(model, prompt(8))
    applied = hf_accel.apply(model, "prefix-split")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not close(denoise(twin, prompt(8))[0], logits)
    assert run_of(applied).calls == 0
    assert close(denoise(model, prompt(8))[0], logits)
    hf_accel.revert(twin)
    assert not any(SEAT in m.__dict__ for m in twin.modules())
    assert applied.active


def test_a_patched_model_is_let_go():
    model = sdar()
    hf_accel.apply(model, "prefix-split")
    denoise(model, prompt(4), blocks=1)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_an_offloaded_model():
    from accelerate import cpu_offload_with_hook

    model = sdar()
    logits, _ = denoise(model, prompt(8))
    cpu_offload_with_hook(model, execution_device="cpu")
    with hf_accel.apply(model, "prefix-split") as applied:
        assert close(denoise(model, prompt(8))[0], logits)
    assert not run_of(applied).dense_calls


# -- state of methods ----------------------------------------------------------------------------------------------


class Diary:
    """A core that writes down its calls and resets."""

    traceable = False

    def __init__(self):
        self.pages = []

    def attend(self, call):
        self.pages.append((call.generation, call.index, call.layer.index))
        return split_attention(call)

    def reset(self):
        self.pages.append("reset")

    def fork(self):
        return self


class Stateful(PrefixAttentionMethod):
    """A method whose state tells for which calls it was used."""

    name, facts, Config = "stateful", registry.get("losa").facts, PrefixAttentionConfig

    def attend(self, call, state):
        state.append((call.generation, call.index, call.layer.index))
        self.seen.append(list(state))
        return split_attention(call)

    def new_state(self):
        return []


def installed(model, core):
    report = MethodReport("test", {}, "model", "class")
    return block_attention.install(Model("model", model), core, Ledger(), report).now()


def test_a_core_is_reset_at_every_block_and_request():
    model, core = sdar(num_hidden_layers=2), Diary()
    installed(model, core)
    for _ in range(2):
        denoise(model, prompt(8), blocks=2)
    expected = []
    for generation in range(2):
        for _ in range(2):
            expected += ["reset", *((generation, step, layer) for step in range(BLOCK) for layer in range(2))]
    assert core.pages == expected


def test_state_is_of_one_layer_in_one_block():
    model = sdar(num_hidden_layers=2)
    method = Stateful(PrefixAttentionConfig())
    method.seen = []
    installed(model, PrefixRunner(method))
    denoise(model, prompt(8), blocks=2)
    for state in method.seen:
        assert len({layer for *_, layer in state}) == 1
        assert [step for _, step, _ in state] == list(range(len(state)))
    assert max(map(len, method.seen)) == BLOCK


def test_state_is_not_copied_with_the_model():
    """The copy begins a block of its own, though its clock stands where the original's stood when that began."""
    model = sdar(num_hidden_layers=1)
    method = Stateful(PrefixAttentionConfig())
    method.seen = []
    seam = installed(model, PrefixRunner(method))
    cache, block = DynamicCache(), torch.full((1, BLOCK), sdar_models.MASK)
    with torch.no_grad():
        model(prompt(8), past_key_values=cache, store_kv=True)
        model(block, past_key_values=cache)
        twin = copy.deepcopy(model)
        twin(block, past_key_values=copy.deepcopy(cache))
        model(block, past_key_values=cache)
    theirs = twin.model.layers[0].self_attn.__dict__[SEAT].seam
    assert theirs is not seam
    assert theirs.core._states == {0: [(0, 0, 0)]}
    assert seam.core._states == {0: [(0, 0, 0), (0, 1, 0)]}


def test_settings_that_exclude_calls_are_exact_and_counted():
    model = sdar(num_hidden_layers=2)
    method = Stateful(PrefixAttentionConfig(min_prefix=8, dense_layers=1))
    method.seen = []
    run = installed(model, PrefixRunner(method)).run
    denoise(model, prompt(8), blocks=2)
    assert {state[-1][2] for state in method.seen} == {1}
    assert len(method.seen) == BLOCK  # of the second block: the first has 8 tokens in front
    assert run.calls == 2 * 2 * BLOCK


# -- refusals ------------------------------------------------------------------------------------------------------


def test_models_without_a_frozen_prefix_are_refused_in_words():
    for model, words in (
        (llada.LLaDAModelLM(llada.LLaDAConfig()), "no prefix is ever frozen"),
        (llada2.LLaDA2MoeModelLM(llada2.LLaDA2MoeConfig()), "'prefix-cache'"),
        (nn.Linear(2, 2), "module"),
    ):
        with pytest.raises(NotApplicable, match=words):
            hf_accel.apply(model, "prefix-split")


def test_an_attention_implementation_of_others():
    model = gemma.diffusion_gemma()
    model.config.text_config._attn_implementation_internal = "flex_attention"
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(NotApplicable, match=r"set_attn_implementation\('sdpa'\)"):
        hf_accel.apply(model, "prefix-split")


@pytest.mark.parametrize("method", ["dense", "sparge"])
def test_methods_on_causal_attention_do_not_take_these_models(method):
    for model in (sdar(), gemma.diffusion_gemma()):
        before = {name: dict(m.__dict__) for name, m in model.named_modules()}
        with pytest.raises(NotApplicable):
            hf_accel.apply(model, method)
        assert before == {name: dict(m.__dict__) for name, m in model.named_modules()}


# -- masks ---------------------------------------------------------------------------------------------------------


def test_split_mask():
    seen = torch.tensor([[False, True, True, True, True, True], [True] * 6])
    split = split_mask(seen, 4, 2)
    assert split.valid.tolist() == seen[:, :4].tolist()
    assert split.block is None
    assert split_mask(seen.long(), 4, 2).valid.tolist() == seen[:, :4].tolist()
    assert split_mask(torch.ones(2, 6, dtype=torch.bool), 4, 2) == (None, None)
    assert split_mask(None, 4, 2) == (None, None)
    full = torch.ones(1, 1, 2, 6, dtype=torch.bool)
    full[..., 0, 5] = False
    assert split_mask(full, 4, 2).block[0, 0].tolist() == [[True, False], [True, True]]
    assert split_mask(torch.ones(1, 3, 2, 6, dtype=torch.bool), 4, 2) is None  # differs between heads
    assert split_mask(full, 3, 2) is None  # a key that is neither of the prefix nor of the block is seen
    assert split_mask(full, 5, 2) is None  # too short
    assert split_mask(torch.full((1, 6), 2), 4, 2) is None  # packed texts


def test_split_mask_of_a_static_layout():
    """[prefix | block | unused]: what is unused must be hidden."""
    mask = torch.ones(1, 1, 2, 8, dtype=torch.bool)
    assert split_mask(mask, 3, 2, 3) is None
    mask[..., 5:] = False
    assert split_mask(mask, 3, 2, 3) == (None, None)
    assert split_mask(mask, 3, 2, 7) is None


def test_masks_are_read_once_and_again_if_they_change(monkeypatch):
    from hf_accel.sites.prefix_attention import masks

    asked = []
    monkeypatch.setattr(masks, "split_mask", lambda *a: asked.append(a) or split_mask(*a))
    memo, mask = SplitMemo(), torch.ones(1, 6, dtype=torch.bool)
    assert memo.split(mask, 4, 2) == memo.split(mask, 4, 2) == (None, None)
    assert len(asked) == 1
    mask[0, 0] = False
    assert memo.split(mask, 4, 2).valid is not None
    with torch.inference_mode():
        mask = torch.ones(1, 6, dtype=torch.bool)
        memo.split(mask, 4, 2)
        memo.split(mask, 4, 2)
        assert len(asked) == 3
        mask[0, 0] = False
        memo.begin_forward()
        assert memo.split(mask, 4, 2).valid is not None
    assert copy.deepcopy(memo)._known == {}
