"""Systems compared by plain text files: scores, tests, words."""

import gzip
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.significance import PairedTest

from analysis.compare import word_frequency
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
from analysis.runs.texts import each_line

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
    ends = ["low", "high"]
    pd.testing.assert_frame_equal(alone.pairs.drop(columns=ends), single.pairs.drop(columns=ends))
    # Intervals of few documents are those of a t-test: 2.045 for 1.960, and n / (n - 1) of variance.
    widths = [own.pairs["high"] - own.pairs["low"] for own in (alone, single)]
    assert (widths[1] / widths[0]).to_numpy() == pytest.approx(1.0436 * (30 / 29) ** 0.5, rel=1e-3)
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


def test_words_are_counted_line_by_line(tmp_path: Path) -> None:
    """Of the training text only the words that the references or the systems have."""
    own = corpus({"base": ["the cat sat", "a dog"]}, [["the cat sat", "the dog"]])
    path = tmp_path / "train.gz"
    path.write_bytes(gzip.compress(b"the cat, the house\r\n\na dog\n"))
    lines = each_line(path)
    assert next(lines) == "the cat, the house"
    found = word_frequency(each_line(path), "13a", cut(own))
    assert found == {"the": 2, "cat": 1, "a": 1, "dog": 1}


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
