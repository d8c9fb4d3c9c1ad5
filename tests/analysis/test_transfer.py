"""Buckets and scores: hand-computed values, partitions, and what an empty bucket says."""

from pathlib import Path

import numpy as np
import pytest
from conftest import WriteRun

from analysis.chapters import transfer
from analysis.runs import token_records
from analysis.runs.simulated import write_columns
from analysis.runs.token_records import read_columns, read_token_set
from analysis.sums import bucket_sums
from analysis.sums.bucket_sums import METRICS, make_partition, sum_records
from analysis.sums.buckets import (
    Threshold,
    by_edges,
    by_piece,
    by_quantile,
    by_threshold,
    difficulty_families,
    shared_families,
)
from analysis.sums.direction import Direction, Options
from analysis.sums.loading import load
from analysis.sums.selection import SAME_METHOD, SAME_SEED, bias


def small_records() -> dict[str, np.ndarray]:
    """Two sentences of two and three tokens; every number below can be checked by hand."""
    return {
        "sentence": np.array([0, 0, 1, 1, 1]),
        "position": np.array([0, 1, 0, 1, 2]),
        "token": np.array([1, 11, 1, 2, 11]),
        "frequency": np.array([0, 9, 10, 99, 100000]),
        "p_gold": np.array([0.9, 0.8, 0.5, 0.4, 1.0]),
        "q_gold": np.array([0.5, 0.8, 0.3, 0.1, 0.9]),
        "kl": np.array([0.5, 0.0, 0.25, 2.0, 0.125]),
        "kl_target": np.array([0.25, 0.0, 0.125, 1.5, 0.125]),
        "kl_nontarget": np.array([0.25, 0.0, 0.125, 0.5, 0.0]),
        "p_entropy": np.array([0.1, 0.2, 0.3, 0.4, 0.0]),
        "q_entropy": np.array([1.0, 0.2, 1.0, 2.0, 0.5]),
        "p_top1": np.array([1, 11, 1, 3, 11]),
        "q_top1": np.array([1, 11, 4, 3, 11]),
        "p_max": np.array([0.9, 0.8, 0.5, 0.5, 1.0]),
        "q_max": np.array([0.5, 0.8, 0.6, 0.4, 0.9]),
        "p_of_q_top1": np.array([0.9, 0.8, 0.25, 0.5, 1.0]),
        "overlap_top5": np.array([5, 5, 3, 2, 5]),
    }


