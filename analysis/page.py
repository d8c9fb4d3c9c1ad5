"""HTML pages from templates: everything is escaped unless it is markup already."""

import base64
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

ENVIRONMENT = Environment(
    loader=PackageLoader("analysis"), autoescape=select_autoescape(["html"]), trim_blocks=True
)
#: The hyphen of a negative number; not that of a range or an exponent.
_NEGATIVE = re.compile(r"(?<![\w.)-])-(?=[\d.])")
#: Pixels a point of a figure: its letters are made for paper, and a screen is farther away.
PIXELS = 2.0


def render(template: str, **values: Any) -> str:
    """Fill one of ``analysis/templates``."""
    return ENVIRONMENT.get_template(template).render(**values) + "\n"


def minus(cell: object) -> str:
    """A cell of numbers with minus signs, where Markdown and CSV have hyphens."""
    return _NEGATIVE.sub("−", str(cell))


ENVIRONMENT.filters["minus"] = minus


def drawing(path: Path) -> dict[str, Any]:
    """An SVG file as a page holds it: ``data``, an address with the file in it, and ``width`` in
    pixels."""
    content = path.read_bytes()
    size = re.search(rb'<svg[^>]*\swidth="([\d.]+)pt"', content)
    return {
        "data": f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}",
        "width": round(float(size[1]) * PIXELS) if size else 600,
    }
