"""What a study keeps tells the analysis the same, and holds no text of others."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import archive
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis import report, transfer
from analysis.runs.files import sealed_parquet
from analysis.runs.simulated import write_study

MARKS = ("train.done", "test.out", "score.test.done")


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished study in the layout of the pipeline; the working directory is its root."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "draw_all", lambda _: [])
    write_study(tmp_path / "runs" / "tiny", seeds=2, sentences=40)
    for run in (tmp_path / "runs" / "tiny" / "en-de").iterdir():
        for mark in MARKS:
            (run / mark).touch()
        (run / "scores.json").write_text("{}")
    data = tmp_path / "data" / "tiny" / "en-de"
    data.mkdir(parents=True)
    (data / "data.json").touch()
    first = next((tmp_path / "runs" / "tiny" / "en-de").iterdir())
    for suffix, language in ((".src", "en"), (".ref", "de")):
        shutil.copyfile(first / "hyps" / f"test{suffix}.txt", data / f"test.{language}")
    (tmp_path / "tiny.yaml").write_text("name: tiny\nseeds: [1, 2]\nmethods: {se_kd_student: {}}\n")
    return tmp_path


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["archive.py", *words])
    archive.main()


def test_saved_and_restored_the_report_is_the_same(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer.main(["runs/tiny", "--resamples", "100"])
    before = pd.read_csv("runs/tiny/report/tables/claims.csv")
    command(monkeypatch, "save", "tiny.yaml", "results/study")
    command(monkeypatch, "save", "tiny.yaml", "results/study")  # again, when more has finished
    kept = study / "results" / "study"
    assert not list(kept.rglob("*.ref.txt")) + list(kept.rglob("*.src.txt"))
    shared = pq.read_table(kept / "runs" / "en-de" / "teacher.parquet")
    assert set(shared["piece"].to_pylist()) <= {"▁", ""}
    assert set(shared["p_top1_piece"].to_pylist()) == {""}
    columns = [set(pq.read_schema(path).names) for path in kept.rglob("tokens/test/*.parquet")]
    assert {"kl"} in columns and not any(found & set(shared.column_names) for found in columns)
    assert (kept / "config.yaml").exists() and (kept / "tables" / "claims.csv").exists()
    assert (kept / "figures" / "training.csv").exists()
    shutil.rmtree("runs/tiny")
    command(monkeypatch, "restore", "tiny.yaml", "results/study")
    transfer.main(["runs/tiny", "--resamples", "100"])
    after = pd.read_csv("runs/tiny/report/tables/claims.csv")
    assert after["verdict"].tolist() == before["verdict"].tolist()
    np.testing.assert_allclose(after["effect"], before["effect"], rtol=1e-2, atol=2e-3)
    assert pd.read_csv("runs/tiny/report/figures/training.csv")["step"].nunique() == 3
    # Done in the order that snakemake looks at: the students after the cache, that after its teacher.
    made = [Path("runs/tiny/en-de/teacher/train.done"), Path("data/tiny/en-de/cache.done")]
    for record in Path("runs/tiny/en-de").glob("*/run.json"):
        marks = [*made, *[record.with_name(mark) for mark in MARKS]]
        times = [mark.stat().st_mtime_ns for mark in marks]
        assert times == sorted(times)


def test_a_study_restored_beside_another_leaves_it_done(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its marks of the teacher, the cache and the students to start from are as old as they were."""
    command(monkeypatch, "save", "tiny.yaml", "results/study")
    shutil.copytree("runs/tiny", "runs/warm")
    method = "methods: {se_kd_student: {warm-start: finetune, targets: distilled}}\n"
    Path("warm.yaml").write_text("runs: warm\n" + method)
    command(monkeypatch, "save", "tiny.yaml", "warm.yaml", "results/warm")
    shutil.rmtree("runs")
    command(monkeypatch, "restore", "tiny.yaml", "results/study")
    marks = [Path("data/tiny/en-de/cache.done"), *Path("runs/tiny").rglob("*.done")]
    before = [mark.stat().st_mtime_ns for mark in marks]
    command(monkeypatch, "restore", "tiny.yaml", "warm.yaml", "results/warm")
    assert [mark.stat().st_mtime_ns for mark in marks] == before
    # Alone it has what its students are made of, older than they are.
    shutil.rmtree("runs")
    marks[0].unlink()
    command(monkeypatch, "restore", "tiny.yaml", "warm.yaml", "results/warm")
    made = [Path("runs/tiny/en-de/teacher/train.done"), marks[0]]
    made.append(Path("data/tiny/en-de/distilled.done"))
    made += [Path(f"runs/tiny/en-de/finetune.{seed}/train.done") for seed in (1, 2)]
    made.append(next(Path("runs/warm/en-de").glob("*/run.json")).with_name("train.done"))
    times = [mark.stat().st_mtime_ns for mark in made]
    assert times == sorted(times)


def test_no_text_is_kept_but_where_words_begin() -> None:
    pieces = ["▁Haus", "es", "ĠHouse", "Haus@@", "", "▁", "@@"]
    assert archive.markers(pieces) == ["▁", "", "Ġ", "@@", "", "▁", "@@"]


