"""The claims as a figure: effects with intervals, by direction."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.chapters.chapter import Figure
from analysis.claims.verdicts import PLACEBO
from analysis.runs.methods import label_of, ordered
from analysis.style import PAGE, Look, figure, hide, save

TITLES = {
    1: "1. KL on hard tokens",
    2: "2. KL on easy tokens",
    3: "3. non-target KL, hard tokens",
    4: "4. quality follows transfer",
    5: "5. hard turns easy sooner",
}
UNITS = {
    1: "fall of KL, nats",
    2: "fall of KL, nats",
    3: "fall of KL, nats",
    4: "correlation beyond chance",
    5: "sooner by, share of training",
}
#: How the baseline's seeds against each other are drawn.
CHANCE = Look("#777777", "x", "-", "")


def draw_claims(table: pd.DataFrame, path: Path, looks: Mapping[str, Look]) -> None:
    """What decides each claim, a panel each: effect and interval of every method and of the placebo, by
    direction; above 0 is in the claim's favour."""
    table = table[table["decides"].astype(bool) & table["effect"].notna()]
    # What all directions show together stands there only if it is of several.
    alone = ~table["directions"].astype(str).str.contains(" ")
    table = table.assign(scope=table["scope"].mask(alone, table["directions"]))
    table = table.drop_duplicates(["scope", "method", "claim"])
    judged = table[table["method"] != PLACEBO]
    claims = sorted(judged["claim"].unique())
    if not claims:
        return
    scopes = sorted(set(judged["scope"]), key=lambda name: (name == "all", name))
    treatments = [name for name in ordered(table["method"]) if name != PLACEBO] + [PLACEBO]
    columns = min(3, len(claims))
    rows = -(-len(claims) // columns)
    height = 0.62 + 0.13 * len(scopes) * len(treatments)
    with figure(PAGE, height * rows, rows, columns) as (drawn, axes):
        for axis, claim in zip(axes, claims, strict=False):
            part = table[table["claim"] == claim].set_index(["scope", "method"])
            axis.axvline(0, color="0.6", linewidth=0.6)
            for number, scope in enumerate(scopes):
                if number % 2:
                    axis.axhspan(number - 0.5, number + 0.5, color="0.95", linewidth=0)
                for index, treatment in enumerate(treatments):
                    if (scope, treatment) not in part.index:
                        continue
                    row = part.loc[(scope, treatment)]
                    look = CHANCE if treatment == PLACEBO else looks[treatment]
                    place = number + (index - (len(treatments) - 1) / 2) * 0.8 / len(treatments)
                    reach = [[row["effect"] - row["low"]], [row["high"] - row["effect"]]]
                    axis.errorbar(
                        [row["effect"]],
                        [place],
                        xerr=np.abs(reach),
                        fmt=look.marker,
                        color=look.colour,
                        elinewidth=1.6 if scope == scopes[-1] else 0.9,
                        capsize=1.5,
                    )
            axis.set_ylim(len(scopes) - 0.5, -0.5)
            axis.set_yticks(range(len(scopes)), scopes)
            axis.set_title(TITLES[claim])
            axis.set_xlabel(UNITS[claim])
            axis.locator_params(axis="x", nbins=5)  # labels of many digits would run together
        hide(axes[len(claims) :])
        handles, labels = [], []
        for treatment in treatments:
            look = CHANCE if treatment == PLACEBO else looks[treatment]
            (line,) = axes[0].plot([], [], look.marker, color=look.colour)
            handles.append(line)
            labels.append("placebo" if treatment == PLACEBO else label_of(treatment))
        if len(axes) > len(claims):
            axes[-1].legend(handles, labels, loc="center")
        else:
            drawn.legend(handles, labels, loc="outside lower center", ncols=3)
        save(drawn, path)


FIGURE = Figure(
    "claims",
    draw_claims,
    "What decides each claim, by direction and over all: effects with 95 % intervals; right of 0 is in the "
    "claim's favour. The placebo is the baseline against itself, whose mean is 0 by construction: its interval "
    "shows the spread between seeds.",
    by_look=True,
)
