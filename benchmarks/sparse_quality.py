"""Every sparse attention method on mini-wan at equal densities: quality, attention time and whole time.

    python benchmarks/sparse_quality.py --json benchmarks/results/sparse_quality.json --picture docs/img/sparse-quality
    python benchmarks/sparse_quality.py --sla-weights 0.5=DIR 0.3=DIR 0.15=DIR ...   # fine-tuned sla too

Held-out prompts, the seed of each prompt for all methods, one dense run per prompt for all of them. The settings of a
method are those that ``configs/`` has for mini-wan (or its defaults); its budget is searched on attention inputs
recorded from a dense run of the first prompt, until the density is the wanted one; the table shows the density that
the generations then had. ``dense_steps`` and ``dense_layers`` are the same for all. A density that a method cannot
reach at this grid is reported as the nearest that it can.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common  # noqa: F401  (finds the checkout)
import torch
import yaml

from hf_accel import registry
from hf_accel.attention.call import AttentionCall
from hf_accel.hosts.target import Model
from hf_accel.measure.budget import Dial, Reached, ungated
from hf_accel.measure.compare import DENSE, Comparison, compare, figures_of
from hf_accel.measure.demo import native_call
from hf_accel.measure.pareto import Point, draw
from hf_accel.measure.recording import density_on, record_attention
from hf_accel.measure.sampling import generate, generate_with
from hf_accel.presets import families
from hf_accel.train.saving import load_trained
from hf_accel.zoo import heldout, path

METHODS = ("svg", "svg2", "radial", "grat", "sparge", "sla")
DENSITIES = (0.5, 0.3, 0.15)


def searched(pipe: Any, method: str, calls: list[AttentionCall], changes: dict[str, Any]) -> Iterator[Reached]:
    """The settings of a method at each density, without the gates; see the module's words."""
    cls = registry.get(method)
    known = families.settings_for(Model("transformer", pipe.transformer), method)
    base = (known.config if known is not None else cls.Config()).to_dict()["settings"]
    base |= {**ungated(cls), **changes}
    measure = density_on(calls, cls)
    if method == "grat":
        grid = calls[0].grid
        found = [Reached({**base, **tiles}, measure({**base, **tiles}), 1) for tiles in grat_tilings(grid)]
        for density in DENSITIES:
            yield min(found, key=lambda reached: abs(reached.density - density))
        return
    dial = Dial(cls, measure, base)
    for density in DENSITIES:
        yield dial.reach(density)


def grat_tilings(grid: Any) -> Iterator[dict[str, Any]]:
    """grat has no dial: its density follows from the tiles. Tiles of 16 tokens or more that divide the grid."""
    sides = [[s for s in range(1, extent + 1) if extent % s == 0] for extent in (grid.frames, grid.height, grid.width)]
    for t, h, w in itertools.product(*sides):
        if h == w and 16 <= t * h * w <= 256:
            yield {"variant": "X", "group_size": (t, h, w)}
            yield from ({"variant": "B", "group_size": (t, h, w), "b": b} for b in (1, 2, 3))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--dense-steps", type=yaml.safe_load, default=0.2, help="count or fraction, for all methods")
    parser.add_argument("--dense-layers", type=yaml.safe_load, default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="METHOD.NAME=VALUE")
    parser.add_argument("--sla-weights", nargs="*", default=[], metavar="DENSITY=DIR", help="folders of save_trained")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help="start of the names of the two pictures, without an ending")
    options = parser.parse_args()

    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(path("mini-wan"), dtype=torch.float32)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    call = {**native_call(), "num_inference_steps": options.steps}
    items = heldout("mini-wan")[: options.prompts]
    changes: dict[str, dict[str, Any]] = {}
    for pair in options.set:
        name, value = pair.split("=", 1)
        method, name = name.split(".", 1)
        changes.setdefault(method, {})[name] = yaml.safe_load(value)

    steps = [int(share * options.steps) for share in (0.3, 0.6)]
    first = items[0]
    calls = record_attention(pipe, lambda: generate(pipe, first["prompt"], first["seed"], **call), steps)
    gates = {"dense_steps": options.dense_steps, "dense_layers": options.dense_layers, "break_even": "off"}
    requests: list[tuple[str, Any]] = []
    about: dict[str, dict[str, Any]] = {}
    for method in options.methods:
        for wanted, reached in zip(DENSITIES, searched(pipe, method, calls, changes.get(method, {})), strict=True):
            settings = {**reached.settings, **gates}
            same = next((label for label, entry in about.items() if entry["settings"] == settings), None)
            print(
                f"{method:<8} wanted {wanted:<5} replay {reached.density:.3f} after {reached.tries} tries"
                + (f": the same settings as {same!r}, the nearest it reaches" if same else ""),
                flush=True,
            )
            if same is not None:
                about[same]["wanted"].append(wanted)
                continue
            label = f"{method} {wanted}"
            about[label] = {"method": method, "wanted": [wanted], "settings": settings}
            requests.append((label, {method: settings}))
    trained: list[tuple[str, str]] = []
    for pair in options.sla_weights:
        density, folder = pair.split("=", 1)
        known = about[f"sla {float(density)}"]["settings"]
        label = f"sla fine-tuned {float(density)}"
        about[label] = {
            "method": "sla fine-tuned",
            "wanted": [float(density)],
            "settings": {**known, "weights": folder},
        }
        trained.append((label, folder))

    begin = time.perf_counter()
    result = compare(
        pipe,
        requests,
        prompts=[item["prompt"] for item in items],
        seeds=[item["seed"] for item in items],
        announce=lambda words: print(f"{time.perf_counter() - begin:7.0f} s  {words}", flush=True),
        **call,
    )
    fine_tuned(pipe, result, trained, about, items, call)
    print(result)
    data = as_data(result, about) | {"dense_steps": options.dense_steps, "dense_layers": options.dense_layers}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(data, indent=1) + "\n")
    if options.picture:
        pictures(data, options.picture)
    return 0


