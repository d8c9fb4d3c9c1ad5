"""sacreBLEU scores of published systems on WMT22, through this package's own path.

Skipped unless the environment variable WMT22 names a folder with ``wmt22`` (``de-en.refA.en.gz``,
...) and ``wmt22-systems`` (``de-en.GPT-4-1106-preview.en.gz``, ...) in it.
"""

import gzip
import os
from pathlib import Path

import pytest
from conftest import WriteRun

from analysis.sums.direction import Options
from analysis.sums.loading import load

SYSTEMS = (
    "ALMA-13B-LoRA",
    "GPT-4-1106-preview",
    "gpt3.5-text-davinci-003",
    "MADLAD-10B",
    "WMT_Winners",
)
SCORES = {
    "de-en": (31.26, 32.46, 30.88, 32.87, 33.45),
    "en-de": (31.49, 34.49, 31.85, 36.52, 38.37),
    "cs-en": (45.36, 46.77, 44.52, 51.18, 64.18),
    "en-cs": (32.47, 33.66, 31.28, 40.11, 45.80),
    "zh-en": (25.48, 23.80, 25.00, 21.32, 33.51),
    "en-zh": (39.87, 42.78, 38.34, 39.15, 44.80),
}  # fmt: skip
FOLDER = os.environ.get("WMT22")


def lines(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode("utf-8")


@pytest.mark.skipif(not FOLDER, reason="WMT22 names no folder")
@pytest.mark.parametrize("direction", SCORES)
def test_scores_of_published_systems(write_run: WriteRun, tmp_path: Path, direction: str) -> None:
    root, target = Path(FOLDER or ""), direction[-2:]
    reference = "refB" if "cs" in direction else "refA"
    for seed, system in enumerate(SYSTEMS):
        # A run with token records, whose translations are then the system's.
        run = write_run(tmp_path, system, f"m{seed}", direction=direction, wrong=None)
        (run / "hyps").mkdir()
        hypotheses = lines(root / "wmt22-systems" / f"{direction}.{system}.{target}.gz")
        (run / "hyps" / "test.txt").write_text(hypotheses, encoding="utf-8")
        (run / "hyps" / "test.ref.txt").write_text(
            lines(root / "wmt22" / f"{direction}.{reference}.{target}.gz"), encoding="utf-8"
        )
    (found,), _ = load(tmp_path, Options(resamples=100))
    assert found.corpus is not None
    for seed, expected in enumerate(SCORES[direction]):
        run = next(run for run in found.translated if run.method.id == f"m{seed}")
        assert run.translations is not None
        score = found.corpus.corpus_score(run.translations, "BLEU")
        assert score == pytest.approx(expected, abs=0.005)
