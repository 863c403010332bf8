"""The attention seam on real pipelines: steps, branches, generations, two transformers, foreign changes."""

from __future__ import annotations

import gc

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import hf_accel
from hf_accel.attention.call import AttentionCall
from hf_accel.config import Config
from hf_accel.errors import RevertRefused
from hf_accel.facts import Facts
from hf_accel.hosts.clocks.steps import clocks
from hf_accel.hosts.target import Model
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport
from hf_accel.sites.attention import diffusers as attention_host
from hf_accel.sites.attention import interception
from hf_accel.sites.attention.base import AttentionMethod, AttentionRunner
from hf_accel.sites.attention.seam import context_of
from hf_accel.testing.models import tiny


class Recording(AttentionMethod):
    """Notes every call it gets and runs dense."""

    name, paper, summary = "recording", "none", "for tests"
    facts = Facts(site="attention", needs=frozenset({"token grid"}), causal=True, exact=True)
    Config = Config

    def __init__(self):
        super().__init__(Config())
        self.calls: list[AttentionCall] = []

    def attend(self, call, state):
        self.calls.append(call)
        return call.dense()


def put(model, clock=None):
    """Install a recording method on a bare model, below the public API."""
    method, ledger = Recording(), Ledger()
    report = MethodReport("recording", {}, "model", type(model).__name__)
    attention_host.install(Model("model", model), AttentionRunner(method), ledger, report, clock or clocks())
    return method, ledger, report


def wan_pipeline(two: bool = False):
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=tiny.build("wan"), transformer_2=tiny.build("wan", seed=1) if two else None,
        boundary_ratio=0.6 if two else None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, steps=5, guidance=3.0, seed=0, **extra):
    embeds = torch.randn(2, 1, 7, 24, generator=torch.Generator().manual_seed(9))
    return pipe(
        prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], height=64, width=64, num_frames=9,
        num_inference_steps=steps, guidance_scale=guidance, output_type="latent",
        generator=torch.Generator().manual_seed(seed), **extra,
    ).frames  # fmt: skip


def run_of(applied, index=0):
    return applied.report().entries[index].run


@pytest.mark.parametrize(("steps", "guidance", "forwards"), [(5, 3.0, 10), (4, 1.0, 4)])
def test_steps_are_counted_with_and_without_guidance(steps, guidance, forwards):
    pipe = wan_pipeline()
    with hf_accel.apply(pipe, "svg2", dense_steps=0.5, dense_layers=0, kmeans_iter_init=2) as applied:
        call(pipe, steps, guidance)
        run = run_of(applied)
    dense = int(0.5 * steps) * forwards // steps * 2
    assert (run.forwards, run.generations) == (forwards, 1)
    assert run.dense_calls == {"dense step (dense_steps)": dense}
    assert run.sparse_calls == forwards * 2 - dense


def test_other_step_counts_and_a_raising_call_need_no_help():
    pipe = wan_pipeline()

    def stop(pipe, index, timestep, kwargs):
        if index == 1:
            raise KeyError("stopped by the user")
        return {}

    with hf_accel.apply(pipe, "svg2", dense_steps=0, dense_layers=0, kmeans_iter_init=2) as applied:
        first = call(pipe, 3)
        with pytest.raises(KeyError):
            call(pipe, 6, callback_on_step_end=stop)
        again = call(pipe, 3)
        assert run_of(applied).generations == 3
    assert torch.equal(first, again)


def test_dense_layers_stay_dense_on_every_step():
    pipe = wan_pipeline()
    with hf_accel.apply(pipe, "svg2", dense_steps=0, dense_layers=1, kmeans_iter_init=2) as applied:
        call(pipe, 3)
        assert run_of(applied).dense_calls == {"dense layer (dense_layers)": 6}
        assert {entry.layer for entry in run_of(applied).densities} == {1}


