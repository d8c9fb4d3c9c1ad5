"""How much of the teacher's lead over plain fine-tuning has each student closed?

    python -m analysis.gap RUNS [--comet MODEL]

A table of teacher, fine-tuning, word-level KD and students: BLEU, chrF and (with a model) COMET, the
share of the gap closed with its interval, length and repetition. Runs need translations alone.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.optimize

from analysis.comparison.words import brevity_penalty, repeats
from analysis.markup import markdown_table, number, percent
from analysis.neural import add_comet_option
from analysis.runs.errors import UserError, one_line_errors
from analysis.runs.methods import label_of, ordered
from analysis.runs.run_record import warn_left_out
from analysis.stats import ALPHA, Floats, hierarchical
from analysis.sums.direction import Direction, Options, ScoredRun
from analysis.sums.loading import load
from analysis.sums.pairing import couples, of_method, partner
from analysis.terminal import progress

TEACHER = "teacher"
METRICS = ("BLEU", "chrF", "COMET")
#: A bound of an interval farther out than this says nothing.
FARTHEST = 1000.0


@dataclass(frozen=True)
class Effects:
    """Differences of scores by seed, (S,), and in every resample of the sentences, (S, B)."""

    observed: Floats
    drawn: Floats

    def less(self, share: float, other: "Effects") -> "Effects":
        """These less a share of others."""
        return Effects(self.observed - share * other.observed, self.drawn - share * other.drawn)


@dataclass(frozen=True)
class Score:
    """A run's score, and that in every resample of the sentences, (B,)."""

    value: float
    drawn: Floats


#: Scores by label of the run.
Scores = Mapping[str, Score]


def gap_table(directions: Sequence[Direction], baseline: str = "finetune") -> pd.DataFrame:
    """One row a direction, method and metric; of several directions also their mean (``all``).

    ``closed`` is the share of the gap that a method has closed: its gain over the baseline's run of
    the same seed by the teacher's, means over seeds and directions, with the bounds ``low`` and
    ``high`` of :func:`share_closed`. It is NaN for the teacher, the baseline, and where there is no
    teacher that leads. ``length_ratio``, ``brevity_penalty`` and ``repetition`` (the share of
    translations with words three times in a row) are means over seeds.
    """
    usable = [direction for direction in directions if direction.corpus is not None]
    scores = [score_runs(direction) for direction in usable]
    groups = {direction.name: [place] for place, direction in enumerate(usable)}
    if len(usable) > 1:
        groups["all"] = list(range(len(usable)))
    lengths = [_lengths(direction) for direction in usable]
    rows = []
    for name, places in groups.items():
        methods = [{str(run.method) for run in usable[place].translated} for place in places]
        for method in ordered(set.intersection(*methods)):
            own = pd.concat([lengths[place] for place in places])
            mean = own[own["method"] == method].groupby("direction").mean(numeric_only=True).mean()
            for metric in METRICS:
                parts = [(usable[place], scores[place].get(metric, {})) for place in places]
                if (row := _row(parts, method, baseline)) is not None:
                    head = {"direction": name, "method": method, "metric": metric}
                    rows.append(head | row | mean.to_dict())
    return pd.DataFrame(rows)


def score_runs(direction: Direction) -> dict[str, Scores]:
    """Scores by metric, of every run with translations."""
    corpus = direction.corpus
    assert corpus is not None
    found: dict[str, dict[str, Score]] = {metric: {} for metric in corpus.metrics}
    for run in progress(direction.translated, desc=f"score {direction.name}", unit="run"):
        assert run.translations is not None
        for metric, scores in found.items():
            scores[run.label] = Score(
                corpus.corpus_score(run.translations, metric),
                corpus.resampled_scores(run.translations, metric),
            )
    return dict(found)


def _lengths(direction: Direction) -> pd.DataFrame:
    """Length and repetition of every run with translations."""
    assert direction.corpus is not None
    cut = direction.corpus.metrics["BLEU"].tokenizer
    rows = []
    for run in direction.translated:
        assert run.translations is not None
        lines = run.translations.texts.hypotheses
        rows.append(
            {
                "direction": direction.name,
                "method": str(run.method),
                "length_ratio": run.translations.length_ratio,
                "brevity_penalty": brevity_penalty(*run.translations.lengths),
                "repetition": np.mean([repeats(cut(line).split()) for line in lines]),
            }
        )
    return pd.DataFrame(rows)


def _row(
    parts: Sequence[tuple[Direction, Scores]], method: str, baseline: str
) -> dict[str, Any] | None:
    """Mean, spread and share of the gap of a method in some directions; None where a run of it has
    no score."""
    values, gains, leads = [], [], []
    for direction, scores in parts:
        runs = [run for run in direction.translated if str(run.method) == method]
        if not all(run.label in scores for run in runs):
            return None
        values.append(np.array([scores[run.label].value for run in runs]))
        if method not in (TEACHER, baseline) and (
            both := _gains(direction, runs, baseline, scores)
        ):
            gains.append(both[0])
            leads.append(both[1])
    share = Share(np.nan, np.nan, np.nan)
    if len(gains) == len(parts):
        share = share_closed(
            gains, leads, [part.corpus.sentences for part, _ in parts if part.corpus]
        )
    one = len(parts) == 1 and len(values[0]) > 1
    return {
        "seeds": min(map(len, values)),
        "mean": float(np.mean([own.mean() for own in values])),
        "sd": float(values[0].std(ddof=1)) if one else np.nan,
        "closed": share.closed,
        "low": share.low,
        "high": share.high,
    }


