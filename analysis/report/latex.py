"""Tables for a paper: booktabs, captions that stand alone, text escaped."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.claims.verdicts import ALPHA, PLACEBO
from analysis.report.content import by_method, claim_rows
from analysis.runs.methods import label_of, ordered

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "−": "$-$",
    "†": r"$^\dagger$",
    "↓": r"$\downarrow$",
    "≤": r"$\leq$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def escape(text: object) -> str:
    """Text for LaTeX."""
    return "".join(_SPECIAL.get(character, character) for character in str(text))


def tabular(
    heads: Sequence[str], rows: Sequence[Sequence[str]], layout: str, caption: str, label: str
) -> str:
    """A table of cells that are LaTeX already (needs the package booktabs)."""
    lines = [" & ".join(row) + r" \\" for row in rows]
    return "\n".join(
        [
            r"\begin{table}[t]",
            r"\centering\small",
            f"\\caption{{{caption}}}",
            f"\\label{{{label}}}",
            f"\\begin{{tabular}}{{{layout}}}",
            r"\toprule",
            " & ".join(heads) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def results_table(methods: pd.DataFrame, baseline: str) -> str:
    """BLEU and chrF of every method by direction: mean and standard deviation over seeds, the best in
    bold, and what is certainly better than the baseline marked."""
    if methods.empty:
        return "% no rows\n"
    table = by_method(methods[methods["method"] != PLACEBO])
    directions = list(dict.fromkeys(table["direction"]))
    columns = [(one, metric) for one in directions for metric in dict.fromkeys(table["metric"])]
    cells = {
        (str(row["method"]), str(row["direction"]), str(row["metric"])): row
        for row in table.to_dict("records")
    }
    corrected = f"gain_over_{baseline}_p_holm"
    students = [name for name in ordered(table["method"]) if name != "teacher"]
    best = {
        (one, metric): max(
            (
                row["mean"]
                for (name, *place), row in cells.items()
                if name in students and place == [one, metric]
            ),
            default=np.nan,
        )
        for one, metric in columns
    }
    rows = []
    for name in ordered(table["method"]):
        row = [escape(label_of(name))]
        for one, metric in columns:
            cell = cells.get((name, one, metric))
            if cell is None:
                row.append("")
                continue
            text = f"{cell['mean']:.2f}"
            if not pd.isna(cell["sd_over_seeds"]):
                text += f" {{\\scriptsize$\\pm${cell['sd_over_seeds']:.2f}}}"
            if name in students and cell["mean"] == best[one, metric]:
                text = f"\\textbf{{{text}}}"
            certain = cell.get(corrected, np.nan) <= ALPHA
            better = certain and cell[f"gain_over_{baseline}"] > 0
            row.append(text + (r"$^{\dagger}$" if better else ""))
        rows.append(row)
    heads = ["method"] + [
        escape(f"{'mean' if one == 'all' else one} {metric}") for one, metric in columns
    ]
    caption = (
        "Translation quality (sacreBLEU), mean $\\pm$ standard deviation over "
        f"{int(table['seeds'].max())} training seeds; best student in bold; $\\dagger$: better than "
        f"{escape(label_of(baseline))}, $p\\leq{ALPHA:.2f}$ over sentences and seeds with Holm's correction."
    )
    return tabular(heads, rows, "l" + "r" * len(columns), caption, "tab:results")


def claims_table(claims: pd.DataFrame, baseline: str) -> str:
    """What decides each claim, of every method and of the placebo, with the verdicts."""
    table = claims[(claims["scope"] == "all") & claims["decides"].astype(bool)]
    if table.empty:
        return "% no rows\n"
    names = ["method", "claim", "effect", "p (Holm)", "verdict"]
    rows = [[escape(row[name]) for name in names] for row in claim_rows(table, method=True)]
    caption = (
        f"Claims about transfer, each method against {escape(label_of(baseline))}: effect with its 95\\,\\% "
        "interval over sentences and seeds (above 0 is in the claim's favour), $p$ with Holm's correction, "
        "verdict. The placebo is the baseline against itself."
    )
    return tabular([escape(name) for name in names], rows, "lp{5cm}rrl", caption, "tab:claims")
