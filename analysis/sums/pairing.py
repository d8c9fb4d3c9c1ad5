"""Variants of methods, and which run is compared with which."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from analysis.runs.methods import Method, label_of, ordered
from analysis.runs.run_record import Run

#: What every table of gains compares with, besides the baseline of the claims.
BASELINES = ("finetune", "word_kd")


class Named(Protocol):
    """What pairing needs to know of a run."""

    @property
    def label(self) -> str:
        """Unique."""

    @property
    def seed(self) -> int:
        """Of the training."""

    @property
    def method(self) -> Method:
        """With its variant."""

    @property
    def parameters(self) -> int | None:
        """Of the model."""


R = TypeVar("R", bound=Named)


def name_variants(runs: Sequence[Run]) -> dict[str, Method]:
    """The method of each run, by label: runs of one method, direction and seed are told apart by the
    hyper-parameters that differ, and by how many parameters the model has.

    ``se_kd_student`` becomes ``se_kd_student (gamma=0.9)``, unless its Γ is the usual one: the value
    that most runs of all methods have. So the usual variant of a method keeps the method's name. Where
    nothing differs but the directory, the later ones take their label.
    """
    groups: dict[tuple[str, str, int], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.method, run.direction, run.seed].append(run)
    differing: dict[str, set[str]] = defaultdict(set)
    for (method, _, _), group in groups.items():
        flat = [_settings(run) for run in group]
        for key in {key for item in flat for key in item}:
            if len({repr(item.get(key)) for item in flat}) > 1:
                differing[method].add(key)
    usual = _usual_values(runs)
    named: dict[str, Method] = {}
    taken: set[tuple[str, str, str, int]] = set()
    for run in sorted(runs, key=lambda run: run.label):
        flat_run = _settings(run)
        shown = [
            f"{key.rsplit('.', 1)[-1]}={flat_run[key]}"
            for key in sorted(differing[run.method])
            if key in flat_run and repr(flat_run[key]) != usual.get(key)
        ]
        variant = f"({', '.join(shown)})" if shown else ""
        if (run.method, variant, run.direction, run.seed) in taken:
            variant = f"{variant} [{run.label}]".strip()
        taken.add((run.method, variant, run.direction, run.seed))
        named[run.label] = Method(run.method, variant)
    return named


def _usual_values(runs: Sequence[Run]) -> dict[str, str]:
    """The most frequent value of each hyper-parameter, as its repr; none where two are as frequent."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for run in runs:
        for key, value in _settings(run).items():
            counts[key][repr(value)] += 1
    usual = {}
    for key, found in counts.items():
        (first, count), *others = found.most_common(2)
        if not others or others[0][1] < count:
            usual[key] = first
    return usual


def _settings(run: Run) -> dict[str, Any]:
    """What may tell a run from others of its method."""
    size = {} if run.parameters is None else {"parameters": run.parameters}
    return flatten(run.hyperparameters) | size


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def mixed_settings(runs: Iterable[tuple[Method, Run]]) -> list[str]:
    """In what the runs of each method differ besides the seed, of runs of one direction.

    :func:`name_variants` tells apart what was trained with one seed; two settings that share no seed look
    like two seeds of one method.
    """
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for method, run in runs:
        groups[str(method)].append(_settings(run))
    told = []
    for name in ordered(groups):
        differing = []
        for key in sorted({key for item in groups[name] for key in item}):
            values = list(dict.fromkeys(str(item.get(key, "none")) for item in groups[name]))
            if len(values) > 1:
                differing.append(f"{key.rsplit('.', 1)[-1]} {', '.join(values)}")
        if differing:
            told.append(
                f"the runs of {label_of(name)} differ in more than the seed and count as one method "
                f"({'; '.join(differing)})"
            )
    return told


def of_method(runs: Sequence[R], name: str) -> list[R]:
    """The runs of a method of one direction; of one with several variants the usual, else the first."""
    same = [run for run in runs if name in (str(run.method), run.method.id)]
    exact = [run for run in same if str(run.method) == name]
    first = min((str(run.method) for run in same), default="")
    return exact or [run for run in same if str(run.method) == first]


def peers(run: Named, candidates: Sequence[R], method: str) -> list[R]:
    """The runs of ``method``, of the same direction, among which is the one that ``run`` is compared with:
    those of models with as many parameters, where there are any."""
    alike = [other for other in candidates if other.parameters == run.parameters]
    return of_method(alike, method) or of_method(candidates, method)


def partner(run: Named, candidates: Sequence[R], method: str) -> R | None:
    """The run of ``method`` that ``run`` is compared with: the only one of its :func:`peers`, else the one of
    the same seed, else None."""
    same = peers(run, candidates, method)
    if len(same) == 1:
        return same[0]
    return next((other for other in same if other.seed == run.seed), None)


def couples(runs: Sequence[R], candidates: Sequence[R], baseline: str) -> list[tuple[R, R]]:
    """Runs of a method, each with the run of ``baseline`` that it is compared with, by seed.

    A baseline's run stands in one couple only, with the run of its own seed if there is one: its error
    from training would otherwise be in all of them, and three couples would count as three seeds.
    """
    found: dict[str, tuple[R, R]] = {}
    for run in sorted(runs, key=lambda run: (run.seed, run.label)):
        other = partner(run, candidates, baseline)
        if other is None or other.label == run.label:
            continue
        if other.label not in found or (
            run.seed == other.seed != found[other.label][0].seed  # its own seed's comes first
        ):
            found[other.label] = (run, other)
    return sorted(found.values(), key=lambda couple: (couple[0].seed, couple[0].label))


def placebo_couples(runs: Sequence[R]) -> list[tuple[R, R]]:
    """The runs of a baseline, each with the one of its next seed, the last with the first. None with
    fewer than two seeds.

    Every run stands once on either side, so their differences cancel: the mean is 0 by construction (but
    for tokens that differ from couple to couple), and says nothing. The interval shows the spread between seeds, wider by sqrt(S / (S - 1)) than that of
    two equal methods of S seeds.
    """
    by_seed = {run.seed: run for run in reversed(runs)}
    own = [by_seed[seed] for seed in sorted(by_seed)]
    if len(own) < 2:
        return []
    return list(zip([*own[1:], own[0]], own, strict=True))
