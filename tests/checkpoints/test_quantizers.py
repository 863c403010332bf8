"""Packed models saved and loaded again: bit for bit, in the ecosystem's layout, and never silently random."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_accel
import tiny_hosts
from hf_accel.checkpoints.gptq import layout as checkpoint
from hf_accel.checkpoints.gptq.declare import declare
from hf_accel.errors import NotApplicable, QuantizationError
from hf_accel.ledger import Ledger
from hf_accel.quant.packed_linear import PackedLinear, why_not_packable
from hf_accel.sites.linear.places import find_linears, replace


def codes_of(site, bits=4, group_size=-1, shuffled=False, lowest_zero=1, seed=0, dtype=torch.float32):
    """A packed layer of random codes, scales, zeros and (``shuffled``) groups in the place of a linear."""
    generator = torch.Generator().manual_seed(seed)
    size = site.in_features if group_size == -1 else group_size
    groups = -(-site.in_features // size)
    shape = site.out_features, site.in_features
    codes = torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)
    scale = torch.rand(site.out_features, groups, generator=generator) / 10 / (1 << bits) + 1e-3
    zero = torch.randint(lowest_zero, 1 << bits, (site.out_features, groups), generator=generator)
    g_idx = torch.arange(site.in_features) // size
    if shuffled:
        g_idx = g_idx[torch.randperm(site.in_features, generator=generator)]
    return PackedLinear.from_codes(codes, scale, zero, g_idx, bits, group_size, site.bias, dtype)


def pack(model, ledger, targets=None, **settings):
    """Random codes in all linears that can be packed."""
    for index, site in enumerate(find_linears(model, targets)):
        if why_not_packable(site.in_features, site.out_features) is None:
            replace(site, codes_of(site, seed=index, **settings), ledger)


def packed_model(family="llama", **settings):
    model, ledger = tiny_hosts.build(family), Ledger()
    pack(model, ledger, **settings)
    declare(model, ledger)
    return model, ledger


def same_state(first, second):
    """Bit for bit, and what is shared in one is shared in the other."""
    a, b = first.state_dict(), second.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name
    assert shared(a) == shared(b)


def shared(state):
    """Names by storage."""
    groups = {}
    for name, tensor in state.items():
        groups.setdefault((tensor.data_ptr(), tensor.shape), []).append(name)
    return sorted(names for names in groups.values() if len(names) > 1)


def config_of(folder):
    return json.loads((Path(folder) / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(
    "family", ["llama", "qwen", "opt", "gpt2", "bert", "clip", "t5", "umt5", "gemma", "wan", "flux"]
)
def test_a_saved_model_is_the_same_when_loaded(family, tmp_path):
    model, ledger = packed_model(family)
    model.save_pretrained(tmp_path)
    loaded = hf_accel.load_quantized(tmp_path)
    assert type(loaded) is type(model)
    same_state(model, loaded)
    assert torch.allclose(tiny_hosts.output(loaded, family), tiny_hosts.output(model, family), rtol=1e-6, atol=1e-6)
    loaded.save_pretrained(tmp_path / "again")
    assert config_of(tmp_path) == config_of(tmp_path / "again")
    same_state(model, hf_accel.load_quantized(tmp_path / "again"))
    ledger.undo()
    dense = tmp_path / "dense"
    model.save_pretrained(dense)
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    same_state(model, type(model).from_pretrained(dense))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("group_size", "shuffled", "lowest_zero"), [(-1, False, 1), (32, False, 0), (32, True, 1), (40, True, 0)]
)
def test_every_number_of_bits_group_size_and_version(bits, group_size, shuffled, lowest_zero, tmp_path):
    settings = {"bits": bits, "group_size": group_size, "shuffled": shuffled, "lowest_zero": lowest_zero}
    model, _ = packed_model(**settings, targets=["q_proj", "down_proj"])
    model.save_pretrained(tmp_path)
    told = config_of(tmp_path)
    assert told["checkpoint_format"] == ("gptq", "gptq_v2")[lowest_zero == 0]
    assert (told["bits"], told["group_size"]) == (bits, group_size)
    loaded = hf_accel.load_quantized(tmp_path)
    same_state(model, loaded)
    layer = loaded.model.layers[1].mlp.down_proj
    assert (layer.bits, layer.group_size) == (bits, group_size)


def by_hand(codes, scales, zeros, bits, v1):
    """Words as the format's description has them: numbers of bits side by side, little end first."""

    def words(rows):  # [n][m] -> [n * bits / 32][m]
        out = []
        for column in zip(*rows, strict=True):
            stream = sum(int(code) << (bits * place) for place, code in enumerate(column))
            words = [(stream >> (32 * place)) & 0xFFFFFFFF for place in range(len(column) * bits // 32)]
            out.append([word - (1 << 32) if word >> 31 else word for word in words])
        return torch.tensor(out, dtype=torch.int64).t().to(torch.int32)

    stored = zeros - 1 if v1 else zeros
    return {
        "qweight": words(codes.t().tolist()).contiguous(),
        "qzeros": words(stored.t().tolist()).t().contiguous(),
        "scales": scales.contiguous(),
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_a_checkpoint_written_by_hand_is_read(bits, layout, tmp_path):
    model = tiny_hosts.build("llama")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    generator = torch.Generator().manual_seed(bits)
    expected = {}
    for site in find_linears(model, ["q_proj", "down_proj"]):
        groups = site.in_features // 32
        codes = torch.randint(0, 1 << bits, (site.out_features, site.in_features), generator=generator)
        zeros = torch.randint(1, 1 << bits, (groups, site.out_features), generator=generator)
        scales = (torch.rand(groups, site.out_features, generator=generator) / 50 + 1e-3).half()
        del state[f"{site.name}.weight"]
        parts = by_hand(codes, scales, zeros, bits, layout == "gptq")
        if "q_proj" in site.name:  # older tools leave it out
            parts["g_idx"] = torch.arange(site.in_features, dtype=torch.int32) // 32
        if "down_proj" in site.name:  # and write a bias of zeros to layers that have none
            parts["bias"] = torch.zeros(site.out_features, dtype=torch.float16)
        state |= {f"{site.name}.{name}": tensor for name, tensor in parts.items()}
        spread = [part.t().repeat_interleave(32, dim=1) for part in (scales.double(), zeros.double())]
        expected[site.name] = spread[0] * (codes - spread[1])
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    told = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": False, "sym": True}
    config["quantization_config"] = told | {"checkpoint_format": layout}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, info = hf_accel.load_quantized(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, weight in expected.items():
        layer = loaded.get_submodule(name)
        assert torch.equal(layer.dequantize_weight(torch.float64), weight)
        model.get_submodule(name).weight.data.copy_(weight)
    assert torch.allclose(tiny_hosts.output(loaded, "llama"), tiny_hosts.output(model, "llama"), atol=1e-5)


def test_groups_that_are_neighbours_need_not_be_in_the_file(tmp_path):
    model, _ = packed_model("wan", group_size=32)
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if not k.endswith("g_idx")}, file, metadata={"format": "pt"})
    for settings in ({}, {"device_map": {"": "cpu"}}):
        loaded, info = hf_accel.load_quantized(tmp_path, output_loading_info=True, **settings)
        assert not info["missing_keys"]
        same_state(model, loaded)


def test_what_we_write_is_read_by_hand(tmp_path):
    model, _ = packed_model(bits=3, group_size=32, shuffled=True)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    words = state[f"{name}.qweight"].t().tolist()
    codes = []
    for column in words:
        stream = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(column))
        codes.append([(stream >> (3 * place)) & 7 for place in range(64)])
    stored = []
    for row in state[f"{name}.qzeros"].tolist():
        stream = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(row))
        stored.append([((stream >> (3 * place)) & 7) + 1 for place in range(96)])
    groups = state[f"{name}.g_idx"].long()
    scales, zeros = state[f"{name}.scales"].double(), torch.tensor(stored).double()
    weight = scales[groups].t() * (torch.tensor(codes) - zeros[groups].t())
    layer = model.get_submodule(name)
    assert torch.equal(layer.dequantize_weight(torch.float64), weight)


