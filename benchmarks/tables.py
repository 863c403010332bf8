"""Write ``docs/results.md`` from the JSON under ``benchmarks/results/``: no figure in the docs is typed by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "results.md"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def machine(environment: dict[str, Any]) -> str:
    versions = environment.get("versions", {})
    torch_version = versions.get("torch")
    parts = [environment["device"], f"torch {torch_version}", f"commit {environment.get('commit')}"]
    if environment.get("threads"):
        parts.insert(1, f"{environment['threads']} threads")
    if environment.get("load_average") is not None:
        parts.append(f"load average {environment['load_average']} at the start")
    return "Measured on " + ", ".join(parts) + "."


def quality(data: dict[str, Any]) -> str:
    """svg2 on mini-wan against its budget."""
    rows = [
        [
            row["method"],
            f"{row['budget']}",
            f"{row['density']:.3f}",
            f"{row['psnr_mean']:.2f}",
            f"{row['psnr_worst']:.2f}",
            f"{row['ssim_mean']:.4f}",
            f"{row['max_difference']:.1e}",
            f"{row.get('prompts', data['prompts'])}",
        ]
        for row in data["summary"]
    ]
    head = ["method", "top_p", "density", "PSNR mean, dB", "PSNR worst, dB", "SSIM mean", "max difference", "prompts"]
    settings = ", ".join(f"{k}={v}" for k, v in data["svg2_settings"].items())
    return (
        f"Held-out prompts, same seed as dense, {data['call']['num_inference_steps']} steps, guidance "
        f"{data['call']['guidance_scale']}. svg2 settings: {settings}. Density is of the sparse calls. "
        f"{machine(data['machine'])}\n\n{table(head, rows)}"
    )


def svg2_attention(data: dict[str, Any]) -> str:
    """Whole attention of svg2 against SDPA."""
    rows = [
        [
            f"{r['shape']}, {r['tokens']} tokens, {r['heads']} heads x {r['head_dim']}",
            f"{r['top_p']}",
            f"{r['density']:.3f}",
            f"{r['times']['dense']['p50_ms']:.1f}",
            f"{r['times']['svg2']['p50_ms']:.1f}",
            f"{r['times']['kmeans']['p50_ms']:.1f}",
            f"{r['ratio']:.2f}",
            f"{r['bound']:.2f}",
            f"{r['share_of_bound']:.2f}",
            f"{r['relative_error']:.3f}",
        ]
        for r in data["records"]
    ]
    head = ["shape", "top_p", "density", "SDPA, ms", "svg2, ms", "of it k-means", "ratio", "bound", "of bound", "error"]
    return f"Selection and permutation included, warm centroids. {machine(data['machine'])}\n\n{table(head, rows)}"


def attention_kernel(data: dict[str, Any]) -> str:
    """One attention kernel against the best dense baseline."""
    rows = [
        [
            f"{r['shape']} {r['tensor']} {r['dtype']}",
            r["backend"],
            f"{r['density']:.3f}",
            f"{r['dense_ms']:.2f}",
            f"{r['p50_ms']:.2f}",
            f"{r['speedup']:.2f}",
            f"{r['bound_speedup']:.2f}",
            f"{r['times_density_dense']:.2f}",
            f"{r['relative_error']:.1e}",
        ]
        for r in data["records"]
        if r.get("correct")
    ]
    head = ["shape", "backend", "density", "best dense, ms", "ours, ms", "ratio", "bound", "x density x dense", "error"]
    return f"{machine(data['machine'])}\n\n{table(head, rows)}"


def judge(data: dict[str, Any]) -> str:
    """What mini-wan's videos show of their prompts."""
    ours, ceiling = data["agreement"], data["agreement_of_rendered_clips"]
    rows = [[name.replace("_", " "), f"{ours[name]:.2f}", f"{ceiling[name]:.2f}"] for name in ours]
    return (
        "Share of what the held-out prompts name that `judge.py` finds in the videos (docs/zoo.md says how, and what "
        f"chance gives).\n\n{table(['reading', 'mini-wan', 'rendered clips of the same scenes'], rows)}"
    )


