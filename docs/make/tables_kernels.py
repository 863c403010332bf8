"""Sections of the results page about the times of kernels and layers."""

from __future__ import annotations

from typing import Any

from page_parts import machine, table


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


def first_use(data: dict[str, Any]) -> str:
    """What hf_accel costs before it does anything."""
    first = [
        [
            record["first_use"],
            f"{record['methods_s']:.2f}",
            f"{record['apply_s']:.2f}" if "apply_s" in record else "",
            f"{record['total_s']:.2f}",
        ]
        for record in data["records"]
        if "first_use" in record
    ]
    applied = [
        [
            record["apply"],
            f"{record['p20_ms']:.1f}",
            f"{record['p50_ms']:.1f}",
            f"{record['p80_ms']:.1f}",
            f"{record['cpu_ms']:.1f}",
            f"{record['revert_ms']:.1f}",
        ]
        for record in data["records"]
        if "apply" in record
    ]
    processes = next(record["processes"] for record in data["records"] if "processes" in record)
    layers, repeats = next((r["layers"], r["repeats"]) for r in data["records"] if "apply" in r)
    return (
        f"CPU seconds of the first use in a fresh process, medians of {processes}; then `apply` on a Wan of {layers} "
        f"layers, {repeats} times. {machine(data['machine'])}\n\n"
        + table(["first use", "methods(), s", "apply, s", "both, s"], first)
        + "\n\n"
        + table(["apply", "p20, ms", "p50, ms", "p80, ms", "CPU, ms", "revert, ms"], applied)
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


def quantized_linear(data: dict[str, Any]) -> str:
    """Linear layers on packed weights against dense ones."""
    rows = [
        [
            r["shape"],
            str(r["tokens"]),
            f"{r['bits']}, {r['group_size']}",
            r["form"],
            f"{r['p50_ms']:.3f}",
            f"{r['times_faster']:.2f}",
            f"{r['bound']:.2f}",
            f"{r['relative_error']:.0e}",
        ]
        for r in data["records"]
        if "p50_ms" in r
    ]
    head = ["shape", "tokens", "bits, group", "form", "ms", "dense x", "bound x", "error"]
    return (
        "Against `F.linear` with the dequantised weight in the same run. Bound: bytes of the dense weight over those "
        f"of codes and grids, which counts with few tokens. {machine(data['machine'])}\n\n{table(head, rows)}"
    )


def hadamard(data: dict[str, Any]) -> str:
    """Hadamard transforms of rows."""
    rows = [
        [
            str(r["n"]),
            str(r["rows"]),
            r["dtype"].removeprefix("torch."),
            r["form"],
            f"{r['p50_ms']:.3f}",
            f"{r['times_copy']:.2f}",
            f"{r['gigabytes_per_second']:.1f}",
            f"{r['relative_error']:.0e}",
        ]
        for r in data["records"]
        if "p50_ms" in r
    ]
    head = ["n", "rows", "dtype", "form", "ms", "copies", "GB/s", "error"]
    return f"A copy is the least that can be. {machine(data['machine'])}\n\n{table(head, rows)}"


def qwha_weight(data: dict[str, Any]) -> str:
    """The merged weight of a QWHA adapter, and a layer by either side."""
    rows = [
        [
            r["shape"],
            f"{r['bits']}, {r['group_size']}",
            str(r["rank"]),
            r["form"],
            f"{r['p50_ms']:.3f}",
            f"{r['relative_error']:.0e}",
        ]
        for r in data["records"]
        if "p50_ms" in r
    ]
    head = ["shape", "bits, group", "rank", "form", "ms", "error"]
    return (
        "On a packed base. Dequantising alone is the floor; unfused: dequantise, scatter, transform, add. "
        f"{machine(data['machine'])}\n\n{table(head, rows)}"
    )


def qwha_step(data: dict[str, Any]) -> str:
    """Training steps with QWHA, LoRA and FourierFT."""
    forms = list(dict.fromkeys(r["form"] for r in data["records"]))
    cells = {(r["shape"], r["base"], r["tokens"], r["form"]): r for r in data["records"] if "p50_ms" in r}
    rows = []
    for case in dict.fromkeys(key[:3] for key in cells):
        found = [cells.get((*case, form)) for form in forms]
        rows.append(
            [*map(str, case), f"{found[0]['p50_ms']:.1f}" if found[0] else ""]
            + [f"{r['times_lora']:.2f}" if r else "" for r in found[1:]]
            + [f"{r['kept_bytes'] / 1e6:.1f}" if r else "" for r in (found[0], found[-1])]
        )
    head = ["shape", "base", "tokens", f"{forms[0]}, ms", *(f"{form} x" for form in forms[1:])]
    head += [f"{forms[0]} keeps, MB", f"{forms[-1]} keeps, MB"]
    first, paper = data["records"][0], data["machine"]["paper_times_lora"]
    return (
        f"Forward, backward and AdamW of a stack of linears, rank {first['rank']} or as many numbers, all forms in "
        f"turn; ratios are to {forms[0]}. FourierFT takes dense linears only. The paper, whole models on an A100: "
        f"{', '.join(f'{ratio} at {batch}' for batch, ratio in paper.items())}. "
        f"{machine(data['machine'])}\n\n{table(head, rows)}"
    )
