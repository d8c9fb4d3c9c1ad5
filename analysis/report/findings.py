"""What was found and how sure it is, in a paragraph."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from analysis.claims.verdicts import CLAIMS, MIN_SEEDS, PLACEBO
from analysis.markup import number
from analysis.runs.methods import label_of, ordered
from analysis.stats import ALPHA
from analysis.sums.direction import Options

#: Claims in a few words, as they stand in a sentence.
SHORT = {
    1: "closer to the teacher on hard tokens",
    2: "no loss on easy tokens",
    3: "the teacher's knowledge beyond the label",
    4: "quality follows transfer",
    5: "hard tokens turn easy faster",
}
#: Length ratios farther apart than this are told beside a gain in BLEU.
LENGTH_MARGIN = 0.01
assert SHORT.keys() == CLAIMS.keys()


def judged(claims: pd.DataFrame) -> list[str]:
    """The methods that have a verdict: those of enough seeds, or all where none has as many."""
    own = claims[(claims["scope"] == "all") & (claims["treatment"] != PLACEBO)]
    enough = own[own["seeds"] >= MIN_SEEDS]
    return ordered((own if enough.empty else enough)["treatment"])


def findings(claims: pd.DataFrame, methods: pd.DataFrame, options: Options) -> list[str]:
    """Paragraphs in Markdown, one for each method with a verdict, and one that names the others."""
    if options.subset.startswith("train"):
        return ["No claim is computed from the training set."]
    treatments = judged(claims)
    if not treatments:
        return ["There is no run of a SE-KD method to judge."]
    baseline = label_of(options.baseline)
    parts = []
    for treatment in treatments:
        own = claims[
            (claims["treatment"] == treatment)
            & (claims["scope"] == "all")
            & claims["decides"].astype(bool)
        ].drop_duplicates("claim")
        sentences: list[str] = []
        for verdict in ("supported", "not supported", "inconclusive"):
            found = own[own["verdict"] == verdict]
            if len(found):
                named = "; ".join(SHORT[int(claim)] for claim in found["claim"])
                sentences.append(
                    f"**{verdict if not sentences else verdict.capitalize()}**: {named}."
                )
        reasons = list(dict.fromkeys(reason for reason in own["reason"] if reason))
        text = (
            f"**{label_of(treatment)} against {baseline}.** {_quality(methods, treatment, options)}"
            f"Of the claims about better transfer, {' '.join(sentences)}"
        )
        if reasons:
            text += f" Why some stay open: {'; '.join(reasons)}."
        parts.append(text)
    if others := [
        name for name in ordered(claims["treatment"]) if name not in (*treatments, PLACEBO)
    ]:
        named = ", ".join(label_of(name) for name in others)
        parts.append(f"Without a verdict, for want of {MIN_SEEDS} seeds: {named}.")
    return parts


def _quality(methods: pd.DataFrame, treatment: str, options: Options) -> str:
    """The gain in BLEU over all directions, or in each one where it is not known in all."""
    prefix = f"gain_over_{options.baseline}"
    if methods.empty or prefix not in methods:
        return ""
    chosen = (methods["method"] == treatment) & (methods["metric"] == "BLEU")
    rows = methods[chosen & methods[prefix].notna()]
    pooled = rows[rows["direction"] == "all"]
    rows = rows if pooled.empty else pooled
    return "".join(_gain(methods, row, options) for row in rows.to_dict("records"))


def _gain(methods: pd.DataFrame, row: Mapping[Any, Any], options: Options) -> str:
    """The gain in BLEU of a row, and the one that the runs could have shown."""
    prefix = f"gain_over_{options.baseline}"
    same = (methods["metric"] == "BLEU") & (methods["direction"] == row["direction"])
    lengths = methods[same].set_index("method")["length_ratio"]
    gain, low, high = row[prefix], row[f"{prefix}_low"], row[f"{prefix}_high"]
    beyond = int(low > 0) - int(high < 0)
    p = row[f"{prefix}_p_holm"]
    certain = beyond if p <= ALPHA else 0
    kind = {1: "A gain of", -1: "A loss of", 0: "No certain difference:"}[certain]
    value = number(abs(gain) if certain else gain, 2)
    bounds = "" if np.isnan(low) else f" [{number(low, 2)}, {number(high, 2)}]"
    text = f"{kind} {value} BLEU{bounds}".replace("-", "−") + _scope(methods, row["direction"])
    if beyond and p > ALPHA:
        text += f", p = {p:.2f} with Holm's correction over the methods"
    if np.isnan(low):
        found = f"{text}, from one sentence or document, which says nothing of others. "
    elif low == high:
        found = f"{text}: the runs score the same, whatever the sentences. "
    elif row[f"{prefix}_seeds"] < 2:
        found = f"{text}, from one seed, which says nothing of training again. "
    else:
        found = f"{text}; such runs would detect a gain of {row[f'{prefix}_detectable']:.1f} BLEU with 80 % power. "
    baseline = lengths.get(options.baseline, np.nan)
    return found + _length(certain, lengths[row["method"]], baseline)


def _length(certain: int, own: float, baseline: float) -> str:
    """What a reader of BLEU must know of translations of other lengths; ``certain`` is the sign of a certain
    difference of BLEU, else 0."""
    if not abs(own - baseline) >= LENGTH_MARGIN:
        return ""
    longer = "longer" if own > baseline else "shorter"
    told = (
        f"Its translations are {longer} than the baseline's ({own:.3f} of the references' words against "
        f"{baseline:.3f})"
    )
    if not certain:
        return f"{told}. "
    nearer = abs(own - 1) < abs(baseline - 1)
    part = "may be part of the difference" if nearer == (certain > 0) else "is not the reason"
    return f"{told}; length {part}. "


def _scope(methods: pd.DataFrame, direction: str) -> str:
    """Where a gain is from, in words for a sentence; nothing where there is one direction."""
    count = methods.loc[methods["direction"] != "all", "direction"].nunique()
    if direction == "all":
        return f" over {count} directions"
    return f" in {direction}" if count > 1 else ""
