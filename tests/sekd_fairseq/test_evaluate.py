"""From fairseq-generate's output to scores: the right tokenizer, and text that belongs together."""

import json
from pathlib import Path

import pytest
from sacrebleu.metrics import BLEU

from analysis.runs.errors import UserError
from analysis.runs.texts import read_lines, read_texts
from analysis.sums.direction import Options
from analysis.sums.loading import load
from sekd_fairseq import tune_lenpen
from sekd_fairseq.evaluate import main

SOURCES = ["A red house .", "Two dogs run", "Who's there?", "the end &amp; all"]
TARGETS = ["Ein rotes Haus .", "Zwei Hunde laufen", "Wer ist da?", "das Ende & alles"]
HYPOTHESES = ["Ein rotes Haus.", "Zwei Hunde rennen", "Wer da?", "das Ende & alles"]


def evaluate(
    tmp_path: Path,
    sources: list[str] = SOURCES,
    references: list[str] = TARGETS,
    target_lang: str = "de",
    mark: str = "",
    end: str = "\n",
    generated: tuple[list[str], list[str], list[str]] = (SOURCES, TARGETS, HYPOTHESES),
) -> dict[str, object]:
    lines = ["fairseq's own lines", "D-\tno number"]
    for i, (source, target, hypothesis) in enumerate(zip(*generated, strict=True)):
        lines += [f"S-{i}\t{source}", f"T-{i}\t{target.lower()}", f"H-{i}\t-0.5\tpieces"]
        lines += [f"D-{i}\t-0.5\t{hypothesis}", f"P-{i}\t-0.1 -0.2"]
    for name, text in (("out", lines), ("src", sources), ("ref", references)):
        content = "" if name == "out" else mark
        content += "".join(f"{line}{end}" for line in text)
        (tmp_path / name).write_bytes(content.encode())
    words = ["--source", "src", "--reference", "ref", "--run", "run"]
    main(
        [str(tmp_path / "out"), *(str(tmp_path / w) if w[:2] != "--" else w for w in words)]
        + ["--target-lang", target_lang]
    )
    return json.loads((tmp_path / "run" / "scores.json").read_text())["test"]["bleu"]


@pytest.mark.parametrize(("mark", "end"), [("\ufeff", "\n"), ("", "\r\n"), ("\ufeff", "\r\n")])
def test_marks_and_line_ends_are_no_text(tmp_path: Path, mark: str, end: str) -> None:
    expected = BLEU().corpus_score(HYPOTHESES, [TARGETS]).score
    assert evaluate(tmp_path, mark=mark, end=end)["score"] == expected
    assert (tmp_path / "run" / "hyps" / "test.ref.txt").read_text().splitlines() == TARGETS


def test_odd_line_ends_stay_within_lines(tmp_path: Path) -> None:
    odd = [f"{line[:3]}{c}{line[3:]}" for line, c in zip(TARGETS, "\r\x85\u2028\x0c", strict=True)]
    evaluate(tmp_path, references=odd)
    kept = (tmp_path / "run" / "hyps" / "test.ref.txt").read_bytes().decode().split("\n")
    assert kept == [*odd, ""]


@pytest.mark.parametrize("code", ["zho_Hans", "cmn", "zh_TW", "yue_Hant"])
def test_chinese_by_any_code(tmp_path: Path, code: str) -> None:
    references = [
        "我们昨天去了北京的大学。",
        "他今天不在家,明天回来。",
        "一二三四五",
        "这是什么意思?",
    ]
    hypotheses = ["我们昨天去了北京大学。", "他今天不在家,明天再回来。", "一二三四五", "这是什么?"]
    found = evaluate(
        tmp_path,
        references=references,
        target_lang=code,
        generated=(SOURCES, references, hypotheses),
    )
    expected = BLEU(tokenize="zh").corpus_score(hypotheses, [references]).score
    assert found["score"] == expected > 50
    assert "tok:zh" in str(found["signature"])


def test_thai_is_not_scored_by_words_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluate(tmp_path, target_lang="tha_Thai")
    assert "tok:char" in str(found["signature"])
    assert "warning: tha_Thai: a script without spaces" in capsys.readouterr().err


def test_text_of_other_sentences_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(sources: list[str], references: list[str]) -> str:
        with pytest.raises(SystemExit) as stop:
            evaluate(tmp_path, sources, references)
        assert not (tmp_path / "run" / "scores.json").exists()
        return str(stop.value)

    message = refuse(TARGETS, SOURCES)
    assert "src line 1: expected the text of S-0" in message and "found that of T-0" in message
    message = refuse(SOURCES, sorted(TARGETS))
    assert "ref line 2: expected the text of T-1" in message and "found that of T-2" in message
    message = refuse(SOURCES, [TARGETS[i] for i in (0, 2, 1, 3)])
    assert "2 of 4 lines are not their own" in message
    assert "ref line 1" in refuse(SOURCES, [*TARGETS[1:], "noch etwas"])
    assert "expected the text of the data" in refuse(["quite", "other", "lines", "here"], TARGETS)

    # Another translator's references are the user's choice, but not in silence.
    others = ["Dieses Gebäude leuchtet purpurn", *TARGETS[1:]]
    evaluate(tmp_path, references=others)
    assert "1 of 4 lines differ" in capsys.readouterr().err


def test_tokenised_data_and_prompts_are_recognised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [f"Translate from English to German.\nEnglish: {s}\nGerman:" for s in SOURCES]
    prompts = [prompt.replace("\n", " ") for prompt in prompts]
    pieces = [
        "▁ein ▁rot es ▁haus ▁.",
        "zwei hun@@ de laufen",
        "wer ist da ?",
        "<<unk>> ende &amp; alles",
    ]
    evaluate(tmp_path, generated=(prompts, pieces, HYPOTHESES))
    assert capsys.readouterr().err == ""


