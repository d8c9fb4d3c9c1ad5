"""A comparison written down: Markdown, HTML, and of each table CSV and LaTeX."""

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from markdown_it import MarkdownIt

from analysis.comparison.chapters import (
    SENTENCE_METRIC,
    Chapter,
    Example,
    Results,
    Table,
    chapters,
    findings,
)
from analysis.comparison.words import sentence_table
from analysis.markup import markdown_table
from analysis.page import drawing, render
from analysis.report.latex import escape, tabular

TITLE = "Systems compared"
#: Examples of a group in Markdown, which cannot be searched.
IN_MARKDOWN = 5


def write_report(results: Results, folder: Path) -> None:
    """Write ``report.md``, ``report.html``, ``tables/`` and ``figures/`` into a new folder."""
    found = chapters(results)
    for name in ("tables", "figures"):
        (folder / name).mkdir(parents=True)
    for chapter in found:
        for table in chapter.tables:
            _write(table.data, folder / "tables" / f"{table.name}.csv")
            latex = folder / "tables" / f"{table.name}.tex"
            latex.write_text(latex_table(table), encoding="utf-8")
        if chapter.figure:
            chapter.figure.draw(folder / "figures" / chapter.figure.name)
    _write(
        sentence_table(results.corpus, results.measures, results.texts),
        folder / "tables" / "sentences.csv",
    )
    summary = findings(results)
    (folder / "report.md").write_text(markdown(found, summary), encoding="utf-8")
    page = render(
        "comparison.html",
        title=TITLE,
        summary=summary,
        chapters=found,
        metric=SENTENCE_METRIC,
        latex=latex_table,
        numeric=numeric,
        prose=MarkdownIt("commonmark", {"html": False}).renderInline,
        drawing=lambda name: drawing(folder / "figures" / f"{name}.svg"),
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def markdown(found: Sequence[Chapter], summary: str) -> str:
    """The report as Markdown."""
    parts = [f"# {TITLE}", summary]
    for chapter in found:
        parts.append(f"## {chapter.heading}")
        if chapter.text:
            parts.append(chapter.text)
        for table in chapter.tables:
            parts.append(f"*{table.caption}* (`tables/{table.name}.csv`, `.tex`)")
            parts.append(markdown_table(_in_bold(table, "**")))
        if chapter.figure:
            name, caption = chapter.figure.name, chapter.figure.caption
            parts.append(f"![{caption}](figures/{name}.svg)\n\n*{caption}*")
        for title, examples in (chapter.examples or {}).items():
            parts.append(f"### {title}")
            parts += [_example(example) for example in examples[:IN_MARKDOWN]]
    return "\n\n".join(parts) + "\n"


def _example(example: Example) -> str:
    before, after = example.scores
    lines = [f"sentence {example.number}, {SENTENCE_METRIC} {before:.1f} → {after:.1f}"]
    if example.source is not None:
        lines.append(f"source: {example.source}")
    lines.append(f"reference: {example.reference}")
    lines += [f"{name}: {text}" for name, text in example.translations.items()]
    # As code, so that nothing in a text is taken for Markdown.
    return "\n".join(f"    {line}" for line in lines)


def _in_bold(table: Table, around: str) -> pd.DataFrame:
    """The cells of a table with the best ones between two marks."""
    if table.best is None:
        return table.shown
    marked = around + table.shown.astype(str) + around
    return table.shown.mask(pd.DataFrame(table.best, columns=table.shown.columns), marked)


def numeric(table: Table) -> list[bool]:
    """Whether each column holds numbers, which stand at the right."""
    cells = table.shown.map(lambda cell: not cell or bool(_NUMBER.match(cell)))
    return [bool(all_numbers) for all_numbers in cells.all()]


def latex_table(table: Table) -> str:
    """A table for a paper: booktabs, the best in bold, text escaped, its caption above."""
    cells = table.shown.map(escape)
    if table.best is not None:
        bold = "\\textbf{" + cells + "}"
        cells = cells.mask(pd.DataFrame(table.best, columns=cells.columns), bold)
    heads = [escape(name) for name in cells.columns]
    layout = "".join("lr"[number] for number in numeric(table))
    label = f"tab:{table.name}"
    return tabular(heads, [cells.to_numpy().tolist()], layout, escape(table.caption), label)


#: What a number begins with; "no words" and "no sentences" stand in place of one.
_NUMBER = re.compile(r"[<>]?\s*[-+]?\d|no (words|sentences)$")


def _write(table: pd.DataFrame, path: Path) -> None:
    table.to_csv(path, index=False, float_format="%.9g")
