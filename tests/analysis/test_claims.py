"""Verdicts: what may be supported, what may not, and how p-values are corrected."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import WriteRun

from analysis.chapters.methods import methods_table
from analysis.chapters.quality import results_table
from analysis.chapters.sentences import sentence_table
from analysis.chapters.training import training_table
from analysis.chapters.transitions import aligned, transition_table, transitions
from analysis.claims.evidence import Evidence, easy_times, sentence_gains
from analysis.claims.verdicts import PLACEBO, UNEQUAL, _correct, _verdict, claims_table
from analysis.power import Spread, smallest_detectable
from analysis.report.blocks import Table
from analysis.report.content import claims_blocks, quality_blocks, scope_blocks
from analysis.runs.files import read_json, sealed_json
from analysis.runs.simulated import write_study
from analysis.runs.token_records import read_columns
from analysis.stats import partial_spearman
from analysis.sums.direction import Direction, Options
from analysis.sums.loading import load
from analysis.sums.selection import SAME_METHOD


def judged(root: Path, options: Options) -> tuple[list[Direction], pd.DataFrame]:
    """The directions and the claims about SE-KD methods; those of the placebo are left out."""
    directions, _ = load(root, options)
    table, _ = claims_table(directions, options)
    return directions, table[table["treatment"] != PLACEBO]


def verdicts(table: pd.DataFrame, scope: str = "all") -> dict[int, str]:
    chosen = table[(table["scope"] == scope) & table["decides"].astype(bool)]
    return dict(zip(chosen["claim"], chosen["verdict"], strict=True))


def test_planted_gain_is_found_and_counted(tmp_path: Path) -> None:
    directions, _ = load(write_study(tmp_path, better=0.5), Options(resamples=300))
    full, _ = claims_table(directions, Options(resamples=300))
    table = full[full["treatment"] != PLACEBO]
    found = verdicts(table)
    assert {claim: found[claim] for claim in (1, 2, 3, 5)} == dict.fromkeys(
        (1, 2, 3, 5), "supported"
    )
    row = table[table["measure"] == "KL on hard tokens (nats)"].iloc[0]
    effects = []
    counts = []
    for seed in (1, 2, 3):
        base, own, *others = (
            read_columns(tmp_path / f"en-de/{name}/tokens/test/100.parquet", ["kl"])["kl"]
            for name in (
                f"word_kd{seed}",
                f"treatment{seed}",
                *(f"finetune{other}" for other in (1, 2, 3) if other != seed),
            )
        )
        base, own = base.astype(float), own.astype(float)
        reference = np.mean(others, axis=0)  # the fine-tuned runs of the other seeds
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
    # The placebo's couples cancel: it is shown, and not tested.
    placebo = full[full["treatment"] == PLACEBO]
    assert placebo["p"].isna().all() and placebo["p_holm"].isna().all()
    assert set(placebo["verdict"]) == {""}
    placebo = placebo[placebo["decides"].astype(bool)]
    assert placebo["claim"].tolist() == [1, 2, 3, 5]
    assert ((placebo["low"] < 0) & (placebo["high"] > 0)).all()
    # The same runs, of a method that was given more data than the baseline.
    for run in (tmp_path / "en-de").iterdir():
        record, _ = read_json(run / "run.json")
        record["data"]["sentences"] = 29_000 if run.name.startswith("treatment") else 3_000
        (run / "run.json").write_bytes(sealed_json(record))
    directions, table = judged(tmp_path, Options(resamples=100))
    deciding = table[table["decides"].astype(bool)].set_index("claim")
    told = (
        "trained on 29,000 sentences, the baseline on 3,000: data and loss are not told apart; choose a "
        "baseline of the same data with --baseline NAME"
    )
    assert deciding["reason"].to_dict() == {1: told, 2: told, 3: told, 4: "", 5: told}
    assert set(deciding["verdict"][[1, 2, 3, 5]]) == {"inconclusive"}
    assert deciding["p_holm"].notna().to_dict() == {1: False, 2: False, 3: False, 4: True, 5: False}
    (scope,) = scope_blocks(directions, [], Options())
    assert isinstance(scope, str) and scope.splitlines()[1:] == [
        "- trained on 29,000 sentences, and word-level KD on 3,000: SE-KD (student). What sets them apart "
        "from it may be the data and not the loss."
    ]


def test_runs_are_compared_with_those_of_their_own_model(tmp_path: Path) -> None:
    """Two models below one folder, which nothing else in the records tells apart."""
    sizes = {"small": 1_000, "large": 3_000}
    for name, parameters in sizes.items():
        write_study(tmp_path / name, better=0.5)
        for path in (tmp_path / name).rglob("run.json"):
            record, _ = read_json(path)
            path.write_bytes(sealed_json(record | {"parameters": parameters}))
    # Most runs are of the small model, whose methods so keep their names.
    shutil.rmtree(tmp_path / "large/en-de/finetune3")
    directions, table = judged(tmp_path, Options(resamples=100))
    large = "se_kd_student (parameters=3000)"
    assert set(table["treatment"]) == {"se_kd_student", large}
    for name, treatment in (("small", "se_kd_student"), ("large", large)):
        couples = Evidence.of(directions[0], treatment, "word_kd").couples
        assert [(run.label, other.label) for run, other in couples] == [
            (f"{name}/en-de/treatment{seed}", f"{name}/en-de/word_kd{seed}") for seed in (1, 2, 3)
        ]
        own = table[table["treatment"] == treatment]
        assert set(own["seeds"]) == {3} and set(own["reason"]) == {""}
        assert verdicts(own)[1] == "supported"
    # Without word-level KD of its model there is another model's, and no verdict.
    for path in (tmp_path / "large/en-de").glob("word_kd*"):
        shutil.rmtree(path)
    directions, table = judged(tmp_path, Options(resamples=100))
    deciding = table[table["decides"].astype(bool)].set_index(["treatment", "claim"])
    told = (
        "a model of 3,000 parameters, the baseline one of 1,000: model and loss are not told apart; train "
        "the baseline with the same model"
    )
    assert deciding.loc[large, "reason"].to_dict() == {1: told, 2: told, 3: told, 4: "", 5: told}
    assert deciding.loc["se_kd_student", "verdict"][1] == "supported"
    (scope,) = scope_blocks(directions, [], Options())
    assert isinstance(scope, str) and scope.splitlines()[1:] == [
        "- models of 3,000 parameters, and word-level KD of 1,000: fine-tuning (parameters=3000), SE-KD "
        "(student) (parameters=3000). What sets them apart from it may be the model and not the loss."
    ]


def test_worse_transfer_is_not_supported(tmp_path: Path) -> None:
    _, table = judged(write_study(tmp_path, better=1.1), Options(resamples=300))
    found = verdicts(table)
    assert {claim: found[claim] for claim in (1, 2, 3, 5)} == dict.fromkeys(
        (1, 2, 3, 5), "not supported"
    )


def test_equal_students_support_nothing(tmp_path: Path) -> None:
    """Not even that easy tokens lose nothing, true as it is: nothing was gained that they could pay for."""
    _, table = judged(write_study(tmp_path, better=0.8), Options(resamples=300, margin=0.1))
    assert "supported" not in verdicts(table).values()
    reason = table.loc[table["claim"] == 2, "reason"].iloc[0]
    assert reason == "nothing certain is gained on hard tokens that easy ones could pay for"


def renumbered(root: Path, target: Path, shift: int) -> Path:
    """Word-level KD's runs again as those of a method, under other seeds."""
    shutil.copytree(root, target)
    seeds = [1, 2, 3]
    for direction in target.iterdir():
        for seed in seeds:
            run = direction / f"treatment{seed}"
            shutil.rmtree(run)
            shutil.copytree(direction / f"word_kd{seeds[(seed - 1 + shift) % 3]}", run)
            record, _ = read_json(run / "run.json")
            record |= {"method": "se_kd_student", "seed": seed}
            (run / "run.json").write_bytes(sealed_json(record))
    return target