def sla_finetune(data: dict[str, Any]) -> str:
    """Fine-tunings of sla on mini-wan."""
    rows = [
        [
            f"{run['topk']:g}",
            str(run["steps"]),
            f"{run['minutes']:.1f}",
            f"{run['validation_loss_before']:.4f}",
            f"{run['validation_loss_after']:.4f}",
            f"{run['psnr_db_before']:.2f}",
            f"{run['psnr_db_after']:.2f}",
        ]
        for run in data["runs"]
    ]
    head = ["topk", "steps", "minutes", "validation loss before", "after", "PSNR before, dB", "after"]
    return (
        f"Distilled from the dense model with LoRA and `proj_l`; PSNR over {data['runs'][0]['prompts']} held-out "
        f"prompts without dense steps. {machine(data['machine'])}\n\n{table(head, rows)}\n\n"
        "![loss against steps](img/sla-finetune.png)"
    )


def sparge_calibration(data: dict[str, Any]) -> str:
    """sparge with and without budgets per head."""
    seconds = data["calibration_seconds"]
    rows = [
        [
            row["label"],
            f"{row['density']:.3f}",
            f"{row['psnr_mean']:.2f}",
            f"{row['psnr_worst']:.2f}",
            f"{row['ssim_mean']:.4f}",
            f"{row['attention_time_ratio']:.2f}",
            f"{seconds[row['label']]:.0f}" if row["label"] in seconds else "",
        ]
        for row in data["summary"]
    ]
    head = ["budget", "density", "PSNR mean, dB", "worst", "SSIM mean", "attention x", "calibration, s"]
    return (
        f"{len(data['baselines'])} held-out prompts, {data['calibration_prompts']} others to calibrate on, no dense "
        "steps. Equal shares move in whole blocks of 36, so that a pair is not at quite the same density; the method's "
        "rows above have equal shares at one block more. "
        f"{machine(data['machine'])}\n\n{table(head, rows)}"
    )


def radial_length(data: dict[str, Any]) -> str:
    """Density and time of radial against length."""
    rows = []
    for record in data["records"]:
        for entry in record["lengths"]:
            timed = "radial" in entry
            rows.append(
                [
                    record["shape"],
                    str(entry["frames"]),
                    f"{entry['tokens']:,}",
                    f"{entry['density']:.3f}",
                    f"{entry['dense']['p50_ms']:.0f}" if timed else "",
                    f"{entry['radial']['p50_ms']:.0f}" if timed else "",
                    f"{entry['speedup']:.2f}" if timed else "",
                ]
            )
    head = ["tokens of a frame", "frames", "tokens", "density", "dense, ms", "radial, ms", "ratio"]
    return f"Settings as published for the shape, mask ready. {machine(data['machine'])}\n\n{table(head, rows)}"


def sparse_quality(data: dict[str, Any]) -> str:
    """Every sparse attention method on mini-wan at equal densities."""
    rows = [
        [
            row["method"],
            ", ".join(f"{wanted:g}" for wanted in row["wanted"]),
            f"{row['density']:.3f}",
            f"{row['psnr_mean']:.2f}",
            f"{row['psnr_worst']:.2f}",
            f"{row['ssim_mean']:.4f}",
            f"{row['ssim_worst']:.4f}",
            f"{row['sparse_share']:.0%}",
            f"{row['attention_time_ratio']:.2f}",
            f"{row['whole_time_ratio']:.2f}",
        ]
        for row in data["summary"]
        if row["method"] != "dense"
    ]
    head = ["method", "wanted", "density", "PSNR mean, dB", "worst", "SSIM mean", "worst", "sparse calls"]
    head += ["attention x", "whole x"]
    prompts, steps = len(data["baselines"]), data["call"]["num_inference_steps"]
    return (
        f"{prompts} held-out prompts, same seeds, {steps} steps, guidance {data['call']['guidance_scale']}; "
        f"dense_steps={data['dense_steps']} and dense_layers={data['dense_layers']} for all, though training-free "
        "methods are usually run with some. Density is of the sparse calls; several wanted densities in a row mean "
        "that the method reaches nothing nearer at this grid. Attention x and whole x: dense time over the "
        "method's, selection included. "
        f"{machine(data['machine'])}\n\n{table(head, rows)}\n\n"
        "![quality against attention time](img/sparse-quality.png)\n"
        "![quality against density](img/sparse-quality-density.png)"
    )


