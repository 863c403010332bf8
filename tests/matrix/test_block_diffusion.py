"""The matrix of promises over methods for block-diffusion models and the families they claim, in whole generations.

Methods are found through the registry, as in ``test_attention_and_caches``; which family a method takes, it says
itself.
"""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import test_prefix_cache as llada2_pipeline
import torch
from test_attention_and_caches import equal, fingerprint, keys_aside
from transformers import DynamicCache

import hf_accel
import sdar_models
import tiny_text
from hf_accel import registry
from hf_accel.composition import apart, conflict, sites_of
from hf_accel.errors import Conflict, NotApplicable
from hf_accel.facts import overlap
from hf_accel.hosts import block_families as block_context
from hf_accel.hosts.block_families import family_of
from hf_accel.hosts.networks import host_of
from hf_accel.hosts.target import Model
from standins import dream, llada

pytestmark = pytest.mark.filterwarnings("ignore:.*RCD:UserWarning")  # weights here are random

# Settings that make a method do something on tiny models.
QUICK = {
    "losa": {"budget": 8, "page_size": 8, "min_prefix": 0},
    "quest": {"budget": 8, "page_size": 8, "min_prefix": 0},
}
METHODS = [
    name
    for name, cls in registry.methods().items()
    if "block diffusion" in cls.facts.hosts and cls.facts.site not in ("linear", "adapter")  # test_linear
]
OTHERS = [name for name in registry.methods() if name not in METHODS]


# -- families: a model, and a deterministic generation that yields the logits a sampler reads ------------------------


ONE, OTHER, BOTH = slice(0, 1), slice(1, 2), slice(0, 2)


def prompt(tokens, rows, seed):
    return sdar_models.prompt(tokens, 2, seed)[rows]


def steps_of_sdar(model, rows, seed):
    return sdar_models.denoise(model, prompt(64, rows, seed))[0]


@torch.no_grad()
def steps_of_gemma(model, rows, seed):
    """Two canvases of three steps. Predictions are not fed back but given: in these weights rounding would grow."""
    cache = DynamicCache(config=model.config.text_config)
    tokens, out = prompt(125, rows, seed), []
    before = torch.randn(1, 8, 97, generator=torch.Generator().manual_seed(seed)).expand(len(tokens), -1, -1)
    for block in range(2):
        model.model.encoder(tokens, past_key_values=cache)
        canvas = prompt(8, rows, seed + 10 + block)
        for step in range(3):
            given = {"past_key_values": cache, "decoder_input_ids": canvas}
            logits = model(**given, self_conditioning_logits=before if step else None).logits
            out.append(logits)
            canvas = canvas.clone()
            canvas[:, : 3 * step + 3] = logits.argmax(-1)[:, : 3 * step + 3]
        tokens = logits.argmax(-1)
    return out


def steps_of_llada2(model, rows, seed):
    """Through diffusers' pipeline."""
    return llada2_pipeline.generate(llada2_pipeline.pipeline(model), prompt(21, rows, seed) % 60)[1]


@torch.no_grad()
def steps_of_whole(model, rows, seed, shift=0):
    """Greedy over the whole sequence, one token a step; ``shift`` 1: logits at a position are of the next."""
    mask = model.config.mask_token_id
    ids = prompt(8, rows, seed) % mask
    ids = torch.cat([ids, torch.full((len(ids), 6), mask)], dim=1)
    out = []
    for _ in range(6):
        logits = model(ids).logits.float()
        out.append(logits)
        best, token = logits.roll(shift, dims=1).softmax(-1)[..., :mask].max(-1)
        place = best.masked_fill(ids != mask, -1).argmax(-1)
        ids = ids.scatter(1, place[:, None], token.gather(1, place[:, None]))
    return out


