"""``rcd``: residual context diffusion, the discarded predictions of a step as input of the next.

Paper: "Residual Context Diffusion Language Models", arXiv 2601.22954 (v2).

A masked diffusion model predicts a distribution ``p_i`` at every open position and keeps only the confident ones; the
rest is masked again and forgotten. Here an open position enters the next step as ::

    e_i = (1 - alpha_i) E([M]) + alpha_i Delta_i,    Delta_i = sum_j p_ij E_j,    alpha_i = H(p_i) / log V

a mixture of the mask's embedding and the expected embedding of its own last prediction, by normalised entropy
(Eq. 1-3). Prompt and committed positions are untouched; a prefill or commit forward has no mask, so what is cached
never sees a residual. Needs weights that were trained for it (:mod:`hf_accel.train.rcd`). Where a model scales its
embeddings, ``E`` is the scaled ones.

Decisions where paper and pseudo-code differ or are silent:

* ``t_res`` tempers the entropy alone, as the appendix's pseudo-code does; the body says that the tempered distribution
  forms the residual too (``temper_delta=True``).
* INFERRED: residuals are forgotten at every new block (Algorithm 2 is stated per block), and per row of the batch
  wherever its tokens are not those of the last step with some masks filled.
* INFERRED: raw logits, before a sampler bans or tempers any. ``log V`` counts the logits' columns, padded ones too, in
  training and inference alike.
* Under guidance each row has the residual of its own logits (the card infers the conditional ones for all; a hook on
  the model cannot tell which rows are which).
* ``init="dirichlet"`` draws from the flat Dirichlet distribution; its concentration is not told. One draw per block
  number and position, the same in every row, so that a row does not depend on the batch it is in.
* ``Delta`` is formed at the next step, for rows still masked then: fewer rows, the same numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.checkpoints.declaration import declaration_of, read_declaration
from hf_accel.config import Config, setting
from hf_accel.errors import NotApplicable, WeightsMismatch
from hf_accel.facts import Facts
from hf_accel.hosts.block_families import FULL, LLADA2, SDAR
from hf_accel.hosts.clocks.block_steps import BlockStep
from hf_accel.hosts.clocks.steps import Clocks
from hf_accel.hosts.loading import load_language_model
from hf_accel.hosts.target import Model, unwrap
from hf_accel.kernels.soft_embedding import entropy_lse, normalized_entropy, soft_embed
from hf_accel.ledger import Ledger
from hf_accel.registry import register
from hf_accel.report import MethodReport
from hf_accel.sites.embedding.base import ResidualMethod
from hf_accel.sites.embedding.residual import ResidualSeams, seams_of
from hf_accel.sites.embedding.start import OwnStart, ReferenceStart, Start
from hf_accel.sites.embedding.table import EmbeddingTable, embedding_table

ALPHA_MODES = ("normalized-entropy", "fixed", "max-prob", "one-minus-entropy", "one-minus-max-prob")


@dataclass(frozen=True)
class RCDConfig(Config):
    """Settings of :class:`RCD`; names of the paper's repository where it has them."""

    METHOD = "rcd"

    init: str = setting(
        "cold",
        "the first step of a block: without residual, with that of the reference's prediction, of a random "
        "distribution, or of an extra forward of the model itself",
        choices=("cold", "warm", "dirichlet", "self"),
    )
    t_res: float = setting(1.0, "temperature of the distribution whose entropy weighs the residual", gt=0)
    temper_delta: bool = setting(False, "the residual itself is of the tempered distribution too")
    alpha_mode: str = setting("normalized-entropy", "weight of the residual", choices=ALPHA_MODES)
    alpha: float = setting(0.3, "the weight where alpha_mode is 'fixed'", ge=0, le=1)
    alpha_scale: float = setting(1.0, "factor of the weight; 0 is the unpatched model", ge=0, le=1)
    top_k: int | None = setting(None, "tokens in the residual, the most likely, not renormalised; None: all", ge=1)
    reference: str | None = setting(None, "folder or Hub id of the model that init='warm' asks; see set_reference")
    mask_token_id: int | None = setting(None, "None: as the model's configuration says", ge=0)
    logit_shift: int | None = setting(
        None, "logits at i predict token i + logit_shift; None: 1 for Dream, else 0", choices=(None, 0, 1)
    )
    trained: bool = setting(False, "the weights are RCD's, though nothing declares it: no warning")
    weights: str | None = setting(None, "folder or Hub id of a loaded adapter, whose declaration is read")
    seed: int = setting(0, "of init='dirichlet'", ge=0)
    backend: str = setting("auto", "kernels to use", choices=("auto", "triton", "torch"))


