"""How results depend on one hyper-parameter at a time: Γ, λ_max, β, the schedule, and so on."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.judge import Judge
from analysis.quality import Quality
from analysis.runs.methods import Method
from analysis.runs.run_record import Run
from analysis.study import flatten

#: What the rows of the baseline have as their parameter.
BASELINE = "(baseline)"
COLUMNS = ["direction", "method", "parameter", "value", "seed", "run"]


def sensitivity_table(
    judges: Sequence[Judge], qualities: dict[str, Quality], baseline: str
) -> pd.DataFrame:
    """One row a run and hyper-parameter in which runs of its method differ.

    A run counts for a hyper-parameter if all the others are what most runs of its method have.
    Γ stands with its type (``q0.75`` is a quantile), because a number means nothing without it.
    Columns: BLEU, and KL over all and over hard tokens where there are records. The baseline's runs
    have the parameter ``(baseline)``; without a parameter that differs the table is empty.
    """
    judged = {judge.direction.name: judge for judge in judges}
    rows: list[dict[str, Any]] = []
    for direction in sorted({*judged, *qualities}):
        judge, quality = judged.get(direction), qualities.get(direction)
        runs = judge.direction.runs if judge else quality.runs() if quality else []
        groups: dict[str, list[Run]] = defaultdict(list)
        for run in runs:
            groups[Method.of(run.method).id].append(run)
        for method, group in groups.items():
            for run, parameter, value in one_at_a_time(group):
                row = _row(run, method, judge, quality)
                rows.append(row | {"parameter": parameter, "value": value})
    if rows:
        for direction in sorted({row["direction"] for row in rows}):
            judge, quality = judged.get(direction), qualities.get(direction)
            runs = judge.direction.runs if judge else quality.runs() if quality else []
            # Its usual variant, where it has several: that keeps the name.
            usual = [run for run in runs if run.method == baseline]
            for run in usual or [run for run in runs if Method.of(run.method).id == baseline]:
                row = _row(run, baseline, judge, quality)
                rows.append(row | {"parameter": BASELINE, "value": ""})
    return pd.DataFrame(rows, columns=[*COLUMNS, "BLEU", "kl", "kl_hard"])


def _row(run: Run, method: str, judge: Judge | None, quality: Quality | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "direction": run.direction,
        "method": method,
        "seed": run.seed,
        "run": run.label,
    }
    if quality is not None and run.label in quality.direction.texts:
        row["BLEU"] = quality.corpus_score(run, "BLEU")
    if judge is not None and run.label in judge.direction.scored:
        partition = judge.partition(run)
        easy_hard = partition.columns("difficulty")
        kl = judge.sums(run, partition).totals[easy_hard, 0]
        tokens = partition.tokens[easy_hard]
        row["kl"] = float(kl.sum() / tokens.sum())
        row["kl_hard"] = float(kl[1] / tokens[1]) if tokens[1] else np.nan
    return row


def one_at_a_time(runs: Sequence[Run]) -> list[tuple[Run, str, str]]:
    """(run, hyper-parameter, value) of runs that differ from the usual one in that alone."""
    settings = [parameters(run) for run in runs]
    names = sorted({name for setting in settings for name in setting})
    differing = [name for name in names if len({setting.get(name) for setting in settings}) > 1]
    # Of values that are equally frequent the first by name, so that the order of runs is no matter.
    usual = {}
    for name in differing:
        counts = Counter(setting.get(name, "") for setting in settings)
        usual[name] = min(counts, key=lambda value: (-counts[value], value))
    found = []
    for name in differing:
        others = [other for other in differing if other != name]
        for run, setting in zip(runs, settings, strict=True):
            if all(setting.get(other, "") == usual[other] for other in others):
                found.append((run, name, setting.get(name, "none")))
    several = {name for name in differing if len({v for _, n, v in found if n == name}) > 1}
    return [item for item in found if item[1] in several]


def parameters(run: Run) -> dict[str, str]:
    """A run's hyper-parameters as text, Γ together with its type."""
    flat = {key.rsplit(".", 1)[-1]: value for key, value in flatten(run.hyperparameters).items()}
    kind = flat.pop("gamma_type", None)
    text = {key: str(value) for key, value in flat.items()}
    if kind is not None and "gamma" in text:
        short = {"absolute": "", "quantile": "q", "running_quantile": "rq"}.get(
            str(kind), f"{kind} "
        )
        text["gamma"] = short + text["gamma"]
    return text


def value_key(value: str) -> tuple[str, float, str]:
    """Sorts values: by a leading word, then as numbers."""
    head = value.rstrip("0123456789.e+-")
    try:
        return head, float(value[len(head) :]), value
    except ValueError:
        return value, 0.0, value
