"""Translation quality over seeds: means, and gains with intervals that hold training and sentences."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.chapters.chapter import Figure
from analysis.chapters.quality import RUN_COLUMNS, main_baseline
from analysis.claims.verdicts import PLACEBO
from analysis.power import MIN_SEEDS, detectable
from analysis.runs.methods import label_of, ordered
from analysis.stats import LEVEL, Floats, hierarchical, holm
from analysis.style import (
    Look,
    abreast,
    direction_panels,
    label_rows,
    row_level,
    row_mark,
    share_x,
)
from analysis.sums.direction import Direction, Options, ScoredRun
from analysis.sums.pairing import couples, of_method, placebo_couples
from analysis.sums.translations import Corpus

Couple = tuple[ScoredRun, ScoredRun]
#: In each direction, the runs of a method with the baseline's that they are compared with.
Couples = Sequence[Sequence[Couple]]


def methods_table(directions: Sequence[Direction], options: Options) -> pd.DataFrame:
    """One row a direction, method, metric: mean over seeds, and gains with hierarchical intervals;
    where there are several directions, also their mean (direction ``all``).

    The interval holds the error from sentences and, with several seeds, from training (see
    :func:`analysis.stats.hierarchical`); with one seed the latter is missing. ``*_p_holm`` is
    corrected for the methods that stand beside each other in a direction with two seeds or more, and NaN
    for the others, whose p-value knows nothing of training; ``gain_over_*_seeds`` counts the couples of
    runs with a baseline's run of their own (:func:`analysis.sums.pairing.couples`); ``*_detectable`` is
    the smallest gain that these runs could tell from 0 after the correction. ``length_ratio`` is a mean,
    ``lenpen_low`` and ``lenpen_high`` are the least and the greatest length penalty of the runs' searches.

    The method ``placebo`` is each baseline's seeds against its own next ones: the spread between seeds,
    without a p-value because its mean is 0 by construction (:func:`analysis.sums.pairing.placebo_couples`).
    """
    compared = [
        _Compared(direction, direction.corpus)
        for direction in directions
        if direction.corpus is not None
    ]
    rows: list[dict[str, Any]] = []
    groups = [[item] for item in compared]
    if len(groups) > 1:
        groups.append(compared)
    for group in groups:
        methods = [{str(run.method) for run in item.direction.translated} for item in group]
        metrics = [
            name
            for name in group[0].corpus.metrics
            if all(name in item.corpus.metrics for item in group)
        ]
        compared_with = {
            method: {baseline: _couples(group, method, baseline) for baseline in options.baselines}
            for method in sorted(set.intersection(*methods))
        }
        tests = {
            baseline: sum(_seeds(own[baseline]) >= MIN_SEEDS for own in compared_with.values())
            for baseline in options.baselines
        }
        for method, own in compared_with.items():
            for metric in metrics:
                rows.append(_method_row(group, method, metric, own, tests))
        for metric in metrics:
            row = _placebo_row(group, metric, options.baselines)
            if any(row[f"gain_over_{baseline}_seeds"] for baseline in options.baselines):
                rows.append(row)
    table = pd.DataFrame(rows, columns=None if rows else RUN_COLUMNS)
    for baseline in options.baselines if rows else ():
        column = f"gain_over_{baseline}_p"
        several = table[f"gain_over_{baseline}_seeds"] >= MIN_SEEDS
        tested = table[column].where(several)
        corrected = tested.groupby([table["direction"], table["metric"]]).transform(
            lambda values: holm(values.tolist())
        )
        table.insert(table.columns.tolist().index(column) + 1, f"{column}_holm", corrected)
    return table


class _Compared:
    """One direction's scores in resamples of its sentences, computed once."""

    def __init__(self, direction: Direction, corpus: Corpus) -> None:
        self.direction = direction
        self.corpus = corpus
        self._drawn: dict[tuple[str, str], Floats] = {}

    def score(self, run: ScoredRun, metric: str) -> float:
        """A run's score."""
        assert run.translations is not None
        return self.corpus.corpus_score(run.translations, metric)

    def drawn(self, run: ScoredRun, metric: str) -> Floats:
        """Corpus scores of every resample, (B,)."""
        key = (run.label, metric)
        if key not in self._drawn:
            assert run.translations is not None
            self._drawn[key] = self.corpus.resampled_scores(run.translations, metric)
        return self._drawn[key]

    def runs(self, method: str) -> list[ScoredRun]:
        """The runs of a method."""
        return [run for run in self.direction.translated if str(run.method) == method]


def _couples(group: Sequence[_Compared], method: str, baseline: str) -> Couples:
    compared = method not in ("teacher", baseline)
    return [
        couples(item.runs(method), item.direction.translated, baseline) if compared else []
        for item in group
    ]


def _seeds(found: Couples) -> int:
    return min(map(len, found))


