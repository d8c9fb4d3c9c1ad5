"""Slow float64 reference of every loss, one token at a time, written from DESIGN.md alone.

A distribution is a vector of log-probabilities, an impossible event ``-inf``: with logits 1e4
apart the log-probability is finite where the probability is 0 in float64. ``p`` teacher, ``q``
student, ``r`` prior; nats. ``0 log 0 = 0``, ``0 log(0/b) = 0``, ``a log(a/0) = inf`` for ``a > 0``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Vector = NDArray[np.float64]
Beta = float | Literal["confidence"]
Shares = tuple[float, float]  # weights of forward and reverse KL in adaptive KL


def log_of(probabilities: ArrayLike) -> Vector:
    """Log of a probability vector; zeros become ``-inf``."""
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(probabilities, dtype=np.float64))


def log_sum_exp(values: Vector) -> float:
    """``log Σ exp(values)``; ``-inf`` for an empty vector or one of ``-inf`` alone."""
    largest = float(max(values, default=-math.inf))
    if largest == -math.inf:
        return -math.inf
    return largest + math.log(math.fsum(math.exp(value - largest) for value in values))


def student_log_probs(logits: ArrayLike) -> Vector:
    """Log-softmax of one token's logits ``(V,)``; ``-inf`` marks a token that is forbidden."""
    logits = np.asarray(logits, dtype=np.float64)
    return logits - log_sum_exp(logits)


def mix(log_a: Vector, log_b: Vector, weight: float) -> Vector:
    """Log of the mixture of probabilities ``(1 - weight) a + weight b``."""
    return np.logaddexp(log_of(1.0 - weight) + log_a, log_of(weight) + log_b)


@dataclass(frozen=True)
class Events:
    """What the two sides are compared over: log-probabilities per event, and gold's index."""

    log_p: Vector
    log_q: Vector
    gold: int


def events(
    log_p: Vector,
    log_q: Vector,
    support: Sequence[int],
    gold: int,
    missing_mass: str = "bucket",
    tail: Vector | None = None,
) -> Events:
    """Events that are left of two distributions over ``V`` tokens, if ``support`` alone is known.

    ``bucket``: the tokens of the support in its order, then everything else as one event.
    ``renormalize``: the tokens of the support, both sides divided by their own mass there.
    ``uniform``: all ``V`` tokens; the teacher's outside mass is spread evenly over the outside
    tokens that the student allows, that is those whose ``log_q`` is not ``-inf``. ``tail``: the same,
    in proportion to the weights ``tail`` (V,).
    """
    inside = list(support)
    outside = [token for token in range(len(log_p)) if token not in inside]
    event = inside.index(gold)  # a ValueError if gold is not in the support
    p_in, q_in, rho = log_p[inside], log_q[inside], log_sum_exp(log_p[outside])
    if missing_mass == "bucket":
        q_in = np.append(q_in, log_sum_exp(log_q[outside]))
        return Events(np.append(p_in, rho), q_in, event)
    if missing_mass == "renormalize":
        return Events(p_in - log_sum_exp(p_in), q_in - log_sum_exp(q_in), event)
    if missing_mass in ("uniform", "tail"):
        allowed = [token for token in outside if log_q[token] > -math.inf]
        if rho > -math.inf and not allowed:
            raise ValueError("the student allows no token outside the support for the mass there")
        full = np.full(len(log_p), -math.inf)
        full[inside] = p_in
        weights = np.ones(len(log_p)) if missing_mass == "uniform" else tail
        full[allowed] = rho + log_of(weights[allowed]) - log_of(weights[allowed].sum())
        return Events(full, log_q, gold)
    raise ValueError(f"unknown missing mass {missing_mass!r}")


def forward_kl(log_p: Vector, log_q: Vector) -> float:
    """``KL(p||q) = Σ p log(p/q)``; in all divergences the teacher (or target) comes first."""
    pairs = zip(log_p, log_q, strict=True)
    return math.fsum(math.exp(a) * (a - b) for a, b in pairs if math.exp(a) > 0.0)


def reverse_kl(log_p: Vector, log_q: Vector) -> float:
    """``KL(q||p)``."""
    return forward_kl(log_q, log_p)


def jsd(log_p: Vector, log_q: Vector, weight: float) -> float:
    """``w KL(p||m) + (1-w) KL(q||m)`` with ``m = w p + (1-w) q``; 0 at ``w = 0`` and ``w = 1``."""
    if weight in (0.0, 1.0):
        return 0.0
    log_m = mix(log_q, log_p, weight)
    return weight * forward_kl(log_p, log_m) + (1.0 - weight) * forward_kl(log_q, log_m)


def skew_forward_kl(log_p: Vector, log_q: Vector, skew: float) -> float:
    """``KL(p || (1-s) q + s p)``."""
    return forward_kl(log_p, mix(log_q, log_p, skew))


