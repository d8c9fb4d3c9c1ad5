"""The report as one self-contained HTML page, and the page of examples."""

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markdown_it import MarkdownIt

_IMAGE = re.compile(r'<img src="(?P<path>figures/[\w.-]+\.svg)" alt="(?P<alt>[^"]*)"\s*/?>')
# What precedes the drawing in an SVG file, and matplotlib's metadata.
_AROUND = re.compile(r"^.*?(?=<svg)|<metadata>.*?</metadata>\s*", re.DOTALL)
_ID = re.compile(r'(?P<before>\bid="|href="#|url\(#)')

ENVIRONMENT = Environment(
    loader=PackageLoader("analysis"), autoescape=select_autoescape(["html"]), trim_blocks=True
)


def render(template: str, **values: Any) -> str:
    """Fill one of ``analysis/templates``; every value is escaped unless it is markup already."""
    return ENVIRONMENT.get_template(template).render(**values) + "\n"


def report_page(markdown: str, folder: Path, title: str) -> str:
    """``report.md`` as a page that opens from disk with nothing beside it.

    HTML in the Markdown is shown as text. Figures are the SVG files below ``folder``, inline.
    """
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    return render("report.html", title=title, body=_IMAGE.sub(lambda m: _inline(m, folder), body))


def _inline(match: re.Match[str], folder: Path) -> str:
    """An SVG file in place of a link to it; its ids get a name of their own in the page."""
    path = folder / match["path"]
    drawing = _AROUND.sub("", path.read_text(encoding="utf-8"))
    drawing = _ID.sub(lambda found: f"{found['before']}{path.stem}-", drawing)
    return f'<figure role="img" aria-label="{match["alt"]}">{drawing}</figure>'
