"""One direction's runs under their buckets, each read once: what tables and claims are made from."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.aggregate import Partition, RunSums, make_partition, sum_records
from analysis.buckets import Family, Threshold, difficulty_families, shared_families
from analysis.runs.errors import RecordError, UserError
from analysis.runs.methods import Method
from analysis.runs.run_record import LeftOut, Run
from analysis.runs.token_records import TokenSet, read_columns
from analysis.stats import Floats, Resamples, ratio
from analysis.study import Direction, Study, couples, partner
from analysis.terminal import progress


@dataclass(frozen=True)
class Options:
    """What a report depends on besides the runs.

    Attributes
    ----------
    subset : of the token records and translations
    threshold : Γ
    reference : what defines the buckets: a method, a run's label, ``initial`` or ``self``
    baseline : the method that claims compare with
    margin : smallest relative effect that matters
    resamples : bootstrap resamples
    seed : of the random generator
    """

    subset: str = "test"
    threshold: Threshold = field(default_factory=lambda: Threshold(0.75, "quantile"))
    reference: str = "finetune"
    baseline: str = "word_kd"
    margin: float = 0.02
    resamples: int = 1000
    seed: int = 0


class Judge:
    """Token records of one direction, summed under the partition of a reference run.

    Raises
    ------
    UserError
        The direction has no run that can define the buckets.
    """

    def __init__(self, direction: Direction, options: Options) -> None:
        if direction.tokens is None:
            raise UserError(f"{direction.name}: expected a run with token records, found none")
        self.direction = direction
        self.options = options
        self.tokens: TokenSet = direction.tokens
        self._partitions: dict[tuple[str, int], Partition] = {}
        self._sums: dict[tuple[str, str], RunSums] = {}
        self._shared: list[Family] = []
        self._resampled: dict[tuple[str, str], Floats] = {}

    @property
    def runs(self) -> list[Run]:
        """The runs with token records."""
        return self.direction.scored_runs()

    @cached_property
    def resamples(self) -> Resamples:
        """Resamples of the sentences; directions of equally many sentences draw the same ones, so
        that test sets that translate each other are resampled together."""
        count = len(self.tokens.sentences)
        rng = np.random.default_rng([self.options.seed, count])
        return Resamples(count, self.options.resamples, rng)

    def path(self, run: Run) -> Path:
        """The records that stand for a finished run."""
        return run.records(self.options.subset, self.direction.scored[run.label])

    def selector(self, run: Run) -> tuple[Run, int]:
        """The run and step whose difficulty cuts the tokens when ``run`` is judged."""
        reference = self.options.reference
        if reference == "self":
            return run, self.direction.scored[run.label]
        method = "finetune" if reference == "initial" else reference
        chosen = next((other for other in self.runs if other.label == method), None)
        chosen = chosen or partner(run, self.runs, method)
        if chosen is None:  # another seed's reference is better than none
            first = (other for other in self.runs if partner(other, [other], method))
            chosen = next(first, None)
        if chosen is None:
            raise UserError(
                f"{self.direction.name}: expected a run of {method!r} with token records, which "
                f"defines the buckets, found only {', '.join(sorted({r.method for r in self.runs}))};"
                " train and score one, or choose another with --reference"
            )
        steps = chosen.steps(self.options.subset)
        if reference == "initial":
            if len(steps) < 2:
                raise UserError(
                    f"{chosen.path}: expected token records of an earlier step for --reference "
                    "initial, found one step; score an early checkpoint too"
                )
            return chosen, steps[0]
        return chosen, self.direction.scored[chosen.label]

    def partition(self, run: Run) -> Partition:
        """The buckets under which ``run`` is judged."""
        chosen, step = self.selector(run)
        key = (chosen.label, step)
        if key not in self._partitions:
            path = chosen.records(self.options.subset, step)
            difficulty = read_columns(path, ["kl"])["kl"]
            if len(difficulty) != len(self.tokens.token):
                raise RecordError(
                    f"{path}: expected {len(self.tokens.token)} tokens as in the other records, "
                    f"found {len(difficulty)}; score the checkpoint again"
                )
            gamma = self.options.threshold.nats(difficulty)
            self._shared = self._shared or shared_families(path, self.tokens)
            families = [*difficulty_families(difficulty, gamma), *self._shared]
            self._partitions[key] = make_partition(families, self.tokens, gamma, chosen.label)
        return self._partitions[key]

    def sums(self, run: Run, partition: Partition) -> RunSums:
        """A run's sums under a partition; its records are read once for each partition."""
        key = (run.label, partition.selector)
        if key not in self._sums:
            self._sums[key] = sum_records(self.path(run), self.tokens, partition)
        return self._sums[key]

    def resampled_kl(self, run: Run, partition: Partition) -> Floats:
        """Mean KL of every bucket in every resample, (B, K)."""
        self.sums(run, partition)
        return self._resample(run.label, partition)

    def _resample(self, label: str, partition: Partition) -> Floats:
        """What :attr:`_resampled` has for a run ("": tokens) under a partition.

        All that is missing for the partition is computed at once: unpacking the counts of the
        resamples costs more than multiplying with them.
        """
        selector = partition.selector
        if (label, selector) not in self._resampled:
            parts = {key[0]: sums.kl for key, sums in self._sums.items() if key[1] == selector}
            parts[""] = partition.by_sentence
            missing = [name for name in parts if (name, selector) not in self._resampled]
            sums = self.resamples.sums(np.concatenate([parts[name] for name in missing], axis=1))
            split = dict(zip(missing, np.split(sums, len(missing), axis=1), strict=True))
            tokens = split.get("", self._resampled.get(("", selector)))
            assert tokens is not None  # computed the first time, together with the rest
            for name, values in split.items():
                self._resampled[name, selector] = ratio(values, tokens) if name else tokens
        return self._resampled[label, selector]

    @cached_property
    def teacher_order(self) -> NDArray[np.intp]:
        """Tokens by the teacher's probability of the reference, ascending; the teacher is the same
        in all records."""
        return np.argsort(self.p_gold, kind="stable")

    @cached_property
    def p_gold(self) -> NDArray[np.float32]:
        """The teacher's probability of each reference token, (N,)."""
        values = read_columns(self.path(self.runs[0]), ["p_gold"])["p_gold"]
        return np.asarray(values, dtype=np.float32)

    def forget(self, run: Run) -> None:
        """Take a run out of every comparison."""
        self.direction.runs.remove(run)
        self.direction.scored.pop(run.label, None)
        self.direction.texts.pop(run.label, None)


