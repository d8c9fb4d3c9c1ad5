"""Which bucket a reference token belongs to: ways to cut the test set's tokens into groups.

A family is a partition: every token of the direction has one bucket. Families that depend on
difficulty take it from one reference run, so that every run is judged on the same tokens.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from analysis.runs.token_records import TokenSet, read_columns, read_pieces

EASY, HARD = 0, 1
FREQUENCY_EDGES = (1, 10, 100, 1000, 10000)
POSITION_EDGES = (5, 10, 20, 40)
QUANTILES = 5


@dataclass(frozen=True)
class Family:
    """One way to cut the tokens.

    Attributes
    ----------
    name : of the family, e.g. ``difficulty``
    buckets : their names, in order
    codes : (N,) int8, the bucket of each token
    """

    name: str
    buckets: tuple[str, ...]
    codes: NDArray[np.int8]


@dataclass(frozen=True)
class Threshold:
    """How Γ is given: a value in nats, or a quantile of the reference run's difficulty."""

    value: float
    kind: str

    def nats(self, difficulty: NDArray[np.floating]) -> float:
        """Γ in nats for a reference run's difficulties, (N,)."""
        if self.kind == "absolute":
            return self.value
        return float(np.quantile(difficulty.astype(np.float64), self.value))


def by_threshold(difficulty: NDArray[np.floating], gamma: float) -> Family:
    """Easy (d <= Γ) and hard (d > Γ) tokens."""
    return Family("difficulty", ("easy", "hard"), (difficulty > gamma).astype(np.int8))


def by_quantile(name: str, values: NDArray[np.floating], count: int = QUANTILES) -> Family:
    """``count`` buckets of about equal size, ascending; equal values share a bucket.

    A value on an edge belongs to the lower bucket, so many equal values can leave a bucket empty.
    """
    edges = np.quantile(values.astype(np.float64), np.arange(1, count) / count)
    bounds = [float(values.min()), *edges.tolist(), float(values.max())]
    names = tuple(
        f"{i + 1} of {count} ({low:.3g} to {high:.3g})"
        for i, (low, high) in enumerate(itertools.pairwise(bounds))
    )
    return Family(name, names, np.searchsorted(edges, values, side="left").astype(np.int8))


def by_edges(name: str, values: NDArray[np.integer], edges: Sequence[int]) -> Family:
    """Buckets of whole numbers: below the first edge, from edge to edge, from the last on."""
    bounds = [0, *edges]
    names = [
        str(low) if high == low + 1 else f"{low}-{high - 1}"
        for low, high in itertools.pairwise(bounds)
    ]
    codes = np.searchsorted(np.asarray(edges), values, side="right").astype(np.int8)
    return Family(name, (*names, f"{edges[-1]}+"), codes)


def by_piece(pieces: Sequence[str], index: NDArray[np.int64], tokens: TokenSet) -> Family:
    """Word starts, continuations, and the end of the sentence (each sentence's last token).

    ``▁`` (SentencePiece) or ``Ġ`` (byte-level BPE) begins a word; with ``@@`` (subword-nmt) a token
    continues where the one before ends so; a vocabulary without any of them is of whole words.
    """
    last = np.append(np.diff(tokens.sentence) != 0, True)
    marked = np.array([piece.startswith(("▁", "Ġ")) for piece in pieces])
    open_ended = np.array([piece.endswith("@@") for piece in pieces])
    if open_ended.any() and not marked.any():
        start = ~np.append(False, open_ended[index][:-1])
    elif marked.any():
        start = marked[index]
    else:
        start = np.ones(len(index), dtype=np.bool_)
    start |= tokens.position == 0
    codes = np.where(last, 2, np.where(start, 0, 1)).astype(np.int8)
    return Family("piece", ("word start", "continuation", "end of sentence"), codes)


def shared_families(path: Path, tokens: TokenSet) -> list[Family]:
    """The families that no student enters, from any record file of the direction."""
    pieces, index = read_pieces(path, "piece")
    columns = read_columns(path, ["p_top1", "frequency", "p_entropy"])
    wrong = (columns["p_top1"] != tokens.token).astype(np.int8)
    return [
        Family("all", ("all",), np.zeros(len(tokens.token), dtype=np.int8)),
        by_edges("frequency", columns["frequency"], FREQUENCY_EDGES),
        by_quantile("teacher entropy", columns["p_entropy"]),
        by_edges("position", tokens.position, POSITION_EDGES),
        Family("teacher", ("right about the reference", "wrong about the reference"), wrong),
        by_piece(pieces, index, tokens),
    ]


def difficulty_families(difficulty: NDArray[np.floating], gamma: float) -> list[Family]:
    """The families that depend on a reference run's difficulty, (N,), and Γ in nats."""
    return [
        by_threshold(difficulty, gamma),
        by_quantile("difficulty quantile", difficulty),
    ]