def test_two_transformers_share_the_step_count_and_keep_their_own_state():
    pipe = wan_pipeline(two=True)
    dense = call(pipe, 6)
    with hf_accel.apply(pipe, "svg2", dense_steps=0.5, dense_layers=0, kmeans_iter_init=2) as applied:
        call(pipe, 6)
        high, low = run_of(applied, 0), run_of(applied, 1)
        # With boundary_ratio 0.6 the experts change in the middle; a clock per expert would see two warm-ups.
        assert high.forwards + low.forwards == 12
        assert high.forwards
        assert low.forwards
        warm = high.dense_calls["dense step (dense_steps)"] + low.dense_calls["dense step (dense_steps)"]
        assert warm == 3 * 2 * 2
        assert {e.model for e in applied.report()} == {"transformer", "transformer_2"}
    assert torch.equal(call(pipe, 6), dense)


def test_full_budget_on_the_pipeline():
    pipe = wan_pipeline()
    dense = call(pipe)
    with hf_accel.apply(pipe, "svg2", top_p=1.0, dense_steps=0, dense_layers=0, kmeans_iter_init=2):
        assert torch.allclose(call(pipe), dense, atol=1e-5)
    assert torch.equal(call(pipe), dense)


def test_step_cache_of_diffusers_works_in_both_orders():
    from diffusers import FirstBlockCacheConfig

    for first in ("cache", "method"):
        pipe = wan_pipeline()
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.05))
        dense = call(pipe)
        pipe.transformer.disable_cache()
        if first == "cache":
            pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.05))
        applied = hf_accel.apply(pipe, "dense")
        if first == "method":
            pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.05))
        assert torch.equal(call(pipe), dense)
        assert run_of(applied).generations == 1
        applied.revert()


def test_layers_are_told_apart_when_one_is_skipped():
    model = tiny.build("wan", layers=4)
    method, ledger, _ = put(model)
    model.blocks[1].attn1.forward = lambda hidden, *args, **kwargs: torch.zeros_like(hidden)
    with torch.no_grad(), pytest.warns(UserWarning, match="1 of 4 patched attentions .* its forward was replaced"):
        tiny.run(model, "wan")
    assert [c.layer.index for c in method.calls] == [0, 2, 3]
    ledger.undo()


def test_the_call_says_where_it_is():
    model = tiny.build("cogvideox")
    method, ledger, _ = put(model)
    with torch.no_grad():
        tiny.run(model, "cogvideox", size=(3, 8, 6), timestep=321.0)
    first = method.calls[0]
    assert (first.grid.frames, first.grid.height, first.grid.width, first.grid.text) == (3, 4, 3, "first")
    assert first.grid.video_span(first.query.shape[2]) == (6, 42)
    assert (first.layer.name, first.layer.index, first.layer.count) == ("transformer_blocks.0.attn1", 0, 2)
    assert (first.step.index, first.step.timestep, first.step.branch) == (0, 321.0, "call0")
    assert first.query.shape == (1, 2, 42, 16)
    assert first.scale == 16**-0.5
    ledger.undo()


def test_mochi_items_have_their_own_state():
    model = tiny.build("mochi")
    method, ledger, _ = put(model)
    with torch.no_grad():
        tiny.run(model, "mochi", batch=2)
    assert [(c.layer.index, c.item) for c in method.calls] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert method.calls[0].query.shape[2] != method.calls[1].query.shape[2]  # text of different length
    ledger.undo()


def test_a_grid_that_disagrees_runs_dense_and_is_counted():
    model = tiny.build("flux")
    with torch.no_grad():
        inputs = tiny.TINY["flux"].inputs(model)
        # Kontext and control pipelines append the tokens of a second image with ids of their own.
        inputs["hidden_states"] = torch.cat([inputs["hidden_states"]] * 2, dim=1)
        inputs["img_ids"] = torch.cat([inputs["img_ids"], inputs["img_ids"] + torch.tensor([1.0, 0, 0])])
        dense = model(**inputs, return_dict=False)[0]
        with hf_accel.apply(model, "svg2", dense_steps=0, dense_layers=0) as applied:
            ours = model(**inputs, return_dict=False)[0]
            run = run_of(applied)
    assert torch.equal(ours, dense)
    assert run.dense_calls == {"the token grid of this forward is unknown": 3}
    assert "3 x the token grid of this forward is unknown" in str(applied.report())