def attention_bench(data: dict[str, Any]) -> str:
    """``hf-accel bench attention`` on one shape."""
    rows = [
        [
            row["method"],
            f"{row['density']:.3f}",
            f"{row['dense_ms']['p50_ms']:.1f}",
            f"{row['method_ms']['p50_ms']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['bound']:.2f}",
            f"{row['relative_l1']:.3f}",
            f"{row['cosine']:.4f}",
        ]
        for row in data["rows"]
    ]
    shape = data["shape"]
    grid = "x".join(map(str, shape["grid"])) + " = " if shape["grid"] else ""
    head = ["method", "density", "dense, ms", "method, ms", "ratio", "bound", "L1 error", "cosine"]
    skipped = "".join(f"\n\n{method}: {reason}" for method, reason in data["skipped"].items())
    clusters = next((row["settings"] for row in data["rows"] if "num_k_centroids" in row["settings"]), None)
    words = ""
    if clusters is not None:
        words = f"svg2 with {clusters['num_q_centroids']} and {clusters['num_k_centroids']} clusters. "
    return (
        f"{grid}{shape['tokens']} tokens, {shape['heads']} heads x {shape['head_dim']}, {shape['dtype']}, synthetic "
        f"video tokens, selection included, warm state; dense is {data['dense']}, the fastest of "
        f"{', '.join(data['dense_ms'])}. {words}{machine(data['machine'])}\n\n{table(head, rows)}{skipped}"
    )


def deepcache(data: dict[str, Any]) -> str:
    """deepcache on mini-sd: intervals and branches, and plain sampling in equal time."""
    plain = data["rows"][0]
    rows = [
        [
            row["label"] + (f" (the time of {row['matches']})" if row["matches"] else ""),
            str(row["full_steps"]),
            "" if row is plain else f"{row['psnr_mean']:.2f}",
            "" if row is plain else f"{row['psnr_worst']:.2f}",
            "" if row is plain else f"{row['ssim_mean']:.4f}",
            f"{row['accuracy']['all']:.3f}",
            "" if row is plain else points(row, plain),
            f"{row['mac_share']:.1%}",
            f"{row['by_macs']:.2f}",
            f"{row['whole_time_ratio']:.2f}",
        ]
        for row in data["rows"]
    ]
    head = ["sampling", "full steps", "PSNR mean, dB", "worst", "SSIM mean", "caption accuracy", "points", "MACs"]
    head += ["by MACs x", "whole x"]
    return (
        f"{data['prompts']} prompts in batches of {data['batch']}, {data['steps']} steps of {data['scheduler']}, "
        f"guidance {data['guidance']:g}, {data['dtype']}. I: interval, B: branch; non-uniform around step 15 with "
        "power 1.4, as the official code's list or by signed roots. PSNR and SSIM against plain pictures from the same "
        "noise; caption accuracy is the share of what the prompts name that the judge finds (docs/zoo.md), points the "
        "difference from plain in percent with the standard error over batches. MACs are of the U-Net, by MACs the "
        "ratio that they alone would give; whole: time of the pipeline call, plain over this, median over batches. The "
        "U-Net takes "
        f"{data['unet_share_of_plain_time']:.0%} of the plain time. {machine(data['machine'])}\n\n{table(head, rows)}"
        "\n\n![plain above intervals 3, 5 and 10](img/deepcache.png)"
    )


def points(row: dict[str, Any], plain: dict[str, Any]) -> str:
    """Caption accuracy against plain in percent, with its standard error."""
    gain = 100 * (row["accuracy"]["all"] - plain["accuracy"]["all"])
    error = row["accuracy_gain_error"]
    return f"{gain:+.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def deepcache_gpu(data: dict[str, Any]) -> str:
    """Time of deepcache on full-sized architectures."""
    rows = [
        [
            f"{r['architecture']}, {r['side']}²",
            r["variant"],
            f"{r['median_seconds']:.3f}",
            f"{r['ratio_to_plain']:.2f}",
            f"{r['ratio_to_best_dense']:.2f}",
            f"{1 / r['mac_share']:.2f}",
            f"{r['peak_bytes'] / 2**30:.2f}" if r["peak_bytes"] is not None else "",
            f"{r['first_seconds']:.0f}",
        ]
        for r in data["records"]
    ]
    head = ["model", "variant", "seconds", "plain x", "best dense x", "by MACs x", "peak, GiB", "first call, s"]
    first = data["records"][0]
    return (
        f"Random weights, so quality is not looked at; {first['dtype']}, {first['steps']} steps, one picture, "
        f"guidance, decoding included, branch 0. {machine(data['machine'])}\n\n{table(head, rows)}"
    )


