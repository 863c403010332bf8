"""What goes together, proved: all pairs of methods, and methods with what other libraries put on a model."""

from __future__ import annotations

import contextlib
import functools
import itertools
import types
from collections import Counter

import pytest
import torch

import hf_accel
from hf_accel import registry
from hf_accel.composition import apart, conflict, takes
from hf_accel.errors import Conflict
from hf_accel.hosts.foreign import FOREIGN, reader_of_places, standing
from hf_accel.hosts.networks import host_of
from hf_accel.hosts.target import Model
from hf_accel.sites.attention.base import AttentionMethod
from hf_accel.sites.attention.seam import active_context
from hf_accel.testing import FAMILIES as KIT
from hf_accel.testing.claims import claims as claimed_by_facts
from hf_accel.testing.compare import close, equal, fingerprint
from hf_accel.testing.kit import TINY_SETTINGS as QUICK
from hf_accel.testing.models import tiny

# Methods that change weights are put beside the others in test_linear, adapters, which stand on those, in
# test_qwha_start.
# Recipes stand on a training, and a surgery gives back another model.
METHODS = {
    name: cls
    for name, cls in registry.methods().items()
    if cls.facts.kind == "patch" and cls.facts.site not in ("linear", "adapter")
}
# Methods for block-diffusion models run in other loops: pairs of two such are walked in test_block_diffusion.
BLOCKWISE = [name for name, cls in METHODS.items() if cls.facts.hosts == {"block diffusion"}]
PAIRS = [pair for pair in itertools.combinations(sorted(METHODS), 2) if not set(pair) <= set(BLOCKWISE)]
FAMILIES = [name for name in tiny.TINY if name != "cosmos"]  # which needs torchvision, and is one more video model
FOREIGN_BY_NAME = {entry.name: entry for entry in FOREIGN}
TIMESTEPS = (900.0, 800.0, 600.0, 500.0, 400.0, 300.0)


def full_budget(method: str) -> dict:
    return QUICK.get(method, {}) | METHODS[method].facts.full_budget


def claims(method: str, model: torch.nn.Module) -> bool:
    return METHODS[method].why_not(Model("model", model)) is None


@pytest.fixture(scope="module")
def claimed() -> dict[str, list[str]]:
    """Method -> families that it takes; test_promises holds what facts say of that to what methods do."""
    return {method: [f for f in FAMILIES if claimed_by_facts(cls.facts, KIT[f])] for method, cls in METHODS.items()}


@torch.no_grad()
def generate(model, family, seed=0, batch=1, timesteps=TIMESTEPS):
    """The outputs of one generation, as a pipeline would run it; other latents at every step."""
    out = []
    for index, timestep in enumerate(timesteps):
        NOW[0] = timestep
        said = {"step_index": index, "sigma": timestep / 1000, "num_inference_steps": len(timesteps)}
        told = hasattr(model, "cache_context")
        with model.cache_context("cond", **said) if told else contextlib.nullcontext():
            out.append(tiny.run(model, family, timestep=timestep, seed=50 * seed + index, batch=batch))
    end_of_call(model)
    return out


def end_of_call(model):
    if hasattr(model, "_reset_stateful_cache"):
        model._reset_stateful_cache()


# -- methods with methods ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(METHODS.keys() - set(BLOCKWISE)))
def test_methods_take_the_networks_that_they_declare(method, claimed):
    cls = METHODS[method]
    models = {family: tiny.build(family) for family in FAMILIES}
    assert claimed[method] == [family for family, model in models.items() if takes(cls, model)]
    assert {host_of(models[f]) for f in claimed[method]} == {host for host, _ in cls.facts.places}


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_pairs_of_methods(pair, claimed):
    """Symmetric; what is allowed works in both orders and leaves no trace, what is refused changes nothing."""
    a, b = (METHODS[name] for name in pair)
    assert conflict(a, b) == conflict(b, a)
    assert apart(a, b) == apart(b, a)
    shared = [family for family in FAMILIES if family in claimed[a.name] and family in claimed[b.name]]
    if apart(a, b) is not None:
        assert conflict(a, b) is None
        assert not shared
        return
    assert shared, "declared to meet, and no tiny model takes both"
    for family in {shared[0], *(f for f in shared if f == "unet")}:
        (check_refused if conflict(a, b) else check_allowed)(pair, family)


