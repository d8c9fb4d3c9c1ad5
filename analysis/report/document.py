"""The report written down: Markdown, HTML, CSV, LaTeX."""

from pathlib import Path

from markdown_it import MarkdownIt

from analysis.claims.verdicts import PLACEBO
from analysis.figures import draw_all
from analysis.markup import markdown_table
from analysis.page import drawing, render
from analysis.report import latex
from analysis.report.blocks import Drawing, Section, Table
from analysis.report.content import by_method, sections
from analysis.report.findings import findings
from analysis.results import Results
from analysis.runs.methods import label_of

TITLE = "Does the gain come from better transfer?"


def write_report(results: Results, folder: Path, style: Path | None = None) -> None:
    """Write tables, figures and the report into a new folder."""
    for name, found in (("tables", results.tables), ("figures", results.figures)):
        (folder / name).mkdir(parents=True)
        for key, table in found.items():
            table.to_csv(folder / name / f"{key}.csv", index=False, float_format="%.9g")
    drawn = draw_all(folder / "figures", style)
    options = results.options
    chapters = sections(results.directions, results.left_out, results.tables, options, drawn)
    summary = findings(results.tables["claims"], results.tables["methods"], options)
    pages = {
        "report.md": markdown(chapters, summary),
        "report.html": html(chapters, summary, folder),
        "examples.html": render(
            "examples.html",
            title="Sentences that gained and lost most",
            groups=results.examples,
        ),
        "tables/results.tex": latex.results_table(results.tables["methods"], options.baseline),
        "tables/claims.tex": latex.claims_table(results.tables["claims"], options.baseline),
    }
    for name, content in pages.items():
        (folder / name).write_text(content, encoding="utf-8")


def markdown(chapters: list[Section], summary: list[str]) -> str:
    """The report as Markdown; tables that fold away are named with their file."""
    parts = [f"# {TITLE}", *summary]
    for chapter in chapters:
        parts.append(f"## {chapter.heading}")
        for block in chapter.blocks:
            if isinstance(block, Table):
                if block.fold:
                    parts.append(f"{block.fold}: `{block.source}`")
                else:
                    parts.append(markdown_table(block.shown))
            elif isinstance(block, Drawing):
                parts.append(f"![{block.caption}](figures/{block.name}.svg)")
                parts.append(f"*{block.caption}* (`figures/{block.name}.csv`)")
            else:
                parts.append(block)
    return "\n\n".join(parts) + "\n"


def html(chapters: list[Section], summary: list[str], folder: Path) -> str:
    """The report as a page that opens from disk with nothing beside it; HTML in its text is text."""
    prose = MarkdownIt("commonmark", {"html": False}).render
    return render(
        "report.html",
        title=TITLE,
        summary=summary,
        chapters=chapters,
        prose=prose,
        drawing=lambda name: drawing(folder / "figures" / f"{name}.svg"),
        is_table=lambda block: isinstance(block, Table),
        is_drawing=lambda block: isinstance(block, Drawing),
    )


def terminal_summary(results: Results) -> str:
    """A few lines for the terminal: scores, verdicts, and what was left out."""
    lines = []
    for row in by_method(results.tables["results"]).to_dict("records"):
        lines.append(
            f"{row['direction']:8} {label_of(row['method']):28} seed {row['seed']:<6} "
            f"BLEU {row['BLEU']:6.2f}  chrF {row['chrF']:6.2f}"
        )
    claims = results.tables["claims"]
    claims = claims[(claims["scope"] == "all") & claims["decides"].astype(bool)]
    for row in claims[claims["treatment"] != PLACEBO].to_dict("records"):
        lines.append(f"claim {row['claim']} ({row['treatment']}): {row['verdict']}")
    lines += [f"left out: {item.label}: {item.reason}" for item in results.left_out]
    return "\n".join(lines)