def deepcache_macs(data: dict[str, Any]) -> str:
    """What a partial step computes."""
    rows = [
        [
            r["architecture"],
            str(r["branch"]),
            f"{100 * r['partial_share']:.1f} %",
            f"{r['ratio_at_interval']['3']:.2f}",
            f"{r['ratio_at_interval']['5']:.2f}",
        ]
        for r in data["records"]
    ]
    head = ["architecture", "branch", "MACs of a partial step", "ratio at interval 3", "at 5"]
    return (
        "Counted with torch's own counter on the architecture (attention products included), with guidance. Where time "
        f"follows the multiply-accumulates these ratios bound what caching gives.\n\n{table(head, rows)}"
    )


def deepcache_peer(data: dict[str, Any]) -> str:
    """deepcache and the authors' package."""
    package = next(name for name in data["records"][0]["held_bytes"] if name not in ("plain", "hf_accel"))
    rows = [
        [
            str(r["interval"]),
            str(r["branch"]),
            f"{r['plain_by']['hf_accel']:.2f}",
            f"{r['plain_by'][package]:.2f}",
            f"{r['package_by_ours']:.3f}",
            f"{r['held_bytes']['hf_accel'] / 1024:.0f}",
            f"{r['held_bytes'][package] / 1024:.0f}",
            f"{r['max_difference']:.1e}",
        ]
        for r in data["records"]
    ]
    head = ["interval", "branch", "ours x", f"{package} x", "package / ours", "held, KiB", "package, KiB", "difference"]
    return (
        "mini-sd in turn with the authors' package, ratios to plain sampling, median of the rounds. "
        f"{machine(data['machine'])}\n\n{table(head, rows)}"
    )


def mini_sd_judge(data: dict[str, Any]) -> str:
    """What mini-sd's pictures show of their prompts."""
    kinds = [(key, words) for key, words in JUDGED if key in data]
    readings = list(data[kinds[0][0]])
    rows = [[words, *(f"{data[key][name]:.3f}" for name in readings)] for key, words in kinds]
    return "Share of what the prompts name that `judge.py` finds in the pictures (docs/zoo.md says how).\n\n" + table(
        ["pictures", *readings], rows
    )


def mini_sdar_judge(data: dict[str, Any]) -> str:
    """Accuracy of mini-sdar by task and prompt length."""
    tasks = list(next(iter(data["table"].values())))
    rows = [
        [f"{int(length):,}", *(f"{100 * cells[task]['accuracy']:.1f} %" for task in tasks)]
        for length, cells in sorted(data["table"].items(), key=lambda item: int(item[0]))
    ]
    return (
        f"{data['items']} held-out items a cell, static low-confidence rule, one token a step (docs/zoo.md).\n\n"
        + table(["prompt, tokens", *tasks], rows)
    )


def mini_llama_judge(data: dict[str, Any]) -> str:
    """Held-out perplexity of mini-llama beside counts and rounded weights, and its answers."""
    kinds = [("unigram", data["unigram"]), ("bigram", data["bigram"]), ("mini-llama", data["perplexity"])]
    kinds += [(f"rounded to {bits} bits", value) for bits, value in data["rounded"].items()]
    words = (
        f"Perplexity per token on {data['tokens']:,} tokens of held-out files; {data['train_perplexity']:.2f} on files "
        f"of the training; {data['bits_per_character']:.2f} bits per character. Rounding is to nearest, in groups of "
        "64, of all linears inside the layers (docs/zoo.md).\n\n"
    )
    answers = (
        f"\n\nExact answers: {100 * data['related']['all']:.1f} % of the expressions that pre-training had a share of, "
        f"{100 * data['tasks']['all']:.1f} % of the task's, before any tuning."
    )
    return words + table(["model", "perplexity"], [[name, f"{value:,.2f}"] for name, value in kinds]) + answers


