"""COMET, where it is installed and a model is at hand; everything else works without."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.runs.errors import UserError
from analysis.stats import Floats
from analysis.sums.direction import Direction, Options
from analysis.terminal import progress


def add_comet_option(out: argparse.ArgumentParser) -> None:
    """The option that names a model."""
    out.add_argument(
        "--comet",
        type=Path,
        metavar="MODEL",
        help="score with this COMET model too: a checkpoint, or the folder that holds "
        "checkpoints/model.ckpt (needs unbabel-comet)",
    )


def load_comet(model: Path) -> Any:
    """A COMET model from its checkpoint or from the folder that holds ``checkpoints/model.ckpt``.

    Raises
    ------
    UserError
        COMET is not installed, or there is no checkpoint.
    """
    path = model / "checkpoints" / "model.ckpt" if model.is_dir() else model
    if not path.is_file():
        raise UserError(f"--comet: expected a COMET checkpoint, found no file {path}")
    try:
        from comet import load_from_checkpoint
    except ImportError as error:
        raise UserError(
            f"--comet: expected the package unbabel-comet, found none that imports ({error}); "
            "pip install unbabel-comet, or leave --comet out"
        ) from error
    return load_from_checkpoint(str(path))


def sentence_scores(
    model: Any, sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str]
) -> Floats:
    """COMET of each sentence, in hundredths, (S,)."""
    lines = zip(sources, hypotheses, references, strict=True)
    data = [{"src": src, "mt": mt, "ref": ref} for src, mt, ref in lines]
    return 100 * np.asarray(model.predict(data, progress_bar=False).scores, np.float64)


def add_comet(
    results: pd.DataFrame, directions: Sequence[Direction], model: Any, options: Options
) -> pd.DataFrame:
    """The results with the columns ``COMET`` (in hundredths), ``COMET_low`` and ``COMET_high``, a
    95 % bootstrap interval over sentences; NaN for runs without source text."""
    found: dict[str, tuple[float, float, float]] = {}
    for direction in directions:
        for run in progress(direction.translated, desc=f"COMET {direction.name}"):
            assert run.translations is not None
            texts = run.translations.texts
            if texts.sources is None:
                continue
            scores = sentence_scores(model, texts.sources, texts.hypotheses, texts.references)
            rng = np.random.default_rng([options.seed, len(scores)])
            drawn = rng.integers(0, len(scores), (options.resamples, len(scores)))
            low, high = np.percentile(scores[drawn].mean(axis=1), [2.5, 97.5])
            found[run.label] = float(scores.mean()), float(low), float(high)
    missing = (np.nan, np.nan, np.nan)
    columns = zip(*(found.get(label, missing) for label in results["run"]), strict=True)
    return results.assign(**dict(zip(("COMET", "COMET_low", "COMET_high"), columns, strict=True)))