def test_a_mask_that_differs_between_queries_runs_dense_and_is_counted():
    model = tiny.build("skyreels-v2")
    model._set_ar_attention(2)  # diffusion forcing: causal over blocks of two frames
    inputs = tiny.TINY["skyreels-v2"].inputs(model, size=(4, 8, 8)) | {"enable_diffusion_forcing": True}
    inputs |= {"timestep": torch.full((1, 4), 500.0), "fps": torch.tensor([0])}
    with torch.no_grad():
        dense = model(**inputs, return_dict=False)[0]
        with hf_accel.apply(model, "svg2", dense_steps=0, dense_layers=0, kmeans_iter_init=2) as applied:
            ours = model(**inputs, return_dict=False)[0]
            run = run_of(applied)
    assert torch.equal(ours, dense)
    assert [reason for reason in run.dense_calls if "differs between queries" in reason]
    assert not run.sparse_calls


def test_dropout_in_attention_runs_dense_and_is_counted():
    model = tiny.build("cogvideox")
    with torch.no_grad(), hf_accel.apply(model, "svg2", dense_steps=0, dense_layers=0, kmeans_iter_init=2) as applied:
        tiny.run(model, "cogvideox")
        sparse = run_of(applied).sparse_calls
        context = context_of(model)
        context.begin(torch.zeros(1, 3, 4, 8, 8), 500.0, (3, 4, 4), None)
        context.enter_layer(0)
        q = torch.randn(1, 2, 54, 16)
        interception._attention(q, q, q, dropout_p=0.5)
        context.end(raised=False)
        assert run_of(applied).dense_calls == {"dropout is on": 1}
        assert run_of(applied).sparse_calls == sparse


def test_users_backend_choice_is_the_dense_path_and_comes_back():
    model = tiny.build("wan")
    model.set_attention_backend("_native_math")
    chosen = model.blocks[0].attn1.processor._attention_backend
    with torch.no_grad():
        dense = tiny.run(model, "wan")
        with hf_accel.apply(model, "dense"):
            assert torch.equal(tiny.run(model, "wan"), dense)
    assert model.blocks[0].attn1.processor._attention_backend is chosen
    model.reset_attention_backend()


def test_backend_set_after_apply_is_noticed_and_not_overwritten_by_revert():
    from diffusers.models.attention_dispatch import AttentionBackendName

    model = tiny.build("wan")
    applied = hf_accel.apply(model, "dense")
    for _, module in model.named_modules():
        if getattr(module, "processor", None) is not None:
            module.processor._attention_backend = AttentionBackendName.NATIVE
    words = "2 of 2 patched attentions ran without the method: set_attention_backend"
    with torch.no_grad(), pytest.warns(UserWarning, match=words):
        tiny.run(model, "wan")
    with pytest.raises(RevertRefused, match="_attention_backend was replaced"):
        applied.revert()
    assert applied.active


def test_shared_processor_is_cloned_so_that_cross_attention_stays_dense():
    model = tiny.build("wan")
    single = model.blocks[0].attn1.processor
    model.set_attn_processor(single)
    with torch.no_grad():
        dense = tiny.run(model, "wan")
        with hf_accel.apply(model, "dense") as applied:
            assert torch.equal(tiny.run(model, "wan"), dense)
            assert run_of(applied).sparse_calls == 2
    assert all(m.processor is single for m in model.modules() if hasattr(m, "processor"))


def test_nothing_is_left_in_diffusers_registries():
    import gc

    from diffusers.hooks._helpers import AttentionProcessorRegistry
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    tables = (
        _AttentionBackendRegistry._backends,
        _AttentionBackendRegistry._constraints,
        _AttentionBackendRegistry._supported_arg_names,
    )
    gc.collect()  # models of other tests that were dropped patched
    models = [tiny.build("wan"), tiny.build("cogvideox"), tiny.build("wan", seed=3)]
    AttentionProcessorRegistry._register()
    before = [set(table) for table in tables], set(AttentionProcessorRegistry._registry)
    handles = [hf_accel.apply(model, "dense") for model in models]
    assert set(tables[0]) != before[0][0]
    del models[2], handles[2]  # a patched model that is dropped lets go, too
    gc.collect()
    for handle in handles:
        handle.revert()
    assert ([set(table) for table in tables], set(AttentionProcessorRegistry._registry)) == before