JUDGED = [
    ("rendered", "rendered"),
    ("rendered_through_vae", "rendered, through the VAE and back"),
    ("heldout", "mini-sd, held-out prompts"),
    ("heldout_floor", "the same pictures against others' prompts"),
    ("fresh", "mini-sd, fresh prompts"),
]


def losa_quality(data: dict[str, Any]) -> str:
    """losa and quest on mini-sdar at equal budgets."""
    rows = [
        [
            str(r["prefix"]),
            r["row"],
            f"{r['accuracy']['all']:.3f}",
            *(f"{r['accuracy'][task]:.2f}" for task in data["tasks"]),
            f"{r['density']:.3f}",
            f"{r['later_density']:.3f}" if r["later_density"] is not None else "",
            f"{r['later_active']:.2f}" if r["later_active"] is not None else "",
            f"{r['later_pages']:.1f}" if r["later_pages"] is not None else "",
            f"{r['attention_ratio']:.2f}",
            f"{r['whole_ratio']:.2f}",
        ]
        for r in data["records"]
    ]
    head = [
        "prefix", "row", "accuracy", *data["tasks"], "density", "later", "active", "pages", "attention x", "whole x",
    ]  # fmt: skip
    call = data["call"]
    return (
        f"{data['items']} held-out items of each task and prefix, batches of {data['batch']}, greedy, rule "
        f"{call['rule']!r} with {call['steps']} steps per block of 16, pages of {data['page_size']}. Accuracy is the "
        "mean over tasks. Density: prefix keys read per KV head over the steps of a block; later: without the first; "
        "active: share of the block's tokens computed anew, pages: read per KV head, both in later steps. Ratios are "
        "time of the model's own attention (K/V concatenated) over this one's, medians over batches; whole: prefill "
        f"included. {machine(data['machine'])}\n\n{table(head, rows)}\n\n{losa_against_quest(data)}"
    )


def losa_against_quest(data: dict[str, Any]) -> str:
    """Where losa is less accurate than quest, or reads more, in words."""
    rows = {(r["prefix"], r["row"]): r for r in data["records"]}
    places = [(p, b) for p in sorted({r["prefix"] for r in data["records"]}) for b in data["budgets"]]
    sentences = []
    for reference in ("anchor", "prev"):
        behind, pages = [], []
        for prefix, budget in places:
            losa, quest = rows[prefix, f"losa {reference} {budget}"], rows[prefix, f"quest {budget}"]
            lost = quest["accuracy"]["all"] - losa["accuracy"]["all"]
            if lost > 0:
                behind.append(f"prefix {prefix}, budget {budget} ({100 * lost:.1f} points)")
            pages.append(quest["later_pages"] / losa["later_pages"])
        where = f": {'; '.join(behind)}" if behind else ""
        sentences.append(
            f"losa with reference={reference!r} is less accurate than quest with a dense first step in {len(behind)} "
            f"of {len(places)} cells{where}; it reads {min(pages):.2f} to {max(pages):.2f} times fewer pages in later "
            "steps."
        )
    items = data["items"] * len(data["tasks"])
    return (
        f"{' '.join(sentences)} A cell is {items} items, so one item is {100 / items:.1f} points. What is not asked "
        "for in these contexts is mostly filler, which flatters every method that reads few pages."
    )


def losa_step(data: dict[str, Any]) -> str:
    """Attention time of one denoising step."""
    rows = [
        [
            str(r["prefix"]),
            f"{r['alike']:g}",
            r["variant"] + (f" {r['budget']}" if r["budget"] else ""),
            f"{r['density']:.3f}",
            f"{r['p50_ms']:.3f}",
            f"{r['p20_ms']:.3f} to {r['p80_ms']:.3f}",
            f"{r['step_ms']:.1f}",
            f"{r['ratio']:.2f}",
            f"{r['ratio_to_best_exact']:.2f}",
            f"{r['bound']:.2f}",
        ]
        for r in data["records"]
    ]
    head = ["prefix", "alike", "variant", "density", "layer, ms", "p20 to p80", "step, ms"]
    head += ["dense x", "best exact x", "bound x"]
    first = data["records"][0]
    return (
        f"One layer of {first['heads']} query and {first['kv_heads']} KV heads of {first['head_dim']}, block "
        f"{first['block']}, {first['dtype']}; a step is {first['layers']} such layers, attention alone. Dense: K/V "
        "concatenated, then SDPA; joined: SDPA alone. alike: what synthetic queries of a block share, 0 is the worst "
        "case for pages. Best exact: the fastest row of density 1; bound: of that ratio, by bytes or by "
        "multiplications, whichever allows more. "
        f"{machine(data['machine'])}\n\n{table(head, rows)}"
    )


