"""What every criterion with a teacher shares: the batch, the cross entropy, the log."""

import logging
import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from fairseq import utils
from fairseq.criterions import FairseqCriterion
from fairseq.logging import metrics
from torch import Tensor

from sekd_fairseq.criterions.configuration import DistillationConfig
from sekd_fairseq.criterions.projection import (
    batch_loss,
    outputs,
    parse_chunk_tokens,
    target_positions,
)
from sekd_fairseq.errors import UserError, one_line_errors
from sekd_fairseq.logits import output_projection
from sekd_fairseq.losses import (
    Events,
    SelfEvolution,
    SupportLogProbs,
    TeacherTokens,
    blockwise_loss,
    build_events,
    support_log_probs,
)
from sekd_fairseq.losses.cross_entropy import cross_entropy_weights
from sekd_fairseq.losses.divergences import WEIGHTED, in_float32
from sekd_fairseq.losses.events import SPREAD
from sekd_fairseq.losses.known_gradient import gradients_of, with_gradient
from sekd_fairseq.losses.support import (
    gradient_size,
    kernels_for,
    outside_gradient_size,
    whole_log_probs,
)
from sekd_fairseq.teacher_cache import TeacherCache
from sekd_fairseq.teachers.online import TeacherLogits

logger = logging.getLogger(__name__)

#: Divergences with KL(q || p) in them, infinite where p is zero and q is not.
ENDLESS_WITHOUT_TEACHER = ("reverse_kl", "adaptive_kl")


class Distilled(NamedTuple):
    """What :meth:`DistillationCriterion.distill` finds.

    Attributes
    ----------
    divergence : (N,) float
        The distillation loss of each token, nats.
    sums
        0-d sums over tokens, to log.
    hard : (N,) bool, optional
        By which the gradient that tokens receive is logged.
    """

    divergence: Tensor
    sums: dict[str, Tensor]
    hard: Tensor | None = None