@pytest.mark.parametrize("family", ["llama", "wan"])
def test_shards_device_map_and_dtype(family, tmp_path):
    model, _ = packed_model(family, group_size=32)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    dtype = "dtype" if family == "llama" else "torch_dtype"
    loaded = hf_accel.load_quantized(tmp_path, device_map={"": "cpu"}, **{dtype: torch.bfloat16})
    ours, theirs = model.state_dict(), loaded.state_dict()
    site = find_linears(loaded)[0]
    for leaf in ("qweight", "qzeros", "scales", "g_idx"):  # scales stay as they were saved
        assert torch.equal(theirs[f"{site.name}.{leaf}"], ours[f"{site.name}.{leaf}"])
    norm = next(name for name in ours if name.endswith("norm.weight" if family == "llama" else "proj_out.weight"))
    assert theirs[norm].dtype == torch.bfloat16
    out = tiny_hosts.output(loaded, family) if family == "llama" else None
    assert out is None or torch.allclose(out.float(), tiny_hosts.output(model, family), atol=0.05)


def test_modules_kept_in_fp32_stay_so(tmp_path):
    model, _ = packed_model("t5", dtype=torch.float16)
    model.save_pretrained(tmp_path)
    loaded = hf_accel.load_quantized(tmp_path, dtype=torch.float16)
    feed_forward = loaded.encoder.block[0].layer[1].DenseReluDense
    assert feed_forward.wo.scales.dtype == torch.float32  # T5 computes this one in fp32 when the rest is fp16
    assert feed_forward.wi_0.scales.dtype == torch.float16
    assert loaded.shared.weight.dtype == torch.float16
    assert torch.equal(feed_forward.wo.scales, model.encoder.block[0].layer[1].DenseReluDense.wo.scales.float())


