"""Write ``docs/results.md`` from the JSON under ``benchmarks/results/``: no figure in the docs is typed by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tables_diffusion as diffusion
import tables_kernels as kernels
import tables_language as language

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results.md"

SECTIONS: list[tuple[str, str, Callable[[dict[str, Any]], str]]] = [
    ("svg2_quality.json", "Quality of svg2 on mini-wan", diffusion.quality),
    ("sparse_quality.json", "Sparse attention methods on mini-wan", diffusion.sparse_quality),
    ("sparge_calibration.json", "Calibrating sparge on mini-wan", diffusion.sparge_calibration),
    ("sla_finetune.json", "Fine-tuning sla on mini-wan", diffusion.sla_finetune),
    ("radial_length_cpu.json", "radial against length, on a CPU", diffusion.radial_length),
    ("attention_methods_4k_cpu.json", "All attention methods at 4,096 tokens, on a CPU", diffusion.attention_bench),
    ("attention_methods_cpu.json", "All attention methods at 8,192 tokens, on a CPU", diffusion.attention_bench),
    ("attention_methods_gpu.json", "All attention methods on one shape, on a GPU", diffusion.attention_bench),
    ("mini_wan_judge.json", "What mini-wan shows of its prompts", diffusion.judge),
    ("deepcache.json", "deepcache on mini-sd", diffusion.deepcache),
    ("deepcache_peer.json", "deepcache beside the authors' package", diffusion.deepcache_peer),
    ("deepcache_macs.json", "MACs of deepcache on Stable Diffusion 1.5 and XL", diffusion.deepcache_macs),
    ("mini_sd_judge.json", "What mini-sd shows of its prompts", diffusion.mini_sd_judge),
    ("mini_sdar_judge.json", "Answers of mini-sdar", language.mini_sdar_judge),
    ("mini_llama_judge.json", "Perplexity of mini-llama", language.mini_llama_judge),
    ("deepcache_gpu.json", "deepcache on Stable Diffusion 1.5 and XL, on a GPU", diffusion.deepcache_gpu),
    ("losa_quality.json", "losa and quest on mini-sdar", language.losa_quality),
    ("rcd_curve.json", "rcd on mini-rcd", language.rcd_curve),
    ("gptq_quality.json", "gptq on mini-llama", language.gptq_quality),
    ("qwha_quality.json", "Adapters on quantised mini-llamas", language.qwha_quality),
    ("losa_step_cpu.json", "Attention of a denoising step against a long prefix, on a CPU", kernels.losa_step),
    ("losa_step_gpu.json", "Attention of a denoising step against a long prefix, on a GPU", kernels.losa_step),
    ("quantized_linear_cpu.json", "Kernel quantized_linear, on a CPU", kernels.quantized_linear),
    ("quantized_linear_gpu.json", "Kernel quantized_linear, on a GPU", kernels.quantized_linear),
    ("hadamard_cpu.json", "Kernel hadamard, on a CPU", kernels.hadamard),
    ("hadamard_gpu.json", "Kernel hadamard, on a GPU", kernels.hadamard),
    ("qwha_weight_cpu.json", "Kernel qwha_weight, on a CPU", kernels.qwha_weight),
    ("qwha_weight_gpu.json", "Kernel qwha_weight, on a GPU", kernels.qwha_weight),
    ("qwha_step_cpu.json", "A training step with QWHA adapters, on a CPU", kernels.qwha_step),
    ("qwha_step_gpu.json", "A training step with QWHA adapters, on a GPU", kernels.qwha_step),
    ("svg2_attention_cpu.json", "Attention time of svg2 on a CPU", kernels.svg2_attention),
    ("svg2_attention_gpu.json", "Attention time of svg2 on a GPU", kernels.svg2_attention),
    ("first_use_cpu.json", "First use, and apply", kernels.first_use),
    ("variable_block_attention_cpu.json", "Kernel variable_block_attention on a CPU", kernels.attention_kernel),
    ("variable_block_attention_gpu.json", "Kernel variable_block_attention on a GPU", kernels.attention_kernel),
    ("block_sparse_attention_cpu.json", "Kernel block_sparse_attention on a CPU", kernels.attention_kernel),
    ("block_sparse_attention_gpu.json", "Kernel block_sparse_attention on a GPU", kernels.attention_kernel),
]


def page() -> str:
    parts = ["# Results", "Made by `python docs/make/tables.py` from `benchmarks/results/`."]
    missing = []
    for name, title, render in SECTIONS:
        file = ROOT / "benchmarks" / "results" / name
        if file.exists():
            parts += [f"## {title}", render(json.loads(file.read_text()))]
        else:
            missing.append(title[0].lower() + title[1:])
    if missing:
        parts += ["## Not measured", "\n".join(f"- {title}" for title in missing)]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    PAGE.write_text(page())
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
