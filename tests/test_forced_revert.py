"""Somebody rebuilt what we had patched: what is refused, in which words, and what ``revert(force=True)`` leaves."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.models.attention_processor import AttnProcessor2_0

import hf_accel
from hf_accel.errors import Conflict, RevertRefused
from hf_accel.ledger import MARK, Ledger, in_few_words
from hf_accel.testing.models import tiny
from hf_accel.testing.models.sdar import denoise, prompt, sdar

COMMAND = "hf_accel.revert(model, force=True)"


@torch.no_grad()
def output(model, name="unet"):
    return tiny.run(model, name)


def clones(model):
    """Other processors of the classes that stand there, which is what the code of IP-adapters puts in place."""
    return {name: type(processor)() for name, processor in model.attn_processors.items()}


def said(error):
    words = str(error.value)
    assert len(words) <= 400, words
    assert words.endswith(COMMAND)
    return words


def forced(target):
    """Revert by force; what was left. The warning says it once and in few words."""
    with pytest.warns(UserWarning, match="left as") as caught:
        left = target.revert(force=True) if hasattr(target, "revert") else hf_accel.revert(target, force=True)
    (warning,) = [w for w in caught if "hf_accel:" in str(w.message)]
    assert len(str(warning.message)) <= 400
    assert warning.filename == __file__
    return left


# -- the ledger ----------------------------------------------------------------------------------------------------


class Thing:
    pass


def test_force_leaves_theirs_and_undoes_the_rest():
    things, ledger = [Thing() for _ in range(3)], Ledger()
    for thing in things:
        thing.kind = "before"
        ledger.set(thing, "kind", "ours")
    things[1].kind = "theirs"
    with pytest.raises(RevertRefused, match=r"Thing\.kind was replaced by a str") as refused:
        ledger.undo()
    said(refused)
    ledger.undo(force=True)
    assert [thing.kind for thing in things] == ["before", "theirs", "before"]
    assert not len(ledger)


@pytest.mark.parametrize("before", ["text", None, object(), 3.5])
def test_what_is_again_as_it_was_needs_no_undo(before):
    thing, ledger = Thing(), Ledger()
    thing.kind = before
    ledger.set(thing, "kind", object())
    ledger.set(thing, "new", 1)
    thing.kind = "".join(["te", "xt"]) if before == "text" else before  # an equal text is no other object's
    del thing.new
    ledger.undo()
    assert vars(thing) == {"kind": before}


def test_what_was_removed_is_not_brought_back_by_force():
    thing, ledger = Thing(), Ledger()
    thing.kind = "before"
    ledger.set(thing, "kind", "ours")
    del thing.kind
    with pytest.raises(RevertRefused, match="was removed"):
        ledger.undo()
    ledger.undo(force=True)
    assert not vars(thing)


def test_causes_are_counted_and_cut():
    assert in_few_words(["a", "b", "b"], 50) == "b (2 x); a"
    assert in_few_words([f"cause {i}" for i in range(300)], 20) == "cause 0; cause 1; and 298 more"
    assert in_few_words(["x" * 900], 20) == "x" * 117 + "..."


# -- attention processors ------------------------------------------------------------------------------------------


def stuck():
    """A U-Net under sparge after an IP-adapter came and went."""
    model = tiny.build("unet")
    before = dict(model.attn_processors)
    applied = hf_accel.apply(model, "sparge", topk=0.5)
    model.set_attn_processor(clones(model))
    model.set_attn_processor(AttnProcessor2_0())
    return model, applied, before


def test_the_refusal_names_the_cause_once_and_the_command():
    model, applied, _ = stuck()
    for way in (applied.revert, lambda: hf_accel.revert(model), lambda: hf_accel.apply(model, "sparge", topk=0.2)):
        with pytest.raises(RevertRefused) as refused:
            way()
        assert said(refused).count("Attention.processor was replaced by a AttnProcessor2_0") == 1
        assert "sparge on model" in said(refused)
    with pytest.raises(Conflict, match="sparge is on model already") as conflict:
        hf_accel.apply(model, "grat")
    assert str(conflict.value).endswith(f"{COMMAND}.")
    assert len(str(conflict.value)) <= 400
    assert applied.active


def test_after_force_the_model_is_free():
    dense = output(tiny.build("unet"))
    with hf_accel.apply(tiny.build("unet"), "sparge", topk=0.2) as fresh:
        sparse = output(fresh._installed[0][0].module)
    model, applied, _ = stuck()
    standing = dict(model.attn_processors)
    left = forced(applied)
    assert set(left) == {"Attention.processor was replaced by a AttnProcessor2_0"}
    assert not applied.active
    assert MARK not in vars(model)
    assert all(model.attn_processors[name] is processor for name, processor in standing.items())
    assert torch.equal(output(model), dense)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    with hf_accel.apply(model, "sparge", topk=0.2):
        assert torch.equal(output(model), sparse)
    with hf_accel.apply(model, "grat"):
        output(model)
    assert torch.equal(output(model), dense)
    assert applied.revert(force=True) == hf_accel.revert(model, force=True) == ()


def test_the_first_processors_set_back_need_no_force():
    model, applied, before = stuck()
    dense = output(tiny.build("unet"))
    model.set_attn_processor(dict(before))
    assert applied.revert() == ()
    assert model.attn_processors == before
    assert torch.equal(output(model), dense)


def test_others_objects_of_our_class_compute_what_their_class_computes():
    dense = output(tiny.build("unet"))
    with hf_accel.apply(tiny.build("unet"), "sparge", topk=0.2) as fresh:
        sparse = output(fresh._installed[0][0].module)
        calls = fresh.report().entries[0].run.sparse_calls
    model = tiny.build("unet")
    applied = hf_accel.apply(model, "sparge", topk=0.5)
    kept = dict(model.attn_processors)
    ours = next(type(p) for p in kept.values() if type(p) is not AttnProcessor2_0)
    model.set_attn_processor({name: ours() for name in kept})  # also where nothing of ours had been
    theirs = dict(model.attn_processors)
    with pytest.raises(RevertRefused):
        applied.revert()
    forced(applied)
    assert model.attn_processors == theirs
    assert {type(p) for p in (*theirs.values(), *kept.values())} == {AttnProcessor2_0}
    assert torch.equal(output(model), dense)
    with hf_accel.apply(model, "sparge", topk=0.2) as again:
        assert torch.equal(output(model), sparse)
        assert again.report().entries[0].run.sparse_calls == calls
    model.set_attn_processor(kept)  # whoever had kept ours can put them back
    assert torch.equal(output(model), dense)


@pytest.mark.parametrize("name", ["unet", "wan"])
def test_copies_of_our_processors_are_no_longer_ours_after_revert(name):
    model, dense = tiny.build(name), output(tiny.build(name), name)
    applied = hf_accel.apply(model, "sparge", topk=0.5)
    copies = {place: copy.copy(processor) for place, processor in model.attn_processors.items()}
    model.set_attn_processor(dict(copies))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        applied.revert(force=True)
    assert model.attn_processors == copies
    assert torch.equal(output(model, name), dense)


def test_projections_fused_and_unfused_around_a_forced_revert():
    model, dense = tiny.build("unet"), output(tiny.build("unet"))
    applied = hf_accel.apply(model, "sparge", topk=0.5)
    model.fuse_qkv_projections()
    fused = {type(p).__name__ for p in model.attn_processors.values()}
    with pytest.raises(RevertRefused, match=r"FusedAttnProcessor2_0"):
        applied.revert()
    forced(model)
    assert {type(p).__name__ for p in model.attn_processors.values()} == fused
    assert torch.allclose(output(model), dense, atol=1e-5)
    model.unfuse_qkv_projections()  # brings back what stood there when it was fused: processors that were ours
    assert torch.equal(output(model), dense)
    with hf_accel.apply(model, "dense") as applied:
        assert torch.allclose(output(model), dense, atol=1e-6)
        assert not applied.report().entries[0].run.dense_calls


@pytest.fixture
def own_backend(monkeypatch):
    """``set_attention_backend`` also sets the backend of the whole process, and nothing sets it back."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)


