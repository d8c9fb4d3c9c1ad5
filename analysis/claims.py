"""The claims about better transfer, each with effect, interval, corrected p-value and verdict."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.evolution import History
from analysis.judge import Judge, Options, pairs
from analysis.measures import CORRELATION_MARGIN, MEASURES, Evidence, Measure, Sample
from analysis.quality import Quality
from analysis.runs.methods import Method
from analysis.stats import LEVEL, hierarchical, holm

ALPHA = 1 - LEVEL
MIN_SEEDS = 3
MIN_SENTENCES = 100

CLAIMS = {
    1: "On hard tokens the student is closer to the teacher",
    2: "Easy tokens lose nothing",
    3: "It is the teacher's knowledge, not the label: the non-target part of KL falls too",
    4: "Sentences that gain more transfer gain more quality",
    5: "Over training, hard tokens turn easy faster",
}
COLUMNS = [
    *(
        "treatment",
        "baseline",
        "claim",
        "statement",
        "scope",
        "measure",
        "decides",
        "effect",
        "low",
    ),
    *(
        "high",
        "relative_effect",
        "p",
        "p_holm",
        "seeds",
        "sentences",
        "tokens",
        "verdict",
        "reason",
    ),
]


def claims_table(
    judges: Sequence[Judge], qualities: dict[str, Quality], history: History, options: Options
) -> pd.DataFrame:
    """Test every claim for every SE-KD method against the baseline.

    Scope ``all`` pools the directions and carries the verdict; with several directions each is
    tested too, as a family of its own in Holm's correction. Nothing is tested on a training subset.
    """
    if options.subset.startswith("train"):
        return pd.DataFrame(columns=COLUMNS)
    evidence = {
        judge.direction.name: Evidence(judge, qualities.get(judge.direction.name), history)
        for judge in judges
    }
    methods = {run.method for judge in judges for run in judge.runs}
    treatments = sorted(method for method in methods if Method.of(method).is_treatment)
    rows: list[dict[str, Any]] = []
    for treatment in treatments:
        couples = {
            name: pairs(item.judge, treatment, options.baseline) for name, item in evidence.items()
        }
        couples = {name: found for name, found in couples.items() if found}
        for measure in MEASURES:
            samples = {
                name: measure.sample(evidence[name], found) for name, found in couples.items()
            }
            rows.extend(_rows(treatment, measure, samples, options))
    return _judge_rows(rows)


def _rows(
    treatment: str, measure: Measure, samples: dict[str, Sample | None], options: Options
) -> list[dict[str, Any]]:
    found = {name: sample for name, sample in samples.items() if sample is not None}
    scopes: dict[str, list[Sample]] = {"all": list(found.values())}
    if len(samples) > 1:
        scopes |= {name: [sample] for name, sample in found.items()}
    rows = []
    for scope, group in scopes.items():
        row: dict[str, Any] = {
            "treatment": treatment,
            "baseline": options.baseline,
            "claim": measure.claim,
            "statement": CLAIMS[measure.claim],
            "scope": scope,
            "measure": measure.name,
            "decides": measure.decides,
            "seeds": 0,
            "sentences": 0,
            "tokens": 0,
            "reason": "",
            "verdict": "inconclusive",
        }
        if not samples:
            row["reason"] = f"no run of {options.baseline} to compare with"
        elif not group:
            row["reason"] = measure.missing
        else:
            row.update(_estimate(measure, group, options))
        rows.append(row)
    return rows


def _estimate(measure: Measure, group: Sequence[Sample], options: Options) -> dict[str, Any]:
    sentences = [sample.sentences for sample in group]
    gain = hierarchical(
        [sample.effect for sample in group], [sample.drawn for sample in group], sentences
    )
    margin = options.margin if measure.margin is None else measure.margin
    base = float(np.mean([sample.base.mean() for sample in group]))
    tested = gain
    if measure.non_inferior:
        tested = hierarchical(
            [sample.effect + margin * sample.base for sample in group],
            [sample.drawn + margin * sample.base_drawn for sample in group],
            sentences,
        )
    seeds = min(len(sample.effect) for sample in group)
    smallest = -margin * base if measure.non_inferior else margin * base
    reason = ""
    if any(sample.biased for sample in group):
        # What a run finds hard is in part what it got wrong by chance; any other run is better there.
        reason = "one of the compared runs decides itself which tokens are hard"
    elif seeds < MIN_SEEDS:
        reason = f"{seeds} seed, {MIN_SEEDS} needed"
    elif min(sentences) < MIN_SENTENCES:
        reason = f"{min(sentences)} sentences, {MIN_SENTENCES} needed"
    return {
        "effect": gain.effect,
        "low": gain.low,
        "high": gain.high,
        "relative_effect": gain.effect / base if base > 0 else np.nan,
        "p": tested.p,
        "seeds": seeds,
        "sentences": sum(sentences),
        "tokens": sum(sample.tokens for sample in group),
        "reason": reason,
        "in_favour": tested.effect > 0,
        "against": gain.high < smallest,
    }


def _judge_rows(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Correct the p-values and give each claim its verdict, by the rule of :func:`rule`."""
    for pooled in (True, False):
        claims: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
        for row in rows:
            if (row["scope"] == "all") == pooled and row["decides"]:
                claims.setdefault((row["treatment"], row["scope"], row["claim"]), []).append(row)
        # A claim that needs all its measures is as improbable as its least certain one.
        p_values = [max(row.get("p", np.nan) for row in group) for group in claims.values()]
        for group, corrected in zip(claims.values(), holm(p_values), strict=True):
            for row in group:
                row["p_holm"] = corrected
            verdict = _verdict(group, corrected)
            for row in rows:
                if (row["treatment"], row["scope"], row["claim"]) == (
                    *(group[0]["treatment"], group[0]["scope"]),
                    group[0]["claim"],
                ):
                    row["verdict"] = verdict
    return pd.DataFrame(rows, columns=COLUMNS)