def check_refused(pair, family):
    model = tiny.build(family)
    before = fingerprint(model)
    for first, second in (pair, pair[::-1]):
        with pytest.raises(Conflict, match=rf"(?=.*\b{first}\b)(?=.*\b{second}\b)"):
            hf_accel.apply(model, [first, second])
        assert fingerprint(model) == before
        with hf_accel.apply(model, first, **QUICK.get(first, {})):
            standing_alone = fingerprint(model)
            with pytest.raises(Conflict, match=rf"{first} is on model already"):
                hf_accel.apply(model, second)
            assert fingerprint(model) == standing_alone
        assert fingerprint(model) == before


def check_allowed(pair, family):
    model = tiny.build(family)
    run = functools.partial(generate, model, family, timesteps=TIMESTEPS[:4])
    before, plain = fingerprint(model), run()
    for first, second in (pair, pair[::-1]):
        with hf_accel.apply(model, first, **QUICK.get(first, {})):
            alone = run()
        # At full budget one of the two changes nothing, whatever the other does.
        settings = {first: QUICK.get(first, {}), second: full_budget(second)}
        for order in ((first, second), (second, first)):
            for leave in (0, 1):
                applied = [hf_accel.apply(model, name, **settings[name]) for name in order]
                assert close(run(), alone)
                assert [e.run.generations for a in applied for e in a.report()] == [1, 1]
                applied[leave].revert()
                remaining = order[1 - leave]
                assert close(run(), alone if remaining == first else plain)
                applied[1 - leave].revert()
                assert fingerprint(model) == before
        with hf_accel.apply(model, settings):
            assert close(run(), alone)
        assert fingerprint(model) == before
    assert equal(run(), plain)


def test_three_parties_stand_and_leave_in_any_order():
    """A method at each of two sites and an adapter on the layers of both."""
    from peft import LoraConfig

    model = tiny.build("unet")
    first, second = next(
        pair for pair in PAIRS if all(claims(n, model) for n in pair) and not conflict(*(METHODS[n] for n in pair))
    )
    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "conv1"], init_lora_weights=False)

    def lora():
        torch.manual_seed(0)
        model.add_adapter(config, "extra")
        return types.SimpleNamespace(revert=lambda: model.delete_adapters("extra"))

    steps = {
        "lora": lora,
        **{n: lambda n=n: hf_accel.apply(model, n, **full_budget(n)) for n in (first, second)},
    }
    run = functools.partial(generate, model, "unet", timesteps=TIMESTEPS[:2])
    plain = run()
    added = lora()
    adapted = run()
    added.revert()
    assert not close(adapted, plain)
    for order in itertools.permutations(steps):
        stands = {name: steps[name]() for name in order}
        assert close(run(), adapted)
        stands.pop("lora").revert()
        assert close(run(), plain)
        for handle in stands.values():
            handle.revert()
        assert equal(run(), plain)


# -- methods with caches of diffusers ------------------------------------------------------------------------------

NOW = [0.0]  # the timestep, which caches ask a callback for


def cache_config(name: str):
    """A cache that skips something in :data:`TIMESTEPS`; FasterCache and TaylorSeer in some layers only."""
    import diffusers

    def now():
        return NOW[0]

    return {
        "FirstBlockCache": lambda: diffusers.FirstBlockCacheConfig(threshold=10.0),
        "MagCache": lambda: diffusers.MagCacheConfig(
            threshold=5.0, num_inference_steps=len(TIMESTEPS), mag_ratios=[1.0] * len(TIMESTEPS)
        ),
        "TaylorSeer": lambda: diffusers.TaylorSeerCacheConfig(
            cache_interval=2, disable_cache_before_step=2, taylor_factors_dtype=torch.float32,
            cache_identifiers=[r".*blocks\.0\.attn1?"],
        ),
        "PyramidAttentionBroadcast": lambda: diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 850),
            current_timestep_callback=now,
        ),
        "FasterCache": lambda: diffusers.FasterCacheConfig(
            spatial_attention_block_skip_range=2, unconditional_batch_skip_range=3, current_timestep_callback=now,
            attention_weight_callback=lambda module: 0.5, low_frequency_weight_callback=lambda module: 1.1,
            high_frequency_weight_callback=lambda module: 3.0,
        ),
        "SeaCache": lambda: diffusers.SeaCacheConfig(threshold=1.6),
    }[name]()  # fmt: skip


