"""Figures, each a function of a saved table; its CSV lies beside it.

    python -m analysis.figures RUNS

draws them again from the tables of RUNS/report.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.flows import aligned, draw_transitions
from analysis.runs.errors import UserError, one_line_errors
from analysis.runs.methods import Method, label_of, ordered
from analysis.sensitivity import BASELINE, value_key
from analysis.style import (
    COLOURS,
    COLUMN,
    PAGE,
    figure,
    hide,
    looks,
    save,
)
from analysis.terminal import progress

matplotlib.use("Agg")


def draw_difficulty(table: pd.DataFrame, path: Path) -> None:
    """Distribution of token difficulty by method (mean over seeds), with Γ, a panel a direction."""
    with _direction_panels(table, 1.9, path) as panels:
        for axis, part in panels:
            for method, look in looks(table["method"]).items():
                own = part[part["method"] == method]
                if own.empty:
                    continue
                mean = own.groupby(["low", "high"], as_index=False)["share"].mean()
                centre = np.sqrt(mean["low"] * mean["high"])
                axis.plot(
                    *(centre, mean["share"] * 100),
                    color=look.colour,
                    linestyle=look.line,
                    label=label_of(method),
                )
            gamma = part["gamma"].mean()
            axis.axvline(gamma, color="0.35", linewidth=0.8, linestyle=(0, (2, 2)))
            axis.annotate(
                *(f" Γ = {gamma:.2g}", (gamma, 1.0)),
                xycoords=("data", "axes fraction"),
                va="top",
                fontsize=6,
                color="0.25",
            )
            axis.set_xscale("log")
            axis.set_ylim(bottom=0)
            axis.set_xlabel("difficulty KL(p‖q), nats")
            axis.set_ylabel("tokens, %")
        panels[0][0].legend(loc="upper left", handlelength=2.4)


#: Families of the transfer figure and what its axes say.
PANELS = {
    "difficulty": "difficulty",
    "difficulty quantile": "quantile of difficulty",
    "frequency": "training frequency",
    "teacher entropy": "teacher entropy (quantile)",
    "position": "target position",
    "teacher": "teacher about reference",
    "piece": "piece",
}


def draw_transfer(table: pd.DataFrame, path: Path) -> None:
    """KL to the teacher by bucket and method, a panel a family; mean over directions and seeds, bars
    are the mean of the runs' intervals."""
    families = [family for family in PANELS if family in set(table["family"])]
    with figure(PAGE, 1.75 * -(-len(families) // 2), -(-len(families) // 2), 2) as (drawn, axes):
        for axis, family in zip(axes, families, strict=False):
            part = table[table["family"] == family]
            codes = _bucket_codes(part)
            drawn_methods = looks(table["method"])
            width = 0.8 / len(drawn_methods)
            for index, (method, look) in enumerate(drawn_methods.items()):
                own = part[part["method"] == method].assign(code=codes)
                mean = own.groupby("code")[["kl", "kl_low", "kl_high"]].mean()
                place = mean.index.to_numpy() + (index - (len(drawn_methods) - 1) / 2) * width
                errors = np.abs(
                    np.stack([mean["kl"] - mean["kl_low"], mean["kl_high"] - mean["kl"]])
                )
                axis.bar(
                    *(place, mean["kl"], width),
                    yerr=errors,
                    color=look.colour,
                    hatch=look.hatch,
                    edgecolor="white" if index == 0 else "black",
                    linewidth=0.3,
                    error_kw={"elinewidth": 0.6, "capsize": 1.2},
                    label=label_of(method),
                )
            names = part.assign(code=codes).drop_duplicates("code").sort_values("code")
            labels = [_short(name) for name in names["bucket"]]
            axis.set_xticks(range(len(labels)), labels)
            for code in names.loc[names["tokens"] == 0, "code"]:
                axis.annotate(
                    "no\ntokens", (code, 0), ha="center", va="bottom", fontsize=5, color="0.4"
                )
            axis.set_xlabel(PANELS[family])
            axis.set_ylabel("KL(p‖q), nats")
        hide(axes[len(families) :])
        spare = axes[len(families)] if len(axes) > len(families) else axes[0]
        handles, names_ = axes[0].get_legend_handles_labels()
        spare.legend(handles, names_, loc="center" if len(axes) > len(families) else "upper left")
        save(drawn, path)


def _bucket_codes(part: pd.DataFrame) -> pd.Series:
    """The place of each row's bucket in its family: rows of a run stand in that order."""
    return part.groupby("run").cumcount()


def _short(bucket: str) -> str:
    """A bucket's name for a tick: quantile ranges go, long names break."""
    if len(bucket) > 6 and bucket.replace("-", "").isdigit():
        return bucket.replace("-", "-\n")
    bucket = bucket.split(" of ")[0] if " of " in bucket and "(" in bucket else bucket
    return (
        bucket.replace(" about the reference", "")
        .replace("end of sentence", "end")
        .replace(" ", "\n")
    )


def draw_quality(table: pd.DataFrame, path: Path) -> None:
    """BLEU of every run with its bootstrap interval, a panel a direction."""
    height = 0.5 + 0.17 * max(table.groupby("direction").size())
    with _direction_panels(table, height, path, _abreast(table)) as panels:
        for axis, part in panels:
            methods = ordered(part["method"])
            place = 0.0
            ticks = []
            for method in methods:
                look = looks(table["method"])[method]
                own = part[part["method"] == method].sort_values("seed")
                places = place + np.arange(len(own)) * 0.5
                errors = np.stack([own["BLEU"] - own["BLEU_low"], own["BLEU_high"] - own["BLEU"]])
                axis.errorbar(
                    *(own["BLEU"], places),
                    xerr=np.abs(errors),
                    fmt=look.marker,
                    color=look.colour,
                    elinewidth=0.9,
                    capsize=1.8,
                )
                for value, high, at in zip(own["BLEU"], own["BLEU_high"], places, strict=True):
                    axis.annotate(
                        *(f"{value:.1f}", (high, at)),
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


def draw_methods(table: pd.DataFrame, path: Path) -> None:
    """The results table as a figure: BLEU gained over word-level KD (or, where there is none, over
    fine-tuning) by method and direction, with hierarchical 95 % intervals and the mean BLEU."""
    table = table[(table["metric"] == "BLEU") & (table["method"] != "teacher")]
    over = "word_kd" if table["gain_over_word_kd"].notna().any() else "finetune"
    gain = f"gain_over_{over}"
    if table[gain].isna().all():
        return
    height = 0.55 + 0.2 * max(table.groupby("direction").size())
    with _direction_panels(table, height, path, _abreast(table)) as panels:
        for axis, part in panels:
            methods = ordered(part["method"])
            for place, method in enumerate(methods):
                row = part[part["method"] == method].iloc[0]
                look = looks(table["method"])[method]
                value = 0.0 if pd.isna(row[gain]) else row[gain]
                reach = [[value - row[f"{gain}_low"]], [row[f"{gain}_high"] - value]]
                axis.errorbar(
                    *([value], [place]),
                    xerr=None if pd.isna(row[gain]) else np.abs(reach),
                    fmt=look.marker,
                    color=look.colour,
                    elinewidth=0.9,
                    capsize=1.8,
                )
                axis.annotate(
                    *(f"{row['mean']:.2f}", (1.01, place)),
                    xycoords=("axes fraction", "data"),
                    va="center",
                    fontsize=6,
                )
            axis.axvline(0, color="0.6", linewidth=0.6)
            axis.set_yticks(range(len(methods)), [label_of(method) for method in methods])
            axis.invert_yaxis()
            axis.grid(axis="x", linewidth=0.3, color="0.85")
            axis.margins(y=0.12)
            axis.set_xlabel(f"BLEU over {label_of(over)}")


#: Hyper-parameters as the equations write them.
SYMBOLS = {"gamma": "Γ", "lambda_max": "λ_max", "beta": "β", "alpha": "α"}


def draw_sensitivity(table: pd.DataFrame, path: Path) -> None:
    """BLEU by the value of one hyper-parameter, the others as in most runs, a panel each: means over
    directions and seeds, the runs as points; the broken line is word-level KD."""
    own = table[table["parameter"] != BASELINE]
    parameters = sorted(own["parameter"].unique())
    rows = -(-len(parameters) // 2)
    width = COLUMN if len(parameters) == 1 else PAGE
    with figure(width, 1.9 * rows, rows, min(2, len(parameters))) as (drawn, axes):
        for axis, parameter in zip(axes, parameters, strict=False):
            part = own[own["parameter"] == parameter]
            values = sorted(part["value"].astype(str).unique(), key=value_key)
            for method, look in looks(own["method"]).items():
                runs = part[part["method"] == method]
                if runs.empty:
                    continue
                place = runs["value"].astype(str).map(values.index)
                mean = runs["BLEU"].groupby(place).mean()
                axis.plot(
                    *(mean.index, mean),
                    color=look.colour,
                    linestyle=look.line,
                    marker=look.marker,
                    label=label_of(method),
                )
                axis.plot(place, runs["BLEU"], ".", color=look.colour, markersize=2, alpha=0.6)
            baseline = table.loc[table["parameter"] == BASELINE, "BLEU"].dropna()
            if len(baseline):
                axis.axhline(baseline.mean(), color="0.5", linewidth=0.7, linestyle=(0, (4, 2)))
            axis.set_xticks(range(len(values)), values)
            axis.margins(x=0.08)
            axis.set_xlabel(SYMBOLS.get(parameter, parameter.replace("_", " ")))
            axis.set_ylabel("BLEU")
        hide(axes[len(parameters) :])
        axes[0].legend(loc="best")
        save(drawn, path)


def draw_training(table: pd.DataFrame, path: Path) -> None:
    """KL on easy and hard tokens over training (mean over seeds), from records where there are some,
    else from the log; a panel a direction."""
    source = "records" if (table["source"] == "records").any() else "log"
    table = table[table["source"] == source]
    with _direction_panels(table, 2.1, path) as panels:
        for axis, part in panels:
            for method, look in looks(table["method"]).items():
                for bucket, line in (("hard", "-"), ("easy", (0, (2, 1.2)))):
                    own = part[(part["method"] == method) & (part["bucket"] == bucket)]
                    if own.empty:
                        continue
                    by_run = own.set_index(["run", "step"])["kl"]
                    steps = aligned(
                        {run: set(own["step"][own["run"] == run]) for run in set(own["run"])}
                    )
                    axis.plot(
                        [np.mean(list(step.values())) for step in steps],
                        [np.mean([by_run[place] for place in step.items()]) for step in steps],
                        color=look.colour,
                        marker=look.marker,
                        linestyle=line,
                        label=f"{label_of(method)}, {bucket}",
                    )
            axis.set_yscale("log")
            axis.set_xlabel("updates")
            axis.set_ylabel("KL(p‖q), nats")
        handles, labels = panels[0][0].get_legend_handles_labels()
        panels[0][0].figure.legend(
            handles, labels, loc="outside lower center", ncols=2, handlelength=2.6
        )


def draw_sentences(table: pd.DataFrame, path: Path) -> None:
    """Sentence chrF gained against transfer gained over the baseline: means of groups of sentences by
    transfer, with 95 % intervals, a panel a direction."""
    with _direction_panels(table, 2.0, path) as panels:
        for axis, part in panels:
            for method, look in looks(table["method"]).items():
                own = part[part["method"] == method]
                axis.errorbar(
                    *(own["kl_gain"], own["chrf_gain"]),
                    yerr=1.96 * own["chrf_gain_error"],
                    color=look.colour,
                    marker=look.marker,
                    linestyle=look.line,
                    elinewidth=0.7,
                    capsize=1.5,
                    label=label_of(method),
                )
            axis.axhline(0, color="0.6", linewidth=0.5)
            axis.axvline(0, color="0.6", linewidth=0.5)
            axis.set_xlabel("transfer gained: fall of KL(p‖q), nats")
            axis.set_ylabel("sentence chrF gained")
        panels[0][0].legend(loc="best")


def _abreast(table: pd.DataFrame) -> int:
    """How many panels with methods as labels stand in a row: names of variants need the whole width."""
    return 1 if max(len(label_of(method)) for method in table["method"]) > 20 else 2


@contextmanager
def _direction_panels(
    table: pd.DataFrame, height: float, path: Path, abreast: int = 2
) -> Iterator[list[tuple[Axes, pd.DataFrame]]]:
    """A figure with a panel of ``height`` inches for each direction, ``abreast`` in a row: every panel
    with its rows of the table. It is saved when all are drawn."""
    directions = sorted(table["direction"].unique())
    rows = -(-len(directions) // abreast)
    width = COLUMN if len(directions) == 1 < abreast else PAGE
    with figure(width, height * rows, rows, min(abreast, len(directions))) as (drawn, axes):
        for axis, direction in zip(axes, directions, strict=False):
            if len(directions) > 1:
                axis.set_title(direction)
        hide(axes[len(directions) :])
        yield [
            (axis, table[table["direction"] == direction])
            for axis, direction in zip(axes, directions, strict=False)
        ]
        save(drawn, path)


#: Name of a figure (and of its CSV) to the function that draws it.
FIGURES: dict[str, Callable[[pd.DataFrame, Path], None]] = {
    "difficulty": draw_difficulty,
    "transfer": draw_transfer,
    "quality": draw_quality,
    "methods": draw_methods,
    "sensitivity": draw_sensitivity,
    "training": draw_training,
    "transitions": draw_transitions,
    "sentences": draw_sentences,
}


#: Figures in which methods are told apart by their look, so not more of them than there are looks.
BY_LOOK = ("difficulty", "transfer", "training", "transitions", "sentences")


def without_variants(table: pd.DataFrame) -> pd.DataFrame:
    """The usual variant of each method where more methods would be drawn than have a look of their own;
    the others are in the table, and in the figures of sensitivity and methods."""
    if len(looks(table["method"])) <= len(COLOURS):
        return table
    usual = table[[Method.of(method).is_usual for method in table["method"]]]
    return table if usual.empty else usual


def draw_all(folder: Path) -> list[str]:
    """Draw every figure whose table is in ``folder``; a table without rows has no figure."""
    drawn = []
    for name, draw in progress(FIGURES.items(), desc="draw figures", unit="figure"):
        path = folder / f"{name}.csv"
        if path.exists():
            table = pd.read_csv(path, keep_default_na=False, na_values=[""])
            if name in BY_LOOK:
                table = without_variants(table)
            if not table.empty:
                draw(table, path.with_suffix(""))
            if path.with_suffix(".svg").exists():
                drawn.append(name)
    return drawn


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m analysis.figures",
        description="Draw a report's figures again, from the CSV files that lie beside them.",
    )
    out.add_argument("runs", type=Path, metavar="RUNS", help="directory of runs")
    out.add_argument("--output", type=Path, metavar="DIR", help="the report (default: RUNS/report)")
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Draw all figures of a report again."""
    args = parser().parse_args(argv)
    with one_line_errors():
        folder = (args.output or args.runs / "report") / "figures"
        names = draw_all(folder) if folder.is_dir() else []
        if not names:
            raise UserError(
                f"{folder}: expected the tables of a report (CSV), found none; run "
                f"python -m analysis.transfer {args.runs} first"
            )
        print(f"{folder}: {', '.join(names)}")


if __name__ == "__main__":
    main()
