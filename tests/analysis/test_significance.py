"""sacreBLEU's intervals and tests from statistics that are extracted once."""

import shutil
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from conftest import WriteRun
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.base import Metric
from sacrebleu.significance import PairedTest, _bootstrap_resample

from analysis.runs.texts import Texts, write_texts
from analysis.sums.direction import Direction, Options
from analysis.sums.loading import load
from analysis.sums.significance import TRIALS, Significance

WORDS = ["a", "der", "Hund", "läuft", "über", "Straße", ",", "schnell", "und", "weiter"]


def worse(lines: list[str], share: float, rng: np.random.Generator) -> list[str]:
    return [
        " ".join(word if rng.random() > share else str(rng.choice(WORDS)) for word in line.split())
        for line in lines
    ]


def loaded(root: Path, write_run: WriteRun, copies: int = 1) -> Direction:
    """Two systems of 40 sentences, or of 40 documents that are copies of one sentence each."""
    rng = np.random.default_rng(7)
    references = [" ".join(rng.choice(WORDS, rng.integers(3, 12))) for _ in range(40)]
    for name, share in (("word_kd", 0.3), ("se_kd_blend", 0.29)):
        lines = worse(references, share, rng)
        run = write_run(root, name, name, sentences=40 * copies)
        shutil.rmtree(run / "tokens")
        texts = ([line for line in side for _ in range(copies)] for side in (lines, references))
        write_texts(run, "test", Texts(*texts, None))
    documents = tuple(f"{number:02}" for number in range(40) for _ in range(copies))
    options = Options(resamples=100, documents=documents if copies > 1 else ())
    return load(root, options)[0][0]


@pytest.fixture
def direction(tmp_path: Path, write_run: WriteRun) -> Direction:
    return loaded(tmp_path / "sentences", write_run)


@pytest.mark.parametrize("name", ["BLEU", "chrF"])
def test_documents_are_drawn_and_exchanged_as_wholes(
    direction: Direction, tmp_path: Path, write_run: WriteRun, name: str
) -> None:
    """Copies of a sentence in one document are worth no more than the sentence."""
    found = []
    for item in (direction, loaded(tmp_path / "documents", write_run, copies=4)):
        tests = Significance(item.corpus)
        run, baseline = sorted(item.translated, key=lambda run: run.label)
        score = tests.score(run, name)
        found.append([*astuple(tests.compare(run, baseline, name)), score._mean, score._ci])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize(("name", "plain"), [("BLEU", BLEU), ("chrF", CHRF)])
def test_equal_sacrebleu_to_the_last_digit(
    direction: Direction, name: str, plain: type[Metric]
) -> None:
    tests = Significance(direction.corpus)
    run, baseline = sorted(direction.translated, key=lambda run: run.label)
    texts = run.translations.texts
    references = [texts.references]
    expected = plain().corpus_score(texts.hypotheses, references, n_bootstrap=TRIALS)
    found = tests.score(run, name)
    assert (found.score, found._mean, found._ci) == (expected.score, expected._mean, expected._ci)
    systems = [("baseline", baseline.translations.texts.hypotheses), ("system", texts.hypotheses)]
    compared = tests.compare(run, baseline, name)
    for kind, p in (("bs", compared.p_bootstrap), ("ar", compared.p_randomisation)):
        test = PairedTest(systems, {name: plain()}, references, kind, TRIALS)
        base, own = next(values for key, values in test()[1].items() if key != "System")
        assert p == own.p_value and compared.gain == own.score - base.score
        assert 0.001 < p < 1
    drawn = []
    for item in (run, baseline):
        statistics = item.translations.statistics[name].tolist()
        drawn.append([score.score for score in _bootstrap_resample(statistics, plain(), TRIALS)[1]])
    ends = np.percentile(np.subtract(*drawn), [2.5, 97.5])
    assert [compared.low, compared.high] == pytest.approx(ends, abs=1e-5)


def test_a_resample_of_a_run_is_scored_once(
    direction: Direction, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = Significance(direction.corpus)
    run, baseline = direction.translated
    compute, scored = BLEU._compute_score_from_stats, []
    monkeypatch.setattr(
        BLEU, "_compute_score_from_stats", lambda *a: (scored.append(1), compute(*a))[1]
    )
    for _ in range(3):
        tests.score(run, "BLEU")
        tests.score(baseline, "BLEU")
    assert len(scored) == 2 * TRIALS + 6
