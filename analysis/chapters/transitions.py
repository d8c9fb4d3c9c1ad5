"""Tokens that move between easy and hard while a run trains."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from numpy.typing import NDArray

from analysis.chapters.chapter import Figure
from analysis.runs.methods import label_of, ordered
from analysis.style import COLUMN, PAGE, Look, comparable, figure, hide, save
from analysis.sums.direction import Direction, Options

STATES = ("easy", "hard")


def transition_table(directions: Sequence[Direction], options: Options) -> pd.DataFrame:
    """One row a run, pair of steps, and pair of states: tokens, and the share of the tokens of the first
    state that went to the second. All pairs of steps, because of two runs one may have a checkpoint
    between two that both have."""
    rows: list[dict[str, Any]] = []
    for direction in directions:
        for run in direction.scored:
            for first, second in itertools.combinations(run.history, 2):
                matrix = transitions(run.history[first], run.history[second], run.cut.gamma)
                for before in range(2):
                    total = matrix[before].sum()
                    for after in range(2):
                        rows.append(
                            {
                                "direction": direction.name,
                                "method": str(run.method),
                                "seed": run.seed,
                                "run": run.label,
                                "from_step": first,
                                "to_step": second,
                                "from": STATES[before],
                                "to": STATES[after],
                                "tokens": int(matrix[before, after]),
                                "share": matrix[before, after] / total if total else np.nan,
                            }
                        )
    names = ["direction", "method", "seed", "run", "from_step", "to_step", "from", "to"]
    return pd.DataFrame(rows, columns=[*names, "tokens", "share"])


def transitions(
    before: NDArray[np.floating], after: NDArray[np.floating], gamma: float
) -> NDArray[np.int64]:
    """Tokens by state before (row) and after (column), easy first, (2, 2)."""
    codes = (before > gamma).astype(np.int64) * 2 + (after > gamma)
    return np.bincount(codes, minlength=4).reshape(2, 2)


def draw_transitions(table: pd.DataFrame, path: Path, looks: Mapping[str, Look]) -> None:
    """How tokens move between easy and hard from each scored checkpoint to the next: a panel a
    method, shares of all tokens of all seeds, mean over the directions that all methods have (without such
    a direction a panel a direction too)."""
    parts = comparable(table)
    panels = [
        (method, name, part[part["method"] == method])
        for method in ordered(table["method"])
        for name, part in parts
        if method in set(part["method"])
    ]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with figure(COLUMN if columns == 1 else PAGE, 1.7 * rows, rows, columns) as (drawn, axes):
        if len(parts) == 1 and table["direction"].nunique() > 1:
            drawn.suptitle(parts[0][0])
        for axis, (method, name, own) in zip(axes, panels, strict=False):
            steps = aligned(
                {
                    str(run): {*part["from_step"], *part["to_step"]}
                    for run, part in own.astype({"run": str}).groupby("run", sort=False)
                }
            )
            for place, (first, second) in enumerate(itertools.pairwise(steps)):
                run = own["run"].astype(str)
                between = (own["from_step"] == run.map(first)) & (own["to_step"] == run.map(second))
                _flow(axis, place, mean_shares(own[between]))
            if len(steps) < 2:
                axis.text(0.5, 0.5, "no two checkpoints\nthat all runs have", ha="center")
            axis.set_xticks(range(len(steps)), [_label(step.values()) for step in steps])
            axis.set_xlim(-0.15, len(steps) - 0.85)
            axis.set_ylim(0, 1)
            axis.set_yticks([0, 0.5, 1], ["0", "50", "100"])
            axis.set_ylabel("tokens, %")
            axis.set_xlabel("updates")
            axis.set_title(label_of(method) if len(parts) == 1 else f"{label_of(method)}, {name}")
        hide(axes[len(panels) :])
        marks = [
            Patch(facecolor=colour, hatch=hatch, edgecolor="black", linewidth=0.3)
            for colour, hatch in FLOWS.values()
        ]
        names = [f"{before} to {after}" for before, after in FLOWS]
        drawn.legend(marks, names, loc="outside lower center", ncols=4, handlelength=1.2)
        save(drawn, path)


def mean_shares(span: pd.DataFrame) -> dict[Any, float]:
    """Of some runs' tokens the share that went from one state to another, mean over directions."""
    tokens = span.groupby(["direction", "from", "to"])["tokens"].sum()
    shares = tokens / tokens.groupby("direction").transform("sum")
    return {key: float(value) for key, value in shares.groupby(["from", "to"]).mean().items()}


def aligned(steps: Mapping[str, Collection[int]]) -> list[dict[str, int]]:
    """Which steps of several runs belong together, in order; of each the step of every run.

    Equally many steps belong together one by one (the best checkpoint of each run lies at another
    update); otherwise only those that all runs have. So no mean is over other runs than the next.
    """
    ordered_steps = {run: sorted(found) for run, found in steps.items()}
    if len({len(found) for found in ordered_steps.values()}) == 1:
        columns = zip(*ordered_steps.values(), strict=True)
        return [dict(zip(ordered_steps, column, strict=True)) for column in columns]
    common = sorted(set.intersection(*(set(found) for found in ordered_steps.values())))
    return [dict.fromkeys(ordered_steps, step) for step in common]


def _label(steps: Collection[int]) -> str:
    low, high = min(steps), max(steps)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


#: Colour and hatch of each flow between states; what stays is pale.
FLOWS = {
    ("easy", "easy"): ("#d9e8f2", ""),
    ("hard", "easy"): ("#0072B2", ""),
    ("easy", "hard"): ("#D55E00", "////"),
    ("hard", "hard"): ("#f5dccb", "////"),
}


def _levels(share: dict[Any, float], order: Sequence[Any]) -> dict[Any, float]:
    """The lower edge of each ribbon, stacked in an order."""
    sizes = [share.get(key, 0.0) for key in order]
    return dict(zip(order, itertools.accumulate(sizes, initial=0.0), strict=False))


def _flow(axis: Axes, place: int, share: dict[Any, float]) -> None:
    """Ribbons from one step to the next: easy lies below, hard above."""
    states = ("easy", "hard")
    left = _levels(share, [(origin, goal) for origin in states for goal in states])
    right = _levels(share, [(origin, goal) for goal in states for origin in states])
    x = np.linspace(0, 1, 30)
    bend = x * x * (3 - 2 * x)
    for key, (colour, hatch) in FLOWS.items():
        size = share.get(key, 0.0)
        if size:
            low = left[key] + (right[key] - left[key]) * bend
            axis.fill_between(
                place + x,
                low,
                low + size,
                facecolor=colour,
                hatch=hatch,
                edgecolor="black",
                linewidth=0.2,
            )


FIGURE = Figure(
    "transitions",
    draw_transitions,
    "Tokens that move between easy and hard from one scored checkpoint to the next: all seeds, mean over the "
    "directions that all methods have, which stand above where there are several.",
    by_look=True,
)
