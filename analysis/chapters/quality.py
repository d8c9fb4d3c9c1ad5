"""Translation quality by run: sacreBLEU's scores, intervals and significance tests."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.chapters.chapter import Figure
from analysis.runs.methods import label_of, ordered
from analysis.style import Look, abreast, direction_panels
from analysis.sums.direction import Direction, Options, ScoredRun
from analysis.sums.pairing import BASELINES, partner
from analysis.sums.significance import PairedScores, Significance
from analysis.terminal import progress

#: Columns of a table without rows.
RUN_COLUMNS = ["direction", "method", "seed", "run"]


def results_table(directions: Sequence[Direction], options: Options) -> pd.DataFrame:
    """One row a run: scores with bootstrap intervals, and gains over the baselines with p-values.

    ``*_p_bootstrap_*`` is sacreBLEU's paired bootstrap, ``*_p_randomisation_*`` its approximate
    randomisation; both compare two runs on the same sentences and know nothing of seeds.
    """
    rows: list[dict[str, Any]] = []
    total = sum(len(direction.translated) for direction in directions)
    with progress(total=total, desc="score translations", unit="run") as bar:
        for direction in directions:
            if direction.corpus is None:
                continue
            tests = Significance(direction.corpus)
            for run in direction.translated:
                rows.append(_result(direction, tests, run))
                bar.update()
    return pd.DataFrame(rows, columns=None if rows else RUN_COLUMNS)


def _result(direction: Direction, tests: Significance, run: ScoredRun) -> dict[str, Any]:
    corpus = direction.corpus
    assert corpus is not None
    row: dict[str, Any] = {
        "direction": direction.name,
        "method": str(run.method),
        "seed": run.seed,
        "run": run.label,
        "updates": run.run.updates,
        "parameters": run.run.parameters,
        "sentences": corpus.sentences,
    }
    for name in corpus.metrics:
        score = tests.score(run, name)
        row[name] = score.score
        row[f"{name}_low"], row[f"{name}_high"] = score._mean - score._ci, score._mean + score._ci
    for name, metric in corpus.metrics.items():
        row[f"{name}_signature"] = str(metric.get_signature())
    for baseline in BASELINES:
        other = partner(run, direction.translated, baseline)
        for name in corpus.metrics:
            found = PairedScores(np.nan, np.nan, np.nan)
            if other is not None and run.method.id != "teacher" and run.method != other.method:
                found = tests.compare(run, other, name)
            row[f"{name}_gain_over_{baseline}"] = found.gain
            row[f"{name}_p_bootstrap_over_{baseline}"] = found.p_bootstrap
            row[f"{name}_p_randomisation_over_{baseline}"] = found.p_randomisation
    return row


def draw_quality(table: pd.DataFrame, path: Path, looks: Mapping[str, Look]) -> None:
    """BLEU of every run with its bootstrap interval, a panel a direction."""
    height = 0.5 + 0.17 * max(table.groupby("direction").size())
    with direction_panels(table, height, path, abreast(table)) as panels:
        for axis, part in panels:
            methods = ordered(part["method"])
            place = 0.0
            ticks = []
            for method in methods:
                look = looks[method]
                own = part[part["method"] == method].sort_values("seed")
                places = place + np.arange(len(own)) * 0.5
                errors = np.stack([own["BLEU"] - own["BLEU_low"], own["BLEU_high"] - own["BLEU"]])
                axis.errorbar(
                    own["BLEU"],
                    places,
                    xerr=np.abs(errors),
                    fmt=look.marker,
                    color=look.colour,
                    elinewidth=0.9,
                    capsize=1.8,
                )
                for value, high, at in zip(own["BLEU"], own["BLEU_high"], places, strict=True):
                    axis.annotate(
                        f"{value:.1f}",
                        (high, at),
                        xytext=(3, 0),
                        textcoords="offset points",
                        va="center",
                        fontsize=6,
                    )
                ticks.append(float(places.mean()))
                place = float(places[-1]) + 1.0
            axis.set_yticks(ticks, [label_of(method) for method in methods])
            axis.invert_yaxis()
            axis.margins(x=0.12)
            axis.grid(axis="x", linewidth=0.3, color="0.85")
            axis.set_xlabel("BLEU, 95 % interval over sentences")


FIGURE = Figure(
    "quality", draw_quality, "BLEU of every run, 95 % bootstrap interval over sentences."
)