class DistillationCriterion(FairseqCriterion):  # type: ignore[misc]
    """``sum_i alpha D_i + (1 - alpha) CE_i`` over target tokens that are not padding.

    A subclass says what ``D_i`` is (:meth:`distill`) and what it logs besides ``loss``,
    ``nll_loss`` (both in bits), ``ppl`` and ``agreement`` (share of tokens with equal best token;
    not of a sampled cache, whose best token is the best of those drawn).
    """

    def __init__(self, cfg: DistillationConfig, task: Any) -> None:
        super().__init__(task)
        name = f"--criterion {cfg._name}"
        for option in ("alpha", "label_smoothing"):
            if not 0 <= getattr(cfg, option) <= 1:
                flag = option.replace("_", "-")
                raise UserError(f"--{flag}: expected 0 to 1, found {getattr(cfg, option)}")
        if not 0 < in_float32(cfg.divergence_weight) < 1:
            raise UserError(
                "--divergence-weight: expected above 0 and below 1 (in float32), found "
                f"{cfg.divergence_weight}"
            )
        self.refuse_idle(
            cfg,
            DistillationConfig.divergence_weight,
            "divergence_weight",
            cfg.divergence not in WEIGHTED,
            f"--divergence {cfg.divergence}",
        )
        self.refuse_idle(
            cfg, 0.0, "label_smoothing", cfg.alpha == 1, "--alpha 1, without cross entropy"
        )
        if not hasattr(task.cfg, "teacher_cache"):
            with one_line_errors():  # another task is no door of the plugin
                raise UserError(
                    f"{name} expects --task self_evolution_kd, found task "
                    f"{getattr(task.cfg, '_name', type(task).__name__)!r}; add the flag"
                )
        if not task.cfg.teacher_cache and not task.cfg.teacher_path:
            raise UserError(
                f"{name} expects --teacher-cache DIR, found none; build one with: "
                "python -m sekd_fairseq.build_cache DATA --path TEACHER --output DIR (or name "
                "the teacher itself: --teacher-path TEACHER)"
            )
        self.alpha = float(cfg.alpha)
        self.label_smoothing = float(cfg.label_smoothing)
        self.missing_mass = str(cfg.missing_mass)
        self.divergence = str(cfg.divergence)
        self.sentence_avg = cfg.sentence_avg
        #: Tokens per chunk; None for chunks where they save memory, 0 for none.
        self.chunk_tokens = parse_chunk_tokens(cfg.sekd_chunk_tokens)
        #: False for a batch that fills up a process's share of an update and is not learnt from.
        self.counted = True
        self._told = False
        self.ranks_batch = bool(self.whole_batch(cfg))
        if self.chunk_tokens != 0 and self.ranks_batch:
            raise UserError(
                f"--sekd-chunk-tokens: expected 0 with {self.whole_batch(cfg)}, which ranks the "
                f"tokens of a whole batch, found {cfg.sekd_chunk_tokens}"
            )

    @staticmethod
    def refuse_idle(cfg: Any, default: Any, option: str, idle: bool, because: str) -> None:
        """Refuse an option that is given (is not as by default) and has no effect beside another."""
        value = getattr(cfg, option)
        if idle and value != default:
            raise UserError(
                f"--{option.replace('_', '-')} {value}: has no effect with {because}; leave it out, or "
                "change the other"
            )

    @staticmethod
    def whole_batch(cfg: Any) -> str:
        """The option that needs all tokens of a batch at once, as typed; empty if there is none."""
        return ""

    def distill(self, events: Events, nll: Tensor, teacher: TeacherTokens) -> Distilled:
        """The distillation loss of each token, and the sums to log.

        ``nll`` (N,) is cross entropy at temperature 1, of the tokens of ``teacher``.
        """
        raise NotImplementedError

    def kernel_settings(self) -> tuple[SelfEvolution, float] | None:
        """The settings and the threshold in nats by which one kernel computes the whole loss
        (:mod:`~sekd_fairseq.losses.token_loss_triton`); None where it cannot."""
        return None

    def sums_of_kernel(self, sums: dict[str, Tensor], tokens: int, gamma: float) -> dict[str, Any]:
        """What is logged of the sums that the kernel gives, as :meth:`distill` names it."""
        raise NotImplementedError

    def check_cache(self, cache: TeacherCache) -> None:
        """Refuse a cache that this loss has no value for; say where it was made for another."""
        if "samples" in cache.manifest.truncation and self.missing_mass != "sampled":
            logger.warning(
                "%s: holds tokens drawn from the teacher (--sample), for --missing-mass sampled; with %s "
                "the loss knows drawn tokens only and is a lower bound",
                cache.directory,
                self.missing_mass,
            )
        alone = cache.manifest.quality["one_hot"]
        if alone and self.divergence in ENDLESS_WITHOUT_TEACHER:
            raise UserError(
                f"--divergence {self.divergence}: {cache.directory} has the reference alone for "
                f"{alone:.2%} of its tokens ({cache.manifest.why_alone}), and this divergence is "
                "infinite where the teacher gives no probability; choose another, or take these sentences out"
            )

    def train(self, mode: bool = True) -> "DistillationCriterion":
        """As torch's. fairseq calls it when an update begins, and not between its parts."""
        self.begin_update()
        return super().train(mode)

    def begin_update(self) -> None:
        """Called before each update, also where the one before was skipped (an overflow)."""

    def end_update(self, logging_outputs: list[dict[str, Any]]) -> None:
        """Called after each update that was not skipped, with the sums of all its parts and
        processes."""

    def running_state(self) -> dict[str, Any]:
        """What is remembered from past updates, for a checkpoint: numbers and tensors."""
        return {}

    def load_running_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`running_state`."""

    def forward(
        self, model: Any, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, Any, dict[str, Any]]:
        """Loss of a batch: ``(sum over tokens, denominator, sums to log)``."""
        if getattr(model.decoder, "adaptive_softmax", None) is not None:
            raise UserError(
                "an adaptive softmax gives no logits that a teacher could be compared with; "
                "leave out --adaptive-softmax-cutoff"
            )
        positions = target_positions(sample, self.padding_idx)
        teacher = self.task.teacher_at(sample, positions)
        sampled = isinstance(teacher, TeacherTokens) and teacher.log_weight is not None
        if self.missing_mass == "sampled" and not sampled:
            raise UserError(
                "--missing-mass sampled expects a cache of sampled supports, found another; "
                "build it with: python -m sekd_fairseq.build_cache ... --sample N"
            )
        if self.missing_mass == "tail" and isinstance(teacher, TeacherTokens):
            teacher = replace(teacher, tail=self.task.tail_law(positions.device))

        def loss_of(
            logits: Tensor, rows: Tensor, part: slice, overwrite: bool
        ) -> tuple[Tensor, dict[str, Tensor]]:
            return self._loss(logits, rows, teacher[part], overwrite)

        self._tell(model)
        symbols = len(self.task.target_dictionary)
        loss, sums = batch_loss(model, sample, positions, loss_of, self.chunk_tokens, symbols)
        return outputs(sample, loss, sums, self.sentence_avg)

    def _loss(
        self,
        logits: Tensor,
        positions: Tensor,
        teacher: TeacherTokens | TeacherLogits,
        overwrite: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and sums to log at some positions of the logits; ``teacher`` is the
        teacher there, ``overwrite`` as of :func:`support_log_probs`.

        Cross entropy is at temperature 1. The distillation loss is at the teacher's temperature T,
        times T^2, so that its gradient keeps its size (Hinton et al., 2015).
        """
        if isinstance(teacher, TeacherLogits):
            # Every token of the vocabulary is looked at, so a few positions at a time.
            def block_loss(logits: Tensor, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
                student = whole_log_probs(logits, teacher.target[part])
                return self._token_loss(student, student, teacher.tokens(part), logits)

            return blockwise_loss(logits, positions, block_loss, at_once=self.ranks_batch)
        temperature = teacher.temperature
        usual = temperature == 1.0 and teacher.log_weight is None
        known = self.kernel_settings() if usual else None
        name = "token_loss_triton"
        if known is not None and (kernels := kernels_for(logits, teacher.ids, name)) is not None:
            settings, gamma = known
            weights = (self.alpha, self.label_smoothing)
            loss, sums = kernels.token_loss(
                logits, positions, teacher, settings, gamma, *weights, overwrite
            )
            return loss, self.sums_of_kernel(sums, positions.numel(), gamma)
        smooth, spread = self.label_smoothing > 0, self.missing_mass in SPREAD
        ids, valid, tail = teacher.ids, teacher.valid, teacher.tail
        if temperature == 1.0 and (tail is None or not smooth):  # one pass serves both parts
            student = plain = support_log_probs(
                logits, positions, ids, valid, smooth or spread, 1.0, overwrite, tail
            )
        else:
            alone = overwrite and self.alpha == 1  # the gradient of one of them is all
            student = support_log_probs(
                logits, positions, ids, valid, spread, temperature, alone, weights=tail
            )
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.alpha < 1):
                plain = support_log_probs(logits, positions, ids[:, :1], valid[:, :1], smooth)
        return self._token_loss(student, plain, teacher, logits, positions)

    def _token_loss(
        self,
        student: SupportLogProbs,
        plain: SupportLogProbs,
        teacher: TeacherTokens,
        logits: Tensor,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of some tokens; ``plain`` is the student at temperature 1, ``positions`` are the
        tokens' in ``logits``, or None for all.

        These are a few numbers per token. Their gradient is taken here, and once, so that it can be
        logged too.
        """
        leaf = SupportLogProbs(*(column.detach() for column in student))
        inputs = leaf[:3]  # log_q, log_outside, sum_log_q
        for column in inputs:
            column.requires_grad_(torch.is_grad_enabled())
        token_nll = -plain.log_q[:, 0].detach()
        events = build_events(teacher, leaf, self.missing_mass)
        found = self.distill(events, token_nll, teacher)
        divergence, nll = found.divergence.sum(), token_nll.sum()
        sums = {"nll_loss": nll}
        if teacher.log_weight is None:
            best = teacher.log_p.masked_fill(~teacher.valid, -torch.inf).argmax(1, keepdim=True)
            agree = leaf.log_q.detach().gather(1, best).squeeze(1) >= leaf.max_log_q
            sums["agree"] = agree.sum()
        sums |= found.sums
        on_nll, on_sum = cross_entropy_weights(self.alpha, self.label_smoothing, logits.size(-1))
        temperature = teacher.temperature
        scale = temperature**2 * self.alpha
        value = on_nll * nll
        if self.alpha > 0:  # an infinite divergence that has no weight must not become NaN
            value = value + scale * divergence.detach()
        if self.label_smoothing > 0:
            value = value + on_sum * plain.sum_log_q.detach().sum()
        if not torch.is_grad_enabled():
            return value, sums
        gradients = gradients_of(divergence, inputs)
        if found.hard is not None:
            tail = teacher.tail
            size = gradient_size(leaf, gradients, None if tail is None else tail[teacher.ids])
            if self.missing_mass in SPREAD and positions is not None:
                where = (logits, positions, teacher.ids, teacher.valid, temperature, tail)
                size = size + outside_gradient_size(leaf, gradients, *where)
            size = temperature * size  # T^2 D of z / T
            sums["easy_gradient"] = size.masked_fill(found.hard, 0.0).sum()
            sums["hard_gradient"] = size.masked_fill(~found.hard, 0.0).sum()
        pairs: list[tuple[Tensor, Tensor]] = []
        if self.alpha > 0:
            pairs += zip(student[:3], (scale * gradient for gradient in gradients), strict=True)
        if self.alpha < 1:
            on_log_q = torch.zeros_like(plain.log_q)
            on_log_q[:, 0] = -on_nll
            pairs += [(plain.log_q, on_log_q)]
        if self.label_smoothing > 0:
            pairs += [(plain.sum_log_q, torch.full_like(plain.sum_log_q, on_sum))]
        return with_gradient(value, pairs), sums

    def _tell(self, model: Any) -> None:
        """Say once that chunks are asked for of a model that has none."""
        if self.chunk_tokens != 0 and not self._told and output_projection(model) is None:
            self._told = True
            logger.warning(
                "--sekd-chunk-tokens has no effect: this model has no plain output projection "
                "that can be applied apart from it"
            )

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Divide the sums that every criterion logs."""
        sample_size, tokens, loss, nll = (
            sum(log[key] for log in logging_outputs)
            for key in ("sample_size", "ntokens", "loss", "nll_loss")
        )
        metrics.log_scalar("loss", loss / sample_size / math.log(2), sample_size, round=3)
        metrics.log_scalar("nll_loss", nll / tokens / math.log(2), tokens, round=3)
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["nll_loss"].avg))
        if "agree" in logging_outputs[0]:
            agree = sum(log["agree"] for log in logging_outputs)
            metrics.log_scalar("agreement", agree / tokens, tokens, round=4)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """Everything logged is a sum over tokens."""
        return True
