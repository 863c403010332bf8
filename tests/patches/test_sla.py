"""The method ``sla``: its block classes, its parameters in the model, its side file."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hub_server import HubServer
from safetensors.torch import load_file

import hf_accel
from hf_accel.attention.call import AttentionCall, Layer, Step, TokenGrid
from hf_accel.attention.layout import expand_block_map
from hf_accel.checkpoints import parameters
from hf_accel.errors import Conflict, InvalidSetting, WeightsMismatch
from hf_accel.patches.sla import SLA, SLAConfig
from hf_accel.testing.models import tiny

SIZE = (5, 16, 16)  # latents of the tiny Wan: 320 tokens, five blocks of 64


def attention_call(sequence: int = 320, grid: TokenGrid | None = None, mask=None, heads: int = 2, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, heads, sequence, 16, generator=generator) for _ in range(3))
    step = Step(0, None, 500.0, 0.0, "cond", 0)
    scale = 0.25

    def dense():
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)

    return AttentionCall(query, key, value, mask, scale, False, Layer("x", 0, 1), grid, step, dense)


def method(**settings) -> SLA:
    """A method without a model, whose one layer projects by zero."""
    made = SLA(SLAConfig(**settings))
    made._names = ["x"]
    projection = torch.nn.Linear(16, 16)
    torch.nn.init.zeros_(projection.weight)
    torch.nn.init.zeros_(projection.bias)
    made._projections = [projection.train()]
    return made


def labels(sequence: int, size: int = 64) -> torch.Tensor:
    return (torch.arange(sequence) // size).expand(1, 1, -1)


@torch.no_grad()
def train_by_hand(model) -> None:
    """proj_l as training would leave it: not zero."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "proj_l" in name:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


# -- block classes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("topk", "expected"), [(0.01, 1), (0.2, 1), (0.4, 2), (0.6, 3), (0.99, 4), (1.0, 5)])
def test_every_row_keeps_the_same_number_of_blocks(topk, expected):
    critical = method(topk=topk).classify(attention_call()).critical
    assert critical.shape == (1, 2, 5, 5)
    assert (critical.sum(-1) == expected).all()


def test_the_map_does_not_see_a_constant_added_to_all_keys():
    call, moved = attention_call(), attention_call()
    moved.key = moved.key + torch.linspace(-4, 4, 16)
    for settings in ({"topk": 0.4}, {"topk": 0.2, "linear_scope": "marginal", "k_l": 0.4}):
        ours, theirs = method(**settings).classify(call), method(**settings).classify(moved)
        assert torch.equal(ours.critical, theirs.critical)
        assert ours.negligible is None or torch.equal(ours.negligible, theirs.negligible)


def test_the_map_keeps_the_largest_products_of_block_means():
    call = attention_call()
    means = [x.unflatten(2, (5, 64)).mean(3) for x in (call.query, call.key)]
    best = (means[0] @ means[1].mT).argmax(-1)
    critical = method(topk=0.2).classify(call).critical
    assert torch.equal(critical.int().argmax(-1), best)


def test_negligible_blocks_are_the_last_and_never_critical():
    classes = method(topk=0.4, k_l=0.4, linear_scope="marginal").classify(attention_call())
    assert (classes.negligible.sum(-1) == 2).all()
    assert not (classes.negligible & classes.critical).any()
    # Where critical and negligible shares add up to more than all, the critical ones stay.
    classes = method(topk=0.8, k_l=0.9, linear_scope="marginal").classify(attention_call())
    assert (classes.critical.sum(-1) == 4).all()
    assert (classes.negligible.sum(-1) == 1).all()


@pytest.mark.parametrize("text", ["first", "last"])
def test_text_is_critical_for_all_and_sees_all(text):
    grid = TokenGrid(4, 8, 8, text)
    critical = method(topk=0.26).classify(attention_call(256 + 64 + 6, grid)).critical[0, 0]
    with_text = [0, 1] if text == "first" else [4, 5]
    video = [i for i in range(6) if i not in with_text]
    assert critical[with_text].all()
    assert critical[:, with_text].all()
    # floor(0.26 * 4) = 1 of the blocks without text.
    assert (critical[video][:, video].sum(-1) == 1).all()


def test_hidden_text_takes_no_part_in_either_branch():
    grid = TokenGrid(4, 8, 8, "last")
    mask = torch.ones(1, 1, 1, 276, dtype=torch.bool)
    mask[..., 270:] = False
    for scope in ("rest", "marginal", "all"):
        outputs = []
        for junk in (0.0, 50.0):
            call = attention_call(276, grid, mask)
            call.key[:, :, 270:] += junk
            call.value[:, :, 270:] += junk
            sla = method(topk=0.3, linear_scope=scope)
            torch.nn.init.ones_(sla._projections[0].weight)
            outputs.append(sla.attend(call, None)[:, :, :256])
        assert torch.allclose(*outputs, atol=1e-6), scope