def fine_tuned(
    pipe: Any,
    result: Comparison,
    trained: list[tuple[str, str]],
    about: dict[str, dict[str, Any]],
    items: list[dict[str, Any]],
    call: dict[str, Any],
) -> None:
    """Add weights that were fine-tuned with the method. They change the model, so each has a pipeline of its own; the
    unpatched runs they are set beside are made anew by ``pipe``, in turn with theirs."""
    models = []
    for label, folder in trained:
        model = type(pipe).from_pretrained(path("mini-wan"), dtype=torch.float32).to(pipe.device)
        model.set_progress_bar_config(disable=True)
        load_trained(model, folder).revert()  # the adapter stays
        generate_with(model, {"sla": about[label]["settings"]}, items[0]["prompt"], 0, **call)  # warm-up
        models.append((label, model))
    dense = {entry.prompt: entry.attention_seconds for entry in result.of(DENSE)}
    for item in items if models else ():
        text, seed = item["prompt"], item["seed"]
        plain = generate(pipe, text, seed, **call)
        for label, model in models:
            sample = generate_with(model, {"sla": about[label]["settings"]}, text, seed, **call)
            result.figures.append(figures_of(label, text, seed, sample, plain, dense[text]))


def as_data(result: Comparison, about: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What goes into the JSON: everything but the reports, and with each summary what was asked for."""
    data = result.to_dict()
    del data["reports"]
    dense = {"method": DENSE, "wanted": [1.0], "settings": {}}
    data["summary"] = [entry | about.get(entry["label"], dense) for entry in data["summary"]]
    return data


def pictures(data: dict[str, Any], start: Path) -> None:
    """``START.png``: PSNR against attention speed. ``START-density.png``: PSNR against 1 / density, on any machine."""
    rows = [row for row in data["summary"] if row["method"] != DENSE]
    words = f"mini-wan, {rows[0]['prompts']} held-out prompts, {data['machine']['device']}; numbers: density"
    quality = "PSNR against dense, dB (mean)"

    def points(speed):
        return [Point(row["method"], speed(row), row["psnr_mean"], f"{row['density']:.2f}") for row in rows]

    times = "attention time, dense / method, selection included; left of 1 dense is faster"
    bound = "1 / density of sparse calls: what the attention's speed cannot exceed"
    attention = points(lambda row: row["attention_time_ratio"])
    draw(start.with_name(start.name + ".png"), attention, x=times, y=quality, title=words)
    by_density = points(lambda row: 1 / row["density"])
    draw(start.with_name(start.name + "-density.png"), by_density, x=bound, y=quality, title=words)


if __name__ == "__main__":
    sys.exit(main())
