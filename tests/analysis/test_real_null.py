"""Real runs that cannot differ: word-level KD's own, under other seeds, as if they were a method's.

The token records that a study keeps in ``results`` are restored; translations need the corpus, so claim 4 is
not part of it.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest

from analysis.claims.verdicts import claims_table
from analysis.runs.files import read_json, sealed_json
from analysis.runs.run_record import FORMAT_VERSION
from analysis.sums.direction import Options
from analysis.sums.loading import load

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "pipeline"))
from records import restore_direction  # noqa: E402

SEEDS = (1, 2, 3)
#: The baseline and what decides which tokens are hard.
METHODS = ("word_kd", "finetune")


def kept_directions() -> list[Path]:
    """The directions of the first study in ``results`` that keeps the token records of these runs."""
    names = {f"{method}.{seed}" for method in METHODS for seed in SEEDS}
    for study in sorted((ROOT / "results").glob("*/runs")):
        found = [
            path.with_suffix("")
            for path in sorted(study.glob("*.json"))
            if path.with_suffix(".parquet").exists()
            and names <= set(json.loads(path.read_text(encoding="utf-8"))["runs"])
        ]
        if len(found) > 1:
            return found
    return []


@pytest.fixture(scope="module")
def restored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kept runs, readable again."""
    directions = kept_directions()
    if not directions:
        pytest.skip("no study in results keeps token records of three seeds")
    root = tmp_path_factory.mktemp("kept")
    for direction in directions:
        for run in restore_direction(direction, "test", root / direction.name, None):
            if run.name.split(".")[0] not in METHODS:
                shutil.rmtree(run)
    return root


@pytest.mark.parametrize("shift", [1, 2])
def test_a_baseline_under_other_seeds_wins_nothing(
    restored: Path, tmp_path: Path, shift: int
) -> None:
    shutil.copytree(restored, tmp_path / "runs")
    for direction in (tmp_path / "runs").iterdir():
        for seed in SEEDS:
            run = direction / f"renamed.{seed}"
            shutil.copytree(direction / f"word_kd.{SEEDS[(seed - 1 + shift) % 3]}", run)
            record, _ = read_json(run / "run.json")
            record |= {"method": "se_kd_student", "seed": seed, "format_version": FORMAT_VERSION}
            (run / "run.json").write_bytes(sealed_json(record))
    options = Options(resamples=300)
    directions, left_out = load(tmp_path / "runs", options)
    assert not left_out and len(directions) > 1
    table, relation = claims_table(directions, options)
    assert "supported" not in set(table["verdict"])
    # Seen for what it is: runs that share errors with the reference runs of other seeds.
    found = relation.set_index("method")
    assert found.loc["se_kd_student", "unequal"] and not found.loc["word_kd", "unequal"]
