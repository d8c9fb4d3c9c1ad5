"""Draw a report's figures again from their saved tables.

    python -m analysis.figures RUNS

Each figure is a function of a table; its CSV lies beside it in RUNS/report/figures.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.chapters import (
    claims,
    difficulty,
    methods,
    quality,
    sensitivity,
    sentences,
    training,
    transfer,
    transitions,
)
from analysis.claims.verdicts import PLACEBO
from analysis.runs.errors import UserError, one_line_errors
from analysis.runs.methods import Method
from analysis.style import COLOURS, looks, own_style
from analysis.terminal import progress

#: In the order of the report.
FIGURES = {
    chapter.FIGURE.name: chapter.FIGURE
    for chapter in (
        claims,
        quality,
        methods,
        sensitivity,
        transfer,
        difficulty,
        training,
        transitions,
        sentences,
    )
}


def without_variants(table: pd.DataFrame) -> pd.DataFrame:
    """The usual variant of each method where more methods would be drawn than have a look of their own;
    the others are in the table, and in the figures of sensitivity and methods."""
    if len(looks(table["method"])) <= len(COLOURS):
        return table
    usual = table[[Method.of(method).is_usual for method in table["method"]]]
    return table if usual.empty else usual


def draw_all(folder: Path, style: Path | None = None) -> list[str]:
    """Draw every figure whose table is in ``folder``, each method in the same colour in all of them; a
    table without rows has no figure. ``style`` is a matplotlib style file."""
    tables = {
        name: pd.read_csv(folder / f"{name}.csv", keep_default_na=False, na_values=[""])
        for name in FIGURES
        if (folder / f"{name}.csv").exists()
    }
    shown = [table["method"] for table in tables.values() if "method" in table]
    look_of = looks({str(method) for methods in shown for method in methods} - {PLACEBO})
    drawn = []
    with own_style(style):
        for name, table in progress(tables.items(), desc="draw figures", unit="figure"):
            figure, path = FIGURES[name], folder / name
            if figure.by_look and "method" in table:
                table = without_variants(table)
            if not table.empty:
                figure.draw(table, path, look_of)
            if path.with_suffix(".svg").exists():
                drawn.append(name)
    return drawn


def add_style(out: argparse.ArgumentParser) -> None:
    """The option for one's own fonts and sizes."""
    out.add_argument(
        "--style",
        type=Path,
        metavar="FILE",
        help="a matplotlib style file on top of the house style: fonts, sizes, and the width of a "
        "two-column figure (figure.figsize)",
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m analysis.figures",
        description="Draw a report's figures again, from the CSV files that lie beside them.",
    )
    out.add_argument("runs", type=Path, metavar="RUNS", help="directory of runs")
    out.add_argument("--output", type=Path, metavar="DIR", help="the report (default: RUNS/report)")
    add_style(out)
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Draw all figures of a report again."""
    args = parser().parse_args(argv)
    with one_line_errors():
        folder = (args.output or args.runs / "report") / "figures"
        names = draw_all(folder, args.style) if folder.is_dir() else []
        if not names:
            raise UserError(
                f"{folder}: expected the tables of a report (CSV), found none; run "
                f"python -m analysis.transfer {args.runs} first"
            )
        print(f"{folder}: {', '.join(names)}")


if __name__ == "__main__":
    main()
