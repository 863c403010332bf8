"""``gptq``: linear weights in 2, 3, 4 or 8 bits, each rounding made up for by the weights that are still free.

Paper: "GPTQ: Accurate Post-training Compression for Generative Pretrained Transformers", arXiv 2210.17323.

The network is gone through block by block. Calibration samples run through the block, the second moments ``H`` of each
linear's inputs are gathered, its columns are rounded one after the other, each with the error spread over those to come
so that ``|(W - Q) X|`` stays small (:mod:`hf_accel.quant.gptq_solver`), and the next block sees what the rounded one
puts out. Rows do not see each other, so linears with one input (query, key, value; gate, up) are one matrix here.

Around it, as the base models of QWHA (arXiv 2509.17428) have it: MagR (arXiv 2406.00800) makes the largest weights
smaller beforehand, sweeps of coordinate descent (arXiv 2403.07134) look at every rounding again afterwards. With
``rounding="nearest"`` each weight is rounded for itself and nothing is calibrated: the baseline.

Decisions where the paper and released code differ or are silent (those of the solver are told there):

* Defaults are the code's but for groups of 128, which it leaves off, and for the time at which grids are fitted
  (``static_groups=None``). Under ``act_order`` they are fixed beforehand, because else the groups' columns lie
  scattered and every kernel pays for it. So they are at 2 bits, where corrections are so large that grids fitted to
  corrected weights are the worse ones (``benchmarks/gptq_quality.py``). At 3 bits hardly anything
  is gained by it and at 4 nothing, and grids are fitted on the way as in the code.
* ``H`` averages over tokens, where the code averages over sequences; sequences of one length give the same.
* The code calibrates on windows of 2,048 tokens of all texts in one; so does ``windows="joined"``. Text encoders see a
  prompt at a time, and so are calibrated (``windows="separate"``).
* The stages of ``true_sequential`` are found by the order of execution: linears with one input are a stage. The code
  has a list of names for each model.
* Linears that no sample reached, and those whose ``H`` could not be factorised, are rounded to nearest, counted and
  named. The code raises for the latter.
* Sizes that the packed layout has no place for (no multiple of 32) stay in full precision and are named. So do
  convolutions, which the code takes as linears over patches: readers of the layout know linears only.
* INFERRED: coordinate descent aims at the full weight, not at what MagR made of it.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hf_accel.base import Method
from hf_accel.checkpoints.gptq.declare import declare
from hf_accel.config import Config, setting
from hf_accel.errors import InvalidSetting, QuantizationError
from hf_accel.facts import HOSTS, HOSTS_OF, Facts
from hf_accel.hosts.clocks.steps import Clocks
from hf_accel.hosts.target import Model, is_a
from hf_accel.kernels.quantized_linear import backend_for
from hf_accel.ledger import Ledger
from hf_accel.quant import coordinate_descent
from hf_accel.quant.formats import format_of
from hf_accel.quant.gptq_solver import Solution, gptq_solve, output_error, round_to_nearest
from hf_accel.quant.grid import Scheme, ShrinkSearch
from hf_accel.quant.magr import shrink_groups
from hf_accel.quant.packed_linear import PackedLinear, why_not_packable
from hf_accel.quant.packing import PACKED_BITS
from hf_accel.quant.quality import relative_error
from hf_accel.registry import register
from hf_accel.report import MethodReport
from hf_accel.sites.linear.base import LinearMethod
from hf_accel.sites.linear.originals import drop, offload, settle
from hf_accel.sites.linear.places import LinearSite, replace, why_irreplaceable
from hf_accel.sites.linear.samples import calibration_from
from hf_accel.sites.linear.statistics import LayerRecord, QuantizationStatistics
from hf_accel.sites.linear.store import LayerStore, describe_run
from hf_accel.sites.linear.stream import Gathered, LayerStream, Unit


@dataclass(frozen=True)
class GPTQConfig(Config):
    """Settings of :class:`GPTQ`; names of the released code where it has them."""

    METHOD = "gptq"
    VERSION = 2  # without a word on static_groups, 2 bits meant grids on the way in version 1

    bits: int = setting(4, "of a weight", choices=PACKED_BITS)
    group_size: int = setting(128, "neighbouring inputs that share a grid; -1 is the whole row", ge=-1)
    sym: bool = setting(False, "grids with zero in the middle")
    rounding: str = setting("gptq", "gptq, or each weight for itself without calibration", choices=("gptq", "nearest"))
    act_order: bool = setting(False, "the most active inputs first")
    static_groups: bool | None = setting(
        None, "all grids fixed beforehand, from the full weights; None: at 2 bits and with act_order, else on the way"
    )
    true_sequential: bool = setting(False, "linears of a block see those before them rounded already")
    damping: float = setting(0.01, "added to the diagonal of H, as a share of its mean", gt=0, le=0.9)
    block_size: int = setting(128, "columns between updates of the rest; speed only", ge=1)
    search: bool = setting(False, "look for smaller ranges with less error")
    shrink: float = setting(1.0, "factor of every range", gt=0, le=1)
    magr: bool = setting(False, "make the largest weights of each group smaller first")
    magr_alpha: float | None = setting(None, "strength of MagR; None: 1e-5 for groups, 1e-3 for rows", ge=0)
    coordinate_descent: int = setting(0, "sweeps after GPTQ; published: 30 at 2 bits, 1 at 3 and 4", ge=0)
    descent_inflation: float = setting(0.75, "of H's diagonal in sweeps, as a share of its mean; as published", ge=0)
    samples: int = setting(128, "calibration sequences (forwards) at most", ge=1)
    sequence_length: int | None = setting(None, "tokens of one at most; None: 2048, or what the model takes", ge=2)
    windows: str = setting("auto", "texts joined or each for itself", choices=("auto", "joined", "separate"))
    seed: int = setting(0, "of the draw of calibration sequences", ge=0)
    targets: str | tuple[str, ...] | None = setting(None, "roles or names of linears; None: all inside of blocks")
    exclude: str | tuple[str, ...] = setting((), "roles or names to leave out")
    original: str = setting(
        "keep",
        "what becomes of the full weights: keep, offload to the CPU, or drop, after which nothing can be undone",
        choices=("keep", "offload", "drop"),
    )
    gram_dtype: str = setting("float32", "of the sums of H", choices=("float32", "float64"))
    progress: bool = setting(True, "a bar, block by block")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size == 0:
            raise InvalidSetting(self.METHOD, "group_size", 0, "positive, or -1 for the whole row")

    @property
    def scheme(self) -> Scheme:
        return Scheme.grouped(format_of(self.bits), self.group_size, symmetric=self.sym)

    @property
    def fixed_grids(self) -> bool:
        """Whether grids are fixed beforehand, as ``static_groups`` says or, if it says nothing, bits and order."""
        return self.act_order or self.bits == 2 if self.static_groups is None else self.static_groups

    @classmethod
    def upgraded(cls, settings: Mapping[str, Any], version: int) -> Mapping[str, Any]:
        silent = settings.get("static_groups") is None and not settings.get("act_order")
        if version < 2 and settings.get("bits") == 2 and silent:
            return {**settings, "static_groups": False}
        return settings


@register
class GPTQ(LinearMethod):
    """Packed linears in the place of dense ones; see the module's docstring."""

    name = "gptq"
    paper = "GPTQ: Accurate Post-training Compression for Generative Pretrained Transformers, arXiv 2210.17323"
    summary = "linear weights in 2, 3, 4 or 8 bits by calibration, packed; MagR and coordinate descent beside it"
    facts = Facts(
        site="linear",
        media=frozenset(HOSTS_OF),
        hosts=HOSTS,
        backward=True,
        full_budget={"bits": 8, "group_size": 32, "rounding": "nearest"},
        full_budget_error=0.02,
    )
    Config = GPTQConfig
    config: GPTQConfig
    inputs = ("calibration", "tokenizer", "device", "resume_dir")
    verb = "quantised"
    no_convolutions = "a convolution: the packed layout is for linears"

    def __init__(self, config: GPTQConfig):
        super().__init__(config)
        self.run = QuantizationStatistics()
        self._replaces = False

    @classmethod
    def why_not_linear(cls, site: LinearSite) -> str | None:
        if site.kind == "packed":
            return "packed already: quantise the full model, not what was quantised"
        return why_irreplaceable(site) or why_not_packable(site.in_features, site.out_features)

    def kind_in_words(self, site: LinearSite) -> str:
        return f"{self.config.bits}-bit {site.role} linear"

    def replacement(self, site: LinearSite) -> PackedLinear:
        """The linear rounded to nearest, for which nothing but its weight is needed."""
        return self._pack([site], None, "")[site.name]

    def install(self, model: Model, ledger: Ledger, report: MethodReport, clock: Clocks) -> QuantizationStatistics:
        if self.config.rounding == "gptq" and self.given.get("calibration") is None:
            raise InvalidSetting(
                self.name, "calibration", None, "texts (with tokenizer=), token ids, forwards or a function that runs "
                "the model; or say rounding='nearest', which needs none",
            )  # fmt: skip
        return super().install(model, ledger, report, clock)

    def replace_all(
        self, model: Model, sites: list[LinearSite], ledger: Ledger, report: MethodReport
    ) -> QuantizationStatistics:
        config = self.config
        self._check(sites)
        if any(is_a(site.parent, "peft.tuners.tuners_utils", "BaseTunerLayer") for site in sites):
            import hf_accel.sites.adapter.peft  # noqa: F401  (peft's layers learn where packed linears have their weight)
        try:
            if config.rounding == "nearest":
                for site in sites:
                    replace(site, self.replacement(site), ledger)
                    self._finished([site], ledger)
            else:
                self._calibrated(model, sites, ledger, report)
        except BaseException as error:
            if gone := settle(ledger):
                self._declare(model, Ledger())
                error.add_note(
                    f"hf_accel: gptq stopped halfway through {model.name}. {gone} linears are packed for good, their "
                    "full weights were dropped (original='drop'); the others have theirs. The model runs and can be "
                    "saved as it is; gptq applied again quantises the rest as an unbroken run would have."
                )
            raise
        places = {site.name: i for i, site in enumerate(sites)}
        self.run.layers.sort(key=lambda layer: places[layer.name])
        report.run = self.run
        self._declare(model, ledger)
        if config.original == "offload":
            offload(sites, ledger)
        elif config.original == "drop" and self._replaces:
            drop(sites, ledger)
        return self.run

    def _declare(self, model: Model, ledger: Ledger) -> None:
        config = self.config
        declare(
            model.module, ledger, desc_act=config.act_order and not config.fixed_grids and config.group_size != -1,
            sym=config.sym, damp_percent=config.damping, true_sequential=config.true_sequential,
            static_groups=config.fixed_grids and config.rounding == "gptq",
        )  # fmt: skip

    def take_over(self, former: Method) -> None:
        """If this run fails, the former takes its place again: it needs the full weights until the end."""
        self._replaces = True

    def _finished(self, sites: Sequence[LinearSite], ledger: Ledger) -> None:
        """Of a large model there is no room for all packed weights beside the full ones."""
        if self.config.original == "drop" and not self._replaces:
            drop(sites, ledger)

    # -- which linears -------------------------------------------------------------------------------------------

    def _check(self, sites: Sequence[LinearSite]) -> None:
        self._check_group_size(sites)
        for site in sites:
            bad = int((~torch.isfinite(site.weight)).sum())
            if bad:  # told here, because every layer after it would see NaN
                raise QuantizationError(
                    f"gptq: {bad} weights of {site.name} are NaN or infinite. Load the model again, in bfloat16 or "
                    "float32 if it is in float16."
                )

    def _check_group_size(self, sites: Sequence[LinearSite]) -> None:
        group = self.config.group_size
        unfit = [site for site in sites if group != -1 and site.in_features % group]
        if unfit:
            common = math.gcd(*(site.in_features for site in sites))
            fitting = [size for size in (128, 64, 32) if common % size == 0]
            raise InvalidSetting(
                self.name, "group_size", group,
                f"a divisor of every layer's inputs: {unfit[0].name} has {unfit[0].in_features}"
                f"{f', and {len(unfit) - 1} more do not fit' if unfit[1:] else ''}. {', '.join(map(str, fitting))} and "
                "-1 (whole rows) fit all, or leave these layers out (exclude=)",
            )  # fmt: skip

    # -- calibration ---------------------------------------------------------------------------------------------

    def _calibrated(self, model: Model, sites: list[LinearSite], ledger: Ledger, report: MethodReport) -> None:
        config, given = self.config, self.given
        found = calibration_from(
            given["calibration"], model.module, given.get("tokenizer"), owner=self.name, samples=config.samples,
            sequence_length=config.sequence_length, windows=config.windows, seed=config.seed,
        )  # fmt: skip
        report.notes += [f"calibration: {note}" for note in found.notes]
        store = None
        if given.get("resume_dir") is not None:
            settings = {k: v for k, v in asdict(config).items() if k not in ("progress", "original", "block_size")}
            settings["static_groups"] = config.fixed_grids  # what None means may change, what is in the folder does not
            run = describe_run(settings, model.module, sites, found.samples)
            store = LayerStore(given["resume_dir"], run, self.name)
        stream = LayerStream(
            model.module, found.samples, sites, device=given.get("device"), true_sequential=config.true_sequential,
            gram_dtype=getattr(torch, config.gram_dtype), progress=config.progress, title=self.name,
        )  # fmt: skip
        resumed = 0
        with stream:
            for unit in stream:
                stored = store.read(unit.name) if store is not None else None
                if stored is not None:
                    self._restore(unit, *stored, ledger)
                    resumed += 1
                else:
                    packed: dict[str, PackedLinear] = {}
                    for stage in unit.stages():
                        for gathered in stage:
                            packed |= self._quantise(gathered, ledger)
                    if store is not None:
                        self._store(store, unit, packed)
                self._finished(unit.sites, ledger)
        if resumed:
            report.notes.append(f"{resumed} blocks read from {given['resume_dir']}")
        fallen = [layer.name for layer in self.run.layers if layer.why_nearest]
        if fallen:
            warnings.warn(
                f"hf_accel: gptq rounded {len(fallen)} of {len(self.run.layers)} linears to nearest: "
                f"{', '.join(fallen[:3])}{', ...' if fallen[3:] else ''}. The report says why.",
                stacklevel=2,
            )

    def _quantise(self, gathered: Gathered, ledger: Ledger) -> dict[str, PackedLinear]:
        """Linears with one input, as one matrix; those of another dtype apart, because scales are stored in it."""
        by_dtype: dict[torch.dtype, list[LinearSite]] = {}
        for site in gathered.sites:
            by_dtype.setdefault(site.weight.dtype, []).append(site)
        out: dict[str, PackedLinear] = {}
        for sites in by_dtype.values():
            out |= self._pack(sites, gathered, "" if gathered.gram.tokens else "no calibration token reached it")
        for site in gathered.sites:
            replace(site, out[site.name], ledger)
        return out

    def _pack(
        self, sites: Sequence[LinearSite], gathered: Gathered | None, why_nearest: str
    ) -> dict[str, PackedLinear]:
        """Linears of one dtype and one input, rounded and packed; how that went is recorded."""
        config, scheme = self.config, self.config.scheme
        gram = gathered.gram.matrix() if gathered is not None and gathered.gram.tokens else None
        device = sites[0].weight.device if gram is None else gram.device
        full = torch.cat([site.weight for site in sites]).to(device, torch.float32)
        solution = self._solve(full, gram, sites)
        if gram is not None and solution.rounding == "nearest":
            why_nearest = f"H was not positive definite, at {10**solution.retries} times the damping either"
        rounded = solution.weight(scheme)
        lost, whole = None, None
        if gram is not None:
            lost, whole = output_error(full - rounded, gram), output_error(full, gram)
        out: dict[str, PackedLinear] = {}
        start = 0
        for site in sites:
            rows = slice(start, start + site.out_features)
            start = rows.stop
            grid, zero = solution.grid, solution.grid.zero
            packed = PackedLinear.from_codes(
                solution.codes[rows], grid.scale[rows], grid.scale[rows] * 0 if zero is None else zero[rows],
                solution.g_idx, config.bits, config.group_size, _on(site.bias, device), site.weight.dtype,
            )  # fmt: skip
            record = LayerRecord(
                site.name, site.role, config.bits, float(solution.loss[rows].sum()),
                weight_error=relative_error(full[rows], rounded[rows]), damping=solution.damping,
                retries=solution.retries, dead=solution.dead, why_nearest=why_nearest,
            )  # fmt: skip
            if lost is not None and whole is not None and gathered is not None:
                record.tokens = gathered.gram.tokens
                record.output_error = math.sqrt(max(float(lost[rows].sum() / whole[rows].sum()), 0.0))
            self._record(packed, record)
            out[site.name] = packed
        return out

    def _solve(self, weight: torch.Tensor, gram: torch.Tensor | None, sites: Sequence[LinearSite]) -> Solution:
        """MagR, GPTQ, coordinate descent."""
        config, scheme = self.config, self.config.scheme
        search = ShrinkSearch() if config.search else None
        scale_dtype = sites[0].weight.dtype
        if gram is None:
            return round_to_nearest(weight, scheme, search=search, shrink=config.shrink, scale_dtype=scale_dtype)
        small = weight
        if config.magr:
            alpha = config.magr_alpha
            if alpha is None:
                alpha = 1e-3 if config.group_size == -1 else 1e-5
            small = shrink_groups(weight, gram, config.group_size, alpha)
        solution = gptq_solve(
            small, gram, scheme, act_order=config.act_order, static_groups=config.fixed_grids, damping=config.damping,
            block_size=config.block_size, search=search, shrink=config.shrink, scale_dtype=scale_dtype,
            name=sites[0].name,
        )  # fmt: skip
        if config.coordinate_descent == 0:
            return solution
        codes = coordinate_descent.sweep(
            weight, solution.codes, solution.grid, gram, config.coordinate_descent, format=scheme.format,
            g_idx=solution.g_idx, inflation=config.descent_inflation, block_size=config.block_size,
        )  # fmt: skip
        return dataclasses.replace(solution, codes=codes)

    def _record(self, packed: PackedLinear, record: LayerRecord) -> None:
        self.run.count(packed)
        self.run.layers.append(record)
        if self.run.kernel is None:
            # Asked and not read from a log: the report names the kernel before the first forward.
            choice = backend_for(packed.scales)
            self.run.kernel = choice.backend, choice.reason

    # -- finished blocks -----------------------------------------------------------------------------------------

    def _store(self, store: LayerStore, unit: Unit, packed: dict[str, PackedLinear]) -> None:
        tensors = {f"{name}.{key}": value for name, p in packed.items() for key, value in p.state_dict().items()}
        store.write(unit.name, tensors, [asdict(layer) for layer in self.run.layers if layer.name in packed])

    def _restore(self, unit: Unit, tensors: dict[str, torch.Tensor], notes: list[dict], ledger: Ledger) -> None:
        records = {note["name"]: LayerRecord(**note) for note in notes}
        for site in unit.sites:
            packed = PackedLinear.empty(
                site.in_features, site.out_features, self.config.bits, self.config.group_size, site.bias is not None,
                site.weight.dtype,
            )  # fmt: skip
            packed.load_state_dict({key: tensors[f"{site.name}.{key}"] for key in packed.state_dict()})
            replace(site, packed, ledger)
            self._record(packed, records[site.name])


def _on(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)


__all__ = ["GPTQ", "GPTQConfig"]