def test_runs_of_another_teacher_are_not_mixed_in(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command(monkeypatch, "save", "tiny.yaml", "results/study")
    path = next(Path("runs/tiny/en-de").glob("*/tokens/test/100.parquet"))
    table = pq.read_table(path)
    place = table.schema.get_field_index("p_gold")
    half = pa.array(table["p_gold"].to_numpy() / 2)
    table = table.set_column(place, table.schema.field(place), half)
    path.write_bytes(sealed_parquet(table))
    with pytest.raises(SystemExit, match="expected the tokens and the teacher"):
        command(monkeypatch, "save", "tiny.yaml", "results/study")


def test_without_records_a_study_can_be_read_but_not_restored(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer.main(["runs/tiny", "--resamples", "100"])
    command(monkeypatch, "save", "tiny.yaml", "results/study", "--no-records")
    kept = study / "results" / "study"
    assert (kept / "tables" / "claims.csv").exists() and not list(kept.rglob("*.parquet"))
    assert len(list(kept.rglob("hyps/test.txt"))) == 6
    with pytest.raises(SystemExit, match="kept with --no-records"):
        command(monkeypatch, "restore", "tiny.yaml", "results/study")


def test_unfinished_runs_are_not_kept(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = sorted(Path("runs/tiny/en-de").iterdir())
    (runs[0] / "score.test.done").unlink()
    command(monkeypatch, "save", "tiny.yaml", "results/study")
    assert "5 runs" in capsys.readouterr().out
    assert not (study / "results/study/runs/en-de" / runs[0].name).exists()
    shutil.rmtree("data")
    with pytest.raises(SystemExit, match="expected prepared data"):
        command(monkeypatch, "restore", "tiny.yaml", "results/study")
    shutil.rmtree("runs")
    with pytest.raises(SystemExit, match="expected finished runs"):
        command(monkeypatch, "save", "tiny.yaml", "results/study")


def test_training_logs_are_thinned(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = sorted(Path("runs/tiny/en-de").iterdir())[0]
    lines = [
        f'2026 | INFO | train_inner | {{"num_updates": "{n}", "loss": "2.{n}", "kl_hard": "0.5"}}'
        for n in (10, 50, 100, 50)
    ]
    (run / "train.jsonl").write_text("\n".join(["begin", *lines, "{half"]))
    command(monkeypatch, "save", "tiny.yaml", "results/study")
    table = pd.read_csv("results/study/training.csv")
    assert table["update"].tolist() == [50, 100] and table["loss"].tolist() == [2.5, 2.1]
    assert table["run"].unique().tolist() == [f"en-de/{run.name}"]


def test_time_of_a_training_that_was_stopped_is_that_of_all_attempts(tmp_path: Path) -> None:
    walls = (10, 30, 55, 8, 20, 3)  # three attempts
    lines = [f'| {{"num_updates": "{n}", "wall": "{wall}"}}' for n, wall in enumerate(walls)]
    log = tmp_path / "train.jsonl"
    log.write_text("\n".join(["begin", *lines[:3], "{half", *lines[3:]]))
    assert archive.seconds_of_training(log) == 55 + 20 + 3


def test_steps_are_timed(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = study / ".snakemake" / "metadata"
    folder.mkdir(parents=True)
    import base64

    for output in ("data/tiny/en-de/cache.done", "data/other/en-de/cache.done"):
        name = base64.b64encode(output.encode()).decode()
        record = {"rule": "cache", "starttime": 5.0, "endtime": 9.4}
        (folder / name).write_text(json.dumps(record))
    for _ in range(2):  # a second call adds nothing twice
        command(monkeypatch, "save", "tiny.yaml", "results/study")
        steps = pd.read_csv("results/study/steps.csv").to_dict("records")
        assert steps == [{"rule": "cache", "output": "data/tiny/en-de/cache.done", "seconds": 4}]


def test_a_study_beside_the_main_one(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another folder of runs and another split; the data's name stays."""
    Path("runs/tiny").rename("runs/tiny-valid")
    for run in Path("runs/tiny-valid/en-de").iterdir():
        (run / "test.out").rename(run / "valid.out")
        (run / "score.test.done").rename(run / "score.valid.done")
        (run / "tokens" / "test").rename(run / "tokens" / "valid")
        for path in (run / "tokens" / "valid").iterdir():
            table = pq.read_table(path)
            named = {**table.schema.metadata, b"sekd.subset": b"valid"}
            path.write_bytes(sealed_parquet(table.replace_schema_metadata(named)))
        for text in (run / "hyps").iterdir():
            text.rename(text.with_name(text.name.replace("test", "valid")))
    for text in Path("data/tiny/en-de").glob("test.*"):
        text.rename(text.with_name(text.name.replace("test", "valid")))
    Path("second.yaml").write_text("runs: tiny-valid\nsubset: valid\n")
    command(monkeypatch, "save", "tiny.yaml", "second.yaml", "results/valid")
    assert len(list(Path("results/valid/runs/en-de").glob("*/tokens/valid/*.parquet"))) >= 6
    shutil.rmtree("runs")
    command(monkeypatch, "restore", "tiny.yaml", "second.yaml", "results/valid")
    transfer.main(["runs/tiny-valid", "--subset", "valid", "--resamples", "100"])
    assert not pd.read_csv("runs/tiny-valid/report/tables/claims.csv").empty


def test_what_is_kept_can_be_committed() -> None:
    """An ignore rule for ``runs/`` anywhere once left the kept runs out of every commit."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    run = "results/replication/runs/de-en/word_kd.1"
    kept = [f"{run}/run.json", f"{run}/hyps/test.txt", f"{run}/tokens/test/1200.parquet"]
    for paths, status in ((kept, 1), (["runs/demo/x", "data/demo/x"], 0)):
        check = ["git", "check-ignore", "--no-index", *paths]
        assert subprocess.run(check, cwd=root, check=False).returncode == status