def load_judges(study: Study, options: Options) -> list[Judge]:
    """Read every run's records; a run whose records are damaged is left out and named.

    Raises
    ------
    UserError
        No direction is left with records that can be judged.
    """
    judges = []
    total = sum(len(direction.scored) for direction in study.directions)
    with progress(total=total, desc="read token records", unit="run") as bar:
        for direction in study.directions:
            if direction.tokens is None:
                continue
            judge = Judge(direction, options)
            try:
                _read_all(judge, study, bar)
            except UserError as error:
                study.left_out.append(LeftOut(direction.name, str(error)))
                continue
            judges.append(judge)
    if not judges:
        reasons = "; ".join(f"{item.label}: {item.reason}" for item in study.left_out)
        raise UserError(
            f"expected a direction whose token records can be judged, found none: {reasons}"
        )
    return judges


def _read_all(judge: Judge, study: Study, bar: Any) -> None:
    # Reference runs first: damage in one of them is then found in its own name.
    reference = judge.options.reference
    names = {"finetune"} if reference == "initial" else {reference}
    for run in sorted(
        judge.runs, key=lambda run: not {run.label, Method.of(run.method).id} & names
    ):
        try:
            judge.sums(run, judge.partition(run))
        except RecordError as error:
            judge.forget(run)
            study.left_out.append(LeftOut(run.label, str(error)))
        bar.update()
    if not judge.runs:
        raise UserError("no run with usable token records is left")


def pairs(judge: Judge, treatment: str, baseline: str) -> list[tuple[Run, Run]]:
    """Runs of one method with token records, each with the baseline's, by seed
    (:func:`analysis.study.couples`)."""
    return couples([run for run in judge.runs if run.method == treatment], judge.runs, baseline)
