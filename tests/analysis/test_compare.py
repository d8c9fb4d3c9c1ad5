"""Systems compared by plain text files: scores, tests, words, reports."""

import gzip
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.significance import PairedTest
from test_wmt22 import FOLDER, SCORES, SYSTEMS

from analysis import compare
from analysis.comparison import document
from analysis.comparison.chapters import Table
from analysis.comparison.metrics import Comparison, compare_systems, measure_systems
from analysis.comparison.systems import Corpus, choose_tokenizer, named_paths
from analysis.comparison.words import (
    FREQUENCIES,
    LENGTHS,
    accuracy_table,
    brevity_penalty,
    bucket_names,
    bucket_table,
    buckets_of,
    cut,
    length_table,
    ngram_table,
    repeats,
)
from analysis.runs.languages import Tokenizer

REFERENCE = [
    "the cat sat on the mat .",
    "a small dog runs in the green park .",
    "two men are talking about the weather today .",
    "she reads a very long book in the garden .",
    "nobody knows where the old bridge leads .",
    "there are seven apples on the kitchen table .",
]
GOOD = [
    "the cat sat on the mat .",
    "a small dog runs through the green park .",
    "two men are talking about the weather .",
    "she reads a long book in the garden .",
    "nobody knows where the old bridge goes .",
    "there are seven apples on the kitchen table .",
]
POOR = [
    "a cat is sitting on a mat .",
    "the little dog runs in a park .",
    "two men talk about weather .",
    "she is reading a long book outside .",
    "no one knows where the bridge leads .",
    "seven apples are on the table .",
]


def corpus(
    systems: dict[str, list[str]],
    references: Sequence[list[str]] = (REFERENCE,),
    documents: Sequence[int] | None = None,
    tokenizer: str = "13a",
) -> Corpus:
    unit = np.array(range(len(references[0])) if documents is None else documents)
    return Corpus(
        systems=systems,
        references=list(references),
        sources=None,
        unit=unit,
        documents=documents is not None,
        tokenizer=Tokenizer(tokenizer, None),
        segment_scores={},
    )


def judged(own: Corpus, trials: int = 2000) -> Comparison:
    return compare_systems(own, measure_systems(own, {}), resamples=200, trials=trials, seed=0)


def test_scores_are_those_of_sacrebleu_with_two_references() -> None:
    own = corpus({"poor": POOR, "good": GOOD}, [REFERENCE, GOOD[::-1]])
    for measure, metric in zip(measure_systems(own, {}), (BLEU(), CHRF(), TER()), strict=True):
        for name, lines in own.systems.items():
            expected = metric.corpus_score(lines, own.references)
            assert measure.score(name) == pytest.approx(expected.score)
        assert measure.signature == str(metric.get_signature())
        assert "nrefs:2" in measure.signature


def test_p_values_are_those_of_all_exchanges() -> None:
    own = corpus({"poor": POOR, "good": GOOD})
    pairs = judged(own).pairs.set_index("metric")
    for measure in measure_systems(own, {}):
        first, second = (measure.statistics[name] for name in ("poor", "good"))
        differences = []
        for kept in itertools.product([0, 1], repeat=len(REFERENCE)):
            chosen = np.array(kept)[:, None]
            left = measure.compute((chosen * first + (1 - chosen) * second).sum(axis=0))
            right = measure.compute((chosen * second + (1 - chosen) * first).sum(axis=0))
            differences.append(abs(left - right))
        observed = measure.score("good") - measure.score("poor")
        assert pairs.loc[measure.name, "difference"] == pytest.approx(observed)
        exact = np.mean(np.array(differences) >= abs(observed) - 1e-9)
        assert pairs.loc[measure.name, "p"] == pytest.approx(exact, abs=0.02)


