"""How alike teacher and student rank the references: Spearman's correlation of their surprise.

Surprise falls with probability on both sides, so the correlation is that of the two probabilities.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.stats import Floats, sorted_ranks
from analysis.sums.bucket_sums import Partition
from analysis.sums.buckets import EASY, HARD

#: A bucket: its family and its name.
Bucket = tuple[str, str]


@dataclass(frozen=True)
class TeacherRanks:
    """Tokens of a bucket (None: all) and the teacher's centred ranks of their references."""

    mask: NDArray[np.bool_] | None
    ranks: Floats


def teacher_ranks(
    p_gold: NDArray[np.float32], order: NDArray[np.intp], partition: Partition
) -> dict[Bucket, TeacherRanks]:
    """For all, easy and hard tokens, from the teacher's probabilities (N,) and their order."""
    hard = partition.codes("difficulty")
    return {
        key: TeacherRanks(mask, _centred_ranks(p_gold, order, mask))
        for key, mask in (
            (("all", "all"), None),
            (("difficulty", "easy"), hard == EASY),
            (("difficulty", "hard"), hard == HARD),
        )
    }


def rank_correlations(
    q_gold: NDArray[np.float32], teacher: Mapping[Bucket, TeacherRanks]
) -> dict[Bucket, float]:
    """Spearman's correlation of -log p_gold and -log q_gold in each bucket."""
    order = np.argsort(q_gold, kind="stable")
    found: dict[Bucket, float] = {}
    for key, other in teacher.items():
        ranks = _centred_ranks(q_gold, order, other.mask)
        scale = np.sqrt((ranks**2).sum() * (other.ranks**2).sum())
        found[key] = float((ranks * other.ranks).sum() / scale) if scale > 0 else np.nan
    return found


def _centred_ranks(
    values: NDArray[np.float32], order: NDArray[np.intp], mask: NDArray[np.bool_] | None
) -> Floats:
    """Ranks of the chosen values less their mean, from the order of all of them."""
    if mask is not None:
        # The order among a bucket's tokens is theirs among all, so one sort serves all buckets.
        place = np.cumsum(mask) - 1
        values, order = values[mask], place[order[mask[order]]]
    return sorted_ranks(values, order) - (len(values) + 1) / 2
