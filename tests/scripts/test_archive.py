"""What a study keeps tells the analysis the same, and holds no text of others."""

import shutil
import subprocess
from pathlib import Path

import archive
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import records
import snakemake.cli  # noqa: F401 (imported before forking)
import yaml

from analysis import transfer
from analysis.report import document
from analysis.runs.files import sealed_json, sealed_parquet
from analysis.runs.simulated import write_study
from analysis.runs.token_records import read_columns
from tests.sekd_fairseq.conftest import ROOT, command, run_forked

CONFIGS = (ROOT / "scripts" / "configs" / "demo.yaml", Path("tiny.yaml"))
MARKS = ("train.done", "test.out", "score.test.done")
SCORES = {"bleu": {"score": 20.123456}, "chrf": {"score": 40.0}, "length_ratio": 0.9, "lenpen": 1.3}


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished study in the layout of the pipeline; the working directory is its root."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(document, "draw_all", lambda *_: [])
    monkeypatch.setattr(archive.subprocess, "run", run_forked)
    runs = write_study(tmp_path / "runs" / "tiny", seeds=2, sentences=40) / "en-de"
    for run in list(runs.iterdir()):
        method = run.name[:-1].replace("treatment", "se_kd")
        run = run.rename(run.with_name(f"{method}.{run.name[-1]}"))
        for mark in MARKS:
            (run / mark).touch()
        (run / "scores.json").write_bytes(sealed_json({"test": SCORES}))
    data = tmp_path / "data" / "tiny" / "en-de"
    data.mkdir(parents=True)
    for suffix, language in ((".src", "en"), (".ref", "de")):
        Path(f"text.{language}").touch()
        shutil.copyfile(run / "hyps" / f"test{suffix}.txt", data / f"test.{language}")
    (data / "data.json").touch()
    own = {"name": "tiny", "seeds": [1, 2], "corpus": {"src": "text.en", "tgt": "text.de"}}
    CONFIGS[1].write_text(yaml.safe_dump(own))
    return tmp_path


def keep(action: str, *words: str, output: str = "results/study") -> None:
    archive.main([action, *map(str, CONFIGS), output, *words])


def claims(*words: str) -> pd.DataFrame:
    transfer.main(["runs/tiny", "--resamples", "100", *words])
    return pd.read_csv("runs/tiny/report/tables/claims.csv")


def test_saved_and_restored_the_report_is_the_same(study: Path) -> None:
    before = claims()
    keep("save", "--records")
    keep("save", "--records")  # again, when more has finished
    kept = Path("results/study")
    names = sorted(path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file())
    assert names == [
        "config.yaml", "report.md", "runs/en-de.json", "runs/en-de.parquet",
        "runs/en-de.translations.parquet", "tables/claims.csv", "tables/methods.csv", "tables/results.csv",
    ]  # fmt: skip
    table = pq.read_table(kept / "runs" / "en-de.parquet")
    assert set(table["piece"].to_pylist()) <= {"▁", ""}
    assert not any(name.endswith("top1_piece") for name in table.column_names)
    assert "![" not in (kept / "report.md").read_text()  # of figures that are not kept
    shutil.rmtree("runs")
    keep("restore")
    after = claims()
    assert after["verdict"].tolist() == before["verdict"].tolist()
    # Claim 4 is about ranks of 40 sentences, each of a few tokens.
    tolerance = np.where(before["claim"] == 4, 0.15, 0.04) + 0.05 * before["effect"].abs()
    assert ((after["effect"] - before["effect"]).abs() <= tolerance).all()
    # snakemake takes all for done but the report, and the texts of a teacher, which this study has not.
    plan = command(
        "snakemake", "--dry-run", "-s", ROOT / "scripts" / "Snakefile", "-c1", "--configfile", *CONFIGS,
        cwd=study,
    )  # fmt: skip
    jobs = dict(line.split()[:2] for line in plan.splitlines() if len(line.split()) == 2)
    made = {"prepare", "teacher", "cache", "student", "translate", "score"}
    assert jobs["report"] == "1" and made.isdisjoint(jobs), plan


def test_what_was_made_here_is_neither_overwritten_nor_taken_for_done(study: Path) -> None:
    runs = sorted(Path("runs/tiny/en-de").iterdir())
    (runs[0] / "score.test.done").unlink()  # not finished, and so not kept
    keep("save", "--records")
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match=f"error: {runs[1]}: .* found one that was made here"):
        keep("restore")
    assert before == {path: path.read_bytes() for path in before}
    shutil.rmtree("runs")
    keep("restore")
    keep("restore")  # again
    assert not any((runs[0] / mark).exists() for mark in MARKS)
    assert all((runs[1] / mark).exists() for mark in MARKS)
    (runs[2] / "checkpoints").mkdir()  # and trained on
    with pytest.raises(SystemExit, match=f"error: {runs[2]}: .* found one that was made here"):
        keep("restore")
    shutil.rmtree("runs")
    Path("runs/tiny/en-de/teacher/checkpoints").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"teacher: .* found one under way"):
        keep("restore")


