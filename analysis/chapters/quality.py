"""Translation quality by run: sacreBLEU's scores, intervals and significance tests."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.chapters.chapter import Figure
from analysis.runs.methods import label_of, ordered
from analysis.style import (
    Look,
    abreast,
    direction_panels,
    label_rows,
    row_level,
    row_mark,
    share_x,
)
from analysis.sums.direction import Direction, Options, ScoredRun
from analysis.sums.pairing import partner
from analysis.sums.significance import PairedScores, Significance
from analysis.terminal import progress

#: Columns of a table without rows.
RUN_COLUMNS = ["direction", "method", "seed", "run"]


def results_table(directions: Sequence[Direction], options: Options) -> pd.DataFrame:
    """One row a run: length ratio, length penalty of the search (where it is known), scores with bootstrap
    intervals, and gains over the baselines with intervals and p-values.

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
                rows.append(_result(direction, tests, run, options.baselines))
                bar.update()
    return pd.DataFrame(rows, columns=None if rows else RUN_COLUMNS)


def _result(
    direction: Direction, tests: Significance, run: ScoredRun, baselines: Sequence[str]
) -> dict[str, Any]:
    corpus, translations = direction.corpus, run.translations
    assert corpus is not None and translations is not None
    row: dict[str, Any] = {
        "direction": direction.name,
        "method": str(run.method),
        "seed": run.seed,
        "run": run.label,
        "updates": run.run.updates,
        "parameters": run.run.parameters,
        "sentences": corpus.sentences,
        "length_ratio": translations.length_ratio,
        "lenpen": translations.texts.lenpen,
    }
    for name in corpus.metrics:
        score = tests.score(run, name)
        row[name] = score.score
        row[f"{name}_low"], row[f"{name}_high"] = score._mean - score._ci, score._mean + score._ci
    for name, metric in corpus.metrics.items():
        row[f"{name}_signature"] = str(metric.get_signature())
    for baseline in baselines:
        other = partner(run, direction.translated, baseline)
        for name in corpus.metrics:
            found = PairedScores(*[np.nan] * 5)
            if other is not None and run.method.id != "teacher" and run.method != other.method:
                found = tests.compare(run, other, name)
            row[f"{name}_gain_over_{baseline}"] = found.gain
            row[f"{name}_gain_over_{baseline}_low"] = found.low
            row[f"{name}_gain_over_{baseline}_high"] = found.high
            row[f"{name}_p_bootstrap_over_{baseline}"] = found.p_bootstrap
            row[f"{name}_p_randomisation_over_{baseline}"] = found.p_randomisation
    return row


def baselines_of(table: pd.DataFrame, prefix: str) -> list[str]:
    """The methods that a table has gains over, in columns of this prefix: fine-tuning, word-level KD and
    one that the user named."""
    names = map(str, table.columns)
    columns = [name for name in names if name.startswith(prefix) and name.endswith("_low")]
    return [name.removeprefix(prefix).removesuffix("_low") for name in columns]


def main_baseline(table: pd.DataFrame, prefix: str) -> str:
    """What a figure shows gains over: the last of them that any run was compared with; "" if none."""
    names = baselines_of(table, prefix)
    return next((name for name in reversed(names) if table[f"{prefix}{name}"].notna().any()), "")


def draw_quality(table: pd.DataFrame, path: Path, looks: Mapping[str, Look]) -> None:
    """BLEU of every run over that of the baseline's run that it is compared with, with paired bootstrap
    intervals, a panel a direction; BLEU itself on the right. Without a baseline its own intervals."""
    over = main_baseline(table, "BLEU_gain_over_")
    value = f"BLEU_gain_over_{over}" if over else "BLEU"
    shown = table[table["method"] != "teacher"] if over else table

    def height(part: pd.DataFrame) -> float:
        return 0.5 + 0.17 * len(part)

    with direction_panels(shown, height, path, abreast(shown)) as panels:
        for axis, part in panels:
            place = 0.0
            ticks = []
            methods = ordered(part["method"])
            for method in methods:
                own = part[part["method"] == method].sort_values("seed")
                places = place + np.arange(len(own)) * 0.5
                for at, row in zip(places, own.to_dict("records"), strict=True):
                    row_mark(axis, at, row, value, looks[method], method == over)
                    row_level(axis, at, f"{row['BLEU']:.1f}")
                ticks.append(float(places.mean()))
                place = float(places[-1]) + 1.0
            label_rows(axis, ticks, [label_of(method) for method in methods])
            axis.set_xlabel(f"BLEU over {label_of(over)}" if over else "BLEU")
            if over:
                axis.axvline(0, color="0.6", linewidth=0.6)
        share_x([axis for axis, _ in panels])


FIGURE = Figure(
    "quality",
    draw_quality,
    "BLEU of every run, by seed, over the baseline's run that it is compared with, with paired 95 % bootstrap "
    "intervals over sentences; BLEU itself on the right. The teacher is in the table only.",
)
