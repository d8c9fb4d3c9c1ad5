"""Whether compared runs relate equally to the runs that chose the tokens they are compared on.

Runs of one seed share some of their errors. A run and the baseline's run of its seed share as much with
the reference run of that seed, so it does not matter to their difference whether that one or the others
choose the hard tokens. Where it matters, one of the two shares errors with another seed than the other
one: a run under a wrong seed, or trained from another run's checkpoint.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.claims.evidence import Couple, Evidence, Sample
from analysis.stats import hierarchical, ratio
from analysis.sums.direction import Direction, Options

#: The check is made for every method, and a false alarm costs verdicts.
ALPHA = 0.01
COLUMNS = ["treatment", "baseline", "effect", "low", "high", "p", "couples", "unequal"]


def relation_table(groups: dict[str, Sequence[Evidence]], options: Options) -> pd.DataFrame:
    """One row a method: how much more it gains on hard tokens, as a share of the baseline's KL, where
    the reference run of its own seed chooses them than where those of other seeds do.

    ``unequal`` where that is certain and above the smallest effect that matters. Methods without
    couples of one seed, or without reference runs of that and of another seed, have no row.
    """
    rows: list[dict[str, Any]] = []
    for treatment, evidence in groups.items():
        samples = [sample for item in evidence if (sample := relation_sample(item, options))]
        if not samples:
            continue
        estimate = hierarchical(
            [sample.effect for sample in samples],
            [sample.drawn for sample in samples],
            [sample.units for sample in samples],
        )
        unequal = estimate.p <= ALPHA and abs(estimate.effect) > options.margin
        rows.append(
            {
                "treatment": treatment,
                "baseline": options.baseline,
                "effect": estimate.effect,
                "low": estimate.low,
                "high": estimate.high,
                "p": estimate.p,
                "couples": sum(len(sample.effect) for sample in samples),
                "unequal": unequal,
            }
        )
    return pd.DataFrame(rows, columns=COLUMNS)


def relation_sample(evidence: Evidence, options: Options) -> Sample | None:
    """The difference of the two relative gains by seed; None where it cannot be made."""
    direction = evidence.direction
    if set(options.references) & {"self", "initial"} or direction.resamples is None:
        return None
    labels = {label for run in direction.scored for label in run.cut.selector}
    references = [run for run in direction.scored if run.label in labels]
    effect, drawn = [], []
    for run, other in evidence.couples:
        own = [item for item in references if item.seed == run.seed == other.seed]
        rest = [item for item in references if item.seed not in (run.seed, other.seed)]
        if not own or not rest:
            continue
        sums = np.concatenate(
            [_sums(direction, (run, other), chosen, options) for chosen in (own, rest)], axis=1
        )
        totals, resampled = sums.sum(axis=0), direction.resamples.sums(sums)
        effect.append(1 - totals[0] / totals[1] - (1 - totals[2] / totals[3]))
        drawn.append(
            ratio(resampled[:, 2], resampled[:, 3]) - ratio(resampled[:, 0], resampled[:, 1])
        )
    if not effect or not np.isfinite(effect).all():
        return None
    ones = np.ones(len(effect))
    assert direction.tokens is not None
    sentences = len(direction.tokens.sentences)
    draws = np.stack(drawn)
    return Sample(
        np.array(effect), draws, ones, np.ones_like(draws), 0, sentences, direction.resamples.units
    )


def _sums(direction: Direction, couple: Couple, chosen: Sequence[Any], options: Options) -> Any:
    """KL of the run and of the baseline by sentence on the tokens that ``chosen`` find hard, (S, 2)."""
    assert direction.tokens is not None
    difficulty = np.mean([item.kl for item in chosen], axis=0, dtype=np.float32)
    hard = difficulty > options.threshold.nats(difficulty)
    sentence = direction.tokens.sentence[hard]
    count = len(direction.tokens.sentences)
    columns = []
    for run in couple:
        assert run.kl is not None
        columns.append(np.bincount(sentence, run.kl[hard], count))
    return np.stack(columns, axis=1)
