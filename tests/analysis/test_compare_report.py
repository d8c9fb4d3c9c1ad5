"""The command that compares systems: its files, errors and report."""

import gzip
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sacrebleu.metrics import BLEU
from test_compare import GOOD, POOR, REFERENCE
from test_wmt22 import FOLDER, SCORES, SYSTEMS

from analysis import compare
from analysis.comparison import document
from analysis.comparison.chapters import Table


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    texts = {"ref": REFERENCE, "poor": POOR, "good": GOOD, "empty": [], "short": GOOD[:-1]}
    texts["words"] = ["one"] * 6
    texts["numbers"] = [str(i / 7) for i in range(6)]
    texts["documents"] = ["a", "a", "b", "b", "c", "c"]
    found = {name: tmp_path / f"{name}.txt" for name in texts}
    for name, lines in texts.items():
        found[name].write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return found | {"missing": tmp_path / "missing.txt", "output": tmp_path / "out"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--ref {ref} {poor} {short}", "short.txt: expected 6 lines"),
        ("--ref {ref} {poor} {missing}", "missing.txt: expected a text file"),
        ("--ref {empty} {empty}", "empty.txt: expected a sentence a line, found an empty file"),
        ("--ref {ref} {empty}", "empty.txt: expected 6 lines"),
        ("--ref {ref} --ref {short} {good}", "short.txt: expected 6 lines"),
        ("--ref {ref} --src {short} {good}", "short.txt: expected 6 lines"),
        ("--ref {ref} --documents {short} {good}", "short.txt: expected 6 lines"),
        ("--ref {ref} --documents {words} {good}", "found one document"),
        ("--ref {ref} --train {missing} {good}", "missing.txt: expected a text file"),
        ("--ref {ref} --segment-scores {words} {good}", "words.txt, line 1: expected a number"),
        ("--ref {ref} --segment-scores {numbers} {good} {poor}", "expected a file for each of 2"),
        ("--ref {ref} --comet {ref} {good}", "--comet: expected --src"),
        ("--ref {ref} --resamples 5 {good}", "--resamples: expected at least 100"),
        ("--ref {ref} {good} {good}", "name the systems"),
        ("--ref {ref} {good} --output {ref}", "ref.txt: expected a report or nothing"),
        ("--ref {ref} {good} --output {ref}/x", "Not a directory"),
        ("--ref {ref} {good} --output /proc/x", "/proc"),
    ],
)
def test_errors_come_in_one_line_before_any_computing(
    files: dict[str, Path], arguments: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "measure_systems", lambda *_: pytest.fail("computed"))
    given = arguments.format(**files).split()
    if "--output" not in given:
        given += ["--output", str(files["output"])]
    with pytest.raises(SystemExit) as error:
        compare.main(given)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not files["output"].exists()


