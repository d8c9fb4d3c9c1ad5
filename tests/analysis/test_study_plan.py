"""Power: predicted against that of simulated studies, limits known by hand, the command."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import WriteRun

from analysis import gap, plan, sizes, transfer
from analysis.power import Spread, detectable, power, seeds_needed, smallest_detectable
from analysis.report import document
from analysis.runs.files import read_json, sealed_json
from analysis.stats import Floats, Resamples, hierarchical
from analysis.sums.direction import Options
from analysis.sums.loading import load


def study(
    rng: np.random.Generator,
    effect: float,
    seeds: int,
    sentences: int,
    deviations: tuple[float, float, float],
    directions: int = 1,
    resamples: Sequence[Resamples] = (),
) -> tuple[list[Floats], list[Floats], list[int]]:
    """Effects of a study as the report's tests take them; deviations over seeds, over sentences, and
    of a seed on a sentence. The resamples of the directions' sentences are drawn where none are given."""
    observed, drawn = [], []
    for resample in resamples or resamples_of(rng, sentences, directions):
        training = rng.normal(0, deviations[0], (seeds, 1))
        sentence = rng.normal(0, deviations[1], (1, sentences))
        values = effect + training + sentence + rng.normal(0, deviations[2], (seeds, sentences))
        observed.append(values.mean(axis=1))
        drawn.append(resample.sums(values.T).T / sentences)
    return observed, drawn, [sentences] * directions


def resamples_of(rng: np.random.Generator, sentences: int, directions: int) -> list[Resamples]:
    return [Resamples(sentences, 120, rng) for _ in range(directions)]


def true_spread(
    sentences: int, deviations: tuple[float, float, float], directions: int = 1
) -> Spread:
    seed, sentence, both = (value**2 for value in deviations)
    return Spread(
        np.full(directions, seed),
        np.full(directions, both / sentences),
        sentence / sentences / directions,
        sentences,
        1,
    )


@pytest.mark.parametrize(
    ("seeds", "deviations", "directions"),
    [
        (3, (0.3, 3.0, 2.0), 1),
        (3, (0.05, 4.0, 1.0), 1),
        (5, (0.4, 1.0, 4.0), 1),
        (2, (0.4, 2.0, 2.0), 2),
    ],
)
def test_power_is_that_of_simulated_studies(
    seeds: int, deviations: tuple[float, float, float], directions: int
) -> None:
    rng = np.random.default_rng(7)
    sentences, studies = 60, 300
    spread = true_spread(sentences, deviations, directions)
    effect = smallest_detectable(spread, seeds, sentences, power=0.8)
    # The studies' sentences differ; how often a resample draws each of them may be the same.
    resamples = resamples_of(rng, sentences, directions)
    for size in (effect, effect / 2):
        found = [
            hierarchical(*study(rng, size, seeds, sentences, deviations, directions, resamples)).p
            <= 0.05
            for _ in range(studies)
        ]
        predicted = power(size, spread, seeds, sentences)
        error = np.sqrt(predicted * (1 - predicted) / studies)
        assert np.mean(found) == pytest.approx(predicted, abs=3 * error)


def test_parts_are_found_again() -> None:
    rng = np.random.default_rng(3)
    deviations = (0.3, 3.0, 2.0)
    found = Spread.pooled(
        [Spread.of(*study(rng, 1.0, 4, 200, deviations, directions=2)) for _ in range(60)]
    )
    expected = true_spread(200, deviations, 2)
    assert found.seed == pytest.approx(expected.seed, rel=0.3)
    assert found.interaction == pytest.approx(expected.interaction, rel=0.1)
    assert found.sentence == pytest.approx(expected.sentence, rel=0.1)
    # Of one comparison: those of several methods share the baseline's runs.
    assert (found.sentences, found.freedom) == (200, 2 * 3)


