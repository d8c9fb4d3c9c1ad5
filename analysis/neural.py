"""COMET, where it is installed and a model is at hand; everything else works without."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sacrebleu.metrics.base import Score

from analysis.runs.errors import UserError
from analysis.stats import Floats


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


class NamedModel(NamedTuple):
    """A COMET model, as :func:`load_comet` gives it, and what to call it."""

    name: str
    model: Any


class Comet:
    """COMET as a metric of a test set, with what this package uses of sacreBLEU's metrics: its statistics
    are additive over sentences, and it scores sums of them.

    Parameters
    ----------
    model : with its name, for the signature
    sources, references : of the test set
    """

    def __init__(
        self, model: NamedModel, sources: Sequence[str], references: Sequence[str]
    ) -> None:
        self._model, self._sources, self._references = model, sources, references

    def _extract_corpus_statistics(self, hypotheses: Sequence[str], references: None) -> Floats:
        """The score of each sentence, and how many it is, (S, 2)."""
        found = sentence_scores(self._model.model, self._sources, hypotheses, self._references)
        return np.stack([found, np.ones_like(found)], axis=1)

    def _compute_score_from_stats(self, sums: Sequence[float]) -> Score:
        return Score("COMET", float(sums[0] / sums[1]))

    def get_signature(self) -> str:
        """What was scored with what."""
        return f"COMET|model:{self._model.name}|mean over sentences, in hundredths"
