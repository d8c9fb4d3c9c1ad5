"""How results depend on one hyper-parameter at a time: Γ, λ_max, β, the schedule, and so on."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from analysis.chapters.chapter import Figure
from analysis.runs.methods import label_of
from analysis.runs.run_record import Run
from analysis.style import (
    COLUMN,
    PAGE,
    Look,
    among,
    comparable,
    direction_mean,
    figure,
    hide,
    save,
)
from analysis.sums.direction import Direction, Options, ScoredRun
from analysis.sums.pairing import flatten

#: What the rows of the baseline have as their parameter.
BASELINE = "(baseline)"
COLUMNS = ["direction", "method", "parameter", "value", "seed", "run"]


def sensitivity_table(directions: Sequence[Direction], options: Options) -> pd.DataFrame:
    """One row a run and hyper-parameter in which runs of its method differ.

    A run counts for a hyper-parameter if all the others are what most runs of its method have.
    Γ stands with its type (``q0.75`` is a quantile), because a number means nothing without it.
    Columns: BLEU, and KL over all and over hard tokens where there are records. The baseline's runs
    have the parameter ``(baseline)``; without a parameter that differs the table is empty.
    """
    rows: list[dict[str, Any]] = []
    for direction in directions:
        groups: dict[str, list[ScoredRun]] = defaultdict(list)
        for run in direction.runs:
            groups[run.method.id].append(run)
        for group in groups.values():
            for run, parameter, value in one_at_a_time(group):
                rows.append(_row(direction, run) | {"parameter": parameter, "value": value})
    present = {row["direction"] for row in rows}
    for direction in directions:
        if direction.name in present:
            # Its usual variant, where it has several: that keeps the name.
            usual = [run for run in direction.runs if str(run.method) == options.baseline]
            for run in usual or [
                run for run in direction.runs if run.method.id == options.baseline
            ]:
                row = _row(direction, run) | {"method": options.baseline}
                rows.append(row | {"parameter": BASELINE, "value": ""})
    return pd.DataFrame(rows, columns=[*COLUMNS, "BLEU", "kl", "kl_hard"])


def _row(direction: Direction, run: ScoredRun) -> dict[str, Any]:
    row: dict[str, Any] = {
        "direction": direction.name,
        "method": run.method.id,
        "seed": run.seed,
        "run": run.label,
    }
    if direction.corpus is not None and run.translations is not None:
        row["BLEU"] = direction.corpus.corpus_score(run.translations, "BLEU")
    if run.partition is not None:
        easy_hard = run.partition.columns("difficulty")
        kl = run.under(run.partition).total("kl")[easy_hard]
        tokens = run.partition.tokens[easy_hard]
        row["kl"] = float(kl.sum() / tokens.sum())
        row["kl_hard"] = float(kl[1] / tokens[1]) if tokens[1] else np.nan
    return row


def one_at_a_time(runs: Sequence[ScoredRun]) -> list[tuple[ScoredRun, str, str]]:
    """(run, hyper-parameter, value) of runs that differ from the usual one in that alone."""
    settings = [parameters(run.run) for run in runs]
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


#: Hyper-parameters as the equations write them.
SYMBOLS = {"gamma": "Γ", "lambda_max": "λ_max", "beta": "β", "alpha": "α"}


def draw_sensitivity(table: pd.DataFrame, path: Path, looks: Mapping[str, Look]) -> None:
    """BLEU (without translations KL to the teacher) by the value of one hyper-parameter, the others as in
    most runs, a panel each: means over seeds, then over the directions that all values have (without such a
    direction a panel each), the runs as points; the broken line is word-level KD. Values stand beside each
    other as they are, so no line joins them."""
    measure = "BLEU" if table["BLEU"].notna().any() else "kl"
    own = table[table["parameter"] != BASELINE].astype({"value": str})
    shown = among(looks, own["method"])
    panels = []
    for parameter, part in own.groupby("parameter"):
        scored = part.dropna(subset=measure)
        parts = comparable(scored, by=("method", "value")) if len(scored) else [("", scored)]
        panels += [(str(parameter), part, *item) for item in parts]
    rows = -(-len(panels) // 2)
    width = COLUMN if len(panels) == 1 else PAGE
    with figure(width, 1.9 * rows, rows, min(2, len(panels))) as (drawn, axes):
        for axis, (parameter, part, title, scored) in zip(axes, panels, strict=False):
            over = set(scored["direction"]) or set(part["direction"])
            values = sorted(set(part.loc[part["direction"].isin(over), "value"]), key=value_key)
            for index, (method, look) in enumerate(shown.items()):
                runs = scored[scored["method"] == method]
                if runs.empty:
                    continue
                aside = (index - (len(shown) - 1) / 2) * 0.5 / len(shown)
                runs = runs.assign(place=runs["value"].map(values.index) + aside)
                mean = direction_mean(runs, "place", measure)
                axis.plot(
                    runs["place"], runs[measure], ".", color=look.colour, markersize=2, alpha=0.6
                )
                axis.plot(mean.index, mean, color=look.colour, linestyle="none", marker=look.marker)
            for value in set(values) - set(scored["value"]):
                inside = axis.get_xaxis_transform()
                axis.text(
                    values.index(value), 0.5, f"no {measure}", transform=inside, ha="center",
                    fontsize="small", color="0.4",
                )  # fmt: skip
            baseline = table[(table["parameter"] == BASELINE) & table[measure].notna()]
            level = baseline.groupby("direction")[measure].mean()
            if over <= set(level.index):
                mean = level[sorted(over)].mean()
                axis.axhline(mean, color="0.5", linewidth=0.7, linestyle=(0, (4, 2)))
            axis.set_title(title if own["direction"].nunique() > 1 else "")
            axis.set_xticks(range(len(values)), values)
            axis.set_xlim(-0.5, len(values) - 0.5)
            axis.margins(y=0.1)
            axis.grid(axis="y", linewidth=0.3, color="0.85")
            axis.set_xlabel(SYMBOLS.get(parameter, parameter.replace("_", " ")))
            axis.set_ylabel("BLEU" if measure == "BLEU" else "KL(p‖q), nats")
        hide(axes[len(panels) :])
        handles = [
            Line2D([], [], color=look.colour, linestyle="none", marker=look.marker)
            for look in shown.values()
        ]
        axes[0].legend(handles, [label_of(method) for method in shown], loc="best")
        save(drawn, path)


FIGURE = Figure(
    "sensitivity",
    draw_sensitivity,
    "BLEU (without translations the KL to the teacher) by one hyper-parameter at a time, the others as in most "
    "runs: means over seeds and then over the directions that all values have, which stand above where there "
    "are several, and the runs as points; the broken line is the baseline.",
)