def test_without_data_all_but_the_translations_is_judged(study: Path) -> None:
    before = claims()
    keep("save", "--records")
    shutil.rmtree("runs")
    shutil.rmtree("data")
    keep("restore")
    after = claims()
    keys = ["treatment", "scope", "claim", "measure"]
    found = before.merge(after, on=keys, suffixes=("", "_after")).dropna(subset="verdict")
    assert len(found) and found["verdict"].eq(found["verdict_after"]).all()


def test_numbers_come_back_as_they_are_on_average() -> None:
    random = np.random.default_rng(1)
    values = random.lognormal(-2, 1, 20000).astype(np.float32)
    values[:100] = 0
    back = records.decode("kl", records.code("kl", values), random)
    assert (back[:100] == 0).all() and np.abs(back[100:] / values[100:] - 1).max() <= 0.5
    assert back.mean() == pytest.approx(values.mean(), rel=0.015)
    for share in (0.25, 0.5, 0.75):  # also above a threshold
        assert (back > np.quantile(values, share)).mean() == pytest.approx(1 - share, abs=0.01)
    shares = random.random(20000).astype(np.float32)
    for name in ("q_max", "q_gold"):
        back = records.decode(name, records.code(name, shares), random)
        assert (
            back.mean() == pytest.approx(shares.mean(), abs=0.005)
            and 0 <= back.min() <= back.max() <= 1
        )
    numbers = np.array([5, 0, 1], np.int8)
    assert records.decode(
        "overlap_top5", records.code("overlap_top5", numbers), random
    ).tolist() == [5, 0, 1]


def test_choices_and_steps_come_back(study: Path) -> None:
    path = Path("runs/tiny/en-de/se_kd.1/tokens/test/100.parquet")
    names = ["q_top1", "overlap_top5", "p_top1"]
    before = read_columns(path, names)
    keep("save", "--records")
    shutil.rmtree("runs")
    keep("restore")
    after = read_columns(path, names)
    for name in names:
        np.testing.assert_array_equal(after[name], before[name])
    assert len(list(path.parent.glob("*.parquet"))) == 3


def test_no_text_is_kept_but_where_words_begin() -> None:
    pieces = ["▁Haus", "es", "ĠHouse", "Haus@@", "", "▁", "@@"]
    assert records.markers(pieces) == ["▁", "", "Ġ", "@@", "", "▁", "@@"]


def test_runs_of_another_teacher_are_not_mixed_in(study: Path) -> None:
    path = next(Path("runs/tiny/en-de").glob("*/tokens/test/100.parquet"))
    table = pq.read_table(path)
    place = table.schema.get_field_index("p_gold")
    half = pa.array(table["p_gold"].to_numpy() / 2)
    table = table.set_column(place, table.schema.field(place), half)
    path.write_bytes(sealed_parquet(table))
    with pytest.raises(SystemExit, match="expected the tokens and the teacher"):
        keep("save", "--records")


def test_without_records_a_study_can_be_read_but_not_restored(study: Path) -> None:
    claims()
    keep("save")
    assert not list(Path("results/study").rglob("*.parquet"))
    with pytest.raises(SystemExit, match="kept without --records"):
        keep("restore")


