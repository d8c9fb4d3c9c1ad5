"""From token records to sufficient statistics: sums per bucket, and per sentence and bucket.

Every score of a report is a ratio of these sums, so resampling sentences never touches tokens again.
Records are read in blocks of rows; memory grows with sentences and buckets, and by four bytes a token.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from analysis.runs.token_records import Columns, TokenSet, iterate_columns
from analysis.stats import Floats
from analysis.sums.buckets import Family

T = TypeVar("T")
R = TypeVar("R")
#: What is summed over tokens, in the order of the last axis of every array of sums.
METRICS = (
    "kl",
    "kl_target",
    "kl_nontarget",
    "agreement",  # teacher and student have the same first choice
    "p_gold",
    "q_gold",
    "p_of_q_top1",
    "overlap_top5",
    "teacher_right",  # first choice is the reference
    "student_right",
    "p_max",
    "q_max",
    "p_entropy",
    "q_entropy",
)
READ = (
    "kl", "kl_target", "kl_nontarget", "p_gold", "q_gold", "p_entropy", "q_entropy",
    "p_top1", "q_top1", "p_max", "q_max", "p_of_q_top1", "overlap_top5",
)  # fmt: skip


@dataclass(frozen=True)
class Partition:
    """The families of one reference run, with how many tokens each bucket has.

    Attributes
    ----------
    families : K buckets in all
    gamma : Γ in nats
    tokens : (K,) tokens of each bucket, families one after another
    by_sentence : (S, K) the same by sentence
    selector : labels of the runs whose mean difficulty cut the tokens
    """

    families: tuple[Family, ...]
    gamma: float
    tokens: Floats
    by_sentence: Floats
    selector: tuple[str, ...]

    @property
    def names(self) -> list[tuple[str, str]]:
        """(family, bucket) of every column."""
        return [(family.name, bucket) for family in self.families for bucket in family.buckets]

    def columns(self, family: str) -> slice:
        """Where a family's buckets are among the K."""
        start = 0
        for item in self.families:
            if item.name == family:
                return slice(start, start + len(item.buckets))
            start += len(item.buckets)
        raise KeyError(family)

    def codes(self, family: str) -> NDArray[np.int8]:
        """The bucket of each token in a family, (N,)."""
        return next(item.codes for item in self.families if item.name == family)


@dataclass(frozen=True)
class RunSums:
    """Sums over the tokens of one run under one partition.

    Attributes
    ----------
    totals : (K, M) sums of :data:`METRICS` by bucket
    kl : (S, K) sum of KL by sentence and bucket
    difficulty : (S, 2, M) sums by sentence for easy and hard tokens
    """

    totals: Floats
    kl: Floats
    difficulty: Floats

    def total(self, metric: str) -> Floats:
        """The sum of one of :data:`METRICS` by bucket, (K,)."""
        return self.totals[:, METRICS.index(metric)]


@dataclass(frozen=True)
class RecordSums:
    """What is kept of a run's token records.

    Attributes
    ----------
    by_partition : sums under each partition, in the order given
    kl : (N,) KL of each token, nats
    """

    by_partition: list[RunSums]
    kl: NDArray[np.float32]


def make_partition(
    families: Sequence[Family], tokens: TokenSet, gamma: float, selector: tuple[str, ...]
) -> Partition:
    """Count the tokens of every bucket."""
    sentences = len(tokens.sentences)
    parts = []
    for family in families:
        width = len(family.buckets)
        cells = tokens.sentence.astype(np.int64) * width + family.codes
        counts = np.bincount(cells, minlength=sentences * width)
        parts.append(counts.reshape(sentences, width).astype(np.float64))
    by_sentence = np.concatenate(parts, axis=1)
    return Partition(tuple(families), gamma, by_sentence.sum(axis=0), by_sentence, selector)