def test_p_values_agree_with_sacrebleu() -> None:
    rng = np.random.default_rng(1)
    words = np.array(
        [
            "the",
            "a",
            "cat",
            "dog",
            "house",
            "sees",
            "old",
            "green",
            "big",
            "man",
            "with",
            "in",
            "of",
        ]
    )
    references = [" ".join(rng.choice(words, 9)) for _ in range(60)]

    def noisy(share: float) -> list[str]:
        return [
            " ".join(rng.choice(words) if rng.random() < share else word for word in line.split())
            for line in references
        ]

    systems = {"one": noisy(0.45), "two": noisy(0.38)}
    own = judged(corpus(systems, [references]), trials=4000)
    theirs = PairedTest(
        list(systems.items()), {"BLEU": BLEU(), "chrF": CHRF()}, [references], "ar", 4000
    )()[1]
    for name, metric in (("BLEU", "BLEU"), ("chrF", "chrF2")):
        p = own.pairs.set_index("metric").loc[name, "p"]
        assert 0.001 < p < 0.9
        assert p == pytest.approx(theirs[metric][1].p_value, abs=0.03)  # type: ignore[union-attr]


def test_identical_systems_cannot_be_told() -> None:
    found = judged(corpus({"a": GOOD, "b": list(GOOD)}))
    assert (found.pairs["p"] == 1).all()
    assert (found.pairs[["difference", "low", "high"]] == 0).all(axis=None)


def test_documents_are_drawn_and_exchanged_as_wholes() -> None:
    systems = {"poor": POOR * 5, "good": GOOD * 5}
    references = [REFERENCE * 5]
    alone = judged(corpus(systems, references))
    single = judged(corpus(systems, references, documents=list(range(30))))
    pd.testing.assert_frame_equal(alone.pairs, single.pairs)
    together = judged(corpus(systems, references, documents=[0] * 10 + [1] * 10 + [2] * 10))
    assert (alone.pairs["p"] < 0.01).all()
    # Three documents can be exchanged in 8 ways, of which two are as extreme as the observed one.
    assert together.pairs["p"].to_numpy() == pytest.approx(0.25, abs=0.04)
    # Documents that are alike to the last sentence leave nothing to chance.
    alike = judged(corpus(systems, references, documents=np.repeat(range(5), 6).tolist()))
    spread = alike.pairs["high"] - alike.pairs["low"]
    assert spread.to_numpy() == pytest.approx(0, abs=1e-9)


def test_holm_runs_over_the_pairs_of_a_metric() -> None:
    pairs = judged(corpus({"a": POOR, "b": GOOD, "c": REFERENCE})).pairs
    assert len(pairs) == 9
    for _, own in pairs.groupby("metric"):
        assert own["p_holm"].min() == pytest.approx(min(1, 3 * own["p"].min()))


def test_words_by_training_frequency() -> None:
    own = corpus(
        {"base": ["the cat sat", "a dog"], "other": ["the the dog sat", "a a dog"]},
        [["the cat sat", "the dog"]],
    )
    frequency = {"the": 5000, "a": 3, "sat": 1, "cat": 1}  # dog: 0
    table = accuracy_table(own, cut(own), frequency, 100, 0).set_index(["system", "frequency"])
    row = table.loc[("other", "1")]  # cat, sat of the reference; sat
    assert (row["reference_words"], row["words"], row["right"]) == (2, 1, 1)
    assert (row["precision"], row["recall"], row["f"]) == (1, 0.5, pytest.approx(2 / 3))
    assert row["gain"] == pytest.approx(2 / 3 - 1)
    row = table.loc[("other", "1000+")]  # the; the, the
    assert (row["reference_words"], row["words"], row["right"]) == (2, 2, 1)
    row = table.loc[("other", "0")]  # a dog is wrong in the first sentence, right in the second
    assert (row["reference_words"], row["words"], row["right"]) == (1, 2, 1)
    row = table.loc[("other", "2 to 4")]  # a, which no reference has
    assert (row["words"], row["right"], row["f"]) == (2, 0, 0)
    empty = table.loc[("other", "5 to 9")]
    assert empty["words"] == 0 and np.isnan(empty["f"]) and np.isnan(empty["low"])