def test_an_instruction_is_all_that_is_printed_of_a_prompt(tmp_path: Path) -> None:
    # A translation is one line, so of a prompt of several lines the first is printed.
    instructions = ["Translate from English to German."] * 4
    found = evaluate(tmp_path, generated=(instructions, TARGETS, HYPOTHESES))
    assert found["score"] == BLEU().corpus_score(HYPOTHESES, [TARGETS]).score


def test_scores_hold_the_checksums_of_what_was_scored(tmp_path: Path) -> None:
    odd = ["\ufeffEin Haus", "Zwei\rHunde ", "\x85", "das Ende\r"]
    evaluate(tmp_path, generated=(SOURCES, TARGETS, odd))
    run = tmp_path / "run"
    texts = read_texts(run, "test")
    assert texts is not None and texts.sealed
    assert texts.hypotheses == read_lines(run / "hyps" / "test.txt")
    path = run / "scores.json"
    path.write_bytes(path.read_bytes().replace(b'"sentences": 4', b'"sentences": 5'))
    with pytest.raises(UserError, match=r"scores.json: content does not match"):
        read_texts(run, "test")
    with pytest.raises(SystemExit, match=r"delete the file and evaluate the run again"):
        evaluate(tmp_path)
    path.unlink()
    evaluate(tmp_path)


def test_plain_lines_are_translations_too(tmp_path: Path) -> None:
    for name, lines in (("out", HYPOTHESES), ("src", SOURCES), ("ref", TARGETS)):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    files = {name: str(tmp_path / name) for name in ("out", "src", "ref", "run")}
    options = ["--source", files["src"], "--reference", files["ref"], "--run", files["run"]]
    main([files["out"], *options, "--target-lang", "de"])
    texts = read_texts(tmp_path / "run", "test")
    assert texts is not None and texts.hypotheses == HYPOTHESES and texts.references == TARGETS
    found = json.loads((tmp_path / "run" / "scores.json").read_text())["test"]["bleu"]["score"]
    assert found == BLEU().corpus_score(HYPOTHESES, [TARGETS]).score
    with pytest.raises(SystemExit, match=r"expected 4 translations.* found 3 lines"):
        (tmp_path / "out").write_text("one\ntwo\nthree\n", encoding="utf-8")
        main([files["out"], *options, "--target-lang", "de"])
    # Output of fairseq-generate that was cut short is no plain text.
    with pytest.raises(SystemExit, match=r"found 0 .sentence 0 has none"):
        (tmp_path / "out").write_text("INFO\nS-0\ta\nT-0\tb\nINFO\n", encoding="utf-8")
        main([files["out"], *options, "--target-lang", "de"])


def test_translations_alone_make_runs_that_are_compared(tmp_path: Path) -> None:
    for name, lines in (
        ("src", SOURCES),
        ("ref", TARGETS),
        ("teacher", TARGETS),
        ("a", HYPOTHESES),
    ):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    options = ["--source", str(tmp_path / "src"), "--reference", str(tmp_path / "ref")]
    options += ["--target-lang", "de"]
    named = [*options, "--source-lang", "en", "--method"]
    for name, method, seed in (
        ("teacher", "teacher", 1),
        ("a", "finetune", 1),
        ("a", "finetune", 2),
    ):
        words = [
            *named,
            method,
            "--seed",
            str(seed),
            "--run",
            str(tmp_path / "runs" / f"{name}{seed}"),
        ]
        for _ in range(2):  # again: the same run
            main([str(tmp_path / name), *words])
    (found,), left_out = load(tmp_path / "runs", Options(resamples=100))
    assert not left_out and found.name == "en-de" and not found.scored
    assert [(str(run.method), run.seed) for run in found.translated] == [
        ("finetune", 1),
        ("finetune", 2),
        ("teacher", 1),
    ]
    run = ["--run", str(tmp_path / "runs" / "a1")]
    with pytest.raises(
        SystemExit, match=r"expected a run of word_kd, seed 1, en-de, found run.json"
    ):
        main([str(tmp_path / "a"), *named, "word_kd", *run])
    with pytest.raises(SystemExit, match="--method and --source-lang together"):
        main([str(tmp_path / "a"), *options, "--method", "finetune", *run])


def test_nothing_to_compare_with_is_named(tmp_path: Path) -> None:
    # sacreBLEU divides by the length of the references.
    for lines in ([], ["", " "]):
        with pytest.raises(
            SystemExit, match=rf"ref: expected references, .* found {len(lines)} empty"
        ):
            evaluate(tmp_path, sources=lines, references=lines, generated=(lines, lines, lines))
        words = [str(tmp_path / "out"), "--run", str(tmp_path), "--target-lang", "de"]
        with pytest.raises(SystemExit, match="ref: expected references"):
            tune_lenpen.main([*words, "--reference", str(tmp_path / "ref"), "--values", "1"])
    assert not (tmp_path / "run").exists()


def test_a_length_penalty_is_a_number(tmp_path: Path) -> None:
    words = [str(tmp_path / "out"), "--run", str(tmp_path / "run"), "--target-lang", "de"]
    words += ["--reference", str(tmp_path / "ref")]
    with pytest.raises(SystemExit, match="--lenpen: expected a number, found nan"):
        main([*words, "--source", str(tmp_path / "src"), "--lenpen", "nan"])
    with pytest.raises(SystemExit, match=r"--values: expected numbers, found 1\.0 inf"):
        tune_lenpen.main([*words, "--values", "1", "inf"])
