"""Studies without any effect, of six kinds, for the error rates of bench_analysis.

Five are drawn as gains by seed and sentence and go through the estimator of all claims; in the sixth, whole
runs are written and judged: word-level KD's runs again under other seeds, where runs of one seed share
errors with the reference run of that seed.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.claims.verdicts import claims_table
from analysis.runs.files import read_json, sealed_json
from analysis.runs.simulated import write_study
from analysis.stats import Floats, Resamples, hierarchical
from analysis.sums.direction import Options
from analysis.sums.loading import load

SEEDS, SENTENCES, DOCUMENTS, RESAMPLES = 3, 300, 30, 200


def _gains(rng: np.random.Generator, seeds: Floats) -> Floats:
    """Gains by seed and sentence, (S, N), from those of the seeds, (S,)."""
    sentences = rng.normal(0, 1, SENTENCES)
    return seeds[:, None] + sentences + rng.normal(0, 1, (len(seeds), SENTENCES))


def exchangeable(rng: np.random.Generator) -> Floats:
    """Seeds that differ more than sentences do."""
    return _gains(rng, rng.normal(0, 0.3, SEEDS))


def unequal_seeds(rng: np.random.Generator) -> Floats:
    """One seed varies four times as much as the others."""
    return _gains(rng, rng.normal(0, 1, SEEDS) * [0.1, 0.1, 0.4])


def heavy_tails(rng: np.random.Generator) -> Floats:
    """Sentences with gains of Student's t, 3 degrees of freedom."""
    gains = rng.normal(0, 0.1, (SEEDS, 1)) + rng.standard_t(3, SENTENCES)
    return np.asarray(gains + rng.standard_t(3, (SEEDS, SENTENCES)))


def outlying_seed(rng: np.random.Generator) -> Floats:
    """One training in ten goes astray, in either direction."""
    strays = (rng.random(SEEDS) < 0.1) * rng.choice([-1.0, 1.0], SEEDS)
    return _gains(rng, rng.normal(0, 0.1, SEEDS) + strays)


def in_documents(rng: np.random.Generator) -> Floats:
    """Sentences of a document correlated at 0.2; seeds that hardly differ."""
    documents = np.repeat(rng.normal(0, 1, DOCUMENTS), SENTENCES // DOCUMENTS)
    sentences = np.sqrt(0.2) * documents + np.sqrt(0.8) * rng.normal(0, 1, SENTENCES)
    return np.asarray(sentences + rng.normal(0, 0.1, (SEEDS, SENTENCES)))


KINDS: dict[str, Callable[[np.random.Generator], Floats]] = {
    "exchangeable": exchangeable,
    "unequal variance of seeds": unequal_seeds,
    "heavy tails": heavy_tails,
    "an outlying seed": outlying_seed,
    "documents": in_documents,
}


def rejects(kind: str, study: int) -> bool:
    """Whether an effect is taken for certain and in favour in a study without one."""
    rng = np.random.default_rng([len(kind), study])
    gains = KINDS[kind](rng)
    blocks = np.repeat(np.arange(DOCUMENTS), SENTENCES // DOCUMENTS)
    resamples = Resamples(
        SENTENCES, RESAMPLES, rng, documents=blocks if kind == "documents" else None
    )
    drawn = resamples.sums(gains.T).T / SENTENCES
    estimate = hierarchical([gains.mean(axis=1)], [drawn], [resamples.units])
    return estimate.p <= 0.05


def claims_of(root: Path, options: Options) -> pd.DataFrame:
    """The claims of a study, without the rest of a report."""
    return claims_table(load(root, options)[0], options)[0]


def renamed_wins(study: int) -> bool:
    """Whether any claim is supported for word-level KD's own runs under other seeds."""
    with tempfile.TemporaryDirectory() as name:
        root = write_study(Path(name), seeds=3, sentences=120, same_seed=0.6, corpus=study)
        for seed in (1, 2, 3):
            run = root / "en-de" / f"treatment{seed}"
            shutil.rmtree(run)
            shutil.copytree(root / "en-de" / f"word_kd{seed % 3 + 1}", run)
            record, _ = read_json(run / "run.json")
            record |= {"method": "se_kd_student", "seed": seed}
            (run / "run.json").write_bytes(sealed_json(record))
        claims = claims_of(root, Options(resamples=200, seed=study))
    return "supported" in set(claims["verdict"])