def test_a_backend_that_was_set_later_is_left_and_one_set_back_is_none(own_backend):
    model, dense = tiny.build("wan"), output(tiny.build("wan"), "wan")
    applied = hf_accel.apply(model, "svg2")
    model.set_attention_backend("_native_math")
    with pytest.raises(RevertRefused, match=r"WanAttnProcessor\._attention_backend was replaced") as refused:
        applied.revert()
    said(refused)
    chosen = model.blocks[0].attn1.processor._attention_backend
    assert len(forced(applied)) == 2
    assert model.blocks[0].attn1.processor._attention_backend is chosen
    assert torch.allclose(output(model, "wan"), dense, atol=1e-5)
    hf_accel.apply(model, "svg2")
    for block in model.blocks:
        block.attn1.processor._attention_backend = chosen  # what it had been before
    hf_accel.revert(model)
    assert torch.allclose(output(model, "wan"), dense, atol=1e-5)


# -- modules that are not in the model any more --------------------------------------------------------------------


def test_a_layer_that_was_exchanged_neither_fails_nor_blocks():
    model = tiny.build("wan")
    other = copy.deepcopy(model.blocks[0])
    first = hf_accel.apply(model, "svg2")
    second = hf_accel.apply(model, "gptq", bits=8, group_size=8, rounding="nearest")
    gone, model.blocks[0] = model.blocks[0], other
    gone.attn1.to_q = torch.nn.Identity()  # what somebody does to it now concerns nobody
    dense = output(tiny.build("wan"), "wan")
    first.revert()
    second.revert()
    assert MARK not in vars(model)
    assert torch.equal(output(model, "wan"), dense)


