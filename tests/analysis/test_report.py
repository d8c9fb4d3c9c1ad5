"""The commands: what they write, what they refuse, and that nothing half-written stays."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import WriteRun
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from analysis import figures, gap, style, transfer
from analysis.chapters.quality import main_baseline
from analysis.report import document
from analysis.report.folder import MARK, replace_report
from analysis.runs.simulated import write_study
from analysis.stats import holm

ROOT = Path(__file__).parents[2]


def command(module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return python("-m", f"analysis.{module}", *arguments)


def python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600
    )


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without figures, which take most of the time."""
    monkeypatch.setattr(document, "draw_all", lambda *_: [])


@pytest.fixture
def one_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures without their PDF and PNG, which take most of the time."""
    monkeypatch.setattr(style, "FORMATS", ("svg",))


def test_report_of_the_demo_and_its_figures_again(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transfer.main([str(demo)])
    assert capsys.readouterr().out.rstrip().endswith(f"report: {demo / 'report/report.md'}")
    written = files(demo / "report")
    names = (
        "claims", "difficulty", "transfer", "quality", "methods", "training", "transitions", "sentences",
    )  # fmt: skip
    assert {
        f"figures/{name}.{kind}" for name in names for kind in ("csv", "pdf", "png", "svg")
    } <= set(written)
    for name in names:
        pdf = written[f"figures/{name}.pdf"]
        assert b"/FontFile2" in pdf and b"/Type3" not in pdf  # TrueType, embedded
        assert b"/CreationDate" not in pdf
        assert b"<dc:date>" not in written[f"figures/{name}.svg"]
    report = written["report.md"].decode()
    assert "| inconclusive |" in report and "| 1 seed, 3 needed |" in report
    assert "nrefs:1|" in report and "SE-KD (student)" in report
    assert str(demo) not in report
    os.remove(demo / "report/figures/quality.svg")
    # By another interpreter, in one format: the others take most of the time.
    draw = "import sys; from analysis import figures, style; style.FORMATS = ('svg',); figures.main(sys.argv[1:])"
    again = python("-c", draw, demo)
    assert again.returncode == 0, again.stderr
    assert files(demo / "report") == written


def test_same_runs_and_seed_give_the_same_report_to_the_byte(
    demo: Path, tmp_path: Path, no_figures: None
) -> None:
    """Of figures the test before knows it."""
    for name in ("one", "two"):
        transfer.main([str(demo), "--output", str(tmp_path / name), "--resamples", "200"])
    assert files(tmp_path / "one") == files(tmp_path / "two")
    transfer.main(
        [str(demo), "--output", str(tmp_path / "three"), "--resamples", "200", "--seed", "1"]
    )
    one, three = files(tmp_path / "one"), files(tmp_path / "three")
    assert one["tables/transfer.csv"] != three["tables/transfer.csv"]


def test_results_equal_sacrebleu(demo: Path, no_figures: None) -> None:
    transfer.main([str(demo), "--resamples", "100"])
    table = pd.read_csv(demo / "report/tables/results.csv").set_index("run")
    lines = {
        name: (demo / name / "hyps/test.txt").read_text().splitlines()
        for name in ("teacher", "finetune", "word_kd", "se_kd")
    }
    references = [(demo / "word_kd/hyps/test.ref.txt").read_text().splitlines()]
    for name, hypotheses in lines.items():
        score = BLEU().corpus_score(hypotheses, references, n_bootstrap=1000)
        assert table.loc[name, "BLEU"] == pytest.approx(score.score)
        assert table.loc[name, "BLEU_low"] == pytest.approx(score._mean - score._ci)
        assert table.loc[name, "chrF"] == pytest.approx(
            CHRF().corpus_score(hypotheses, references).score
        )
    for kind, column in (("bs", "bootstrap"), ("ar", "randomisation")):
        systems = [("base", lines["word_kd"]), ("se", lines["se_kd"])]
        test = PairedTest(systems, {"BLEU": BLEU(), "chrF": CHRF()}, references, kind, 1000)
        _, scores = test()
        for metric, key in (("BLEU", "BLEU"), ("chrF", "chrF2")):
            assert table.loc["se_kd", f"{metric}_p_{column}_over_word_kd"] == pytest.approx(
                scores[key][1].p_value
            )
    gain = table.loc["se_kd", "BLEU"] - table.loc["word_kd", "BLEU"]
    assert table.loc["se_kd", "BLEU_gain_over_word_kd"] == pytest.approx(gain)
    assert pd.isna(table.loc["word_kd", "BLEU_gain_over_word_kd"])
    assert pd.isna(table.loc["teacher", "BLEU_gain_over_finetune"])


def test_runs_without_translations(demo: Path, no_figures: None, one_format: None) -> None:
    for path in demo.glob("*/hyps/*"):
        path.unlink()
    shutil.rmtree(demo / "teacher")
    transfer.main([str(demo), "--resamples", "100"])
    assert "No run has translations." in (demo / "report/report.md").read_text()
    assert figures.draw_all(demo / "report/figures") == [
        "claims", "transfer", "difficulty", "training", "transitions",
    ]  # fmt: skip


def test_gains_are_over_the_baseline_that_is_named_too(tmp_path: Path, no_figures: None) -> None:
    root = write_study(tmp_path / "runs", seeds=3, sentences=40)
    transfer.main([str(root), "--resamples", "100", "--baseline", "se_kd_student"])
    methods = pd.read_csv(root / "report/tables/methods.csv").set_index(["method", "metric"])
    gain = methods.loc[("se_kd_student", "BLEU"), "gain_over_word_kd"]
    assert methods.loc[("word_kd", "BLEU"), "gain_over_se_kd_student"] == pytest.approx(-gain)
    assert pd.isna(methods.loc[("se_kd_student", "BLEU"), "gain_over_se_kd_student"])
    results = pd.read_csv(root / "report/tables/results.csv").set_index("run")
    own, other = results.loc["en-de/word_kd2"], results.loc["en-de/treatment2"]
    assert own["BLEU_gain_over_se_kd_student"] == pytest.approx(own["BLEU"] - other["BLEU"])
    gains = pd.read_csv(root / "report/tables/gain.csv")
    assert set(gains["baseline"]) == {"finetune", "word_kd", "se_kd_student"}
    report = (root / "report/report.md").read_text()
    assert "| over fine-tuning | over word-level KD | over SE-KD (student) |" in report
    # A figure shows the gains over it.
    assert main_baseline(methods.reset_index(), "gain_over_") == "se_kd_student"


def test_several_directions_and_seeds(tmp_path: Path, no_figures: None) -> None:
    root = write_study(tmp_path / "runs", seeds=2, sentences=40, directions=("cs-en", "en-zh"))
    transfer.main([str(root), "--resamples", "100"])
    methods = pd.read_csv(root / "report/tables/methods.csv")
    placebo = methods["method"] == "placebo"
    # Each seed against the next: their differences cancel, the interval does not.
    assert methods.loc[placebo, "gain_over_word_kd"].abs().max() < 1e-9
    assert methods.loc[placebo, "gain_over_word_kd_low"].max() < 0
    methods = methods[~placebo]
    assert set(methods["direction"]) == {"cs-en", "en-zh", "all"}
    assert (methods["seeds"] == 2).all()
    bleu = methods[methods["metric"] == "BLEU"].set_index(["direction", "method"])
    gains = bleu["gain_over_word_kd"].unstack("method")["se_kd_student"]
    assert gains["all"] == pytest.approx((gains["cs-en"] + gains["en-zh"]) / 2)
    p = bleu.loc[("all", ["finetune", "se_kd_student"]), :]
    assert p["gain_over_word_kd_p_holm"].tolist() == pytest.approx(holm(p["gain_over_word_kd_p"]))
    results = pd.read_csv(root / "report/tables/results.csv")
    chinese = results["direction"] == "en-zh"
    assert results.loc[chinese, "BLEU_signature"].str.contains("tok:zh").all()
    assert results.loc[~chinese, "BLEU_signature"].str.contains("tok:13a").all()


def test_damaged_run_is_named_and_the_rest_reported(
    demo: Path, capsys: pytest.CaptureFixture[str], write_run: WriteRun, no_figures: None
) -> None:
    bad = write_run(demo, "bad", "word_kd", seed=2) / "tokens/test/100.parquet"
    bad.write_bytes(bad.read_bytes()[:500])
    transfer.main([str(demo), "--resamples", "100"])
    assert f"left out: bad: {bad}: expected a complete Parquet file" in capsys.readouterr().out
    assert "bad" not in set(pd.read_csv(demo / "report/tables/results.csv")["run"])


def test_errors_are_one_line_and_leave_nothing_behind(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for module, arguments, message in (
        (
            transfer,
            [tmp_path / "empty"],
            "expected run directories (a run.json in each), found none",
        ),
        (transfer, [tmp_path / "none"], "expected a directory of runs, found none"),
        (
            transfer,
            [demo, "--subset", "valid"],
            "expected at least one run with token records of 'valid'",
        ),
        (figures, [demo], "run python -m analysis.transfer"),
    ):
        with pytest.raises(SystemExit) as stop:
            module.main([*map(str, arguments)])
        line = str(stop.value)
        assert message in line and "\n" not in line
        printed = capsys.readouterr()
        assert printed.out == "" and "\n" not in printed.err
    done = command("figures", demo)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{line}\n")
    assert not (demo / "report").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gamma", "1.5"], r"--gamma: expected a number in \[0, 1\] as a quantile, found 1.5"),
        (["--gamma", "-1", "--gamma-type", "absolute"], "--gamma: expected a number at least 0"),
        (["--resamples", "3"], "--resamples: expected at least 100, found 3"),
        (["--margin", "1"], "--margin: expected a share"),
        (["--reference", "nothing"], "expected a run of 'nothing' with token records"),
        (["--reference", "self"], "expected a run of 'self' with token records"),
    ],
)
def test_bad_options(demo: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        transfer.main([str(demo), *arguments])
    assert not (demo / "report").exists()


def test_a_link_to_a_report_stays_one(tmp_path: Path) -> None:
    """To another disk, say."""
    link = tmp_path / "report"
    link.symlink_to(tmp_path / "disk/report")
    for text in ("old", "new"):
        replace_report(link, lambda folder, text=text: (folder / MARK).write_text(text))
        assert link.is_symlink() and (tmp_path / "disk/report" / MARK).read_text() == text
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["report"]


def test_interrupted_writing_keeps_the_old_report(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document, "draw_all", lambda *_: [])
    transfer.main([str(demo), "--resamples", "100"])
    before = files(demo / "report")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(document, "draw_all", fail)
    with pytest.raises(KeyboardInterrupt):  # after the tables have been written
        transfer.main([str(demo), "--resamples", "100"])
    assert files(demo / "report") == before
    assert [path.name for path in demo.iterdir() if path.name.startswith(".")] == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_output_that_cannot_be_written_is_found_before_computing(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "analyse", lambda *_: pytest.fail("computed"))
    (demo / "locked").mkdir(mode=0o500)
    with pytest.raises(SystemExit, match="Permission denied"):
        transfer.main([str(demo), "--output", str(demo / "locked" / "report")])


def test_output_that_is_a_file_is_found_before_computing(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "analyse", lambda *_: pytest.fail("computed"))
    with pytest.raises(SystemExit, match="Not a directory"):
        transfer.main([str(demo), "--output", str(demo / "word_kd" / "run.json" / "report")])


def test_a_folder_that_is_no_report_is_never_replaced(demo: Path) -> None:
    with pytest.raises(SystemExit, match="expected a report or nothing there"):
        transfer.main([str(demo), "--output", str(demo / "word_kd"), "--resamples", "100"])
    assert (demo / "word_kd/run.json").exists()


def test_comet_where_it_is_installed(
    demo: Path,
    tmp_path: Path,
    no_figures: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tmp_path / "comet" / "checkpoints" / "model.ckpt"
    with pytest.raises(SystemExit, match="expected a COMET checkpoint, found no file"):
        transfer.main([str(demo), "--comet", str(model.parents[1])])
    model.parent.mkdir(parents=True)
    model.touch()
    monkeypatch.setitem(sys.modules, "comet", None)
    with pytest.raises(SystemExit, match="pip install unbabel-comet"):
        transfer.main([str(demo), "--comet", str(model)])

    class Model:
        """With COMET's interface: the score is the share of the reference's words."""

        def predict(self, data: list[dict[str, str]], progress_bar: bool) -> SimpleNamespace:
            assert all(item["src"] == item["ref"].upper() for item in data)
            words = [(item["ref"].split(), item["mt"].split()) for item in data]
            return SimpleNamespace(scores=[sum(map(str.__eq__, *w)) / len(w[0]) for w in words])

    fake = SimpleNamespace(load_from_checkpoint=lambda path: {str(model): Model()}[path])
    monkeypatch.setitem(sys.modules, "comet", fake)
    transfer.main([str(demo), "--comet", str(model.parents[1]), "--resamples", "100"])
    table = pd.read_csv(demo / "report/tables/results.csv").set_index("run")
    lines = {
        suffix: (demo / f"se_kd/hyps/test{suffix}.txt").read_text().splitlines()
        for suffix in ("", ".ref")
    }
    pairs = [(r.split(), h.split()) for r, h in zip(lines[".ref"], lines[""], strict=True)]
    mean = 100 * sum(sum(map(str.__eq__, *pair)) / len(pair[0]) for pair in pairs) / len(pairs)
    row = table.loc["se_kd"]
    assert row["COMET"] == pytest.approx(mean)
    assert row["COMET_low"] < row["COMET"] < row["COMET_high"]
    # It is tested as the other metrics are.
    base = table.loc["word_kd", "COMET"]
    assert row["COMET_gain_over_word_kd"] == pytest.approx(mean - base)
    assert row["COMET_gain_over_word_kd_low"] < mean - base < row["COMET_gain_over_word_kd_high"]
    assert 0 < row["COMET_p_randomisation_over_word_kd"] < 1
    methods = pd.read_csv(demo / "report/tables/methods.csv").set_index(["method", "metric"])
    assert methods.loc[("se_kd_student", "COMET"), "mean"] == pytest.approx(mean)
    assert pd.notna(methods.loc[("se_kd_student", "COMET"), "gain_over_word_kd_p"])
    text = (demo / "report/report.md").read_text()
    assert "`COMET|model:comet|mean over sentences, in hundredths`" in text
    assert (
        f"| {mean:.2f} [" in text
        and " & COMET & " in (demo / "report/tables/results.tex").read_text()
    )
    gap.main([str(demo), "--comet", str(model.parents[1]), "--resamples", "100"])
    assert "| COMET | COMET gap closed |" in capsys.readouterr().out


def test_package_imports_no_torch() -> None:
    code = "import analysis.transfer, sys; print({'torch', 'fairseq', 'sekd_fairseq'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_one_document_gives_no_certainty(tmp_path: Path, no_figures: None) -> None:
    study = write_study(tmp_path / "runs", seeds=3, sentences=120, better=0.2)
    documents = tmp_path / "documents"
    documents.write_text("novel\n" * 120)
    out = tmp_path / "report"
    transfer.main(
        [str(study), "--output", str(out), "--resamples", "100", "--documents", str(documents)]
    )
    claims = pd.read_csv(out / "tables" / "claims.csv")
    deciding = claims[claims["decides"] & claims["effect"].notna()]
    assert set(deciding["claim"]) == {1, 2, 3, 4, 5}
    assert deciding[["low", "high", "p", "p_holm", "detectable"]].isna().all(axis=None)
    judged = deciding[(deciding["claim"] < 4) & (deciding["treatment"] != "placebo")]
    assert set(judged["verdict"]) == {"inconclusive"}
    assert set(judged["reason"]) == {"all sentences are of one document"}
    text = (out / "report.md").read_text()
    assert "BLEU, from one sentence or document, which says nothing of others." in text
    results = pd.read_csv(out / "tables" / "results.csv")
    assert results.filter(regex="_p_|_low$|_high$").isna().all(axis=None)
    assert "nan" not in text
    assert r"$^{\dagger}$" not in (out / "tables" / "results.tex").read_text()


def test_runs_of_translations_alone(write_run: WriteRun, tmp_path: Path, one_format: None) -> None:
    root = tmp_path / "runs"
    for method, wrong in (("teacher", 0.1), ("finetune", 0.3), ("word_kd", 0.2)):
        for seed in (1, 2):
            run = write_run(root, f"{method}.{seed}", method, seed=seed, wrong=wrong)
            shutil.rmtree(run / "tokens", ignore_errors=True)
    transfer.main([str(root), "--resamples", "100"])
    text = (root / "report" / "report.md").read_text(encoding="utf-8")
    assert "| en-de | word-level KD | BLEU | 2 |" in text
    assert "No run has token records." in text and "nan" not in text
