"""How small an effect a study can detect: power of the test in :func:`analysis.stats.hierarchical`.

Model: the effect that seed s of a direction shows on n sentences is

    e_s = effect + sentence + seed_s + interaction_s

with variances M / n, T and I / n. The sentences are the same for all seeds, so their part does not
shrink with more seeds, and seeds do not shrink with more sentences: a study needs enough of both.
The three parts are estimated from runs that are there, by equating the test's own three variances to
what they are expected to be (the variance over seeds to T + I/n, the bootstrap variance of one seed to
(M + I)/n, that of the mean over S seeds to M/n + I/(n S)).

Power is that of the test itself, not of a formula near it. Under the model the mean effect is normal
and independent of the variances over seeds, which are chi-squared, and the bootstrap variances are as
good as known; so the power is the mean, over draws of the variances over seeds, of the probability
that the mean effect exceeds the test's critical value.

References
----------
Westfall, J., Kenny, D. A. and Judd, C. M. (2014). Statistical power and optimal design in experiments
in which samples of participants respond to samples of stimuli. Journal of Experimental Psychology:
General 143(5). https://doi.org/10.1037/xge0000014 (the design with both crossed: its participants are
our seeds, its stimuli our sentences)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import scipy.special

from analysis.stats import ALPHA, Floats, resampled_variance

#: Probability with which an effect of the size called detectable is found, where nothing else is asked for.
POWER = 0.8
#: Draws of the variances over seeds; the error of a power is below 1 % of it.
DRAWS = 2000
#: Least seeds that tell of a spread.
MIN_SEEDS = 2


@dataclass(frozen=True)
class Spread:
    """How much the effect of one study differs from that of another, by where that comes from.

    Attributes
    ----------
    seed : (D,) variance over seeds, T, of each direction
    interaction : (D,) I / n of each direction
    sentence : M / n of the mean over the directions, which may share sentences
    sentences : n for which the two are (of the smallest direction, if they differ)
    freedom : degrees of freedom that the variance over seeds was estimated with
    """

    seed: Floats
    interaction: Floats
    sentence: float
    sentences: int
    freedom: int

    @classmethod
    def of(
        cls, observed: Sequence[Floats], resampled: Sequence[Floats], sentences: Sequence[int]
    ) -> "Spread":
        """Estimate the parts from a study; the arguments are those of
        :func:`analysis.stats.hierarchical`, with at least two seeds in every direction."""
        directions = len(observed)
        seed, interaction = np.zeros(directions), np.zeros(directions)
        shared = 0.0
        for i, (values, drawn, units) in enumerate(
            zip(observed, resampled, sentences, strict=True)
        ):
            seeds = len(values)
            own = float(resampled_variance(drawn.mean(axis=0), units))
            each = float(np.nanmean(resampled_variance(drawn, units)))
            interaction[i] = max(0.0, (each - own) * seeds / (seeds - 1))
            seed[i] = max(0.0, float(values.var(ddof=1)) - interaction[i])
            shared += interaction[i] / seeds / directions**2
        mean = np.stack([drawn.mean(axis=0) for drawn in resampled]).mean(axis=0)
        sentence = max(0.0, float(resampled_variance(mean, min(sentences))) - shared)
        freedom = sum(len(values) - 1 for values in observed)
        return cls(seed, interaction, sentence, min(sentences), freedom)

    @classmethod
    def pooled(cls, spreads: Sequence["Spread"]) -> "Spread":
        """The mean over several methods' comparisons in the same directions, weighted by their
        degrees of freedom. It has as many as the most of one: the methods are compared with the same
        runs of the baseline, whose spread is in all of them."""
        weights = np.array([spread.freedom for spread in spreads], dtype=np.float64)
        weights /= weights.sum()
        return cls(
            np.sum([w * spread.seed for w, spread in zip(weights, spreads, strict=True)], axis=0),
            np.sum(
                [w * spread.interaction for w, spread in zip(weights, spreads, strict=True)], axis=0
            ),
            float(sum(w * spread.sentence for w, spread in zip(weights, spreads, strict=True))),
            min(spread.sentences for spread in spreads),
            max(spread.freedom for spread in spreads),
        )


#: Of a method: one number for all directions, or one for each.
Seeds = int | Sequence[int]


def power(
    effect: float, spread: Spread, seeds: Seeds, sentences: int, alpha: float = ALPHA
) -> float:
    """Probability that the test finds an effect significant with ``seeds`` seeds a method, in each
    direction, and ``sentences`` sentences."""
    return _power(effect, *_error_and_critical(spread, seeds, sentences, alpha))


def detectable(
    observed: Sequence[Floats],
    resampled: Sequence[Floats],
    sentences: Sequence[int],
    tests: int = 1,
) -> float:
    """The effect that a study like this one finds significant with probability :data:`POWER`, where
    p-values are corrected over so many ``tests`` and no other one is lower; NaN where a direction has one
    seed, which says nothing of training, or one sentence. The other arguments are those of
    :func:`analysis.stats.hierarchical`."""
    seeds = [len(values) for values in observed]
    if min(seeds) < MIN_SEEDS or min(sentences) < 2:
        return float("nan")
    spread = Spread.of(observed, resampled, sentences)
    return smallest_detectable(spread, seeds, spread.sentences, alpha=corrected(ALPHA, tests))


def corrected(alpha: float, tests: int) -> float:
    """What the smallest of several p-values must not exceed under Holm's correction."""
    return alpha / max(1, tests)


