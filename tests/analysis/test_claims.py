"""Verdicts: what may be supported, what may not, and how p-values are corrected."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import WriteRun

from analysis.claims import _verdict, claims_table
from analysis.evolution import History, easy_times, training_table, transition_table, transitions
from analysis.flows import aligned
from analysis.judge import Judge, Options, load_judges, pairs
from analysis.measures import sentence_gains
from analysis.quality import load_quality, methods_table
from analysis.runs.simulated import write_study
from analysis.runs.token_records import read_columns
from analysis.stats import partial_spearman
from analysis.study import load_study
from analysis.tables import sentence_table


def judged(root: Path, options: Options) -> tuple[list[Judge], pd.DataFrame]:
    study = load_study(root, options.subset)
    judges = load_judges(study, options)
    loaded = [load_quality(direction, options.subset) for direction in study.directions]
    qualities = {item.direction.name: item for item in loaded if item}
    return judges, claims_table(judges, qualities, History(judges), options)


def verdicts(table: pd.DataFrame, scope: str = "all") -> dict[int, str]:
    chosen = table[(table["scope"] == scope) & table["decides"].astype(bool)]
    return dict(zip(chosen["claim"], chosen["verdict"], strict=True))


def test_planted_gain_is_found_and_counted(tmp_path: Path) -> None:
    judges, table = judged(write_study(tmp_path, better=0.5), Options(resamples=300))
    found = verdicts(table)
    assert {claim: found[claim] for claim in (1, 2, 3, 5)} == dict.fromkeys(
        (1, 2, 3, 5), "supported"
    )
    row = table[table["measure"] == "KL on hard tokens (nats)"].iloc[0]
    effects = []
    counts = []
    for seed in (1, 2, 3):
        paths = [
            tmp_path / f"en-de/{name}{seed}/tokens/test/100.parquet"
            for name in ("finetune", "word_kd", "treatment")
        ]
        reference, base, own = (read_columns(path, ["kl"])["kl"].astype(float) for path in paths)
        hard = reference > np.quantile(reference, 0.75)
        effects.append((base - own)[hard].mean())
        counts.append(hard.sum())
    assert row["effect"] == pytest.approx(np.mean(effects), rel=1e-5)
    assert (row["seeds"], row["tokens"]) == (3, min(counts))
    assert row["low"] < row["effect"] < row["high"]
    deciding = table[table["decides"].astype(bool)]
    claim_p = deciding.groupby("claim")["p"].max()
    corrected = deciding.groupby("claim")["p_holm"].first()
    assert (corrected >= claim_p).all()
    assert corrected.max() == pytest.approx(max(claim_p.max(), 0), rel=1e-9)
    assert judges[0].direction.name == "en-de"


def test_worse_transfer_is_not_supported(tmp_path: Path) -> None:
    _, table = judged(write_study(tmp_path, better=1.1), Options(resamples=300))
    found = verdicts(table)
    assert {claim: found[claim] for claim in (1, 2, 3, 5)} == dict.fromkeys(
        (1, 2, 3, 5), "not supported"
    )


def test_equal_students_support_nothing_but_that_easy_tokens_lose_nothing(tmp_path: Path) -> None:
    _, table = judged(write_study(tmp_path, better=0.8), Options(resamples=300, margin=0.1))
    found = verdicts(table)
    assert "supported" not in {found[1], found[3], found[4], found[5]}
    assert found[2] == "supported"  # equal within the margin


@pytest.mark.parametrize(("seeds", "sentences"), [(1, 150), (2, 150), (3, 40)])
def test_too_little_data_is_inconclusive(tmp_path: Path, seeds: int, sentences: int) -> None:
    root = write_study(tmp_path, seeds=seeds, sentences=sentences, better=0.3)
    _, table = judged(root, Options(resamples=200))
    assert set(table["verdict"]) == {"inconclusive"}
    needed = "3 needed" if seeds < 3 else "100 needed"
    assert table.loc[table["decides"].astype(bool), "reason"].str.contains(needed).all()


def test_directions_are_pooled_and_tested_alone(tmp_path: Path) -> None:
    root = write_study(tmp_path, better=0.6, directions=("cs-en", "en-cs"))
    _, table = judged(root, Options(resamples=200))
    assert set(table["scope"]) == {"all", "cs-en", "en-cs"}
    kl = table[table["measure"] == "KL on hard tokens (nats)"].set_index("scope")["effect"]
    assert kl["all"] == pytest.approx((kl["cs-en"] + kl["en-cs"]) / 2)
    assert verdicts(table, "cs-en")[1] == "supported"


def test_nothing_is_claimed_from_the_training_set(tmp_path: Path, write_run: WriteRun) -> None:
    for name in ("finetune", "word_kd", "se_kd_student"):
        write_run(tmp_path, name, name, subset="train")
    _, table = judged(tmp_path, Options(subset="train"))
    assert table.empty


def test_missing_baseline_or_texts_or_steps_is_said(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path, "finetune", "finetune", wrong=None)
    write_run(tmp_path, "se", "se_kd_target", wrong=None)
    _, table = judged(tmp_path, Options())
    assert set(table["reason"]) == {"no run of word_kd to compare with"}
    write_run(tmp_path, "word_kd", "word_kd", wrong=None)
    _, table = judged(tmp_path, Options(resamples=100))
    reasons = table.groupby("claim")["reason"].first()
    assert "no translations" in reasons[4]
    assert "two common steps" in reasons[5]


def test_one_baseline_run_is_one_seed(tmp_path: Path) -> None:
    """Its error from training is in every difference to it, so three of them are not three seeds."""
    write_study(tmp_path, better=0.5)
    for seed in (2, 3):
        shutil.rmtree(tmp_path / "en-de" / f"word_kd{seed}")
    judges, table = judged(tmp_path, Options(resamples=100))
    assert set(verdicts(table).values()) == {"inconclusive"}
    assert set(table["seeds"]) == {1}
    (couple,) = pairs(judges[0], "se_kd_student", "word_kd")
    assert couple[0].seed == couple[1].seed == 1
    quality = load_quality(judges[0].direction, "test")
    assert quality is not None
    methods = methods_table([quality], Options(resamples=100)).set_index(["method", "metric"])
    row = methods.loc["se_kd_student", "BLEU"]
    assert row["seeds"] == 3 and row["gain_over_word_kd_seeds"] == 1
    assert methods.loc["word_kd", "BLEU"]["gain_over_word_kd_seeds"] == 0


def test_a_compared_run_does_not_choose_the_tokens(tmp_path: Path) -> None:
    """What the baseline finds hard is hard in part by chance: others look better there for nothing."""
    write_study(tmp_path, better=0.0, sentences=300)
    for reference in ("word_kd", "self"):
        _, table = judged(tmp_path, Options(resamples=100, reference=reference))
        found = verdicts(table)
        assert {found[claim] for claim in (1, 2, 3)} == {"inconclusive"}
        reasons = set(table[table["claim"] <= 3]["reason"])
        assert reasons == {"one of the compared runs decides itself which tokens are hard"}


def test_what_does_not_matter_is_not_supported_however_certain() -> None:
    row = {"reason": "", "in_favour": True, "against": True}
    assert _verdict([row], 0.001) == "not supported"
    assert _verdict([row | {"against": False}], 0.001) == "supported"
    assert _verdict([row | {"against": False}], 0.2) == "inconclusive"


def test_checkpoints_of_several_runs_are_drawn_together() -> None:
    """The best checkpoint of each run lies elsewhere; no point is a mean over other runs than the next."""
    found = aligned({"a": {400, 800, 1144}, "b": {800, 400, 1200}})
    assert found == [{"a": 400, "b": 400}, {"a": 800, "b": 800}, {"a": 1144, "b": 1200}]
    assert aligned({"a": {400, 800}, "b": {400, 800, 1200}}) == [
        {"a": 400, "b": 400}, {"a": 800, "b": 800},
    ]  # fmt: skip


def test_sentence_gains_by_hand(demo: Path) -> None:
    study = load_study(demo, "test")
    judge = load_judges(study, Options())[0]
    quality = load_quality(study.directions[0], "test")
    assert quality is not None
    run, other = pairs(judge, "se_kd_student", "word_kd")[0]
    gain, better, length, score = sentence_gains(judge, quality, run, other)
    own, base = (
        read_columns(demo / name / "tokens/test/100.parquet", ["kl"])["kl"].astype(float)
        for name in ("se_kd", "word_kd")
    )
    third = judge.tokens.sentence == 3
    assert gain[3] == pytest.approx((base - own)[third].mean(), rel=1e-5)
    assert length[3] == third.sum()
    texts = study.directions[0].texts
    chrf = quality.metrics["chrF"]
    references = [[texts["word_kd"].references[3]]]
    scores = [
        chrf.corpus_score([texts[name].hypotheses[3]], references).score
        for name in ("se_kd", "word_kd")
    ]
    assert better[3] == pytest.approx(scores[0] - scores[1])
    assert score[3] == pytest.approx(scores[1])
    expected = scipy.stats.spearmanr(gain, better).statistic
    assert partial_spearman(gain, better)[0] == pytest.approx(expected)
    # The figure shows tenths of the sentences, those that gained the least transfer first.
    table = sentence_table([judge], {quality.direction.name: quality}, "word_kd")
    sizes = [len(part) for part in np.array_split(gain, 10)]
    assert table["method"].tolist() == ["se_kd_student"] * 10
    assert table["sentences"].tolist() == sizes
    lowest = np.argsort(gain)[: sizes[0]]
    assert table["kl_gain"][0] == pytest.approx(gain[lowest].mean())
    assert table["chrf_gain"][0] == pytest.approx(better[lowest].mean())
    expected = better[lowest].std(ddof=1) / np.sqrt(sizes[0])
    assert table["chrf_gain_error"][0] == pytest.approx(expected)


def test_transitions_and_times_by_hand(demo: Path) -> None:
    before, after = np.array([0.1, 2.0, 3.0, 0.2]), np.array([0.1, 0.5, 4.0, 1.5])
    assert transitions(before, after, 1.0).tolist() == [[1, 1], [1, 1]]
    judges = load_judges(load_study(demo, "test"), Options())
    history = History(judges)
    judge = judges[0]
    run, other = pairs(judge, "se_kd_student", "word_kd")[0]
    partition = judge.partition(run)
    times = easy_times(judge, history, run, other, partition)
    assert times is not None
    first = [history.difficulty(item, 50) > partition.gamma for item in (run, other)]
    hard = first[0] & first[1]
    assert times.tokens.sum() == hard.sum()
    # Two steps: every token counts with the whole span, whether it turned easy at the last or never.
    assert times.own.sum() == hard.sum()
    table = transition_table(judges, history)
    matrix = table[(table["run"] == "se_kd") & (table["from"] == "hard")]
    assert matrix["tokens"].sum() == first[0].sum()
    assert matrix["share"].sum() == pytest.approx(1)
    training = training_table(judges, history)
    assert set(training["source"]) == {"records"}
    assert sorted(set(training["step"])) == [50, 100]


def test_log_is_read_with_its_quirks(demo: Path) -> None:
    lines = [
        "2026-01-01 | INFO | not json",
        '{"epoch": 1, "update": 0.5, "kl_hard": "3.0", "num_updates": "10"}',
        '{"valid_num_updates": "20", "valid_kl_easy": "0.5", "valid_kl_hard": "2.5", "valid_hard_share": "0.4"}',
        '{"valid_num_updates": "20", "valid_kl_easy": "0.4", "valid_kl_hard": "2.0", "valid_hard_share": "0.3"}',
        '{"valid_num_updates": "30", "valid_kl_ea',
    ]
    (demo / "se_kd/train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    judges = load_judges(load_study(demo, "test"), Options())
    table = training_table(judges, History(judges))
    log = table[table["source"] == "log"].set_index("bucket")
    assert log["kl"].to_dict() == {"easy": 0.4, "hard": 2.0}
    assert log["step"].to_dict() == {"easy": 20, "hard": 20}
    assert log["hard_share"].to_dict() == {"easy": 0.3, "hard": 0.3}