def test_report(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    odd = [*POOR[:5], "<script>alert(1)</script> 100 % | * sure_ \\ ^ ~"]
    files["poor"].write_bytes(gzip.compress(("\n".join(odd) + "\n").encode()))
    packed = files["poor"].rename(files["poor"].with_name("poor.txt.gz"))
    given = [packed, files["good"], "--ref", files["ref"], "--src", files["ref"]]
    given += ["--train", files["ref"], "--documents", files["documents"]]
    for name in ("numbers", "numbers"):
        given += ["--segment-scores", files[name]]
    given += ["--output", files["output"], "--resamples", "100", "--trials", "100"]
    for _ in range(2):  # the second time in place of the first
        compare.main([str(argument) for argument in given])
    assert "By BLEU, good is the best" in capsys.readouterr().out
    output = files["output"]
    tables = {path.stem for path in (output / "tables").glob("*.csv")}
    expected = {"scores", "pairs", "length", "length_difference", "by_length", "by_score"}
    assert tables == expected | {"words", "ngrams_1", "sentences"}
    assert {p.stem for p in (output / "tables").glob("*.tex")} == tables - {"sentences"}
    scores = pd.read_csv(output / "tables" / "scores.csv").set_index(["metric", "system"])["score"]
    assert scores["BLEU", "good"] == pytest.approx(BLEU().corpus_score(GOOD, [REFERENCE]).score)
    assert scores["segment score", "good"] == pytest.approx(np.mean(np.arange(6) / 7))
    for name in ("report.md", "report.html"):
        text = (output / name).read_text(encoding="utf-8")
        assert not re.search(r"\bnan\b", text)
        assert "<script>alert" not in text.replace("    poor: <script>alert", "")
        assert "3 documents" in text
    assert sorted(p.name for p in output.parent.iterdir() if p.name.startswith(".")) == []


def test_systems_with_names_of_columns(files: dict[str, Path]) -> None:
    named = ["words", "sentences", "chrF", "better", "reference", "frequency"]
    given = ["--ref", files["ref"], "--train", files["ref"], "--no-ter", "--trials", "100"]
    given += [f"{name}={files['good' if name == 'better' else 'poor']}" for name in named]
    compare.main([str(argument) for argument in [*given, "--output", files["output"]]])
    text = (files["output"] / "report.md").read_text(encoding="utf-8")
    heads = [line for line in text.splitlines() if line.startswith("| words of the reference |")]
    assert heads == [f"| words of the reference | how many sentences | {' | '.join(named)} |"]
    assert "By BLEU, better is the best" in text


def test_one_system_alone(files: dict[str, Path]) -> None:
    compare.main(["--ref", str(files["ref"]), str(files["good"]), "--output", str(files["output"])])
    text = (files["output"] / "report.md").read_text(encoding="utf-8")
    assert "One system" in text and "## Differences" not in text


def test_comet(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def predict(data: list[dict[str, str]], **_: Any) -> Any:
        assert set(data[0]) == {"src", "mt", "ref"}
        return SimpleNamespace(scores=[float(item["mt"] == item["ref"]) for item in data])

    monkeypatch.setattr(compare, "load_comet", lambda _: SimpleNamespace(predict=predict))
    given = ["--ref", files["ref"], "--src", files["ref"], "--comet", "x", files["poor"]]
    given += [files["good"], "--output", files["output"], "--no-ter"]
    compare.main([str(argument) for argument in given])
    table = pd.read_csv(files["output"] / "tables" / "scores.csv").set_index(["metric", "system"])
    assert table.loc[("COMET", "good"), "score"] == pytest.approx(100 * 2 / 6)
    assert "TER" not in table.index.get_level_values("metric")


def test_examples_have_the_sign_of_their_group(files: dict[str, Path]) -> None:
    arguments = ("poor", "good", "--ref", "ref", "--output", "output")
    given = [str(files.get(argument, argument)) for argument in arguments]
    compare.main([*given, "--resamples", "100", "--trials", "100"])
    text = (files["output"] / "report.md").read_text(encoding="utf-8")
    assert "gains most over" in text and "loses most to" not in text  # it loses nowhere
    changes = re.findall(r"chrF ([\d.]+) → ([\d.]+)", text)
    assert changes and all(float(after) > float(before) for before, after in changes)


def test_latex() -> None:
    shown = pd.DataFrame({"a_b": ["50 % ↓", "{x}"], "p": ["< 0.1", "\\"]})
    table = Table("name", "95 % of x", shown, shown, np.array([[False, True], [False, False]]))
    text = document.latex_table(table)
    assert r"50 \% $\downarrow$ & \textbf{\textless{} 0.1} \\" in text
    assert r"\{x\} & \textbackslash{} \\" in text
    assert r"\begin{tabular}{ll}" in text  # neither column is of numbers alone
    assert r"a\_b & p \\" in text and r"\caption{95 \% of x}" in text and r"\toprule" in text


def test_numbers_stand_at_the_right() -> None:
    shown = pd.DataFrame(
        {
            "a": ["x", "1"],
            "b": ["1.20 [0.58, 1.82] †", "-0.3"],
            "c": ["< 0.001", "no words"],
            "d": ["3", ""],
        }
    )
    assert document.numeric(Table("name", "", shown, shown)) == [False, True, True, True]


@pytest.mark.skipif(not FOLDER, reason="WMT22 names no folder")
@pytest.mark.parametrize("direction", SCORES)
def test_wmt22(direction: str, tmp_path: Path) -> None:
    root, target = Path(FOLDER or ""), direction[-2:]
    reference = "refB" if "cs" in direction else "refA"
    systems = [root / "wmt22-systems" / f"{direction}.{name}.{target}.gz" for name in SYSTEMS]
    given = [*systems, "--ref", root / "wmt22" / f"{direction}.{reference}.{target}.gz"]
    given += ["--output", tmp_path / "out", "--no-ter", "--trials", "100", "--resamples", "100"]
    compare.main([str(argument) for argument in given])
    table = pd.read_csv(tmp_path / "out" / "tables" / "scores.csv").set_index(["metric", "system"])
    assert table.loc["BLEU"].index.tolist() == list(SYSTEMS)
    assert table.loc["BLEU", "score"].tolist() == pytest.approx(SCORES[direction], abs=0.005)
