"""QWHA: a sparse adapter in a Walsh-Hadamard basis that begins as the repair of a quantised weight.

Paper: "QWHA: Quantization-Aware Walsh-Hadamard Adaptation for Parameter-Efficient Fine-Tuning on Large Language
Models", arXiv 2509.17428. The adapter itself, ``dW = F H / n`` with p trained values in F at fixed places, is
``hf_accel.peft``; here is what the paper does before training: choose the places, and values at which ``W_Q + dW``
answers calibration inputs as the full weight ``W`` does.

With ``E = W - W_Q`` and the inputs' Gram matrix ``C``, all follows from two transforms: ``D = E H^T``, the dense
coefficients (row i those of output i), and ``G = H C H^T / n^2``, in which ``d G d^T`` is the squared error in the
output that coefficients d make. The paper writes it with a root of C and a dictionary B, where ``G = B^T B``; neither
is needed, hence no eigendecomposition, and D is no solution of equations.

Per layer:
    1. AdaAlloc divides p among outputs in proportion to their error (to the power ``temperature``).
    2. Each output keeps its largest coefficients.
    3. Refinement: least squares on those kept, ``G[S, S] c = (G d)[S]``. Without it what was dropped is missed.

Decisions:
    * Paper and released code differ twice, and both forms are here; the paper's is the default. ``allocation``: an
      output's error is that of its activations, ``sqrt(e C e^T)`` ("paper"), or of its weights, ``|D_i|`` ("code").
      ``selection``: by ``|D_ij|`` ("paper") or by ``G_jj D_ij^2``, the energy in the activations ("code").
    * An output never gets more coefficients than it has inputs. The excess and what rounding down left goes to the
      others in equal parts, the last few one by one to those that have fewest; the sum is p, exactly (as in the code).
    * C is damped by 1e-4 of its mean diagonal, as in the code, for selection and refinement.
    * INFERRED: an output without any error takes part with weight 0; if none has an error, all are equal.
    * Lengths n without a Hadamard matrix get a block-diagonal H, an extension of ours (``strict=True`` refuses them).
    * Sums and solutions in fp64; outputs are solved in batches, padded to the largest budget of each.
    * C is of the inputs that layers have in the unquantised model, and E is of its weights, not of weights that a
      quantiser shrank first (MagR), so that is repaired too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hf_accel.config import Config, setting
from hf_accel.errors import InvalidSetting
from hf_accel.facts import HOSTS, HOSTS_OF, Facts
from hf_accel.hosts.clocks.steps import Clocks
from hf_accel.hosts.target import Model, kind
from hf_accel.ledger import Ledger
from hf_accel.patches.qwha.correction import (
    DAMPING,
    Correction,
    Fit,
    allocate,
    fit,
    select,
    sparse_correction,
    spectral_gram,
)
from hf_accel.patches.qwha.start import LayerStart, initialize_qwha
from hf_accel.registry import register
from hf_accel.report import MethodReport, Patched
from hf_accel.sites.adapter.base import AdapterMethod, Place
from hf_accel.sites.linear.places import LinearSite, find_linears

if TYPE_CHECKING:
    from hf_accel.sites.adapter.peft import QWHAConfig, QWHALinear


@dataclass(frozen=True)
class QWHASettings(Config):
    """Settings of ``apply(model, "qwha")``: those of the adapter, and those of its start."""

    METHOD = "qwha"

    r: int = setting(64, "budget of a layer [m, n] in units of a LoRA rank: r * (m + n) coefficients", ge=1)
    alpha: float = setting(1.0, "scale of the update; the transform is orthonormal at 1", gt=0)
    selection: str = setting("paper", "which coefficients are kept", choices=("paper", "code"))
    allocation: str = setting("paper", "how outputs share a layer's budget", choices=("paper", "code"))
    temperature: float = setting(1.0, "exponent of the allocation; 0 is an even division", ge=0)
    refine: bool = setting(True, "least squares on the coefficients that were kept")
    damping: float = setting(DAMPING, "of the Gram matrices, as a share of the mean diagonal", ge=0)
    samples: int = setting(128, "calibration sequences at most", ge=1)
    sequence_length: int | None = setting(None, "tokens of a sequence at most; None: what the model takes, to 2048")
    strict: bool = setting(False, "refuse layers without a whole Hadamard transform")
    path: str = setting("auto", "side of the update", choices=("auto", "weight", "activation"))
    adapter: str = setting("default", "name of the adapter")
    seed: int = setting(0, "of the draw of calibration sequences", ge=0)
    progress: bool = setting(True, "a bar, if tqdm is installed")


@register
class QWHA(AdapterMethod):
    """Adapters on the packed linears of a model, begun as the repair of their rounding; see the module's docstring."""

    name = "qwha"
    paper = "QWHA: Quantization-Aware Walsh-Hadamard Adaptation, arXiv 2509.17428"
    summary = "sparse Walsh-Hadamard adapters that begin by repairing a quantised model"
    facts = Facts(site="adapter", media=frozenset(HOSTS_OF), hosts=HOSTS, backward=True)
    Config = QWHASettings
    config: QWHASettings
    inputs = ("calibration", "tokenizer", "reference")
    stands_on = frozenset({"gptq"})

    def __init__(self, config: QWHASettings):
        super().__init__(config)
        self._layers: dict[str, QWHALinear] = {}

    @classmethod
    def places(cls, module: torch.nn.Module) -> list[LinearSite]:
        return [site for site in find_linears(module) if site.kind == "packed"]

    @classmethod
    def why_not(cls, model: Model) -> str | None:
        if getattr(model.module, "peft_config", None):
            return (
                "it has adapters of peft already; add a QWHA adapter to them with peft, then "
                "hf_accel.initialize_qwha(model, ...)"
            )
        if not cls.places(model.module):
            return f'a {kind(model.module)} without packed linears to repair; first hf_accel.apply(model, "gptq", ...)'
        return None

    def install(self, model: Model, ledger: Ledger, report: MethodReport, clock: Clocks) -> None:
        if self.given.get("calibration") is None:
            raise InvalidSetting("qwha", "calibration", None, "texts, token ids or forwards to calibrate on")
        super().install(model, ledger, report, clock)

    def peft_config(self, places: Sequence[Place]) -> QWHAConfig:
        from hf_accel.sites.adapter.peft import QWHAConfig

        settings = self.config
        return QWHAConfig(
            r=settings.r, alpha=settings.alpha, selection=settings.selection, allocation=settings.allocation,
            temperature=settings.temperature, strict=settings.strict, path=settings.path, seed=settings.seed,
            target_modules=[place.name for place in places],
        )  # fmt: skip

    def layer(self, place: Place, config: QWHAConfig) -> QWHALinear:
        from hf_accel.sites.adapter.peft import QWHALinear

        layer = QWHALinear(place.module, self.adapter, config, place.name)
        self._layers[place.name] = layer
        return layer

    def begin(self, model: Model, report: MethodReport) -> None:
        settings = self.config
        starts = initialize_qwha(
            model.module,
            self.given["calibration"],
            self.given.get("reference"),
            tokenizer=self.given.get("tokenizer"),
            adapter_name=self.adapter,
            samples=settings.samples,
            sequence_length=settings.sequence_length,
            refine=settings.refine,
            damping=settings.damping,
            seed=settings.seed,
            progress=settings.progress,
        )
        for start in starts:
            told = f"QWHA adapter, {start.coefficients} coefficients"
            report.patched.append(Patched(model.name, start.name, told))
            if start.unsolved:
                report.notes.append(f"{start.name}: {start.unsolved} outputs without least squares, only cut")
            if not start.tokens:
                report.notes.append(f"{start.name}: no calibration token reached it; the weights' error was repaired")
        report.notes += repairs_in_words(starts)

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {f"{name}.qwha_values": layer.qwha_values[self.config.adapter] for name, layer in self._layers.items()}


def repairs_in_words(starts: list[LayerStart]) -> list[str]:
    """What initialisation did to the outputs of layers, for a report."""
    if not starts:
        return []
    worst = max(starts, key=lambda start: start.repaired)
    before, after = (
        torch.tensor([getattr(start, part) for start in starts]).median() for part in ("quantised", "repaired")
    )
    return [
        f"relative error of a layer's output: {before:.3f} as quantised, {after:.3f} with the adapter (median of "
        f"{len(starts)}); the worst is {worst.name}: {worst.quantised:.3f}, {worst.repaired:.3f}"
    ]


__all__ = [
    "QWHA", "Correction", "Fit", "LayerStart", "QWHASettings", "allocate", "fit", "initialize_qwha", "select",
    "sparse_correction", "spectral_gram",
]  # fmt: skip
