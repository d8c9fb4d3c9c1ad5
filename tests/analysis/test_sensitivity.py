"""Which runs tell something about one hyper-parameter, and the figure of it."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import WriteRun

from analysis import transfer
from analysis.chapters.sensitivity import BASELINE, one_at_a_time, value_key
from analysis.figures import without_variants
from analysis.runs.methods import Method
from analysis.runs.run_record import Run
from analysis.sums.direction import ScoredRun


def run(label: str, **hyperparameters: Any) -> ScoredRun:
    record = Run(Path(label), label, "se_kd_student", 1, "en-de", 1, hyperparameters, None)
    return ScoredRun(record, Method(record.method))


def test_one_at_a_time() -> None:
    usual = {"gamma": 1.0, "gamma_type": "absolute", "beta": 0.5, "same": 3}
    runs = [
        run("a", **usual),
        run("b", **usual),
        run("c", **(usual | {"gamma": 0.75, "gamma_type": "quantile"})),
        run("d", **(usual | {"beta": 0.9})),
        run("e", **(usual | {"beta": 0.9, "gamma": 2.0})),  # two differences: says nothing
    ]
    found = [(item.label, name, value) for item, name, value in one_at_a_time(runs)]
    assert found == [
        ("a", "beta", "0.5"), ("b", "beta", "0.5"), ("d", "beta", "0.9"),
        ("a", "gamma", "1.0"), ("b", "gamma", "1.0"), ("c", "gamma", "q0.75"),
    ]  # fmt: skip
    assert one_at_a_time(runs[:2]) == []
    assert one_at_a_time(list(reversed(runs)))[-1][0].label == "a"


def test_figures_by_look_show_as_many_methods_as_there_are_looks() -> None:
    few = pd.DataFrame({"method": ["word_kd", "se_kd_student", "se_kd_student (gamma=1)"]})
    assert without_variants(few).equals(few)
    variants = [f"se_kd_student (gamma={value})" for value in range(9)]
    many = pd.DataFrame({"method": ["teacher", "word_kd", "se_kd_student", *variants]})
    assert without_variants(many)["method"].tolist() == ["teacher", "word_kd", "se_kd_student"]
    assert without_variants(many[3:]).equals(many[3:])  # nothing else is left to draw


def test_values_sort_as_numbers() -> None:
    values = ["q0.9", "10.0", "2.0", "exp", "q0.75", "linear"]
    assert sorted(values, key=value_key) == ["2.0", "10.0", "exp", "linear", "q0.75", "q0.9"]


def test_table_and_figure(tmp_path: Path, write_run: WriteRun) -> None:
    root = tmp_path / "runs"
    write_run(root, "base", "word_kd", noise=0.8)
    write_run(root, "fine", "finetune", noise=1.0)
    for number, value in enumerate((0.1, 0.5, 0.9)):
        write_run(
            root, f"v{number}", "se_kd_student", noise=0.8 - value / 2, wrong=0.3 - value / 5,
            hyperparameters={"lambda_max": value},
        )  # fmt: skip
    transfer.main([str(root), "--resamples", "100"])
    folder = root / "report" / "figures"
    table = pd.read_csv(folder / "sensitivity.csv")
    own = table[table["parameter"] == "lambda_max"]
    assert own["value"].tolist() == [0.1, 0.5, 0.9]
    assert own["kl"].is_monotonic_decreasing and own["kl_hard"].gt(own["kl"]).all()
    results = pd.read_csv(root / "report/tables/results.csv").set_index("run")
    assert own["BLEU"].tolist() == pytest.approx(results.loc[own["run"], "BLEU"].tolist())
    assert table[table["parameter"] == BASELINE]["run"].tolist() == ["base"]
    for name in ("sensitivity", "methods"):
        assert (folder / f"{name}.pdf").stat().st_size > 5000
    report = (root / "report" / "report.md").read_text()
    assert "## Sensitivity" in report and "figures/methods.svg" in report