@pytest.mark.parametrize("shift", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_identical_models_do_not_win(tmp_path: Path, shift: int) -> None:
    """Seeds share errors: with the reference run of the same seed the renamed baseline wins claim 1, for
    the run that it is compared with looks worse than it is on tokens that share its errors."""
    root = write_study(
        tmp_path / "runs", better=0.8, directions=("cs-en", "en-cs"), same_seed=0.8, texts=False
    )
    target = renumbered(root, tmp_path / "renamed", shift)
    options = Options(resamples=200)
    directions, _ = load(target, options)
    table, relation = claims_table(directions, options)
    assert "supported" not in set(table["verdict"])
    row = relation.set_index("method").loc["se_kd_student"]
    assert row["unequal"] and row["effect"] < -0.02
    reasons = table[(table["treatment"] == "se_kd_student") & (table["claim"] == 1)]["reason"]
    assert set(reasons) == {UNEQUAL}
    # The runs under their own seeds share errors with the reference runs of these.
    directions, _ = load(root, options)
    _, relation = claims_table(directions, options)
    assert set(relation["method"]) == {"se_kd_student", "word_kd"}
    assert not relation["unequal"].any() and (relation["effect"] > 0.02).all()


@pytest.mark.parametrize(("seeds", "sentences"), [(1, 150), (2, 150), (3, 40)])
def test_too_little_data_is_inconclusive(tmp_path: Path, seeds: int, sentences: int) -> None:
    root = write_study(tmp_path, seeds=seeds, sentences=sentences, better=0.3)
    _, table = judged(root, Options(resamples=200))
    assert set(table["verdict"]) == {"inconclusive"}
    needed = "3 needed" if seeds < 3 else "100 needed"
    deciding = table[table["decides"].astype(bool) & table["effect"].notna()]
    assert deciding["reason"].str.contains(needed).all()


def test_directions_are_pooled_and_tested_alone(tmp_path: Path) -> None:
    root = write_study(tmp_path, better=0.6, directions=("cs-en", "en-cs"))
    _, table = judged(root, Options(resamples=200))
    assert set(table["scope"]) == {"all", "cs-en", "en-cs"}
    kl = table[table["measure"] == "KL on hard tokens (nats)"].set_index("scope")["effect"]
    assert kl["all"] == pytest.approx((kl["cs-en"] + kl["en-cs"]) / 2)
    assert verdicts(table, "cs-en")[1] == "supported"
    assert set(table[table["scope"] == "all"]["directions"]) == {"cs-en en-cs"}


def test_a_claim_that_is_not_of_all_directions_says_so(tmp_path: Path) -> None:
    root = write_study(tmp_path, better=0.6, directions=("cs-en", "en-cs"))
    for path in root.glob("en-cs/*/tokens/test/*.parquet"):
        if path.stem != "100":  # the last step; nothing is known of earlier ones
            path.unlink()
    _, table = judged(root, Options(resamples=200))
    pooled = table[(table["scope"] == "all") & table["decides"].astype(bool)].set_index("claim")
    both = "cs-en en-cs"
    assert pooled["directions"].to_dict() == {1: both, 2: both, 3: both, 4: both, 5: "cs-en"}
    blocks = claims_blocks({"claims": table, "relation": pd.DataFrame()}, Options())
    texts = [block for block in blocks if isinstance(block, str) and not block.startswith("**")]
    said, rule = texts
    assert said.startswith(
        "Not of all directions, for want of data in the others: claim 5, time until"
    )
    assert said.endswith(": cs-en.") and rule.startswith("Effects above 0")


def test_a_method_that_was_not_run_in_all_directions_says_so(tmp_path: Path) -> None:
    root = write_study(tmp_path / "both", better=0.6, directions=("cs-en", "en-cs"))
    one = write_study(tmp_path / "one", better=0.7, directions=("cs-en",), method="se_kd_target")
    for path in one.glob("cs-en/treatment*"):
        path.rename(root / "cs-en" / path.name.replace("treatment", "another"))
    directions, table = judged(root, Options(resamples=200))
    blocks = claims_blocks({"claims": table, "relation": pd.DataFrame()}, Options())
    (said,) = [block for block in blocks if isinstance(block, str) and block.startswith("Not of")]
    assert said == ("Not of all directions, for want of data in the others: SE-KD (target): cs-en.")
    # Its quality stands beside that of the others, which is of both.
    options = Options(resamples=200)
    tables = {
        "results": results_table(directions, options),
        "methods": methods_table(directions, options),
    }
    first = next(block for block in quality_blocks(tables, []) if isinstance(block, Table))
    bleu = first.shown[first.shown["metric"] == "BLEU"]
    shown = dict(zip(bleu["method"], bleu["direction"], strict=True))
    assert shown["SE-KD (target)"] == "cs-en"
    assert shown["SE-KD (student)"] == shown["word-level KD"] == "all"


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
    options = Options(resamples=100)
    directions, table = judged(tmp_path, options)
    assert set(verdicts(table).values()) == {"inconclusive"}
    assert set(table.loc[table["effect"].notna() & table["decides"].astype(bool), "seeds"]) == {1}
    (couple,) = Evidence.of(directions[0], "se_kd_student", "word_kd").couples
    assert couple[0].seed == couple[1].seed == 1
    methods = methods_table(directions, options).set_index(["method", "metric"])
    row = methods.loc["se_kd_student", "BLEU"]
    assert row["seeds"] == 3 and row["gain_over_word_kd_seeds"] == 1
    assert methods.loc["word_kd", "BLEU"]["gain_over_word_kd_seeds"] == 0
    # The p-value of its sentences alone is not corrected, and not counted beside those of others.
    assert np.isfinite(row["gain_over_word_kd_p"]) and np.isnan(row["gain_over_word_kd_p_holm"])
    own = methods.loc["se_kd_student", "BLEU"]
    assert own["gain_over_finetune_p_holm"] == own["gain_over_finetune_p"]


def test_a_compared_method_does_not_choose_the_tokens(tmp_path: Path) -> None:
    """What the baseline finds hard is hard in part by chance: others look better there for nothing."""
    write_study(tmp_path, better=0.0, sentences=300)
    _, table = judged(tmp_path, Options(resamples=100, references=("word_kd",)))
    found = verdicts(table)
    assert {found[claim] for claim in (1, 2, 3)} == {"inconclusive"}
    assert set(table[table["claim"] <= 3]["reason"]) == {SAME_METHOD}


def test_what_does_not_matter_is_not_supported_however_certain() -> None:
    row = {"reason": "", "in_favour": True, "against": True}
    assert _verdict([row], 0.001) == "not supported"
    assert _verdict([row | {"against": False}], 0.001) == "supported"
    assert _verdict([row | {"against": False}], 0.2) == "inconclusive"


def test_claims_without_a_verdict_do_not_cost_the_others_theirs() -> None:
    """Thirty variants of one seed, as a sweep has them, beside a method of three."""

    def claim(treatment: str, number: int, p: float, reason: str = "") -> dict[str, Any]:
        row = {"treatment": treatment, "scope": "all", "family": "all", "decides": True}
        return row | {"claim": number, "p": p, "reason": reason}

    main = [claim("main", number + 1, p) for number, p in enumerate((0.002, 0.03, 0.004, 0.01))]
    sweep = [claim(f"v{i}", n, 0.001, "1 seed, 3 needed") for i in range(30) for n in range(1, 5)]
    _correct([*sweep, *main])
    assert [row["p_holm"] for row in main] == pytest.approx([0.008, 0.03, 0.012, 0.02])
    assert np.isnan([row["p_holm"] for row in sweep]).all()


def test_what_is_detectable_is_so_by_the_test_of_the_verdict() -> None:
    """Corrected over the claims that can get a verdict; claim 2 from a loss of the margin."""
    drawn = np.random.default_rng(1).normal(1.0, 0.2, (3, 500))
    study = [np.array([0.9, 1.0, 1.2])], [drawn], [400]
    row = {"treatment": "main", "scope": "all", "family": "all", "decides": True, "reason": ""}
    row |= {"p": 0.01, "study": study, "shift": 0.0}
    rows = [row | {"claim": 1}, row | {"claim": 2, "shift": 0.3}, row | {"claim": 3}]
    open_one = row | {"claim": 4, "reason": "150 sentences", "p": 0.0}
    beside = row | {"claim": 1, "decides": False}
    _correct([*rows, open_one, beside])
    spread = Spread.of(*study)
    third, alone = (smallest_detectable(spread, 3, 400, alpha=0.05 / tests) for tests in (3, 1))
    assert alone < third
    found = [item["detectable"] for item in (*rows, open_one, beside)]
    assert found == pytest.approx([third, third - 0.3, third, third, alone])


def test_checkpoints_of_several_runs_are_drawn_together() -> None:
    """The best checkpoint of each run lies elsewhere; no point is a mean over other runs than the next."""
    found = aligned({"a": {400, 800, 1144}, "b": {800, 400, 1200}})
    assert found == [{"a": 400, "b": 400}, {"a": 800, "b": 800}, {"a": 1144, "b": 1200}]
    assert aligned({"a": {400, 800}, "b": {400, 800, 1200}}) == [
        {"a": 400, "b": 400}, {"a": 800, "b": 800},
    ]  # fmt: skip


def test_sentence_gains_by_hand(demo: Path) -> None:
    options = Options(resamples=100)
    (direction,), _ = load(demo, options)
    ((run, other),) = Evidence.of(direction, "se_kd_student", "word_kd").couples
    gain, better, length, score = sentence_gains(direction, run, other)
    assert direction.tokens is not None and direction.corpus is not None
    assert direction.resamples is not None
    own, base = (
        read_columns(demo / name / "tokens/test/100.parquet", ["kl"])["kl"].astype(float)
        for name in ("se_kd", "word_kd")
    )
    third = direction.tokens.sentence == 3
    assert gain[3] == pytest.approx((base - own)[third].mean(), rel=1e-5)
    assert length[3] == third.sum()
    chrf = direction.corpus.metrics["chrF"]
    scores = []
    for item in (run, other):
        assert item.translations is not None
        texts = item.translations.texts
        scores.append(chrf.corpus_score([texts.hypotheses[3]], [[texts.references[3]]]).score)
    assert better[3] == pytest.approx(scores[0] - scores[1])
    assert score[3] == pytest.approx(scores[1])
    expected = scipy.stats.spearmanr(gain, better).statistic
    assert partial_spearman(gain, better)[0] == pytest.approx(expected)
    # The figure shows tenths of the sentences, those that gained the least transfer first.
    table = sentence_table([direction], options)
    sizes = [len(part) for part in np.array_split(gain, 10)]
    assert table["method"].tolist() == ["se_kd_student"] * 10
    assert table["sentences"].tolist() == sizes
    lowest = np.argsort(gain)[: sizes[0]]
    assert table["kl_gain"][0] == pytest.approx(gain[lowest].mean())
    assert table["chrf_gain"][0] == pytest.approx(better[lowest].mean())
    weights = np.concatenate(list(direction.resamples.blocks()))[:, lowest]
    drawn = weights @ better[lowest] / weights.sum(axis=1)
    expected = drawn.std(ddof=1) * np.sqrt(len(gain) / (len(gain) - 1))
    assert table["chrf_gain_error"][0] == pytest.approx(expected)
    assert expected == pytest.approx(better[lowest].std() / np.sqrt(sizes[0]), rel=0.3)


def test_the_same_sentences_of_another_seed_make_no_error_smaller(demo: Path) -> None:
    options = Options(resamples=100)
    one = sentence_table(load(demo, options)[0], options)
    for name in ("finetune", "word_kd", "se_kd"):
        shutil.copytree(demo / name, demo / f"{name}2")
        record, _ = read_json(demo / f"{name}2" / "run.json")
        (demo / f"{name}2" / "run.json").write_bytes(sealed_json(record | {"seed": 2}))
    both = sentence_table(load(demo, options)[0], options).set_index("method")
    values = ["sentences", "chrf_gain_error"]
    assert (both.loc["se_kd_student", "seeds"] == 2).all()
    assert both.loc["se_kd_student", values].to_numpy() == pytest.approx(one[values].to_numpy())
    # What chance gives stands beside it: here nothing, the baseline's runs are the same.
    assert len(both.loc[PLACEBO]) == 10 and not both.loc[PLACEBO, ["kl_gain", "chrf_gain"]].any(
        axis=None
    )


def test_transitions_and_times_by_hand(demo: Path) -> None:
    before, after = np.array([0.1, 2.0, 3.0, 0.2]), np.array([0.1, 0.5, 4.0, 1.5])
    assert transitions(before, after, 1.0).tolist() == [[1, 1], [1, 1]]
    options = Options(resamples=100)
    directions, _ = load(demo, options)
    ((run, other),) = Evidence.of(directions[0], "se_kd_student", "word_kd").couples
    gamma = directions[0].cut(run, other).gamma
    times = easy_times(directions[0], run, other)
    assert times is not None
    tokens, own, base = times.sum(axis=0)
    hard = (run.history[50] > gamma) & (other.history[50] > gamma)
    assert tokens == hard.sum()
    # Two steps: half the span where the token is easy at the last, all of it where it is not.
    for item, found in ((run, own), (other, base)):
        easy = (item.history[100] <= gamma)[hard].sum()
        assert 0 < easy < tokens and found == tokens - easy / 2
    first = [run.history[50] > gamma]
    table = transition_table(directions, options)
    matrix = table[(table["run"] == "se_kd") & (table["from"] == "hard")]
    assert matrix["tokens"].sum() == first[0].sum()
    assert matrix["share"].sum() == pytest.approx(1)
    training = training_table(directions, options)
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
    options = Options(resamples=100)
    table = training_table(load(demo, options)[0], options)
    log = table[table["source"] == "log"].set_index("bucket")
    assert log["kl"].to_dict() == {"easy": 0.4, "hard": 2.0}
    assert log["step"].to_dict() == {"easy": 20, "hard": 20}
    assert log["hard_share"].to_dict() == {"easy": 0.3, "hard": 0.3}
