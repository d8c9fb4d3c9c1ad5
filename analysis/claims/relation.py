"""Whether runs share errors with the reference runs of their own seed, or with those of another.

Runs of one seed (the same initial weights, the same order of sentences) share some of their errors, so a
run's KL is higher on tokens that the reference run of its seed finds hard than on those that another one
does; of runs that share nothing it is as high. Lower it is only where a run shares errors with the
reference run of another seed, which is among those that choose the tokens it is compared on: a run under a
wrong seed, or trained from another seed's checkpoint.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.claims.evidence import Evidence
from analysis.stats import Floats, hierarchical, ratio
from analysis.sums.direction import Direction, Options, ScoredRun

#: The check is made for every method, and a false alarm costs verdicts.
ALPHA = 0.01
COLUMNS = ["method", "effect", "low", "high", "p", "runs", "unequal"]


def relation_table(
    groups: Mapping[str, Sequence[Evidence]], options: Options
) -> tuple[pd.DataFrame, set[str]]:
    """One row a method, and the baseline: how much higher a run's KL is, relatively, on tokens that the
    reference run of its own seed finds hard than on those of the reference runs of other seeds.

    ``unequal`` where it is certainly lower, by more than the smallest effect that matters. A method has
    no row where there are no reference runs of its seeds and of others. The set has the names in
    ``groups`` that are compared in spite of an unequal relation of theirs or of the baseline.
    """
    rows: list[dict[str, Any]] = []
    unequal: dict[str, set[str]] = {}
    for name, group in groups.items():
        for side in (0, 1):
            parts = [(item.direction, [couple[side] for couple in item.couples]) for item in group]
            methods = {str(run.method) for _, runs in parts for run in runs}
            for method in methods - {row["method"] for row in rows}:
                if row := _row(method, parts, options):
                    rows.append(row)
            unequal[name] = unequal.get(name, set()) | methods
    table = pd.DataFrame(rows, columns=COLUMNS)
    found = set(table.loc[table["unequal"].astype(bool), "method"])
    return table, {name for name, methods in unequal.items() if methods & found}


def _row(
    method: str, parts: Sequence[tuple[Direction, Sequence[ScoredRun]]], options: Options
) -> dict[str, Any] | None:
    samples = [
        (direction, found)
        for direction, runs in parts
        if (found := [item for run in runs if (item := excess(direction, run, options))])
    ]
    if not samples:
        return None
    estimate = hierarchical(
        [np.array([value for value, _ in found]) for _, found in samples],
        [np.stack([drawn for _, drawn in found]) for _, found in samples],
        [direction.resamples.units for direction, _ in samples if direction.resamples],
    )
    return {
        "method": method,
        "effect": estimate.effect,
        "low": estimate.low,
        "high": estimate.high,
        "p": estimate.p,
        "runs": sum(len(found) for _, found in samples),
        "unequal": estimate.p <= ALPHA and estimate.effect < -options.margin,
    }


def excess(direction: Direction, run: ScoredRun, options: Options) -> tuple[float, Floats] | None:
    """The relative excess of a run's KL on its own seed's hard tokens, and in every resample, (B,);
    None without reference runs of its seed and of another."""
    if direction.resamples is None:
        return None
    labels = {label for item in direction.scored for label in item.cut.selector}
    references = [item for item in direction.scored if item.label in labels]
    own = [item for item in references if item.seed == run.seed]
    rest = [item for item in references if item.seed != run.seed]
    if not own or not rest or run.label in labels:
        return None
    sums = np.stack([_hard_sums(direction, run, item, options) for item in (*own, *rest)], axis=1)
    means = ratio(sums[:, :, 0].sum(axis=0), sums[:, :, 1].sum(axis=0))
    drawn = ratio(direction.resamples.sums(sums[:, :, 0]), direction.resamples.sums(sums[:, :, 1]))
    value = means[: len(own)].mean() / means[len(own) :].mean() - 1
    values = drawn[:, : len(own)].mean(axis=1) / drawn[:, len(own) :].mean(axis=1) - 1
    return (float(value), values) if np.isfinite(value) else None


def _hard_sums(
    direction: Direction, run: ScoredRun, reference: ScoredRun, options: Options
) -> Floats:
    """By sentence the run's KL on the tokens that a reference finds hard, and their number, (S, 2)."""
    assert direction.tokens is not None and run.kl is not None and reference.kl is not None
    hard = reference.kl > options.threshold.nats(reference.kl)
    sentence = direction.tokens.sentence[hard]
    size = len(direction.tokens.sentences)
    columns = [np.bincount(sentence, weights, size) for weights in (run.kl[hard], None)]
    return np.stack(columns, axis=1).astype(np.float64)
