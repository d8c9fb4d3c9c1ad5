"""Resampling, intervals, and corrections; random numbers come from an explicit generator."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.special
from numpy.typing import NDArray

Floats = NDArray[np.float64]
#: Level of tests, and of intervals.
ALPHA = 0.05
LEVEL = 1 - ALPHA


class Resamples:
    """Bootstrap resamples of sentences, held as counts so that sums cost one matrix product.

    Two statistics computed from one instance are paired: each resample holds the same sentences.

    Parameters
    ----------
    sentences : how many there are, S
    count : resamples, B
    rng : source of the draws
    documents : (S,) the document of each sentence, as numbers from 0; a resample then draws whole
        documents, because sentences of one are alike (default: each sentence is its own)

    Attributes
    ----------
    units : how many sentences, or documents, are drawn
    unit : (S,) the number of each sentence's unit
    """

    def __init__(
        self,
        sentences: int,
        count: int,
        rng: np.random.Generator,
        documents: NDArray[np.integer] | None = None,
    ) -> None:
        self.sentences = sentences
        self.unit = np.arange(sentences) if documents is None else documents
        self.units = int(self.unit.max(initial=-1)) + 1
        self._counts = np.zeros((count, sentences), dtype=np.uint8)  # (B, S)
        for row in self._counts:  # one at a time stays in the processor's cache
            drawn = np.bincount(rng.integers(self.units, size=self.units), minlength=self.units)
            if documents is not None:
                drawn = drawn[documents]
            # 256 or more copies of one sentence do not occur in practice; clip rather than wrap.
            np.minimum(drawn, 255, out=row, casting="unsafe")

    def sums(self, values: Floats) -> Floats:
        """Column sums of ``values`` (S, C) in every resample: (B, C)."""
        return weighted_sums(self._counts, values)

    def blocks(self) -> Iterator[Floats]:
        """The counts, some resamples at a time, each (b, S)."""
        return row_blocks(self._counts)


def weighted_sums(weights: NDArray[np.integer], values: Floats) -> Floats:
    """Column sums of ``values`` (S, C) with each row of small whole ``weights`` (B, S): (B, C)."""
    sums = np.zeros((len(weights), values.shape[1]))
    width = max(1, (1 << 18) // max(len(weights), 1))  # float64 that stay in the processor's cache
    for start in range(0, len(values), width):
        part = slice(start, start + width)
        sums += weights[:, part].astype(np.float64) @ values[part]
    return sums


def row_blocks(rows: NDArray[Any], elements: int = 1 << 21) -> Iterator[Floats]:
    """Rows (B, S) as float64, so many at a time that a block has about ``elements``."""
    block = max(1, elements // max(rows.shape[1], 1))
    for start in range(0, len(rows), block):
        yield rows[start : start + block].astype(np.float64)


def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """``numerator / denominator``, NaN where the denominator is 0 (an empty bucket)."""
    out = np.full(np.broadcast(numerator, denominator).shape, np.nan)
    np.divide(numerator, denominator, out=out, where=denominator != 0)
    return out


def interval(resampled: Floats, level: float = LEVEL) -> tuple[Floats, Floats]:
    """Percentile interval over axis 0, ignoring resamples in which the bucket was empty; NaN where
    fewer than half of the resamples have a value."""
    tail = (1 - level) / 2
    usable = np.isfinite(resampled).mean(axis=0) >= 0.5
    filled = np.where(usable, resampled, 0.0)
    low, high = np.nanquantile(filled, [tail, 1 - tail], axis=0)
    return np.where(usable, low, np.nan), np.where(usable, high, np.nan)


@dataclass(frozen=True)
class Estimate:
    """An effect over sentences and seeds.

    Attributes
    ----------
    effect : mean over directions of the mean over seeds
    error : standard error
    freedom : Satterthwaite's degrees of freedom
    low, high : interval at :data:`LEVEL`
    p : two-sided p-value of effect = 0
    """

    effect: float
    error: float
    freedom: float
    low: float
    high: float
    p: float


def hierarchical(
    observed: Sequence[Floats],
    resampled: Sequence[Floats],
    sentences: Sequence[int],
) -> Estimate:
    """Combine per-seed effects of one or several directions.

    Seeds and sentences are crossed random effects (every seed is judged on the same sentences), and
    directions are fixed. The bootstrap over sentences, the same for all seeds, gives the sampling
    error of the mean over seeds; the spread of the seeds gives the error from training. With few
    seeds a bootstrap over seeds is far too narrow (3 seeds have 10 distinct resamples), so that
    part enters by its variance and Satterthwaite's t. In a direction of S seeds with effects e:

        V = Var_seeds(e) / S + max(0, A - (C - A) / (S - 1)),   and at least A

    A is the bootstrap variance of the mean over seeds, C the mean bootstrap variance of one seed;
    (C - A) / (S - 1) is the seed-by-sentence interaction, which A and the spread of the seeds both
    contain. One seed gives V = A, which leaves the error from training out. A single sentence (or
    document) has no spread that an error could be estimated from: all but the effect is then NaN.

    The interval is never narrower, nor p smaller, than that of the t-test over the seeds alone, whose
    few degrees of freedom a large A would otherwise hide.

    Parameters
    ----------
    observed : per direction the effect of each seed, (S,)
    resampled : per direction the same in every resample, (S, B); resamples are shared by all
    sentences : per direction, how many, or how many documents where resamples draw these

    References
    ----------
    Satterthwaite, F. E. (1946). An approximate distribution of estimates of variance components.
    Biometrics Bulletin 2(6). https://doi.org/10.2307/3002019
    """
    count = len(observed)
    effect = float(np.mean([values.mean() for values in observed]))
    if min(sentences) < 2:
        return Estimate(effect, *[float("nan")] * 5)
    draws = np.stack([values.mean(axis=0) for values in resampled])  # (directions, B)
    a = float(resampled_variance(draws.mean(axis=0), min(sentences)))
    between, between_terms, interaction = 0.0, 0.0, 0.0
    for values, drawn, units in zip(observed, resampled, sentences, strict=True):
        seeds = len(values)
        if seeds > 1:
            part = float(values.var(ddof=1)) / seeds / count**2
            between += part
            between_terms += part**2 / (seeds - 1)
            own = float(resampled_variance(drawn.mean(axis=0), units))
            each = float(np.nanmean(resampled_variance(drawn, units)))
            interaction += max(0.0, (each - own) / (seeds - 1)) / count**2
    rest = max(0.0, a - interaction, a - between)
    variance = between + rest
    terms = between_terms + rest**2 / max(1, min(sentences) - 1)
    error = float(np.sqrt(variance))
    if error == 0.0:
        p = 1.0 if effect == 0 else 0.0
        return Estimate(effect, 0.0, float("inf"), effect, effect, p)
    freedom = variance**2 / terms
    candidates = [(error, freedom)]
    if between > 0:
        candidates.append((float(np.sqrt(between)), between**2 / between_terms))
    half, p = 0.0, 0.0
    for own, degrees in candidates:
        half = max(half, float(scipy.special.stdtrit(degrees, 0.5 + LEVEL / 2)) * own)
        p = max(p, float(2 * scipy.special.stdtr(degrees, -abs(effect) / own)))
    return Estimate(effect, error, freedom, effect - half, effect + half, p)


def resampled_variance(drawn: Floats, units: int) -> Floats:
    """Variance (...) of a statistic (..., B) over resamples of so many sentences, or documents; without
    n / (n - 1) a bootstrap of few units makes it too small."""
    return np.asarray(np.nanvar(drawn, axis=-1, ddof=1) * units / (units - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction; NaN (an untested hypothesis) stays NaN and is not counted.

    References
    ----------
    Holm, S. (1979). A simple sequentially rejective multiple test procedure. Scandinavian Journal
    of Statistics 6(2), 65-70.
    """
    values = np.asarray(p_values, dtype=np.float64)
    corrected = np.full(len(values), np.nan)
    tested = np.flatnonzero(~np.isnan(values))
    order = tested[np.argsort(values[tested], kind="stable")]
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, float(values[index]) * (len(order) - rank)))
        corrected[index] = running
    return [float(value) for value in corrected]


