"""How alike teacher and student rank the references: Spearman's correlation of their surprise.

Surprise falls with probability on both sides, so the correlation is that of the two probabilities.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from analysis.stats import Floats, ascending_ranks
from analysis.sums.bucket_sums import Partition
from analysis.sums.buckets import EASY, HARD

#: A bucket: its family and its name.
Bucket = tuple[str, str]


def buckets(
    order: NDArray[np.intp], partition: Partition
) -> Iterator[tuple[Bucket, NDArray[np.intp]]]:
    """All, easy and hard tokens, each in the order that is given of all, (N,): one sort serves them all."""
    hard = partition.codes("difficulty")[order]
    yield ("all", "all"), order
    yield ("difficulty", "easy"), order[hard == EASY]
    yield ("difficulty", "hard"), order[hard == HARD]


def teacher_ranks(
    p_gold: NDArray[np.float32], order: NDArray[np.intp], partition: Partition
) -> dict[Bucket, Floats]:
    """The centred rank of the teacher's probability of each reference among its bucket's, (N,); NaN
    outside the bucket. ``order`` sorts the probabilities, for every partition."""
    found: dict[Bucket, Floats] = {}
    for bucket, chosen in buckets(order, partition):
        found[bucket] = np.full(len(p_gold), np.nan)
        found[bucket][chosen] = _centred_ranks(p_gold[chosen])
    return found


def rank_correlations(
    q_gold: NDArray[np.float32], partition: Partition, teacher: Mapping[Bucket, Floats]
) -> dict[Bucket, float]:
    """Spearman's correlation of -log p_gold and -log q_gold in each bucket; NaN where one is constant."""
    found: dict[Bucket, float] = {}
    for bucket, chosen in buckets(np.argsort(q_gold), partition):
        ranks, others = _centred_ranks(q_gold[chosen]), teacher[bucket][chosen]
        scale = np.sqrt((ranks @ ranks) * (others @ others))
        found[bucket] = float(ranks @ others / scale) if scale > 0 else np.nan
    return found


def _centred_ranks(ascending: NDArray[np.float32]) -> Floats:
    """Mean ranks less their mean."""
    return ascending_ranks(ascending) - (len(ascending) + 1) / 2
