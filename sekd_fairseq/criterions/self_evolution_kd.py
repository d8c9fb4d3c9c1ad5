"""The criterion ``self_evolution_kd``."""

import copy
import logging
from dataclasses import dataclass, field, replace
from typing import Any, Optional

import torch
from fairseq.criterions import register_criterion
from fairseq.dataclass import ChoiceEnum
from fairseq.logging import metrics
from torch import Tensor

from sekd_fairseq.criterions.configuration import DistillationConfig
from sekd_fairseq.criterions.distillation import DistillationCriterion, Distilled
from sekd_fairseq.errors import UserError
from sekd_fairseq.losses import (
    Events,
    RunningQuantile,
    SelfEvolution,
    SelfEvolutionOutput,
    TeacherTokens,
    self_evolution_kd,
)
from sekd_fairseq.losses.divergences import relative_entropy
from sekd_fairseq.losses.self_evolution import (
    DIFFICULTIES,
    GAMMA_TYPES,
    INTEGRATIONS,
    PARTNERS,
    SCHEDULES,
    Partners,
)

logger = logging.getLogger(__name__)


@dataclass
class SelfEvolutionKDConfig(DistillationConfig):
    """Options of the criterion; the symbols are those of :mod:`sekd_fairseq.losses`.

    ``alpha``, ``beta`` and ``difficulty`` are None where nothing was given; :func:`partners` says what
    that means.
    """

    # Optional[...], because fairseq's parser does not know "float | None".
    alpha: Optional[float] = field(  # type: ignore[assignment]  # noqa: UP045
        default=None,
        metadata={
            "help": "weight of the distillation loss, from 0 to 1; cross entropy has 1 - alpha. "
            "0 is plain (label-smoothed) cross entropy (default: 1 with --integration blend, which "
            "has the reference in its prior, else 0.7)"
        },
    )
    lambda_max: float = field(
        default=SelfEvolution.lambda_max,
        metadata={
            "help": "largest ratio of prior knowledge mixed in at a hard token, 0 or more and "
            "below 1; 0 is plain word-level distillation"
        },
    )
    lambda_warmup_updates: int = field(
        default=0,
        metadata={
            "help": "let lambda_max grow from 0 in a straight line over this many updates: "
            "word-level distillation first, prior knowledge once the student knows something. "
            "This project's own addition, not the paper's; 0 is off"
        },
    )
    gamma: float = field(
        default=SelfEvolution.gamma,
        metadata={
            "help": "threshold of difficulty above which a token is hard: a quantile above 0 and "
            "below 1, or nats (0 or more) with --gamma-type absolute"
        },
    )
    gamma_type: ChoiceEnum(GAMMA_TYPES) = field(  # type: ignore[valid-type]
        default=SelfEvolution.gamma_type,
        metadata={
            "help": "absolute: gamma is in nats; quantile: of one batch of one process, so results "
            "depend on --max-tokens and the number of GPUs; running_quantile: tracked over updates, "
            "independent of how batches are split"
        },
    )
    schedule: ChoiceEnum(SCHEDULES) = field(  # type: ignore[valid-type]
        default=SelfEvolution.schedule,
        metadata={"help": "how the ratio grows with difficulty above gamma, up to lambda_max"},
    )
    schedule_scale: float = field(
        default=SelfEvolution.scale,
        metadata={"help": "width of the linear and exp schedules, nats, above 0"},
    )
    beta: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "share of the teacher in the prior, from 0 (reference only) to 1 (teacher "
            "only), or 'confidence': the teacher's probability of the reference, token by token "
            "(default: 0.7 with --integration blend, else 0.5)"
        },
    )
    integration: ChoiceEnum(INTEGRATIONS) = field(  # type: ignore[valid-type]
        default=SelfEvolution.integration,
        metadata={
            "help": "a reading of the paper's abstract. With D the divergence, p teacher, q student, r "
            "prior, l the ratio and q' = (1-l) q + l r: blend is D(r || q'), evolved D(p || q) + D(q' "
            "without gradient || q), student D(p || q'), target D((1-l) p + l r || q)"
        },
    )
    difficulty: Optional[ChoiceEnum(DIFFICULTIES)] = field(  # type: ignore[valid-type]  # noqa: UP045
        default=None,
        metadata={
            "help": "difficulty is KL(teacher || student), KL(prior || student) or the student's "
            "cross entropy of the reference (nll), of the student as it is now; with the task's "
            "--stored-difficulty, KL(teacher || student) of a stored pass in training (default: "
            "prior with --integration blend, unless it is stored; else teacher)"
        },
    )


