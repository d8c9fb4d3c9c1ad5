"""The values that tables and claims are made from: runs with their sums, by direction."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from analysis.runs.methods import Method
from analysis.runs.run_record import Run
from analysis.runs.token_records import TokenSet
from analysis.stats import Resamples
from analysis.sums.bucket_sums import Partition, RunSums
from analysis.sums.buckets import Threshold
from analysis.sums.pairing import BASELINES
from analysis.sums.translations import Corpus, Translations


@dataclass(frozen=True)
class Options:
    """What a report depends on besides the runs.

    Attributes
    ----------
    subset : of the token records and translations
    threshold : Γ
    references : what defines the buckets: methods, or labels of runs
    baseline : the method that claims compare with
    margin : smallest relative effect that matters
    resamples : bootstrap resamples
    seed : of the random generator
    documents : the document of each line of the test set, which resamples then draw whole; () for none
    """

    subset: str = "test"
    threshold: Threshold = field(default_factory=lambda: Threshold(0.75, "quantile"))
    references: tuple[str, ...] = ("finetune",)
    baseline: str = "word_kd"
    margin: float = 0.02
    resamples: int = 1000
    seed: int = 0
    documents: tuple[str, ...] = ()

    @property
    def baselines(self) -> tuple[str, ...]:
        """What every table of gains compares with."""
        return tuple(dict.fromkeys((*BASELINES, self.baseline)))


@dataclass(frozen=True)
class ScoredRun:
    """A run with all that is computed from its files.

    Attributes
    ----------
    run : its record
    method : with what tells it apart from other runs of the method
    step : whose token records stand for the finished run; None without records
    partition : the buckets under which it is judged
    sums : its sums under each partition in which it is compared, by :attr:`Partition.selector`
    kl : (N,) KL of each reference token to the teacher, nats
    history : the same at every step with records, ascending; empty where there is only one
    translations : None without any
    """

    run: Run
    method: Method
    step: int | None = None
    partition: Partition | None = None
    sums: Mapping[tuple[str, ...], RunSums] = field(default_factory=dict)
    kl: NDArray[np.float32] | None = None
    history: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)
    translations: Translations | None = None

    @property
    def label(self) -> str:
        """The run's path below the runs root."""
        return self.run.label

    @property
    def seed(self) -> int:
        """Of the training."""
        return self.run.seed

    @property
    def parameters(self) -> int | None:
        """Of the model."""
        return self.run.parameters

    @property
    def cut(self) -> Partition:
        """The partition of a run with token records."""
        assert self.partition is not None
        return self.partition

    def under(self, partition: Partition) -> RunSums:
        """The run's sums under a partition in which it is compared."""
        return self.sums[partition.selector]


@dataclass(frozen=True)
class Direction:
    """The runs of one translation direction that share one test set.

    Attributes
    ----------
    name : ``SOURCE-TARGET``
    runs : every run, sorted by label
    tokens : the reference tokens that all scored runs hold; None where no run has records
    resamples : of their sentences; directions of equally many sentences draw the same ones, so that
        test sets that translate each other are resampled together
    cuts : the partition under which two runs are compared, by their labels
    corpus : references and metrics; None where no run has translations
    """

    name: str
    runs: tuple[ScoredRun, ...]
    tokens: TokenSet | None = None
    resamples: Resamples | None = None
    cuts: Mapping[tuple[str, str], Partition] = field(default_factory=dict)
    corpus: Corpus | None = None

    @property
    def scored(self) -> tuple[ScoredRun, ...]:
        """The runs with token records."""
        return tuple(run for run in self.runs if run.partition is not None)

    @property
    def translated(self) -> tuple[ScoredRun, ...]:
        """The runs with translations."""
        return tuple(run for run in self.runs if run.translations is not None)

    def cut(self, run: ScoredRun, other: ScoredRun) -> Partition:
        """The partition under which two scored runs are compared."""
        return self.cuts[run.label, other.label]
