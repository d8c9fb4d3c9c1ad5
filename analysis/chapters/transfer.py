"""Transfer by bucket: each run's records, and its gain over the baselines."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from analysis.chapters.chapter import Figure
from analysis.chapters.quality import RUN_COLUMNS
from analysis.runs.methods import label_of
from analysis.stats import Floats, interval, ratio
from analysis.style import (
    PAGE,
    Look,
    among,
    comparable,
    direction_mean,
    figure,
    hide,
    save,
)
from analysis.sums.bucket_sums import METRICS, Partition
from analysis.sums.direction import Direction, Options, ScoredRun
from analysis.sums.pairing import partner
from analysis.sums.selection import bias

#: A teacher that gives the reference no more than this over the baseline has no lead to close.
SMALLEST_LEAD = 0.01


def run_columns(direction: Direction, run: ScoredRun) -> dict[str, Any]:
    """The columns that say which run a row is about."""
    return {
        "direction": direction.name,
        "method": str(run.method),
        "seed": run.seed,
        "run": run.label,
        "step": run.step,
    }


class ResampledKL:
    """Mean KL of every bucket in every resample, (B, K), of runs of a direction.

    Made for all runs of a partition together: unpacking the counts of the resamples costs more than
    multiplying with them.
    """

    def __init__(self, direction: Direction) -> None:
        parts: dict[tuple[str, ...], dict[str, Floats]] = {}
        for run in direction.scored:
            for selector, sums in run.sums.items():
                parts.setdefault(selector, {})[run.label] = sums.kl
        partitions = {run.cut.selector: run.cut for run in direction.scored}
        partitions |= {partition.selector: partition for partition in direction.cuts.values()}
        assert direction.resamples is not None
        self._means: dict[tuple[str, tuple[str, ...]], Floats] = {}
        for selector, own in parts.items():
            columns = [partitions[selector].by_sentence, *own.values()]
            drawn = direction.resamples.sums(np.concatenate(columns, axis=1))
            tokens, *means = np.split(drawn, len(columns), axis=1)
            for label, values in zip(own, means, strict=True):
                self._means[label, selector] = ratio(values, tokens)

    def of(self, run: ScoredRun, partition: Partition) -> Floats:
        """Of a run under a partition in which it is compared."""
        return self._means[run.label, partition.selector]


def transfer_tables(
    directions: Sequence[Direction], options: Options
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Each run's records by bucket, and how much closer to the teacher than the baselines it is.

    Returns
    -------
    levels : one row a run and bucket: counts, means over the bucket's tokens, interval of KL.
        ``agreement`` is the share of tokens where teacher and student have the same first choice,
        ``overlap_top5`` the mean share of the teacher's five best among the student's. An empty bucket
        has count 0 and no values.
    gains : one row a run, baseline and bucket. ``gain`` is KL(baseline) - KL(run) in nats,
        ``relative_gain`` its share of KL(baseline); ``gain_target`` and ``gain_nontarget`` its parts;
        ``lead_closed`` the share of the teacher's lead over the baseline in the probability of the
        reference that the run has closed. Rows with ``selected_by_pair`` are biased: the run or its
        baseline shares a method or a seed with what cut the tokens, and so some of its errors; it looks
        worse on hard tokens than it is, and better on easy ones.
    """
    levels: list[dict[str, Any]] = []
    gains: list[dict[str, Any]] = []
    for direction in directions:
        if not direction.scored:
            continue
        resampled = ResampledKL(direction)
        for run in direction.scored:
            levels.extend(_levels(direction, run, resampled))
            for baseline in options.baselines:
                other = partner(run, direction.scored, baseline)
                if other is not None and run.method.id != baseline:
                    gains.extend(_gains(direction, run, other, baseline, resampled))
    return (
        pd.DataFrame(levels, columns=None if levels else [*RUN_COLUMNS, "family", "bucket"]),
        pd.DataFrame(gains, columns=None if gains else GAIN_COLUMNS),
    )


def _levels(
    direction: Direction, run: ScoredRun, resampled: ResampledKL
) -> Iterator[dict[str, Any]]:
    partition = run.cut
    sums = run.under(partition)
    means = ratio(sums.totals, partition.tokens[:, None])
    means[:, METRICS.index("overlap_top5")] /= 5
    low, high = interval(resampled.of(run, partition))
    for index, (family, bucket) in enumerate(partition.names):
        values = dict(zip(METRICS, means[index].tolist(), strict=True))
        kl = values.pop("kl")
        yield {
            **run_columns(direction, run),
            "family": family,
            "bucket": bucket,
            "tokens": int(partition.tokens[index]),
            "sentences": int((partition.by_sentence[:, index] > 0).sum()),
            "kl": kl,
            "kl_low": low[index],
            "kl_high": high[index],
            **values,
            "agreeing_tokens": int(sums.total("agreement")[index]),
        }


GAIN_COLUMNS = [
    "direction",
    "method",
    "seed",
    "run",
    "step",
    "baseline",
    "baseline_run",
    "family",
    "bucket",
    "tokens",
    "sentences",
    "gain",
    "gain_low",
    "gain_high",
    "relative_gain",
    "relative_low",
    "relative_high",
    "gain_target",
    "gain_nontarget",
    "agreement_gain",
    "lead_closed",
    "selected_by_pair",
]


