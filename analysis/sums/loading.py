"""From run directories to directions: what fits together, and each run read once."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.neural import Comet, NamedModel, load_comet
from analysis.runs.errors import RecordError, UserError
from analysis.runs.methods import Method
from analysis.runs.run_record import LeftOut, Run, discover
from analysis.runs.texts import Texts, read_texts
from analysis.runs.token_records import TokenSet, read_columns, read_token_set
from analysis.stats import Resamples
from analysis.sums.bucket_sums import Partition, RecordSums, ordered_map, sum_records
from analysis.sums.direction import Direction, Options, ScoredRun
from analysis.sums.pairing import (
    mixed_settings,
    name_variants,
    of_method,
    partner,
    peers,
    placebo_couples,
)
from analysis.sums.selection import Cutter, Reference, read_reference, reference_runs
from analysis.sums.translations import make_corpus
from analysis.terminal import progress, warn


@dataclass
class Found:
    """What is on disk of one direction, while it is looked through.

    Attributes
    ----------
    runs : every run, sorted by label
    tokens : the reference tokens that all ``steps`` runs hold; None where no run has records
    steps : label to the step whose records stand for the finished run
    texts : label to translations
    unsealed : labels of runs with files that have no checksum
    """

    name: str
    runs: list[Run]
    tokens: TokenSet | None = None
    steps: dict[str, int] = field(default_factory=dict)
    texts: dict[str, Texts] = field(default_factory=dict)
    unsealed: set[str] = field(default_factory=set)
    left_out: list[LeftOut] = field(default_factory=list)

    def leave_out(self, run: Run, reason: str) -> None:
        """Take a run out of every comparison, and say why."""
        if run in self.runs:
            self.runs.remove(run)
            self.left_out.append(LeftOut(run.label, reason))
        self.steps.pop(run.label, None)
        self.texts.pop(run.label, None)


def load(
    root: Path, options: Options, comet: Path | None = None, records: bool = True
) -> tuple[list[Direction], list[LeftOut]]:
    """Find the runs of ``root``, leave out what does not fit, and read the rest; ``comet`` is a COMET model,
    which is a metric then beside BLEU and chrF. Without ``records`` translations alone are read.

    Raises
    ------
    UserError
        No run directory, none with token records or translations of the subset, or no COMET.
    """
    model = None if comet is None else NamedModel(comet.resolve().name, load_comet(comet))
    found, left_out = discover(root)
    methods = name_variants(found)
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in found:
        groups[run.direction].append(run)
    gathered = []
    with progress(total=len(found), desc="find tokens", unit="run") as bar:
        for name in sorted(groups):
            found_here = Found(name, groups[name])
            gathered.append(_look_through(found_here, options.subset, records, bar))
    for item in gathered:
        left_out.extend(item.left_out)
        item.left_out = []
    gathered = [item for item in gathered if item.runs]
    left_out.sort(key=lambda item: item.label)
    if not gathered:
        reasons = "; ".join(f"{item.label}: {item.reason}" for item in left_out)
        what = f"token records of {options.subset!r} (tokens/{options.subset}/STEP.parquet)"
        if not records:
            what = f"translations of {options.subset!r} (hyps/{options.subset}.txt)"
        raise UserError(
            f"{root}: expected at least one run with {what}, found none; "
            f"{'score' if records else 'evaluate'} a run first ({reasons or 'none was scored'})"
        )
    if unsealed := sorted(label for item in gathered for label in item.unsealed):
        warn(
            f"{len(unsealed)} of {sum(len(item.runs) for item in gathered)} runs, {unsealed[0]} the "
            "first, have files without a checksum, as earlier versions and other programs write them: "
            "damage to these goes unseen"
        )
    for item in gathered:
        for told in mixed_settings((methods[run.label], run) for run in item.runs):
            warn(
                f"{item.name}: {told}; train the seeds alike, or keep them in folders of their own"
            )
    for item in gathered:
        _check_documents(item, options)
    directions = []
    total = sum(len(item.steps) for item in gathered)
    with progress(total=total, desc="read token records", unit="run") as bar:
        for item in gathered:
            directions.append(_read(item, methods, options, bar, model))
            left_out.extend(item.left_out)
    return directions, left_out


def _look_through(found: Found, subset: str, records: bool, bar: Any) -> Found:
    """See what each run has, and leave out those of another test set or teacher than most."""
    sets: dict[str, TokenSet] = {}
    by_label = {run.label: run for run in found.runs}

    def opened(run: Run) -> tuple[Texts | None, int | None, TokenSet | None] | UserError:
        try:
            texts = read_texts(run.path, subset)
            step = run.last_step(subset) if records else None
            tokens = None if step is None else read_token_set(run.records(subset, step))
        except UserError as error:
            return error
        return texts, step, tokens

    runs = list(found.runs)
    distinct: dict[str, TokenSet] = {}
    for run, files in zip(runs, ordered_map(opened, runs), strict=True):
        bar.update()
        if isinstance(files, UserError):
            found.leave_out(run, str(files))
            continue
        texts, step, tokens = files
        if texts:
            found.texts[run.label] = texts
        if step is not None and tokens is not None:
            sets[run.label] = distinct.setdefault(tokens.digest, tokens)
            found.steps[run.label] = step
        if not all(file.sealed for file in (run, texts, tokens) if file):
            found.unsealed.add(run.label)
        if not texts and step is None:
            what = "token records or translations" if records else "translations"
            found.leave_out(run, f"no {what} of {subset}")
    common = _most_common({label: item.digest for label, item in sets.items()}, by_label)
    found.tokens = next((item for item in sets.values() if item.digest == common), None)
    for label, item in sets.items():
        chosen = found.tokens
        if item.digest != common and chosen is not None and label in found.steps:
            what = "teacher cache" if item.teacher != chosen.teacher else "test set"
            found.leave_out(
                by_label[label],
                f"its token records are of another {what} ({len(item.token)} tokens, cache "
                f"{item.teacher or '?'}) than most {found.name} runs ({len(chosen.token)} tokens, "
                f"cache {chosen.teacher or '?'})",
            )
    digests = {label: texts.digest for label, texts in found.texts.items()}
    common = _most_common(digests, by_label)
    for label, digest in digests.items():
        if digest != common:
            reason = f"its references (hyps/{subset}.ref.txt) differ from most {found.name} runs'"
            found.leave_out(by_label[label], reason)
    last = int(found.tokens.sentences[-1]) if found.tokens else -1
    for label, texts in list(found.texts.items()):
        if len(texts.references) <= last and label in found.steps:
            found.leave_out(
                by_label[label],
                f"hyps/{subset}.txt has {len(texts.references)} lines, but the token records name "
                f"sentence {last}",
            )
    return found


def _check_documents(found: Found, options: Options) -> None:
    """Refuse documents of another test set, as another direction's may be; without translations it is not
    known how many sentences a test set has after the last one that was scored.

    Raises
    ------
    UserError
        There are more or fewer of them than sentences.
    """
    lines = next((len(texts.references) for texts in found.texts.values()), None)
    least = int(found.tokens.sentences[-1]) + 1 if found.tokens else 0
    given = len(options.documents)
    if given and (given != lines if lines is not None else given < least):
        raise UserError(
            f"--documents: expected a line for each sentence of {options.subset!r} of {found.name}, "
            f"{lines or f'at least {least}'}, found {given}; judge directions with other test sets in "
            "reports of their own"
        )


def _most_common(digests: Mapping[str, str], runs: Mapping[str, Run]) -> str | None:
    """The digest of the most runs; among equals that of a fine-tuned run, then the first label."""
    if not digests:
        return None
    counts = Counter(digests.values())
    best = min(
        digests,
        key=lambda label: (-counts[digests[label]], runs[label].method != "finetune", label),
    )
    return digests[best]


def _read(
    found: Found,
    methods: Mapping[str, Method],
    options: Options,
    bar: Any,
    comet: NamedModel | None,
) -> Direction:
    """Read the token records and the translations of a direction, each once."""
    runs = [ScoredRun(run, methods[run.label], found.steps.get(run.label)) for run in found.runs]
    tokens, drawn = found.tokens, None
    cuts: dict[tuple[str, str], Partition] = {}
    if tokens is not None:
        drawn = make_resamples(tokens.sentences, options)
        try:
            runs, cuts = _read_records(runs, found, options, bar)
        except UserError as error:
            found.left_out.append(LeftOut(found.name, str(error)))
            tokens = None
    texts = {run.label: found.texts[run.label] for run in runs if run.label in found.texts}
    corpus = None
    if texts:
        first = next(run.run for run in runs if run.label in texts)
        references = texts[first.label].references
        resamples = make_resamples(np.arange(len(references)), options)
        corpus = make_corpus(first, references, options.subset, resamples)
        sources = next((item.sources for item in texts.values() if item.sources is not None), None)
        if comet is not None and sources is not None:
            metric = Comet(comet, sources, references)
            corpus = replace(corpus, metrics={**corpus.metrics, "COMET": metric})
        elif comet is not None:
            warn(
                f"{found.name}: no run has the source text (hyps/{options.subset}.src.txt), so no COMET"
            )
        quiet = comet is None  # BLEU and chrF take no time
        runs = [
            replace(run, translations=corpus.translations(texts[run.label]))
            if run.label in texts
            else run
            for run in progress(runs, desc=f"COMET {found.name}", unit="run", disable=quiet)
        ]
    return Direction(found.name, tuple(runs), tokens, drawn, cuts, corpus)


def make_resamples(lines: NDArray[np.integer], options: Options) -> Resamples:
    """Resamples of the sentences at some lines of the test set; the same for all directions of equally
    many sentences."""
    documents = None
    if options.documents:
        own = np.array(options.documents, dtype=object)[lines]
        documents = np.unique(own.astype(str), return_inverse=True)[1]
    rng = np.random.default_rng([options.seed, len(lines)])
    return Resamples(len(lines), options.resamples, rng, documents)


def _read_records(
    runs: Sequence[ScoredRun], found: Found, options: Options, bar: Any
) -> tuple[list[ScoredRun], dict[tuple[str, str], Partition]]:
    """The runs with their sums, and the partition of every two that are compared.

    Raises
    ------
    UserError
        No run is left, or none that can define the buckets.
    """
    tokens = found.tokens
    assert tokens is not None
    kept = {run.label: run for run in runs}

    def leave_out(run: ScoredRun, error: RecordError) -> None:
        del kept[run.label]
        found.leave_out(run.run, str(error))

    def scored() -> list[ScoredRun]:
        return [run for run in kept.values() if run.step is not None]

    references: list[Reference] = []
    for run in reference_runs(found.name, scored(), options):
        try:
            references.append(read_reference(run, options.subset))
        except RecordError as error:
            leave_out(run, error)
    if not scored():
        raise UserError("no run with usable token records is left")
    if not references:
        raise UserError(f"{found.name}: no run that defines the buckets is left")
    first = scored()[0]
    assert first.step is not None
    cutter = Cutter(references, tokens, options, first.run.records(options.subset, first.step))
    own = {run.label: cutter.cut(run) for run in scored()}
    cuts: dict[tuple[str, str], Partition] = {}
    needed: dict[str, dict[tuple[str, ...], Partition]] = {
        label: {partition.selector: partition} for label, partition in own.items()
    }
    for run, other in _compared(scored(), found.texts, options):
        partition = cuts[run.label, other.label] = cutter.cut(run, other)
        for label in (run.label, other.label):
            needed[label][partition.selector] = partition

    def read(run: ScoredRun) -> RecordSums:
        assert run.step is not None
        path = run.run.records(options.subset, run.step)
        return sum_records(path, tokens, list(needed[run.label].values()))

    def each() -> Iterator[tuple[ScoredRun, RecordSums]]:
        for run in scored():
            try:
                yield run, read(run)
            except RecordError as error:
                leave_out(run, error)
            bar.update()

    def finished(item: tuple[ScoredRun, RecordSums]) -> ScoredRun:
        run, sums = item
        return replace(
            run,
            partition=own[run.label],
            sums=dict(zip(needed[run.label], sums.by_partition, strict=True)),
            kl=sums.kl,
        )

    done = list(ordered_map(finished, each()))
    if not scored():
        raise UserError("no run with usable token records is left")
    if len(done) < len(own):  # other runs are compared now than those whose sums were made
        return _read_records([run for run in runs if run.label in kept], found, options, bar)
    for run in done:
        history, reasons = read_history(run, options.subset, tokens)
        found.left_out.extend(reasons)
        kept[run.label] = replace(run, history=history)
    if len({run.seed for run in scored()}) == 1:
        warn(
            f"{found.name}: all runs have seed {scored()[0].seed}, and the run that decides which tokens "
            "are hard may share errors with one of those compared; no verdict follows, train other seeds"
        )
    return list(kept.values()), cuts


def _compared(
    scored: Sequence[ScoredRun], texts: Mapping[str, Texts], options: Options
) -> Iterator[tuple[ScoredRun, ScoredRun]]:
    """Every two runs that some table compares, of all that are scored or of those with translations."""
    for runs in (scored, [run for run in scored if run.label in texts]):
        for run, baseline in itertools.product(runs, options.baselines):
            other = partner(run, runs, baseline)
            if other is not None:
                yield run, other
        yield from placebo_couples(of_method(runs, options.baseline))
        for run in runs:
            yield from placebo_couples(peers(run, runs, options.baseline))


def read_history(
    run: ScoredRun, subset: str, tokens: TokenSet
) -> tuple[dict[int, Any], list[LeftOut]]:
    """KL of each token at every step with records, (N,) each, where there are several; and the steps
    that cannot be used."""
    found: dict[int, Any] = {}
    left_out: list[LeftOut] = []
    steps = run.run.steps(subset)
    for step in steps if len(steps) > 1 else []:
        path = run.run.records(subset, step)
        try:
            if step == run.step:
                found[step] = run.kl
                continue
            if read_token_set(path).digest != tokens.digest:
                raise RecordError(f"{path}: other tokens or another teacher than the last step")
            found[step] = read_columns(path, ["kl"])["kl"].astype(np.float32)
        except RecordError as error:
            left_out.append(LeftOut(f"{run.label} step {step}", str(error)))
    return found, left_out