def test_tied_layers_are_stored_once_and_shared_again(tmp_path):
    model, _ = packed_model("gemma")
    model.save_pretrained(tmp_path)
    keys = [
        key for key in load_file(tmp_path / "model.safetensors") if key.endswith("layers.0.self_attn.q_proj.qweight")
    ]
    assert len(keys) == 1
    loaded = hf_accel.load_quantized(tmp_path)
    encoder = loaded.model.encoder.language_model.layers[0].self_attn.q_proj
    decoder = loaded.model.decoder.layers[0].self_attn.q_proj
    assert encoder is not decoder
    assert encoder.qweight is decoder.qweight
    (site,) = [s for s in find_linears(loaded, "q_proj") if s.module in (encoder, decoder)]
    assert len(site.tied) == 1


def test_a_packed_head_is_not_tied_to_its_embedding_again(tmp_path):
    model, ledger = tiny_hosts.build("llama"), Ledger()
    pack(model, ledger, targets=["head", "q_proj"])
    declare(model, ledger)
    model.save_pretrained(tmp_path)
    assert config_of(tmp_path)["lm_head"] is True
    same_state(model, hf_accel.load_quantized(tmp_path))


def test_exceptions_are_told_to_other_tools(tmp_path):
    model, ledger = tiny_hosts.build("llama"), Ledger()
    pack(model, ledger, targets=["query", "key", "up"], group_size=32)
    pack(model, ledger, targets=["down"], bits=8)
    pack(model, ledger, targets=[r"model\.layers\.1\.mlp\.gate_proj"], group_size=32)
    settings = checkpoint.settings_of(model)
    assert (settings.bits, settings.group_size) == (4, 32)
    assert dict(settings.dynamic) == {
        r"-:^model\.layers\.\d+\.self_attn\.v_proj$": {},
        r"-:^model\.layers\.\d+\.self_attn\.o_proj$": {},
        r"-:^model\.layers\.0\.mlp\.gate_proj$": {},
        r"+:^model\.layers\.\d+\.mlp\.down_proj$": {"bits": 8, "group_size": -1},
    }
    named = set(settings.modules_in_block_to_quantize[0])
    assert named == {"self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj", "mlp.gate_proj"}
    declare(model, ledger)
    model.save_pretrained(tmp_path)
    assert config_of(tmp_path)["dynamic"] == dict(settings.dynamic)
    loaded = hf_accel.load_quantized(tmp_path)
    same_state(model, loaded)
    loaded.save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(tmp_path)


@pytest.mark.parametrize("family", ["llama", "wan", "gemma"])
def test_dequantised_the_model_is_dense_and_computes_the_same(family, tmp_path):
    model, _ = packed_model(family)
    model.save_pretrained(tmp_path)
    loaded = hf_accel.load_quantized(tmp_path)
    packed = tiny_hosts.output(loaded, family)
    loaded.dequantize()
    assert not any(isinstance(module, PackedLinear) for module in loaded.modules())
    assert torch.allclose(tiny_hosts.output(loaded, family), packed, atol=1e-5, rtol=1e-4)
    if family == "gemma":
        assert loaded.model.decoder.layers[0].self_attn.q_proj.weight is (
            loaded.model.encoder.language_model.layers[0].self_attn.q_proj.weight
        )