FAMILIES = {
    "sdar": (sdar_models.sdar, steps_of_sdar),
    "sdar-mha": (lambda seed=0: sdar_models.sdar(seed, num_key_value_heads=4), steps_of_sdar),
    "diffusion-gemma": (tiny_text.diffusion_gemma, steps_of_gemma),
    "llada2": (lambda seed=0: llada2_pipeline.llada2.build(seed, mask_token_id=llada2_pipeline.MASK), steps_of_llada2),
    "llada": (llada.build, steps_of_whole),
    "dream": (dream.build, lambda *a: steps_of_whole(*a, shift=1)),
}


def build(family, seed=0):
    return FAMILIES[family][0](seed=seed)


def generate(model, family, rows=ONE, seed=1):
    return FAMILIES[family][1](model, rows, seed)


def claims(method, model):
    return registry.get(method).why_not(Model("model", model)) is None


MODELS = {family: build(family) for family in FAMILIES}
CLAIMED = [(m, f) for m in METHODS for f in FAMILIES if claims(m, MODELS[f])]


@pytest.fixture(params=CLAIMED, ids=lambda p: f"{p[0]}-{p[1]}")
def case(request):
    method, family = request.param
    return method, family, copy.deepcopy(MODELS[family])


def quick(method):
    return QUICK.get(method, {})


def full_budget(method):
    return {**quick(method), **registry.get(method).facts.full_budget}


def close(ours, theirs, limit=1e-5):
    """Equal up to ``limit`` of the largest logit; a cache may hand on the rows that are read only."""
    assert len(ours) == len(theirs)
    return all((a - b).abs().max() <= limit * b.abs().max().clamp(min=1) for a, b in zip(ours, theirs, strict=True))


def same(method, ours, theirs):
    """To the bit; methods that are exact may take another way the second time (a cache that was verified)."""
    return close(ours, theirs, 2e-5) if registry.get(method).facts.exact else equal(ours, theirs)


def run_of(applied):
    return applied.report().entries[0].run


# -- claims --------------------------------------------------------------------------------------------------------


