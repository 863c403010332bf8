"""apply, revert, explain: atomic, composable, refused with words."""

from __future__ import annotations

import pytest
import torch

import hf_accel
from hf_accel import errors, registry
from hf_accel.base import Method
from hf_accel.composition import conflict
from hf_accel.config import Config
from hf_accel.facts import Facts
from hf_accel.patches.svg2 import SVG2Config
from hf_accel.report import Patched
from hf_accel.sites.attention import diffusers as attention_host
from hf_accel.sites.attention.base import AttentionMethod
from hf_accel.testing.models import tiny


@pytest.fixture
def model():
    return tiny.build("wan")


@pytest.fixture
def temporary(monkeypatch):
    """Register methods for one test."""
    registry.methods()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    return registry.register


def marks(model):
    return [i.method.name for i in model.__dict__.get("_hf_accel", [])]


def test_unknown_names_come_with_the_nearest(model):
    with pytest.raises(errors.UnknownMethod, match="Did you mean 'svg2'"):
        hf_accel.apply(model, "svg-2")
    with pytest.raises(errors.UnknownMethod, match=r"wan2\.1-t2v-14b"):
        hf_accel.apply(model, "wan2.1-t2v-14")


def test_a_method_again_replaces_the_first(model):
    dense = tiny_output(model)
    first = hf_accel.apply(model, "svg2", top_p=0.5)
    second = hf_accel.apply(model, "svg2", top_p=0.8)
    assert marks(model) == ["svg2"]
    assert not first.active
    assert second.report().entries[0].settings["top_p"] == 0.8
    first.revert()  # nothing of it stands; the second stays
    assert second.active
    second.revert()
    assert torch.equal(tiny_output(model), dense)


def test_a_failing_replacement_leaves_the_first(model, monkeypatch):
    applied = hf_accel.apply(model, "svg2", top_p=0.5)
    tried = []
    original = attention_host._patch_dispatch

    def fails_once(*args, **kwargs):
        original(*args, **kwargs)
        if not tried:
            tried.append(1)
            raise OSError("disk on fire")

    monkeypatch.setattr(attention_host, "_patch_dispatch", fails_once)
    with pytest.raises(OSError, match="disk on fire"):
        hf_accel.apply(model, "svg2", top_p=0.8)
    assert marks(model) == ["svg2"]
    assert model.__dict__["_hf_accel"][0].method.config.top_p == 0.5
    assert applied.active
    hf_accel.revert(model)
    assert not marks(model)
    assert not applied.active


def test_a_failure_half_way_undoes_everything(model, monkeypatch):
    dense, processors = tiny_output(model), [b.attn1.processor for b in model.blocks]
    original, count = attention_host._patch_dispatch, []

    def second_fails(*args, **kwargs):
        count.append(1)
        if len(count) == 2:
            raise OSError("disk on fire")
        original(*args, **kwargs)

    monkeypatch.setattr(attention_host, "_patch_dispatch", second_fails)
    with pytest.raises(OSError, match="disk on fire"):
        hf_accel.apply(model, "svg2")
    assert "_hf_accel" not in model.__dict__
    assert "cache_context" not in model.__dict__
    assert all("_attention_backend" not in vars(p) for p in processors)
    assert torch.equal(tiny_output(model), dense)


def test_two_owners_of_one_site_conflict(model):
    with pytest.raises(errors.Conflict, match="dense and svg2 both own the attention site"):
        hf_accel.apply(model, ["svg2", "dense"])
    assert not marks(model)
    with hf_accel.apply(model, "dense"), pytest.raises(errors.Conflict, match=r"dense is on model already.*revert"):
        hf_accel.apply(model, "svg2")
    with pytest.raises(errors.Conflict, match="asked for twice"):
        hf_accel.apply(model, ["svg2", "svg2"])


def test_conflicts_are_symmetric():
    types = list(registry.methods().values())
    for a in types:
        for b in types:
            assert conflict(a, b) == conflict(b, a)


