"""Tables for a paper: booktabs, captions that stand alone, text escaped."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.claims.verdicts import PLACEBO
from analysis.markup import number, span
from analysis.report.content import by_method, claim_rows
from analysis.runs.methods import label_of, ordered
from analysis.stats import ALPHA

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "−": "$-$",
    "|": r"\textbar{}",
    "†": r"$^\dagger$",
    "↓": r"$\downarrow$",
    "≤": r"$\leq$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def escape(text: object) -> str:
    """Text for LaTeX, with minus signs before numbers."""
    signed = re.sub(r"(?<!\w)-(?=\d)", "−", str(text))
    return "".join(_SPECIAL.get(character, character) for character in signed)


def tabular(
    heads: Sequence[str],
    groups: Sequence[Sequence[Sequence[str]]],
    layout: str,
    caption: str,
    label: str,
) -> str:
    """A table of cells that are LaTeX already, with a rule between groups of rows (needs the package
    booktabs)."""
    blocks = ["\n".join(" & ".join(row) + r" \\" for row in rows) for rows in groups]
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
            "\n\\midrule\n".join(blocks),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def results_table(methods: pd.DataFrame, baseline: str) -> str:
    """BLEU and chrF of every method by direction: mean and standard deviation over seeds, the best in
    bold, and what is certainly better than the baseline marked; beside them the length ratio and, where
    runs name one, the length penalty."""
    if methods.empty:
        return "% no rows\n"
    table = by_method(methods[methods["method"] != PLACEBO])
    metrics = list(dict.fromkeys(table["metric"]))
    penalties = bool(table["lenpen_low"].notna().any())
    groups = []
    for direction, own in table.groupby("direction", sort=False):
        students = own[own["method"] != "teacher"]
        best = students.groupby("metric")["mean"].max()
        rows: list[list[str]] = []
        for name in ordered(own["method"]):
            of_method = own[own["method"] == name].set_index("metric")
            cells = [
                _score(
                    of_method.loc[metric].to_dict(), name != "teacher" and best[metric], baseline
                )
                if metric in of_method.index
                else ""
                for metric in metrics
            ]
            first = of_method.iloc[0]
            cells.append(number(first["length_ratio"], 3))
            if penalties:
                cells.append(span(first["lenpen_low"], first["lenpen_high"]))
            scope = "" if rows else escape("mean" if direction == "all" else direction)
            rows.append([scope, escape(label_of(name)), *cells])
        groups.append(rows)
    heads = ["direction", "method", *map(escape, metrics), "length"]
    if penalties:
        heads.append("penalty")
    caption = (
        f"Translation quality (sacreBLEU), {_seeds(table)}; best student in bold; {_mark(table, baseline)}"
        "length: words of the translations by words of the references"
        f"{'; penalty: the length penalty of the search' if penalties else ''}."
    )
    return tabular(heads, groups, "ll" + "r" * (len(heads) - 2), caption, "tab:results")


def _seeds(table: pd.DataFrame) -> str:
    """What the scores are, for the caption; a teacher often has one seed and the students more."""
    own = table[table["method"] != "teacher"]
    seeds = (table if own.empty else own)["seeds"]
    if seeds.max() == 1:
        return "one training seed"
    return f"mean $\\pm$ standard deviation over {span(seeds.min(), seeds.max())} training seeds"


def _mark(table: pd.DataFrame, baseline: str) -> str:
    """What the mark of a gain means, for the caption; nothing where none could be marked."""
    prefix = f"gain_over_{baseline}"
    if prefix not in table or not (table[f"{prefix}_seeds"] > 1).any():
        return ""
    return (
        f"$\\dagger$: better than {escape(label_of(baseline))}, $p\\leq{ALPHA:.2f}$ over sentences and "
        "seeds with Holm's correction; "
    )


def _score(row: dict[Any, Any], best: float, baseline: str) -> str:
    """The cell of a method's score; ``best`` is that of the students, False for who is none."""
    text = f"{row['mean']:.2f}"
    if not pd.isna(row["sd_over_seeds"]):
        text += f" {{\\scriptsize$\\pm${row['sd_over_seeds']:.2f}}}"
    if best and row["mean"] == best:
        text = f"\\textbf{{{text}}}"
    prefix = f"gain_over_{baseline}"
    certain = row.get(f"{prefix}_p_holm", np.nan) <= ALPHA
    better = certain and row[prefix] > 0 and row[f"{prefix}_seeds"] > 1
    return text + (r"$^{\dagger}$" if better else "")


def claims_table(claims: pd.DataFrame, baseline: str) -> str:
    """What decides each claim, of every method, with the verdicts."""
    table = claims[(claims["scope"] == "all") & claims["decides"].astype(bool)]
    table = table[table["treatment"] != PLACEBO]
    if table.empty:
        return "% no rows\n"
    names = ["method", "claim", "effect", "p (Holm)", "verdict"]
    rows = [[escape(row[name]) for name in names] for row in claim_rows(table, method=True)]
    caption = (
        f"Claims about transfer, each method against {escape(label_of(baseline))}: effect with its 95\\,\\% "
        "interval over sentences and seeds (above 0 is in the claim's favour), $p$ with Holm's correction, "
        "verdict."
    )
    return tabular([escape(name) for name in names], [rows], "lp{5cm}rrl", caption, "tab:claims")