def test_every_method_has_a_family_and_every_family_a_method():
    assert {method for method, _ in CLAIMED} == set(METHODS)
    assert {family for _, family in CLAIMED} == set(FAMILIES)
    assert all(host_of(model) == "block diffusion" for model in MODELS.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_of_the_facts_are_those_that_are_claimed(family):
    name = family_of(MODELS[family]).name
    for method in METHODS:
        facts = registry.get(method).facts
        assert facts.families <= {known.name for known in block_context.FAMILIES}
        assert ((method, family) in CLAIMED) == (not facts.families or name in facts.families), method


@pytest.mark.parametrize("family", FAMILIES)
def test_methods_that_do_not_claim_a_family_are_refused_in_words(family):
    model = MODELS[family]
    before = fingerprint(model)
    for method in (m for m in (*METHODS, *OTHERS) if not claims(m, model)):
        reason = registry.get(method).why_not(Model("model", model))
        with pytest.raises(NotApplicable) as caught:
            hf_accel.apply(model, method)
        assert len(reason) > 20
        assert reason in str(caught.value)
        assert fingerprint(model) == before


# -- the promises --------------------------------------------------------------------------------------------------


def test_full_budget_is_dense(case):
    method, family, model = case
    dense = generate(model, family)
    with hf_accel.apply(model, method, **full_budget(method)) as applied:
        assert close(generate(model, family), dense)
        told = run_of(applied).to_dict()
    assert json.loads(json.dumps(told)) == told
    assert not {why for why in told.get("dense_calls", {}) if "first block" not in why}


def test_quick_settings_run_and_tell(case):
    method, family, model = case
    with hf_accel.apply(model, method, **quick(method)) as applied:
        out = generate(model, family)
        text = str(applied.report())
    assert all(torch.isfinite(x).all() for x in out)
    assert "  ran " in text or "  patched " in text
    if not registry.get(method).facts.exact and registry.get(method).facts.site == "attention":
        assert run_of(applied).mean("density") < 1


def test_the_defaults_run(case):
    method, family, model = case
    with hf_accel.apply(model, method):
        assert all(torch.isfinite(x).all() for x in generate(model, family))


def test_revert_restores_identity_and_bits(case):
    method, family, model = case
    before, dense = fingerprint(model), generate(model, family)
    applied = hf_accel.apply(model, method, **quick(method))
    assert fingerprint(model) != before
    assert list(model.state_dict()) == before["keys"]
    generate(model, family)
    applied.revert()
    applied.revert()  # a second call does nothing
    assert fingerprint(model) == before
    assert equal(generate(model, family), dense)


def test_applying_twice_replaces(case):
    method, family, model = case
    before = fingerprint(model)
    with hf_accel.apply(model, method, **quick(method)):
        once = generate(model, family)
    first = hf_accel.apply(model, method, **quick(method))
    second = hf_accel.apply(model, method, **quick(method))
    assert not first.active
    assert same(method, generate(model, family), once)
    second.revert()
    assert fingerprint(model) == before


def test_a_failing_replacement_leaves_what_stood(case, fails_at_the_end):
    method, family, model = case
    before = fingerprint(model)
    applied = hf_accel.apply(model, method, **quick(method))
    standing, ours = keys_aside(fingerprint(model)), generate(model, family)
    with fails_at_the_end(method):
        hf_accel.apply(model, method, **quick(method))
    assert applied.active
    assert keys_aside(fingerprint(model)) == standing
    assert same(method, generate(model, family), ours)
    applied.revert()
    assert fingerprint(model) == before


def test_the_next_request_equals_a_fresh_run(case):
    method, family, model = case
    alone = []
    for seed in (5, 6):
        with hf_accel.apply(model, method, **quick(method)):
            alone.append(generate(model, family, seed=seed))
    with hf_accel.apply(model, method, **quick(method)):
        assert same(method, generate(model, family, seed=5), alone[0])
        assert same(method, generate(model, family, seed=6), alone[1])


class Breakdown(Exception):
    pass


class BreakingDown:
    """Raises in the n-th forward of a module."""

    def __init__(self, module, n):
        self.left = n
        self.handle = module.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.left -= 1
        if not self.left:
            raise Breakdown


@pytest.mark.parametrize("n", [2, 4])
def test_an_exception_leaves_nothing_behind(case, n):
    method, family, model = case
    with hf_accel.apply(model, method, **quick(method)):
        alone = generate(model, family, seed=6)
    with hf_accel.apply(model, method, **quick(method)):
        last = [m for m in model.modules() if "norm" in type(m).__name__.lower()][-1]
        breaking = BreakingDown(last, n)
        with pytest.raises(Breakdown):
            generate(model, family, seed=5)
        breaking.handle.remove()
        assert same(method, generate(model, family, seed=6), alone)


def test_a_copy_has_a_life_of_its_own(case):
    method, family, model = case
    before, dense = fingerprint(model), generate(model, family)
    applied = hf_accel.apply(model, method, **full_budget(method))
    generate(model, family, seed=7)
    twin = copy.deepcopy(model)
    told = run_of(applied).to_dict()
    assert close(generate(twin, family), dense)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not close(generate(twin, family), dense)
    assert run_of(applied).to_dict() == told
    hf_accel.revert(twin)
    assert "_hf_accel" not in twin.__dict__
    assert close(generate(model, family), dense)
    applied.revert()
    assert fingerprint(model) == before


def test_a_batch_equals_its_rows_at_full_budget(case):
    method, family, model = case
    dense = generate(model, family, rows=BOTH)
    with hf_accel.apply(model, method, **full_budget(method)):
        both = generate(model, family, rows=BOTH)
        alone = [generate(model, family, rows=row) for row in (ONE, OTHER)]
    assert close(both, dense)
    if family == "llada2":
        return  # the pipeline goes on until all rows of a block are done
    for row, logits in enumerate(alone):
        assert close([x[row : row + 1] for x in both], logits, 1e-4)


def test_two_models_do_not_see_each_other(case):
    method, family, model = case
    other = build(family, seed=1)
    before, dense = fingerprint(other), generate(other, family)
    with hf_accel.apply(model, method, **quick(method)):
        generate(model, family)
        assert fingerprint(other) == before
        assert equal(generate(other, family), dense)


def test_gradients_are_right(case):
    method, family, model = case

    def gradients():
        model.zero_grad()
        step_with_gradients(model, family).float().square().mean().backward()
        return {name: p.grad.clone() for name, p in own.items() if p.grad is not None}

    own = dict(model.named_parameters())  # a method may add parameters
    dense = gradients()
    with hf_accel.apply(model, method, **full_budget(method)) as applied:
        ours = gradients()
        told = run_of(applied).to_dict()
    assert ours.keys() == dense.keys()
    largest = max(x.abs().max() for x in dense.values())
    assert all((ours[name] - dense[name]).abs().max() <= 1e-5 * largest for name in dense)
    if registry.get(method).facts.site == "attention":
        assert registry.get(method).facts.backward == (not told["dense_calls"])


def step_with_gradients(model, family):
    """Logits of one denoising step behind a prefix."""
    if family == "diffusion-gemma":
        cache = DynamicCache(config=model.config.text_config)
        with torch.no_grad():
            model.model.encoder(sdar_models.prompt(9), past_key_values=cache)
        before = torch.randn(1, 8, 97, generator=torch.Generator().manual_seed(0))
        canvas = sdar_models.prompt(8, seed=1)
        return model(past_key_values=cache, decoder_input_ids=canvas, self_conditioning_logits=before).logits
    if family.startswith("sdar"):
        cache = DynamicCache()
        with torch.no_grad():
            model(sdar_models.prompt(8), past_key_values=cache, store_kv=True)
        return model(torch.full((1, 4), sdar_models.MASK), past_key_values=cache, store_kv=False).logits
    return model(sdar_models.prompt(16) % 60).logits


# -- two methods ---------------------------------------------------------------------------------------------------

PAIRS = list(itertools.combinations(METHODS, 2))


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_pairs(pair):
    """What is allowed works in both orders and leaves one by one; what is refused changes nothing."""
    a, b = (registry.get(name) for name in pair)
    assert conflict(a, b) == conflict(b, a)
    both = [f for f in FAMILIES if all((name, f) in CLAIMED for name in pair)]
    assert (apart(a, b) is None) == bool(both)
    both_own = overlap(sites_of(a), sites_of(b)) is not None
    assert (conflict(a, b) is not None) == (both_own and bool(both))
    for family in both:
        model = copy.deepcopy(MODELS[family])
        before = fingerprint(model)
        for first, second in (pair, pair[::-1]):
            if both_own:
                with hf_accel.apply(model, first), pytest.raises(Conflict, match=rf"{first} is on model already"):
                    hf_accel.apply(model, second)
            else:
                together(model, family, first, second)
            assert fingerprint(model) == before


def together(model, family, first, second):
    """With ``second`` at full budget, both give what ``first`` gives alone."""
    with hf_accel.apply(model, first, **quick(first)):
        alone = generate(model, family)
    for leaves in (0, 1):
        stand = [
            hf_accel.apply(model, first, **quick(first)),
            hf_accel.apply(model, second, **full_budget(second)),
        ]
        assert close(generate(model, family), alone)
        stand[leaves].revert()
        if leaves == 1:
            assert close(generate(model, family), alone)
        stand[1 - leaves].revert()


def test_what_goes_with_what():
    """Attention and embedding are sites of their own: residual contexts go with sparse prefixes."""
    for attention in ("prefix-split", "quest", "losa"):
        assert conflict(registry.get(attention), registry.get("rcd")) is None
        assert conflict(registry.get(attention), registry.get("soft-embed")) is None
    assert conflict(registry.get("losa"), registry.get("quest")) is not None