def skew_reverse_kl(log_p: Vector, log_q: Vector, skew: float) -> float:
    """``KL(q || (1-s) p + s q)``."""
    return forward_kl(log_q, mix(log_p, log_q, skew))


def tvd(log_p: Vector, log_q: Vector) -> float:
    """``½ Σ |p - q|``."""
    return 0.5 * math.fsum(abs(np.exp(log_p) - np.exp(log_q)))


def adaptive_weights(log_p: Vector, log_q: Vector, head_mass: float = 0.5) -> Shares:
    """Shares of head and tail in ``Σ|p - q|``, of sum 1, or ``(0, 0)`` if both gaps are 0.

    The head is the smallest set of the teacher's most probable events (of equals the one with
    the lower index first) whose mass reaches ``head_mass``.
    """
    gaps, mass = {"head": 0.0, "tail": 0.0}, 0.0
    for event in sorted(range(len(log_p)), key=lambda event: (-log_p[event], event)):
        gap = abs(math.exp(log_p[event]) - math.exp(log_q[event]))
        gaps["head" if mass < head_mass else "tail"] += gap
        mass += math.exp(log_p[event])
    total = sum(gaps.values()) or 1.0
    return gaps["head"] / total, gaps["tail"] / total


def adaptive_kl(log_p: Vector, log_q: Vector, shares: Shares) -> float:
    """Head share times ``KL(p||q)`` plus tail share times ``KL(q||p)`` (Wu et al. 2024).

    A share of 0 drops its term, even an infinite one. No gradient flows through the shares.
    """
    terms = zip(shares, (forward_kl, reverse_kl), strict=True)
    return math.fsum(share * kl(log_p, log_q) for share, kl in terms if share > 0.0)


def decoupled_kl(log_p: Vector, log_q: Vector, gold: int) -> tuple[float, float]:
    """Target-class and non-target-class part of ``KL(p||q)``, whose sum it is.

    The first is the KL of (gold, everything else), the second ``1 - p_gold`` times the KL of the
    distributions over the other events, each divided by its own mass (Zhao et al. 2022).
    """
    rest_p, rest_q = np.delete(log_p, gold), np.delete(log_q, gold)
    mass_p, mass_q = log_sum_exp(rest_p), log_sum_exp(rest_q)
    target = forward_kl(np.array([log_p[gold], mass_p]), np.array([log_q[gold], mass_q]))
    if -math.inf in (mass_p, mass_q):
        return target, 0.0 if mass_p == -math.inf else math.inf
    return target, math.exp(mass_p) * forward_kl(rest_p - mass_p, rest_q - mass_q)


@dataclass(frozen=True)
class Settings:
    """Options of the loss of one token."""

    alpha: float = 0.5
    beta: Beta = 0.5
    lambda_max: float = 0.0
    schedule: str = "step"
    scale: float = 1.0
    integration: str = "student"
    difficulty: str = "teacher"
    divergence: str = "forward_kl"
    missing_mass: str = "bucket"
    label_smoothing: float = 0.0
    weight: float = 0.5
    skew: float = 0.1
    head_mass: float = 0.5


def divergence(log_a: Vector, log_b: Vector, s: Settings, shares: Shares | None = None) -> float:
    """The divergence that the settings name, target ``a`` first; ``shares`` fixes adaptive KL's."""
    if s.divergence == "adaptive_kl":
        return adaptive_kl(log_a, log_b, shares or adaptive_weights(log_a, log_b, s.head_mass))
    plain = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "tvd": tvd}
    if s.divergence in plain:
        return plain[s.divergence](log_a, log_b)
    skewed = {"skew_forward_kl": skew_forward_kl, "skew_reverse_kl": skew_reverse_kl}
    if s.divergence in skewed:
        return skewed[s.divergence](log_a, log_b, s.skew)
    return {"jsd": jsd}[s.divergence](log_a, log_b, s.weight)


def prior(e: Events, beta: Beta) -> Vector:
    """Log of ``r = β p + (1-β) y``; ``β = p[y]`` for ``confidence``."""
    one_hot = log_of(np.arange(len(e.log_p)) == e.gold)
    return mix(one_hot, e.log_p, math.exp(e.log_p[e.gold]) if beta == "confidence" else beta)


def difficulty(e: Events, s: Settings) -> float:
    """``KL(p||q)`` for ``teacher``, ``KL(r||q)`` for ``prior``, ``-log q[y]`` for ``nll``."""
    if s.difficulty == "nll":
        return -float(e.log_q[e.gold])
    return forward_kl({"teacher": e.log_p, "prior": prior(e, s.beta)}[s.difficulty], e.log_q)


