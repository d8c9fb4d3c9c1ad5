"""Writes statsmodels.json, on which test_stats.py checks the statistics.

    pip install statsmodels && python tests/analysis/cases/make_statsmodels.py

Kept with its answers, so that the tests do not need statsmodels.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
import statsmodels
import statsmodels.api as sm
import statsmodels.formula.api as smf
from statsmodels.stats.multitest import multipletests


def holm(rng: np.random.Generator) -> dict[str, Any]:
    p = np.round(rng.uniform(size=9) ** 3, 6)
    return {"p": p.tolist(), "corrected": multipletests(p, method="holm")[1].tolist()}


def partial_spearman(rng: np.random.Generator) -> dict[str, Any]:
    """Correlation of the residuals of two regressions on ranks, with ties."""
    z, w = rng.integers(0, 12, (2, 70))
    x = z + rng.integers(0, 9, 70)
    y = z - w + rng.integers(0, 9, 70)
    ranks = [scipy.stats.rankdata(values) for values in (x, y, z, w)]
    design = sm.add_constant(np.stack(ranks[2:], axis=1))
    left, right = (sm.OLS(values, design).fit().resid for values in ranks[:2])
    values = {name: v.tolist() for name, v in zip("xyzw", (x, y, z, w), strict=True)}
    return {**values, "correlation": float(np.corrcoef(left, right)[0, 1])}


def crossed(rng: np.random.Generator, seeds: int, spread: float) -> dict[str, Any]:
    """Mean of effects with crossed random effects of seeds and sentences, by REML."""
    sentences = 60
    effects = (
        0.3
        + rng.normal(0, spread, (seeds, 1))
        + rng.normal(0, 1.0, (1, sentences))
        + rng.normal(0, 0.7, (seeds, sentences))
    ).round(4)
    table = pd.DataFrame(
        {
            "effect": effects.ravel(),
            "seed": np.repeat(np.arange(seeds), sentences),
            "sentence": np.tile(np.arange(sentences), seeds),
            "all": 1,
        }
    )
    parts = {"seed": "0 + C(seed)", "sentence": "0 + C(sentence)"}
    fit = smf.mixedlm("effect ~ 1", table, groups="all", vc_formula=parts).fit(reml=True)
    return {
        "effects": effects.tolist(),
        "mean": float(fit.params["Intercept"]),
        "error": float(fit.bse["Intercept"]),
    }


def main() -> None:
    rng = np.random.default_rng(20)
    cases = {
        "statsmodels": statsmodels.__version__,
        "holm": [holm(rng) for _ in range(3)],
        "partial_spearman": [partial_spearman(rng) for _ in range(3)],
        "crossed": [crossed(rng, 5, 0.4), crossed(rng, 6, 0.8), crossed(rng, 8, 0.2)],
    }
    path = Path(__file__).with_name("statsmodels.json")
    path.write_text(json.dumps(cases) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