def sum_records(path: Path, tokens: TokenSet, partitions: Sequence[Partition]) -> RecordSums:
    """Read a run's records once and sum them under each partition."""
    sums = []
    for partition in partitions:
        sentences, width = partition.by_sentence.shape
        sums.append(
            RunSums(
                totals=np.zeros((width, len(METRICS))),
                kl=np.zeros((sentences, width)),
                difficulty=np.zeros((sentences, 2, len(METRICS))),
            )
        )
    kept = np.empty(len(tokens.token), dtype=np.float32)

    def summed(block: tuple[slice, Columns]) -> tuple[slice, list[tuple[Floats, ...]]]:
        rows, columns = block
        kept[rows] = columns["kl"]
        inside = slice(tokens.sentence[rows.start], tokens.sentence[rows.stop - 1] + 1)
        values = token_metrics(columns, tokens.token[rows])  # (rows, M)
        parts = [_block_sums(values, rows, inside, tokens, partition) for partition in partitions]
        return inside, parts

    # Added up in the order of the file, so that threads do not change the result.
    for inside, parts in ordered_map(summed, _blocks(path, len(tokens.token))):
        for own, (totals, kl, difficulty) in zip(sums, parts, strict=True):
            own.totals[:] += totals
            own.kl[inside] += kl
            own.difficulty[inside] += difficulty
    return RecordSums(sums, kept)


def ordered_map(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """``map`` on a few threads, with no more items in memory than there are threads.

    NumPy and SciPy let other threads run while they compute.
    """
    workers = min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _blocks(path: Path, tokens: int) -> Iterator[tuple[slice, Columns]]:
    start = 0
    for columns in iterate_columns(path, READ):
        end = start + len(columns["kl"])
        assert end <= tokens  # the token set of the file was compared
        yield slice(start, end), columns
        start = end


def _block_sums(
    values: Floats, rows: slice, inside: slice, tokens: TokenSet, partition: Partition
) -> tuple[Floats, ...]:
    """What the (rows, M) values of some rows, of the sentences ``inside``, add to a :class:`RunSums`."""
    sentences = inside.stop - inside.start
    codes = [family.codes[rows] for family in partition.families]
    totals = _bucket_sums(values, codes, partition)
    local = tokens.sentence[rows].astype(np.int64) - inside.start
    cells = _one_hot(local * 2 + partition.codes("difficulty")[rows], sentences * 2)
    difficulty = (cells @ values).reshape(sentences, 2, len(METRICS))
    kl = []
    for family, own in zip(partition.families, codes, strict=True):
        size = len(family.buckets)
        summed = np.bincount(local * size + own, values[:, 0], minlength=sentences * size)
        kl.append(summed.reshape(sentences, size))
    return totals, np.concatenate(kl, axis=1), difficulty


def token_metrics(columns: Columns, token: NDArray[np.int32]) -> Floats:
    """:data:`METRICS` of each token, (N, M)."""
    values = np.empty((len(token), len(METRICS)))
    for index, name in enumerate(METRICS):
        if name == "agreement":
            values[:, index] = columns["p_top1"] == columns["q_top1"]
        elif name == "teacher_right":
            values[:, index] = columns["p_top1"] == token
        elif name == "student_right":
            values[:, index] = columns["q_top1"] == token
        else:
            values[:, index] = columns[name]
    return values


def _bucket_sums(values: Floats, codes: Sequence[NDArray[np.int8]], partition: Partition) -> Floats:
    """Sums of ``values`` (N, M) by bucket for all families in one product, (K, M)."""
    sizes = [len(family.buckets) for family in partition.families]
    offsets = np.cumsum([0, *sizes[:-1]])
    stacked = np.stack(codes, axis=1).astype(np.int32) + offsets.astype(np.int32)  # (N, families)
    pointers = np.arange(0, stacked.size + 1, len(codes))
    ones = np.ones(stacked.size)
    shape = (sum(sizes), len(values))
    matrix = scipy.sparse.csc_array((ones, stacked.ravel(), pointers), shape=shape)
    return np.asarray(matrix @ values)


def _one_hot(cells: NDArray[np.int64], count: int) -> scipy.sparse.csc_array:
    """(count, N) matrix with one 1 a column."""
    pointers = np.arange(len(cells) + 1)
    return scipy.sparse.csc_array((np.ones(len(cells)), cells, pointers), shape=(count, len(cells)))
