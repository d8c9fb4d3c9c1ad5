"""Tables of transfer: each run's records by bucket, and its gain over the baselines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import sem

from analysis.aggregate import METRICS, Partition, calibration_error, ordered_map
from analysis.buckets import EASY, HARD
from analysis.judge import Judge, pairs
from analysis.measures import sentence_gains
from analysis.quality import BASELINES, Quality
from analysis.runs.methods import Method
from analysis.runs.run_record import Run
from analysis.runs.token_records import read_columns
from analysis.stats import Floats, interval, ratio, sorted_ranks
from analysis.study import partner

HISTOGRAM_BINS = 45
#: A teacher that gives the reference no more than this over the baseline has no lead to close.
SMALLEST_LEAD = 0.01


def run_columns(judge: Judge, run: Run) -> dict[str, Any]:
    """The columns that say which run a row is about."""
    return {
        "direction": judge.direction.name,
        "method": run.method,
        "seed": run.seed,
        "run": run.label,
        "step": judge.direction.scored[run.label],
    }


def transfer_table(judges: Sequence[Judge]) -> pd.DataFrame:
    """One row a run and bucket: counts, means over the bucket's tokens, interval of KL.

    ``agreement`` is the share of tokens where teacher and student have the same first choice,
    ``overlap_top5`` the mean share of the teacher's five best among the student's,
    ``surprise_rank_correlation`` Spearman's correlation of the two surprises at the reference
    (families all and difficulty). An empty bucket has count 0 and no values.
    """
    rows: list[dict[str, Any]] = []
    for judge in judges:
        ranks: dict[str, dict[tuple[str, str], _TeacherRanks]] = {}
        for run in judge.runs:  # once for each partition, the teacher being the same
            partition = judge.partition(run)
            if partition.selector not in ranks:
                ranks[partition.selector] = _teacher_ranks(judge, partition)
        q_gold = [judge.sums(run, judge.partition(run)).q_gold for run in judge.runs]
        items = zip(
            q_gold, (ranks[judge.partition(run).selector] for run in judge.runs), strict=True
        )
        found = ordered_map(lambda item: _rank_correlations(*item), items)
        for run, correlations in zip(judge.runs, found, strict=True):
            partition = judge.partition(run)
            sums = judge.sums(run, partition)
            means = ratio(sums.totals, partition.tokens[:, None])
            means[:, METRICS.index("overlap_top5")] /= 5
            low, high = interval(judge.resampled_kl(run, partition))
            for index, (family, bucket) in enumerate(partition.names):
                values = dict(zip(METRICS, means[index].tolist(), strict=True))
                kl = values.pop("kl")
                rows.append(
                    {
                        **run_columns(judge, run),
                        "family": family,
                        "bucket": bucket,
                        "tokens": int(partition.tokens[index]),
                        "sentences": int((partition.by_sentence[:, index] > 0).sum()),
                        "kl": kl,
                        "kl_low": low[index],
                        "kl_high": high[index],
                        **values,
                        "agreeing_tokens": int(sums.totals[index, METRICS.index("agreement")]),
                        "surprise_rank_correlation": correlations.get((family, bucket), np.nan),
                    }
                )
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class _TeacherRanks:
    """Tokens of a bucket (None: all) and the teacher's centred ranks of their references."""

    mask: NDArray[np.bool_] | None
    ranks: Floats


def _teacher_ranks(judge: Judge, partition: Partition) -> dict[tuple[str, str], _TeacherRanks]:
    """For all, easy and hard tokens."""
    hard = partition.codes("difficulty")
    return {
        key: _TeacherRanks(mask, _centred_ranks(judge.p_gold, judge.teacher_order, mask))
        for key, mask in (
            (("all", "all"), None),
            (("difficulty", "easy"), hard == EASY),
            (("difficulty", "hard"), hard == HARD),
        )
    }


def _centred_ranks(
    values: NDArray[np.float32], order: NDArray[np.intp], mask: NDArray[np.bool_] | None
) -> Floats:
    """Ranks of the chosen values less their mean, from the order of all of them."""
    if mask is not None:
        # The order among a bucket's tokens is theirs among all, so one sort serves all buckets.
        place = np.cumsum(mask) - 1
        values, order = values[mask], place[order[mask[order]]]
    return sorted_ranks(values, order) - (len(values) + 1) / 2


def _rank_correlations(
    q_gold: NDArray[np.float32], teacher: dict[tuple[str, str], _TeacherRanks]
) -> dict[tuple[str, str], float]:
    """Spearman's correlation of -log p_gold and -log q_gold, over all, easy and hard tokens."""
    # Surprise falls with probability on both sides, so the correlation is that of the two.
    order = np.argsort(q_gold, kind="stable")
    found: dict[tuple[str, str], float] = {}
    for key, other in teacher.items():
        ranks = _centred_ranks(q_gold, order, other.mask)
        scale = np.sqrt((ranks**2).sum() * (other.ranks**2).sum())
        found[key] = float((ranks * other.ranks).sum() / scale) if scale > 0 else np.nan
    return found