def _verdict(deciding: Sequence[dict[str, Any]], corrected: float) -> str:
    if any(row["reason"] for row in deciding):
        return "inconclusive"
    if any(row["against"] for row in deciding):
        return "not supported"
    certain = corrected <= ALPHA and all(row["in_favour"] for row in deciding)
    return "supported" if certain else "inconclusive"


def rule(options: Options) -> list[str]:
    """How a verdict is made, in sentences for the report."""
    return [
        (
            f"Each claim compares a SE-KD method with {options.baseline}, seed by seed, on the same "
            "tokens; effects are averaged over seeds, then over directions with equal weight."
        ),
        (
            "The error comes from a bootstrap over sentences (shared by all seeds and runs) and from the "
            "spread of the seeds, joined as crossed random effects; intervals are "
            f"{LEVEL:.0%} t-intervals with Satterthwaite's degrees of freedom, p-values two-sided."
        ),
        (
            "A claim with several deciding measures needs all of them, so its p-value is the largest. "
            "Holm's correction runs over all treatments and claims of the pooled scope; the single "
            "directions are corrected as a second family."
        ),
        (
            f"supported: corrected p at most {ALPHA:.2f} and every deciding effect in the claim's favour "
            f"(claim 2: above a loss of {options.margin:.1%} of the baseline's KL)."
        ),
        (
            "not supported: the interval of a deciding measure lies below the smallest effect that "
            f"matters ({options.margin:.1%} of the baseline's value; for claim 4 a correlation of "
            f"{CORRELATION_MARGIN}; for claim 2 a loss of more than {options.margin:.1%}), even where "
            "the effect is certain."
        ),
        (
            f"inconclusive: everything else, and always with fewer than {MIN_SEEDS} seeds or "
            f"{MIN_SENTENCES} sentences, or where one of the compared runs decides itself which tokens "
            "are hard (--reference)."
        ),
        "No claim is computed from the training set.",
    ]
