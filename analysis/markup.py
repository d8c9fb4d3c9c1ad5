"""Tables and their cells as Markdown."""

import re
from typing import Any

import pandas as pd


def markdown_table(table: pd.DataFrame) -> str:
    """A table in Markdown; bars, and what a reader would take for HTML, are escaped."""
    rows = [[_cell(value) for value in row] for row in table.to_numpy().tolist()]
    names = [_cell(name) for name in table.columns]
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    return re.sub(r"\||<(?=[A-Za-z/!?])", r"\\\g<0>", str(value))


def number(value: Any, digits: int) -> str:
    """A number; nothing where there is none. What rounds to 0 has no sign."""
    return "" if pd.isna(value) else f"{value:z.{digits}f}"


def p_value(value: Any, equals: str = "") -> str:
    """A p-value to four places."""
    if pd.isna(value):
        return ""
    return "< 0.0001" if value < 0.0001 else f"{equals}{value:.4f}"


def percent(value: Any) -> str:
    """A share in per cent."""
    return "" if pd.isna(value) else f"{100 * value:z.1f} %"


def span(low: Any, high: Any) -> str:
    """A number, or two with what lies between them; nothing where there is none."""
    if pd.isna(low):
        return ""
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def interval(value: Any, low: Any, high: Any, digits: int = 3) -> str:
    """A value with its interval, where it has one; nothing where there is no value."""
    if pd.isna(low):
        return number(value, digits)
    return f"{number(value, digits)} [{number(low, digits)}, {number(high, digits)}]"