def _gains(
    direction: Direction, run: ScoredRun, other: ScoredRun, baseline: str, resampled: ResampledKL
) -> list[dict[str, Any]]:
    partition = direction.cut(run, other)
    biased = bool(bias(direction, run, other))
    own, base = (item.under(partition).totals for item in (run, other))
    tokens = partition.tokens
    own_kl, base_kl = (resampled.of(item, partition) for item in (run, other))
    low, high = interval(base_kl - own_kl)
    relative_low, relative_high = interval(ratio(base_kl - own_kl, base_kl))
    difference = ratio(base - own, tokens[:, None])  # (K, M)
    relative = ratio(base[:, 0] - own[:, 0], base[:, 0])
    p, q, q_base = (
        source[:, METRICS.index(name)]
        for source, name in ((own, "p_gold"), (own, "q_gold"), (base, "q_gold"))
    )
    lead = p - q_base
    closed = ratio(q - q_base, np.where(lead > SMALLEST_LEAD, lead, 0.0))
    rows = []
    for index, (family, bucket) in enumerate(partition.names):
        part = difference[index]
        values = [
            direction.name,
            str(run.method),
            run.seed,
            run.label,
            run.step,
            baseline,
            other.label,
            family,
            bucket,
            int(tokens[index]),
            int((partition.by_sentence[:, index] > 0).sum()),
            part[METRICS.index("kl")],
            low[index],
            high[index],
            relative[index],
            relative_low[index],
            relative_high[index],
            part[METRICS.index("kl_target")],
            part[METRICS.index("kl_nontarget")],
            -part[METRICS.index("agreement")],
            closed[index],
            biased and family.startswith("difficulty"),
        ]
        rows.append(dict(zip(GAIN_COLUMNS, values, strict=True)))
    return rows


#: Families of the transfer figure and what its axes say.
PANELS = {
    "difficulty": "difficulty",
    "difficulty quantile": "quantile of difficulty",
    "frequency": "training frequency",
    "teacher entropy": "teacher entropy (quantile)",
    "position": "target position",
    "teacher": "teacher about reference",
    "piece": "piece",
}


def draw_transfer(table: pd.DataFrame, path: Path, looks: Mapping[str, Look]) -> None:
    """KL to the teacher by bucket and method, a panel a family; mean over seeds, then over the directions
    that all methods have, bars are the mean of the runs' intervals. Without such a direction easy and hard
    tokens alone, a panel a direction."""
    parts = comparable(table)
    if len(parts) == 1:
        ((over, part),) = parts
        panels = [(family, "", part) for family in PANELS if family in set(part["family"])]
    else:
        over = ""
        panels = [("difficulty", name, part) for name, part in parts]
    methods = among(looks, table["method"])
    rows = -(-len(panels) // 2)
    with figure(PAGE, 1.75 * rows, rows, 2) as (drawn, axes):
        if over and table["direction"].nunique() > 1:
            drawn.suptitle(over)
        for axis, (family, title, part) in zip(axes, panels, strict=False):
            _draw_family(axis, part[part["family"] == family], methods)
            axis.set_title(title)
            axis.set_xlabel(PANELS[family])
            axis.set_ylabel("KL(p‖q), nats")
        hide(axes[len(panels) :])
        handles = [
            Patch(facecolor=look.colour, hatch=look.hatch, edgecolor="black", linewidth=0.3)
            for look in methods.values()
        ]
        spare = axes[len(panels)] if len(axes) > len(panels) else axes[0]
        spare.legend(
            handles,
            [label_of(method) for method in methods],
            loc="center" if len(axes) > len(panels) else "upper left",
        )
        save(drawn, path)


def _draw_family(axis: Axes, part: pd.DataFrame, methods: Mapping[str, Look]) -> None:
    part = part.assign(code=_bucket_codes(part))
    width = 0.8 / len(methods)
    for index, (method, look) in enumerate(methods.items()):
        own = part[part["method"] == method]
        if own.empty:
            continue
        mean = direction_mean(own, "code", ["kl", "kl_low", "kl_high"])
        place = mean.index.to_numpy() + (index - (len(methods) - 1) / 2) * width
        axis.bar(
            place,
            mean["kl"],
            width,
            yerr=np.abs(np.stack([mean["kl"] - mean["kl_low"], mean["kl_high"] - mean["kl"]])),
            color=look.colour,
            hatch=look.hatch,
            edgecolor="white" if index == 0 else "black",
            linewidth=0.3,
            error_kw={"elinewidth": 0.6, "capsize": 1.2},
        )
    names = part.drop_duplicates("code").sort_values("code")
    labels = [_short(name) for name in names["bucket"]]
    axis.set_xticks(range(len(labels)), labels)
    for code in names.loc[names["tokens"] == 0, "code"]:
        axis.annotate(
            "no\ntokens", (code, 0), ha="center", va="bottom", fontsize="x-small", color="0.4"
        )


def _bucket_codes(part: pd.DataFrame) -> pd.Series:
    """The place of each row's bucket in its family: rows of a run stand in that order."""
    return part.groupby("run").cumcount()


def _short(bucket: str) -> str:
    """A bucket's name for a tick: quantile ranges go, long names break."""
    if len(bucket) > 6 and bucket.replace("-", "").isdigit():
        return bucket.replace("-", "-\n")
    bucket = bucket.split(" of ")[0] if " of " in bucket and "(" in bucket else bucket
    return (
        bucket.replace(" about the reference", "")
        .replace("end of sentence", "end")
        .replace(" ", "\n")
    )


FIGURE = Figure(
    "transfer",
    draw_transfer,
    "KL to the teacher by bucket, mean over seeds and then over the directions that all methods have, which "
    "stand above where there are several; bars are the mean of the runs' 95 % intervals.",
    by_look=True,
)