def smallest_detectable(
    spread: Spread, seeds: Seeds, sentences: int, power: float = POWER, alpha: float = ALPHA
) -> float:
    """The effect that is found significant with probability ``power``; 0 where nothing varies."""
    error, critical = _error_and_critical(spread, seeds, sentences, alpha)
    if error == 0:
        return 0.0
    highest = float(critical.max()) + 10 * error
    found = scipy.optimize.brentq(
        lambda effect: _power(effect, error, critical) - power, 0.0, highest
    )
    return float(found)


def seeds_needed(
    effect: float,
    spread: Spread,
    sentences: int,
    power: float = POWER,
    alpha: float = ALPHA,
    most: int = 100,
) -> int | None:
    """The fewest seeds with which ``effect`` is detected; None where ``most`` are too few."""

    def enough(seeds: int) -> bool:
        return smallest_detectable(spread, seeds, sentences, power, alpha) <= effect

    if not enough(most):
        return None
    few, many = 1, most  # too few, enough
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return many


def _power(effect: float, error: float, critical: Floats) -> float:
    if error == 0:
        return float(effect != 0)
    above = scipy.special.ndtr((effect - critical) / error)
    below = scipy.special.ndtr((-critical - effect) / error)
    return float((above + below).mean())


def _error_and_critical(
    spread: Spread, seeds: Seeds, sentences: int, alpha: float
) -> tuple[float, Floats]:
    """The true standard error of the mean effect, and the test's critical value in each draw of the
    variances over seeds, (DRAWS,)."""
    counts = np.broadcast_to(seeds, spread.seed.shape)  # (D,)
    if counts.min() < MIN_SEEDS:
        raise ValueError(f"expected at least 2 seeds, found {seeds}: one says nothing of training")
    scale = spread.sentences / sentences
    share = 1 / counts / len(counts) ** 2  # (D,)
    within = spread.seed + scale * spread.interaction  # (D,), variance over seeds
    sentence = scale * spread.sentence
    interaction = scale * float((spread.interaction * share).sum())
    error = float(np.sqrt(sentence + (within * share).sum()))

    rng = np.random.default_rng(0)
    chi_squared = rng.chisquare(counts - 1, (DRAWS, len(within))) / (counts - 1)
    parts = chi_squared * within * share  # (DRAWS, D)
    between = parts.sum(axis=1)
    rest = np.maximum(sentence, sentence + interaction - between)
    terms = (parts**2 / (counts - 1)).sum(axis=1)
    critical = _critical(between + rest, terms + rest**2 / max(1, sentences - 1), alpha)
    return error, np.maximum(critical, _critical(between, terms, alpha))


def _critical(variance: Floats, terms: Floats, alpha: float) -> Floats:
    """The critical value of an estimate with this variance, by Satterthwaite's t; 0 without any."""
    freedom = np.divide(variance**2, terms, out=np.ones_like(variance), where=terms > 0)
    return np.asarray(scipy.special.stdtrit(freedom, 1 - alpha / 2) * np.sqrt(variance))