@pytest.mark.parametrize("whole", [True, False], ids=["whole model", "repeated blocks"])
def test_twelve_layers_compile_once(whole):
    torch._dynamo.reset()
    model = tiny.build("wan", layers=12)
    with torch.no_grad():
        dense = [tiny.run(model, "wan", timestep=t) for t in (900.0, 500.0)]
        applied = hf_accel.apply(model, "svg2", top_p=1.0, dense_steps=0, dense_layers=0, kmeans_iter_init=2)
        counter = CompileCounter()
        if whole:
            model.compile(backend=counter, fullgraph=True)
        else:
            model.compile_repeated_blocks(backend=counter, fullgraph=True)
        ours = [tiny.run(model, "wan", timestep=t) for t in (900.0, 500.0)]
    assert counter.frame_count == (2 if whole else 1)  # whole: the model, and the hook in front of it
    assert run_of(applied).sparse_calls == 24
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, dense, strict=True))
    torch._dynamo.reset()


def test_importing_changes_nothing_elsewhere():
    import subprocess
    import sys

    code = (
        "import sys; before = set(sys.modules); import hf_accel; hf_accel.apply; "
        "loaded = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "assert not loaded & {'diffusers', 'transformers', 'peft', 'triton'}, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_compiled_model_at_another_resolution(family):
    torch._dynamo.reset()
    model = tiny.build(family)
    sizes = ((3, 8, 8), (3, 6, 8), (2, 10, 8))
    with torch.no_grad():
        dense = [tiny.run(model, family, size=size) for size in sizes]
        full = {"top_p": 1.0, "dense_steps": 0, "dense_layers": 0, "kmeans_iter_init": 2, "num_q_centroids": 4}
        with hf_accel.apply(model, "svg2", **full) as applied:
            compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
            ours = [tiny.run(compiled, family, size=size) for size in sizes]
            run = run_of(applied)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, dense, strict=True))
    assert run.generations == 3
    assert run.sparse_calls == 6
    assert not run.dense_calls
    torch._dynamo.reset()


def test_gradients_through_a_compiled_patched_model_are_dense_and_right():
    torch._dynamo.reset()
    model = tiny.build("wan")

    def gradients(module):
        model.zero_grad()
        tiny.run(module, "wan").square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    dense = gradients(model)
    with hf_accel.apply(model, "svg2", dense_steps=0, dense_layers=0) as applied:
        ours = gradients(torch.compile(model, backend="aot_eager", fullgraph=True))
        assert run_of(applied).dense_calls == {"gradients are needed and the method has no backward": 2}
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, dense, strict=True))
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["wan", "cogvideox", "unet"])
def test_gradients_through_a_compiled_model_reach_a_method_that_has_a_backward(family):
    torch._dynamo.reset()
    gc.collect()  # patched models of other tests let go of diffusers' registry now, not while this one is compiled
    model = tiny.build(family)

    def gradients(module):
        model.zero_grad()
        tiny.run(module, family).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    dense = gradients(model)
    with hf_accel.apply(model, "dense") as applied:
        ours = gradients(torch.compile(model, backend="aot_eager"))
        run = run_of(applied)
    assert run.sparse_calls == tiny.TINY[family].layers
    assert not run.dense_calls
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, dense, strict=True))
    torch._dynamo.reset()


@pytest.mark.parametrize("when", ["before", "after"])
def test_offloaded_modules(when):
    from accelerate import cpu_offload

    model = tiny.build("wan")
    with torch.no_grad():
        dense = tiny.run(model, "wan")
        if when == "before":
            cpu_offload(model, execution_device=torch.device("cpu"))
        full = {"top_p": 1.0, "dense_steps": 0, "dense_layers": 0, "kmeans_iter_init": 2, "num_q_centroids": 4}
        with hf_accel.apply(model, "svg2", **full) as applied:
            if when == "after":
                cpu_offload(model, execution_device=torch.device("cpu"))
            assert torch.allclose(tiny.run(model, "wan"), dense, atol=1e-5)
            assert run_of(applied).sparse_calls == 2
        assert torch.equal(tiny.run(model, "wan"), dense)