def gptq_quality(data: dict[str, Any]) -> str:
    """Perplexity of mini-llama in few bits."""
    first, *others = data["records"]
    rows = [["", "fp32", f"{first['perplexity']:.3f}", "1.000", "", ""]]
    for r in others:
        error = f"{r['output_error']:.3f}" if r["output_error"] is not None else ""
        ratio = r["perplexity"] / first["perplexity"]
        rows.append(
            [str(r["bits"]), r["row"], f"{r['perplexity']:.3f}", f"{ratio:.3f}", error, f"{r['bits_per_weight']:.2f}"]
        )
    head = ["bits", "row", "perplexity", "of fp32", "output error", "bits, all told"]
    return (
        f"{first['windows'][0]} held-out windows of {first['windows'][1]} tokens, {first['calibration'][0]} windows of "
        f"training files to calibrate on, groups of {first['group_size']}, all linears of the blocks; scales are fp32 "
        "here, hence the bits. Output error: mean over layers of |(W - Q) X| / |W X| on the calibration tokens. "
        f"{machine(data['machine'])}\n\n{table(head, rows)}"
    )


def qwha_quality(data: dict[str, Any]) -> str:
    """Adapters on quantised mini-llamas."""
    rows = []
    for r in data["records"]:
        start, tuned = r["start"], r.get("tuned")
        rows.append(
            [str(r["bits"]), r["method"], str(r.get("parameters", "")), f"{start['perplexity']:.2f}"]
            + (
                [f"{tuned['perplexity']:.2f}", f"{100 * tuned['accuracy']:.1f} %", f"{r['lr']:g}"]
                if tuned
                else [""] * 3
            )
        )
    head = ["bits", "adapter", "trained numbers", "perplexity at start", "tuned", "answers right, tuned", "lr"]
    accuracies = [r["start"]["accuracy"] for r in data["records"]]
    rates = " or ".join(f"{lr:g}" for lr in data["learning_rates"])
    return (
        f"Groups of {data['group_size']}, base by MagR, GPTQ and coordinate descent (but LoftQ's, which is its own), "
        f"rank {data['rank']} or as many numbers, {data['steps']} steps of {data['batch']} items and some text, "
        f"AdamW with learning rate {rates}, the better on items apart. Held-out: perplexity of files, answers to "
        f"{data['items']} items of the list task, of which no row knows more than {100 * max(accuracies):.1f} % at the "
        f"start. Full precision, untuned: perplexity {data['full']['perplexity']:.2f}. "
        f"{machine(data['machine'])}\n\n{table(head, rows)}"
    )


def rcd_curve(data: dict[str, Any]) -> str:
    """Accuracy of mini-rcd against tokens per step."""
    labels = list(data["curves"])
    head = ["threshold", *(f"{label}: {what}" for label in labels for what in ("accuracy", "tokens/step"))]
    rows = []
    for threshold in data["curves"][labels[0]]:
        points = [data["curves"][label][threshold] for label in labels]
        rows.append([threshold, *(w for p in points for w in (f"{p['accuracy']:.3f}", f"{p['tokens_per_step']:.2f}"))])
    equal = [
        [f"{e['accuracy']:.3f}", *(f"{e[label]:.2f}" if e[label] is not None else "not reached" for label in labels)]
        for e in data["equal_accuracy"]
    ]
    costs = "; ".join(
        f"{o['rows']} rows behind {o['prefix']} tokens: {o['plain_ms']:.2f} ms, with residual {o['rcd_ms']:.2f} ms "
        f"({100 * o['overhead']:+.0f} %)"
        for o in data["overhead"]
    )
    return (
        f"{data['items_per_task']} held-out items of each of {len(data['tasks'])} tasks, greedy, dynamic rule, fp32. "
        "seqd and rcd are mini-sdar trained on for equally many steps, without and with residuals of the frozen "
        f"mini-sdar; the mean weight of a residual was {data['mean_weight']:.3f}. {machine(data['machine'])}\n\n"
        f"{table(head, rows)}\n\nTokens per step at equal accuracy, between the thresholds by straight lines:\n\n"
        f"{table(['accuracy', *labels], equal)}\n\nA denoising step: {costs}. The model is so small that a step is "
        "mostly the time of launching operations.\n\n![accuracy against tokens per step](img/rcd-curve.png)"
    )