# -- the whole method ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["rest", "marginal", "all"])
def test_full_budget_and_zero_projection_is_dense(scope):
    call = attention_call(331)
    out = method(topk=1.0, linear_scope=scope).attend(call, None)
    assert torch.allclose(out, call.dense(), atol=1e-5)


@pytest.mark.parametrize("scope", ["rest", "marginal", "all"])
@pytest.mark.parametrize("sequence", [320, 331])
def test_equals_its_definition(scope, sequence):
    call = attention_call(sequence)
    sla = method(topk=0.4, k_l=0.2, linear_scope=scope)
    projection = sla._projections[0]
    torch.nn.init.normal_(projection.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    torch.nn.init.constant_(projection.bias, 0.1)
    classes = sla.classify(call)
    marginal = {
        "rest": ~classes.critical,
        "marginal": ~classes.critical & ~(classes.negligible if classes.negligible is not None else False),
        "all": torch.ones_like(classes.critical),
    }[scope]
    where = labels(sequence).expand(1, 2, -1)
    critical, linear = (expand_block_map(m, where, where) for m in (classes.critical, marginal))
    exact = F.scaled_dot_product_attention(call.query, call.key, call.value, critical, scale=call.scale)
    weights = (call.query.softmax(-1) @ call.key.softmax(-1).mT) * linear
    estimate = (weights / weights.sum(-1, keepdim=True)) @ call.value
    expected = exact + projection(estimate)
    assert torch.allclose(sla.attend(call, None), expected, atol=2e-5)
    assert call.notes["density"].mean() == pytest.approx(critical.float().mean().item(), abs=1e-6)


def test_first_gradients():
    """A zero projection lets no gradient through to the linear branch, but itself gets some."""
    call = attention_call()
    for tensor in (call.query, call.key, call.value):
        tensor.requires_grad_()
    sla = method(topk=0.4)
    target = torch.randn(call.query.shape, generator=torch.Generator().manual_seed(9))
    sla.attend(call, None).backward(target)
    ours = [t.grad.clone() for t in (call.query, call.key, call.value)]
    assert sla._projections[0].weight.grad.abs().max() > 0.1
    assert sla._projections[0].bias.grad.abs().max() > 0.1

    where = labels(320).expand(1, 2, -1)
    mask = expand_block_map(sla.classify(call).critical, where, where)
    for tensor in (call.query, call.key, call.value):
        tensor.grad = None
    F.scaled_dot_product_attention(call.query, call.key, call.value, mask, scale=call.scale).backward(target)
    for grad, tensor in zip(ours, (call.query, call.key, call.value), strict=True):
        assert torch.allclose(grad, tensor.grad, atol=1e-5)


def test_gradients_of_a_compiled_model_reach_the_projection():
    model = tiny.build("wan")

    def gradients(of):
        model.zero_grad()
        tiny.run(of, "wan", size=SIZE).square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    with hf_accel.apply(model, "sla", topk=0.4) as applied:
        train_by_hand(model)
        eager = gradients(model)
        torch._dynamo.reset()
        compiled = gradients(torch.compile(model, backend="aot_eager"))
        assert not applied.report().entries[0].run.dense_calls
    torch._dynamo.reset()
    assert eager.keys() == compiled.keys()
    assert all(torch.allclose(eager[n], compiled[n], atol=1e-6) for n in eager)
    assert eager["blocks.0.attn1.proj_l.weight"].any()


def test_a_grid_of_another_length_is_no_reason_to_stop():
    call = attention_call(320, TokenGrid(3, 8, 8, "none"))
    assert (method(topk=0.4).classify(call).critical.sum(-1) == 2).all()


def test_per_query_masks_run_dense():
    call = attention_call(mask=torch.ones(1, 1, 320, 320, dtype=torch.bool).tril())
    assert torch.equal(method().attend(call, None), call.dense())
    assert "differs between queries" in call.notes["fallback"]


# -- parameters in the model ---------------------------------------------------------------------------------------


def test_the_projection_is_part_of_the_model_while_it_stands():
    model = tiny.build("wan")
    before = list(model.state_dict())
    applied = hf_accel.apply(model, "sla", topk=0.4)
    added = [name for name in model.state_dict() if name not in before]
    assert added == [f"blocks.{i}.attn1.proj_l.{kind}" for i in (0, 1) for kind in ("weight", "bias")]
    projection = model.blocks[0].attn1.proj_l
    assert projection.weight.shape == (16, 16)
    assert projection.weight.dtype == torch.float32
    assert not projection.weight.any()
    assert not projection.bias.any()
    model.to(torch.float64)
    assert projection.weight.dtype == torch.float64
    model.to(torch.float32)
    applied.revert()
    assert list(model.state_dict()) == before
    assert not hasattr(model.blocks[0].attn1, "proj_l")


def test_a_bf16_model_has_a_projection_in_fp32():
    model = tiny.build("wan").bfloat16()
    with hf_accel.apply(model, "sla"):
        assert model.blocks[0].attn1.proj_l.weight.dtype == torch.float32
        assert model.dtype == torch.bfloat16


@torch.no_grad()
def test_a_copy_has_its_own_projection():
    model = tiny.build("wan")
    hf_accel.apply(model, "sla", topk=0.2)
    train_by_hand(model)
    ours = tiny.run(model, "wan", size=SIZE)
    twin = copy.deepcopy(model)
    assert torch.equal(tiny.run(twin, "wan", size=SIZE), ours)
    twin.blocks[0].attn1.proj_l.weight.zero_()
    assert not torch.equal(tiny.run(twin, "wan", size=SIZE), ours)
    assert torch.equal(tiny.run(model, "wan", size=SIZE), ours)
    hf_accel.revert(twin)
    assert torch.equal(tiny.run(model, "wan", size=SIZE), ours)


def test_a_taken_name_is_refused_and_nothing_changed():
    model = tiny.build("wan")
    model.blocks[1].attn1.proj_l = torch.nn.Identity()
    names = list(dict(model.named_modules()))
    with pytest.raises(Conflict, match="proj_l exists already, a Identity"):
        hf_accel.apply(model, "sla")
    assert list(dict(model.named_modules())) == names
    assert "_hf_accel" not in model.__dict__


@torch.no_grad()
def test_another_budget_keeps_what_was_trained_and_other_blocks_do_not():
    model = tiny.build("wan")
    hf_accel.apply(model, "sla", topk=0.2)
    train_by_hand(model)
    trained_weight = model.blocks[0].attn1.proj_l.weight
    hf_accel.apply(model, "sla", topk=0.4)
    assert model.blocks[0].attn1.proj_l.weight is trained_weight
    hf_accel.apply(model, "sla", topk=0.4, block_q=128)
    assert not model.blocks[0].attn1.proj_l.weight.any()
    hf_accel.revert(model)


def test_a_failed_second_apply_leaves_the_trained_parameters():
    model = tiny.build("wan")
    hf_accel.apply(model, "sla", topk=0.2)
    train_by_hand(model)
    weight = model.blocks[0].attn1.proj_l.weight
    with pytest.raises(WeightsMismatch, match="no weights at"):
        hf_accel.apply(model, "sla", weights="./nowhere")
    assert model.blocks[0].attn1.proj_l.weight is weight
    assert weight.any()


def test_untrained_weights_are_warned_of_once():
    model = tiny.build("wan")
    applied = hf_accel.apply(model, "sla", topk=0.4)
    with torch.no_grad(), pytest.warns(UserWarning, match="sla runs untrained"):
        tiny.run(model, "wan", size=SIZE)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.run(model, "wan", size=SIZE)
    assert "proj_l was zero when applied" in str(applied.report())
    for settings, trained_already in (({"topk": 1.0}, False), ({"topk": 0.4}, True)):
        hf_accel.revert(model)
        hf_accel.apply(model, "sla", **settings)
        if trained_already:
            train_by_hand(model)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            tiny.run(model, "wan", size=SIZE)


def test_lora_by_the_usual_names_leaves_the_projection_alone():
    from peft import LoraConfig

    model = tiny.build("wan")
    with hf_accel.apply(model, "sla"):
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0", "proj_out"]))
        assert type(model.blocks[0].attn1.proj_l) is torch.nn.Linear


# -- the side file -------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A folder with trained weights and the output of the model that they belong to."""
    model = tiny.build("wan")
    hf_accel.apply(model, "sla", topk=0.4, linear_scope="all")
    train_by_hand(model)
    with torch.no_grad():
        out = tiny.run(model, "wan", size=SIZE)
    hf_accel.save_trained(model, tmp_path / "sla")
    return tmp_path / "sla", out


@torch.no_grad()
def test_saved_weights_come_back_exactly(saved):
    folder, expected = saved
    assert sorted(p.name for p in folder.iterdir()) == ["hf_accel.yaml", "hf_accel_sla.safetensors"]
    for load in (
        lambda m: hf_accel.apply(m, str(folder)),
        lambda m: hf_accel.apply(m, "sla", weights=str(folder), topk=0.4, linear_scope="all"),
        lambda m: hf_accel.load_trained(m, folder),
    ):
        model = tiny.build("wan")
        dense = tiny.run(model, "wan", size=SIZE)
        applied = load(model)
        assert torch.equal(tiny.run(model, "wan", size=SIZE), expected)
        assert f"weights from {folder}\n" in f"{applied.report()}\n"
        applied.revert()
        assert torch.equal(tiny.run(model, "wan", size=SIZE), dense)


def test_saved_weights_come_from_the_hub(saved, tmp_path):
    folder, expected = saved
    script = (
        "import sys, torch, tiny, hf_accel\n"
        "model = tiny.build('wan')\n"
        "applied = hf_accel.apply(model, 'acme/my-sla')\n"
        "with torch.no_grad():\n"
        "    out = tiny.run(model, 'wan', size=(5, 16, 16))\n"
        "own = {name: p for name, p in model.state_dict().items() if '.proj_l.' in name}\n"
        "torch.save((own, out), sys.argv[1])\n"
        "print(applied.report())\n"
    )
    with HubServer() as hub:
        commit = hub.commit("acme/my-sla", {"hf_accel.yaml": (folder / "hf_accel.yaml").read_text()})
        weights = (folder / "hf_accel_sla.safetensors").read_bytes()
        hub.repos["acme/my-sla"].commits[commit]["hf_accel_sla.safetensors"] = weights
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "out.pt")],
            env=clean | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"},
            cwd=Path(tiny.__file__).parent, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    own, out = torch.load(tmp_path / "out.pt")
    trained = load_file(folder / "hf_accel_sla.safetensors")
    assert own.keys() == trained.keys()
    assert all(torch.equal(own[name], trained[name]) for name in own)
    # The weights are exact. What another process computes with them may be rounded otherwise, patched or not.
    assert torch.allclose(out, expected, atol=1e-5, rtol=1e-5)
    assert f"weights from acme/my-sla@{commit}" in done.stdout


