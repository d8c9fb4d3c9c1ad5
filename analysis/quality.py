"""Translation quality: sacreBLEU's scores, intervals and significance tests, by its own code."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sacrebleu.metrics.base import Metric
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.significance import PairedTest

from analysis.judge import Options
from analysis.runs.languages import Tokenizer, bleu_tokenizer, installed_tokenizer, languages_of
from analysis.runs.run_record import Run, read_scores
from analysis.runs.texts import Texts
from analysis.stats import Floats, Resamples, hierarchical, holm
from analysis.study import Direction, couples, partner
from analysis.terminal import progress, warn

BASELINES = ("finetune", "word_kd")
#: Resamples and trials of the significance tests between two runs.
TRIALS = 1000
#: Columns of a table without rows.
RUN_COLUMNS = ["direction", "method", "seed", "run"]


class RememberedBLEU(BLEU):
    """BLEU that computes the sufficient statistics of a list of translations once."""

    def _extract_corpus_statistics(self, hypotheses: Sequence[str], references: Any) -> Any:
        return _remember(self, super()._extract_corpus_statistics, hypotheses, references)


class RememberedCHRF(CHRF):
    """chrF that computes the sufficient statistics of a list of translations once."""

    def _extract_corpus_statistics(self, hypotheses: Sequence[str], references: Any) -> Any:
        return _remember(self, super()._extract_corpus_statistics, hypotheses, references)


def _remember(metric: Any, extract: Any, hypotheses: Sequence[str], references: Any) -> Any:
    # Keyed by identity; the lists are kept beside the result, so an identity is never reused.
    store = metric.__dict__.setdefault("_remembered", {})
    key = (id(hypotheses), id(references))
    if key not in store:
        store[key] = (hypotheses, references, extract(hypotheses, references))
    return store[key][2]


@dataclass
class Quality:
    """The translations of one direction with their metrics.

    Attributes
    ----------
    references : as sacreBLEU takes them
    metrics : name to metric; their statistics are computed once for each run
    """

    direction: Direction
    references: list[list[str]]
    metrics: dict[str, Any]

    def runs(self) -> list[Run]:
        """The runs that have translations."""
        return [run for run in self.direction.runs if run.label in self.direction.texts]

    def texts(self, run: Run) -> Texts:
        """Translations of a run."""
        return self.direction.texts[run.label]

    def statistics(self, run: Run, metric: str) -> Floats:
        """Sufficient statistics of each sentence, (S, C)."""
        hypotheses = self.texts(run).hypotheses
        return np.asarray(
            self.metrics[metric]._extract_corpus_statistics(hypotheses, self.references),
            dtype=np.float64,
        )

    def score(self, metric: str, sums: Floats) -> float:
        """A corpus score from summed statistics, (C,)."""
        return float(self.metrics[metric]._compute_score_from_stats(sums.tolist()).score)

    def corpus_score(self, run: Run, metric: str) -> float:
        """A run's score."""
        return self.score(metric, self.statistics(run, metric).sum(axis=0))

    def sentence_scores(self, run: Run, metric: str) -> Floats:
        """The score of each sentence alone, (S,)."""
        return np.array([self.score(metric, row) for row in self.statistics(run, metric)])


def load_quality(direction: Direction, subset: str) -> Quality | None:
    """The translations of a direction; None where no run has any."""
    labels = [run.label for run in direction.runs if run.label in direction.texts]
    if not labels:
        return None
    first = next(run for run in direction.runs if run.label == labels[0])
    tokenizer = _tokenizer(first, subset)
    if tokenizer.remark:
        warn(f"{direction.name}: {tokenizer.remark}")
    metrics: dict[str, Metric] = {
        "BLEU": RememberedBLEU(tokenize=tokenizer.name),
        "chrF": RememberedCHRF(),
    }
    return Quality(direction, [direction.texts[labels[0]].references], metrics)


def _tokenizer(run: Run, subset: str) -> Tokenizer:
    """The tokenizer that scores.json was made with, else the target language's."""
    try:
        signature = read_scores(run.path)[0][subset]["bleu"]["signature"]
        # MeCab's versions stand behind its tokenizers' names: tok:ja-mecab-0.996-IPA.
        if found := re.search(rf"tok:({'|'.join(BLEU.TOKENIZERS)})[-|]", signature):
            return installed_tokenizer(found[1])
    except (KeyError, TypeError):
        pass  # the scores are not needed: everything is scored again from the translations
    return bleu_tokenizer(languages_of(run.direction)[1])


def results_table(qualities: Sequence[Quality]) -> pd.DataFrame:
    """One row a run: scores with bootstrap intervals, and gains over the baselines with p-values.

    ``*_p_bootstrap_*`` is sacreBLEU's paired bootstrap, ``*_p_randomisation_*`` its approximate
    randomisation; both compare two runs on the same sentences and know nothing of seeds.
    """
    rows: list[dict[str, Any]] = []
    total = sum(len(quality.runs()) for quality in qualities)
    with progress(total=total, desc="score translations", unit="run") as bar:
        for quality in qualities:
            for run in quality.runs():
                rows.append(_result(quality, run))
                bar.update()
    return pd.DataFrame(rows, columns=None if rows else RUN_COLUMNS)


