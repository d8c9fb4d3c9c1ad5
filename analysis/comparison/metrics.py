"""Scores of systems, their intervals, and the tests between each two of them."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER

from analysis.comparison.systems import Corpus
from analysis.stats import Floats, Resamples, holm
from analysis.terminal import progress, warn

#: Elements of a block of trials in memory.
BLOCK = 1 << 24
#: Tokenizers under which TER, too, can cut what has no spaces into characters.
_ASIAN = ("zh", "ja-mecab")


@dataclass(frozen=True)
class Measure:
    """A metric with the sufficient statistics of every system.

    Attributes
    ----------
    name : as in tables
    signature : sacreBLEU's, or what was scored with what
    statistics : system to (S, C), additive over sentences
    compute : the score of summed statistics, (C,)
    lower_is_better : TER
    """

    name: str
    signature: str
    statistics: Mapping[str, Floats]
    compute: Callable[[Floats], float]
    lower_is_better: bool = False

    def score(self, system: str) -> float:
        """The score of all sentences."""
        return self.compute(self.statistics[system].sum(axis=0))

    def scores(self, sums: Floats) -> Floats:
        """The scores of several sums, (B, C) to (B,)."""
        return np.array([self.compute(row) for row in sums])

    def gain(self, difference: float) -> float:
        """A difference of scores with the sign that makes better ones positive."""
        return -difference if self.lower_is_better else difference


def measure_systems(
    corpus: Corpus, extra: Mapping[str, Mapping[str, Floats]], ter: bool = True
) -> list[Measure]:
    """BLEU, chrF and (unless left out) TER by sacreBLEU, then the means of ``extra`` scores.

    ``extra`` has the scores of the sentences, (S,), by name and system.
    """
    tokenizer = corpus.tokenizer
    if tokenizer.remark:
        warn(tokenizer.remark)
    references = (
        corpus.references
    )  # given to the metrics, which then read them once for all systems
    metrics: dict[str, Any] = {
        "BLEU": BLEU(tokenize=tokenizer.name, references=references),
        "chrF": CHRF(references=references),
    }
    if ter and tokenizer.name == "char":
        warn("TER is left out: it needs words, and this tokenizer finds none (tok:char)")
    elif ter:
        asian = tokenizer.name in _ASIAN
        metrics["TER"] = TER(normalized=asian, asian_support=asian, references=references)
    measures = []
    with progress(total=len(metrics) * len(corpus.systems), desc="score", unit="system") as bar:
        for name, metric in metrics.items():
            statistics = {}
            for system, lines in corpus.systems.items():
                found = metric._extract_corpus_statistics(lines, references=None)
                statistics[system] = np.array(found, dtype=np.float64)
                bar.update()
            compute = _score_of(metric)
            signature = str(metric.get_signature())
            measures.append(Measure(name, signature, statistics, compute, name == "TER"))
    for name, scores in extra.items():
        statistics = {
            system: np.stack([own, np.ones_like(own)], axis=1) for system, own in scores.items()
        }
        measures.append(Measure(name, f"{name}: mean over sentences", statistics, _mean))
    return measures


def _score_of(metric: Any) -> Callable[[Floats], float]:
    return lambda sums: float(metric._compute_score_from_stats(sums.tolist()).score)


def _mean(sums: Floats) -> float:
    return float(sums[0] / sums[1])


@dataclass(frozen=True)
class Comparison:
    """What was found between the systems.

    Attributes
    ----------
    scores : one row a system and metric: ``score``, ``low``, ``high``
    pairs : one row a metric and two systems: ``difference`` of ``system`` and ``against`` with
        ``low`` and ``high``, ``p``, and ``p_holm`` over the pairs of the metric
    """

    scores: pd.DataFrame
    pairs: pd.DataFrame


def compare_systems(
    corpus: Corpus, measures: Sequence[Measure], resamples: int, trials: int, seed: int
) -> Comparison:
    """Intervals of scores and differences, and p-values of the differences.

    Intervals are percentiles of a paired bootstrap, p-values are of approximate randomisation
    (two-sided, sacreBLEU's ``--paired-ar``: each trial exchanges the two systems in a random half of
    the units). A unit is a sentence, or a document where documents are known: its sentences are drawn,
    and exchanged, together.

    References
    ----------
    Koehn (2004). Statistical significance tests for machine translation evaluation. EMNLP.
    Riezler and Maxwell (2005). On some pitfalls in automatic evaluation and significance testing for
    MT. ACL workshop on intrinsic and extrinsic evaluation measures.
    """
    draws = Resamples(corpus.units, resamples, np.random.default_rng([seed, corpus.units]))
    couples = list(itertools.combinations(corpus.systems, 2))
    scores: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    with progress(total=len(measures) * max(1, len(couples)), desc="test", unit="pair") as bar:
        for measure in measures:
            units = {name: corpus.by_unit(own) for name, own in measure.statistics.items()}
            drawn = {name: measure.scores(draws.sums(own)) for name, own in units.items()}
            for system in corpus.systems:
                low, high = corpus.interval(drawn[system])
                row = {"system": system, "metric": measure.name, "score": measure.score(system)}
                scores.append(row | {"low": float(low), "high": float(high)})
            p_values = []
            for against, system in couples:
                low, high = corpus.interval(drawn[system] - drawn[against])
                rng = np.random.default_rng([seed, corpus.units])
                p_values.append(_randomised(measure, units[system], units[against], trials, rng))
                pairs.append(
                    {
                        "metric": measure.name,
                        "system": system,
                        "against": against,
                        "difference": measure.score(system) - measure.score(against),
                        "low": float(low),
                        "high": float(high),
                        "p": p_values[-1],
                    }
                )
                bar.update()
            for row, corrected in zip(
                pairs[len(pairs) - len(couples) :], holm(p_values), strict=True
            ):
                row["p_holm"] = corrected
    columns = ["metric", "system", "against", "difference", "low", "high", "p", "p_holm"]
    return Comparison(pd.DataFrame(scores), pd.DataFrame(pairs, columns=columns))


def _randomised(
    measure: Measure, own: Floats, other: Floats, trials: int, rng: np.random.Generator
) -> float:
    """Two-sided p-value of two systems' (U, C) statistics by approximate randomisation."""
    observed = abs(measure.compute(own.sum(axis=0)) - measure.compute(other.sum(axis=0)))
    total, difference = own.sum(axis=0) + other.sum(axis=0), own - other
    at_least = 0
    for size in _block_sizes(trials, len(own)):
        kept = rng.integers(2, size=(size, len(own)), dtype=np.int8)
        first = other.sum(axis=0) + kept @ difference  # (size, C)
        found = np.abs(measure.scores(first) - measure.scores(total - first))
        # Equal up to rounding is as extreme: where both are identical, p is 1.
        at_least += int((found >= observed - 1e-9).sum())
    return (at_least + 1) / (trials + 1)


def _block_sizes(trials: int, units: int) -> Iterator[int]:
    block = max(1, BLOCK // units)
    for start in range(0, trials, block):
        yield min(block, trials - start)
