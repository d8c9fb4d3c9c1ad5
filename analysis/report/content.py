"""The chapters of a report: tables as they are shown, the words around them, and the figures."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.chapters.quality import baselines_of
from analysis.claims import verdicts
from analysis.claims.evidence import other_data, other_model
from analysis.claims.verdicts import PLACEBO
from analysis.figures import FIGURES
from analysis.markup import interval, number, p_value, percent, span
from analysis.report.blocks import Block, Drawing, Section, Table
from analysis.report.findings import judged
from analysis.runs.methods import label_of, ordered
from analysis.runs.run_record import LeftOut
from analysis.sums.direction import Direction, Options, ScoredRun
from analysis.sums.pairing import mixed_settings, partner

Rows = list[dict[str, Any]]
Tables = dict[str, pd.DataFrame]
#: Beside the tables of BLEU.
LENGTHS = (
    "The length ratio is words of the translations by words of the references, as BLEU counts them: below 1 "
    "BLEU has its brevity penalty, and a difference of BLEU may be one of length. The length penalty is the one "
    "that a run's search was given."
)


def sections(
    directions: Sequence[Direction],
    left_out: Sequence[LeftOut],
    tables: Tables,
    options: Options,
    drawn: Sequence[str],
) -> list[Section]:
    """The chapters, with the figures that were drawn; one without anything to show is left out."""
    found = [
        ("claims", "Claims", [*_figure("claims", drawn), *claims_blocks(tables, options)]),
        ("quality", "Translation quality", quality_blocks(tables, drawn)),
        ("sensitivity", "Sensitivity", _figure("sensitivity", drawn)),
        ("transfer", "Transfer by bucket", transfer_blocks(tables, drawn)),
        ("difficulty", "Difficulty", _figure("difficulty", drawn)),
        (
            "training",
            "Over training",
            [*_figure("training", drawn), *_figure("transitions", drawn)],
        ),
        ("sentences", "Quality against transfer", _figure("sentences", drawn)),
        ("runs", "What was compared", scope_blocks(directions, left_out, options)),
        ("method", "How this was computed", method_blocks(directions, options)),
    ]
    return [Section(key, heading, tuple(blocks)) for key, heading, blocks in found if blocks]


def _figure(name: str, drawn: Sequence[str]) -> list[Block]:
    return [Drawing(name, FIGURES[name].caption)] if name in drawn else []


def scope_blocks(
    directions: Sequence[Direction], left_out: Sequence[LeftOut], options: Options
) -> list[Block]:
    """Runs, seeds and sizes of every direction, and what was left out."""
    lines = []
    for direction in directions:
        tokens = direction.tokens
        size = (
            f"{len(tokens.sentences)} sentences, {len(tokens.token)} tokens" if tokens else "none"
        )
        seeds = {run.seed for run in direction.runs}
        lines.append(
            f"- {direction.name}: {_count(len(direction.runs), 'run')}, "
            f"{_count(len(seeds), 'seed')}; token records of `{options.subset}`: {size}"
        )
    for direction in directions:
        mixed = mixed_settings((run.method, run.run) for run in direction.runs)
        lines += [f"- {direction.name}: {told}" for told in mixed]
    for told, differ in ((OTHER_DATA, other_data), (OTHER_MODEL, other_model)):
        lines += _unlike(directions, options.baseline, told, differ)
    lines += [f"- left out: `{item.label}`: {item.reason}" for item in left_out]
    return ["\n".join(lines)]


#: What "What was compared" says of methods that differ from the baseline in more than the loss.
OTHER_DATA = (
    "- trained on {:,} sentences, and {} on {:,}: {}. What sets them apart from it may be the data and not "
    "the loss."
)
OTHER_MODEL = (
    "- models of {:,} parameters, and {} of {:,}: {}. What sets them apart from it may be the model and not "
    "the loss."
)


def _unlike(
    directions: Sequence[Direction],
    baseline: str,
    told: str,
    differ: Callable[[ScoredRun, ScoredRun], tuple[int, int] | None],
) -> list[str]:
    """Which methods differ from the baseline in a number, in the words ``told``."""
    found: dict[tuple[int, int], set[str]] = {}
    for direction in directions:
        for run in direction.runs:
            other = partner(run, direction.runs, baseline)
            if run.method.id == "teacher" or other is None:
                continue
            if numbers := differ(run, other):
                found.setdefault(numbers, set()).add(str(run.method))
    return [
        told.format(own, label_of(baseline), base, ", ".join(map(label_of, ordered(methods))))
        for (own, base), methods in sorted(found.items())
    ]


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def claims_blocks(tables: Tables, options: Options) -> list[Block]:
    """The pooled claims of every method and of the placebo, and the rule."""
    claims = tables["claims"]
    if options.subset.startswith("train"):
        return ["No claim is computed from the training set."]
    if claims.empty:
        return ["No run of a SE-KD method to judge."]
    blocks: list[Block] = []
    pooled = claims[claims["scope"] == "all"]
    deciding = pooled[pooled["decides"].astype(bool)]
    for treatment in judged(claims):
        own = deciding[deciding["treatment"] == treatment]
        blocks.append(f"**{label_of(treatment)}** against {label_of(options.baseline)}:")
        blocks.append(Table(without_empty(claim_rows(own)), source="tables/claims.csv"))
    few = deciding[~deciding["treatment"].isin([*judged(claims), PLACEBO])]
    rest = pooled[~pooled["decides"].astype(bool) & (pooled["treatment"] != PLACEBO)]
    rest = rest[rest["effect"].notna()]
    chance = pooled[(pooled["treatment"] == PLACEBO) & pooled["decides"].astype(bool)]
    for part, fold in (
        (few, "Methods with too few seeds for a verdict"),
        (rest, "Measures that accompany the claims and do not decide them"),
        (chance, "The placebo: the baseline against itself, the spread between seeds"),
    ):
        if len(part):
            rows = claim_rows(part, method=True, verdict=part is few)
            blocks.append(Table(without_empty(rows), fold=fold, source="tables/claims.csv"))
    if not tables["relation"].empty:
        rows = [
            {
                "method": label_of(row["method"]),
                "excess": interval(100 * row["effect"], 100 * row["low"], 100 * row["high"], 1),
                "p": p_value(row["p"]),
                "runs": str(row["runs"]),
                "shares errors with another seed": "yes" if row["unequal"] else "no",
            }
            for row in tables["relation"].to_dict("records")
        ]
        blocks.append(
            Table(
                pd.DataFrame(rows),
                fold="KL on the hard tokens of one's own seed, in % above that on those of others",
                source="tables/relation.csv",
            )
        )
    blocks.extend(_partly_pooled(pooled))
    blocks.append(
        "Effects above 0 are in the claim's favour. *Detectable* is the smallest effect that such runs would "
        "detect with 80 % power, after Holm's correction (claim 2: from a loss of the margin). Each direction "
        "alone: `tables/claims.csv`; the rule of the verdicts: *How this was computed*."
    )
    return blocks


def _partly_pooled(pooled: pd.DataFrame) -> list[str]:
    """Which methods, or measures, are not of all the directions that others are of."""
    whole = max(pooled["directions"], key=lambda names: len(names.split()))
    named = []
    for treatment, rows in pooled[pooled["directions"] != ""].groupby("treatment", sort=False):
        method, own = label_of(str(treatment)), set(rows["directions"])
        if own == {whole}:
            continue
        if len(own) == 1:
            named.append(f"{method}: {own.pop()}")
            continue
        named += [
            f"claim {row['claim']}, {row['measure']} ({method}): {row['directions']}"
            for row in rows[rows["directions"] != whole].to_dict("records")
        ]
    return (
        [f"Not of all directions, for want of data in the others: {'; '.join(named)}."]
        if named
        else []
    )


def claim_rows(table: pd.DataFrame, method: bool = False, verdict: bool = True) -> Rows:
    """Rows of the table of claims as they are shown, with a column of methods where asked for; without
    verdicts for measures that decide nothing."""
    return [
        {
            **({"method": label_of(row["treatment"])} if method else {}),
            "claim": f"{row['claim']}. {row['statement']}",
            **({"verdict": str(row["verdict"])} if verdict else {}),
            "effect": interval(row["effect"], row["low"], row["high"]),
            "relative": percent(row["relative_effect"]) if row["claim"] != 4 else "",
            "detectable": number(row["detectable"], 3),
            "p (Holm)" if verdict else "p": p_value(row["p_holm"] if verdict else row["p"]),
            "seeds": str(row["seeds"]),
            "measure": row["measure"],
            "reason": row["reason"] if isinstance(row["reason"], str) else "",
        }
        for row in table.to_dict("records")
    ]


def quality_blocks(tables: Tables, drawn: Sequence[str]) -> list[Block]:
    """Means over seeds with their gains; every run alone folds away."""
    results, methods = tables["results"], tables["methods"]
    if results.empty:
        return ["No run has translations."]
    blocks: list[Block] = [*_figure("methods", drawn)]
    baselines = baselines_of(methods, "gain_over_")
    if methods[[f"gain_over_{name}" for name in baselines]].isna().all(axis=None):
        blocks.append("No run of a baseline to compare with, so there are no gains.")
    if (methods["seeds"] > 1).any():
        rows = [
            {
                "direction": row["direction"],
                "method": label_of(row["method"]),
                "metric": row["metric"],
                "seeds": str(row["seeds"]),
                "mean ± sd": mean_sd(row),
                "length ratio": number(row["length_ratio"], 3),
                "length penalty": span(row["lenpen_low"], row["lenpen_high"]),
                **{f"over {label_of(base)}": _over(row, base) for base in baselines},
            }
            for row in by_method(methods).to_dict("records")
        ]
        blocks.append(
            "Means over seeds; gains with the 95 % interval that holds training and sentences, and p with "
            "Holm's correction over the methods of a direction that have several seeds; with one the interval "
            "holds sentences only, and there is no p. The placebo is each baseline's seeds against "
            "its own next ones: its mean is 0 by construction, and its interval shows the spread between seeds."
        )
        pooled = [row for row in rows if row["direction"] == "all"]
        if pooled:
            everywhere = {row["method"] for row in pooled}
            pooled += [row for row in rows if row["method"] not in everywhere]
            blocks.append(Table(without_empty(pooled), source="tables/methods.csv"))
        fold = "Each direction" if pooled else ""
        alone = [row for row in rows if row["direction"] != "all"]
        blocks.append(Table(without_empty(alone), fold=fold, source="tables/methods.csv"))
        blocks.append(LENGTHS)
    rows = [
        {
            "direction": row["direction"],
            "method": label_of(row["method"]),
            "seed": str(row["seed"]),
            **{
                name: interval(row[name], row[f"{name}_low"], row[f"{name}_high"], 2)
                for name in ("BLEU", "chrF", "COMET")
                if name in row
            },
            "length ratio": number(row["length_ratio"], 3),
            "length penalty": span(row["lenpen"], row["lenpen"]),
            **{f"over {label_of(base)}": _gain(row, base) for base in baselines},
            "sentences": str(row["sentences"]),
        }
        for row in by_method(results).to_dict("records")
    ]
    fold = "Every run" if len(blocks) > 1 else ""
    blocks.append(Table(without_empty(rows), fold=fold, source="tables/results.csv"))
    if not fold:
        blocks.append(LENGTHS)
    blocks.append(
        "Gains of single runs are in BLEU, with the p-value of sacreBLEU's paired bootstrap between the two "
        "runs (approximate randomisation and chrF: `tables/results.csv`); they know nothing of seeds."
    )
    blocks += _figure("quality", drawn)
    found = results.filter(regex="_signature$").melt()["value"].dropna()
    signatures = sorted(set(found))
    blocks.append("Signatures: " + ", ".join(f"`{item}`" for item in signatures))
    return blocks


def without_empty(rows: Rows) -> pd.DataFrame:
    """A table without the columns in which no row has anything."""
    table = pd.DataFrame(rows)
    return table.loc[:, (table != "").any()]


def mean_sd(row: dict[Any, Any]) -> str:
    """A mean with its standard deviation over seeds, where there are several."""
    spread = row["sd_over_seeds"]
    return number(row["mean"], 2) + ("" if pd.isna(spread) else f" ± {spread:.2f}")


def _gain(row: dict[Any, Any], baseline: str) -> str:
    gain = row[f"BLEU_gain_over_{baseline}"]
    p = row[f"BLEU_p_bootstrap_over_{baseline}"]
    if np.isnan(gain):
        return ""
    return f"{gain:+z.2f}" if np.isnan(p) else f"{gain:+z.2f} (p = {p:.3f})"


def _over(row: dict[Any, Any], baseline: str) -> str:
    prefix = f"gain_over_{baseline}"
    if np.isnan(row[prefix]):
        return ""
    shown = interval(row[prefix], row[f"{prefix}_low"], row[f"{prefix}_high"], 2)
    if row[f"{prefix}_seeds"] == 1:
        return f"{shown}, one seed: sentences only"
    corrected = p_value(row[f"{prefix}_p_holm"], equals="= ")
    return f"{shown}, p {corrected}" if corrected else shown


def transfer_blocks(tables: Tables, drawn: Sequence[str]) -> list[Block]:
    """KL and agreement by bucket, and the gains over the baselines."""
    table = tables["transfer"]
    if table.empty:
        return ["No run has token records."]
    blocks: list[Block] = [*_figure("transfer", drawn)]
    several = table["direction"].nunique() > 1
    by_bucket = "Easy and hard tokens of each direction" if several else ""
    for family, fold in (("difficulty", by_bucket), ("all", "All tokens together")):
        rows = [
            {
                "direction": row["direction"],
                "method": label_of(row["method"]),
                "seeds": str(row["seeds"]),
                "bucket": row["bucket"],
                "tokens": str(row["tokens"]),
                "KL": _spread(row, "kl"),
                "target": number(row["kl_target"], 3),
                "non-target": number(row["kl_nontarget"], 3),
                "agreement": percent(row["agreement"]),
                "student right": percent(row["student_right"]),
                "teacher right": percent(row["teacher_right"]),
                "overlap top 5": percent(row["overlap_top5"]),
            }
            for row in _over_seeds(table[table["family"] == family], ["bucket"])
        ]
        blocks.append(Table(pd.DataFrame(rows), fold=fold, source="tables/transfer.csv"))
    gains = tables["gain"]
    rows = [
        {
            "direction": row["direction"],
            "method": label_of(row["method"]),
            "over": label_of(row["baseline"]) + (" †" if row["selected_by_pair"] else ""),
            "seeds": str(row["seeds"]),
            "bucket": row["bucket"],
            "tokens": str(row["tokens"]),
            "gain (nats)": _spread(row, "gain"),
            "relative": percent(row["relative_gain"]),
            "lead closed": percent(row["lead_closed"]),
        }
        for row in _over_seeds(gains[gains["family"] == "difficulty"], ["baseline", "bucket"])
    ]
    if rows:
        blocks.append(
            Table(pd.DataFrame(rows), fold="Gain in KL to the teacher", source="tables/gain.csv")
        )
        blocks.append(
            "† One of the two shares a method or a seed with the runs that cut the tokens, and so some of their "
            "errors: any other run looks better on those hard tokens and worse on the easy ones. No claim is "
            "decided by such a row."
        )
    blocks.append(
        "Means over seeds. Each run alone with intervals, other families and measures: "
        "`tables/transfer.csv`, `tables/gain.csv`."
    )
    return blocks


def _over_seeds(table: pd.DataFrame, by: list[str]) -> list[dict[Any, Any]]:
    """Means of the number columns over the seeds of a method, with ``seeds`` and ``*_sd``."""
    if table.empty:
        return []
    groups = table.groupby(["direction", "method", *by], sort=False)
    means = groups.mean(numeric_only=True)
    means["seeds"] = groups.size()
    means["tokens"] = groups["tokens"].mean().round().astype(int)
    for name in ("kl", "gain"):
        if name in means:
            means[f"{name}_sd"] = groups[name].std()
    return by_method(means.reset_index()).to_dict("records")


def _spread(row: dict[Any, Any], name: str) -> str:
    """A value with its interval (one seed), or with its standard deviation over seeds."""
    if pd.isna(row[name]):
        return "no tokens"
    if row["seeds"] == 1:
        return interval(row[name], row[f"{name}_low"], row[f"{name}_high"])
    spread = row[f"{name}_sd"]  # none where the bucket is empty in all seeds but one
    return number(row[name], 3) + ("" if pd.isna(spread) else f" ± {spread:.3f}")


def method_blocks(directions: Sequence[Direction], options: Options) -> list[Block]:
    """Difficulty, Γ, resamples."""
    threshold = options.threshold
    what = "quantile" if threshold.kind == "quantile" else "nats"
    cuts = []
    for direction in directions:
        cut = {run.cut.selector: run.cut.gamma for run in direction.scored}
        named = ", ".join(
            f"{' + '.join(f'`{label}`' for label in labels)} Γ = {gamma:.4g} nats"
            for labels, gamma in cut.items()
        )
        cuts.append(f"- {direction.name}: {named or 'no token records'}")
    units = "documents" if options.documents else "sentences"
    return [
        (
            "That the paper's gain comes from better transfer is the paper's own analysis; how it is "
            "tested here (buckets, measures, margins, tests) is this project's reading."
        ),
        (
            f"Difficulty is KL(p‖q) of teacher p and student q at a reference token, in nats. A token is "
            f"hard if its mean difficulty for the reference runs (`{' '.join(options.references)}`) is above "
            f"Γ ({what} {threshold.value:g}):"
        ),
        "\n".join(cuts),
        (
            f"{options.resamples} resamples of {units}, random seed {options.seed}. Intervals by bucket are "
            "95 % percentile intervals of a bootstrap, for one run."
        ),
        "How a claim gets its verdict:",
        "\n".join(f"- {line}" for line in verdicts.rule(options)),
    ]


def by_method(table: pd.DataFrame) -> pd.DataFrame:
    """By direction (their mean last), then method in reading order; the rows of a run keep theirs."""
    if table.empty:
        return table
    keys = {method: index for index, method in enumerate(ordered(table["method"]))}
    table = table.assign(_place=table["method"].map(keys), _pooled=table["direction"] == "all")
    names = ("_pooled", "direction", "_place", "seed")
    by = [name for name in names if name in table.columns]
    return table.sort_values(by, kind="stable").drop(columns=["_place", "_pooled"])