def _result(quality: Quality, run: Run) -> dict[str, Any]:
    texts = quality.texts(run)
    row: dict[str, Any] = {
        "direction": run.direction,
        "method": run.method,
        "seed": run.seed,
        "run": run.label,
        "updates": run.updates,
        "parameters": run.parameters,
        "sentences": len(texts.hypotheses),
    }
    for name, metric in quality.metrics.items():
        score = metric.corpus_score(texts.hypotheses, quality.references, n_bootstrap=TRIALS)
        row[name] = score.score
        row[f"{name}_low"], row[f"{name}_high"] = score._mean - score._ci, score._mean + score._ci
    for name, metric in quality.metrics.items():
        row[f"{name}_signature"] = str(metric.get_signature())
    for baseline in BASELINES:
        other = partner(run, quality.runs(), baseline)
        compared = other is not None and run.method not in ("teacher", other.method)
        for name, metric in quality.metrics.items():
            gain, p_bootstrap, p_randomisation = np.nan, np.nan, np.nan
            if compared and other is not None:
                systems = quality.texts(other).hypotheses, texts.hypotheses
                gain, p_bootstrap = _paired(metric, systems, quality.references, "bs")
                _, p_randomisation = _paired(metric, systems, quality.references, "ar")
            row[f"{name}_gain_over_{baseline}"] = gain
            row[f"{name}_p_bootstrap_over_{baseline}"] = p_bootstrap
            row[f"{name}_p_randomisation_over_{baseline}"] = p_randomisation
    return row


def _paired(
    metric: Metric, systems: tuple[list[str], list[str]], references: list[list[str]], kind: str
) -> tuple[float, float]:
    """Gain of the second system over the first and sacreBLEU's p-value of it."""
    named: list[tuple[str, Sequence[str]]] = [("baseline", systems[0]), ("system", systems[1])]
    test = PairedTest(named, {"metric": metric}, references, test_type=kind, n_samples=TRIALS)
    scores: Any = next(values for key, values in test()[1].items() if key != "System")
    return scores[1].score - scores[0].score, scores[1].p_value


def methods_table(qualities: Sequence[Quality], options: Options) -> pd.DataFrame:
    """One row a direction, method, metric: mean over seeds, and gains with hierarchical intervals;
    where there are several directions, also their mean (direction ``all``).

    The interval holds the error from sentences and, with several seeds, from training (see
    :func:`analysis.stats.hierarchical`); with one seed the latter is missing. ``*_p_holm`` is
    corrected for the methods that stand beside each other in a direction; ``gain_over_*_seeds`` counts
    the couples of runs with a baseline's run of their own (:func:`analysis.study.couples`).
    """
    compared = [_Compared(quality, options) for quality in qualities]
    rows: list[dict[str, Any]] = []
    groups = [[item] for item in compared]
    if len(groups) > 1:
        groups.append(compared)
    for group in groups:
        methods = [{run.method for run in item.quality.runs()} for item in group]
        for method in sorted(set.intersection(*methods)):
            for metric in group[0].quality.metrics:
                rows.append(_method_row(group, method, metric))
    table = pd.DataFrame(rows, columns=None if rows else RUN_COLUMNS)
    for baseline in BASELINES if rows else ():
        column = f"gain_over_{baseline}_p"
        corrected = table.groupby(["direction", "metric"])[column].transform(
            lambda values: holm(values.tolist())
        )
        table.insert(table.columns.tolist().index(column) + 1, f"{column}_holm", corrected)
    return table


class _Compared:
    """One direction's scores in resamples of its sentences, computed once."""

    def __init__(self, quality: Quality, options: Options) -> None:
        self.quality = quality
        self.sentences = len(quality.references[0])
        rng = np.random.default_rng([options.seed, self.sentences])
        self._resamples = Resamples(self.sentences, options.resamples, rng)
        self._drawn: dict[tuple[str, str], Floats] = {}

    def runs(self, method: str) -> list[Run]:
        """The runs of a method."""
        return [run for run in self.quality.runs() if run.method == method]

    def drawn(self, run: Run, metric: str) -> Floats:
        """Corpus scores of every resample, (B,)."""
        key = (run.label, metric)
        if key not in self._drawn:
            sums = self._resamples.sums(self.quality.statistics(run, metric))
            self._drawn[key] = np.array([self.quality.score(metric, row) for row in sums])
        return self._drawn[key]

    def pairs(self, method: str, baseline: str) -> list[tuple[Run, Run]]:
        """The method's runs, each with the baseline's that it is compared with."""
        return couples(self.runs(method), self.quality.runs(), baseline)


def _method_row(group: Sequence[_Compared], method: str, metric: str) -> dict[str, Any]:
    scores = [
        [item.quality.corpus_score(run, metric) for run in item.runs(method)] for item in group
    ]
    one = len(group) == 1
    row: dict[str, Any] = {
        "direction": group[0].quality.direction.name if one else "all",
        "method": method,
        "metric": metric,
        "seeds": min(len(values) for values in scores),
        "sentences": sum(item.sentences for item in group),
        "mean": float(np.mean([np.mean(values) for values in scores])),
        "sd_over_seeds": np.std(scores[0], ddof=1) if one and len(scores[0]) > 1 else np.nan,
    }
    for baseline in BASELINES:
        prefix = f"gain_over_{baseline}"
        row |= {f"{prefix}{suffix}": np.nan for suffix in ("", "_low", "_high", "_p")}
        found = [item.pairs(method, baseline) for item in group]
        compared = method not in ("teacher", baseline)
        row[f"{prefix}_seeds"] = min(len(both) for both in found) if compared else 0
        if not row[f"{prefix}_seeds"]:
            continue
        observed, drawn = [], []
        for item, both in zip(group, found, strict=True):
            score = item.quality.corpus_score
            gains = [score(a, metric) - score(b, metric) for a, b in both]
            observed.append(np.array(gains))
            drawn.append(np.stack([item.drawn(a, metric) - item.drawn(b, metric) for a, b in both]))
        estimate = hierarchical(observed, drawn, [item.sentences for item in group])
        row[prefix], row[f"{prefix}_p"] = estimate.effect, estimate.p
        row[f"{prefix}_low"], row[f"{prefix}_high"] = estimate.low, estimate.high
    return row