def _method_row(
    group: Sequence[_Compared],
    method: str,
    metric: str,
    compared_with: Mapping[str, Couples],
    tests: Mapping[str, int],
) -> dict[str, Any]:
    scores = [[item.score(run, metric) for run in item.runs(method)] for item in group]
    over_seeds = _seed_means(
        [
            dict(zip([run.seed for run in item.runs(method)], values, strict=True))
            for item, values in zip(group, scores, strict=True)
        ]
    )
    found = [[run.translations for run in item.runs(method) if run.translations] for item in group]
    penalties = [own.texts.lenpen for runs in found for own in runs if own.texts.lenpen is not None]
    row = _row(group, method, metric) | {
        "seeds": min(len(values) for values in scores),
        "mean": float(np.mean([np.mean(values) for values in scores])),
        "sd_over_seeds": float(np.std(over_seeds, ddof=1)) if len(over_seeds) > 1 else np.nan,
        "length_ratio": float(
            np.mean([np.mean([own.length_ratio for own in runs]) for runs in found])
        ),
        "lenpen_low": min(penalties, default=np.nan),
        "lenpen_high": max(penalties, default=np.nan),
    }
    for baseline, found_couples in compared_with.items():
        row |= _gain(group, found_couples, baseline, metric, tests[baseline])
    return row


def _seed_means(scores: Sequence[Mapping[int, float]]) -> list[float]:
    """Means over directions by seed, of the seeds that every direction has."""
    seeds = sorted(set.intersection(*map(set, scores)))
    return [float(np.mean([own[seed] for own in scores])) for seed in seeds]


def _placebo_row(
    group: Sequence[_Compared], metric: str, baselines: Sequence[str]
) -> dict[str, Any]:
    names = ("mean", "sd_over_seeds", "length_ratio", "lenpen_low", "lenpen_high")
    row = _row(group, PLACEBO, metric) | dict.fromkeys(names, np.nan)
    for baseline in baselines:
        found = [placebo_couples(of_method(item.direction.translated, baseline)) for item in group]
        row |= _gain(group, found, baseline, metric, tests=0)
        row |= {f"gain_over_{baseline}_{name}": np.nan for name in ("p", "detectable")}
        row["seeds"] = max(row["seeds"], row[f"gain_over_{baseline}_seeds"])
    return row


def _row(group: Sequence[_Compared], method: str, metric: str) -> dict[str, Any]:
    return {
        "direction": group[0].direction.name if len(group) == 1 else "all",
        "method": method,
        "metric": metric,
        "seeds": 0,
        "sentences": sum(item.corpus.sentences for item in group),
    }


def _gain(
    group: Sequence[_Compared], found: Couples, baseline: str, metric: str, tests: int
) -> dict[str, Any]:
    prefix = f"gain_over_{baseline}"
    names = ("", "_low", "_high", "_p", "_detectable")
    row: dict[str, Any] = {f"{prefix}{name}": np.nan for name in names}
    row[f"{prefix}_seeds"] = _seeds(found)
    if not row[f"{prefix}_seeds"]:
        return row
    observed, drawn = [], []
    for item, both in zip(group, found, strict=True):
        gains = [item.score(run, metric) - item.score(other, metric) for run, other in both]
        observed.append(np.array(gains))
        drawn.append(
            np.stack([item.drawn(run, metric) - item.drawn(other, metric) for run, other in both])
        )
    units = [item.corpus.resamples.units for item in group]
    estimate = hierarchical(observed, drawn, units)
    smallest = detectable(observed, drawn, units, tests)
    values = (estimate.effect, estimate.low, estimate.high, estimate.p, smallest)
    return row | dict(zip([f"{prefix}{name}" for name in names], values, strict=True))


def draw_methods(table: pd.DataFrame, path: Path, looks: Mapping[str, Look]) -> None:
    """The results table as a figure: BLEU gained over the main baseline by method and direction, with
    hierarchical 95 % intervals and the mean BLEU; hollow and thin where one seed says nothing of training."""
    table = table[(table["metric"] == "BLEU") & ~table["method"].isin(["teacher", PLACEBO])]
    over = main_baseline(table, "gain_over_")
    if not over:
        return

    def height(part: pd.DataFrame) -> float:
        return 0.55 + 0.2 * len(part)

    with direction_panels(table, height, path, abreast(table)) as panels:
        for axis, part in panels:
            methods = ordered(part["method"])
            for place, method in enumerate(methods):
                row = part[part["method"] == method].iloc[0].to_dict()
                name = f"gain_over_{over}"
                alone = row[f"{name}_seeds"] == 1
                row_mark(axis, place, row, name, looks[method], method == over, hollow=alone)
                row_level(axis, place, f"{row['mean']:.2f}")
            label_rows(axis, range(len(methods)), [label_of(method) for method in methods])
            axis.axvline(0, color="0.6", linewidth=0.6)
            axis.set_xlabel(f"BLEU over {label_of(over)}")
        share_x([axis for axis, _ in panels])


FIGURE = Figure(
    "methods",
    draw_methods,
    f"BLEU over the baseline, {LEVEL:.0%} intervals over sentences and seeds; hollow, with a thin line: one "
    "seed, so sentences only. BLEU itself on the right. The teacher is in the table only.",
)