def gain_table(judges: Sequence[Judge]) -> pd.DataFrame:
    """One row a run, baseline and bucket: how much closer to the teacher than the baseline.

    ``gain`` is KL(baseline) - KL(run) in nats, ``relative_gain`` its share of KL(baseline);
    ``gain_target`` and ``gain_nontarget`` its parts; ``lead_closed`` the share of the teacher's lead
    over the baseline in the probability of the reference that the run has closed. Rows with
    ``selected_by_pair`` are biased: the difficulty of the run or of its baseline cut the tokens, so
    part of that one's hard tokens are hard by chance and any other run looks better on them (and
    worse on easy ones).
    """
    rows: list[dict[str, Any]] = []
    for judge in judges:
        for run in judge.runs:
            for baseline in BASELINES:
                other = partner(run, judge.runs, baseline)
                if other is not None and Method.of(run.method).id != baseline:
                    rows.extend(_gains(judge, run, other, baseline))
    return pd.DataFrame(rows, columns=None if rows else GAIN_COLUMNS)


GAIN_COLUMNS = [
    *("direction", "method", "seed", "run", "step", "baseline", "baseline_run", "family", "bucket"),
    *("tokens", "sentences", "gain", "gain_low", "gain_high", "relative_gain", "relative_low"),
    *("relative_high", "gain_target", "gain_nontarget", "agreement_gain", "lead_closed"),
    "selected_by_pair",
]


def _gains(judge: Judge, run: Run, other: Run, baseline: str) -> list[dict[str, Any]]:
    partition = judge.partition(run)
    own, base = (judge.sums(item, partition).totals for item in (run, other))
    tokens = partition.tokens
    own_kl, base_kl = (judge.resampled_kl(item, partition) for item in (run, other))
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
        values = (
            *(judge.direction.name, run.method, run.seed, run.label),
            *(judge.direction.scored[run.label], baseline, other.label, family, bucket),
            *(int(tokens[index]), int((partition.by_sentence[:, index] > 0).sum())),
            *(part[0], low[index], high[index]),
            *(relative[index], relative_low[index], relative_high[index]),
            *(part[METRICS.index(name)] for name in ("kl_target", "kl_nontarget")),
            *(-part[METRICS.index("agreement")], closed[index]),
            partition.selector in (run.label, other.label) and family.startswith("difficulty"),
        )
        rows.append(dict(zip(GAIN_COLUMNS, values, strict=True)))
    return rows


def difficulty_table(judges: Sequence[Judge]) -> pd.DataFrame:
    """A histogram of each run's token difficulty KL(p || q), bins of equal width in log10.

    The first bin also holds what lies below it, the last what lies above. ``gamma`` is the Γ in nats
    under which the run is judged.
    """
    edges = np.logspace(-5, 1.5, HISTOGRAM_BINS + 1)
    rows: list[dict[str, Any]] = []
    for judge in judges:
        for run in judge.runs:
            values = read_columns(judge.path(run), ["kl"])["kl"].astype(np.float64)
            counts = _histogram(values, edges)
            for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
                rows.append(
                    {
                        **run_columns(judge, run),
                        "low": low,
                        "high": high,
                        "tokens": int(count),
                        "share": count / len(values),
                        "gamma": judge.partition(run).gamma,
                    }
                )
    return pd.DataFrame(rows)


def _histogram(values: Floats, edges: Floats) -> NDArray[np.int64]:
    bins = np.searchsorted(edges, values, side="right") - 1
    return np.bincount(np.clip(bins, 0, len(edges) - 2), minlength=len(edges) - 1)


def calibration_table(judges: Sequence[Judge]) -> pd.DataFrame:
    """One row a run and bin of confidence, for the student and its teacher: tokens, mean confidence
    in the first choice, share of right first choices; ``error`` is the expected calibration error."""
    rows: list[dict[str, Any]] = []
    for judge in judges:
        for run in judge.runs:
            for side, bins in zip(
                ("teacher", "student"),
                judge.sums(run, judge.partition(run)).calibration,
                strict=True,
            ):
                means = ratio(bins[:, 1:], bins[:, :1])
                for index, (count, (confidence, accuracy)) in enumerate(
                    zip(bins[:, 0], means, strict=True)
                ):
                    rows.append(
                        {
                            **run_columns(judge, run),
                            "side": side,
                            "bin": index,
                            "tokens": int(count),
                            "confidence": confidence,
                            "accuracy": accuracy,
                            "error": calibration_error(bins),
                        }
                    )
    return pd.DataFrame(rows)


#: Groups of sentences in the figure of quality against transfer.
GROUPS = 10


def sentence_table(
    judges: Sequence[Judge], qualities: Mapping[str, Quality], baseline: str
) -> pd.DataFrame:
    """Quality gained against transfer gained over the baseline: of each SE-KD method the sentences of
    all its seeds, in ``GROUPS`` equally large groups by transfer (fall of a sentence's mean KL, nats).
    One row a group: its means, the standard error of the chrF gained, and how many sentences it has."""
    rows = []
    for judge in judges:
        quality = qualities.get(judge.direction.name)
        if quality is None:
            continue
        labels = {run.label for run in quality.runs()}
        for method in sorted(
            {run.method for run in judge.runs if Method.of(run.method).is_treatment}
        ):
            gains = [
                np.stack(sentence_gains(judge, quality, run, other)[:2])
                for run, other in pairs(judge, method, baseline)
                if {run.label, other.label} <= labels
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
                        "direction": judge.direction.name,
                        "method": method,
                        "group": group,
                        "sentences": len(members),
                        "kl_gain": kl_gain[members].mean(),
                        "chrf_gain": chrf_gain[members].mean(),
                        "chrf_gain_error": sem(chrf_gain[members]),
                    }
                )
    columns = ["direction", "method", "group", "sentences", "kl_gain", "chrf_gain"]
    return pd.DataFrame(rows, columns=[*columns, "chrf_gain_error"])
