"""Whether the runs that are nearer to the teacher are also those that translate better."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.special

from analysis.claims.evidence import Evidence
from analysis.stats import LEVEL

MEASURE = "rank correlation over runs of KL (lower) and BLEU"
#: With fewer runs than these no correlation could be told from 0.
MIN_RUNS = 6


def across_runs(evidence: Sequence[Evidence]) -> list[dict[str, Any]]:
    """A row that accompanies claim 4: Spearman's correlation over the compared runs, ranked within each
    direction so that directions may differ in difficulty; Fisher's interval, a degree of freedom less
    for every direction but the first. No row with fewer than :data:`MIN_RUNS` runs."""
    kl_ranks: list[float] = []
    bleu_ranks: list[float] = []
    directions: list[str] = []
    for item in evidence:
        runs = {run.label: run for couple in item.couples for run in couple}
        kl, bleu = [], []
        for run in runs.values():
            if item.direction.corpus is None or run.translations is None:
                continue
            partition = run.cut
            column = partition.columns("all").start
            kl.append(run.under(partition).total("kl")[column] / partition.tokens[column])
            bleu.append(item.direction.corpus.corpus_score(run.translations, "BLEU"))
        if len(kl) > 2:
            directions.append(item.direction.name)
            for ranks, values in ((kl_ranks, -np.array(kl)), (bleu_ranks, np.array(bleu))):
                ranks.extend((pd.Series(values).rank() - (len(values) + 1) / 2) / len(values))
    freedom = len(kl_ranks) - 3 - (len(directions) - 1)
    if len(kl_ranks) < MIN_RUNS or freedom < 1 or np.ptp(bleu_ranks) == 0:
        return []
    value = float(np.corrcoef(kl_ranks, bleu_ranks)[0, 1])
    centre, error = np.arctanh(np.clip(value, -0.999999, 0.999999)), freedom**-0.5
    half = scipy.special.ndtri(0.5 + LEVEL / 2) * error
    return [
        {
            "directions": " ".join(directions),
            "measure": MEASURE,
            "decides": False,
            "effect": value,
            "low": float(np.tanh(centre - half)),
            "high": float(np.tanh(centre + half)),
            "p": float(2 * scipy.special.ndtr(-abs(centre) / error)),
            "seeds": len(
                {run.seed for item in evidence for couple in item.couples for run in couple}
            ),
        }
    ]
