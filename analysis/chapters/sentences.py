"""Quality gained against transfer gained, sentence by sentence."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.chapters.chapter import Figure
from analysis.chapters.claims import CHANCE
from analysis.claims.evidence import Couple, sentence_gains
from analysis.claims.verdicts import PLACEBO
from analysis.runs.methods import label_of
from analysis.stats import ratio, resampled_variance
from analysis.style import Look, among, direction_panels
from analysis.sums.direction import Direction, Options
from analysis.sums.pairing import couples, of_method, placebo_couples

#: Groups of sentences in the figure of quality against transfer.
GROUPS = 10


def sentence_table(directions: Sequence[Direction], options: Options) -> pd.DataFrame:
    """Quality gained against transfer gained over the baseline: of each SE-KD method, and of the placebo (the
    baseline against its own other seeds), the sentences of each seed in ``GROUPS`` equally large groups by
    transfer (fall of a sentence's mean KL, nats).

    One row a group: how many sentences it has in each of the ``seeds``, its mean gains over these, and the
    standard error of the chrF gained, from the resamples of the direction's sentences, which all seeds
    share.
    """
    rows = []
    for direction in directions:
        runs = [run for run in direction.scored if run.translations is not None]
        methods = sorted({str(run.method) for run in runs if run.method.is_treatment})
        compared = {
            method: couples(
                [run for run in runs if str(run.method) == method], runs, options.baseline
            )
            for method in methods
        }
        if methods:
            compared[PLACEBO] = placebo_couples(of_method(runs, options.baseline))
        for method, found in compared.items():
            for group in _groups(direction, found):
                rows.append({"direction": direction.name, "method": method, **group})
    columns = ["direction", "method", "group", "seeds", "sentences", "kl_gain", "chrf_gain"]
    return pd.DataFrame(rows, columns=[*columns, "chrf_gain_error"])


def _groups(direction: Direction, found: Sequence[Couple]) -> Iterator[dict[str, Any]]:
    """The groups of some couples' sentences; none where one of them would have no error."""
    assert direction.tokens is not None and direction.resamples is not None
    sentences, units = len(direction.tokens.sentences), direction.resamples.units
    if not found or min(sentences, units) < 2 * GROUPS:
        return
    kl, chrf, drawn = [], [], []
    for run, other in found:
        kl_gain, chrf_gain = sentence_gains(direction, run, other)[:2]
        rank = np.empty(sentences, dtype=np.int64)
        rank[np.argsort(kl_gain, kind="stable")] = np.arange(sentences)
        edges = np.cumsum([len(part) for part in np.array_split(rank, GROUPS)])
        member = np.eye(GROUPS)[np.searchsorted(edges, rank, side="right")]  # (S, GROUPS)
        sizes = member.sum(axis=0)
        kl.append(kl_gain @ member / sizes)
        chrf.append(chrf_gain @ member / sizes)
        sums = direction.resamples.sums(np.hstack([member, member * chrf_gain[:, None]]))
        drawn.append(ratio(sums[:, GROUPS:], sums[:, :GROUPS]))
    # (B, GROUPS) of the mean over seeds
    errors = np.sqrt(resampled_variance(np.mean(drawn, axis=0).T, units))
    for index in range(GROUPS):
        yield {
            "group": index + 1,
            "seeds": len(found),
            "sentences": int(sizes[index]),
            "kl_gain": np.mean(kl, axis=0)[index],
            "chrf_gain": np.mean(chrf, axis=0)[index],
            "chrf_gain_error": errors[index],
        }


def draw_sentences(table: pd.DataFrame, path: Path, looks: Mapping[str, Look]) -> None:
    """Sentence chrF gained against transfer gained over the baseline: means of groups of sentences by
    transfer, with 95 % intervals, a panel a direction; in grey what the baseline's seeds show among
    themselves."""
    drawn = among(looks, table["method"])
    if PLACEBO in set(table["method"]):
        drawn[PLACEBO] = CHANCE
    with direction_panels(table, 2.0, path) as panels:
        for axis, part in panels:
            for method, look in drawn.items():
                own = part[part["method"] == method]
                if own.empty:
                    continue
                axis.errorbar(
                    own["kl_gain"],
                    own["chrf_gain"],
                    yerr=1.96 * own["chrf_gain_error"],
                    color=look.colour,
                    marker=look.marker,
                    linestyle=look.line,
                    elinewidth=0.7,
                    capsize=1.5,
                    label="placebo" if method == PLACEBO else label_of(method),
                )
            axis.axhline(0, color="0.6", linewidth=0.5)
            axis.axvline(0, color="0.6", linewidth=0.5)
            axis.set_xlabel("transfer gained: fall of KL(p‖q), nats")
            axis.set_ylabel("sentence chrF gained")
        panels[0][0].legend(loc="best")


FIGURE = Figure(
    "sentences",
    draw_sentences,
    "Sentence chrF gained over the baseline by transfer gained: tenths of the sentences of each seed, means over "
    "seeds, 95 % intervals over sentences. Grey is the placebo, the baseline against its own other seeds: a slope "
    "that chance gives.",
    by_look=True,
)