def _gains(
    direction: Direction, runs: Sequence[ScoredRun], baseline: str, scores: Scores
) -> tuple[Effects, Effects] | None:
    """The gains of some runs over the baseline's, and the teacher's over the same ones."""
    found = [
        (scores[run.label], scores[other.label], scores[teacher.label])
        for run, other in couples(runs, direction.translated, baseline)
        if (teacher := partner(run, direction.translated, TEACHER)) is not None
        and other.label in scores
        and teacher.label in scores
    ]
    if not found:
        return None
    own, base, lead = (
        Effects(np.array([item.value for item in some]), np.stack([item.drawn for item in some]))
        for some in zip(*found, strict=True)
    )
    return own.less(1.0, base), lead.less(1.0, base)


class Share(NamedTuple):
    """The share of a gap that is closed, with its interval."""

    closed: float
    low: float
    high: float


def share_closed(
    gains: Sequence[Effects], leads: Sequence[Effects], sentences: Sequence[int]
) -> Share:
    """Mean gain by mean lead over seeds and directions, with Fieller's 95 % interval: the shares g for
    which :func:`analysis.stats.hierarchical` does not reject that ``gain - g lead`` is 0.

    All NaN where the teacher does not lead; without bounds where its lead is not significant (or cannot be
    tested), as a ratio to what may be nothing can be anything.

    References
    ----------
    Fieller, E. C. (1954). Some problems in interval estimation. Journal of the Royal Statistical
    Society B 16(2). https://doi.org/10.1111/j.2517-6161.1954.tb00159.x
    """
    lead = hierarchical([e.observed for e in leads], [e.drawn for e in leads], sentences)
    if lead.effect <= 0:
        return Share(np.nan, np.nan, np.nan)
    share = float(np.mean([e.observed.mean() for e in gains])) / lead.effect
    if not lead.p <= ALPHA:
        return Share(share, np.nan, np.nan)

    def excess(at: float) -> float:
        rest = [gain.less(at, own) for gain, own in zip(gains, leads, strict=True)]
        tested = hierarchical([e.observed for e in rest], [e.drawn for e in rest], sentences)
        return tested.p - ALPHA

    return Share(share, _bound(excess, share, -1.0), _bound(excess, share, 1.0))


def _bound(excess: Callable[[float], float], share: float, sign: float) -> float:
    """Where ``excess`` falls to 0, from ``share`` in one direction."""
    step = 0.1
    while excess(share + sign * step) > 0:
        step *= 2
        if step > FARTHEST:
            return float("nan")
    return share + sign * float(
        scipy.optimize.brentq(lambda d: excess(share + sign * d), 0.0, step)
    )


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The table as readers get it: one row a direction and method."""
    rows = []
    for (direction, method), own in table.groupby(["direction", "method"], sort=False):
        row = {"direction": direction, "method": label_of(method)}
        for metric in METRICS:
            if metric not in set(table["metric"]):
                continue
            found = own[own["metric"] == metric].to_dict("records")
            row[metric] = _mean(found[0]) if found else ""
            row[f"{metric} gap closed"] = _closed(found[0]) if found else ""
        first = own.iloc[0]
        row["seeds"] = str(first["seeds"])
        row["length ratio"] = number(first["length_ratio"], 3)
        row["with a repetition"] = percent(first["repetition"])
        rows.append(row)
    return pd.DataFrame(rows)


def _mean(row: Mapping[Any, Any]) -> str:
    return f"{row['mean']:.2f}" + ("" if np.isnan(row["sd"]) else f" ± {row['sd']:.2f}")


def _closed(row: Mapping[Any, Any]) -> str:
    if np.isnan(row["closed"]):
        return ""
    if np.isnan(row["low"]) or np.isnan(row["high"]):
        return f"{row['closed']:z.0%} (the lead is uncertain)"
    return f"{row['closed']:z.0%} [{row['low']:z.0%}, {row['high']:z.0%}]"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m analysis.gap",
        description="Say how much of the teacher's lead over fine-tuning each student has closed.",
    )
    add = out.add_argument
    add("runs", type=Path, metavar="RUNS", help="directory of runs, found by their run.json")
    add("--csv", type=Path, metavar="FILE", help="write the table with all digits there too")
    add("--subset", default="test", help="split that was translated (default: %(default)s)")
    add(
        "--baseline",
        default="finetune",
        metavar="METHOD",
        help="what the teacher's lead is over (default: %(default)s)",
    )
    add_comet_option(out)
    add("--resamples", type=int, default=1000, help="bootstrap resamples (default: %(default)s)")
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Read the runs and print the table."""
    args = parser().parse_args(argv)
    with one_line_errors():
        if args.csv is not None and not args.csv.parent.is_dir():
            raise UserError(f"--csv: expected a file in a directory, found no {args.csv.parent}")
        options = Options(subset=args.subset, resamples=args.resamples)
        directions, left_out = load(args.runs, options, args.comet, records=False)
        warn_left_out(left_out)
        table = gap_table(directions, args.baseline)
        if not any(of_method(found.translated, args.baseline) for found in directions):
            raise UserError(
                f"--baseline: expected a method of the runs ({', '.join(table['method'].unique())}), "
                f"found {args.baseline}"
            )
        print(markdown_table(shown(table)))
        print(
            f"\nShare of the teacher's lead over {label_of(args.baseline)} that is closed, with 95 % "
            "intervals (Fieller's, over seeds and sentences)."
        )
        if args.csv is not None:
            table.to_csv(args.csv, index=False, float_format="%.9g")


if __name__ == "__main__":
    main()
