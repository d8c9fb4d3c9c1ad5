"""sacreBLEU's intervals and significance tests, with every resample of a run scored once.

:mod:`sacrebleu.significance` extracts the statistics of both systems and scores their resamples anew in
each test. Here are the same draws, scores by sacreBLEU's own metrics, and the same numbers to the last
digit (its sums in single precision are exact up to 16 million characters), from the statistics that
:class:`analysis.sums.translations.Translations` holds.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from sacrebleu.significance import _compute_p_value

from analysis.stats import Floats, Resamples, interval, weighted_sums
from analysis.sums.direction import ScoredRun
from analysis.sums.translations import Corpus

#: Resamples of a bootstrap, and trials of a randomisation.
TRIALS = 1000
#: sacreBLEU's, of every test.
SEED = 12345


@dataclass(frozen=True)
class PairedScores:
    """A run against another on the same sentences.

    Attributes
    ----------
    gain, low, high : difference of their scores, with the percentile interval of the paired bootstrap
    p_bootstrap, p_randomisation : of no difference, by paired bootstrap and approximate randomisation
    """

    gain: float
    low: float
    high: float
    p_bootstrap: float
    p_randomisation: float


class Significance:
    """The tests of the runs of one test set.

    Parameters
    ----------
    corpus : what they are scored with; where its resamples draw documents, so do these, and a trial
        exchanges documents

    References
    ----------
    Post (2018). A call for clarity in reporting BLEU scores. WMT. https://aclanthology.org/W18-6319
    """

    def __init__(self, corpus: Corpus) -> None:
        self._metrics = corpus.metrics
        # A sentence is a unit of its own where documents are not known, and the draws are sacreBLEU's.
        unit, units = corpus.resamples.unit, corpus.resamples.units
        self._several = units > 1
        self._resamples = Resamples(corpus.sentences, TRIALS, np.random.default_rng(SEED), unit)
        draws = np.random.default_rng(SEED)
        self._own = draws.integers(2, size=(TRIALS, units), dtype=bool).astype(np.uint8)[:, unit]
        self._drawn: dict[tuple[str, str], list[Any]] = {}
        for metric in self._metrics.values():  # what signatures say of the intervals
            metric.n_bootstrap, metric.seed = TRIALS, str(SEED)

    def score(self, run: ScoredRun, metric: str) -> Any:
        """sacreBLEU's score object, with the mean ``_mean`` of the resamples and half the width ``_ci`` of
        their 95 % interval; NaN of one sentence, or document."""
        found = self._score(metric, _statistics(run, metric).sum(axis=0))
        found.estimate_ci(self._resampled(run, metric))
        if not self._several:
            found._mean = found._ci = float("nan")
        return found

    def compare(self, run: ScoredRun, baseline: ScoredRun, metric: str) -> PairedScores:
        """A run against one of a baseline; of one sentence, or document, the gain alone."""
        own, base = (_statistics(item, metric) for item in (run, baseline))
        gain = self._value(metric, own.sum(axis=0)) - self._value(metric, base.sum(axis=0))
        if not self._several:
            return PairedScores(gain, *[float("nan")] * 4)
        drawn, drawn_base = (
            np.array([score.score for score in self._resampled(item, metric)])
            for item in (run, baseline)
        )
        low, high = interval(drawn - drawn_base)
        differences = np.abs(drawn - drawn_base)
        p_bootstrap = _compute_p_value(differences - differences.mean(), abs(gain))
        # A trial gives the two translations of each sentence, or document, to either of two pseudo-systems.
        first = base.sum(axis=0) + weighted_sums(self._own, own - base)  # (T, C)
        second = own.sum(axis=0) + base.sum(axis=0) - first
        scores, others = (
            np.array([self._value(metric, sums) for sums in both]) for both in (first, second)
        )
        p_randomisation = _compute_p_value(np.abs(scores - others), abs(gain))
        return PairedScores(gain, float(low), float(high), p_bootstrap, p_randomisation)

    def _resampled(self, run: ScoredRun, metric: str) -> list[Any]:
        """The score of every resample."""
        key = (run.label, metric)
        if key not in self._drawn:
            sums = self._resamples.sums(_statistics(run, metric))
            # sacreBLEU sums in this precision, and computes with what it gives.
            self._drawn[key] = [
                self._metrics[metric]._compute_score_from_stats(row)
                for row in sums.astype(np.float32)
            ]
        return self._drawn[key]

    def _score(self, metric: str, sums: Floats) -> Any:
        return self._metrics[metric]._compute_score_from_stats(sums.tolist())

    def _value(self, metric: str, sums: Floats) -> float:
        return float(self._score(metric, sums).score)


def _statistics(run: ScoredRun, metric: str) -> Floats:
    assert run.translations is not None
    return run.translations.statistics[metric]
