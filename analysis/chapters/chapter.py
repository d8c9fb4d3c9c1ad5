"""What a chapter's figure consists of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from analysis.style import Look


@dataclass(frozen=True)
class Figure:
    """A figure: a function of a saved table, which lies beside it under the same name.

    Attributes
    ----------
    name : of the files
    draw : draws a table at a path without suffix, each method with its look; draws nothing where nothing
        can be shown
    caption : says what is seen without the text around it
    by_look : methods are told apart by their look, so not more of them are drawn than there are looks
    """

    name: str
    draw: Callable[[pd.DataFrame, Path, Mapping[str, Look]], None]
    caption: str
    by_look: bool = False
