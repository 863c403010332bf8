"""QWHA beside LoRA, LoftQ, CLoQ, SHiRA and FourierFT on quantised mini-llamas, equal trainable parameters and steps.

    python benchmarks/qwha_quality.py --json benchmarks/results/qwha_quality.json --picture docs/img/qwha-quality.png

Bases are mini-llama quantised by MagR + GPTQ + coordinate descent (30 sweeps at 2 bits, else 1), calibrated on its
training files. Every adapter has ``r (m + n)`` trained numbers in each linear and stands on the same dequantised base,
frozen in fp32. All are trained by AdamW on the same batches, the mean of the losses of items of the zoo's tasks and of
windows of its training files. Learning rates are half a decade apart; beginning with ``--lr``, or with the best of
another width, the search goes on until the best has a worse one on either side. The best is chosen by answers to items
that are neither trained nor reported. Reported are perplexity on held-out files and answers right on held-out items
(every token of the answer, greedy), before tuning and after.

Runs that the JSON file holds already are not done again, and several processes may write one file: give each its own
``--bits`` or ``--methods``.

* ``lora``: zero-initialised, peft's own. ``shira``, ``fourierft``: peft's own, of random places.
* ``loftq``: rounding to nearest and SVD of what is left, in turn, five times. peft's own needs bitsandbytes on a GPU
  and knows 4-bit floats only; this one has the grid of the others, but its base is another one.
* ``cloq``: the closed form in activation space, ``SVD_r(dW R^T)`` with ``R^T R`` the Gram matrix.
* ``qwha``: zero-initialised, at random places; ``qwha, selected``: AdaAlloc and selection without refinement;
  ``qwha, refined``: the method.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fcntl
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common  # noqa: F401  (finds the checkout)
import torch
from peft import FourierFTConfig, LoraConfig, ShiraConfig, get_peft_model

import hf_accel
import hf_accel.peft
from hf_accel.measure.machine import describe_machine
from hf_accel.measure.tables import align
from hf_accel.patches.qwha import sparse_correction, spectral_gram
from hf_accel.quant.formats import format_of
from hf_accel.quant.gram import Gram
from hf_accel.quant.grid import Scheme, fit_grid, round_to_grid
from hf_accel.sites.adapter.peft.qwha.coefficients import from_places
from hf_accel.sites.linear.places import find_linears
from hf_accel.zoo import llama

METHODS = ("lora", "loftq", "cloq", "shira", "fourierft", "qwha", "qwha, selected", "qwha, refined")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GROUP = 64


@torch.no_grad()
def right(model: Any, batch: dict[str, torch.Tensor]) -> list[bool]:
    """Whether greedy decoding would write the answer: every token of it is the likeliest behind those before."""
    answers: list[bool] = []
    for start in range(0, len(batch["labels"]), 64):
        part = {name: tensor[start : start + 64] for name, tensor in batch.items()}
        guess = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits.argmax(-1)[:, :-1]
        labels = part["labels"][:, 1:]
        answers += ((guess == labels) | (labels == -100)).all(1).tolist()
    return answers


def grams_of(model: Any, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Second moments of every linear's inputs in the full-precision model, fp64."""
    sites = find_linears(model)
    grams = {site.name: Gram(site.in_features, site.name, torch.float64) for site in sites}
    handles = [
        site.module.register_forward_pre_hook(lambda module, args, name=site.name: grams[name].add(args[0]))
        for site in sites
    ]
    with torch.no_grad():
        for rows in windows.split(8):
            model.model(input_ids=rows)
    for handle in handles:
        handle.remove()
    return {name: gram.matrix() for name, gram in grams.items()}


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {site.name: site.weight.float().clone() for site in find_linears(model)}


def with_weights(model: Any, weights: dict[str, torch.Tensor]) -> Any:
    """A copy of a dense model that has these weights in its linears."""
    twin = copy.deepcopy(model)
    for site in find_linears(twin):
        site.module.weight.data.copy_(weights[site.name])
    return twin


