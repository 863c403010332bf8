"""Share of the MACs that a partial step of deepcache takes, for Stable Diffusion 1.5 and XL.

    python benchmarks/deepcache_macs.py --json benchmarks/results/deepcache_macs.json

Nothing is computed and no weights are made: see ``hf_accel/sites/step_cache/unet_macs.py``.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import common
import torch
from deepcache_gpu import ARCHITECTURES, Architecture

from hf_accel.measure.machine import describe_machine
from hf_accel.sites.step_cache.unet_macs import ForwardShape, MacShares

INTERVALS = (3, 5)


def count(architecture: Architecture, branch: int) -> dict[str, Any]:
    """MACs of a full and a partial step of one picture with guidance, and the ratios that they give."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**architecture.unet)
        side = unet.config.sample_size
        text = torch.empty(2, *architecture.embeddings["prompt_embeds"][1:])
        arguments: dict[str, Any] = {"sample": torch.empty(2, 4, side, side), "encoder_hidden_states": text}
        if "pooled_prompt_embeds" in architecture.embeddings:
            pooled = torch.empty(2, *architecture.embeddings["pooled_prompt_embeds"][1:])
            arguments["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.empty(2, 6)}
    found = MacShares(unet, branch).of(ForwardShape.of(arguments))
    if found is None:
        raise RuntimeError(f"the MACs of {architecture.name} cannot be counted")
    full, partial = found
    ratios = {str(n): n * full / (full + (n - 1) * partial) for n in INTERVALS}
    return {
        "architecture": architecture.name,
        "side": architecture.side,
        "branch": branch,
        "full_macs_per_picture": full / 2,
        "partial_share": partial / full,
        "ratio_at_interval": ratios,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--branches", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--json")
    options = parser.parse_args()
    records = [count(a, branch) for a in ARCHITECTURES.values() for branch in options.branches]
    for r in records:
        print(f"{r['architecture']} branch {r['branch']}: {r['partial_share']:.1%}, {r['ratio_at_interval']}")
    common.save(options.json, describe_machine(torch.device("cpu")), records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
