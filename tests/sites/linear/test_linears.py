"""Linears are found by role and name, and what stands around a replaced one is as it was, before and after."""

from __future__ import annotations

import copy
import re
from collections import Counter

import pytest
import torch

import tiny_hosts
from hf_accel.errors import Conflict, InvalidSetting, NotApplicable, RevertRefused, WeightsMismatch
from hf_accel.ledger import Ledger
from hf_accel.quant.packed_linear import PackedLinear
from hf_accel.sites.linear.places import find_linears, replace, survey

DECODER = dict.fromkeys(("query", "key", "value", "output", "gate", "up", "down"), 1)
PLAIN = dict.fromkeys(("query", "key", "value", "output", "up", "down"), 1)
# Roles in one block.
ROLES = {
    "llama": DECODER,
    "qwen": DECODER,
    "mistral": DECODER,
    "mixtral": dict.fromkeys(("query", "key", "value", "output"), 1),
    "opt": PLAIN,
    "gpt2": {"qkv": 1, "output": 1, "up": 1, "down": 1},
    "bert": PLAIN,
    "clip": PLAIN,
    "t5": DECODER,
    "umt5": DECODER,
    "sdar": DECODER,
    "wan": {"query": 2, "key": 2, "value": 2, "output": 2, "up": 1, "down": 1},
}


