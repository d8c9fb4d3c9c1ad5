"""Which runs can be compared with which: directions, test sets, variants, baselines."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from analysis.runs.errors import UserError
from analysis.runs.methods import Method
from analysis.runs.run_record import LeftOut, Run, discover
from analysis.runs.texts import Texts, read_texts
from analysis.runs.token_records import TokenSet, read_token_set
from analysis.terminal import progress, warn


@dataclass
class Direction:
    """The runs of one translation direction that share one test set.

    Attributes
    ----------
    runs : every run, sorted by label
    tokens : the reference tokens that all ``scored`` runs hold; None where no run has records
    scored : label to the step whose records stand for the finished run
    texts : label to translations
    unsealed : labels of runs with files that have no checksum
    """

    name: str
    runs: list[Run]
    tokens: TokenSet | None = None
    scored: dict[str, int] = field(default_factory=dict)
    texts: dict[str, Texts] = field(default_factory=dict)
    unsealed: set[str] = field(default_factory=set)

    def scored_runs(self) -> list[Run]:
        """The runs with token records."""
        return [run for run in self.runs if run.label in self.scored]


@dataclass
class Study:
    """Everything that a report compares."""

    subset: str
    directions: list[Direction]
    left_out: list[LeftOut]

    @property
    def runs(self) -> list[Run]:
        """Every run of every direction."""
        return [run for direction in self.directions for run in direction.runs]


def load_study(root: Path, subset: str) -> Study:
    """Find the runs of ``root`` and the test set of each direction; leave out what does not fit.

    Raises
    ------
    UserError
        No run directory, or none with token records of ``subset``.
    """
    found, left_out = discover(root)
    runs = name_variants(found)
    directions = []
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.direction].append(run)
    with progress(total=len(runs), desc="find tokens", unit="run") as bar:
        for name in sorted(groups):
            directions.append(_load_direction(name, groups[name], subset, left_out, bar))
    directions = [direction for direction in directions if direction.runs]
    left_out.sort(key=lambda item: item.label)
    if not any(direction.scored for direction in directions):
        reasons = (
            "; ".join(f"{item.label}: {item.reason}" for item in left_out) or "none was scored"
        )
        raise UserError(
            f"{root}: expected at least one run with token records of {subset!r} "
            f"(tokens/{subset}/STEP.parquet), found none; score a run first ({reasons})"
        )
    study = Study(subset, directions, left_out)
    if unsealed := sorted(label for one in directions for label in one.unsealed):
        warn(
            f"{len(unsealed)} of {len(study.runs)} runs, {unsealed[0]} the first, have files without a "
            "checksum, as earlier versions and other programs write them: damage to these goes unseen"
        )
    return study


def _load_direction(
    name: str, runs: Sequence[Run], subset: str, left_out: list[LeftOut], bar: Any
) -> Direction:
    direction = Direction(name, list(runs))
    sets: dict[str, TokenSet] = {}
    for run in runs:
        bar.update()
        try:
            texts = read_texts(run.path, subset)
            if texts:
                direction.texts[run.label] = texts
            step = run.last_step(subset)
            if step is not None:
                sets[run.label] = read_token_set(run.records(subset, step))
                direction.scored[run.label] = step
        except UserError as error:
            _leave_out(direction, run, str(error), left_out)
            continue
        if not all(file.sealed for file in (run, texts, sets.get(run.label)) if file):
            direction.unsealed.add(run.label)
        if not texts and step is None:
            _leave_out(direction, run, f"no token records or translations of {subset}", left_out)
    by_label = {run.label: run for run in runs}
    common = _most_common({label: item.digest for label, item in sets.items()}, by_label)
    for item in sets.values():
        if item.digest == common:
            direction.tokens = direction.tokens or item
    for label, item in sets.items():
        chosen = direction.tokens
        if item.digest != common and chosen is not None and label in direction.scored:
            what = "teacher cache" if item.teacher != chosen.teacher else "test set"
            reason = (
                f"its token records are of another {what} ({len(item.token)} tokens, cache "
                f"{item.teacher or '?'}) than most {name} runs ({len(chosen.token)} tokens, cache "
                f"{chosen.teacher or '?'})"
            )
            _leave_out(direction, by_label[label], reason, left_out)
    digests = {label: texts.digest for label, texts in direction.texts.items()}
    common = _most_common(digests, by_label)
    for label, digest in digests.items():
        if digest != common:
            reason = f"its references (hyps/{subset}.ref.txt) differ from most {name} runs'"
            _leave_out(direction, by_label[label], reason, left_out)
    _check_lines(direction, subset, left_out)
    return direction


def _check_lines(direction: Direction, subset: str, left_out: list[LeftOut]) -> None:
    """Leave out translations that cannot belong to the sentences of the token records."""
    if direction.tokens is None:
        return
    last = int(direction.tokens.sentences[-1])
    for label, texts in list(direction.texts.items()):
        if len(texts.references) <= last and label in direction.scored:
            run = next(run for run in direction.runs if run.label == label)
            reason = (
                f"hyps/{subset}.txt has {len(texts.references)} lines, but the token records name "
                f"sentence {last}"
            )
            _leave_out(direction, run, reason, left_out)


def _leave_out(direction: Direction, run: Run, reason: str, left_out: list[LeftOut]) -> None:
    if run in direction.runs:
        direction.runs.remove(run)
        left_out.append(LeftOut(run.label, reason))
    direction.scored.pop(run.label, None)
    direction.texts.pop(run.label, None)


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


def name_variants(runs: Sequence[Run]) -> list[Run]:
    """Tell apart runs of one method, direction and seed by the hyper-parameters that differ.

    ``se_kd_student`` becomes ``se_kd_student (gamma=0.9)``, unless its Γ is the usual one: the value
    that most runs of all methods have. So the usual variant of a method keeps the method's name. Where
    nothing differs but the directory, the later ones take their label.
    """
    groups: dict[tuple[str, str, int], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.method, run.direction, run.seed].append(run)
    differing: dict[str, set[str]] = defaultdict(set)
    for (method, _, _), group in groups.items():
        flat = [flatten(run.hyperparameters) for run in group]
        for key in {key for item in flat for key in item}:
            if len({repr(item.get(key)) for item in flat}) > 1:
                differing[method].add(key)
    usual = _usual_values(runs)
    named: list[Run] = []
    taken: set[tuple[str, str, int]] = set()
    for run in sorted(runs, key=lambda run: run.label):
        method = run.method
        flat_run = flatten(run.hyperparameters)
        shown = [
            f"{key.rsplit('.', 1)[-1]}={flat_run[key]}"
            for key in sorted(differing[method])
            if key in flat_run and repr(flat_run[key]) != usual.get(key)
        ]
        if shown:
            method = f"{method} ({', '.join(shown)})"
        if (method, run.direction, run.seed) in taken:
            method = f"{method} [{run.label}]"
        taken.add((method, run.direction, run.seed))
        named.append(replace(run, method=method))
    return named


def _usual_values(runs: Sequence[Run]) -> dict[str, str]:
    """The most frequent value of each hyper-parameter, as its repr; none where two are as frequent."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for run in runs:
        for key, value in flatten(run.hyperparameters).items():
            counts[key][repr(value)] += 1
    usual = {}
    for key, found in counts.items():
        (first, count), *others = found.most_common(2)
        if not others or others[0][1] < count:
            usual[key] = first
    return usual


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def partner(run: Run, candidates: Sequence[Run], method: str) -> Run | None:
    """The run of ``method`` that ``run`` is compared with.

    Of the same direction; the only one there is, else the one of the same seed, else None. A method
    with several variants is represented by its first.
    """
    same = [
        other
        for other in candidates
        if other.direction == run.direction
        and (other.method == method or Method.of(other.method).id == method)
    ]
    exact = [other for other in same if other.method == method]
    same = exact or [other for other in same if other.method == min(item.method for item in same)]
    if len(same) == 1:
        return same[0]
    return next((other for other in same if other.seed == run.seed), None)


def couples(runs: Sequence[Run], candidates: Sequence[Run], baseline: str) -> list[tuple[Run, Run]]:
    """Runs of a method, each with the run of ``baseline`` that it is compared with, by seed.

    A baseline's run stands in one couple only, with the run of its own seed if there is one: its error
    from training would otherwise be in all of them, and three couples would count as three seeds.
    """
    found: dict[str, tuple[Run, Run]] = {}
    for run in sorted(runs, key=lambda run: (run.seed, run.label)):
        other = partner(run, candidates, baseline)
        if other is None or other.label == run.label:
            continue
        if other.label not in found or (
            run.seed == other.seed != found[other.label][0].seed  # its own seed's comes first
        ):
            found[other.label] = (run, other)
    return sorted(found.values(), key=lambda couple: (couple[0].seed, couple[0].label))
