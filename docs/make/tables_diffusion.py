"""Sections of the results page about video and image models."""

from __future__ import annotations

from typing import Any

from page_parts import machine, table


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


JUDGED = [
    ("rendered", "rendered"),
    ("rendered_through_vae", "rendered, through the VAE and back"),
    ("heldout", "mini-sd, held-out prompts"),
    ("heldout_floor", "the same pictures against others' prompts"),
    ("fresh", "mini-sd, fresh prompts"),
]


def mini_sd_judge(data: dict[str, Any]) -> str:
    """What mini-sd's pictures show of their prompts."""
    kinds = [(key, words) for key, words in JUDGED if key in data]
    readings = list(data[kinds[0][0]])
    rows = [[words, *(f"{data[key][name]:.3f}" for name in readings)] for key, words in kinds]
    return "Share of what the prompts name that `judge.py` finds in the pictures (docs/zoo.md says how).\n\n" + table(
        ["pictures", *readings], rows
    )
