"""The claims about better transfer, each with effect, interval, corrected p-value and verdict."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.claims.evidence import CORRELATION_MARGIN, MEASURES, Evidence, Measure, Sample
from analysis.claims.relation import relation_table
from analysis.power import detectable
from analysis.runs.methods import Method, label_of
from analysis.stats import ALPHA, LEVEL, hierarchical, holm
from analysis.sums.direction import Direction, Options

MIN_SEEDS = 3
MIN_SENTENCES = 100
#: The baseline's runs against each other, beside the methods: the spread between seeds.
PLACEBO = "placebo"

#: Why a claim about hard or easy tokens has no verdict where a run shares errors with what chose them.
UNEQUAL = "a compared run shares errors with a reference run of another seed (tables/relation.csv)"

#: Why easy tokens that lose nothing show nothing.
NOTHING_GAINED = "nothing certain is gained on hard tokens that easy ones could pay for"

CLAIMS = {
    1: "On hard tokens the student is closer to the teacher",
    2: "Easy tokens lose nothing for it",
    3: "It is the teacher's knowledge, not the label: the non-target part of KL falls too",
    4: "Sentences that gain more transfer gain more quality than chance explains",
    5: "Over training, hard tokens turn easy faster",
}
COLUMNS = [
    "treatment",
    "baseline",
    "claim",
    "statement",
    "scope",
    "directions",
    "family",
    "measure",
    "decides",
    "effect",
    "low",
    "high",
    "relative_effect",
    "detectable",
    "p",
    "p_holm",
    "seeds",
    "sentences",
    "tokens",
    "verdict",
    "reason",
]


def claims_table(
    directions: Sequence[Direction], options: Options
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Test every claim for every SE-KD method against the baseline.

    Scope ``all`` pools the directions and carries the verdict; with several directions each is
    tested too; ``directions`` names those that a row is made of, where some have no runs or no data for
    it. ``family`` says which p-values Holm's correction took together: those of all methods and
    claims of the scope ``all``, or those of all single directions; ``p_holm`` is NaN where a claim could
    get no verdict. ``detectable`` is the smallest effect that the test of a row finds four times in five,
    after the correction (claim 2: above a loss of the margin, so it may be a loss itself).

    The placebo (:func:`analysis.sums.pairing.placebo_couples`) has rows of the same measures. Its mean is 0
    by construction, so it has no p-value and no verdict, and no row of what is measured beyond it.

    The second table is that of :func:`analysis.claims.relation.relation_table`. Nothing is tested on a
    training subset.
    """
    scored = [direction for direction in directions if direction.scored]
    methods = {str(run.method) for direction in scored for run in direction.scored}
    treatments = sorted(method for method in methods if Method.of(method).is_treatment)
    if options.subset.startswith("train") or not treatments:
        return pd.DataFrame(columns=COLUMNS), relation_table({}, options)[0]
    placebos = [Evidence.placebo(direction, options.baseline) for direction in scored]
    groups = {
        treatment: [
            Evidence.of(item.direction, treatment, options.baseline, item) for item in placebos
        ]
        for treatment in treatments
    }
    groups[PLACEBO] = placebos
    groups = {name: [item for item in group if item.couples] for name, group in groups.items()}
    relation, unequal = relation_table(groups, options)
    rows: list[dict[str, Any]] = []
    for treatment, group in groups.items():
        for measure in MEASURES:
            if treatment == PLACEBO and measure.beyond_placebo:
                continue
            samples = {item.direction.name: measure.sample(item) for item in group}
            rows.extend(_rows(treatment, measure, samples, options))
    _correct(rows)
    for row in rows:  # after the correction, because it follows from what was measured
        if row["treatment"] in unequal and row["claim"] in (1, 2, 3) and not row["reason"]:
            row["reason"] = UNEQUAL
    return _judge(rows), relation


def _row(treatment: str, claim: int, scope: str, options: Options) -> dict[str, Any]:
    tested = treatment != PLACEBO
    return {
        "treatment": treatment,
        "baseline": options.baseline,
        "claim": claim,
        "statement": CLAIMS[claim],
        "scope": scope,
        "family": ("all" if scope == "all" else "directions") if tested else "",
        "seeds": 0,
        "sentences": 0,
        "tokens": 0,
        "reason": "",
        "verdict": "inconclusive" if tested else "",
    }


def _rows(
    treatment: str, measure: Measure, samples: dict[str, Sample | None], options: Options
) -> list[dict[str, Any]]:
    found = {name: sample for name, sample in samples.items() if sample is not None}
    scopes = {"all": found}
    if len(samples) > 1:
        scopes |= {name: {name: sample} for name, sample in found.items()}
    rows = []
    for scope, group in scopes.items():
        row = _row(treatment, measure.claim, scope, options) | {
            "directions": " ".join(group),
            "measure": measure.name,
            "decides": measure.decides,
        }
        if not samples:
            second = "a second run" if treatment == PLACEBO else "run"
            row["reason"] = f"no {second} of {options.baseline} to compare with"
        elif not group:
            row["reason"] = measure.missing
        else:
            row.update(_estimate(measure, list(group.values()), options))
        if treatment == PLACEBO:
            row["p"] = np.nan
        rows.append(row)
    return rows


