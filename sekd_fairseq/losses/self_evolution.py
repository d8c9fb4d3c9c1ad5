r"""Self-evolution knowledge distillation (SE-KD), after Song et al., COLING 2025.

From the paper's abstract: at each token the teacher distribution and the one-hot reference are
mixed, as prior knowledge, into the student's distribution, in a ratio that depends on how hard the
token is for the student.  **The formulas below are this project's reading**; the paper's own were
not at hand.  Symbols: ``p`` teacher, ``q`` student, ``y`` one-hot reference, at target position
``i``; logs are natural.

1. difficulty (self-question)     ``d_i = KL(p_i || q_i)``, ``KL(r_i || q_i)`` or ``-log q_i[y_i]``,
                                  no gradient
2. hard tokens                    ``d_i > gamma``
3. ratio                          ``lambda_i = lambda_max * s(d_i)``, no gradient
4. prior                          ``r_i = beta p_i + (1 - beta) y_i``
5. integration (self-evolution)   ``blend``, ``evolved``, ``student`` or ``target``, readings that
                                  :mod:`sekd_fairseq.losses.integration` defines

``lambda_max = 0`` is word-level KD (Kim and Rush, 2016), for ``blend`` from the prior.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sekd_fairseq.losses.divergences import (
    DIVERGENCES,
    divergence,
    forward_kl,
    in_float32,
    like,
    log_mix,
)
from sekd_fairseq.losses.events import Events, check_missing_mass
from sekd_fairseq.losses.integration import READINGS, check_integration
from sekd_fairseq.losses.selective import batch_quantile

GAMMA_TYPES = ("absolute", "quantile", "running_quantile")
SCHEDULES = ("step", "linear", "exp")
INTEGRATIONS = tuple(READINGS)
DIFFICULTIES = ("teacher", "prior", "nll")


class Partners(NamedTuple):
    """What belongs with a reading, where a user says nothing else: the weight of the loss beside cross
    entropy, the teacher's share in the prior, and what measures difficulty."""

    alpha: float
    beta: float
    difficulty: str


#: ``blend`` has the reference in its prior, so nothing beside it, and its difficulty is what it lowers.
PARTNERS = {name: Partners(0.7, 0.5, "teacher") for name in READINGS} | {
    "blend": Partners(1.0, 0.7, "prior")
}