@pytest.mark.parametrize("family", ["llama", "wan"])
def test_the_declaration_is_undone_and_copied_with_the_model(family):
    model, ledger = tiny_hosts.build(family), Ledger()
    before, config = set(vars(model)), dict(vars(model.config)) if family == "llama" else model.config
    pack(model, ledger)
    declare(model, ledger)
    twin, its = copy.deepcopy((model, ledger))
    assert twin.hf_quantizer is not model.hf_quantizer
    assert model.is_quantized
    ledger.undo()
    its.undo()
    for each in (model, twin):
        assert set(vars(each)) == before
        assert not getattr(each, "is_quantized", False)
    assert (dict(vars(model.config)) if family == "llama" else model.config) == config


def test_a_pipeline_of_packed_models_is_saved_and_loaded(tmp_path):
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

    vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False])
    parts = {"vae": vae, "scheduler": FlowMatchEulerDiscreteScheduler(), "tokenizer": None}
    pipe = WanPipeline(text_encoder=packed_model("umt5")[0], transformer=packed_model("wan")[0], **parts)
    pipe.save_pretrained(tmp_path)
    loaded = hf_accel.load_quantized(tmp_path, tokenizer=None).to("cpu")
    assert type(loaded) is WanPipeline
    same_state(pipe.text_encoder, loaded.text_encoder)
    same_state(pipe.transformer, loaded.transformer)
    alone = hf_accel.load_quantized(tmp_path, subfolder="transformer")
    same_state(pipe.transformer, alone)


@pytest.mark.parametrize("family", ["t5", "umt5"])
def test_adapters_on_packed_layers_whose_dtype_the_block_asks_for(family):
    from peft import inject_adapter_in_model

    import hf_accel.peft

    model, _ = packed_model(family)
    before = tiny_hosts.output(model, family)
    inject_adapter_in_model(hf_accel.peft.QWHAConfig(target_modules=["wo"], r=4), model)
    layer = model.encoder.block[0].layer[1].DenseReluDense.wo
    assert isinstance(layer.get_base_layer(), PackedLinear)
    assert layer.weight.dtype == torch.float32
    assert torch.allclose(tiny_hosts.output(model, family), before, atol=1e-5)  # a new adapter adds nothing


# What a process sees that cannot read the layout: an error, with and without our package imported.
STRANGER = """
import sys
from transformers import AutoModelForCausalLM
from diffusers import WanTransformer3DModel
if sys.argv[3:]:
    import hf_accel
for cls, folder in ((AutoModelForCausalLM, sys.argv[1]), (WanTransformer3DModel, sys.argv[2])):
    try:
        cls.from_pretrained(folder)
        print("LOADED", cls.__name__)
    except (ImportError, ValueError, RuntimeError) as error:
        print("REFUSED", type(error).__name__, error)
"""


@pytest.mark.parametrize("arguments", [(), ("with hf_accel",)])
def test_a_process_that_did_not_register_refuses(arguments, tmp_path):
    for family in ("llama", "wan"):
        packed_model(family)[0].save_pretrained(tmp_path / family)
    run = subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path / "llama"), str(tmp_path / "wan"), *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith(("LOADED", "REFUSED"))]
    assert [line.split()[0] for line in lines] == ["REFUSED", "REFUSED"], run.stdout
    assert "optimum" in lines[0] or "gptqmodel" in lines[0].lower()
    assert "gptq" in lines[1]


def test_registration_for_the_process_is_taken_back():
    from diffusers.quantizers import auto as theirs
    from transformers.quantizers import auto as ours

    mappings = [
        ours.AUTO_QUANTIZER_MAPPING, ours.AUTO_QUANTIZATION_CONFIG_MAPPING,
        theirs.AUTO_QUANTIZER_MAPPING, theirs.AUTO_QUANTIZATION_CONFIG_MAPPING,
    ]  # fmt: skip
    before = [dict(mapping) for mapping in mappings]
    hf_accel.register_quantizers()
    hf_accel.register_quantizers()
    assert all(mapping["gptq"].__module__.startswith("hf_accel") for mapping in mappings)
    with pytest.raises(NotApplicable, match="names no class"):
        hf_accel.load_quantized("/nowhere/at/all")
    assert all(mapping["gptq"].__module__.startswith("hf_accel") for mapping in mappings)
    hf_accel.unregister_quantizers()
    hf_accel.unregister_quantizers()
    assert [dict(mapping) for mapping in mappings] == before