def partners(cfg: Any, stored: bool = False) -> dict[str, Any]:
    """``alpha``, ``beta`` and ``difficulty`` as they were given, else those that belong with the
    integration (:data:`~sekd_fairseq.losses.self_evolution.PARTNERS`).

    ``stored`` says whether difficulty comes from a stored pass, which is KL(teacher || student).
    """
    usual = PARTNERS[str(cfg.integration)]._asdict() | ({"difficulty": "teacher"} if stored else {})
    given = {key: getattr(cfg, key) for key in Partners._fields}
    found = usual | {key: value for key, value in given.items() if value is not None}
    return {
        "alpha": float(found["alpha"]),
        "beta": str(found["beta"]),
        "difficulty": str(found["difficulty"]),
    }


def parse_settings(cfg: Any) -> SelfEvolution:
    """Turn command-line values into validated settings; ``UserError`` on one out of range."""
    try:
        beta = None if cfg.beta == "confidence" else float(cfg.beta)
    except ValueError:
        raise UserError(
            f"--beta: expected a number from 0 to 1 or 'confidence', found {cfg.beta!r}"
        ) from None
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


@register_criterion("self_evolution_kd", dataclass=SelfEvolutionKDConfig)
class SelfEvolutionKDCriterion(DistillationCriterion):
    """SE-KD, ``D_i`` of :mod:`sekd_fairseq.losses.self_evolution`.

    Logged, beside what every criterion logs, in nats or as shares: ``difficulty`` (mean),
    ``hard_share``, ``hard_lambda`` (mean ratio on hard tokens), ``kl_easy`` and ``kl_hard`` (mean
    KL(p || q)), ``gamma`` (the threshold in use); in training also ``hard_gradient`` and
    ``easy_gradient`` (mean L1 norm of the gradient of ``D`` to the logits).

    With ``--missing-mass sampled`` the mean difficulty is unbiased. Which tokens are hard is
    told by draws, but where difficulty is stored (in training): elsewhere ``hard_share``, the means
    over hard and easy tokens, and with ``lambda_max > 0`` the validation loss are those of draws and
    not of the teacher.
    """

    def __init__(self, cfg: SelfEvolutionKDConfig, task: Any) -> None:
        stored = bool(getattr(task.cfg, "stored_difficulty", None))
        resolved = partners(cfg, stored)
        cfg = copy.copy(cfg)
        for key, value in resolved.items():
            setattr(cfg, key, value)
        super().__init__(cfg, task)
        self.settings = parse_settings(cfg)
        self.refuse_idle(
            cfg,
            SelfEvolutionKDConfig.schedule_scale,
            "schedule_scale",
            cfg.schedule == "step",
            "--schedule step",
        )
        if stored and self.settings.difficulty != "teacher":
            raise UserError(
                "--stored-difficulty holds KL(teacher || student); expected --difficulty "
                f"teacher with it, found {self.settings.difficulty}"
            )
        self._check_draws(stored)
        if cfg.lambda_warmup_updates < 0:
            raise UserError(
                f"--lambda-warmup-updates: expected 0 or more, found {cfg.lambda_warmup_updates}"
            )
        chosen = ", ".join(f"{key} {value}" for key, value in resolved.items())
        logger.info("integration %s: %s", self.settings.integration, chosen)
        self.lambda_warmup_updates = int(cfg.lambda_warmup_updates)
        self.updates = 0
        self.running_quantile = (
            RunningQuantile(self.settings.gamma)
            if self.settings.gamma_type == "running_quantile"
            else None
        )

    def _check_draws(self, stored: bool) -> None:
        """Refuse a ratio that is taken from the draws that it weighs."""
        settings = self.settings
        from_teacher = settings.difficulty in ("teacher", "prior") and not stored
        if settings.missing_mass == "sampled" and settings.lambda_max > 0 and from_teacher:
            raise UserError(
                "--missing-mass sampled: the difficulty of a token would come from the same draws "
                "as its loss and make both biased; expected --stored-difficulty FILE, --difficulty "
                "nll or --lambda-max 0 (word-level distillation), found none; or take a cache of the "
                "best tokens (build_cache --top-k)"
            )

    @staticmethod
    def whole_batch(cfg: SelfEvolutionKDConfig) -> str:
        """The option that needs a whole batch at once, if any."""
        return "--gamma-type quantile" if str(cfg.gamma_type) == "quantile" else ""

    def distill(self, events: Events, nll: Tensor, teacher: TeacherTokens) -> Distilled:
        """SE-KD of each token; difficulty is taken now, or from a stored pass where there is one."""
        gamma = self.running_quantile.value if self.running_quantile is not None else None
        output = self_evolution_kd(events, self.settings_now(), gamma, teacher.difficulty)
        return Distilled(output.divergence, difficulty_sums(events, output), output.hard)

    def kernel_settings(self) -> tuple[SelfEvolution, float] | None:
        """Settings and threshold, if the loss is the forward KL with the outside as one event."""
        settings = self.settings_now()
        usual = (settings.divergence, settings.missing_mass) == ("forward_kl", "bucket")
        if not usual or settings.gamma_type == "quantile":
            return None
        running = self.running_quantile
        return settings, settings.gamma if running is None else running.value

    def sums_of_kernel(self, sums: dict[str, Tensor], tokens: int, gamma: float) -> dict[str, Any]:
        """All of them, and the threshold in use."""
        if not torch.is_grad_enabled():
            sums = {key: value for key, value in sums.items() if "gradient" not in key}
        return {**sums, "gamma": torch.full_like(sums["hard"], gamma * tokens)}

    def settings_now(self) -> SelfEvolution:
        """The settings with the ``lambda_max`` of this update."""
        if self.updates >= self.lambda_warmup_updates:
            return self.settings
        share = self.updates / self.lambda_warmup_updates
        return replace(self.settings, lambda_max=share * self.settings.lambda_max)

    def end_update(self, logging_outputs: list[dict[str, Any]]) -> None:
        """Count the update and move the running threshold of difficulty."""
        self.updates += 1
        if self.running_quantile is not None:
            hard, tokens = (sum(log[key] for log in logging_outputs) for key in ("hard", "ntokens"))
            self.running_quantile.update(hard, tokens)

    def running_state(self) -> dict[str, Any]:
        """The count of updates and the running threshold."""
        state: dict[str, Any] = {"updates": self.updates}
        if self.running_quantile is not None:
            state["running_gamma"] = self.running_quantile.value
        return state

    def load_running_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`running_state`."""
        self.updates = state.get("updates", 0)
        if self.running_quantile is not None and "running_gamma" in state:
            self.running_quantile.value = state["running_gamma"]

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Divide the sums; a mean over no tokens is NaN."""
        super().reduce_metrics(logging_outputs)

        def total(key: str) -> Any:
            return sum(log[key] for log in logging_outputs)

        tokens, hard = total("ntokens"), total("hard")
        metrics.log_scalar("difficulty", total("difficulty") / tokens, tokens, round=4)
        metrics.log_scalar("gamma", total("gamma") / tokens, tokens, round=4)
        metrics.log_scalar("hard_share", hard / tokens, tokens, round=4)
        for key, count in (
            ("hard_lambda", hard),
            ("kl_easy", tokens - hard),
            ("kl_hard", hard),
            ("easy_gradient", tokens - hard),
            ("hard_gradient", hard),
        ):
            if key in logging_outputs[0]:
                mean = total(key) / count if count > 0 else float("nan")
                metrics.log_scalar(key, mean, count, round=4)


def difficulty_sums(events: Events, output: SelfEvolutionOutput) -> dict[str, Tensor]:
    """What is logged of easy and hard tokens, summed."""
    kl = relative_entropy(events.log_p, events.log_q.detach(), events.log_multiplicity)
    return {
        "gamma": output.gamma * kl.numel(),
        "hard": output.hard.sum(),
        "difficulty": output.difficulty.sum(),
        "hard_lambda": output.ratio.masked_fill(~output.hard, 0.0).sum(),
        "kl_easy": kl.masked_fill(output.hard, 0.0).sum(),
        "kl_hard": kl.masked_fill(~output.hard, 0.0).sum(),
    }