CACHES = ["FirstBlockCache", "MagCache", "TaylorSeer", "PyramidAttentionBroadcast", "FasterCache", "SeaCache"]
CASES = [(cache, "wan", method) for cache in CACHES for method in ("dense", "sparge", "svg", "radial", "grat")]
CASES += [(cache, "flux", method) for cache in CACHES[:4] for method in ("sparge", "grat")]


def calls_by_layer(model, family, batch):
    """One generation, and how often each self-attention really computed in it: the calls of its query projection."""
    from hf_accel.hosts.denoisers import describe

    counts: Counter[int] = Counter()
    handles = [
        attention.to_q.register_forward_hook(lambda *_, index=index: counts.update([index]))
        for index, (_, attention) in enumerate(describe(model).attentions(model))
    ]
    out = generate(model, family, batch=batch)
    for handle in handles:
        handle.remove()
    return out, counts


@pytest.mark.parametrize(("cache", "family", "method"), CASES, ids=lambda name: name)
def test_attention_methods_with_caches(cache, family, method):
    model = tiny.build(family)
    batch = 2 if cache == "FasterCache" else 1  # which halves the batch of guidance
    plain = generate(model, family, batch=batch)
    model.enable_cache(cache_config(cache))
    cached, truth = calls_by_layer(model, family, batch)
    assert sum(truth.values()) < tiny.TINY[family].layers * len(TIMESTEPS), "the cache skipped nothing"
    assert not close(cached, plain)
    model.disable_cache()
    before = fingerprint(model)
    for first in ("cache", "method"):
        if first == "cache":
            model.enable_cache(cache_config(cache))
        applied = hf_accel.apply(model, method, **full_budget(method))
        if first == "method":
            model.enable_cache(cache_config(cache))
        else:
            assert any(cache in note for note in applied.report().entries[0].notes)
        for generation in (1, 2):
            assert close(generate(model, family, batch=batch), cached)
            run = applied.report().entries[0].run
            assert Counter(d.layer for d in run.densities) == truth
            assert (run.generations, run.forwards) == (generation, generation * len(TIMESTEPS))
            assert run.sparse_calls == generation * sum(truth.values())
        assert not run.dense_calls
        applied.revert()
        assert close(generate(model, family, batch=batch), cached)
        applied = hf_accel.apply(model, method, **full_budget(method))
        model.disable_cache()
        assert close(generate(model, family, batch=batch), plain)
        applied.revert()
        assert fingerprint(model) == before


@pytest.mark.parametrize("cache", ["FirstBlockCache", "PyramidAttentionBroadcast"])
@pytest.mark.parametrize("method", ["sparge", "grat"])
def test_an_exception_leaves_nothing_behind(cache, method):
    model = tiny.build("wan")
    model.enable_cache(cache_config(cache))
    wanted = generate(model, "wan", seed=1)
    inputs = tiny.TINY["wan"].inputs(model, timestep=900.0)
    outside = active_context()  # tests of compiled models before this one leave theirs, which nobody asks for
    with hf_accel.apply(model, method, **full_budget(method)) as applied:
        with model.cache_context("cond"):
            model(**inputs)
        with pytest.raises(RuntimeError), model.cache_context("cond"):
            model(**inputs | {"encoder_hidden_states": torch.zeros(1, 2, 1)})
        assert active_context() is outside
        end_of_call(model)  # a pipeline's call that raised does not do that; the cache of diffusers needs it
        assert close(generate(model, "wan", seed=1), wanted)
        assert applied.report().entries[0].run.generations == 2
    assert close(generate(model, "wan", seed=1), wanted)


def test_state_of_a_layer_survives_a_batch_that_is_halved_midway():
    """FasterCache computes the conditional half of some steps: centroids of two items do not fit one."""
    model = tiny.build("wan")
    model.enable_cache(cache_config("FasterCache"))
    with hf_accel.apply(model, "svg2", **QUICK["svg2"], top_p=1.0, dense_steps=0, dense_layers=0) as applied:
        generate(model, "wan", batch=2)
        assert not applied.report().entries[0].run.dense_calls


