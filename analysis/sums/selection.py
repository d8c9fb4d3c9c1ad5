"""Whose difficulty cuts the tokens when runs are compared.

The tokens that two runs are compared on are chosen by reference runs of *other* seeds, by their mean
difficulty. What a run finds hard is in part what it got wrong by chance, and runs of one seed (the same
initial weights, the same order of sentences) share some of that: a run that shares errors with what
chose its hard tokens looks worse on them, and better on the easy ones, than it is.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from analysis.runs.errors import UserError
from analysis.runs.token_records import TokenSet, read_columns
from analysis.sums.bucket_sums import Partition, make_partition
from analysis.sums.buckets import Family, difficulty_families, shared_families
from analysis.sums.direction import Direction, Options, ScoredRun
from analysis.sums.pairing import of_method


@dataclass(frozen=True)
class Reference:
    """A run whose difficulty may cut tokens, (N,) nats."""

    label: str
    seed: int
    difficulty: NDArray[np.float32]


def reference_runs(name: str, runs: Sequence[ScoredRun], options: Options) -> list[ScoredRun]:
    """The runs that ``options.references`` names in a direction.

    Raises
    ------
    UserError
        One of them is not there.
    """
    found: list[ScoredRun] = []
    for reference in options.references:
        chosen = [run for run in runs if run.label == reference] or of_method(runs, reference)
        if not chosen:
            raise UserError(
                f"{name}: expected a run of {reference!r} with token records, which defines the "
                f"buckets, found only {', '.join(sorted({str(run.method) for run in runs}))}; train "
                "and score one, or choose another with --reference of analysis.transfer"
            )
        found += chosen
    return found


def read_reference(run: ScoredRun, subset: str) -> Reference:
    """The difficulty of a run's tokens.

    Raises
    ------
    RecordError
        The records are damaged.
    """
    assert run.step is not None
    difficulty = read_columns(run.run.records(subset, run.step), ["kl"])["kl"]
    return Reference(run.label, run.seed, difficulty.astype(np.float32))


@dataclass
class Cutter:
    """Makes the partitions of a direction while its runs are read; each once.

    Attributes
    ----------
    shared_by : records of any run, from which the families come that no student enters
    """

    references: Sequence[Reference]
    tokens: TokenSet
    options: Options
    shared_by: Path
    made: dict[tuple[str, ...], Partition] = field(default_factory=dict)
    _shared: list[Family] = field(default_factory=list)

    def cut(self, *runs: ScoredRun) -> Partition:
        """The partition under which runs are compared, or one is judged alone."""
        chosen = others(self.references, {run.seed for run in runs})
        key = tuple(item.label for item in chosen)
        if key not in self.made:
            stacked = np.stack([item.difficulty for item in chosen])
            difficulty: NDArray[np.float32] = np.asarray(stacked.mean(axis=0), np.float32)
            gamma = self.options.threshold.nats(difficulty)
            self._shared = self._shared or shared_families(self.shared_by, self.tokens)
            families = [*difficulty_families(difficulty, gamma), *self._shared]
            self.made[key] = make_partition(families, self.tokens, gamma, key)
        return self.made[key]


def others(references: Sequence[Reference], seeds: Collection[int]) -> list[Reference]:
    """The references of other seeds; where there are none, those of the first of the seeds that has
    any, which :func:`bias` then names."""
    chosen = [item for item in references if item.seed not in seeds]
    if chosen:
        return chosen
    first = min(item.seed for item in references)
    seed = next((seed for seed in seeds if any(item.seed == seed for item in references)), first)
    return [item for item in references if item.seed == seed]


#: Why no verdict follows where the tokens are chosen by what is compared on them.
SAME_METHOD = "a compared method decides itself which tokens are hard"
SAME_SEED = "only a reference run of the compared seed decides which tokens are hard"


def bias(direction: Direction, run: ScoredRun, other: ScoredRun) -> str:
    """Why the tokens that two runs are compared on do not suit the comparison; "" where they do."""
    selector = direction.cut(run, other).selector
    chosen = [item for item in direction.runs if item.label in selector]
    if {item.method.id for item in chosen} & {run.method.id, other.method.id}:
        return SAME_METHOD
    if {item.seed for item in chosen} & {run.seed, other.seed}:
        return SAME_SEED
    return ""