# -- forwards ------------------------------------------------------------------------------------------------------


def prepared(module):
    """What ``accelerate``'s ``prepare`` does for mixed precision: a forward around the function that it finds."""
    original = module.forward

    @functools.wraps(original)
    def forward(*args, **kwargs):
        forward.calls += 1
        return original(*args, **kwargs)

    forward.calls = 0
    module.forward = forward
    return forward


def test_a_wrapper_around_our_forward_stays_and_finds_the_classes():
    model, dense = tiny.build("unet"), output(tiny.build("unet"))
    applied = hf_accel.apply(model, "deepcache")
    theirs = prepared(model)
    with pytest.raises(RevertRefused, match=r"UNet2DConditionModel\.forward was replaced by a function") as refused:
        applied.revert()
    said(refused)
    assert forced(applied) == ("UNet2DConditionModel.forward was replaced by a function",)
    for _ in range(3):
        assert torch.equal(output(model), dense)
    assert theirs.calls == 3
    with hf_accel.apply(model, "sparge", topk=0.5):
        output(model)
    del model.forward  # they take it off again
    with hf_accel.apply(model, "deepcache"):
        output(model)
    assert torch.equal(output(model), dense)


def test_a_forward_that_is_the_classes_again_needs_no_undo():
    model, dense = tiny.build("unet"), output(tiny.build("unet"))
    applied = hf_accel.apply(model, "deepcache")
    add_hook_to_module(model, ModelHook())
    remove_hook_from_module(model)
    model.forward = functools.partial(type(model).forward, model)
    with pytest.raises(RevertRefused, match="replaced by a partial"):
        applied.revert()
    del model.forward
    applied.revert()
    assert "_hf_accel_forwards" not in vars(model)
    assert torch.equal(output(model), dense)


def test_wrappers_around_the_attentions_of_a_block_model():
    model = sdar()
    logits, tokens = denoise(model, prompt(12))
    applied = hf_accel.apply(model, "prefix-split")
    wrappers = [prepared(layer.self_attn) for layer in model.model.layers]
    with pytest.raises(RevertRefused, match=rf"\({len(wrappers)} x\)"):
        applied.revert()
    forced(model)
    ours, our_tokens = denoise(model, prompt(12))
    assert all(torch.equal(a, b) for a, b in zip(ours, logits, strict=True))
    assert torch.equal(our_tokens, tokens)
    assert all(wrapper.calls for wrapper in wrappers)
    hf_accel.apply(model, "prefix-split").revert()


def test_a_compiled_model_is_reverted_without_force():
    model, dense = tiny.build("wan"), output(tiny.build("wan"), "wan")
    applied = hf_accel.apply(model, "svg2")
    model.compile(backend="eager")
    assert applied.revert() == ()
    model._compiled_call_impl = None
    assert torch.equal(output(model, "wan"), dense)


# -- language models -----------------------------------------------------------------------------------------------


