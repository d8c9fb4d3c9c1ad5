"""How hard the tokens are for each method."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.chapters.chapter import Figure
from analysis.chapters.quality import RUN_COLUMNS
from analysis.chapters.transfer import run_columns
from analysis.runs.methods import label_of
from analysis.stats import Floats
from analysis.style import Look, among, direction_panels
from analysis.sums.direction import Direction, Options

HISTOGRAM_BINS = 45


def difficulty_table(directions: Sequence[Direction], options: Options) -> pd.DataFrame:
    """A histogram of each run's token difficulty KL(p || q), bins of equal width in log10.

    The first bin also holds what lies below it, the last what lies above. ``gamma`` is the Γ in nats
    under which the run is judged.
    """
    edges = np.logspace(-5, 1.5, HISTOGRAM_BINS + 1)
    rows: list[dict[str, Any]] = []
    for direction in directions:
        for run in direction.scored:
            assert run.kl is not None
            counts = _histogram(run.kl.astype(np.float64), edges)
            for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
                rows.append(
                    {
                        **run_columns(direction, run),
                        "low": low,
                        "high": high,
                        "tokens": int(count),
                        "share": count / len(run.kl),
                        "gamma": run.cut.gamma,
                    }
                )
    return pd.DataFrame(rows, columns=None if rows else RUN_COLUMNS)


def _histogram(values: Floats, edges: Floats) -> NDArray[np.int64]:
    bins = np.searchsorted(edges, values, side="right") - 1
    return np.bincount(np.clip(bins, 0, len(edges) - 2), minlength=len(edges) - 1)


def draw_difficulty(table: pd.DataFrame, path: Path, looks: Mapping[str, Look]) -> None:
    """Distribution of token difficulty by method (mean over seeds), with Γ, a panel a direction."""
    with direction_panels(table, 1.9, path) as panels:
        for axis, part in panels:
            for method, look in among(looks, table["method"]).items():
                own = part[part["method"] == method]
                if own.empty:
                    continue
                mean = own.groupby(["low", "high"], as_index=False)["share"].mean()
                centre = np.sqrt(mean["low"] * mean["high"])
                axis.plot(
                    centre,
                    mean["share"] * 100,
                    color=look.colour,
                    linestyle=look.line,
                    label=label_of(method),
                )
            gamma = part["gamma"].mean()
            axis.axvline(gamma, color="0.35", linewidth=0.8, linestyle=(0, (2, 2)))
            axis.annotate(
                f" Γ = {gamma:.2g}",
                (gamma, 1.0),
                xycoords=("data", "axes fraction"),
                va="top",
                fontsize="small",
                color="0.25",
            )
            axis.set_xscale("log")
            axis.set_ylim(bottom=0)
            axis.set_xlabel("difficulty KL(p‖q), nats")
            axis.set_ylabel("tokens, %")
        panels[0][0].legend(loc="upper left", handlelength=2.4)


FIGURE = Figure(
    "difficulty",
    draw_difficulty,
    "How hard the tokens are for each method: distribution of the KL to the teacher; Γ cuts easy and "
    "hard.",
    by_look=True,
)