def partial_spearman(
    x: Floats, y: Floats, given: Sequence[Floats] = (), counts: Floats | None = None
) -> Floats:
    """Spearman's correlation of ``x`` and ``y`` (N,), given other variables, in weighted samples.

    The Pearson correlation of what is left of the ranks of x and y after a linear fit to the ranks
    of the others. ``counts`` (B, N) says how often each observation stands in each of B samples
    (default: one sample, each once); ranks are those within the sample, ties share their mean rank.
    Returns (B,); NaN where x or y is constant or determined by the others.
    """
    rows = np.ones((1, len(x))) if counts is None else counts
    blocks = row_blocks(rows, 1 << 17)  # the dozen arrays of a block stay in the processor's cache
    return np.concatenate([_partial_spearman(x, y, given, block) for block in blocks])


def _partial_spearman(x: Floats, y: Floats, given: Sequence[Floats], weights: Floats) -> Floats:
    centred = []
    for values in (x, y, *given):
        ranks = _ranks(values, weights)
        mean = (weights * ranks).sum(axis=1) / weights.sum(axis=1)
        centred.append(ranks - mean[:, None])
    sizes = [(weights * values**2).sum(axis=1) for values in centred]
    basis: list[Floats] = []
    for values, size in zip(centred[2:], sizes[2:], strict=True):  # Gram-Schmidt
        rest = _residual(values, basis, weights)
        norm = (weights * rest**2).sum(axis=1)
        # What is left of a variable that the others determine is rounding error.
        basis.append(rest / np.sqrt(np.where(norm > 1e-10 * size, norm, np.inf))[:, None])
    left, right = (_residual(values, basis, weights) for values in centred[:2])
    powers = [(weights * values**2).sum(axis=1) for values in (left, right)]
    defined = (powers[0] > 1e-10 * sizes[0]) & (powers[1] > 1e-10 * sizes[1])
    scale = np.sqrt(np.where(defined, powers[0] * powers[1], np.nan))
    return np.asarray((weights * left * right).sum(axis=1) / scale, dtype=np.float64)


def _ranks(values: Floats, counts: Floats) -> Floats:
    """Mean ranks of (N,) values within samples given by counts (B, N), from one sort, (B, N)."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(
        np.diff(values[order], prepend=np.nan) != 0
    )  # of groups of equal values
    group = np.empty(len(values), dtype=np.int64)
    group[order] = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(values)))
    sizes = np.add.reduceat(np.take(counts, order, axis=1), starts, axis=1)
    ranks = np.cumsum(sizes, axis=1) - (sizes - 1) / 2
    return np.asarray(np.take(ranks, group, axis=1), dtype=np.float64)


def _residual(values: Floats, basis: Sequence[Floats], weights: Floats) -> Floats:
    for direction in basis:
        along = (weights * values * direction).sum(axis=1, keepdims=True)
        values = values - along * direction
    return values
