"""What a benchmark writes down."""

import json
from pathlib import Path

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
