"""PackedLinear: what goes in comes out, through moves, copies and state dicts; sizes that the layout refuses."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch.nn import functional as F

from hf_accel.errors import InvalidSetting, QuantizationError
from hf_accel.quant.formats import format_of
from hf_accel.quant.grid import Scheme, decode, encode, fit_grid
from hf_accel.quant.packed_linear import PackedLinear, why_not_packable
from hf_accel.quant.packing import PACKED_BITS

WORDS = ("qweight", "qzeros", "g_idx")


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Within a share of the largest output: sums over a group cancel, and each output may be small."""
    assert ours.dtype == theirs.dtype
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < tolerance


def packed_of(
    out: int = 64, inputs: int = 96, bits: int = 4, group: int = 32, *, bias: bool = True, dtype=torch.float32
) -> tuple[PackedLinear, torch.Tensor]:
    """A module and the weight that it must have, fp32 ``[out, in]``."""
    weight = gaussian(out, inputs)
    scheme = Scheme.grouped(format_of(bits), group)
    grid = fit_grid(weight, scheme, scale_dtype=dtype)
    codes = encode(weight, grid, scheme)
    given = gaussian(out, seed=1) if bias else None
    module = PackedLinear.from_codes(codes, grid.scale, grid.zero, None, bits, group, given, dtype)
    return module, decode(codes, grid, scheme)


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("group", [32, 64, -1, 40])
def test_the_weight_is_the_grids_values(bits, group):
    """Groups of 40 and 64 do not divide 96: the last one is smaller."""
    module, weight = packed_of(bits=bits, group=group)
    groups = 1 if group == -1 else -(-96 // group)
    assert {name: (list(b.shape), b.dtype) for name, b in module.named_buffers()} == {
        "qweight": ([96 * bits // 32, 64], torch.int32),
        "qzeros": ([groups, 64 * bits // 32], torch.int32),
        "scales": ([groups, 64], torch.float32),
        "g_idx": ([96], torch.int32),
        "bias": ([64], torch.float32),
    }
    assert torch.equal(module.dequantize_weight(), weight)
    assert torch.equal(module.bias, gaussian(64, seed=1))
    assert torch.equal(module.codes(), encode(weight, module.grid(), Scheme.grouped(format_of(bits), group)))


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3)])
def test_forward_is_a_linear_of_that_weight(bits, bias, lead):
    module, weight = packed_of(bits=bits, bias=bias)
    x = gaussian(*lead, 96, seed=2)
    assert_near(module(x), F.linear(x, weight, module.bias))


@pytest.mark.parametrize("tokens", [1, 40])
def test_the_kernel_is_told_whether_neighbours_make_a_group_and_looks_again_when_g_idx_changes(tokens):
    module, weight = packed_of(bits=4, group=32)
    x = gaussian(tokens, 96, seed=2)
    assert module.run_length() == 32
    assert packed_of(group=-1)[0].run_length() == 96
    assert_near(module(x), F.linear(x, weight, module.bias))

    def expected():
        grid, g_idx = module.grid(), module.g_idx.long()
        dense = (module.codes() - grid.zero[:, g_idx]) * grid.scale[:, g_idx]
        return F.linear(x, dense, module.bias)

    swapped = module.g_idx.flip(0)
    other = packed_of(group=32)[0]
    assert other.run_length() == 32
    other._buffers["g_idx"] = swapped
    assert other.run_length() is None
    module.g_idx.copy_(swapped)  # in place
    assert module.run_length() is None
    assert_near(module(x), expected())
    module._buffers["g_idx"] = swapped.flip(0)  # as loaders set it
    assert module.run_length() == 32
    state = {**module.state_dict(), "g_idx": swapped}
    module.load_state_dict(state)
    assert module.run_length() is None
    assert_near(module(x), expected())
    module.load_state_dict({**state, "g_idx": swapped.flip(0)}, assign=True)
    assert module.run_length() == 32
    assert copy.deepcopy(module).run_length() == 32
    module.g_idx.copy_(swapped)
    assert module.to("meta").run_length() == 32  # no values, so none that differ
    assert list(module(x.to("meta")).shape) == [tokens, 64]


class Graphs:
    """A backend that runs graphs as they are and notes what the op was promised in each."""

    def __init__(self):
        self.promises: list[int | None] = []

    def __call__(self, module, inputs):
        ops = torch.ops.hf_accel.quantized_linear, torch.ops.hf_accel.quantized_linear.default
        (node,) = (node for node in module.graph.nodes if node.target in ops)
        self.promises.append(node.args[6])
        return module.forward


@pytest.mark.parametrize("group", [32, -1, 64])
def test_the_graph_of_a_fresh_module_relies_on_neighbours(group):
    module, weight = packed_of(bits=3, group=group)
    graphs, x = Graphs(), gaussian(5, 96, seed=2)
    compiled = torch.compile(module, backend=graphs, fullgraph=True)
    for _ in range(2):
        assert_near(compiled(x), F.linear(x, weight, module.bias))
    assert_near(module(x), compiled(x))
    assert graphs.promises == [96 if group == -1 else group]  # and the first graph serves on


def test_a_compiled_graph_is_traced_anew_for_groups_in_another_order():
    module, _ = packed_of(bits=4)
    graphs, x = Graphs(), gaussian(5, 96, seed=2)
    compiled = torch.compile(module, backend=graphs, fullgraph=True)

    def expected():
        grid, g_idx = module.grid(), module.g_idx.long()
        return F.linear(x, (module.codes() - grid.zero[:, g_idx]) * grid.scale[:, g_idx], module.bias)

    def assert_traced(*promises):
        graphs.promises.clear()
        for _ in range(2):
            assert_near(compiled(x), expected())
        assert graphs.promises == list(promises)

    assert_traced(32)
    flipped = module.g_idx.flip(0)
    module._buffers["g_idx"] = flipped  # as loaders set it, and without a call in between
    assert_traced(None)
    module._buffers["g_idx"] = flipped.flip(0)
    assert_traced(32)
    module.load_state_dict({**module.state_dict(), "g_idx": flipped})
    assert_traced(None)
    module.load_state_dict({**module.state_dict(), "g_idx": flipped.flip(0)}, assign=True)
    assert_traced(32)
    module.g_idx.copy_(flipped)
    assert module.run_length() is None
    assert_near(compiled(x), expected())


def test_an_exported_graph_relies_on_what_is_known():
    module, weight = packed_of()
    x = gaussian(5, 96, seed=2)
    for known in (None, 32):
        program = torch.export.export(module, (x,), strict=False)
        (node,) = (n for n in program.graph.nodes if n.target is torch.ops.hf_accel.quantized_linear.default)
        assert node.args[6] == known
        assert_near(program.module()(x), F.linear(x, weight, module.bias))
        module.run_length()


def test_autocast_as_a_dense_linear():
    module, weight = packed_of()
    x = gaussian(5, 96, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = module(x), F.linear(x, weight, module.bias)
        assert module(x.double()).dtype == torch.float64
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert_near(ours, theirs, 0.01)


def test_a_module_in_fp64_keeps_its_values():
    module, weight = packed_of()
    x = gaussian(5, 96, seed=2).double()
    module.double()
    grid, g_idx = module.grid(), module.g_idx.long()
    exact = (module.codes() - grid.zero[:, g_idx]) * grid.scale[:, g_idx]
    assert_near(module(x), F.linear(x, exact, module.bias), 1e-12)
    assert torch.equal(module.dequantize_weight(), exact)
    assert torch.equal(module.dequantize_weight(torch.float32), weight)


def test_gradient_flows_to_the_input_and_to_nothing_else():
    module, weight = packed_of()
    x = gaussian(3, 96, seed=2).requires_grad_()
    out = gaussian(3, 64, seed=3)
    module(x).backward(out)
    assert_near(x.grad, out @ weight)
    assert list(module.parameters()) == []
    assert not any(buffer.requires_grad for buffer in module.buffers())


def test_inputs_of_a_group_need_not_lie_together():
    weight, permutation = gaussian(32, 64), torch.randperm(64, generator=torch.Generator().manual_seed(4))
    scheme = Scheme.grouped(format_of(4), 16)
    grid = fit_grid(weight, scheme)
    codes = encode(weight, grid, scheme)
    g_idx = torch.empty(64, dtype=torch.long)
    g_idx[permutation] = torch.arange(64) // 16  # input permutation[i] is the i-th that was quantised
    shuffled = torch.empty_like(codes)
    shuffled[:, permutation] = codes
    module = PackedLinear.from_codes(shuffled, grid.scale, grid.zero, g_idx, 4, 16, dtype=torch.float32)
    assert torch.equal(module.dequantize_weight()[:, permutation], decode(codes, grid, scheme))
    x = gaussian(5, 64, seed=2)
    assert_near(module(x), F.linear(x, module.dequantize_weight()))


@pytest.mark.parametrize("move", ["to", "half", "type", "to_empty_and_back"])
def test_moves_round_scales_and_bias_and_leave_the_words_alone(move):
    module, _ = packed_of(bits=3)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    if move == "to":
        module.to(torch.bfloat16)
    elif move == "half":
        module.half()
    elif move == "type":
        module.type(torch.float16)
    else:
        state = module.state_dict()
        module.to("meta")
        assert module.qweight.is_meta
        module.to_empty(device="cpu")
        module.load_state_dict(state)
    for name, buffer in module.named_buffers():
        if name in WORDS:
            assert torch.equal(buffer, before[name])
            assert buffer.dtype == torch.int32
        else:
            assert torch.equal(buffer, before[name].to(buffer.dtype))
            assert buffer.dtype != torch.float32 or move == "to_empty_and_back"


def test_the_dtype_of_the_weight_and_of_the_output():
    module, weight = packed_of(dtype=torch.float16)
    assert module.dequantize_weight().dtype == torch.float16
    assert torch.equal(module.dequantize_weight(), weight.half())
    assert torch.equal(module.dequantize_weight(torch.float32), weight)
    assert module(gaussian(2, 96).half()).dtype == torch.float16


def test_state_dict_round_trip_and_what_was_not_loaded_shows():
    module, _ = packed_of(bits=3)
    x = gaussian(2, 96, seed=2)
    fresh = PackedLinear.empty(96, 64, 3, 32, True, torch.float32)
    assert bool(fresh(x).isnan().all())
    assert list(module.state_dict()) == ["qweight", "qzeros", "scales", "g_idx", "bias"]
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(x), module(x))
    without = PackedLinear.empty(96, 64, 3, 32, False, torch.float32)
    assert "bias" not in without.state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for qweight"):
        PackedLinear.empty(96, 64, 4, 32, True).load_state_dict(module.state_dict())


def test_a_deep_copy_is_its_own():
    module, weight = packed_of()
    twin = copy.deepcopy(module)
    module.scales.zero_()
    module.qweight.zero_()
    assert torch.equal(twin.dequantize_weight(), weight)
    assert repr(twin) == "PackedLinear(in_features=96, out_features=64, bits=4, group_size=32, bias=True)"


@torch.no_grad()
def test_its_weight_answers_questions_and_holds_no_values():
    """T5's feed-forward reads ``wo.weight`` before it multiplies; whoever takes the answer for values sees NaN."""
    module, _ = packed_of(dtype=torch.float16)
    weight = module.weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((64, 96), torch.float16, "cpu")
    assert not weight.requires_grad
    assert "weight" not in module.state_dict()
    assert weight.untyped_storage().nbytes() == 2
    assert bool(F.linear(gaussian(2, 96).half(), weight).isnan().all())
    config = transformers.T5Config(d_model=32, d_ff=64, num_heads=2, d_kv=16, num_layers=1, vocab_size=11)
    for kind in ("relu", "gated-gelu"):
        config.update({"feed_forward_proj": kind, "is_gated_act": "gated" in kind, "dense_act_fn": "relu"})
        model = transformers.T5EncoderModel(config).eval()
        block = model.encoder.block[0].layer[1].DenseReluDense
        packed, dense = packed_of(32, 64, bias=False)
        block.wo = packed
        tokens = torch.tensor([[1, 2, 3]])
        ours = model(tokens).last_hidden_state
        block.wo = torch.nn.Linear(64, 32, bias=False)
        block.wo.weight.data = dense
        assert_near(ours, model(tokens).last_hidden_state, 1e-4)


def test_sizes_and_parts_that_do_not_fit():
    scale, zero, codes = torch.ones(64, 3), torch.zeros(64, 3), torch.zeros(64, 96, dtype=torch.uint8)
    assert why_not_packable(96, 64) is None
    with pytest.raises(QuantizationError, match="100 inputs and 10 outputs: the layout packs runs of 32"):
        PackedLinear.empty(100, 10, 4, 20, False)
    with pytest.raises(InvalidSetting, match="one of 2, 3, 4, 8"):
        PackedLinear.empty(96, 64, 5, 32, False)
    with pytest.raises(InvalidSetting, match="-1 for the whole row"):
        PackedLinear.empty(96, 64, 4, 0, False)
    with pytest.raises(QuantizationError, match=r"scale must be \[out=64, groups=3\].*got \[64, 1\]"):
        PackedLinear.from_codes(codes, scale[:, :1], zero, None, 4, 32)
    with pytest.raises(QuantizationError, match=r"not all positive and finite in torch\.float16"):
        PackedLinear.from_codes(codes, scale * 1e9, zero, None, 4, 32)
    for wrong in (0 * scale, -scale):
        with pytest.raises(QuantizationError, match="not all positive"):
            PackedLinear.from_codes(codes, wrong, zero, None, 4, 32)
    for wrong in (zero + 0.5, zero + 16, zero - 1):
        with pytest.raises(QuantizationError, match=r"whole numbers in 0\.\.15"):
            PackedLinear.from_codes(codes, scale, wrong, None, 4, 32)
    with pytest.raises(QuantizationError, match=r"g_idx must be \[96\] with values in 0\.\.2"):
        PackedLinear.from_codes(codes, scale, zero, torch.arange(96), 4, 32)
    with pytest.raises(QuantizationError, match="code 16 does not fit 4 bits"):
        PackedLinear.from_codes(codes + 16, scale, zero, None, 4, 32)
    with pytest.raises(QuantizationError, match=r"bias must be \[64\]; got \[3\]"):
        PackedLinear.from_codes(codes, scale, zero, None, 4, 32, torch.zeros(3))
