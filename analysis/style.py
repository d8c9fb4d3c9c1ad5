"""How figures look: sizes of an ACL page, embedded fonts, colours that print in grey."""

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from analysis.runs.errors import UserError, one_line
from analysis.runs.methods import Method, label_of, ordered

COLUMN = 3.03  # inches, one column of the ACL style
PAGE = 6.3  # both columns
FORMATS = ("pdf", "png", "svg")

#: Okabe and Ito's colours, ordered so that neighbours differ in lightness too.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "oo", "++", "**")

SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7,
    "legend.fontsize": 6.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.5,
    "hatch.linewidth": 0.4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # TrueType, embedded
    "svg.fonttype": "path",
    "svg.hashsalt": "analysis",  # the same file for the same table
}
#: Settings that follow ``font.size``.
TEXT_SIZES = ("axes.titlesize", "axes.labelsize", "legend.fontsize", "xtick.labelsize", "ytick.labelsize")  # fmt: skip

matplotlib.use("Agg")


@dataclass(frozen=True)
class Look:
    """How a method is drawn; the same in every figure of a report that shows the same methods."""

    colour: str
    marker: str
    line: Any
    hatch: str


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """A look for each method, in the order of legends: a colour for each id, which its variants share
    (and, of more ids than there are colours, later ones), told apart by their markers; the teacher is
    black and takes no colour."""
    found: dict[str, Look] = {}
    ids: dict[str, int] = {}
    taken: Counter[int] = Counter()  # looks of a colour
    for method in ordered(methods):
        name = Method.of(method).id
        if name == "teacher":
            found[method] = Look("#000000", "*", ":", "xx")
            continue
        colour = ids.setdefault(name, len(ids)) % len(COLOURS)
        other = (colour + taken[colour]) % len(MARKERS)
        taken[colour] += 1
        found[method] = Look(COLOURS[colour], MARKERS[other], LINES[other], HATCHES[other])
    return found


def among(looks: Mapping[str, Look], methods: Iterable[str]) -> dict[str, Look]:
    """The looks of some methods."""
    shown = set(methods)
    return {method: look for method, look in looks.items() if method in shown}


#: What a user's style file changes in all figures that are drawn under :func:`own_style`.
_OWN: ContextVar[dict[str, Any] | None] = ContextVar("own", default=None)


@contextmanager
def own_style(path: Path | None) -> Iterator[None]:
    """Draw figures with the settings of a matplotlib style file on top of those here, for one's own
    fonts and sizes. ``font.size`` scales all text, and the height of figures with it; the width in
    ``figure.figsize`` is that of a figure over both columns.

    Raises
    ------
    UserError
        The file cannot be read.
    """
    own: dict[str, Any] = {}
    if path is not None:
        try:
            own.update(matplotlib.rc_params_from_file(path, use_default_template=False).items())
        except (OSError, ValueError) as error:
            raise UserError(
                f"--style: expected a matplotlib style file, found {path} ({one_line(error)})"
            ) from error
    token = _OWN.set(own)
    try:
        yield
    finally:
        _OWN.reset(token)