def packed(site, bits=4, seed=0):
    """Random codes in the place of a linear."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (site.out_features, site.in_features), generator=generator, dtype=torch.uint8)
    scale = torch.rand(site.out_features, 1, generator=generator) / 100 + 1e-3
    zero = torch.full((site.out_features, 1), 1 << (bits - 1))
    return PackedLinear.from_codes(codes, scale, zero, None, bits, -1, site.bias, torch.float32)


def weights(model):
    return {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}


@pytest.mark.parametrize("family", ROLES)
def test_roles_of_the_linears_in_a_block(family):
    model = tiny_hosts.build(family)
    sites = find_linears(model)
    blocks = {re.sub(r"(\.|^)(\d+)\..*", r"\1\2", site.name) for site in sites}
    assert Counter(site.role for site in sites) == Counter({r: n * len(blocks) for r, n in ROLES[family].items()})
    for site in sites:
        assert model.get_submodule(site.name) is site.module is getattr(site.parent, site.attribute)
        assert site.weight.shape == (site.out_features, site.in_features)
        assert site.kind == ("conv1d" if family == "gpt2" else "linear")


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "wan"])
def test_a_weight_as_the_site_tells_it_computes_what_the_layer_does(family):
    for site in find_linears(tiny_hosts.build(family)):
        x = torch.randn(3, site.in_features, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(torch.nn.functional.linear(x, site.weight, site.bias), site.module(x), atol=1e-6)


def test_fused_and_joint_projections_of_image_models():
    roles = {site.name: site.role for site in find_linears(tiny_hosts.build("flux"))}
    assert roles["transformer_blocks.0.attn.add_q_proj"] == "query"
    assert roles["transformer_blocks.0.attn.to_add_out"] == roles["transformer_blocks.0.attn.to_out.0"] == "output"
    assert roles["transformer_blocks.0.ff_context.net.2"] == "down"
    assert roles["single_transformer_blocks.1.proj_mlp"] == "up"
    assert roles["transformer_blocks.0.norm1.linear"] == "other"
    assert {s.role for s in find_linears(tiny_hosts.build("unet"), "ff.net.0.proj")} == {"gate_up"}


def test_targets_by_role_name_ending_and_expression():
    model = tiny_hosts.build("llama")
    by_role = find_linears(model, "query")
    assert [s.name for s in by_role] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    for same in ("q_proj", "self_attn.q_proj", r".*\.q_proj", ["query", "q_proj"]):
        assert [s.name for s in find_linears(model, same)] == [s.name for s in by_role]
    assert [s.name for s in find_linears(model, "model.layers.1.mlp.up_proj")] == ["model.layers.1.mlp.up_proj"]
    assert [s.name for s in find_linears(model, ["head"])] == ["lm_head"]
    everything = {s.name for s in find_linears(model)}
    assert everything - {s.name for s in find_linears(model, exclude=["gate", r"model\.layers\.1\..*"])} == {
        name for name in everything if "gate_proj" in name or ".1." in name
    }
    assert "lm_head" not in everything
    assert {s.name for s in find_linears(model.model.layers[0])} == {  # a part of a model, without blocks of its own
        name.removeprefix("model.layers.0.") for name in everything if ".0." in name
    }


def test_a_role_is_meant_inside_the_blocks():
    wan = tiny_hosts.build("wan")
    assert all(site.name.startswith("blocks.") for site in find_linears(wan, ["up", "down", "other", "query"][:2]))
    assert [s.name for s in find_linears(wan, "time_embedder.linear_1")] == [
        "condition_embedder.time_embedder.linear_1"
    ]


@pytest.mark.parametrize(
    ("text", "words"), [("q_poj", "did you mean.*q_proj"), ("up(", "regular expression"), ("qkv", "roles")]
)
def test_a_target_that_nothing_answers_to_is_refused(text, words):
    with pytest.raises(InvalidSetting, match=words):
        find_linears(tiny_hosts.build("llama"), ["k_proj", text])


def test_what_is_no_usable_linear_is_named_with_the_reason():
    skipped = survey(tiny_hosts.build("mixtral")).skipped
    assert len(skipped) == 4
    assert "4 experts in one tensor" in skipped["model.layers.1.mlp.experts.gate_up_proj"]
    assert "model.layers.0.mlp.gate" not in {s.name for s in find_linears(tiny_hosts.build("mixtral"))}

    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    class Foreign(torch.nn.Module):
        in_features, out_features = 4, 4

    class Packed(torch.nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.weight = torch.nn.Parameter(torch.zeros(4, 2, dtype=torch.uint8), requires_grad=False)

    replaced = torch.nn.Linear(4, 4)
    replaced.forward = lambda x: x
    model = torch.nn.ModuleDict({
        "scaled": Scaled(4, 4), "foreign": Foreign(), "packed": Packed(), "replaced": replaced,
        "mha": torch.nn.MultiheadAttention(4, 2), "fine": torch.nn.Linear(4, 4),
    })  # fmt: skip
    found = survey(model)
    assert [site.name for site in found.sites] == ["fine"]
    for name, words in {
        "scaled": "forward of its own", "foreign": "Foreign", "packed": "another library: .*Packed",
        "replaced": "replaced on the instance", "mha.out_proj": "MultiheadAttention",
    }.items():  # fmt: skip
        assert re.search(words, found.skipped[name])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "umt5", "clip", "gemma", "wan", "flux"])
def test_replaced_by_packed_layers_and_undone_exactly(family):
    model, ledger = tiny_hosts.build(family), Ledger()
    dense, before = tiny_hosts.output(model, family), weights(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    sites = [s for s in find_linears(model) if s.out_features % 32 == 0 and s.in_features % 32 == 0]
    for index, site in enumerate(sites):
        replace(site, packed(site, seed=index), ledger)
    ours = tiny_hosts.output(model, family)
    assert ours.isfinite().all()
    assert not torch.allclose(ours, dense, atol=1e-3)
    standing = {site.name: site for site in find_linears(model) if site.kind == "packed"}
    assert list(standing) == [site.name for site in sites]
    for site in sites:  # every replaced layer, as a dense one, computes the same
        inside = standing[site.name]
        with_dense = torch.nn.Linear(site.in_features, site.out_features, site.bias is not None)
        with_dense.weight.copy_(inside.weight)
        if site.bias is not None:
            with_dense.bias.copy_(site.bias)
        replace(inside, with_dense, ledger)
    assert torch.allclose(tiny_hosts.output(model, family), ours, atol=2e-5, rtol=1e-4)
    ledger.undo()
    after = dict(model.named_modules(remove_duplicate=False))
    assert list(after) == list(modules)
    assert all(after[name] is module for name, module in modules.items())
    assert weights(model) == before
    assert torch.equal(tiny_hosts.output(model, family), dense)


def test_replacing_a_tied_linear_serves_both_places():
    model, ledger = tiny_hosts.build("gemma"), Ledger()
    site = next(s for s in find_linears(model, "down") if s.out_features % 32 == 0)
    (tied,) = site.tied
    assert (site.name, tied.name) == (tied.name.replace("decoder", "encoder.language_model"), tied.name)
    assert tied.module is not site.module
    assert tied.module.weight is site.module.weight
    new = copy.deepcopy(site.module)
    replace(site, new, ledger)
    twin = getattr(tied.parent, tied.attribute)
    assert twin is not new
    assert twin.weight is new.weight
    model.to(torch.float64)  # a move of one is a move of the other
    assert twin.weight is new.weight
    assert twin.weight.dtype == torch.float64
    again = find_linears(model, re.escape(site.name))
    assert [t.name for t in again[0].tied] == [tied.name]
    assert site.name not in {s.name for s in find_linears(model, exclude=[re.escape(tied.name)])}


class Hook:
    def __init__(self):
        self.calls = 0

    def __call__(self, *_):
        self.calls += 1


def test_hooks_stay_at_their_place_and_handles_keep_working():
    model, ledger = tiny_hosts.build("llama"), Ledger()
    site = find_linears(model, "query")[0]
    hooks = pre, post, backward, later = Hook(), Hook(), Hook(), Hook()
    handles = [
        site.module.register_forward_pre_hook(pre),
        site.module.register_forward_hook(post),
        site.module.register_full_backward_hook(backward),
    ]
    model.train()
    new = packed(site).eval()
    replace(site, new, ledger)
    assert new.training
    handles.append(new.register_forward_hook(later))
    run(model)
    assert [hook.calls for hook in hooks] == [1, 1, 1, 1]
    handles[0].remove()
    run(model)
    assert [hook.calls for hook in hooks] == [1, 2, 2, 2]
    ledger.undo()
    run(model)
    assert [hook.calls for hook in hooks] == [1, 3, 3, 3]
    for handle in handles:
        handle.remove()
    run(model)
    assert [hook.calls for hook in hooks] == [1, 3, 3, 3]


def run(model):
    model(input_ids=torch.arange(8)[None] + 3).logits.sum().backward()


def test_a_copy_of_the_model_carries_a_ledger_of_its_own():
    model, ledger = tiny_hosts.build("llama"), Ledger()
    original = model.model.layers[0].mlp.up_proj
    replace(find_linears(model, "up")[0], packed(find_linears(model, "up")[0]), ledger)
    twin, its = copy.deepcopy((model, ledger))
    its.undo()
    assert isinstance(twin.model.layers[0].mlp.up_proj, torch.nn.Linear)
    assert isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)
    ledger.undo()
    assert model.model.layers[0].mlp.up_proj is original


def test_inside_a_peft_wrapper_the_base_layer_is_replaced():
    peft = pytest.importorskip("peft")
    model, ledger = tiny_hosts.build("llama"), Ledger()
    names = [site.name for site in find_linears(model)]
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), model)
    sites = find_linears(model)
    assert [site.name for site in sites] == names
    site = sites[0]
    assert site.attribute == "base_layer"
    assert site.parent is model.model.layers[0].self_attn.q_proj
    assert site.role == "query"
    x = torch.randn(2, 3, 64)
    adapter = site.parent(x) - site.module(x)
    replace(site, packed(site), ledger)
    assert isinstance(site.parent.get_base_layer(), PackedLinear)
    assert torch.allclose(site.parent(x) - site.parent.base_layer(x), adapter, atol=1e-5)
    ledger.undo()
    assert site.parent.base_layer is site.module


@pytest.mark.parametrize("family", ["qwen", "gpt2", "gemma"])
def test_a_head_tied_to_the_embedding_is_refused(family):
    model = tiny_hosts.build(family)
    (head,) = find_linears(model, "head")
    with pytest.raises(NotApplicable, match=r"embed_tokens|wte"):
        replace(head, torch.nn.Linear(head.in_features, head.out_features), Ledger())


def test_a_head_of_its_own_is_replaced():
    model, ledger = tiny_hosts.build("llama"), Ledger()
    (head,) = find_linears(model, "head")
    replace(head, packed(head), ledger)
    assert isinstance(model.get_output_embeddings(), PackedLinear)


def test_computed_offloaded_and_absent_weights_are_refused():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    def refused(change, words):
        model, ledger = torch.nn.Sequential(torch.nn.Linear(32, 32)), Ledger()
        change(model[0])
        site = find_linears(model)[0]
        with pytest.raises(NotApplicable, match=words):
            replace(site, torch.nn.Linear(32, 32), ledger)
        assert model[0] is site.module
        assert not len(ledger)

    refused(lambda m: torch.nn.utils.parametrizations.orthogonal(m), "remove_parametrizations")
    refused(lambda m: torch.nn.utils.parametrizations.weight_norm(m), "remove_parametrizations")
    refused(lambda m: add_hook_to_module(m, AlignDevicesHook("cpu", offload=True)), "accelerate keeps its weights")
    refused(lambda m: m.to("meta"), "meta device")


def test_hooks_that_only_move_inputs_are_carried_over():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model, ledger = torch.nn.Sequential(torch.nn.Linear(32, 32)), Ledger()
    old = add_hook_to_module(model[0], AlignDevicesHook("cpu", io_same_device=True))
    new = torch.nn.Linear(32, 32)
    replace(find_linears(model)[0], new, ledger)
    assert isinstance(new._hf_hook, AlignDevicesHook)
    assert new._hf_hook is not old._hf_hook
    x = torch.randn(2, 32)
    assert torch.equal(model(x), torch.nn.functional.linear(x, new.weight, new.bias))
    ledger.undo()
    assert model[0] is old


def test_a_wrong_or_late_replacement_is_refused():
    model, ledger = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 64)), Ledger()
    first, second = find_linears(model)
    with pytest.raises(WeightsMismatch, match="32 features to 32"):
        replace(first, second.module, ledger)
    hooked = torch.nn.Linear(32, 32)
    hooked.register_forward_hook(Hook())
    with pytest.raises(Conflict, match="has hooks"):
        replace(first, hooked, ledger)
    replace(first, torch.nn.Linear(32, 32), ledger)
    with pytest.raises(Conflict, match="not the linear any more"):
        replace(first, torch.nn.Linear(32, 32), ledger)
    model[0] = torch.nn.Identity()
    with pytest.raises(RevertRefused):
        ledger.undo()