SECTIONS: list[tuple[str, str, Callable[[dict[str, Any]], str]]] = [
    ("svg2_quality.json", "Quality of svg2 on mini-wan", quality),
    ("sparse_quality.json", "Sparse attention methods on mini-wan", sparse_quality),
    ("sparge_calibration.json", "Calibrating sparge on mini-wan", sparge_calibration),
    ("sla_finetune.json", "Fine-tuning sla on mini-wan", sla_finetune),
    ("radial_length_cpu.json", "radial against length, on a CPU", radial_length),
    ("attention_methods_4k_cpu.json", "All attention methods at 4,096 tokens, on a CPU", attention_bench),
    ("attention_methods_cpu.json", "All attention methods at 8,192 tokens, on a CPU", attention_bench),
    ("attention_methods_gpu.json", "All attention methods on one shape, on a GPU", attention_bench),
    ("mini_wan_judge.json", "What mini-wan shows of its prompts", judge),
    ("deepcache.json", "deepcache on mini-sd", deepcache),
    ("deepcache_peer.json", "deepcache beside the authors' package", deepcache_peer),
    ("deepcache_macs.json", "MACs of deepcache on Stable Diffusion 1.5 and XL", deepcache_macs),
    ("mini_sd_judge.json", "What mini-sd shows of its prompts", mini_sd_judge),
    ("mini_sdar_judge.json", "Answers of mini-sdar", mini_sdar_judge),
    ("mini_llama_judge.json", "Perplexity of mini-llama", mini_llama_judge),
    ("deepcache_gpu.json", "deepcache on Stable Diffusion 1.5 and XL, on a GPU", deepcache_gpu),
    ("losa_quality.json", "losa and quest on mini-sdar", losa_quality),
    ("rcd_curve.json", "rcd on mini-rcd", rcd_curve),
    ("gptq_quality.json", "gptq on mini-llama", gptq_quality),
    ("qwha_quality.json", "Adapters on quantised mini-llamas", qwha_quality),
    ("losa_step_cpu.json", "Attention of a denoising step against a long prefix, on a CPU", losa_step),
    ("losa_step_gpu.json", "Attention of a denoising step against a long prefix, on a GPU", losa_step),
    ("svg2_attention_cpu.json", "Attention time of svg2 on a CPU", svg2_attention),
    ("svg2_attention_gpu.json", "Attention time of svg2 on a GPU", svg2_attention),
    ("variable_block_attention_cpu.json", "Kernel variable_block_attention on a CPU", attention_kernel),
    ("variable_block_attention_gpu.json", "Kernel variable_block_attention on a GPU", attention_kernel),
    ("block_sparse_attention_cpu.json", "Kernel block_sparse_attention on a CPU", attention_kernel),
    ("block_sparse_attention_gpu.json", "Kernel block_sparse_attention on a GPU", attention_kernel),
]


def main() -> int:
    parts = ["# Results", "Made by `python benchmarks/tables.py` from `benchmarks/results/`."]
    missing = []
    for name, title, render in SECTIONS:
        file = HERE / "results" / name
        if file.exists():
            parts += [f"## {title}", render(json.loads(file.read_text()))]
        else:
            missing.append(title[0].lower() + title[1:])
    if missing:
        parts += ["## Not measured", "\n".join(f"- {title}" for title in missing)]
    PAGE.write_text("\n\n".join(parts) + "\n")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