def test_registered_the_hosts_own_classes_load(tmp_path):
    from diffusers import WanTransformer3DModel
    from transformers import AutoModel, AutoModelForCausalLM

    for family in ("llama", "wan"):
        packed_model(family)[0].save_pretrained(tmp_path / family)
    hf_accel.register_quantizers()
    try:
        llama = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
        trunk = AutoModel.from_pretrained(tmp_path / "llama")  # names of the checkpoint have a prefix more
        wan = WanTransformer3DModel.from_pretrained(tmp_path / "wan")
    finally:
        hf_accel.unregister_quantizers()
    same_state(llama.model, trunk)
    assert all(isinstance(s.module, PackedLinear) for model in (llama, trunk, wan) for s in find_linears(model))


def spoiled(tmp_path, change, family="llama"):
    """A checkpoint after ``change(state, config)``."""
    packed_model(family)[0].save_pretrained(tmp_path)
    file = tmp_path / ("model.safetensors" if family == "llama" else "diffusion_pytorch_model.safetensors")
    state, config = load_file(file), json.loads((tmp_path / "config.json").read_text())
    change(state, config)
    save_file(state, file, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def without(*ends):
    def change(state, config):
        for key in [key for key in state if key.endswith(ends)]:
            del state[key]

    return change


def told(**fields):
    return lambda state, config: config["quantization_config"].update(fields)


def renamed(old, new):
    def change(state, config):
        for key in [key for key in state if old in key]:
            state[key.replace(old, new)] = state.pop(key)

    return change


def wider(state, config):
    state["blocks.1.attn1.to_q.qweight"] = torch.zeros(8, 96, dtype=torch.int32)


def damaged(state, config):
    state["model.layers.0.mlp.up_proj.scales"][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("llama", without("layers.1.mlp.up_proj.scales"), "layers.1.mlp.up_proj.qweight and no scales"),
        ("wan", without("blocks.0.ffn.net.2.qzeros"), "and no qzeros"),
        ("llama", without("qweight", "qzeros", "scales", "g_idx"), "files hold none"),
        ("llama", without(*(f"layers.1.mlp.up_proj.{p}" for p in ("qweight", "qzeros", "scales"))), "would be random"),
        ("wan", without(*(f"1.attn1.to_q.{p}" for p in ("qweight", "qzeros", "scales"))), "would be random"),
        ("llama", renamed("mlp.up_proj", "mlp.experts.3.up_proj"), "no such layer"),
        ("wan", wider, "no packed form"),
        ("llama", damaged, "scales are not finite"),
        ("llama", told(checkpoint_format="marlin"), "marlin"),
        ("wan", told(checkpoint_format="marlin"), "marlin"),
        ("llama", told(pack_dtype="int64"), "int64"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(family, change, words, tmp_path):
    with pytest.raises(QuantizationError, match=words):
        hf_accel.load_quantized(spoiled(tmp_path, change, family))


def test_quantising_while_loading_is_refused_with_what_to_do(tmp_path):
    from transformers import GPTQConfig

    model = tiny_hosts.build("llama")
    model.save_pretrained(tmp_path)
    with pytest.raises(NotApplicable, match=r"hf_accel\.apply"):
        hf_accel.load_quantized(tmp_path, quantization_config=GPTQConfig(bits=4))


def test_a_model_without_packed_layers_declares_nothing():
    with pytest.raises(QuantizationError, match="holds no packed linear"):
        declare(tiny_hosts.build("llama"), Ledger())


def test_a_zero_that_v1_cannot_hold_names_its_layer(tmp_path):
    model, _ = packed_model()
    model.model.layers[1].mlp.up_proj.qzeros.zero_()
    with pytest.raises(QuantizationError, match=r"layers\.1\.mlp\.up_proj.*gptq_v2"):
        model.save_pretrained(tmp_path)