@contextmanager
def figure(
    width: float,
    height: float,
    rows: int = 1,
    columns: int = 1,
    height_ratios: Sequence[float] | None = None,
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure in the house style with its axes, row by row; closed afterwards."""
    own = _OWN.get() or {}
    scale = own.get("font.size", SETTINGS["font.size"]) / SETTINGS["font.size"]
    sizes = {name: SETTINGS[name] * scale for name in TEXT_SIZES}
    with matplotlib.rc_context(SETTINGS | sizes | own):
        width *= own.get("figure.figsize", [PAGE])[0] / PAGE
        height *= scale
        drawn, axes = plt.subplots(
            rows, columns, figsize=(width, height), squeeze=False, height_ratios=height_ratios
        )
        try:
            yield drawn, [axis for row in axes for axis in row]
        finally:
            plt.close(drawn)


def save(drawn: Figure, path: Path) -> None:
    """Write ``path`` with each suffix of :data:`FORMATS`, without dates."""
    dates = {
        "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
        "png": {"Software": None},
        "svg": {"Date": None, "Creator": None},
    }
    layout = ConstrainedLayoutEngine()  # once: a figure's own engine works for each format again
    layout.execute(drawn)
    if break_labels(drawn):
        layout.execute(drawn)
    for suffix in FORMATS:
        drawn.savefig(path.with_suffix(f".{suffix}"), metadata=dates[suffix])


def break_labels(drawn: Figure) -> bool:
    """Break the labels that are longer than their axes into lines, as large letters in a style file
    make them; whether there are any."""
    broken = False
    for axes in drawn.axes:
        for axis, side in ((axes.xaxis, "width"), (axes.yaxis, "height")):
            text, room = axis.label.get_text(), getattr(axes.bbox, side)
            length = getattr(axis.label.get_window_extent(), side)
            if text and length > room:
                lines = textwrap.wrap(
                    text,
                    max(1, int(len(text) * room / length)),
                    break_long_words=False,
                    break_on_hyphens=False,
                )
                axis.label.set_text("\n".join(lines))
                broken = True
    return broken


def row_mark(
    axis: Axes,
    place: float,
    row: Mapping[Any, Any],
    name: str,
    look: Look,
    at_zero: bool,
    hollow: bool = False,
) -> None:
    """The value ``name`` of a row of a table with its interval, at a height; at 0 for what the others are
    compared with, and where a row has no value, words that say so. A ``hollow`` one stands back."""
    value = 0.0 if at_zero else row[name]
    if pd.isna(value):
        inside = axis.get_yaxis_transform()
        axis.text(0.5, place, "no run to compare with", transform=inside, ha="center", va="center",
                  fontsize="small", color="0.4")  # fmt: skip
        return
    reach = [[value - row[f"{name}_low"]], [row[f"{name}_high"] - value]]
    axis.errorbar(
        [value],
        [place],
        xerr=None if at_zero else np.abs(reach),
        fmt=look.marker,
        color=look.colour,
        markerfacecolor="white" if hollow else look.colour,
        elinewidth=0.4 if hollow else 0.9,
        capsize=1.8,
    )


def row_level(axis: Axes, place: float, text: str) -> None:
    """A number at the right of a panel."""
    inside = axis.get_yaxis_transform()
    axis.text(1.01, place, text, transform=inside, va="center", fontsize="small")


def label_rows(axis: Axes, places: Sequence[float], labels: Sequence[str]) -> None:
    """Rows from the top down, with their names at the left."""
    axis.set_yticks(places, labels)
    axis.invert_yaxis()
    axis.margins(y=0.12)
    axis.grid(axis="x", linewidth=0.3, color="0.85")


def share_x(axes: Sequence[Axes]) -> None:
    """Give panels of one unit the same limits, so that they compare."""
    low, high = zip(*(axis.get_xlim() for axis in axes), strict=True)
    for axis in axes:
        axis.set_xlim(min(low), max(high))


def hide(axes: Sequence[Axes]) -> None:
    """Panels that nothing is drawn in."""
    for axis in axes:
        axis.set_axis_off()


def abreast(table: pd.DataFrame) -> int:
    """How many panels with methods as labels stand in a row: names of variants need the whole width."""
    return 1 if max(len(label_of(method)) for method in table["method"]) > 20 else 2


def comparable(
    table: pd.DataFrame, by: Sequence[str] = ("method",)
) -> list[tuple[str, pd.DataFrame]]:
    """A table in parts in which means over directions compare, each with its name for a title: the rows of
    the directions that all methods (or groups of ``by``) have; without any, each direction alone."""
    groups = table.groupby(list(by))["direction"].agg(set)
    directions = sorted(table["direction"].unique())
    shared = sorted(set.intersection(*groups))
    found = []
    for part in [shared] if shared else [[name] for name in directions]:
        name = f"mean of {', '.join(part)}" if len(part) > 1 else part[0]
        found.append((name, table[table["direction"].isin(part)]))
    return found


def direction_mean(table: pd.DataFrame, by: str | Sequence[str], values: Any) -> Any:
    """Means by group over the directions, which weigh the same however many runs they have."""
    names = [by] if isinstance(by, str) else list(by)
    return table.groupby(["direction", *names])[values].mean().groupby(names).mean()


@contextmanager
def direction_panels(
    table: pd.DataFrame,
    height: float | Callable[[pd.DataFrame], float],
    path: Path,
    columns: int = 2,
) -> Iterator[list[tuple[Axes, pd.DataFrame]]]:
    """A figure with a panel for each direction, ``columns`` in a row: every panel with its rows of the
    table, their mean last. ``height``, in inches, may depend on these rows. It is saved when all are
    drawn."""
    directions = sorted(table["direction"].unique(), key=lambda name: (name == "all", name))
    parts = [table[table["direction"] == direction] for direction in directions]
    each = [height(part) if callable(height) else height for part in parts]
    heights = [max(each[start : start + columns]) for start in range(0, len(each), columns)]
    width = COLUMN if len(directions) == 1 < columns else PAGE
    across = min(columns, len(directions))
    with figure(width, sum(heights), len(heights), across, heights) as (drawn, axes):
        for axis, direction in zip(axes, directions, strict=False):
            if len(directions) > 1:
                axis.set_title("mean of the directions" if direction == "all" else direction)
        hide(axes[len(directions) :])
        yield list(zip(axes, parts, strict=False))
        save(drawn, path)
