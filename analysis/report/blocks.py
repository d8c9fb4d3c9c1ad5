"""What a chapter of the report consists of."""

import functools
import re
from dataclasses import dataclass

import pandas as pd

#: A number with what may stand around it: an interval, a spread, a p-value; or that there is none.
_NUMBER = re.compile(r"[<(]?\s*[-+−±]?\d[^A-Za-oq-z]*|no tokens")


@dataclass(frozen=True)
class Table:
    """Cells as they are shown, all text.

    Attributes
    ----------
    fold : what stands in place of the table until it is opened; "" for one that is always seen
    source : the CSV file with all of it
    """

    shown: pd.DataFrame
    fold: str = ""
    source: str = ""

    @functools.cached_property
    def classes(self) -> list[str]:
        """How each column is laid out: ``number`` at the right, ``verdict`` never broken, or "".

        A column of numbers has one in every cell that is not empty.
        """
        found = []
        for name in self.shown.columns:
            cells = [str(cell) for cell in self.shown[name] if cell != ""]
            if name == "verdict":
                found.append("verdict")
            else:
                numeric = bool(cells) and all(_NUMBER.fullmatch(cell) for cell in cells)
                found.append("number" if numeric else "")
        return found


@dataclass(frozen=True)
class Drawing:
    """A figure that was drawn, with its caption."""

    name: str
    caption: str


#: Prose is Markdown without HTML.
Block = str | Table | Drawing


@dataclass(frozen=True)
class Section:
    """A chapter of the report."""

    key: str
    heading: str
    blocks: tuple[Block, ...]
