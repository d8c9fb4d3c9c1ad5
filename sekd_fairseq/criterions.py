"""The criterion ``self_evolution_kd``: gather the inputs, call the loss, sum, log."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq import utils
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.logging import metrics
from omegaconf import II
from torch import Tensor

from sekd_fairseq.data import teacher_rows
from sekd_fairseq.errors import UserError, one_line_errors
from sekd_fairseq.losses import (
    DIVERGENCES,
    MISSING_MASS,
    Events,
    RunningQuantile,
    SelfEvolution,
    SelfEvolutionOutput,
    build_events,
    self_evolution_kd,
    support_log_probs,
)
from sekd_fairseq.losses.divergences import relative_entropy
from sekd_fairseq.losses.self_evolution import DIFFICULTIES, GAMMA_TYPES, INTEGRATIONS, SCHEDULES


@dataclass
class SelfEvolutionKDCriterionConfig(FairseqDataclass):
    """Options of the criterion; the symbols are those of :mod:`sekd_fairseq.losses`."""

    alpha: float = field(
        default=0.7,
        metadata={
            "help": "weight of the distillation loss, from 0 to 1; cross entropy has 1 - alpha. "
            "0 is plain (label-smoothed) cross entropy"
        },
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "label smoothing of the cross entropy; 0 is off"}
    )
    lambda_max: float = field(
        default=0.5,
        metadata={
            "help": "largest ratio of prior knowledge mixed in at a hard token, 0 or more and "
            "below 1; 0 is plain word-level distillation"
        },
    )
    gamma: float = field(
        default=0.5,
        metadata={
            "help": "threshold of difficulty above which a token is hard: a quantile above 0 and "
            "below 1, or nats (0 or more) with --gamma-type absolute"
        },
    )
    gamma_type: ChoiceEnum(GAMMA_TYPES) = field(  # type: ignore[valid-type]
        default="running_quantile",
        metadata={
            "help": "absolute: gamma is in nats; quantile: of the batch at hand; "
            "running_quantile: tracked over updates, independent of how batches are split"
        },
    )
    schedule: ChoiceEnum(SCHEDULES) = field(  # type: ignore[valid-type]
        default="linear",
        metadata={"help": "how the ratio grows with difficulty above gamma, up to lambda_max"},
    )
    schedule_scale: float = field(
        default=1.0, metadata={"help": "width of the linear and exp schedules, nats, above 0"}
    )
    beta: str = field(
        default="0.5",
        metadata={
            "help": "share of the teacher in the prior, from 0 (reference only) to 1 (teacher "
            "only), or 'confidence': the teacher's probability of the reference, token by token"
        },
    )
    integration: ChoiceEnum(INTEGRATIONS) = field(  # type: ignore[valid-type]
        default="student",
        metadata={"help": "mix the prior into the student's distribution, or into the target"},
    )
    difficulty: ChoiceEnum(DIFFICULTIES) = field(  # type: ignore[valid-type]
        default="teacher",
        metadata={"help": "difficulty is KL(teacher || student) or KL(prior || student)"},
    )
    divergence: ChoiceEnum(tuple(DIVERGENCES)) = field(  # type: ignore[valid-type]
        default="forward_kl",
        metadata={"help": "divergence between teacher and student inside the loss"},
    )
    divergence_weight: float = field(
        default=0.5,
        metadata={"help": "weight inside jsd and the skew divergences, above 0 and below 1"},
    )
    missing_mass: ChoiceEnum(MISSING_MASS) = field(  # type: ignore[valid-type]
        default="bucket",
        metadata={
            "help": "what is done with the teacher's mass outside the cached support: one event "
            "(bucket), spread evenly (uniform), ignored (renormalize), estimated (sampled)"
        },
    )
    sentence_avg: bool = II("optimization.sentence_avg")


def parse_settings(cfg: Any) -> SelfEvolution:
    """Turn command-line values into validated settings; ``UserError`` on one out of range."""
    try:
        beta = None if cfg.beta == "confidence" else float(cfg.beta)
    except ValueError:
        raise UserError(
            f"--beta: expected a number from 0 to 1 or 'confidence', found {cfg.beta!r}"
        ) from None
    for name in ("alpha", "label_smoothing"):
        if not 0 <= getattr(cfg, name) <= 1:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}: expected 0 to 1, found {getattr(cfg, name)}")
    try:
        return SelfEvolution(
            gamma=cfg.gamma,
            gamma_type=str(cfg.gamma_type),
            lambda_max=cfg.lambda_max,
            schedule=str(cfg.schedule),
            scale=cfg.schedule_scale,
            beta=beta,
            integration=str(cfg.integration),
            difficulty=str(cfg.difficulty),
            divergence=str(cfg.divergence),
            divergence_weight=cfg.divergence_weight,
            missing_mass=str(cfg.missing_mass),
        )
    except ValueError as error:
        raise UserError(f"criterion self_evolution_kd: {error}") from error


@register_criterion("self_evolution_kd", dataclass=SelfEvolutionKDCriterionConfig)
class SelfEvolutionKDCriterion(FairseqCriterion):  # type: ignore[misc]
    """``sum_i alpha D_i + (1 - alpha) CE_i`` over target tokens that are not padding.

    Logged, beside ``loss``, ``nll_loss`` (bits) and ``ppl``, all in nats or as shares:
    ``difficulty`` (mean), ``hard_share``, ``hard_lambda`` (mean ratio on hard tokens), ``kl_easy``
    and ``kl_hard`` (mean KL(p || q)), ``hard_gradient`` and ``easy_gradient`` (mean L1 norm of the
    gradient of ``D`` to the logits, on the events of the loss; zero in validation), ``agreement``
    (share of tokens with equal best token), ``gamma`` (the threshold in use).
    """

    def __init__(self, cfg: SelfEvolutionKDCriterionConfig, task: Any) -> None:
        super().__init__(task)
        with one_line_errors():
            self.settings = parse_settings(cfg)
            if not hasattr(task.cfg, "teacher_cache"):
                raise UserError(
                    "--criterion self_evolution_kd expects --task self_evolution_kd, found task "
                    f"{getattr(task.cfg, '_name', type(task).__name__)!r}; add the flag"
                )
            if not task.cfg.teacher_cache:
                raise UserError(
                    "--criterion self_evolution_kd expects --teacher-cache DIR, found none; build "
                    "one with: python -m sekd_fairseq.build_cache DATA --path TEACHER --output DIR"
                )
        self.alpha = float(cfg.alpha)
        self.label_smoothing = float(cfg.label_smoothing)
        self.sentence_avg = cfg.sentence_avg
        self.running_quantile = (
            RunningQuantile(self.settings.gamma)
            if self.settings.gamma_type == "running_quantile"
            else None
        )

    def forward(
        self, model: Any, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, Any, dict[str, Any]]:
        """Loss of a batch: ``(sum over tokens, denominator, sums to log)``."""
        logits = model(**sample["net_input"])[0]  # (B, T, V)
        target = sample["target"]
        rows = target.view(-1).ne(self.padding_idx).nonzero().squeeze(1)  # (N,)
        teacher = teacher_rows(sample["teacher"])
        uniform = self.settings.missing_mass == "uniform"
        student = support_log_probs(
            logits.reshape(-1, logits.size(-1)),
            rows,
            teacher.ids,
            teacher.valid,
            with_sum=self.label_smoothing > 0 or uniform,
        )
        events = build_events(teacher, student, self.settings.missing_mass)
        gamma = self.running_quantile.value if self.running_quantile is not None else None
        output = self_evolution_kd(events, self.settings, gamma)
        nll = -student.log_q[:, 0].sum()
        divergence = output.divergence.sum()
        loss = self.alpha * divergence + (1.0 - self.alpha) * self._cross_entropy(
            nll, student.sum_log_q, logits.size(-1)
        )
        sample_size = target.size(0) if self.sentence_avg else sample["ntokens"]
        best = teacher.log_p.argmax(dim=1, keepdim=True)
        agree = student.log_q.gather(1, best).squeeze(1) >= student.max_log_q
        logging_output = {
            "loss": loss.detach(),
            "nll_loss": nll.detach(),
            "ntokens": sample["ntokens"],
            "nsentences": target.size(0),
            "sample_size": sample_size,
            "agree": agree.sum(),
            **self._difficulty_sums(events, output),
        }
        return loss, sample_size, logging_output

    def _cross_entropy(self, nll: Tensor, sum_log_q: Tensor, vocab_size: int) -> Tensor:
        """fairseq's label-smoothed cross entropy, summed over tokens."""
        if self.label_smoothing == 0:
            return nll
        epsilon = self.label_smoothing / (vocab_size - 1)
        return (1.0 - self.label_smoothing - epsilon) * nll - epsilon * sum_log_q.sum()

    def _difficulty_sums(self, events: Events, output: SelfEvolutionOutput) -> dict[str, Tensor]:
        hard = output.hard.to(output.difficulty)
        log_q = events.log_q.detach()
        kl = relative_entropy(events.log_p, log_q, events.log_multiplicity)
        gradient = torch.zeros_like(kl)
        if output.divergence.requires_grad and output.divergence.numel():
            (on_log_q,) = torch.autograd.grad(
                output.divergence.sum(), events.log_q, retain_graph=True
            )
            q = log_q.exp()
            gradient = (on_log_q - q * on_log_q.sum(dim=1, keepdim=True)).abs().sum(dim=1)
        return {
            "gamma": output.gamma * kl.numel(),
            "hard": hard.sum(),
            "difficulty": output.difficulty.sum(),
            "hard_lambda": (output.ratio * hard).sum(),
            "kl_easy": (kl * (1.0 - hard)).sum(),
            "kl_hard": (kl * hard).sum(),
            "easy_gradient": (gradient * (1.0 - hard)).sum(),
            "hard_gradient": (gradient * hard).sum(),
        }

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Divide the sums; a mean over no tokens is NaN."""

        def total(key: str) -> Any:
            return sum(log[key] for log in logging_outputs)

        sample_size, tokens, hard = total("sample_size"), total("ntokens"), total("hard")
        metrics.log_scalar("loss", total("loss") / sample_size / math.log(2), sample_size, round=3)
        metrics.log_scalar("nll_loss", total("nll_loss") / tokens / math.log(2), tokens, round=3)
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["nll_loss"].avg))
        metrics.log_scalar("difficulty", total("difficulty") / tokens, tokens, round=4)
        metrics.log_scalar("gamma", total("gamma") / tokens, tokens, round=4)
        metrics.log_scalar("hard_share", hard / tokens, tokens, round=4)
        metrics.log_scalar("agreement", total("agree") / tokens, tokens, round=4)
        for key, count in (
            ("hard_lambda", hard),
            ("kl_easy", tokens - hard),
            ("kl_hard", hard),
            ("easy_gradient", tokens - hard),
            ("hard_gradient", hard),
        ):
            mean = total(key) / count if count > 0 else float("nan")
            metrics.log_scalar(key, mean, count, round=4)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True
