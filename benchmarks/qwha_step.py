"""Time of a training step with QWHA adapters against LoRA and FourierFT of equal size, by number of tokens.

python benchmarks/qwha_step.py --shape llama3b --json OUT.json           # GPU, bf16 and 4 bits
python benchmarks/qwha_step.py --shape cpu512 --threads 2 --json OUT.json

A step is forward, backward and AdamW through a stack of adapted linears with SiLU between, adapters in fp32 and the
positions of QWHA spread at random; all forms take turns, step by step. ``auto`` is what users get. ``kept`` is what the
forward keeps for the backward pass beside parameters and buffers.

The paper measures 1.46 times CLoQ's (a LoRA's) time at batch 1 and 1.08 times at batch 16, in whole models. In linears
alone there is a floor: the weight's side takes three products of the weight's size per step (output, gradient of the
input, gradient of the weight), a LoRA two and small ones, so with many tokens the ratio tends to 3 / 2 at most.

Outputs and gradients of the two sides are compared first; if they differ nothing is timed, and the exit code is 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import conclude, kernel_parser, numbers, parse, relative_error
from torch import nn

from hf_accel.measure.timing import in_turn
from hf_accel.peft import QWHAConfig
from hf_accel.quant.formats import format_of
from hf_accel.quant.grid import Scheme, encode, fit_grid
from hf_accel.quant.packed_linear import PackedLinear

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
PAPER = {"batch 1": 1.46, "batch 16": 1.08}


@dataclass(frozen=True)
class Shape:
    """Linears one after the other, ``sizes[i] -> sizes[i + 1]``; ``bits`` of packed bases, 0 a dense one."""

    name: str
    sizes: tuple[int, ...]
    rank: int
    tokens: tuple[int, ...]
    dtype: torch.dtype
    bits: tuple[int, ...] = (0, 4)


SHAPES = {
    shape.name: shape
    for shape in (
        # Of Llama-3.2-3B: attention and feed-forward.
        Shape("llama3b", (3072, 3072, 3072, 8192, 3072), 64, (256, 512, 1024, 2048, 4096, 8192), torch.bfloat16),
        Shape("cpu512", (512, 512, 512, 512), 16, (256, 512, 1024, 2048, 4096, 8192), torch.float32),
        Shape("toy", (96, 64, 96), 4, (8, 64), torch.float32),
    )
}


class Stack(nn.Sequential):
    """A norm, then linears with SiLU between, dense or packed."""

    def __init__(self, shape: Shape, bits: int, device: torch.device):
        super().__init__(nn.RMSNorm(shape.sizes[0], device=device, dtype=shape.dtype))
        torch.manual_seed(0)
        for i, (n, m) in enumerate(zip(shape.sizes, shape.sizes[1:], strict=False)):
            if i:
                self.append(nn.SiLU())
            dense = nn.Linear(n, m, bias=False, device=device, dtype=shape.dtype)
            self.append(dense if not bits else pack(dense, bits))


def pack(dense: nn.Linear, bits: int, group_size: int = 32) -> PackedLinear:
    scheme = Scheme.grouped(format_of(bits), group_size)
    weight = dense.weight.detach().float()
    grid = fit_grid(weight, scheme, scale_dtype=dense.weight.dtype)
    parts = encode(weight, grid, scheme), grid.scale, grid.zero, None, bits, group_size
    return PackedLinear.from_codes(*parts, dtype=dense.weight.dtype)


def adapted(shape: Shape, bits: int, form: str, device: torch.device) -> nn.Module | None:
    """The stack with adapters of one form on every linear, or None where the form takes no such base."""
    from peft import FourierFTConfig, LoraConfig, get_peft_model

    stack = Stack(shape, bits, device)
    names = [name for name, module in stack.named_modules() if isinstance(module, nn.Linear | PackedLinear)]
    config: Any
    if form == "LoRA":
        config = LoraConfig(r=shape.rank, target_modules=names, init_lora_weights=False)
    elif form == "FourierFT":
        if bits or len(set(shape.sizes)) > 1:  # plain Linear only, one number of coefficients for all
            return None
        count = shape.rank * 2 * shape.sizes[0]
        config = FourierFTConfig(n_frequency=count, scaling=1.0, target_modules=names)
    else:
        path = form.rpartition(" ")[2]
        config = QWHAConfig(r=shape.rank, alpha=0.1, init_weights=False, path=path, target_modules=names)
    return get_peft_model(stack, config)


FORMS = ("LoRA", "FourierFT", "QWHA weight", "QWHA activation", "QWHA auto")


def step_of(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def kept_bytes(model: nn.Module, x: torch.Tensor) -> int:
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model(x)
    del out
    return sum(kept.values())


def sides_differ(shape: Shape, bits: int, x: torch.Tensor, device: torch.device) -> float:
    """Relative difference of outputs and gradients between the two sides, the larger."""
    found = []
    for form in ("QWHA weight", "QWHA activation"):
        model: Any = adapted(shape, bits, form, device)
        out = model(x)
        out.float().square().mean().backward()
        gradients = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
        found.append((out.detach(), torch.cat(gradients)))
    return max(relative_error(a, b) for a, b in zip(*found, strict=True))


def measure(
    shape: Shape, bits: int, device: torch.device, tokens: int, rounds: int
) -> tuple[list[dict[str, Any]], bool]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, shape.sizes[0], generator=generator).to(device, shape.dtype)
    base = f"{bits} bits" if bits else str(shape.dtype).removeprefix("torch.")
    case = {"shape": shape.name, "base": base, "tokens": tokens, "rank": shape.rank}
    difference = sides_differ(shape, bits, x[: min(tokens, 256)], device)
    if difference > TOLERANCE[shape.dtype]:
        print(f"WRONG {shape.name} {base} {tokens} tokens: the sides differ by {difference:.1e}")
        return [{**case, "form": "QWHA", "relative_error": difference}], False
    made: Any = {form: adapted(shape, bits, form, device) for form in FORMS}
    models = {form: model for form, model in made.items() if model is not None}
    timings = in_turn({form: step_of(model, x) for form, model in models.items()}, device, rounds, warmup=2)
    records = []
    for form, model in models.items():
        record = {**case, "form": form, "trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}
        record |= {"relative_error": difference, "kept_bytes": kept_bytes(model, x), **vars(timings[form])}
        record["times_lora"] = round(timings[form].p50_ms / timings["LoRA"].p50_ms, 3)
        records.append(record)
        print(
            f"{shape.name:8} {base:9} {tokens:6} tokens  {form:16} {record['p50_ms']:10.2f} ms  "
            f"{record['times_lora']:7.2f} x LoRA  kept {record['kept_bytes'] / 1e6:9.1f} MB"
        )
    return records, True


def main() -> int:
    parser = kernel_parser(__doc__)
    parser.add_argument("--tokens", type=numbers, help="comma-separated, instead of those of the shape")
    parser.add_argument(
        "--bits", type=numbers, help="comma-separated, instead of those of the shape; 0 is a dense base"
    )
    parser.add_argument("--rounds", type=int, default=10)
    options, shapes, device = parse(parser, SHAPES)
    print(f"paper, QWHA to CLoQ (a LoRA) on an A100: {', '.join(f'{r} x at {b}' for b, r in PAPER.items())}")
    runs = (
        measure(shape, bits, device, tokens, options.rounds)
        for shape in shapes
        for bits in options.bits or shape.bits
        for tokens in options.tokens or shape.tokens
    )
    return conclude(options, device, runs, paper_times_lora=PAPER)


if __name__ == "__main__":
    sys.exit(main())
