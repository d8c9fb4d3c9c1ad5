"""How does quality depend on the size of the training set?

    python -m analysis.sizes runs/study-2000 runs/study-8000 runs/study --output sizes

Each folder has the runs of one size (``fairseq-train --train-sentences N``), judged by itself with
``python -m analysis.transfer``. Here their scores are put side by side, a line per method: a table
(``sizes.csv``) and a figure of it.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import NullFormatter

from analysis.markup import markdown_table
from analysis.runs.errors import UserError, one_line_errors
from analysis.runs.methods import label_of, ordered
from analysis.runs.run_record import warn_left_out
from analysis.style import Look, abreast, among, direction_panels, looks
from analysis.sums.direction import Direction, Options
from analysis.sums.loading import load

METRICS = ("BLEU", "chrF")
TEACHER = "teacher"


def sizes_table(directions: Sequence[Direction]) -> pd.DataFrame:
    """One row a run with translations: direction, method with its variant, training ``sentences`` (NaN for a
    teacher of which they are not known), seed, BLEU, chrF.

    Raises
    ------
    UserError
        A student's record does not say on how many sentences it was trained.
    """
    rows = []
    for direction in directions:
        for run in direction.translated:
            assert run.translations is not None and direction.corpus is not None
            if run.run.sentences is None and run.method.id != TEACHER:
                raise UserError(
                    f"{run.run.path}: expected the number of training sentences in run.json, found none; "
                    "score the run again"
                )
            row: dict[str, Any] = {
                "direction": direction.name,
                "method": str(run.method),
                "sentences": np.nan if run.run.sentences is None else run.run.sentences,
                "seed": run.seed,
            }
            scores = {
                metric: direction.corpus.corpus_score(run.translations, metric)
                for metric in METRICS
            }
            rows.append(row | scores)
    return pd.DataFrame(rows)


def draw_sizes(table: pd.DataFrame, path: Path, look_of: Mapping[str, Look]) -> None:
    """BLEU by the number of training sentences, a panel a direction: means over seeds, the runs as
    points; the teacher's is a level."""
    with direction_panels(table, 2.0, path, abreast(table)) as panels:
        for axis, part in panels:
            for method, look in among(look_of, part["method"]).items():
                runs = part[part["method"] == method]
                if method == TEACHER:
                    axis.axhline(
                        runs["BLEU"].mean(),
                        color=look.colour,
                        linestyle=look.line,
                        label=label_of(method),
                    )
                    continue
                mean = runs.groupby("sentences")["BLEU"].mean()
                axis.plot(
                    mean.index,
                    mean,
                    color=look.colour,
                    linestyle=look.line,
                    marker=look.marker,
                    label=label_of(method),
                )
                axis.plot(
                    runs["sentences"], runs["BLEU"], ".", color=look.colour, markersize=2, alpha=0.6
                )
            students = sorted(part.loc[part["method"] != TEACHER, "sentences"].unique())
            axis.set_xscale("log")
            axis.set_xticks(students, [f"{size:,.0f}" for size in students])
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_xlabel("training sentences")
            axis.set_ylabel("BLEU")
        panels[0][0].legend(loc="best")


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The means over seeds as readers get them: a row a direction and method, a column a size; the last is of
    a teacher of unknown size."""
    means = table.fillna({"sentences": np.inf}).pivot_table(
        "BLEU", ["direction", "method"], "sentences", aggfunc="mean"
    )
    rows = []
    for direction in means.index.get_level_values(0).unique():
        for method in ordered(means.loc[direction].index):
            values = means.loc[(direction, method)]
            cells = {
                "unknown" if size == np.inf else f"{size:,.0f}": (
                    "" if pd.isna(value) else f"{value:.2f}"
                )
                for size, value in values.items()
            }
            rows.append({"direction": direction, "method": label_of(method), **cells})
    return pd.DataFrame(rows)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m analysis.sizes",
        description="Draw quality against the size of the training set, a line per method.",
    )
    out.add_argument(
        "runs", type=Path, nargs="+", metavar="RUNS", help="a directory of runs for each size"
    )
    out.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="gets sizes.csv and the figure"
    )
    out.add_argument("--subset", default="test", help="split (default: %(default)s)")
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Read the runs, print the means, write table and figure."""
    args = parser().parse_args(argv)
    with one_line_errors():
        options = Options(subset=args.subset, resamples=2)
        found: list[Direction] = []
        for root in args.runs:
            directions, left_out = load(root, options, records=False)
            warn_left_out(left_out)
            found.extend(directions)
        table = sizes_table(found)
        args.output.mkdir(parents=True, exist_ok=True)
        table.to_csv(args.output / "sizes.csv", index=False, float_format="%.9g")
        draw_sizes(table, args.output / "sizes", looks(table["method"]))
        print(f"BLEU by training sentences, means over seeds:\n\n{markdown_table(shown(table))}")


if __name__ == "__main__":
    main()