def ratio(d: float, gamma: float, s: Settings) -> float:
    """``λ = λ_max s(d)``; 0 for easy tokens, those with ``d <= Γ``."""
    excess = (d - gamma) / s.scale
    if not excess > 0.0:
        return 0.0
    share = {"step": 1.0, "linear": min(excess, 1.0), "exp": -math.expm1(-excess)}[s.schedule]
    return s.lambda_max * share


Pairs = list[tuple[Vector, Vector]]


def integrate(e: Events, s: Settings, lam: float) -> Pairs:
    """The log-distributions that the token loss compares, target first, one or two pairs of them."""
    r = prior(e, s.beta)
    toward_prior = mix(e.log_q, r, lam)  # q̃
    return {
        "blend": [(r, toward_prior)],
        "evolved": [(e.log_p, e.log_q), (toward_prior, e.log_q)],
        "student": [(e.log_p, toward_prior)],
        "target": [(mix(e.log_p, r, lam), e.log_q)],
    }[s.integration]


def cross_entropy(log_q: Vector, gold: int, label_smoothing: float = 0.0) -> float:
    """fairseq's label-smoothed cross entropy: ``(1-ε-ε_i) nll + ε_i Σ -log q``, ε_i = ε/(V-1)."""
    if label_smoothing == 0.0:
        return -float(log_q[gold])  # forbidden tokens must not give 0 times inf
    eps_i = label_smoothing / (len(log_q) - 1)
    return (1.0 - label_smoothing - eps_i) * -float(log_q[gold]) - eps_i * math.fsum(log_q)


@dataclass(frozen=True)
class Token:
    """One target position: student logits and teacher log-probabilities ``(V,)``, support, gold, and
    the teacher's weights of tokens outside a support ``(V,)``."""

    logits: Vector
    log_p: Vector
    support: Sequence[int]
    gold: int
    tail: Vector | None = None

    def events(self, s: Settings) -> Events:
        log_q = student_log_probs(self.logits)
        return events(self.log_p, log_q, self.support, self.gold, s.missing_mass, self.tail)


def token_loss(t: Token, s: Settings, lam: float, held: Pairs | None = None) -> float:
    """``α D + (1-α) CE`` of one token at a given ratio; a weight of 0 drops its term.

    ``held`` are the pairs of the student whose gradient is taken: adaptive KL's shares, and the target
    ``q̃`` of ``evolved``, are theirs, because no gradient flows through them.
    """
    kd = 0.0
    if s.alpha > 0.0:
        pairs = integrate(t.events(s), s, lam)
        held = held or pairs
        if s.integration == "evolved":
            pairs = [pairs[0], (held[1][0], pairs[1][1])]
        shares = [adaptive_weights(*pair, s.head_mass) for pair in held]
        kd = math.fsum(
            divergence(*pair, s, share) for pair, share in zip(pairs, shares, strict=True)
        )
    ce = cross_entropy(student_log_probs(t.logits), t.gold, s.label_smoothing)
    return s.alpha * kd + (1.0 - s.alpha) * (ce if s.alpha < 1.0 else 0.0)


def se_kd_loss(tokens: Sequence[Token], s: Settings, gamma: float, pad: int) -> float:
    """Sum over the tokens whose gold is not ``pad``."""
    real = [t for t in tokens if t.gold != pad]
    return math.fsum(token_loss(t, s, ratio(difficulty(t.events(s), s), gamma, s)) for t in real)


def numeric_gradient(function: Callable[[Vector], float], logits: Vector) -> Vector:
    """Central differences of step 1e-5; 0 at a logit of ``-inf``, which does not move."""
    gradient = np.zeros(len(logits))
    for j in range(len(logits)):
        step = 1e-5 * np.eye(len(logits))[j]
        gradient[j] = (function(logits + step) - function(logits - step)) / 2e-5
    return gradient


def token_gradient(t: Token, s: Settings, lam: float) -> Vector:
    """Gradient of :func:`token_loss` to the logits; what has no gradient (``held`` there), and the
    ratio, held fixed."""
    held = integrate(t.events(s), s, lam)
    return numeric_gradient(lambda z: token_loss(replace(t, logits=z), s, lam, held), t.logits)


def adaptive_teaching(tokens: Sequence[Events]) -> list[float]:
    """ATKD of each token of a batch: 0.2 NCKD, or 0.8 (TCKD + NCKD) where the teacher's ``1 - p_y`` is at
    or over the batch's median; NCKD without the factor ``1 - p_y`` of :func:`decoupled_kl`."""
    unsure = [1.0 - math.exp(e.log_p[e.gold]) for e in tokens]
    values = []
    for e, u in zip(tokens, unsure, strict=True):
        target, others = decoupled_kl(e.log_p, e.log_q, e.gold)
        others = others / u if u > 0.0 else 0.0
        values.append(0.8 * (target + others) if u >= np.median(unsure) else 0.2 * others)
    return values
