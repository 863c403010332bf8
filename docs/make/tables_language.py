"""Sections of the results page about language models."""

from __future__ import annotations

from typing import Any

from page_parts import machine, table


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
    later = {f"{r['date'][:10]}, commit {r['commit']}" for r in others if "commit" in r}
    own = [f"{r['bits']} bits {r['row']}" for r in others if "commit" in r]
    told = f" Measured later than the rest ({'; '.join(sorted(later))}): {'; '.join(own)}." if later else ""
    return (
        f"{first['windows'][0]} held-out windows of {first['windows'][1]} tokens, {first['calibration'][0]} windows of "
        f"training files to calibrate on, groups of {first['group_size']}, all linears of the blocks; scales are fp32 "
        "here, hence the bits. Output error: mean over layers of |(W - Q) X| / |W X| on the calibration tokens. "
        f"{machine(data['machine'])}{told}\n\n{table(head, rows)}"
    )


def qwha_quality(data: dict[str, Any]) -> str:
    """Adapters on quantised mini-llamas."""
    rows = []
    for base in data["bases"]:
        bits = base["bits"]
        rows.append([str(bits), "none", "", f"{base['start']['perplexity']:.2f}", "", "", ""])
        for run in (run for run in data["best"] if run["bits"] == bits):
            tuned = run["tuned"]
            rate = f"{run['lr']:g}" + (f", the {run['edge']} tried" if run["edge"] else "")
            rows.append(
                [
                    str(bits),
                    run["method"],
                    str(run["parameters"]),
                    f"{run['start']['perplexity']:.2f}",
                    f"{tuned['perplexity']:.2f}",
                    f"{100 * tuned['accuracy']:.1f} %",
                    rate,
                ]
            )
    head = ["bits", "adapter", "trained numbers", "perplexity at start", "tuned", "answers right, tuned", "lr"]
    most = max(run["start"]["accuracy"] for run in data["best"])
    middle = [run["tuned"]["accuracy"] for run in data["best"]]
    error = max((p * (1 - p) / data["items"]) ** 0.5 for p in middle)
    return (
        f"Groups of {data['group_size']}, base by MagR, GPTQ and coordinate descent (but LoftQ's, which is its own), "
        f"rank {data['rank']} or as many numbers, {data['steps']} steps of {data['batch']} items and {data['rows']} "
        "windows of text, AdamW. Learning rates half a decade apart, the best by answers to as many other items, "
        "searched until the best has a worse one on either side where nothing else is said. Held-out: perplexity of "
        f"files, answers to {data['items']} items (standard error up to {100 * error:.1f} points), of which no row "
        f"knows more than {100 * most:.1f} % at the start. Full precision, untuned: perplexity "
        f"{data['full']['perplexity']:.2f}. In the picture an adapter is a line, a learning rate a point. "
        f"{machine(data['machine'])}\n\n{table(head, rows)}\n\n"
        "![answers against perplexity](img/qwha-quality.png)"
    )
