"""Quality gained against transfer gained, sentence by sentence."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.chapters.chapter import Figure
from analysis.claims.evidence import sentence_gains
from analysis.runs.methods import label_of
from analysis.style import Look, among, direction_panels
from analysis.sums.direction import Direction, Options
from analysis.sums.pairing import couples

#: Groups of sentences in the figure of quality against transfer.
GROUPS = 10


def sentence_table(directions: Sequence[Direction], options: Options) -> pd.DataFrame:
    """Quality gained against transfer gained over the baseline: of each SE-KD method the sentences of
    all its seeds, in ``GROUPS`` equally large groups by transfer (fall of a sentence's mean KL, nats).
    One row a group: its means, the standard error of the chrF gained, and how many sentences it has."""
    rows = []
    for direction in directions:
        runs = [run for run in direction.scored if run.translations is not None]
        for method in sorted({str(run.method) for run in runs if run.method.is_treatment}):
            own = [run for run in runs if str(run.method) == method]
            gains = [
                np.stack(sentence_gains(direction, run, other)[:2])
                for run, other in couples(own, runs, options.baseline)
            ]
            if not gains:
                continue
            kl_gain, chrf_gain = np.concatenate(gains, axis=1)
            order = np.argsort(kl_gain, kind="stable")
            if len(order) < 2 * GROUPS:  # a group of one has no error
                continue
            for group, members in enumerate(np.array_split(order, GROUPS), start=1):
                rows.append(
                    {
                        "direction": direction.name,
                        "method": method,
                        "group": group,
                        "sentences": len(members),
                        "kl_gain": kl_gain[members].mean(),
                        "chrf_gain": chrf_gain[members].mean(),
                        "chrf_gain_error": pd.Series(chrf_gain[members]).sem(),
                    }
                )
    columns = ["direction", "method", "group", "sentences", "kl_gain", "chrf_gain"]
    return pd.DataFrame(rows, columns=[*columns, "chrf_gain_error"])


def draw_sentences(table: pd.DataFrame, path: Path, looks: Mapping[str, Look]) -> None:
    """Sentence chrF gained against transfer gained over the baseline: means of groups of sentences by
    transfer, with 95 % intervals, a panel a direction."""
    with direction_panels(table, 2.0, path) as panels:
        for axis, part in panels:
            for method, look in among(looks, table["method"]).items():
                own = part[part["method"] == method]
                axis.errorbar(
                    own["kl_gain"],
                    own["chrf_gain"],
                    yerr=1.96 * own["chrf_gain_error"],
                    color=look.colour,
                    marker=look.marker,
                    linestyle=look.line,
                    elinewidth=0.7,
                    capsize=1.5,
                    label=label_of(method),
                )
            axis.axhline(0, color="0.6", linewidth=0.5)
            axis.axvline(0, color="0.6", linewidth=0.5)
            axis.set_xlabel("transfer gained: fall of KL(p‖q), nats")
            axis.set_ylabel("sentence chrF gained")
        panels[0][0].legend(loc="best")


FIGURE = Figure(
    "sentences",
    draw_sentences,
    "Sentence chrF gained over the baseline by transfer gained; tenths of the sentences, 95 % intervals.",
    by_look=True,
)