def quantised(model: Any, bits: int, calibration: torch.Tensor) -> dict[str, torch.Tensor]:
    """Weights of the base that all adapters but LoftQ's stand on."""
    twin = copy.deepcopy(model)
    sweeps = 30 if bits == 2 else 1
    settings: dict[str, Any] = {"bits": bits, "group_size": GROUP, "magr": True, "coordinate_descent": sweeps}
    with hf_accel.apply(twin, "gptq", calibration=list(calibration), static_groups=True, **settings):
        return weights_of(twin)


def low_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``B [m, r]``, ``A [r, n]`` with ``B A`` nearest to ``matrix``, the singular values halved between them."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def cloq(error: torch.Tensor, gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``B A`` with the least ``|(error - B A) R^T|``, ``R^T R = gram`` damped by 1e-4."""
    gram = gram + 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    values, vectors = torch.linalg.eigh(gram)
    root = values.clamp_min(0).sqrt()
    b, a = low_rank((error.double() @ vectors) * root, rank)
    return b.float(), ((a / root) @ vectors.T).float()


def loftq(weight: torch.Tensor, bits: int, rank: int, turns: int = 5) -> tuple[torch.Tensor, ...]:
    """Quantised weight, B, A."""
    scheme = Scheme.grouped(format_of(bits), GROUP)
    b, a = weight.new_zeros(len(weight), rank), weight.new_zeros(rank, weight.shape[1])
    for _ in range(turns):
        rest = weight - b @ a
        base = round_to_grid(rest, fit_grid(rest, scheme), scheme)
        b, a = low_rank(weight - base, rank)
    return base, b, a


