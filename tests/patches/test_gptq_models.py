"""``gptq`` on models: calibrated block by block, reported layer by layer, resumed, undone or deliberately not."""

from __future__ import annotations

import copy
import json
import weakref

import pytest
import torch

import hf_accel
from hf_accel.errors import InvalidSetting, NotApplicable, NothingPatched, QuantizationError, RevertRefused
from hf_accel.installing import installed
from hf_accel.patches.gptq import GPTQ, GPTQConfig
from hf_accel.quant.gptq_solver import gptq_solve, round_to_nearest
from hf_accel.quant.packed_linear import PackedLinear
from hf_accel.sites.linear.places import find_linears
from hf_accel.sites.linear.stream import LayerStream
from hf_accel.testing.compare import fingerprint
from hf_accel.testing.models import tiny

QUIET = {"group_size": 32, "progress": False}


def llama(seed=0, **config):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    small = {"vocab_size": 60, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    model = LlamaForCausalLM(
        LlamaConfig(**small | {"num_attention_heads": 4, "num_key_value_heads": 2} | config)
    ).eval()
    # Inputs as trained models have them: correlated, and some far larger than others.
    with torch.no_grad():
        mix = torch.randn(8, 64) @ torch.diag(torch.logspace(0, 1.5, 64))
        model.model.embed_tokens.weight.copy_(torch.randn(60, 8) @ mix + 0.1 * torch.randn(60, 64))
    return model


def ids(rows=6, length=24, seed=0):
    return torch.randint(0, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def quantised(model, **settings):
    settings = QUIET | {"calibration": ids()} | settings
    if settings.get("rounding") == "nearest":
        del settings["calibration"]
    return hf_accel.apply(model, "gptq", **settings)


@torch.no_grad()
def logits(model, tokens=None):
    return model(ids(seed=7) if tokens is None else tokens).logits


def off(model, dense, **settings):
    """Relative error of the logits."""
    with quantised(model, **settings):
        return float((logits(model) - dense).norm() / dense.norm())


def run_of(applied):
    return applied.report().entries[0].run


def packed(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


# -- what is computed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_less_is_lost_than_by_rounding_to_nearest(bits):
    model = llama()
    dense = logits(model)
    ours, nearest = off(model, dense, bits=bits), off(model, dense, bits=bits, rounding="nearest")
    assert ours < 0.8 * nearest
    assert torch.equal(logits(model), dense)


def test_more_bits_lose_less():
    model = llama()
    dense = logits(model)
    lost = [off(model, dense, bits=bits) for bits in (2, 3, 4, 8)]
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < 0.02


@pytest.mark.parametrize(
    ("settings", "fixed"),
    [
        ({"bits": 2}, True),
        ({"bits": 3}, False),
        ({"bits": 4}, False),
        ({"bits": 8}, False),
        ({"bits": 4, "act_order": True}, True),
        ({"bits": 2, "static_groups": False}, False),
        ({"bits": 2, "act_order": True, "static_groups": False}, False),
        ({"bits": 4, "static_groups": True}, True),
    ],
    ids=str,
)
def test_when_grids_are_fitted_follows_bits_and_order(settings, fixed):
    assert GPTQConfig(**settings).fixed_grids is fixed


@pytest.mark.parametrize(
    ("settings", "static_groups"),
    [
        ({"bits": 2}, False),
        ({"bits": 2, "static_groups": None}, False),
        ({"bits": 2, "static_groups": True}, True),
        ({"bits": 2, "act_order": True}, None),
        ({"bits": 4}, None),
    ],
    ids=str,
)
def test_settings_of_version_1_mean_what_they_meant(settings, static_groups):
    old = GPTQConfig.from_dict({"method": "gptq", "version": 1, "settings": settings})
    assert old.static_groups is static_groups
    assert GPTQConfig.from_dict(old.to_dict()) == old
    now = GPTQConfig.from_dict({"method": "gptq", "version": 2, "settings": settings})
    assert now.static_groups is settings.get("static_groups")


def test_a_checkpoint_says_when_grids_were_fitted():
    for settings in ({"bits": 2}, {"bits": 4}, {"bits": 2, "rounding": "nearest"}):
        model = llama()
        quantised(model, **settings)
        told = model.config.quantization_config
        told = told if isinstance(told, dict) else told.to_dict()
        assert told["static_groups"] is (settings == {"bits": 2})


@pytest.mark.parametrize(
    "settings", [{}, {"bits": 2}, {"act_order": True}, {"act_order": True, "static_groups": False}], ids=str
)
def test_every_layer_is_the_solvers(settings):
    """The second block's Gram matrices are those behind a first block that is quantised already."""
    model = llama()
    plain = copy.deepcopy(model)
    with quantised(model, **{"bits": 3} | settings):
        codes = {name: module.codes() for name, module in packed(model).items()}
        where = {name: module.g_idx for name, module in packed(model).items()}
        config = next(iter(model.__dict__["_hf_accel"])).method.config
        half = copy.deepcopy(model)
    half.model.layers[1] = plain.model.layers[1]
    samples = [{"input_ids": row[None], "use_cache": False} for row in ids()]
    for source, block in ((plain, 0), (half, 1)):
        sites = [s for s in find_linears(source) if s.name.startswith(f"model.layers.{block}.")]
        for site in sites:
            rows = []
            hook = site.module.register_forward_pre_hook(lambda module, args, rows=rows: rows.append(args[0]))
            with torch.no_grad():
                for sample in samples:
                    source(**sample)
            hook.remove()
            x = torch.cat([r.reshape(-1, site.in_features) for r in rows])
            fixed = config.fixed_grids
            gram = 2 / len(x) * x.T @ x
            expected = gptq_solve(site.weight, gram, config.scheme, act_order=config.act_order, static_groups=fixed)
            same = (codes[site.name] == expected.codes).float().mean()
            assert same > 0.98, site.name  # sums in another order put ties elsewhere
            assert torch.equal(where[site.name], expected.g_idx)


@pytest.mark.parametrize(
    "settings",
    [{"act_order": True}, {"true_sequential": True}, {"search": True}, {"sym": True}, {"magr": True},
     {"coordinate_descent": 3}, {"magr": True, "coordinate_descent": 3, "shrink": 0.95}, {"gram_dtype": "float64"}],
    ids=str,
)  # fmt: skip
def test_options_run_and_beat_rounding_to_nearest(settings):
    model = llama()
    dense = logits(model)
    sym = {"sym": settings.get("sym", False)}
    assert off(model, dense, bits=3, **settings) < 0.8 * off(model, dense, bits=3, rounding="nearest", **sym)


def test_coordinate_descent_lowers_the_error_of_every_layer():
    """On the inputs alone: with an inflated diagonal it lowers something else."""
    model = llama()
    found = []
    for sweeps in (0, 1, 10):
        with quantised(model, bits=2, coordinate_descent=sweeps, descent_inflation=0.0) as applied:
            found.append([layer.output_error for layer in run_of(applied).layers if ".0." in layer.name])
    for none, one, many in zip(*found, strict=True):
        assert many <= one < none


def test_magr_makes_the_largest_weights_smaller():
    model = llama()
    largest = []
    for settings in ({}, {"magr": True, "magr_alpha": 1e-3}):
        with quantised(model, bits=4, **settings):
            largest.append(sum(float(module.grid().scale.mean()) for module in packed(model).values()))
    assert largest[1] < 0.95 * largest[0]


def test_rounding_to_nearest_needs_no_calibration():
    model = llama()
    with hf_accel.apply(model, "gptq", rounding="nearest", bits=4, group_size=32) as applied:
        for site in find_linears(model):
            assert site.kind == "packed"
        record = run_of(applied).layers[0]
        assert (record.tokens, record.why_nearest) == (0, "")
        assert "output error" not in str(record)
        ours = packed(model)["model.layers.0.mlp.up_proj"].codes()
    weight = model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(ours, round_to_nearest(weight, GPTQ.Config(bits=4, group_size=32).scheme).codes)


# -- hosts ---------------------------------------------------------------------------------------------------------


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()


def t5():
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=60)
    return T5EncoderModel(config).eval()


@pytest.mark.parametrize("build", [gpt2, t5], ids=["conv1d", "text-encoder"])
@torch.no_grad()
def test_language_models_and_text_encoders(build):
    model = build()
    before, dense = fingerprint(model), model(ids(seed=7))[0]
    errors = []
    for settings in ({"calibration": ids()}, {"rounding": "nearest"}):
        with hf_accel.apply(model, "gptq", bits=4, **QUIET, **settings) as applied:
            errors.append(float((model(ids(seed=7))[0] - dense).norm() / dense.norm()))
            kinds = {layer.role for layer in run_of(applied).layers}
    assert errors[0] < errors[1] < 0.5
    assert {"up", "down", "output"} <= kinds
    assert fingerprint(model) == before
    assert torch.equal(model(ids(seed=7))[0], dense)


@pytest.mark.parametrize("family", ["wan", "flux", "unet"])
@torch.no_grad()
def test_denoisers_by_forwards_and_by_a_function(family):
    model = tiny.build(family)
    before, dense = fingerprint(model), tiny.run(model, family, seed=9)
    given = [tiny.TINY[family].inputs(model, timestep=t, seed=i) for i, t in enumerate((900.0, 500.0, 100.0))]

    def generate():
        for inputs in given:
            model(**inputs)

    outs = []
    for calibration in (given, generate):
        with hf_accel.apply(model, "gptq", bits=4, calibration=calibration, **QUIET) as applied:
            outs.append(tiny.run(model, family, seed=9))
            assert any(layer.tokens for layer in run_of(applied).layers)
    assert torch.equal(*outs)
    assert (outs[0] - dense).norm() < 0.3 * dense.norm()
    assert fingerprint(model) == before


@torch.no_grad()
def test_an_expert_that_saw_nothing_is_rounded_to_nearest_and_named():
    model = llama()
    model.model.layers[0].mlp.spare = torch.nn.Linear(64, 96)
    with pytest.warns(UserWarning, match=r"1 of \d+ linears to nearest: model\.layers\.0\.mlp\.spare"):
        applied = quantised(model)
    record = next(layer for layer in run_of(applied).layers if layer.name.endswith("spare"))
    assert record.why_nearest == "no calibration token reached it"
    assert "nearest   1 x no calibration token reached it" in str(applied.report())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_scales_are_in_the_dtype_of_the_weights(dtype):
    model = llama().to(dtype)
    dense = logits(model).float()
    with quantised(model, bits=8):
        assert {module.scales.dtype for module in packed(model).values()} == {dtype}
        assert (logits(model).float() - dense).norm() < 0.05 * dense.norm()


# -- the report ----------------------------------------------------------------------------------------------------


def test_the_report_tells_of_every_layer():
    model = llama()
    with quantised(model, bits=3, damping=0.02) as applied:
        told, text = applied.report().to_dict()["entries"][0], str(applied.report())
        layers = told["run"]["layers"]
        assert [layer["name"] for layer in layers] == [p["module"] for p in told["patched"]]
        assert [site.name for site in find_linears(model)] == [layer["name"] for layer in layers]
        assert json.loads(json.dumps(told["run"])) == told["run"]
        for layer in layers:
            assert layer["tokens"] == 6 * 24
            assert 0 < layer["output_error"] < layer["weight_error"] < 1
            assert layer["loss"] > 0
            assert layer["damping"] == 0.02
            assert layer["name"] in text
        weights = sum(site.in_features * site.out_features for site in find_linears(model))
        assert told["run"]["bits_per_weight"] == pytest.approx(8 * told["run"]["packed_bytes"] / weights)
    assert "calibration: 6 sequences, 144 tokens, 24 in the longest" in text


def test_damping_that_was_raised_is_told():
    """More inputs than tokens, and hardly any damping to begin with."""
    model = llama()
    with quantised(model, calibration=ids(1, 8), damping=1e-12) as applied:
        raised = [layer for layer in run_of(applied).layers if layer.retries]
        assert raised
        assert all(f"damping {layer.damping:g} after {layer.retries} retries" in str(layer) for layer in raised)


# -- full weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("original", ["keep", "offload"])
def test_what_is_kept_comes_back(original):
    model = llama()
    before, dense = fingerprint(model), logits(model)
    weights = [p.data_ptr() for p in model.parameters()]
    applied = quantised(model, original=original)
    assert fingerprint(model) != before
    applied.revert()
    assert fingerprint(model) == before
    assert torch.equal(logits(model), dense)
    assert [p.data_ptr() for p in model.parameters()] == weights


def test_what_was_dropped_is_gone_and_says_so():
    model = llama()
    linear = model.model.layers[0].mlp.up_proj
    applied = quantised(model, original="drop")
    ours = logits(model)
    assert linear.weight is None
    with pytest.raises(RevertRefused, match="load the model again"):
        applied.revert()
    with pytest.raises(RevertRefused, match="dropped"):
        quantised(model, bits=2)
    assert torch.equal(logits(model), ours)
    assert applied.active


@pytest.mark.parametrize("original", ["keep", "offload"])
def test_a_failure_at_the_end_finds_the_full_weights_still_there(monkeypatch, original):
    model = llama()
    before, dense = fingerprint(model), logits(model)

    def fails(*args, **kwargs):
        raise RuntimeError("declared badly")

    monkeypatch.setattr("hf_accel.patches.gptq.declare", fails)
    with pytest.raises(RuntimeError, match="declared badly"):
        quantised(model, original=original)
    assert fingerprint(model) == before
    assert torch.equal(logits(model), dense)


@pytest.mark.parametrize("settings", [{}, {"rounding": "nearest"}], ids=["by-blocks", "nearest"])
def test_dropped_weights_go_as_soon_as_they_are_packed(monkeypatch, settings):
    """Beside the full model there is never more than one block's packed weights (to nearest: one layer's)."""
    model = llama(num_hidden_layers=4)
    full = {site.name: weakref.ref(site.module.weight) for site in find_linears(model)}
    alive, from_codes = [], PackedLinear.from_codes.__func__

    def counted(cls, *args, **kwargs):
        alive.append(sum(ref() is not None for ref in full.values()))
        return from_codes(cls, *args, **kwargs)

    monkeypatch.setattr(PackedLinear, "from_codes", classmethod(counted))
    quantised(model, original="drop", **settings)
    together = 1 if "rounding" in settings else 7
    assert alive == [len(full) - i // together * together for i in range(len(full))]
    assert all(ref() is None for ref in full.values())
    alive.clear()
    model = llama()
    full = {site.name: weakref.ref(site.module.weight) for site in find_linears(model)}
    quantised(model, original="keep", **settings)
    assert alive == [len(full)] * len(full)


def stop_at(monkeypatch, number):
    """Ctrl-C while layer ``number`` is being put in its place."""
    record, calls = GPTQ._record, []

    def some(self, *args):
        calls.append(args)
        if len(calls) == number + 1:
            raise KeyboardInterrupt
        record(self, *args)

    monkeypatch.setattr(GPTQ, "_record", some)


@pytest.mark.parametrize("settings", [{}, {"true_sequential": True, "act_order": True}], ids=str)
def test_an_interrupted_drop_leaves_whole_blocks_and_is_finished_by_the_same_call(monkeypatch, tmp_path, settings):
    from hf_accel.checkpoints.gptq.loading import load_quantized

    model = llama(num_hidden_layers=3)
    unfinished = model.model.layers[1:]
    before = fingerprint(unfinished)
    with quantised(model, **settings):
        expected = logits(model)
    with monkeypatch.context() as patch:
        stop_at(patch, 7 + 3)  # in the second block
        with pytest.raises(KeyboardInterrupt) as stopped:
            quantised(model, original="drop", **settings)
    assert "7 linears are packed for good" in "".join(stopped.value.__notes__)
    assert {name.split(".")[2] for name in packed(model)} == {"0"}
    assert fingerprint(unfinished) == before
    assert not installed(model)
    half = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.allclose(logits(load_quantized(tmp_path)), half, atol=1e-5)
    applied = quantised(model, original="drop", **settings)
    assert torch.equal(logits(model), expected)
    assert len(run_of(applied).layers) == 14


@pytest.mark.parametrize("number", [0, 3])
def test_an_interrupt_before_anything_was_dropped_is_undone(monkeypatch, number):
    model = llama()
    before, dense = fingerprint(model), logits(model)
    stop_at(monkeypatch, number)
    with pytest.raises(KeyboardInterrupt) as stopped:
        quantised(model, original="drop")
    assert not getattr(stopped.value, "__notes__", [])
    assert fingerprint(model) == before
    assert torch.equal(logits(model), dense)


def test_a_drop_that_fails_brings_back_the_run_that_it_was_to_replace(monkeypatch):
    model = llama()
    first = quantised(model, bits=4)
    ours = logits(model)
    record, calls = GPTQ._record, []

    def fails_once(self, *args):
        calls.append(args)
        if len(calls) == 7 + 3:
            raise RuntimeError("out of memory")
        record(self, *args)

    monkeypatch.setattr(GPTQ, "_record", fails_once)
    with pytest.raises(RuntimeError, match="out of memory"):
        quantised(model, bits=2, original="drop")
    assert torch.equal(logits(model), ours)
    del first
    hf_accel.revert(model)
    quantised(model, bits=4)
    quantised(model, bits=2, original="drop")
    with pytest.raises(RevertRefused, match="14 linears were dropped"):
        hf_accel.revert(model)


def test_a_saved_model_is_the_quantised_one(tmp_path):
    from hf_accel.checkpoints.gptq.loading import load_quantized

    model = llama()
    with quantised(model, act_order=True, static_groups=False):
        ours = logits(model)
        model.save_pretrained(tmp_path)
    again = load_quantized(tmp_path)
    assert packed(again)
    assert torch.allclose(logits(again), ours, atol=1e-5)


# -- resuming ------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def interrupt(monkeypatch, after):
    """Stop when so many blocks are done."""
    whole = LayerStream.__iter__

    def some(self):
        for number, unit in enumerate(whole(self)):
            if number == after:
                raise Interrupted
            yield unit

    monkeypatch.setattr(LayerStream, "__iter__", some)


@pytest.mark.parametrize(
    "settings", [{}, {"true_sequential": True, "act_order": True, "static_groups": False}], ids=str
)
def test_an_interrupted_run_goes_on_where_it_stopped(monkeypatch, tmp_path, settings):
    model = llama(num_hidden_layers=3)
    before = fingerprint(model)
    with quantised(model, **settings) as applied:
        expected, told = logits(model), run_of(applied).to_dict()
    with monkeypatch.context() as patch:
        interrupt(patch, after=2)
        with pytest.raises(Interrupted):
            quantised(model, resume_dir=tmp_path / "run", **settings)
    assert fingerprint(model) == before
    assert len(list((tmp_path / "run").glob("*.safetensors"))) == 2
    gathered = []
    with monkeypatch.context() as patch:
        solve = GPTQ._quantise
        patch.setattr(GPTQ, "_quantise", lambda self, g, ledger: gathered.append(g) or solve(self, g, ledger))
        with quantised(model, resume_dir=tmp_path / "run", **settings) as applied:
            assert torch.equal(logits(model), expected)
            assert run_of(applied).to_dict() == told
            assert any("2 blocks read from" in note for note in applied.report().entries[0].notes)
    assert {site.name.split(".")[2] for g in gathered for site in g.sites} == {"2"}
    with quantised(model, resume_dir=tmp_path / "run", **settings):
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"bits": 3}, r"bits \(4 there\)"), ({"calibration": ids(seed=1)}, "samples"), ({"damping": 0.1}, "damping")],
    ids=["bits", "samples", "damping"],
)
def test_a_folder_of_another_run_is_refused(tmp_path, change, words):
    model = llama()
    quantised(model, resume_dir=tmp_path).revert()
    with pytest.raises(InvalidSetting, match=words):
        quantised(model, resume_dir=tmp_path, **change)
    with pytest.raises(InvalidSetting, match="weights"):
        quantised(llama(seed=1), resume_dir=tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(InvalidSetting, match=r"thesis\.txt"):
        quantised(llama(), resume_dir=tmp_path)


# -- bad input -----------------------------------------------------------------------------------------------------


def test_without_calibration_it_says_what_to_do():
    with pytest.raises(InvalidSetting, match="rounding='nearest'"):
        hf_accel.apply(llama(), "gptq")


def test_a_group_size_that_does_not_divide_names_layers_and_sizes():
    model = llama()
    before = fingerprint(model)
    with pytest.raises(InvalidSetting, match=r"mlp\.down_proj has 96.*1 more.*32 and -1"):
        quantised(model, group_size=64)
    assert fingerprint(model) == before
    with quantised(model, group_size=64, exclude=["down"]) as applied:
        assert len(run_of(applied).layers) == 12
    with pytest.raises(InvalidSetting, match="positive"):
        quantised(model, group_size=0)


def test_convolutions_stay_and_are_named():
    model = tiny.build("unet")
    names = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)}
    assert {"conv_in", "down_blocks.0.resnets.0.conv1"} <= names
    with hf_accel.apply(model, "gptq", bits=4, rounding="nearest", **QUIET) as applied:
        told = applied.report().entries[0]
    reason = "a convolution: the packed layout is for linears"
    assert {s.module for s in told.skipped if s.reason == reason} == names
    assert f"skipped   {len(names)} x {reason}" in str(told)
    with hf_accel.apply(model, "gptq", bits=4, rounding="nearest", targets=["query"], **QUIET) as applied:
        assert reason not in {s.reason for s in applied.report().entries[0].skipped}
    with pytest.raises(InvalidSetting, match="a linear of this model"):
        hf_accel.apply(model, "gptq", bits=4, rounding="nearest", targets=["conv_in"], **QUIET)


