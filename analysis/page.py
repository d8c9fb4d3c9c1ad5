"""HTML pages from templates: everything is escaped unless it is markup already."""

from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

ENVIRONMENT = Environment(
    loader=PackageLoader("analysis"), autoescape=select_autoescape(["html"]), trim_blocks=True
)


def render(template: str, **values: Any) -> str:
    """Fill one of ``analysis/templates``."""
    return ENVIRONMENT.get_template(template).render(**values) + "\n"