def test_unfinished_runs_are_not_kept(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = sorted(Path("runs/tiny/en-de").iterdir())
    (runs[0] / "score.test.done").unlink()
    keep("save")
    assert "5 runs" in capsys.readouterr().out
    table = pd.read_csv("results/study.csv")
    assert len(table) == 5 and f"en-de/{runs[0].name}" not in set(table["run"])
    assert table["test_bleu"].unique().tolist() == [20.1235] and table["lenpen"].unique() == [1.3]
    shutil.rmtree("runs")
    with pytest.raises(SystemExit, match="expected finished runs"):
        keep("save")


def test_training_logs_are_thinned_and_steps_timed(study: Path) -> None:
    run = Path("runs/tiny/en-de/se_kd.1")
    walls = (10, 30, 55, 8, 20, 3)  # three attempts
    lines = [
        f'2026 | {{"num_updates": "{n}", "loss": "2.{n}", "kl_hard": "0.5", "wall": "{wall}"}}'
        for n, wall in zip((10, 50, 90, 60, 100, 50), walls, strict=True)
    ]
    (run / "train.jsonl").write_text("\n".join(["begin", *lines[:3], "{half", *lines[3:]]))
    for path in (run / "times" / "train.tsv", Path("data/tiny/times/en-de.cache.tsv")):
        path.parent.mkdir(exist_ok=True)
        path.write_text("s\th:m:s\n4.4\t0:00:04\n")
    keep("save", "--records")
    table = pd.read_csv("results/study/training.csv")
    assert table["update"].tolist() == [100, 50] and table["loss"].tolist() == [2.1, 2.5]
    assert table["run"].unique().tolist() == ["en-de/se_kd.1"]
    steps = pd.read_csv("results/study/steps.csv").to_dict("records")
    assert steps == [
        {"place": "data/tiny/en-de", "step": "cache", "seconds": 4},
        {"place": run.as_posix(), "step": "train", "seconds": 55 + 20 + 3},  # of all attempts
    ]
    assert pd.read_csv("results/study.csv")["train_seconds"].max() == 78


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "own.yaml: No such file or directory"),
        ("seeds: [1\n", "own.yaml: expected YAML, found "),
        ("", "own.yaml: expected keys and values, found None"),
        (
            "student: {max_update: 5}\n",
            r"configuration, at \$\.student: 'max_update' does not match",
        ),
    ],
)
def test_a_wrong_configuration_ends_with_one_line(
    content: str | None, told: str, tmp_path: Path
) -> None:
    own = tmp_path / "own.yaml"
    if content is not None:
        own.write_text(content)
    demo = ROOT / "scripts" / "configs" / "demo.yaml"
    with pytest.raises(SystemExit, match=f"^error: [^\n]*{told}[^\n]*$"):
        archive.main(["save", str(demo), str(own), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_what_is_kept_can_be_committed() -> None:
    """An ignore rule for ``runs/`` anywhere once left the kept runs out of every commit."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    kept = ["results/replication/runs/de-en.json", "results/replication/runs/de-en.parquet"]
    for paths, status in ((kept, 1), (["runs/demo/x", "data/demo/x"], 0)):
        check = ["git", "check-ignore", "--no-index", *paths]
        assert subprocess.run(check, cwd=ROOT, check=False).returncode == status


def test_results_are_small() -> None:
    files = [path for path in (ROOT / "results").rglob("*") if path.is_file()]
    assert len(files) <= 200 and sum(path.stat().st_size for path in files) <= 12e6
    index = (ROOT / "results" / "README.md").read_text()
    for study in (path.name for path in (ROOT / "results").iterdir() if path.is_dir()):
        assert f"`{study}`" in index, study


def test_gains_are_of_all_directions_and_of_no_baseline() -> None:
    columns = (
        "direction",
        "method",
        "metric",
        "seeds",
        "gain_over_word_kd",
        "gain_over_word_kd_p_holm",
    )
    rows = [
        ("de-en", "se_kd", "BLEU", 3, 9.0, 0.0, 9.0),
        ("all", "finetune", "BLEU", 3, -2.0, 0.0, 0.3),
        ("all", "placebo", "BLEU", 3, 0.0, 1.0, 0.3),
        ("all", "word_kd", "BLEU", 3, None, None, None),
        ("all", "se_kd", "chrF", 3, 9.0, 0.0, 9.0),
        ("all", "se_kd", "BLEU", 3, 1.5, 0.01, 0.4),
        ("all", "seq_word_kd", "BLEU", 3, -0.5, 0.2, 0.7),
        ("de-en", "one", "BLEU", 3, 2.0, 0.02, 0.6),  # of one direction alone
    ]
    table = pd.DataFrame(rows, columns=[*columns, "gain_over_word_kd_detectable"])
    assert archive.gains(table) == []  # no report has gains without intervals
    table["gain_over_word_kd_low"] = table["gain_over_word_kd"]
    found = {target.name: (target.value, target.met()) for target in archive.gains(table)}
    assert found == {
        "BLEU gain over word KD: se_kd, all, 3 seeds": (1.5, True),
        "its p-value, corrected: se_kd, all, 3 seeds": (0.01, True),
        "smallest gain that is detected: se_kd, all, 3 seeds": (0.4, True),
        "BLEU gain over word KD: seq_word_kd, all, 3 seeds": (-0.5, False),
        "smallest gain that is detected: seq_word_kd, all, 3 seeds": (0.7, False),
        "BLEU gain over word KD: one, de-en, 3 seeds": (2.0, True),
        "its p-value, corrected: one, de-en, 3 seeds": (0.02, True),
        "smallest gain that is detected: one, de-en, 3 seeds": (0.6, False),
    }
    # Of a report with another baseline, gains over that.
    other = table.rename(columns=lambda name: name.replace("word_kd", "seq_word_kd"))
    names = [target.name for target in archive.gains(other)]
    assert names[0] == "BLEU gain over sequence- and word-level KD: se_kd, all, 3 seeds"