def test_sizes_without_a_place_in_the_layout_stay_and_are_named():
    model = llama(num_key_value_heads=1)
    with quantised(model) as applied:
        skipped = applied.report().entries[0].skipped
    assert {s.module.rpartition(".")[2] for s in skipped} == {"k_proj", "v_proj"}
    assert {s.reason for s in skipped} == {"16 outputs: the layout packs runs of 32"}
    odd = llama(num_key_value_heads=1)
    with pytest.raises(NothingPatched, match="16 outputs"):
        quantised(odd, targets=["key", "value"])


def test_targets_and_exclude():
    model = llama()
    with quantised(model, targets=["up", "down"], exclude="model.layers.0.*"):
        assert set(packed(model)) == {"model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"}
    with pytest.raises(InvalidSetting, match="upp"):
        quantised(model, targets="upp")


def test_a_base_quantised_by_others_is_left_alone_or_refused():
    class Foreign(torch.nn.Module):
        in_features, out_features = 64, 96

        def __init__(self):
            super().__init__()
            self.register_buffer("words", torch.zeros(4, dtype=torch.int8))

        def forward(self, x):
            return x.new_zeros(*x.shape[:-1], 96)

    model = llama()
    for layer in model.model.layers:
        layer.mlp.up_proj = Foreign()
    with quantised(model) as applied:
        reasons = {s.module: s.reason for s in applied.report().entries[0].skipped}
    assert "another library" in reasons["model.layers.0.mlp.up_proj"]
    with pytest.raises(NothingPatched, match="another library"):
        quantised(model, targets=["up"])


def test_what_is_packed_already_is_refused():
    model = llama()
    quantised(model)
    whole = copy.deepcopy(model)
    del whole.__dict__["_hf_accel"]  # as if it had been loaded like this
    with pytest.raises(NotApplicable, match="packed already"):
        quantised(whole)


def test_nan_in_calibration_and_in_weights_name_the_layer():
    model = llama()
    dense = fingerprint(model)
    model.model.layers[1].mlp.gate_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(QuantizationError, match=r"model\.layers\.1\.mlp\.gate_proj"):
        quantised(model)
    assert fingerprint(model) == dense
    broken = llama()
    broken.model.layers[0].input_layernorm.weight.data[3] = float("inf")
    with pytest.raises(QuantizationError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        quantised(broken)


def test_settings_as_yaml_has_them():
    config = GPTQ.Config.build({"targets": ["up", "down"], "exclude": []})
    assert config == GPTQ.Config(targets=("up", "down"))
    assert GPTQ.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