# -- Eq. 1-3 -------------------------------------------------------------------------------------------------------


def interpolation_weight(logits: torch.Tensor, settings: RCDConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """``alpha`` of each row, and the log normaliser of the distribution that forms its residual.

    Args:
        logits: ``[N, V]`` in fp32, fp16 or bf16; ``-inf`` bans a token.
        settings: ``alpha_mode``, ``alpha``, ``alpha_scale``, ``t_res``, ``temper_delta``, ``backend``.

    Returns:
        ``alpha`` fp32 ``[N]`` in [0, 1], and ``lse`` fp32 ``[N]`` of the logits, with ``temper_delta`` of
        ``logits / t_res``. Neither carries a gradient.
    """
    found = entropy_lse(logits.detach(), settings.t_res, backend=settings.backend)
    entropy = normalized_entropy(found.entropy_t, logits.shape[-1])
    likeliest = (found.top_logit / settings.t_res - found.lse_t).exp()
    if settings.alpha_mode == "fixed":
        alpha = torch.full_like(entropy, settings.alpha)
    elif settings.alpha_mode.endswith("entropy"):
        alpha = entropy
    else:
        alpha = likeliest
    if settings.alpha_mode.startswith("one-minus"):
        alpha = 1 - alpha
    return (alpha * settings.alpha_scale).clamp(0, 1), found.lse_t if settings.temper_delta else found.lse


def soft_tokens(logits: torch.Tensor, table: EmbeddingTable, lse: torch.Tensor, settings: RCDConfig) -> torch.Tensor:
    """``Delta`` (Eq. 1) in fp32 or the table's dtype, ``[N, D]``; differentiable with respect to the table alone."""
    return soft_embed(
        logits.detach(), table.weight, lse, settings.t_res if settings.temper_delta else 1.0, table.scale,
        top_k=None if settings.top_k is None else min(settings.top_k, logits.shape[-1]), backend=settings.backend,
    )  # fmt: skip


def interpolate(
    mask_embedding: torch.Tensor, logits: torch.Tensor, table: EmbeddingTable, settings: RCDConfig, detach: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 2 on open positions.

    Args:
        mask_embedding: ``[N, D]``, what the embedding module gives for the mask token.
        logits: ``[N, V]``, the last prediction at each of them.
        table: the module's embeddings, scaled as its output is.
        settings: of the residual.
        detach: no gradient reaches the table through ``Delta``; that through ``E([M])`` stays.

    Returns:
        ``e`` like ``mask_embedding``, and ``alpha`` fp32 ``[N]``.
    """
    alpha, lse = interpolation_weight(logits, settings)
    delta = soft_tokens(logits, table, lse, settings)
    delta = (delta.detach() if detach else delta).to(mask_embedding.device, torch.float32)
    weight = alpha.to(mask_embedding.device)[:, None]
    mixed = (1 - weight) * mask_embedding.float() + weight * delta
    return mixed.to(mask_embedding.dtype), alpha


def residual_embeddings(
    embedding: torch.nn.Module,
    input_ids: torch.Tensor,
    logits: torch.Tensor,
    mask_token_id: int,
    settings: RCDConfig | None = None,
    *,
    detach_residual: bool = False,
) -> torch.Tensor:
    """``inputs_embeds`` of a step or of a noisy training sequence: Eq. 2 at masks, plain embeddings elsewhere.

    Args:
        embedding: the model's ``get_input_embeddings()``.
        input_ids: int64 ``[B, S]``.
        logits: ``[B, S, V]``, row ``i`` the prediction of token ``i``; only rows at masks are read. May be of another
            model (the frozen reference, in training). Carries no gradient into the result.
        mask_token_id: id of the mask token.
        settings: of the residual; the paper's by default.
        detach_residual: no gradient through ``Delta`` (paper silent; the gradient it saves is a dense ``[V, D]``).

    Returns:
        ``[B, S, D]``. With ``g_i`` its gradient, ``E([M])`` gets ``(1 - alpha_i) g_i`` and every ``E_j``
        ``alpha_i p_ij g_i``.

    Raises:
        WeightsMismatch: logits over more tokens than there are embeddings, or for other positions.
    """
    settings = settings or RCDConfig()
    if logits.shape[:2] != input_ids.shape:
        raise WeightsMismatch(
            f"rcd: logits must be [B, S, V] for input_ids {list(input_ids.shape)}; got {list(logits.shape)}."
        )
    embedded = embedding(input_ids)
    places = (input_ids == mask_token_id).flatten().nonzero().squeeze(1)
    if not places.numel() or settings.alpha_scale == 0:
        return embedded
    rows = logits.reshape(-1, logits.shape[-1])[places.to(logits.device)]
    flat = embedded.reshape(-1, embedded.shape[-1])
    table = embedding_table(embedding, logits.shape[-1], places.device)
    mixed, _ = interpolate(flat[places], rows, table, settings, detach_residual)
    return flat.index_put((places,), mixed.to(flat.dtype)).view_as(embedded)


# -- the method ----------------------------------------------------------------------------------------------------

# What decides how residuals are formed: weights are trained with one choice of it.
FORMED = ("alpha_mode", "alpha", "alpha_scale", "temper_delta", "top_k")


@register
class RCD(ResidualMethod):
    """Residuals at open positions; see the module's docstring."""

    name = "rcd"
    paper = "Residual Context Diffusion Language Models, arXiv 2601.22954"
    summary = "masked diffusion LMs trained for it: open positions carry their last prediction into the next step"
    facts = Facts(
        site="embedding",
        needs=frozenset({"trained weights"}),
        media=frozenset({"text"}),
        hosts=frozenset({"block diffusion"}),
        families=frozenset({SDAR.name, LLADA2.name, FULL.name}),
        backward=True,
        compile=False,  # what is kept between steps lives in Python; the model compiles around it, with breaks
        full_budget={"alpha_scale": 0.0},
    )
    Config = RCDConfig
    config: RCDConfig

    def __init__(self, config: RCDConfig):
        super().__init__(config)
        self._reference = ReferenceStart()
        self._warned: set[str] = set()

    def take_over(self, former: RCD) -> None:
        self._warned = former._warned
        if self.config.reference in (None, former.config.reference):
            self._reference.asked.model = former._reference.model

    def install(self, model: Model, ledger: Ledger, report: MethodReport, clock: Clocks) -> ResidualSeams:
        config = self.config
        seams = super().install(model, ledger, report, clock)
        self._reference.asked.shift = config.logit_shift
        if config.reference is not None and self._reference.model is None:
            reference = load_language_model(config.reference, like=model.module)
            self._reference.set_model(reference, model.module, seams.shared.mask_token)
        self._check_weights(model, report)
        return seams

    def start(self) -> Start | None:
        starts: dict[str, Start] = {
            "warm": self._reference,
            "self": OwnStart(self.config.logit_shift),
            "dirichlet": Dirichlet(self.config.seed),
        }
        return starts.get(self.config.init)

    def _check_weights(self, model: Model, report: MethodReport) -> None:
        """Say so where nothing tells that the weights were trained for residuals, or that they were with others."""
        config = self.config
        own = declaration_of(model.module, self.name)
        told = read_declaration(config.weights, self.name) if config.weights else own
        if told is not None and told.get("stage") == 2:
            report.notes.append(f"weights declared RCD's, reference {told.get('reference') or 'not named'}")
            other = [n for n in FORMED if n in told and told[n] != getattr(config, n)]
            if other and config.alpha_scale:
                self._warn(
                    f"rcd: the weights were trained with {_words(told, other)}; it is being applied with "
                    f"{_words(vars(config), other)}."
                )
            return
        if config.trained:
            report.notes.append("weights are RCD's by the caller's word (trained=True)")
            return
        report.notes.append("the weights are not declared RCD's")
        if config.alpha_scale:
            what = "weights not declared RCD's" if told is None else "weights of stage 1, which never saw a residual"
            self._warn(
                f"rcd on {model.class_name} with {what}: residuals lie off what it was trained on, and quality falls. "
                "Train it (hf_accel.train.rcd), name the adapter that was (weights='folder'), or say trained=True."
            )

    def _warn(self, words: str) -> None:
        if words not in self._warned:
            self._warned.add(words)
            warnings.warn(f"hf_accel: {words}", UserWarning, stacklevel=2)

    def mix(self, embedded: torch.Tensor, logits: torch.Tensor, table: EmbeddingTable) -> tuple[torch.Tensor, Any]:
        if self.config.alpha_scale == 0:
            return embedded, embedded.new_zeros(len(embedded), dtype=torch.float32)
        logits = logits.to(table.weight.device)
        return interpolate(embedded, logits, table, self.config)


class Dirichlet:
    """Distributions for the first step drawn from the flat Dirichlet distribution over the vocabulary."""

    def __init__(self, seed: int):
        self.seed = seed

    def fork(self) -> Dirichlet:
        return self

    def follow(self, arguments: Mapping[str, Any], step: BlockStep) -> None:
        pass

    def logits(
        self, module: Any, arguments: Mapping[str, Any], step: BlockStep, opened: torch.Tensor
    ) -> tuple[torch.Tensor | None, str]:
        vocabulary = int(module.get_input_embeddings().weight.shape[0])
        place = (opened.cumsum(1) - 1)[opened]  # k-th open position of its row: padding and the batch do not count
        generator = torch.Generator(opened.device)
        drawn = torch.empty(int(place.max()) + 1, vocabulary, device=opened.device)
        for k, row in enumerate(drawn):
            generator.manual_seed((self.seed * 1_000_003 + step.block + 1) * 1_000_003 + k)
            row.exponential_(generator=generator)  # exponentials over their sum are a flat Dirichlet draw
        return drawn.clamp_min(torch.finfo(drawn.dtype).tiny).log()[place], ""


def set_reference(target: Any, reference: torch.nn.Module) -> None:
    """Give the model that ``init="warm"`` asks. It is called as it is, without gradients.

    Args:
        target: the model, with ``rcd`` on it.
        reference: of the same vocabulary and the same calls, such as a smaller model of the family.

    Raises:
        NotApplicable: ``rcd`` is not on the model.
        WeightsMismatch: another vocabulary or mask token.
    """
    module = unwrap(target)
    seams = seams_of(module)
    if seams is None or not isinstance(seams.shared.core, RCD):
        raise NotApplicable(f"rcd is not on this {type(module).__name__}: hf_accel.apply(model, 'rcd', init='warm').")
    seams.shared.core._reference.set_model(unwrap(reference), module, seams.shared.mask_token)


def _words(values: Mapping[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name}={values[name]!r}" for name in names)


__all__ = ["RCD", "RCDConfig", "interpolation_weight", "residual_embeddings", "set_reference"]