def test_the_report_says_at_which_budget_weights_were_trained(saved):
    applied = hf_accel.load_trained(tiny.build("wan"), saved[0], topk=0.6, backend="torch")
    assert "trained with topk=0.4\n" in f"{applied.report()}\n"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"linear_scope": "all", "block_q": 128}, "trained with block_q=64; .* with block_q=128"),
        (
            {"linear_scope": "all", "block_q": 128, "block_k": 128},
            "block_q=64, block_k=64; .* block_q=128, block_k=128",
        ),
        ({"linear_scope": "rest"}, "trained with linear_scope='all'; .* linear_scope='rest'"),
        ({"linear_scope": "all", "feature_map": "elu"}, "feature_map='softmax'; .* feature_map='elu'"),
    ],
)
def test_weights_of_other_settings_are_refused(saved, settings, words):
    model = tiny.build("wan")
    keys = list(model.state_dict())
    with pytest.raises(WeightsMismatch, match=words):
        hf_accel.apply(model, "sla", weights=str(saved[0]), **settings)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: tiny.build("wan", layers=3), "holds 4 tensors, this model takes 6; .*blocks.2.* only in this model"),
        (lambda: tiny.build("wan", layers=1), "holds 4 tensors, this model takes 2; .*blocks.1.* only in the file"),
        (lambda: tiny.build("wan", attention_head_dim=32), r"is \[16\], in this model \[32\]"),
    ],
)
def test_weights_of_another_model_are_refused(saved, build, words):
    with pytest.raises(WeightsMismatch, match=words):
        hf_accel.apply(build(), "sla", weights=str(saved[0]), linear_scope="all")


def test_files_that_are_no_weights_are_refused(tmp_path):
    from safetensors.torch import save_file

    model = tiny.build("wan")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(1)}, foreign)
    with pytest.raises(WeightsMismatch, match="not written by hf_accel"):
        hf_accel.apply(model, "sla", weights=str(foreign))
    foreign.write_bytes(b"nothing of the kind")
    with pytest.raises(WeightsMismatch, match="cannot be read"):
        hf_accel.apply(model, "sla", weights=str(foreign))
    parameters.save(foreign, {"x": torch.zeros(1)}, {"method": "other", "settings": {}})
    with pytest.raises(WeightsMismatch, match="weights of 'other' were given to 'sla'"):
        hf_accel.apply(model, "sla", weights=str(foreign))
    with pytest.raises(WeightsMismatch, match="no weights at"):
        hf_accel.apply(model, "sla", weights=str(tmp_path))


@pytest.mark.parametrize("settings", [{"topk": 0.0}, {"topk": 1.5}, {"block_q": 32}, {"feature_map": "hedgehog"}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(InvalidSetting, match=next(iter(settings))):
        SLAConfig(**settings)