def test_prediction_for_other_numbers() -> None:
    """Parts of 200 sentences and 3 seeds predict the power of 400 sentences and 6 seeds."""
    rng = np.random.default_rng(5)
    deviations = (0.2, 3.0, 2.0)
    pilot = Spread.pooled([Spread.of(*study(rng, 0.0, 3, 200, deviations)) for _ in range(40)])
    assert power(0.5, pilot, 6, 400) == pytest.approx(
        power(0.5, true_spread(400, deviations), 6, 400), abs=0.05
    )


def test_seeds_alone_are_the_t_test() -> None:
    """Without any variance over sentences the test is the t-test of the seeds."""
    spread = Spread(np.array([0.25]), np.zeros(1), 0.0, 1000, 2)
    for seeds in (3, 6):
        freedom, shift = seeds - 1, 0.8 / 0.5 * np.sqrt(seeds)
        limit = scipy.stats.t.ppf(0.975, freedom)
        exact = scipy.stats.nct.sf(limit, freedom, shift) + scipy.stats.nct.cdf(
            -limit, freedom, shift
        )
        assert power(0.8, spread, seeds, 1000) == pytest.approx(exact, abs=0.01)


def test_sentences_alone_are_the_z_test() -> None:
    """Without variance over seeds more of them do not help, more sentences do."""
    spread = Spread(np.zeros(1), np.zeros(1), 0.04, 1000, 2)
    for seeds in (2, 20):
        assert smallest_detectable(spread, seeds, 1000) == pytest.approx(0.2 * 2.8016, rel=0.005)
    assert smallest_detectable(spread, 2, 4000) == pytest.approx(0.1 * 2.8016, rel=0.005)


def test_limits() -> None:
    spread = Spread(np.array([0.25]), np.array([0.04]), 0.09, 1000, 2)
    assert power(0.0, spread, 3, 1000) <= 0.05
    assert power(100.0, spread, 3, 1000) == pytest.approx(1)
    assert power(0.7, spread, 4, 1000) == power(-0.7, spread, 4, 1000)
    detectable = [smallest_detectable(spread, seeds, 1000) for seeds in (2, 3, 5, 10, 50)]
    assert detectable == sorted(detectable, reverse=True)
    assert power(detectable[2], spread, 5, 1000) == pytest.approx(0.8)
    needed = seeds_needed(1.2, spread, 1000)
    assert needed is not None
    assert smallest_detectable(spread, needed, 1000) <= 1.2
    assert smallest_detectable(spread, needed - 1, 1000) > 1.2
    assert seeds_needed(0.5, spread, 1000) is None  # the sentences alone are too few
    assert smallest_detectable(Spread(np.zeros(1), np.zeros(1), 0.0, 9, 2), 3, 9) == 0
    with pytest.raises(ValueError, match="at least 2 seeds"):
        power(1.0, spread, 1, 1000)


