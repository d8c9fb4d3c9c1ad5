"""Length ratio and length penalty beside BLEU, so that a difference of length is seen."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import WriteRun
from sacrebleu.metrics import BLEU

from analysis import transfer
from analysis.chapters.methods import methods_table
from analysis.claims.verdicts import COLUMNS
from analysis.report import content, document
from analysis.report.findings import findings
from analysis.report.latex import results_table
from analysis.runs.run_record import write_scores
from analysis.runs.simulated import write_study
from analysis.sums.direction import Options
from analysis.sums.loading import load


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two seeds; those of the SE-KD method leave every fifth sentence's last words out."""
    root = write_study(tmp_path_factory.mktemp("study") / "runs", seeds=2, sentences=40)
    for run in (root / "en-de").glob("treatment*"):
        path = run / "hyps/test.txt"
        lines = path.read_text(encoding="utf-8").splitlines()
        cut = [
            " ".join(line.split()[:3]) if number % 5 == 0 else line
            for number, line in enumerate(lines)
        ]
        path.write_text("".join(f"{line}\n" for line in cut), encoding="utf-8")
    return root


def report(study: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(document, "draw_all", lambda *_: [])
    transfer.main([str(study), "--resamples", "100"])
    return study / "report"


def test_length_ratio_stands_beside_bleu(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = report(study, monkeypatch)
    table = pd.read_csv(folder / "tables/results.csv").set_index("run")
    hyps = study / "en-de/treatment1/hyps"
    lines, references = (
        (hyps / f"test{suffix}.txt").read_text(encoding="utf-8").splitlines()
        for suffix in ("", ".ref")
    )
    score = BLEU().corpus_score(lines, [references])
    expected = score.sys_len / score.ref_len
    assert table.loc["en-de/treatment1", "length_ratio"] == pytest.approx(expected)
    methods = pd.read_csv(folder / "tables/methods.csv").set_index(["method", "metric"])
    mean = table.loc[["en-de/treatment1", "en-de/treatment2"], "length_ratio"].mean()
    assert methods.loc[("se_kd_student", "BLEU"), "length_ratio"] == pytest.approx(mean)
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "| mean ± sd | length ratio | over" in text and "length penalty |" not in text
    told = f"Its translations are shorter than the baseline's ({mean:.3f} of the references' words"
    assert told in text
    assert f" & {mean:.3f} \\\\" in (folder / "tables/results.tex").read_text()


def test_length_penalties_are_shown_where_runs_name_them(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, penalty in (("treatment1", 0.6), ("treatment2", 1.2), ("word_kd1", 1.0)):
        write_scores(study / "en-de" / name, "test", {"lenpen": penalty})
    folder = report(study, monkeypatch)
    table = pd.read_csv(folder / "tables/results.csv").set_index("run")
    assert table.loc["en-de/treatment2", "lenpen"] == 1.2
    assert pd.isna(table.loc["en-de/finetune1", "lenpen"])
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (folder / "report.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ]
    place = next(row.index("length penalty") for row in rows if "length penalty" in row)
    found = {row[1]: row[place] for row in rows if row[2] == "BLEU"}
    assert found == {
        "fine-tuning": "", "word-level KD": "1", "SE-KD (student)": "0.6 to 1.2", "placebo": "",
    }  # fmt: skip
    assert " & penalty \\\\" in (folder / "tables/results.tex").read_text()


@pytest.mark.parametrize(
    ("ends", "own", "baseline", "told"),
    [
        ((0.2, 0.8), 0.99, 0.92, "A gain of 0.50 BLEU [0.20, 0.80]"),
        ((0.2, 0.8), 0.99, 0.92, "longer than the baseline's (0.990 of the references' words against "
                                 "0.920); length may be part of the difference."),
        ((-0.8, -0.2), 0.99, 0.92, "A loss of 0.50 BLEU [−0.80, −0.20]"),
        ((-0.8, -0.2), 0.99, 0.92, "length is not the reason."),
        ((-0.8, -0.2), 1.2, 1.0, "length may be part of the difference."),
        ((-1.5, 0.5), 0.92, 0.99, "No certain difference: −0.50 BLEU [−1.50, 0.50]"),
        ((-1.5, 0.5), 0.92, 0.99, "shorter than the baseline's (0.920 of the references' words against "
                                  "0.990). "),
        ((0.2, 0.8), 0.951, 0.95, ""),
        ((0.2, 0.8), 0.95, float("nan"), ""),
    ],
)  # fmt: skip
def test_what_is_told_of_gains_and_lengths(
    ends: tuple[float, float], own: float, baseline: float, told: str
) -> None:
    rows = {"method": ["se_kd_blend", "word_kd"], "length_ratio": [own, baseline]}
    table = pd.DataFrame(rows).assign(metric="BLEU", direction="de-en")
    certain = ends[0] > 0 or ends[1] < 0
    values = {
        "": sum(ends) / 2,
        "_p_holm": 0.01 if certain else 0.4,
        "_low": ends[0],
        "_high": ends[1],
        "_seeds": 3,
        "_detectable": 0.4,
    }
    for name, value in values.items():
        table[f"gain_over_word_kd{name}"] = value
    claim = {
        "treatment": "se_kd_blend", "claim": 1, "scope": "all", "decides": True, "seeds": 3,
        "verdict": "inconclusive",
    }  # fmt: skip
    claims = pd.DataFrame([dict.fromkeys(COLUMNS, "") | claim])
    (text,) = findings(claims, table, Options())
    assert ("Its translations are" in text) == (abs(own - baseline) > 0.01) and told in text


def gains(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """A table of methods, of BLEU over word-level KD."""
    usual = {
        "metric": "BLEU", "seeds": 3, "mean": 30.0, "sd_over_seeds": 0.1, "length_ratio": 1.0,
        "lenpen_low": float("nan"), "lenpen_high": float("nan"), "gain_over_word_kd_seeds": 3,
        "gain_over_word_kd_detectable": 0.5,
    }  # fmt: skip
    names = [f"gain_over_word_kd{end}" for end in ("", "_low", "_high", "_p_holm")]
    return pd.DataFrame(usual | row | dict(zip(names, row["gain"], strict=True)) for row in rows)


def claimed(methods: pd.DataFrame, treatment: str) -> str:
    claim = {
        "treatment": treatment, "claim": 1, "scope": "all", "decides": True, "seeds": 3,
        "verdict": "inconclusive",
    }  # fmt: skip
    (text,) = findings(pd.DataFrame([dict.fromkeys(COLUMNS, "") | claim]), methods, Options())
    return text


def test_a_gain_is_certain_by_the_corrected_p_in_words_as_in_latex() -> None:
    rows = [
        {"direction": "de-en", "method": "se_kd_blend", "gain": (0.5, 0.1, 0.9, p)}
        for p in (0.12, 0.03)
    ]
    doubtful, certain = gains(rows[:1]), gains(rows[1:])
    told = "No certain difference: 0.50 BLEU [0.10, 0.90], p = 0.12 with Holm's correction"
    assert told in claimed(doubtful, "se_kd_blend")
    assert "A gain of 0.50 BLEU [0.10, 0.90]; such runs" in claimed(certain, "se_kd_blend")
    mark = r"$^{\dagger}$"
    assert mark not in results_table(doubtful, "word_kd")
    assert mark in results_table(certain, "word_kd")
    # One seed says nothing of seeds, and a baseline without a column is not said to be compared with.
    one = results_table(certain.assign(seeds=1, gain_over_word_kd_seeds=1), "word_kd")
    assert "dagger" not in one and "one training seed" in one
    assert "dagger" not in results_table(certain, "seq_kd")
    alone = certain.assign(gain_over_word_kd_seeds=1).to_dict("records")[0]
    assert content._over(alone, "word_kd") == "0.50 [0.10, 0.90], one seed: sentences only"
    several = pd.concat([certain, certain.assign(method="word_kd", seeds=2)])
    assert "over 2 to 3 training seeds" in results_table(several, "word_kd")


def test_equal_runs_detect_nothing() -> None:
    text = claimed(
        gains([{"direction": "de-en", "method": "se_kd_blend", "gain": (0.0, 0.0, 0.0, 1.0)}]),
        "se_kd_blend",
    )
    assert "No certain difference: 0.00 BLEU [0.00, 0.00]: the runs score the same" in text
    assert "would be told" not in text


def test_a_bucket_that_all_seeds_but_one_leave_empty_has_no_spread() -> None:
    table = pd.DataFrame(
        {"direction": "de-en", "method": "finetune", "seed": [1, 2], "bucket": "hard", "tokens": [3, 0],
         "kl": [1.5, float("nan")], "kl_low": [1.0, float("nan")], "kl_high": [2.0, float("nan")]}
    )  # fmt: skip
    (row,) = content._over_seeds(table, ["bucket"])
    assert content._spread(row, "kl") == "1.500"


def test_a_gain_in_some_of_the_directions_names_them() -> None:
    known = {"method": "se_kd_blend", "gain": (0.5, 0.1, 0.9, 0.03)}
    missing = {"direction": "fr-en", "method": "word_kd", "gain": (float("nan"),) * 4}
    text = claimed(gains([known | {"direction": "de-en"}, missing]), "se_kd_blend")
    assert "A gain of 0.50 BLEU [0.10, 0.90] in de-en; such runs" in text
    # Where the baseline is missing in one of them, too.
    pooled = {"direction": "all", "method": "se_kd_blend", "gain": (float("nan"),) * 4}
    text = claimed(gains([known | {"direction": "de-en"}, missing, pooled]), "se_kd_blend")
    assert "in de-en" in text
    both = [known | {"direction": name} for name in ("de-en", "fr-en", "all")]
    assert "[0.10, 0.90] over 2 directions; such" in claimed(gains(both), "se_kd_blend")


def test_spread_over_seeds_of_the_mean_pairs_seeds_and_not_places(
    write_run: WriteRun, tmp_path: Path
) -> None:
    for direction, seeds in (("de-en", (1, 2, 3)), ("fr-en", (1, 3, 4))):
        for seed in seeds:
            own = {"seed": seed, "direction": direction, "sentences": 20, "wrong": 0.1 * seed}
            write_run(tmp_path, f"{direction}/{seed}", "finetune", **own)
    directions, _ = load(tmp_path, Options(resamples=100))
    table = methods_table(directions, Options(resamples=100))
    (row,) = table[
        (table["direction"] == "all")
        & (table["metric"] == "BLEU")
        & (table["seeds"] > 0)
        & (table["method"] == "finetune")
    ].to_dict("records")
    scores = {
        (item.name, run.seed): BLEU()
        .corpus_score(run.translations.texts.hypotheses, [run.translations.texts.references])
        .score
        for item in directions
        for run in item.translated
        if run.translations
    }
    means = [(scores["de-en", seed] + scores["fr-en", seed]) / 2 for seed in (1, 3)]
    assert row["sd_over_seeds"] == pytest.approx(np.std(means, ddof=1))
    both = [
        np.mean([scores[name, seed] for seed in seeds])
        for name, seeds in (("de-en", (1, 2, 3)), ("fr-en", (1, 3, 4)))
    ]
    assert row["mean"] == pytest.approx(np.mean(both))