def build(
    method: str,
    model: Any,
    base: dict[str, torch.Tensor],
    bits: int,
    rank: int,
    grams: dict[str, torch.Tensor],
) -> Any:
    """The model with the adapter on it, ready to be tuned."""
    torch.manual_seed(0)
    full = weights_of(model)
    if method == "loftq":
        found = {name: loftq(weight, bits, rank) for name, weight in full.items()}
        base = {name: parts[0] for name, parts in found.items()}
    standing = with_weights(model, base)
    sizes = {name: rank * sum(weight.shape) for name, weight in full.items()}
    if method in ("lora", "loftq", "cloq"):
        tuned = get_peft_model(standing, LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
        if method != "lora":
            for name, layer in adapted(tuned, "lora_A"):
                b, a = found[name][1:] if method == "loftq" else cloq(full[name] - base[name], grams[name], rank)
                layer.lora_B["default"].weight.data.copy_(b)
                layer.lora_A["default"].weight.data.copy_(a)
        return tuned
    if method == "shira":
        return get_peft_model(standing, ShiraConfig(r=rank, target_modules=TARGETS, init_weights=True))
    if method == "fourierft":
        config = FourierFTConfig(
            n_frequency=1000, n_frequency_pattern=sizes, target_modules=TARGETS, scaling=150.0, init_weights=True
        )
        return get_peft_model(standing, config)
    tuned = get_peft_model(standing, hf_accel.QWHAConfig(r=rank, target_modules=TARGETS))
    if method != "qwha":
        for name, layer in adapted(tuned, "qwha_values"):
            error, spectrum = full[name] - base[name], spectral_gram(grams[name], layer.block)
            found = sparse_correction(error, spectrum, sizes[name], layer.block, refine=method == "qwha, refined")
            places = found.kept.nonzero(as_tuple=True)
            layer.set_coefficients("default", from_places(*places, found.values.float(), *error.shape))
    return tuned


def adapted(model: Any, part: str) -> list[tuple[str, Any]]:
    """The adapted layers by the names that their linears have in the model alone."""
    prefix = "base_model.model."
    return [(name.removeprefix(prefix), layer) for name, layer in model.named_modules() if hasattr(layer, part)]


def tune(model: Any, batches: Callable[[int], list[dict[str, torch.Tensor]]], steps: int, lr: float) -> float:
    """Train on the mean loss of the batches of every step; seconds per step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    model.train()
    begin = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / max(1, steps // 16))
            group["lr"] = lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        parts = batches(step)
        for batch in parts:
            (model(**batch).loss / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    return (time.perf_counter() - begin) / steps


SETTINGS = ("rank", "steps", "batch", "rows", "items", "calibration", "text", "windows")


class Runs:
    """What was found so far, in a file that several processes write, or in memory without one."""

    def __init__(self, file: Path | None, told: dict[str, Any], again: bool):
        self.file = file
        if again and file is not None:
            file.unlink(missing_ok=True)
        self.data: dict[str, Any] = {**told, "bases": [], "runs": []}
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            with self._held():
                pass
            changed = [name for name in SETTINGS if self.data[name] != told[name]]
            if changed:
                sys.exit(f"{file} was made with other {', '.join(changed)}: give another file, or --again")

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """The file's content in ``data`` and nobody else's hand on it; afterwards ``data`` in the file."""
        if self.file is None:
            yield
            return
        with self.file.open("a+") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            handle.seek(0)
            self.data = json.loads(handle.read() or json.dumps(self.data))
            yield
            handle.truncate(0)
            handle.write(json.dumps(self.data, indent=1) + "\n")

    def find(self, kind: str, **key: Any) -> dict[str, Any] | None:
        return next((run for run in self.data[kind] if key.items() <= run.items()), None)

    def add(self, kind: str, record: dict[str, Any], **key: Any) -> None:
        with self._held():
            if self.find(kind, **key) is None:  # nobody else was faster
                self.data[kind].append({**key, **record})

    def conclude(self) -> None:
        """Note the best runs of all that are there."""
        with self._held():
            self.data["best"] = best_runs(self.data)


def half_decade(lr: float, steps: int) -> float:
    """The learning rate so many half decades further, in two digits so that it is found again."""
    return float(f"{lr * 10 ** (steps / 2):.1e}")


def search(run: Callable[[float], float], lr: float, most: int) -> None:
    """Call ``run`` until its best learning rate has a worse one on either side, at most ``most`` times."""
    found = {0: run(lr)}
    while len(found) < most:
        best = max(found, key=found.__getitem__)
        step = next((step for step in (best + 1, best - 1) if step not in found), None)
        if step is None:
            return
        found[step] = run(half_decade(lr, step))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16, help="items in a step")
    parser.add_argument("--rows", type=int, default=2, help="windows of text in a step")
    parser.add_argument("--lr", type=float, default=1e-2, help="where the search begins at the first width")
    parser.add_argument("--most", type=int, default=5, help="learning rates of one adapter and width")
    parser.add_argument("--items", type=int, default=1200, help="held-out items that are reported, and to choose by")
    parser.add_argument("--calibration", type=int, default=128, help="windows of 256 tokens for Gram matrices")
    parser.add_argument("--text", type=int, default=1024, help="windows of 256 tokens to train on")
    parser.add_argument("--windows", type=int, default=64, help="held-out windows of 512 tokens")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help="answers against perplexity, of all runs")
    parser.add_argument("--again", action="store_true", help="forget what the file holds")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    model, tokenizer = llama.load()
    model.requires_grad_(False)
    calibration = llama.windows(tokenizer, "train", options.calibration, 256)
    text = llama.windows(tokenizer, "train", options.text, 256)
    windows = llama.windows(tokenizer, "heldout", options.windows, 512)
    reported = llama.encode_items(tokenizer, llama.task.items("heldout", options.items))
    chosen_by = llama.encode_items(tokenizer, llama.task.items("train", options.items, seed=1))
    train = llama.task.items("train", options.steps * options.batch)

    def batches(step: int) -> list[dict[str, torch.Tensor]]:
        rows = text[torch.arange(step * options.rows, (step + 1) * options.rows) % len(text)]
        items = llama.encode_items(tokenizer, train[step * options.batch : (step + 1) * options.batch])
        return [items, {"input_ids": rows, "labels": rows}]

    def judged(tuned: Any) -> dict[str, float]:
        answers = right(tuned, reported)
        return {"perplexity": llama.perplexity(tuned, windows), "accuracy": sum(answers) / len(answers)}

    told = {name: getattr(options, name) for name in SETTINGS}
    told |= {"machine": describe_machine(torch.device("cpu")), "group_size": GROUP, "full": judged(model)}
    runs = Runs(options.json, told, options.again)
    grams = grams_of(model, calibration)
    for bits in options.bits:
        base = quantised(model, bits, calibration)
        if runs.find("bases", bits=bits) is None:
            runs.add("bases", {"start": judged(with_weights(model, base))}, bits=bits)
        for method in options.methods:

            def run(lr: float, bits: int = bits, method: str = method, base: dict[str, torch.Tensor] = base) -> float:
                key = {"bits": bits, "method": method, "lr": lr}
                found = runs.find("runs", **key)
                if found is None:
                    tuned = build(method, model, base, bits, options.rank, grams).eval()
                    trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
                    other = runs.find("runs", bits=bits, method=method)
                    start = judged(tuned) if other is None else other["start"]
                    found = {"parameters": trained, "start": start}
                    found["step_s"] = tune(tuned, batches, options.steps, lr)
                    answers = right(tuned, chosen_by)
                    found |= {"chosen_by": sum(answers) / len(answers), "tuned": judged(tuned)}
                    runs.add("runs", found, **key)
                print(f"{bits} {method} lr {lr:g}: {found['start']} -> {found['tuned']}", flush=True)
                return float(found["chosen_by"])

            known = [one for one in best_runs(runs.data) if one["method"] == method]
            search(run, known[0]["lr"] if known else options.lr, options.most)
    runs.conclude()
    print(report(runs.data))
    if options.picture:
        picture(runs.data, options.picture)
    return 0


def best_runs(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Of every width and method, in the order of the table, the run at the best learning rate; ``edge`` tells whether
    that is the highest, the lowest or the only one tried, or None."""
    found = []
    for bits in sorted({run["bits"] for run in data["runs"]}, reverse=True):
        for method in METHODS:
            runs = [run for run in data["runs"] if (run["bits"], run["method"]) == (bits, method)]
            if runs:
                best = max(runs, key=lambda run: run["chosen_by"])
                rates = [run["lr"] for run in runs]
                edge = {max(rates): "highest", min(rates): "lowest"}.get(best["lr"]) if rates[1:] else "only"
                found.append({**best, "edge": edge})
    return found


def picture(data: dict[str, Any], file: Path) -> None:
    """Answers against perplexity for every learning rate: up and to the left is better in both."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    widths = sorted({run["bits"] for run in data["runs"]}, reverse=True)
    figure, axes = plt.subplots(1, len(widths), figsize=(5 * len(widths), 4.5), layout="constrained", squeeze=False)
    for axis, bits in zip(axes[0], widths, strict=True):
        for index, method in enumerate(METHODS):
            own = [run for run in data["runs"] if (run["bits"], run["method"]) == (bits, method)]
            tuned = [run["tuned"] for run in sorted(own, key=lambda run: run["lr"])]
            places = [one["perplexity"] for one in tuned], [100 * one["accuracy"] for one in tuned]
            axis.plot(*places, "o-", color=f"C{index}", label=method, markersize=4, linewidth=0.8)
        best = [run["tuned"]["perplexity"] for run in data["best"] if run["bits"] == bits]
        axis.set(title=f"{bits} bits", xlabel="held-out perplexity", xlim=(min(best) * 0.93, max(best) * 1.05))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("answers right, %")
    axes[0][0].legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def report(data: dict[str, Any]) -> str:
    head = ["bits", "adapter", "trained", "ppl at start", "right at start", "ppl tuned", "right tuned", "lr", "s/step"]
    rows = [
        [
            str(base["bits"]),
            "none",
            "",
            f"{base['start']['perplexity']:.2f}",
            f"{100 * base['start']['accuracy']:.1f} %",
        ]
        + [""] * 4
        for base in data["bases"]
    ]
    for run in data["best"]:
        start, tuned = run["start"], run["tuned"]
        rows.append(
            [
                str(run["bits"]), run["method"], str(run["parameters"]), f"{start['perplexity']:.2f}",
                f"{100 * start['accuracy']:.1f} %", f"{tuned['perplexity']:.2f}", f"{100 * tuned['accuracy']:.1f} %",
                f"{run['lr']:g}" + (f" ({run['edge']} tried)" if run["edge"] else ""), f"{run['step_s']:.3f}",
            ]
        )  # fmt: skip
    return align(head, rows)


if __name__ == "__main__":
    sys.exit(main())
