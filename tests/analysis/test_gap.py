"""Share of the teacher's lead that is closed: against Fieller's formula, and from run directories."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import WriteRun
from sacrebleu.metrics import BLEU

from analysis import gap
from analysis.gap import Effects, gap_table, share_closed
from analysis.runs.texts import read_texts
from analysis.stats import hierarchical
from analysis.sums.direction import Options
from analysis.sums.loading import load


def draws(
    rng: np.random.Generator, gain: float, lead: float, scale: float
) -> tuple[Effects, Effects]:
    """One seed's gain and lead, correlated over resamples."""
    found = rng.multivariate_normal([gain, lead], scale**2 * np.array([[1, 0.6], [0.6, 2]]), 500)
    return (
        Effects(np.array([gain]), found[None, :, 0]),
        Effects(np.array([lead]), found[None, :, 1]),
    )


def test_interval_is_fiellers() -> None:
    gain, lead = draws(np.random.default_rng(0), 1.0, 4.0, 0.7)
    covariance = np.cov(gain.drawn[0], lead.drawn[0]) * 300 / 299
    limit = scipy.stats.t.ppf(0.975, 299) ** 2
    roots = np.roots(
        [
            4.0**2 - limit * covariance[1, 1],
            -2 * (1.0 * 4.0 - limit * covariance[0, 1]),
            1.0**2 - limit * covariance[0, 0],
        ]
    )
    share = share_closed([gain], [lead], [300])
    assert share.closed == 0.25
    assert (share.low, share.high) == pytest.approx(sorted(roots), abs=1e-6)


def test_what_may_be_no_lead_has_no_bounds() -> None:
    rng = np.random.default_rng(0)
    gain, lead = draws(rng, 1.0, 1.0, 0.7)
    assert hierarchical([lead.observed], [lead.drawn], [300]).p > 0.05
    share = share_closed([gain], [lead], [300])
    assert share.closed == 1 and np.isnan([share.low, share.high]).all()
    assert np.isnan(share_closed(*([part] for part in draws(rng, 1.0, -1.0, 0.1)), [300])).all()


def test_one_sentence_has_no_bounds() -> None:
    # Of one sentence and seed, by the bootstrap every lead is certain.
    gain, lead = (Effects(np.array([value]), np.full((1, 50), value)) for value in (0.1, 0.3))
    found = share_closed([gain], [lead], [1])
    assert found.closed == pytest.approx(1 / 3)
    assert np.isnan([found.low, found.high]).all()


def test_seeds_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    gain, lead = draws(rng, 1.0, 4.0, 0.1)
    alone = share_closed([gain], [lead], [300])
    spread = np.array([0.4, 1.0, 1.6])
    gains = Effects(spread, np.concatenate([gain.drawn] * 3) + (spread - 1)[:, None])
    leads = Effects(np.full(3, 4.0), np.concatenate([lead.drawn] * 3))
    seeds = share_closed([gains], [leads], [300])
    assert seeds.closed == alone.closed
    # The t-interval over three seeds: 4.303 * 0.6 / sqrt(3) = 1.49, by a lead of 4.
    assert seeds.high - seeds.low == pytest.approx(2 * 1.49 / 4, rel=0.05)
    assert alone.high - alone.low < 0.15


@pytest.fixture
def runs(write_run: WriteRun, tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    for place, direction in enumerate(("en-de", "de-en")):
        wrong = {"finetune": 0.4, "word_kd": 0.3, "se_kd_blend": 0.2}
        for method, share in wrong.items():
            for seed in (1, 2):
                write_run(
                    *(root / direction, f"{method}.{seed}", method),
                    seed=seed,
                    direction=direction,
                    wrong=share,
                    corpus_seed=place,
                )
        write_run(
            *(root / direction, "teacher", "teacher"),
            direction=direction,
            wrong=0.05,
            corpus_seed=place,
        )
    return root


def test_table(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directions, _ = load(runs, Options(resamples=200))
    table = gap_table(directions).set_index(["direction", "method", "metric"])
    assert set(table.index.get_level_values("metric")) == {"BLEU", "chrF"}

    def bleu(direction: str, name: str) -> float:
        texts = read_texts(runs / direction / name, "test")
        assert texts is not None
        return float(BLEU().corpus_score(texts.hypotheses, [texts.references]).score)

    shares = []
    for direction in ("en-de", "de-en"):
        scores = {
            method: [bleu(direction, f"{method}.{seed}") for seed in (1, 2)]
            for method in ("finetune", "se_kd_blend")
        }
        row = table.loc[(direction, "se_kd_blend", "BLEU")]
        assert row["mean"] == pytest.approx(np.mean(scores["se_kd_blend"]))
        assert row["sd"] == pytest.approx(np.std(scores["se_kd_blend"], ddof=1))
        gain = np.mean(scores["se_kd_blend"]) - np.mean(scores["finetune"])
        lead = bleu(direction, "teacher") - np.mean(scores["finetune"])
        assert row["closed"] == pytest.approx(gain / lead)
        shares.append((gain, lead))
    pooled = table.loc[("all", "se_kd_blend", "BLEU")]
    assert pooled["closed"] == pytest.approx(np.sum(shares, axis=0)[0] / np.sum(shares, axis=0)[1])
    assert pooled["low"] < pooled["closed"] < pooled["high"]
    assert table.loc[(slice(None), ["teacher", "finetune"], slice(None)), "closed"].isna().all()
    assert 0.9 < pooled["length_ratio"] < 1.1

    gap.main([str(runs), "--resamples", "200", "--csv", str(tmp_path / "gap.csv")])
    text = capsys.readouterr().out
    assert "| all | SE-KD (blend) |" in text and "nan" not in text
    written = pd.read_csv(tmp_path / "gap.csv").set_index(["direction", "method", "metric"])
    assert written["mean"].to_numpy() == pytest.approx(table["mean"].to_numpy())


def test_no_teacher_no_share(write_run: WriteRun, tmp_path: Path) -> None:
    for method in ("finetune", "word_kd"):
        write_run(tmp_path / "runs", method, method)
    directions, _ = load(tmp_path / "runs", Options(resamples=100))
    assert gap_table(directions)["closed"].isna().all()


def test_a_baseline_that_no_run_has_is_named(runs: Path) -> None:
    message = r"--baseline: expected a method of the runs \(teacher, .*finetune.*found fine_tune$"
    with pytest.raises(SystemExit, match=message):
        gap.main([str(runs), "--baseline", "fine_tune"])