def _expect(name: str, value: object, choices: tuple[str, ...] | frozenset[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(sorted(choices))}; found {value!r}")


@dataclass(frozen=True)
class SelfEvolution:
    """Settings of SE-KD, validated when made (``ValueError`` says what was expected and found).

    Parameters
    ----------
    gamma : float
        Threshold of difficulty: in nats (>= 0) if ``gamma_type`` is ``absolute``, else the
        quantile of difficulty above which a token is hard, in (0, 1).
    gamma_type : {"absolute", "quantile", "running_quantile"}
        ``quantile`` is taken from the batch at hand, ``running_quantile`` from past updates
        (:class:`RunningQuantile`).
    lambda_max : float
        Largest ratio of prior knowledge, in [0, 1).
    schedule : {"step", "linear", "exp"}
        ``s(d)`` for ``d > gamma``: 1; ``min(1, (d - gamma) / scale)``; ``1 - exp(-(d - gamma) /
        scale)``.
    scale : float
        Width of the ``linear`` and ``exp`` schedules in nats, > 0.
    beta : float or None
        Share of the teacher in the prior, in [0, 1]; None takes the teacher's own probability of
        the reference, token by token.
    integration : {"blend", "evolved", "student", "target"}
        See :mod:`sekd_fairseq.losses.integration`; :data:`PARTNERS` has what belongs with each.
    difficulty : {"teacher", "prior", "nll"}
        ``KL(p || q)``, ``KL(r || q)``, or ``-log q[y]``, each on the events of the loss.
    divergence : str
        A key of :data:`~sekd_fairseq.losses.divergences.DIVERGENCES`.
    divergence_weight : float
        The weight inside ``jsd``, ``skew_forward_kl`` and ``skew_reverse_kl``, in (0, 1).
    missing_mass : str
        See :mod:`sekd_fairseq.losses.events`.
    """

    gamma: float = 0.5
    gamma_type: str = "running_quantile"
    lambda_max: float = 0.5
    schedule: str = "linear"
    scale: float = 1.0
    beta: float | None = 0.5
    integration: str = "target"
    difficulty: str = "teacher"
    divergence: str = "forward_kl"
    divergence_weight: float = 0.5
    missing_mass: str = "bucket"

    def __post_init__(self) -> None:
        _expect("gamma_type", self.gamma_type, GAMMA_TYPES)
        _expect("schedule", self.schedule, SCHEDULES)
        _expect("integration", self.integration, INTEGRATIONS)
        _expect("difficulty", self.difficulty, DIFFICULTIES)
        _expect("divergence", self.divergence, frozenset(DIVERGENCES))
        if self.gamma_type == "absolute" and not self.gamma >= 0:
            raise ValueError(f"gamma is a difficulty in nats, 0 or more; found {self.gamma}")
        if self.gamma_type != "absolute" and not 0 < self.gamma < 1:
            raise ValueError(
                f"gamma with gamma_type {self.gamma_type} is a quantile, above 0 and below 1; "
                f"found {self.gamma} (for a threshold in nats use gamma_type absolute)"
            )
        if not 0 <= in_float32(self.lambda_max) < 1:
            raise ValueError(
                "lambda_max is a ratio, 0 or more and below 1 (in float32); found "
                f"{self.lambda_max}"
            )
        if not 0 < in_float32(self.scale) < math.inf:
            raise ValueError(
                f"schedule scale is in nats, above 0 and finite (in float32); found {self.scale}"
            )
        if self.beta is not None and not 0 <= self.beta <= 1:
            raise ValueError(
                f"beta is a share, from 0 to 1 (or 'confidence', None here); found {self.beta}"
            )
        if not 0 < in_float32(self.divergence_weight) < 1:
            raise ValueError(
                "divergence weight lies above 0 and below 1 (in float32); found "
                f"{self.divergence_weight}"
            )
        mixes = self.divergence == "skew_forward_kl" or (
            self.integration in ("blend", "student") and self.lambda_max > 0
        )
        check_missing_mass(self.missing_mass, self.divergence, mixes)
        if self.lambda_max > 0:
            check_integration(self.integration, self.divergence, self.missing_mass)


class SelfEvolutionOutput(NamedTuple):
    """Per-token results, each ``(N,)``: loss in nats (with gradient), the rest without gradient.

    Attributes
    ----------
    divergence
        ``D_i`` of the integration, unweighted.
    difficulty
        ``d_i`` in nats.
    hard
        bool, ``d_i > gamma``.
    ratio
        ``lambda_i``.
    gamma
        The threshold that was used, nats, 0-d.
    """

    divergence: Tensor
    difficulty: Tensor
    hard: Tensor
    ratio: Tensor
    gamma: Tensor


def prior(log_p: Tensor, beta: float | None) -> Tensor:
    """``log r``, ``r = beta p + (1 - beta) y``; event 0 is the reference. Shapes (N, E).

    ``beta = None`` takes ``beta_i = p_i[y_i]``.
    """
    log_y = torch.full_like(log_p, float("-inf"))
    log_y[:, 0] = 0.0
    if beta is None:
        return log_mix(log_y, log_p, log_p[:, :1].exp().clamp_max(1.0))
    return log_mix(log_y, log_p, beta)


def token_difficulty(events: Events, log_prior: Tensor, kind: str) -> Tensor:
    """``KL(p || q)`` (``teacher``), ``KL(r || q)`` (``prior``) or ``-log q[y]`` (``nll``); (N,) nats, no
    gradient.

    Of a sampled teacher an unbiased estimate, which may be negative.
    """
    log_p, log_q, log_multiplicity = events
    with torch.no_grad():
        if kind == "nll":
            return (-log_q[:, 0]).clamp_min(0.0)
        log_a = log_prior if kind == "prior" else log_p
        return forward_kl(log_a, log_q, log_multiplicity)


def ratio(difficulty: Tensor, gamma: float | Tensor, settings: SelfEvolution) -> Tensor:
    """``lambda_i = lambda_max * s(d_i)``: zero up to ``gamma``, never decreasing; (N,)."""
    excess = difficulty - gamma
    if settings.schedule == "step":
        share = (excess > 0).to(difficulty.dtype)
    elif settings.schedule == "linear":
        share = (excess / settings.scale).clamp(0.0, 1.0)
    else:
        share = -torch.expm1(-excess.clamp_min(0.0) / settings.scale)
    return settings.lambda_max * share


def self_evolution_kd(
    events: Events,
    settings: SelfEvolution,
    gamma: float | Tensor | None = None,
    difficulty: Tensor | None = None,
) -> SelfEvolutionOutput:
    """The SE-KD divergence of each token.

    Parameters
    ----------
    events : Events
        From :func:`sekd_fairseq.losses.events.build_events`; gradient flows to ``log_q``.
    settings : SelfEvolution
    gamma : float or 0-d tensor, optional
        Threshold in nats. By default ``settings.gamma`` (``absolute``) or the quantile of these
        tokens (``quantile``); required for ``running_quantile``.
    difficulty : (N,) float, optional
        Stored difficulty in nats, instead of the student's as it is now.

    Raises
    ------
    ValueError
        ``running_quantile`` without ``gamma``.
    """
    log_prior = prior(events.log_p, settings.beta)
    if difficulty is None:
        difficulty = token_difficulty(events, log_prior, settings.difficulty)
    if gamma is None:
        gamma = threshold(difficulty, settings)
    gamma = like(gamma, difficulty)
    weight = ratio(difficulty, gamma, settings)
    token_loss = integrate(events, log_prior, weight, settings)
    return SelfEvolutionOutput(token_loss, difficulty, difficulty > gamma, weight, gamma)


def threshold(difficulty: Tensor, settings: SelfEvolution) -> float | Tensor:
    """``gamma`` in nats: as it is (``absolute``) or the quantile of these tokens (``quantile``)."""
    if settings.gamma_type == "absolute":
        return settings.gamma
    if settings.gamma_type == "running_quantile":
        raise ValueError("gamma_type running_quantile expects the threshold in nats as gamma=")
    return batch_quantile(difficulty, settings.gamma)


def integrate(events: Events, log_prior: Tensor, weight: Tensor, settings: SelfEvolution) -> Tensor:
    """The token losses of the reading that the settings name, at ratios ``weight``; both (N,)."""

    def distance(log_a: Tensor, log_b: Tensor) -> Tensor:
        return divergence(
            settings.divergence, log_a, log_b, events.log_multiplicity, settings.divergence_weight
        )

    column = weight.unsqueeze(1) if settings.lambda_max > 0 else None
    return READINGS[settings.integration](distance, events, log_prior, column)


class RunningQuantile:
    """Tracks the difficulty above which a share ``1 - quantile`` of tokens lies, over updates.

    Stochastic approximation (Robbins and Monro, 1951) on a log scale: after an update in which a
    share ``h`` of the tokens was above the threshold, it moves by the factor
    ``exp(rate * (h - (1 - quantile)))``. It needs two sums per update, so it is the same however a
    batch is split over accumulation steps or processes, and it is one number in a checkpoint.

    Parameters
    ----------
    quantile : float
        In (0, 1); the share of tokens that count as easy.
    start : float
        First threshold in nats.
    rate : float
        Step on the log scale, per unit of share. At 0.5 the threshold crosses a factor of 5 in
        about seven updates when every token is on one side of it.
    """

    def __init__(self, quantile: float, start: float = 1.0, rate: float = 0.5) -> None:
        self.quantile = quantile
        self.rate = rate
        self.value = start

    def update(self, hard: float, total: float) -> None:
        """Count one update: ``hard`` of ``total`` tokens lay above :attr:`value`."""
        if total > 0:
            self.value *= math.exp(self.rate * (hard / total - (1.0 - self.quantile)))
