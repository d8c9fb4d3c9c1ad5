"""Statistics against SciPy, against simulation, and by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from analysis.power import detectable
from analysis.stats import Resamples, hierarchical, holm, interval, partial_spearman, ratio


def test_resamples_are_paired_and_have_the_right_size() -> None:
    resamples = Resamples(40, 300, np.random.default_rng(1))
    values = np.random.default_rng(2).normal(size=(40, 2))
    counts = np.concatenate(list(resamples.blocks()))
    assert (counts.sum(axis=1) == 40).all()
    np.testing.assert_allclose(resamples.sums(values), counts @ values)
    again = Resamples(40, 300, np.random.default_rng(1))
    np.testing.assert_array_equal(np.concatenate(list(again.blocks())), counts)


def test_a_resample_of_documents_has_all_sentences_of_a_document_equally_often() -> None:
    documents = np.array([0, 0, 1, 1, 1, 2])
    resamples = Resamples(6, 50, np.random.default_rng(1), documents)
    counts = np.concatenate(list(resamples.blocks()))
    drawn = counts[:, [0, 2, 5]]  # the first sentence of each document
    assert (drawn.sum(axis=1) == resamples.units).all() and (drawn != 1).any()
    np.testing.assert_array_equal(counts, drawn[:, documents])


def test_bootstrap_interval_agrees_with_scipy() -> None:
    values = np.random.default_rng(3).exponential(size=200)
    resamples = Resamples(200, 4000, np.random.default_rng(4))
    low, high = interval(resamples.sums(values[:, None]) / 200)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(5)
    ).confidence_interval
    assert low[0] == pytest.approx(expected.low, rel=0.02)
    assert high[0] == pytest.approx(expected.high, rel=0.02)


def test_empty_resamples_are_ignored_and_empty_buckets_have_no_interval() -> None:
    draws = ratio(
        np.array([[1.0, 0.0], [3.0, 0.0], [0.0, 0.0]]), np.array([[1.0, 0], [1, 0], [0, 0]])
    )
    low, high = interval(draws)
    assert 1.0 <= low[0] <= high[0] <= 3.0
    assert np.isnan([low[1], high[1]]).all()


def test_an_interval_needs_a_value_in_half_of_the_resamples() -> None:
    full, half = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, np.nan, np.nan, 3.0])
    low, high = interval(np.stack([full, half, np.where(half == 3, half, np.nan)], axis=1), 0.5)
    np.testing.assert_allclose([low, high], [[1.75, 1.5, np.nan], [3.25, 2.5, np.nan]])


def test_holm_by_hand_and_with_an_untested_claim() -> None:
    # Sorted 0.01, 0.02, 0.04 times 3, 2, 1, made monotone; the NaN is not counted.
    np.testing.assert_allclose(holm([0.04, np.nan, 0.01, 0.02]), [0.04, np.nan, 0.03, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_spearman_equals_scipy_with_ties() -> None:
    rng = np.random.default_rng(6)
    x = rng.integers(0, 10, 60).astype(float)
    y = x + rng.integers(0, 12, 60)
    expected = scipy.stats.spearmanr(x, y).statistic
    assert partial_spearman(x, y)[0] == pytest.approx(expected)
    counts = np.concatenate(list(Resamples(60, 20, np.random.default_rng(7)).blocks()))
    found = partial_spearman(x, y, counts=counts)
    for row, value in zip(counts.astype(int), found, strict=True):
        drawn = np.repeat(np.arange(60), row)
        assert value == pytest.approx(scipy.stats.spearmanr(x[drawn], y[drawn]).statistic)


def test_partial_spearman_equals_regression_on_ranks() -> None:
    rng = np.random.default_rng(8)
    z, w = rng.normal(size=(2, 80))
    x, y = z + rng.normal(size=80), z - w + rng.normal(size=80)
    ranks = [scipy.stats.rankdata(values) for values in (x, y, z, w)]
    design = np.stack([np.ones(80), ranks[2], ranks[3]], axis=1)
    left, right = (
        values - design @ np.linalg.lstsq(design, values, rcond=None)[0] for values in ranks[:2]
    )
    assert partial_spearman(x, y, [z, w])[0] == pytest.approx(np.corrcoef(left, right)[0, 1])
    assert partial_spearman(x, y, [z, np.ones(80)]) == pytest.approx(partial_spearman(x, y, [z]))


def test_undefined_correlations_are_nan() -> None:
    x = np.arange(10.0)
    assert np.isnan(partial_spearman(x, np.ones(10))[0])
    assert np.isnan(partial_spearman(x, -x, [x * 2])[0])


def test_one_seed_has_the_bootstrap_error_of_a_mean() -> None:
    values = np.random.default_rng(9).normal(0.2, 1, 300)
    draws = Resamples(300, 4000, np.random.default_rng(10)).sums(values[:, None])[:, 0] / 300
    found = hierarchical([np.array([values.mean()])], [draws[None]], [300])
    expected = scipy.stats.ttest_1samp(values, 0.0)
    assert found.freedom == pytest.approx(299)
    assert found.p == pytest.approx(expected.pvalue, rel=0.1)
    low, high = expected.confidence_interval()
    np.testing.assert_allclose([found.low, found.high], [low, high], atol=0.01)


def test_few_documents_have_the_standard_error_of_their_mean() -> None:
    # A plain bootstrap of four spreads 3/4 as far as their variance says.
    values = np.array([0.1, 0.5, 0.6, 1.2])
    draws = Resamples(4, 20000, np.random.default_rng(10)).sums(values[:, None])[:, 0] / 4
    found = hierarchical([np.array([values.mean()])], [draws[None]], [4])
    assert found.error == pytest.approx(scipy.stats.sem(values), rel=0.02)
    expected = scipy.stats.ttest_1samp(values, 0.0)
    assert (found.freedom, found.p) == (3, pytest.approx(expected.pvalue, rel=0.05))


def test_seeds_alone_give_the_t_test_over_seeds() -> None:
    # No spread between sentences: only the seeds' effects vary.
    effects = np.array([0.4, 0.6, 0.9])
    found = hierarchical([effects], [np.repeat(effects[:, None], 50, axis=1)], [200])
    expected = scipy.stats.ttest_1samp(effects, 0.0)
    assert found.freedom == pytest.approx(2)
    assert found.p == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval()
    np.testing.assert_allclose([found.low, found.high], [low, high])


def test_the_error_is_at_least_that_of_the_bootstrap() -> None:
    # Seeds that happen to agree, on sentences that spread for each seed in its own way: all of A is
    # interaction, and the spread of the seeds, which should show it, is 0.
    draws = np.random.default_rng(14).normal(1, 0.3, (3, 400))
    found = hierarchical([np.ones(3)], [draws], [200])
    expected = draws.mean(axis=0).var(ddof=1) * 200 / 199
    assert found.error**2 == pytest.approx(expected)
    assert found.freedom == pytest.approx(199)


def test_two_directions_by_hand() -> None:
    # Resamples of orthogonal parts, each of variance 16 / 15: one that a direction's seeds share, and one
    # of each seed alone.
    parts = scipy.linalg.hadamard(16)[1:9]
    effects = [np.array([0.2, 0.5, 0.8]), np.array([0.0, 0.3, 0.9])]
    shared, own = [0.10, 0.15], [0.06, 0.09]  # squares of their sizes
    draws = [
        effects[i][:, None] + np.sqrt(shared[i]) * rows[0] + np.sqrt(own[i]) * rows[1:]
        for i, rows in enumerate(np.split(parts, 2))
    ]
    found = hierarchical(effects, draws, [5, 200])

    # A direction counts half, in a variance a quarter; the mean of 3 seeds has a third of an own part.
    seeds = np.array([0.09, 0.21]) / 3 / 4
    a = 16 / 15 * 5 / 4 * (sum(shared) + sum(own) / 3) / 4  # units as of the smallest
    interaction = 16 / 15 * (5 / 4 * 0.06 + 200 / 199 * 0.09) / 3 / 4
    assert interaction < seeds.sum() < a
    variance = seeds.sum() + a - interaction
    freedom = variance**2 / ((seeds**2).sum() / 2 + (a - interaction) ** 2 / 4)
    assert found.effect == pytest.approx(0.45)
    assert found.error == pytest.approx(variance**0.5)
    assert found.freedom == pytest.approx(freedom)
    student = scipy.stats.t(freedom, 0.45, variance**0.5)
    np.testing.assert_allclose([found.low, found.high], student.interval(0.95))
    assert found.p == pytest.approx(2 * student.cdf(0))


def test_effect_without_any_spread() -> None:
    found = hierarchical([np.zeros(2)], [np.zeros((2, 10))], [200])
    assert (found.effect, found.p) == (0.0, 1.0)


@pytest.mark.parametrize("seeds", [1, 3])
def test_one_sentence_or_document_leaves_nothing_to_estimate_an_error_from(seeds: int) -> None:
    # Every resample of it is the same: by the bootstrap an error of 0, and certainty.
    effects = np.arange(1.0, seeds + 1)
    draws = Resamples(4, 50, np.random.default_rng(11), np.zeros(4, dtype=int))
    assert draws.units == 1
    drawn = np.repeat(effects[:, None], 50, axis=1)
    found = hierarchical([effects], [drawn], [draws.units])
    assert found.effect == effects.mean()
    assert np.isnan([found.error, found.freedom, found.low, found.high, found.p]).all()
    assert np.isnan(detectable([effects], [drawn], [draws.units]))
    # As well where only one of two directions is as small.
    assert np.isnan(hierarchical([effects, effects], [drawn, drawn], [300, 1]).p)


CASES = json.loads((Path(__file__).parent / "cases" / "statsmodels.json").read_text())


def test_statsmodels_cases() -> None:
    """Answers of statsmodels, kept by cases/make_statsmodels.py."""
    for case in CASES["holm"]:
        np.testing.assert_allclose(holm(case["p"]), case["corrected"])
    for case in CASES["partial_spearman"]:
        x, y, z, w = (np.array(case[name], dtype=float) for name in "xyzw")
        assert partial_spearman(x, y, [z, w])[0] == pytest.approx(case["correlation"])
    for case in CASES["crossed"]:
        effects = np.array(case["effects"])
        resamples = Resamples(effects.shape[1], 4000, np.random.default_rng(21))
        draws = resamples.sums(effects.T).T / effects.shape[1]
        found = hierarchical([effects.mean(axis=1)], [draws], [effects.shape[1]])
        assert found.effect == pytest.approx(case["mean"], abs=1e-6)
        # A mixed model fitted by REML; ours estimates the same variances by moments.
        assert found.error == pytest.approx(case["error"], rel=0.1)


def crossed_effects(
    rng: np.random.Generator, seeds: int, sentences: int, sd: tuple[float, float, float]
) -> np.ndarray:
    """Effects (seeds, sentences) without any true effect."""
    seed = rng.normal(0, sd[0], (seeds, 1)) if sd[0] else np.zeros((seeds, 1))
    return seed + rng.normal(0, sd[1], (1, sentences)) + rng.normal(0, sd[2], (seeds, sentences))


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("sd", [(0.0, 1.0, 1.0), (0.08, 1.0, 1.0), (0.3, 1.0, 1.0)])
def test_null_is_rejected_in_about_5_of_100(seeds: int, sd: tuple[float, float, float]) -> None:
    """Three seeds with much spread reject in 7 of 100, two seeds would in 11: hence MIN_SEEDS."""
    rng = np.random.default_rng([12, seeds])
    resamples = Resamples(150, 400, np.random.default_rng(13))
    rejected = 0
    trials = 1000
    for _ in range(trials):
        effects = crossed_effects(rng, seeds, 150, sd)
        draws = resamples.sums(effects.T).T / 150
        rejected += hierarchical([effects.mean(axis=1)], [draws], [150]).p <= 0.05
    assert 0.025 <= rejected / trials <= 0.08