@pytest.fixture
def runs(write_run: WriteRun, tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    for seed in (1, 2, 3):
        for method, noise, wrong in (
            ("finetune", 1.0, 0.3),
            ("word_kd", 0.8, 0.25),
            ("se_kd_blend", 0.5, 0.2),
        ):
            write_run(root, f"{method}.{seed}", method, seed=seed, noise=noise, wrong=wrong)
    return root


def test_command(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan.main([str(runs), "--resamples", "200", "--effect", "3"])
    text = capsys.readouterr().out
    assert "## BLEU" in text and "## KL on hard tokens" in text
    assert "3 seeds, 60 sentences, 1 direction)" in text
    assert "A gain of 3.00 needs" in text and "From the gains of SE-KD (blend): 2 degrees" in text
    assert "nan" not in text
    rows = [line for line in text.splitlines() if line.startswith("| 3 |")]
    assert len(rows) == 2
    directions, _ = load(runs, Options(resamples=200))
    found = plan.bleu_pilot(directions, "word_kd")
    assert found is not None and f"**{found.smallest_detectable():.2f}**" in text
    # The table's cell for the runs as they are is the figure in bold.
    assert f"**{rows[0].split(' | ')[1]}**" in text
    # The report corrects over the gains of fine-tuning and of the method, and over five claims.
    assert "with Holm's correction over 2 tests" in text
    assert "with Holm's correction over 5 tests" in text
    alone = smallest_detectable(found.spread, 3, 60)
    assert found.smallest_detectable() == smallest_detectable(found.spread, 3, 60, alpha=0.025)
    plan.main([str(runs), "--resamples", "200", "--hypotheses", "1"])
    text = capsys.readouterr().out
    assert (
        f"**{alone:.2f}** (power 80%, p at most 0.05, two-sided, one test, not corrected)" in text
    )


def test_commands_that_need_no_token_records_go_on_without_reference_runs(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in [*runs.glob("finetune*/tokens/test/*"), *runs.glob("se_kd_blend.3/hyps/*")]:
        path.unlink()
    plan.main([str(runs), "--resamples", "100"])
    told = capsys.readouterr()
    assert "## BLEU" in told.out and "## KL" not in told.out
    assert "warning: left out: en-de: en-de: expected a run of 'finetune' with token" in told.err
    gap.main([str(runs), "--resamples", "100"])
    told = capsys.readouterr()
    assert "| en-de | SE-KD (blend) |" in told.out
    (warned,) = [line for line in told.err.splitlines() if line.startswith("warning: left")]
    assert warned == "warning: left out: se_kd_blend.3: no translations of test"
    for path in runs.rglob("run.json"):
        record, _ = read_json(path)
        path.write_bytes(sealed_json(record | {"data": {"sentences": 2000}}))
    sizes.main([str(runs), "--output", str(tmp_path / "sizes")])
    assert warned in capsys.readouterr().err
    assert len(pd.read_csv(tmp_path / "sizes/sizes.csv")) == 8
    with pytest.raises(SystemExit, match="expected a direction whose token records can"):
        transfer.main([str(runs), "--resamples", "100"])


def test_a_report_and_a_plan_say_the_same(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "draw_all", lambda *_: [])
    transfer.main([str(runs), "--resamples", "200"])
    directions, _ = load(runs, Options(resamples=200))
    methods = pd.read_csv(runs / "report/tables/methods.csv").set_index(["method", "metric"])
    bleu = plan.bleu_pilot(directions, "word_kd")
    assert bleu is not None
    shown = methods.loc[("se_kd_blend", "BLEU"), "gain_over_word_kd_detectable"]
    assert shown == pytest.approx(bleu.smallest_detectable(), rel=1e-8)
    claims = pd.read_csv(runs / "report/tables/claims.csv")
    kl = plan.kl_pilot(directions, "word_kd")
    own = claims["measure"] == "KL on hard tokens (nats)"
    (shown,) = claims.loc[own & (claims["treatment"] == "se_kd_blend"), "detectable"]
    # The test counts the sentences that have a hard token, the plan all of them. So few sentences have no
    # verdict, and no correction.
    assert kl is not None and kl.hypotheses == 5
    alone = smallest_detectable(kl.spread, 3, kl.spread.sentences)
    assert shown == pytest.approx(alone, rel=0.01)


def test_detectable_with_other_numbers_of_seeds() -> None:
    rng = np.random.default_rng(3)
    own = [rng.normal(0, 1, seeds) for seeds in (3, 3)]
    drawn = [values[:, None] + rng.normal(0, 0.2, (3, 400)) for values in own]
    both = detectable(own, drawn, [500, 500])
    spread = Spread.of(own, drawn, [500, 500])
    assert both == smallest_detectable(spread, 3, 500) == smallest_detectable(spread, [3, 3], 500)
    assert smallest_detectable(spread, [3, 9], 500) < both
    assert np.isnan(detectable([own[0], own[1][:1]], [drawn[0], drawn[1][:1]], [500, 500]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--power", "1.2"], "--power: expected a number between 0 and 1, found 1.2"),
        (["--power", "0.04"], "expected more than --alpha"),
        (["--hypotheses", "0"], "--hypotheses: expected at least 1, found 0"),
        (["--kl-effect", "-1"], "--kl-effect: expected a number above 0, found -1.0"),
        (["--baseline", "jsd"], "expected a method with 2 seeds in every direction"),
    ],
)
def test_errors(runs: Path, options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        plan.main([str(runs), *options, "--resamples", "100"])