def test_tokens_stay_in_place_where_a_cache_reads_places():
    model = tiny.build("wan")
    model.enable_cache(cache_config("SeaCache"))
    assert reader_of_places(model) == "SeaCache"
    with hf_accel.apply(model, "grat", **full_budget("grat")) as applied:
        generate(model, "wan")
        assert "SeaCache" in applied.report().entries[0].run.kernels["token_order"][1]
        model.disable_cache()
        assert reader_of_places(model) is None
        generate(model, "wan")
        assert applied.report().entries[0].run.kernels["token_order"][0] == "at entry and exit"


# -- methods with everything else ----------------------------------------------------------------------------------


def put_hooks(name):
    def put(model):
        from diffusers.hooks import HookRegistry, ModelHook

        for hook in FOREIGN_BY_NAME[name].hooks:
            HookRegistry.check_if_exists_or_initialize(model).register_hook(ModelHook(), hook)

    return put


def put_helper(model):
    """What the DeepCache package does: a closure of its own in place of a block's forward."""
    native = model.up_blocks[0].forward

    def wrapped_forward(*args, **kwargs):
        return native(*args, **kwargs)

    wrapped_forward.__module__ = "DeepCache.extension.deepcache"
    model.up_blocks[0].forward = wrapped_forward


def put_adapter(model):
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "extra")


def put_offload(model):
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(model, execution_device="cpu")


def put_groups(model):
    cpu = torch.device("cpu")
    model.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)


PUT = {entry.name: put_hooks(entry.name) for entry in FOREIGN if entry.hooks} | {
    "DeepCacheSDHelper": put_helper,
    "peft adapters": put_adapter,
    "torch.compile": lambda model: model.compile(backend="eager"),
    "CPU offload": put_offload,
    "group offload": put_groups,
}


@pytest.mark.parametrize("name", FOREIGN_BY_NAME)
def test_foreign_things_are_recognised_and_held_to_their_facts(name):
    entry = FOREIGN_BY_NAME[name]
    model = tiny.build("unet")
    assert standing(model) == []
    PUT[name](model)
    assert standing(model) == [entry]
    before = fingerprint(model)
    for method, cls in METHODS.items():
        assert conflict(cls, entry) == conflict(entry, cls)
        if not takes(cls, model) or apart(cls, entry):
            continue
        if conflict(cls, entry) is None:
            with hf_accel.apply(model, method, **full_budget(method)):
                pass
        else:
            with pytest.raises(Conflict, match=rf"{name} is on model already. Take it off first: "):
                hf_accel.apply(model, method)
        assert fingerprint(model) == before


def test_offloading_by_leaves_is_no_concern():
    model = tiny.build("unet")
    plain = generate(model, "unet", timesteps=TIMESTEPS[:2])
    cpu = torch.device("cpu")
    model.enable_group_offload(cpu, cpu, offload_type="leaf_level")
    assert standing(model) == []
    for method, cls in METHODS.items():
        if claims(method, model) and cls.facts.site != "attention":
            with hf_accel.apply(model, method, **full_budget(method)):
                assert close(generate(model, "unet", timesteps=TIMESTEPS[:2]), plain)


def test_refusals_of_caches_say_what_to_write():
    import diffusers
    from diffusers.hooks import apply_pyramid_attention_broadcast

    unet = tiny.build("unet")
    apply_pyramid_attention_broadcast(unet, cache_config("PyramidAttentionBroadcast"))
    caches = [name for name, cls in METHODS.items() if cls.facts.at("step cache") and claims(name, unet)]
    assert caches
    for method in caches:
        with pytest.raises(Conflict, match="both own the step cache site") as refused:
            hf_accel.apply(unet, method)
        line = str(refused.value).split("Take it off first: ")[1].rstrip(".")
        exec(line, {"model": unet, "diffusers": diffusers})
        assert standing(unet) == []
        hf_accel.apply(unet, method).revert()
        apply_pyramid_attention_broadcast(unet, cache_config("PyramidAttentionBroadcast"))