def test_requests_of_every_form(model):
    for request in (
        SVG2Config(top_p=0.7),
        {"svg2": {"top_p": 0.7}},
        [{"svg2": {"top_p": 0.7}}],
        [SVG2Config(top_p=0.7)],
    ):
        with hf_accel.apply(model, request) as applied:
            assert applied.report().entries[0].settings["top_p"] == 0.7
    with pytest.raises(errors.InvalidSetting, match="single named method"):
        hf_accel.apply(model, ["svg2", "dense"], top_p=0.7)
    with pytest.raises(errors.InvalidSetting, match="revision"):
        hf_accel.apply(model, "svg2", revision="main")
    with pytest.raises(errors.NotApplicable, match="list of these; got int"):
        hf_accel.apply(model, [3])


def test_no_recommendation_is_said(model):
    with pytest.raises(errors.NotApplicable, match="No shipped config recommends"):
        hf_accel.apply(model)
    with pytest.raises(errors.InvalidSetting, match="method's name"):
        hf_accel.apply(model, top_p=0.5)


def test_recommended_settings_for_a_known_model():
    model = wan_14b_config()
    applied = hf_accel.apply(model)
    entry = applied.report().entries[0]
    assert entry.method == "svg2"
    assert "wan" in entry.origin
    assert "published" in entry.origin
    assert (entry.settings["num_q_centroids"], entry.settings["num_k_centroids"]) == (300, 1000)
    applied.revert()
    changed = hf_accel.apply(model, "svg2", top_p=0.7).report().entries[0]
    assert (changed.settings["top_p"], changed.settings["num_k_centroids"]) == (0.7, 1000)
    assert "changed by the caller: top_p" in changed.origin
    hf_accel.revert(model)