def test_sums_by_bucket_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "tokens/test/1.parquet"
    write_columns(path, small_records())
    tokens = read_token_set(path)
    kl = read_columns(path, ["kl"])["kl"]
    families = [*difficulty_families(kl, 0.25), *shared_families(path, tokens)]
    partition = make_partition(families, tokens, 0.25, ("run",))
    (sums,) = sum_records(path, tokens, [partition]).by_partition
    easy, hard = sums.totals[partition.columns("difficulty")]
    assert partition.tokens[partition.columns("difficulty")].tolist() == [3, 2]  # 0.25 is easy
    expected = {
        "kl": (0.375, 2.5),
        "kl_target": (0.25, 1.75),
        "kl_nontarget": (0.125, 0.75),
        "agreement": (2, 2),
        "p_gold": (2.3, 1.3),
        "q_gold": (2.0, 0.6),
        "p_of_q_top1": (2.05, 1.4),
        "overlap_top5": (13, 7),
        "teacher_right": (3, 1),
        "student_right": (2, 1),
    }
    for name, values in expected.items():
        found = [row[METRICS.index(name)] for row in (easy, hard)]
        np.testing.assert_allclose(found, values, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(sums.difficulty.sum(axis=0), [easy, hard])
    by_sentence = sums.kl[:, partition.columns("difficulty")]
    np.testing.assert_allclose(by_sentence, [[0.0, 0.5], [0.375, 2.0]])


def test_every_family_is_a_partition(demo: Path) -> None:
    (direction,), _ = load(demo, Options(resamples=100))
    run = direction.scored[0]
    assert direction.tokens is not None
    partition, count = run.cut, len(direction.tokens.token)
    names = {family.name for family in partition.families}
    assert names == {
        "difficulty", "difficulty quantile", "all", "frequency", "teacher entropy", "position",
        "teacher", "piece",
    }  # fmt: skip
    for family in partition.families:
        assert partition.tokens[partition.columns(family.name)].sum() == count
        sums = run.under(partition)
        total = sums.totals[partition.columns("all")][0]
        np.testing.assert_allclose(sums.totals[partition.columns(family.name)].sum(axis=0), total)
        np.testing.assert_allclose(sums.kl[:, partition.columns(family.name)].sum(), total[0])


def test_blocks_of_rows_do_not_change_the_sums(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (direction,), _ = load(demo, Options(resamples=100))
    run = direction.scored[0]
    assert direction.tokens is not None and run.step is not None and run.kl is not None
    whole = run.under(run.cut)
    monkeypatch.setattr(
        bucket_sums,
        "iterate_columns",
        lambda path, names: token_records.iterate_columns(path, names, 37),
    )
    blocks = sum_records(run.run.records("test", run.step), direction.tokens, [run.cut] * 2)
    for sums in blocks.by_partition:
        np.testing.assert_allclose(sums.totals, whole.totals, rtol=1e-12)
        np.testing.assert_allclose(sums.difficulty, whole.difficulty, rtol=1e-12)
    np.testing.assert_array_equal(blocks.kl, run.kl)


def test_threshold_kinds_and_edges() -> None:
    difficulty = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    assert Threshold(1.5, "absolute").nats(difficulty) == 1.5
    assert Threshold(0.5, "quantile").nats(difficulty) == 2.0
    assert by_threshold(difficulty, 2.0).codes.tolist() == [0, 0, 0, 1, 1]
    family = by_edges("frequency", np.array([0, 1, 9, 10, 10000, 9999]), (1, 10, 100, 1000, 10000))
    assert family.buckets == ("0", "1-9", "10-99", "100-999", "1000-9999", "10000+")
    assert family.codes.tolist() == [0, 1, 1, 2, 5, 4]
    quantiles = by_quantile("x", np.arange(10.0), 5)
    assert quantiles.codes.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert quantiles.buckets[0] == "1 of 5 (0 to 1.8)"
    # Equal values stay together, even if that leaves buckets empty.
    assert set(by_quantile("x", np.zeros(7), 5).codes.tolist()) == {0}


@pytest.mark.parametrize(
    ("pieces", "codes"),
    [
        (["▁go", "ing", "</s>", "▁x", "</s>"], [0, 1, 2, 0, 2]),
        (["Ġgo", "ing", "</s>", "x", "</s>"], [0, 1, 2, 0, 2]),
        (["go@@", "ing", "</s>", "x", "</s>"], [0, 1, 2, 0, 2]),
        (["go", "in", "</s>", "x", "</s>"], [0, 0, 2, 0, 2]),
    ],
)
def test_word_starts_by_kind_of_vocabulary(
    tmp_path: Path, pieces: list[str], codes: list[int]
) -> None:
    written = small_records()
    written["sentence"] = np.array([0, 0, 0, 1, 1])
    written["position"] = np.array([0, 1, 2, 0, 1])
    path = tmp_path / "tokens/test/1.parquet"
    write_columns(path, written)
    assert by_piece(pieces, np.arange(5), read_token_set(path)).codes.tolist() == codes


def test_transfer_table_against_plain_means(demo: Path) -> None:
    options = Options(resamples=200)
    directions, _ = load(demo, options)
    levels, gains = transfer.transfer_tables(directions, options)
    table = levels.set_index(["run", "family", "bucket"])
    reference = read_columns(demo / "finetune/tokens/test/100.parquet", ["kl"])["kl"]
    gamma = np.quantile(reference.astype(float), 0.75)
    hard = reference > gamma
    own = read_columns(
        demo / "se_kd/tokens/test/100.parquet", ["kl", "p_top1", "q_top1", "p_gold", "q_gold"]
    )
    row = table.loc[("se_kd", "difficulty", "hard")]
    assert row["tokens"] == hard.sum()
    assert row["kl"] == pytest.approx(own["kl"][hard].mean(), rel=1e-6)
    assert row["kl_low"] < row["kl"] < row["kl_high"]
    agree = own["p_top1"][hard] == own["q_top1"][hard]
    assert row["agreeing_tokens"] == agree.sum()
    assert row["agreement"] == pytest.approx(agree.mean())

    gains = gains.set_index(["run", "baseline", "family", "bucket"])
    base = read_columns(demo / "word_kd/tokens/test/100.parquet", ["kl", "q_gold"])
    gain = gains.loc[("se_kd", "word_kd", "difficulty", "hard")]
    difference = base["kl"][hard].astype(float) - own["kl"][hard]
    assert gain["gain"] == pytest.approx(difference.mean(), rel=1e-5)
    assert gain["relative_gain"] == pytest.approx(
        1 - own["kl"][hard].sum() / base["kl"][hard].sum()
    )
    lead = (own["p_gold"] - base["q_gold"])[hard].sum()
    closed = (own["q_gold"] - base["q_gold"])[hard].sum()
    assert gain["lead_closed"] == pytest.approx(closed / lead, rel=1e-4)
    assert gain["gain_target"] + gain["gain_nontarget"] == pytest.approx(gain["gain"], abs=1e-5)
    assert gain["selected_by_pair"]  # the one reference run has the seed of both
    assert gains.loc[("se_kd", "finetune", "difficulty", "hard"), "selected_by_pair"]
    assert not gains.loc[("se_kd", "finetune", "piece", "word start"), "selected_by_pair"]


def test_empty_bucket_says_so(demo: Path) -> None:
    options = Options(threshold=Threshold(1e6, "absolute"), resamples=100)
    table, _ = transfer.transfer_tables(load(demo, options)[0], options)
    hard = table[(table["family"] == "difficulty") & (table["bucket"] == "hard")]
    assert (hard["tokens"] == 0).all() and (hard["sentences"] == 0).all()
    assert hard[["kl", "kl_low", "kl_high", "agreement"]].isna().all(axis=None)
    easy = table[(table["family"] == "difficulty") & (table["bucket"] == "easy")]
    assert easy["kl"].notna().all()


def test_reference_runs_are_of_other_seeds(tmp_path: Path, write_run: WriteRun) -> None:
    """A run shares errors with the others of its seed, and would look worse on what they find hard."""
    for seed in (1, 2, 3):
        write_run(tmp_path, f"finetune{seed}", "finetune", seed=seed, own=0.5)
        write_run(tmp_path, f"word_kd{seed}", "word_kd", seed=seed)

    def chosen(*references: str) -> Direction:
        (direction,), _ = load(tmp_path, Options(references=references, resamples=100))
        return direction

    direction = chosen("finetune")
    runs = {run.label: run for run in direction.scored}
    assert {label: run.cut.selector for label, run in runs.items()} == {
        "finetune1": ("finetune2", "finetune3"),
        "finetune2": ("finetune1", "finetune3"),
        "finetune3": ("finetune1", "finetune2"),
        "word_kd1": ("finetune2", "finetune3"),
        "word_kd2": ("finetune1", "finetune3"),
        "word_kd3": ("finetune1", "finetune2"),
    }
    paths = [tmp_path / f"finetune{seed}/tokens/test/100.parquet" for seed in (2, 3)]
    mean = np.mean([read_columns(path, ["kl"])["kl"] for path in paths], axis=0)
    assert runs["word_kd1"].cut.gamma == pytest.approx(np.quantile(mean, 0.75))
    # Two runs of different seeds: the third chooses.
    placebo = direction.cut(runs["word_kd2"], runs["word_kd1"])
    assert placebo.selector == ("finetune3",)
    assert bias(direction, runs["word_kd2"], runs["word_kd1"]) == ""
    assert bias(direction, runs["word_kd1"], runs["finetune1"]) == SAME_METHOD
    for references, label, selector, reason in (
        (("word_kd1",), "finetune2", ("word_kd1",), SAME_METHOD),
        (("finetune1",), "word_kd1", ("finetune1",), SAME_SEED),
        (("finetune1", "finetune2"), "word_kd1", ("finetune2",), ""),
    ):
        direction = chosen(*references)
        run = next(run for run in direction.scored if run.label == label)
        other = next(item for item in direction.scored if item.label == f"word_kd{run.seed}")
        assert run.cut.selector == selector
        assert bias(direction, run, other) == reason
