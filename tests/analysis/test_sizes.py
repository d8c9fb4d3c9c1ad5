"""Quality by the size of the training set: a table and a figure of several folders of runs."""

from pathlib import Path

import pandas as pd
import pytest
from conftest import WriteRun

from analysis import sizes, transfer
from analysis.sums.direction import Options
from analysis.sums.loading import load


def test_a_line_per_method(
    tmp_path: Path, write_run: WriteRun, capsys: pytest.CaptureFixture[str]
) -> None:
    roots = []
    for number, count in enumerate((2000, 8000, 29000)):
        root = tmp_path / f"runs-{count}"
        roots.append(str(root))
        data = {"fingerprint": "data-1", "sentences": count}
        for method, better in (("finetune", 0.0), ("word_kd", 0.1)):
            for seed in (1, 2):
                write_run(
                    root, f"{method}.{seed}", method, seed=seed, wrong=0.5 - 0.1 * number - better, data=data
                )  # fmt: skip
    write_run(tmp_path / "runs-29000", "teacher", "teacher", wrong=0.05, data=data)
    sizes.main([*roots, "--output", str(tmp_path / "sizes")])
    printed = capsys.readouterr().out
    table = pd.read_csv(tmp_path / "sizes" / "sizes.csv")
    assert len(table) == 13 and set(table["sentences"]) == {2000, 8000, 29000}
    means = table.groupby(["method", "sentences"])["BLEU"].mean()
    for method in ("finetune", "word_kd"):
        assert means[method].is_monotonic_increasing
    assert (means["word_kd"] > means["finetune"]).all()
    assert f"{means['word_kd', 8000]:.2f}" in printed and "| 29,000" in printed
    assert (tmp_path / "sizes" / "sizes.svg").stat().st_size > 5000
    # The scores are those of the report that each folder has.
    transfer.main([roots[0], "--resamples", "100"])
    results = pd.read_csv(Path(roots[0]) / "report/tables/results.csv")
    own = table[table["sentences"] == 2000]
    assert sorted(own["BLEU"]) == pytest.approx(sorted(results["BLEU"]))


def test_variants_of_a_method_have_lines_of_their_own(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path, "finetune", "finetune", data={"sentences": 2000})
    for gamma, seeds in ((0.5, (1, 2)), (0.9, (1,))):
        for seed in seeds:
            write_run(
                tmp_path, f"se.{gamma}.{seed}", "se_kd_target", seed=seed,
                hyperparameters={"gamma": gamma}, data={"sentences": 2000},
            )  # fmt: skip
    directions, _ = load(tmp_path, Options(resamples=2))
    table = sizes.sizes_table(directions)
    usual = ["finetune", "se_kd_target", "se_kd_target"]
    assert table["method"].tolist() == [*usual, "se_kd_target (gamma=0.9)"]


def test_a_teacher_that_was_not_trained_here(
    tmp_path: Path, write_run: WriteRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a language model, of which no record says how much it has read."""
    roots = []
    for count in (1000, 4000):
        roots.append(str(tmp_path / f"runs-{count}"))
        write_run(Path(roots[-1]), "finetune", "finetune", data={"sentences": count})
        write_run(Path(roots[-1]), "teacher", "teacher", wrong=0.05)
    sizes.main([*roots, "--output", str(tmp_path / "sizes")])
    table = pd.read_csv(tmp_path / "sizes" / "sizes.csv")
    teacher, student = (table[table["method"] == name] for name in ("teacher", "finetune"))
    assert teacher["sentences"].isna().all() and student["sentences"].tolist() == [1000, 4000]
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert "| 1,000 | 4,000 | unknown |" in rows[0]
    assert f"| teacher |  |  | {teacher['BLEU'].mean():.2f} |" in rows[2]
    assert (tmp_path / "sizes" / "sizes.svg").exists()


def test_a_record_without_sentences_is_named(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "runs", "one", "finetune")
    with pytest.raises(SystemExit, match="runs/one: expected the number of training sentences"):
        sizes.main([str(tmp_path / "runs"), "--output", str(tmp_path / "sizes")])
    assert not (tmp_path / "sizes").exists()