def wan_14b_config():
    """The 14B's configuration on the meta device: recognised by its configuration alone."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        return WanTransformer3DModel(num_layers=40, num_attention_heads=40, attention_head_dim=128, ffn_dim=13824)


def test_a_preset_for_other_models_is_refused(model, tmp_path):
    with pytest.raises(errors.NotApplicable, match="not meant for"):
        hf_accel.apply(model, "wan2.1-t2v-14b-720p")
    file = tmp_path / "fast.yaml"
    file.write_text("hf_accel: 1\nname: fast\napply:\n  - {method: svg2, version: 1, settings: {top_p: 0.6}}\n")
    with hf_accel.apply(model, str(file)) as applied:
        assert applied.report().entries[0].settings["top_p"] == 0.6
        assert "fast" in applied.report().entries[0].origin
    with pytest.raises(errors.InvalidSetting, match="brings its own settings"):
        hf_accel.apply(model, str(file), top_p=0.7)


def test_nothing_patched_says_what_was_sought(model):
    for block in model.blocks:
        block.attn1.processor = None
    with pytest.raises(errors.NothingPatched, match=r"blocks.*attn1.*found 2 by name, no processor"):
        hf_accel.apply(model, "svg2")


def test_heads_too_large_for_the_kernel_are_refused_or_noted():
    model = tiny.build("wan", num_attention_heads=1, attention_head_dim=264)
    with pytest.raises(errors.UnsupportedByKernel, match="have 264 dims; the Triton kernel does 256"):
        hf_accel.apply(model, "svg2", backend="triton")
    assert not marks(model)
    dense = tiny_output(model)
    with hf_accel.apply(model, "svg2", top_p=1.0, dense_steps=0, dense_layers=0, kmeans_iter_init=2) as applied:
        assert torch.allclose(tiny_output(model), dense, atol=1e-5)
        assert "264 dims" in str(applied.report())


def test_double_precision_runs_dense_and_is_counted():
    model = tiny.build("wan").double()
    inputs = {k: v.double() for k, v in tiny.TINY["wan"].inputs(model).items()}
    with torch.no_grad(), hf_accel.apply(model, "svg2", dense_steps=0, dense_layers=0) as applied:
        model(**inputs)
        assert applied.report().entries[0].run.dense_calls == {"dtype float64": 2}


def test_explain_speaks_of_every_method(model):
    verdicts = hf_accel.explain(model)
    assert {v.method for v in verdicts} == set(registry.methods())
    assert {v.method for v in verdicts if v.applies} == {
        name
        for name, cls in registry.methods().items()
        if cls.facts.site == "linear" or (cls.facts.site == "attention" and "block diffusion" not in cls.facts.hosts)
    }
    assert "svg2" in str(verdicts)
    other = hf_accel.explain(torch.nn.Linear(1, 1))
    assert not any(v.applies for v in other)
    assert "Linear is a module" in str(other)


def test_a_refusal_names_the_methods_that_fit(model):
    with pytest.raises(errors.NotApplicable, match=r"no U-Net.*Methods that fit: .*sparge.*svg2"):
        hf_accel.apply(model, "deepcache")


def test_methods_lists_the_registry():
    listed = hf_accel.methods()
    assert listed["svg2"]["site"] == "attention"
    assert "2505.18875" in listed["svg2"]["paper"]


def test_report_and_stats_are_plain_data(model):
    import json

    with hf_accel.apply(model, "svg2", dense_steps=0, dense_layers=1, kmeans_iter_init=2) as applied:
        tiny_output(model)
        stats = applied.stats()
        assert json.dumps(applied.report().to_dict())
        text = str(applied.report())
    entry = stats["model"]["svg2"]
    assert entry["sparse_calls"] == 1
    assert list(entry["density_by_layer_and_head"]) == [1]
    assert len(entry["density_by_layer_and_head"][1]) == 4
    assert entry["kernels"]["variable_block_attention"]["backend"] == "torch"
    assert "patched   2 x attention through the dispatcher" in text
    assert "2 x no self-attention over video or image tokens" in text


def test_revert_in_any_order_with_independent_sites(model, temporary):
    class Tag(Method):
        """Sets an attribute; shares no site with attention."""

        name, paper, summary = "tag", "none", "for tests"
        facts = Facts(site="linear", exact=True)
        Config = type("TagConfig", (Config,), {"METHOD": "tag"})

        @classmethod
        def why_not(cls, model):
            return None

        def install(self, model, ledger, report, clock):
            ledger.set(model.module, "tagged", True)
            report.patched.append(Patched(model.name, "", "tag"))

    temporary(Tag)
    for first in (0, 1):
        applied = [hf_accel.apply(model, "svg2"), hf_accel.apply(model, "tag")]
        assert marks(model) == ["svg2", "tag"]
        applied[first].revert()
        assert len(marks(model)) == 1
        applied[1 - first].revert()
        assert "_hf_accel" not in model.__dict__
    both = hf_accel.apply(model, ["svg2", "tag"])
    assert marks(model) == ["tag", "svg2"]  # linears first, then attention
    both.revert()


def test_outsiders_register_by_decorator_and_names_are_taken_once(temporary):
    class Mine(AttentionMethod):
        name, paper, summary = "mine", "none", "for tests"
        facts = Facts(site="attention", exact=True)
        Config = type("MineConfig", (Config,), {"METHOD": "mine"})

        def attend(self, call, state):
            return call.dense()

    temporary(Mine)
    model = tiny.build("wan")
    with hf_accel.apply(model, "mine") as applied:
        tiny_output(model)
        assert applied.report().entries[0].run.sparse_calls == 2
    with pytest.raises(errors.HFAccelError, match="The name 'mine' is taken"):
        temporary(type("Other", (Mine,), {}))
    with pytest.raises(errors.HFAccelError, match="declares no 'summary'"):
        temporary(type("Bare", (), {"name": "bare", "paper": ""}))


def test_pipelines_without_a_denoiser_are_refused():
    class Empty:
        components = {"vae": torch.nn.Linear(1, 1)}  # noqa: RUF012

    with pytest.raises(errors.NotApplicable, match="looked for transformer"):
        hf_accel.apply(Empty(), "svg2")


def tiny_output(model):
    with torch.no_grad():
        return tiny.run(model, "wan")