def _estimate(measure: Measure, group: Sequence[Sample], options: Options) -> dict[str, Any]:
    sentences = [sample.sentences for sample in group]
    units = [min(sample.sentences, sample.units) for sample in group]
    effects, drawn = [sample.effect for sample in group], [sample.drawn for sample in group]
    gain = hierarchical(effects, drawn, units)
    margin = options.margin if measure.margin is None else measure.margin
    base = float(np.mean([sample.base.mean() for sample in group]))
    study, tested = (effects, drawn, units), gain
    if measure.non_inferior:
        study = (
            [sample.effect + margin * sample.base for sample in group],
            [sample.drawn + margin * sample.base_drawn for sample in group],
            units,
        )
        tested = hierarchical(*study)
    seeds = min(len(sample.effect) for sample in group)
    smallest = -margin * base if measure.non_inferior else margin * base
    reason = next((sample.bias for sample in group if sample.bias), "")
    if seeds < MIN_SEEDS:
        reason = f"{seeds} seed{'s' if seeds > 1 else ''}, {MIN_SEEDS} needed"
    elif min(sentences) < MIN_SENTENCES:
        reason = reason or f"{min(sentences)} sentences, {MIN_SENTENCES} needed"
    elif min(units) < 2:
        reason = reason or "all sentences are of one document"
    return {
        "effect": gain.effect,
        "low": gain.low,
        "high": gain.high,
        "relative_effect": gain.effect / base if base > 0 else np.nan,
        "p": tested.p,
        "study": study,
        "shift": margin * base if measure.non_inferior else 0.0,
        "seeds": seeds,
        "sentences": sum(sentences),
        "tokens": sum(sample.tokens for sample in group),
        "reason": reason,
        "in_favour": tested.effect > 0,
        "against": gain.high < smallest,
    }


Claims = dict[tuple[str, str, int], list[dict[str, Any]]]


def _deciding(rows: Sequence[dict[str, Any]]) -> Claims:
    """The rows that decide a verdict, by scope, treatment and claim."""
    claims: Claims = {}
    for row in rows:
        if row["decides"] and row["treatment"] != PLACEBO:
            claims.setdefault((row["scope"], row["treatment"], row["claim"]), []).append(row)
    return claims


def _correct(rows: Sequence[dict[str, Any]]) -> None:
    """Give each row what it could detect, and those that decide a claim its corrected p-value.

    A claim with a reason here, before anything is judged, is open whatever its p-value: it has none to
    correct, and the others do not pay for it.
    """
    families: dict[str, list[list[dict[str, Any]]]] = {}
    for group in _deciding(rows).values():
        families.setdefault(group[0]["family"], []).append(group)
    for claims in families.values():
        # A claim that needs all its measures is as improbable as its least certain one.
        p_values = [
            np.nan if any(row["reason"] for row in group) else max(row["p"] for row in group)
            for group in claims
        ]
        for group, corrected in zip(claims, holm(p_values), strict=True):
            for row in group:
                row["p_holm"] = corrected
                row["tests"] = int(np.isfinite(p_values).sum())
    for row in rows:
        if "study" in row and row["treatment"] != PLACEBO:
            effects, drawn, units = row["study"]
            smallest = detectable(effects, drawn, units, row.get("tests", 1))
            row["detectable"] = smallest - row["shift"]


def _judge(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Give each claim its verdict, by the rule of :func:`rule`."""
    verdicts = {key: _verdict(group, group[0]["p_holm"]) for key, group in _deciding(rows).items()}
    for row in rows:
        scope, treatment, claim = row["scope"], row["treatment"], row["claim"]
        if treatment == PLACEBO:
            continue
        row["verdict"] = verdicts[scope, treatment, claim]
        gained = verdicts[scope, treatment, 1] == "supported"
        if claim == 2 and row["verdict"] == "supported" and not gained:
            row |= {"verdict": "inconclusive", "reason": NOTHING_GAINED}
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
    baseline = label_of(options.baseline)
    return [
        (
            f"Each claim compares a SE-KD method with {baseline}, seed by seed, on the same "
            "tokens; effects are averaged over seeds, then over directions with equal weight."
        ),
        (
            "The error comes from a bootstrap over sentences (shared by all seeds and runs) and from the "
            "spread of the seeds, joined as crossed random effects; intervals are "
            f"{LEVEL:.0%} t-intervals with Satterthwaite's degrees of freedom, never narrower than the "
            "t-interval over the seeds alone; p-values two-sided."
        ),
        (
            "A claim with several deciding measures needs all of them, so its p-value is the largest. "
            "Holm's correction runs over all methods and claims of the pooled scope that can get a verdict: "
            "one that is open before anything is measured, as with too few seeds, is not counted. The single "
            "directions are corrected as a second family (column family of tables/claims.csv)."
        ),
        (
            "Which tokens are hard is decided by the reference runs of all seeds but those compared: runs "
            "of one seed share errors, and one that shares them with what chose its hard tokens looks worse "
            "on them than it is. Whether a compared run shares errors with a reference run of another seed "
            "is checked (tables/relation.csv)."
        ),
        (
            f"The placebo is {baseline} against itself, each seed against the next and the last against "
            "the first: its mean is 0 by construction, but for tokens that differ from couple to couple, and "
            "tests nothing; its interval shows the spread between seeds. Claim 4 is the correlation beyond the one that it shows."
        ),
        (
            f"supported: corrected p at most {ALPHA:.2f} and every deciding effect in the claim's favour "
            f"(claim 2: above a loss of {options.margin:.1%} of the baseline's KL, and only where claim 1 is "
            "supported)."
        ),
        (
            "not supported: the interval of a deciding measure lies below the smallest effect that "
            f"matters ({options.margin:.1%} of the baseline's value; for claim 4 a correlation of "
            f"{CORRELATION_MARGIN}; for claim 2 a loss of more than {options.margin:.1%}), even where "
            "the effect is certain."
        ),
        (
            f"inconclusive: everything else, and always with fewer than {MIN_SEEDS} seeds or "
            f"{MIN_SENTENCES} sentences, or where the compared runs share a method or a seed with what "
            "decides which tokens are hard (--reference), or were trained on different numbers of "
            "sentences or are models of different sizes (all claims but 4)."
        ),
        "No claim is computed from the training set.",
    ]
