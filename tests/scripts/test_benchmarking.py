"""What a benchmark writes down."""

import json
from pathlib import Path

import bench_analysis
import numpy as np
import pandas as pd
import pytest
import torch
from benchmarking import Target, write_results


def test_figures_and_targets_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"part": "a", "seconds": np.float64(1.5)}, {"part": "b", "share": 0.25}]
    targets = [
        Target("seconds", np.float64(1.5), 2),  # NumPy's bool once broke the file half-way
        Target("share", 0.25, 0.8, at_least=True),
        Target("never had", None, 1),
        Target("of one seed", float("nan"), 1),
    ]
    write_results("bench", rows, targets, torch.device("cpu"), tmp_path)
    entries = json.loads((tmp_path / "bench.json").read_text())
    assert [entry["met"] for entry in entries] == [True, False, False, False]
    assert [entry["value"] for entry in entries] == [1.5, 0.25, None, None]
    assert all(entry["command"] and entry["hardware"] and entry["date"] for entry in entries)
    table = pd.read_csv(tmp_path / "bench.csv")
    assert table.columns.tolist() == ["part", "seconds", "share"] and len(table) == 2
    assert "MISSED share: 0.250 (at least 0.8)" in capsys.readouterr().out


def test_the_error_rates_of_the_analysis_go_on_where_they_were_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And have a line and a limit for every kind of null."""
    judged: list[int] = []

    def interrupted(study: int) -> bool:
        judged.append(study)
        if len(judged) == 2:
            raise KeyboardInterrupt
        return study == 3

    size = {"part": "scale", "case": "few", "seconds": 1.0, "peak_gib": 0.5}
    monkeypatch.setattr(bench_analysis, "scale", lambda folder: size)
    monkeypatch.setattr(bench_analysis, "judge_claim", lambda better, study, **_: (study == 0, 0.5))
    monkeypatch.setattr(bench_analysis, "rejects", lambda kind, study: False)
    monkeypatch.setattr(bench_analysis, "renamed_wins", interrupted)

    def measure(*parts: str) -> None:
        options = ["--studies", "4", "--output", str(tmp_path), "--parts", *parts]
        monkeypatch.setattr("sys.argv", ["bench_analysis.py", *options])
        bench_analysis.main()

    with pytest.raises(KeyboardInterrupt):
        measure(*bench_analysis.PARTS)
    measure(*bench_analysis.PARTS)
    assert judged == [0, 1, 1, 2, 3]
    size["seconds"] = 25.0
    measure("scale")  # the others stay as they are
    table = pd.read_csv(tmp_path / "bench_analysis.csv")
    assert table["seconds"].tolist()[0] == 25 and len(table) == 1 + 5 + 6
    found = {
        entry["target"]: (entry["value"], entry["met"])
        for entry in json.loads((tmp_path / "bench_analysis.json").read_text())
    }
    assert found["seconds for ten million token records"] == (25.0, False)
    shared = "null rejected: error shared with a reference, share of studies"
    assert found[shared] == (0.25, True) and len(found) == 5 + len(bench_analysis.KINDS) + 1
    assert found["claim 1 supported though nothing differs, share of studies"] == (0.25, False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bench_analysis.csv", "bench_analysis.json",
    ]  # fmt: skip