def test_another_attention_of_a_language_model_is_in_nobodys_way():
    """Methods read a view of the configuration, which is not ours to undo."""
    model = tiny.build("llama")
    dense = output(model, "llama")
    applied = hf_accel.apply(model, "sparge", topk=0.5)
    model.set_attn_implementation("eager")
    assert applied.revert() == ()
    assert model.config._attn_implementation == "eager"
    assert torch.allclose(output(model, "llama"), dense, atol=1e-5)


def test_another_configuration_of_a_layer():
    """Ours is a view; whoever kept it has a plain configuration afterwards."""
    model = tiny.build("llama")
    dense = output(model, "llama")
    applied = hf_accel.apply(model, "sparge", topk=0.5)
    attention = model.model.layers[0].self_attn
    kept = attention.config
    attention.config = copy.deepcopy(model.config)
    with pytest.raises(RevertRefused) as refused:
        applied.revert()
    said(refused)
    forced(applied)
    assert kept._attn_implementation == "sdpa"
    assert torch.allclose(output(model, "llama"), dense, atol=1e-5)
    attention.config = kept
    assert torch.equal(output(model, "llama"), dense)
    hf_accel.apply(model, "sparge", topk=0.5).revert()


# -- what force does not pass over ---------------------------------------------------------------------------------


def test_weights_that_were_dropped_are_refused_also_by_force():
    model = tiny.build("wan")
    applied = hf_accel.apply(model, "gptq", bits=8, group_size=8, rounding="nearest", original="drop")
    for revert in (applied.revert, functools.partial(hf_accel.revert, model)):
        with pytest.raises(RevertRefused, match=r"dropped.*load the model again") as refused:
            revert(force=True)
        assert len(str(refused.value)) <= 400
    assert applied.active


def test_a_method_of_ours_on_top_is_taken_off_first():
    model = tiny.build("wan")
    below = hf_accel.apply(model, "gptq", bits=8, group_size=8, rounding="nearest")
    above = Ledger()
    packed = model.blocks[0].attn1.to_q
    above.set(model.blocks[0].attn1, "to_q", torch.nn.Identity())
    marks = vars(model)[MARK]
    on_top = copy.copy(marks[0])
    on_top.ledger = above
    marks.append(on_top)
    for force in (False, True):
        with pytest.raises(RevertRefused, match=r"was applied on top of it.*hf_accel\.revert\(model\)$") as refused:
            below.revert(force=force)
        assert len(str(refused.value)) <= 400
    assert model.blocks[0].attn1.to_q is not packed
    hf_accel.revert(model)
    assert MARK not in vars(model)


# -- many ----------------------------------------------------------------------------------------------------------


class Pipeline:
    def __init__(self, **components):
        self.components = components


def test_messages_stay_short_on_many_layers_methods_and_models(own_backend):
    pipe = Pipeline(transformer=tiny.build("wan", num_layers=60), transformer_2=tiny.build("wan", num_layers=60))
    hf_accel.apply(pipe, "svg2")
    applied = hf_accel.apply(pipe, "gptq", bits=8, group_size=8, rounding="nearest")
    for model in pipe.components.values():
        model.set_attention_backend("_native_math")
        for place, block in enumerate(model.blocks):
            block.attn1.to_q = type(f"Rebuilt{'Somewhat' * 20}{place}", (torch.nn.Identity,), {})()
            block.attn2.to_k = torch.nn.Identity()
    ways = [
        applied.revert,
        functools.partial(hf_accel.revert, pipe),
        functools.partial(hf_accel.apply, pipe, "svg2"),
        functools.partial(hf_accel.apply, pipe, "gptq", bits=4, group_size=8, rounding="nearest"),
    ]
    for way in ways:
        with pytest.raises(RevertRefused) as refused:
            way()
        said(refused)
    with pytest.raises(Conflict) as conflict:
        hf_accel.apply(pipe, "sparge")
    assert len(str(conflict.value)) <= 400
    assert COMMAND in str(conflict.value)
    left = forced(pipe)
    assert len(left) == 2 * (60 + 60 + 60)
    assert not any(MARK in vars(model) for model in pipe.components.values())


def test_without_anything_left_there_is_no_warning():
    model = tiny.build("wan")
    hf_accel.apply(model, "svg2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hf_accel.revert(model, force=True) == ()
