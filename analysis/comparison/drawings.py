"""The figures of a comparison: each system has one colour and mark in all of them."""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

from analysis.style import COLOURS, MARKERS, PAGE, figure, save

matplotlib.use("Agg")

#: What the axis of a column of buckets says.
_AXES = {"frequency": "occurrences in the training data", "words": "words of the reference"}


def draw_scores(scores: pd.DataFrame, path: Path) -> None:
    """A panel a metric, a row a system, with intervals."""
    metrics = list(scores["metric"].unique())
    systems = list(scores["system"].unique())
    with figure(PAGE, 0.6 + 0.2 * len(systems), 1, len(metrics)) as (drawn, axes):
        for axis, metric in zip(axes, metrics, strict=True):
            own = scores[scores["metric"] == metric].set_index("system").loc[systems]
            for place, (system, row) in enumerate(own.iterrows()):
                axis.plot([row["low"], row["high"]], [place] * 2, color=_colour(systems, system))
                axis.plot(
                    row["score"], place, _marker(systems, system), color=_colour(systems, system)
                )
            shown = systems if axis is axes[0] else [""] * len(systems)
            axis.set_yticks(range(len(systems)), shown)
            axis.invert_yaxis()
            axis.margins(y=0.15)
            axis.set_xlabel(metric)
        save(drawn, path)


def draw_buckets(table: pd.DataFrame, bucket: str, value: str, path: Path) -> None:
    """A mark a system in each bucket, with the interval ``low`` to ``high`` where there is one."""
    buckets, systems = list(table[bucket].unique()), list(table["system"].unique())
    with figure(PAGE, 1.9) as (drawn, (axis,)):
        for index, system in enumerate(systems):
            own = table[table["system"] == system]
            place = np.arange(len(buckets)) + (index - (len(systems) - 1) / 2) * 0.7 / len(systems)
            errors = None
            if "low" in own:
                errors = np.stack([own[value] - own["low"], own["high"] - own[value]])
            axis.errorbar(
                place,
                own[value],
                yerr=errors,
                fmt=_marker(systems, system),
                color=_colour(systems, system),
                elinewidth=0.7,
                label=system,
            )
        axis.set_xticks(range(len(buckets)), buckets)
        axis.set_xlabel(_AXES[bucket])
        axis.set_ylabel("F-measure" if value == "f" else value)
        axis.legend()
        save(drawn, path)


def _colour(systems: list[str], system: object) -> str:
    return COLOURS[systems.index(str(system)) % len(COLOURS)]


def _marker(systems: list[str], system: object) -> str:
    place = systems.index(str(system))  # a colour that comes again has another marker
    return MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]
