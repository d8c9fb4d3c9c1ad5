"""The scripts are run, or imported, from their folders."""

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path[:0] = [str(SCRIPTS / folder) for folder in ("pipeline", "benchmarks", "data")]


@pytest.fixture
def teachers_of_fair(tmp_path: Path) -> None:
    """The files by which a study's plan sees that the teachers of the study fair are there."""
    for direction in ("de-en", "en-de", "en-cs", "cs-en"):
        data, runs = (tmp_path / part / "fair" / direction for part in ("data", "runs"))
        for path in (
            runs / "teacher/train.done",
            data / "cache.done",
            data / "sentencepiece.model",
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