def test_ngrams_that_differ() -> None:
    own = corpus(
        {"base": ["x b c", "a b", "a"], "other": ["a b c", "a b a b", "y"]},
        [["a b c", "a b", "a"]],
    )
    table = ngram_table(own, cut(own)).set_index("ngram")
    assert table.loc["a b", ["system_right", "baseline_right", "in_reference"]].tolist() == [
        2,
        1,
        2,
    ]
    assert table.loc["a b c", "share"] == pytest.approx(2 / 3)
    assert table.index[0] == "a b c" and bool(table.loc["a b c", "better"])
    assert "b c" not in table.index and "a" not in table.index  # as often right in both
    assert not table["better"].all() or set(table.index) == {"a b", "a b c"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("of the house of the house of the house", True),
        ("no no no", True),
        ("no no , no", False),
        ("the house of the house of", False),
        ("well . . . yes ! ! !", False),
        ("", False),
    ],
)
def test_repetition(text: str, expected: bool) -> None:
    assert repeats(text.split()) is expected


def test_length_and_brevity() -> None:
    own = corpus({"a": ["one two", "", "go go go"]}, [["one two three", "four", "go"]])
    row, reference = length_table(own, measure_systems(own, {})[0], cut(own)).to_dict("records")
    assert (row["words"], row["reference_words"], row["empty"]) == (5, 5, 1)
    assert row["repetition"] == pytest.approx(1 / 3) and reference["repetition"] == 0
    assert brevity_penalty(8, 10) == pytest.approx(np.exp(1 - 10 / 8))
    assert brevity_penalty(0, 10) == 0
    score = BLEU().corpus_score(POOR, [REFERENCE])
    assert brevity_penalty(score.sys_len, score.ref_len) == pytest.approx(score.bp)


def test_buckets() -> None:
    names = bucket_names(FREQUENCIES)
    assert names == ["0", "1", "2 to 4", "5 to 9", "10 to 99", "100 to 999", "1000+"]
    assert buckets_of([0, 1, 4, 5, 10**7], FREQUENCIES).tolist() == [0, 1, 2, 3, 6]
    own = corpus({"a": [*GOOD, "a " * 12]}, [[*REFERENCE, "a " * 12]])
    table = bucket_table(own, measure_systems(own, {}), cut(own)).set_index("words")
    assert table["sentences"].tolist() == [5, 2, *[0] * (len(LENGTHS) - 2)]
    assert table.loc["60+", ["BLEU", "chrF", "TER"]].isna().all()
    short = [i for i, line in enumerate(REFERENCE) if len(line.split()) < 10]
    expected = BLEU().corpus_score([GOOD[i] for i in short], [[REFERENCE[i] for i in short]])
    assert table.loc["0 to 9", "BLEU"] == pytest.approx(expected.score)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["x/de-en.A.en.gz", "x/de-en.B-1.2.en.gz"], ["A", "B-1.2"]),
        (["runs/a/hyps/test.txt", "runs/b/hyps/test.txt"], ["a", "b"]),
        (["out/only.txt.gz"], ["only.txt"]),
        (["a", "a.b"], ["a", "a.b"]),
        (["Best=x/1.txt", "x/2.txt"], ["Best", "2.txt"]),
    ],
)
def test_names_of_systems(paths: list[str], names: list[str]) -> None:
    assert list(named_paths(paths)) == names


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Ein Satz mit 中文 darin", "13a"),
        ("这是一个很长的句子 by BLEU", "zh"),
        ("これはペンです。漢字", "ja-mecab or char"),
        ("ประเทศไทย", "char"),
    ],
)
def test_script_chooses_the_tokenizer(line: str, expected: str) -> None:
    assert choose_tokenizer([line], None, None).name in expected.split(" or ")
    assert choose_tokenizer([line], None, "none").name == "none"
    assert choose_tokenizer([line], "zho_Hans", None).name == "zh"


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
    given = [packed, files["good"], *("--ref", files["ref"], "--src", files["ref"])]
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