def test_attention_methods_on_a_u_net_with_a_cache():
    from diffusers.hooks import apply_pyramid_attention_broadcast

    model = tiny.build("unet")
    apply_pyramid_attention_broadcast(model, cache_config("PyramidAttentionBroadcast"))
    cached, truth = calls_by_layer(model, "unet", 1)
    reset_hooks(model)
    with hf_accel.apply(model, "sparge", **full_budget("sparge")) as applied:
        assert close(generate(model, "unet"), cached)
        run = applied.report().entries[0].run
    assert Counter(d.layer for d in run.densities) == truth
    assert 0 < sum(truth.values()) < tiny.TINY["unet"].layers * len(TIMESTEPS)


def reset_hooks(model):
    from diffusers.hooks import HookRegistry

    HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks()


@pytest.mark.parametrize("first", ["helper", "method"])
def test_the_deepcache_package(first):
    package = pytest.importorskip("DeepCache", reason="the DeepCache package is an extra for comparisons")
    model = tiny.build("unet")
    pipe = types.SimpleNamespace(unet=model, scheduler=types.SimpleNamespace(timesteps=torch.tensor(TIMESTEPS)))
    plain = positional(model)
    helper = package.DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    helper.enable()
    cached = positional(model)
    helper.disable()
    assert not close(cached, plain)
    if first == "helper":
        helper.enable()
    with hf_accel.apply(model, "sparge", **full_budget("sparge")) as applied:
        if first == "method":
            helper.enable()
        assert [entry.name for entry in standing(model)] == ["DeepCacheSDHelper"]
        assert close(positional(model), cached)
        run = applied.report().entries[0].run
        full = len(TIMESTEPS) // 3
        layers = tiny.TINY["unet"].layers
        # A partial step computes the last attention block of the up path alone.
        assert Counter(d.layer for d in run.densities) == {i: full for i in range(layers - 1)} | {
            layers - 1: len(TIMESTEPS)
        }
        with pytest.raises(Conflict, match=r"DeepCacheSDHelper is on model already. Take it off first: helper.disable"):
            hf_accel.apply(model, "deepcache")
    helper.disable()
    assert standing(model) == []
    assert close(positional(model), plain)


@torch.no_grad()
def positional(model):
    """A generation as the DeepCache package reads it: the timestep is the second positional argument."""
    out = []
    for index, timestep in enumerate(TIMESTEPS):
        given = tiny.TINY["unet"].inputs(model, seed=index)
        out.append(model(given["sample"], torch.tensor(timestep), given["encoder_hidden_states"]).sample)
    return out


# -- explain() and the page ----------------------------------------------------------------------------------------


def test_explain_names_pairs_and_what_stands():
    model = tiny.build("unet")
    every = registry.methods()
    taken = [name for name, cls in every.items() if cls.why_not(Model("model", model)) is None]
    bare = hf_accel.explain(model)
    assert {(p.first, p.second) for p in bare.pairs} == set(itertools.combinations(taken, 2))
    for pair in bare.pairs:
        assert pair.works == (conflict(every[pair.first], every[pair.second]) is None)
    assert bare.standing == []
    put_adapter(model)
    owner = next(name for name in taken if issubclass(every[name], AttentionMethod))
    with hf_accel.apply(model, owner):
        told = hf_accel.explain(model)
    assert told.standing == [("model", owner), ("model", "peft adapters")]
    assert f"on the model     {owner} (model), peft adapters (model)" in str(told)
    by_method = {verdict.method: verdict for verdict in told}
    assert by_method[owner].applies
    assert "would be replaced" in by_method[owner].reason
    for name in taken:
        refused = conflict(every[name], every[owner]) is not None
        assert by_method[name].applies != refused
        assert not refused or f"{owner} is on model already" in by_method[name].reason
    assert {(p.first, p.second) for p in told.pairs} > {(p.first, p.second) for p in bare.pairs}


def test_explain_prints_refusals_once_and_a_word_on_the_rest():
    text = str(hf_accel.explain(tiny.build("unet"))).splitlines()[-1]
    owners = [n for n in METHODS if METHODS[n].facts.site == "attention" and claims(n, tiny.build("unet"))]
    assert text == f"together         one of {', '.join(owners)} (attention site); all other pairs work"
