"""Text and languages: lines, codes, and what commands have in common."""

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import gap, terminal
from analysis.markup import interval, markdown_table, number, percent
from analysis.report.latex import escape
from analysis.runs.errors import UserError
from analysis.runs.languages import bleu_tokenizer, installed_tokenizer, language_name, languages_of
from analysis.runs.simulated import write_run_record
from analysis.runs.texts import Texts, read_lines, write_texts


@pytest.mark.parametrize(
    ("codes", "tokenizer"),
    [
        ("zh zho chi cmn yue zho_Hans zho_Hant yue_Hant zh-CN zh_TW zh-Hans-CN ZH zh_CN", "zh"),
        ("ja jpn jpn_Jpan ja_XX ja-JP", "ja-mecab"),
        ("ko kor kor_Hang ko_KR", "ko-mecab"),
        ("th tha_Thai km khm_Khmr lo lao_Laoo my mya_Mymr my_MM bo bod_Tibt dzo_Tibt", "char"),
        ("shn_Mymr jav_Java", "char"),
        ("de deu deu_Latn en pt-BR srp_Cyrl ar arb_Arab hin_Deva zh_Latn jav_Latn ace xx", "13a"),
    ],
)
def test_tokenizer_of_a_language(
    codes: str, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: module)
    for code in codes.split():
        found = bleu_tokenizer(code)
        assert found.name == tokenizer, code
        assert (found.remark is not None) == (tokenizer == "char"), code


def test_a_missing_tokenizer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    for code, extra in (("jpn_Jpan", "sacrebleu[ja]"), ("ko", "sacrebleu[ko]")):
        found = bleu_tokenizer(code)
        assert found.name == "char" and found.remark and extra in found.remark
    assert installed_tokenizer("13a") == ("13a", None)


def test_names_of_languages() -> None:
    names = {
        "zho_Hans": "Chinese", "zh": "Chinese", "deu": "German", "ger": "German", "pt-BR": "Portuguese",
        "yue_Hant": "Cantonese", "arb_Arab": "Arabic", "lvs_Latn": "Latvian", "xx": "xx",
        "zxx_Test": "zxx_Test", "EN": "English", "khk_Cyrl": "Mongolian", "ces_Latn": "Czech",
    }  # fmt: skip
    assert {code: language_name(code) for code in names} == names


def test_languages_with_a_hyphen() -> None:
    for direction, pair in {
        "en-de": ("en", "de"), "en-zh-CN": ("en", "zh-CN"), "zh-CN-en": ("zh-CN", "en"),
        "pt-BR-zh-Hans-CN": ("pt-BR", "zh-Hans-CN"), "zho_Hans-eng_Latn": ("zho_Hans", "eng_Latn"),
        "src-tgt": ("src", "tgt"), "en1-de2": ("en1", "de2"),
    }.items():  # fmt: skip
        assert languages_of(direction) == pair


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    text = (
        "\ufeffone\rstill\r\ntwo\x85still\n\ufeffthree\u2028still\x0c\x1c\n\nsix \ufeff\r\n\nlast"
    )
    lines = ["one\rstill", "two\x85still", "three\u2028still\x0c\x1c", "", "six \ufeff", "", "last"]
    path = tmp_path / "a.de"
    path.write_bytes(text.encode())
    assert read_lines(path) == lines
    path.rename(tmp_path / "plain")
    (tmp_path / "a.de.gz").write_bytes(gzip.compress(text.encode()))
    assert read_lines(path) == read_lines(tmp_path / "a.de.gz") == lines
    (tmp_path / "empty").write_bytes(b"")
    assert read_lines(tmp_path / "empty") == []
    (tmp_path / "latin").write_bytes(b"a\n\xfc\n")
    with pytest.raises(UserError, match="latin, line 2: expected UTF-8, found the byte 0xfc"):
        read_lines(tmp_path / "latin")


def test_lists_in_options() -> None:
    assert terminal.split_list(" train , valid", "--subset") == ["train", "valid"]
    assert terminal.split_list("a b:c", "DATA", ":") == ["a b", "c"]
    for value, found in (("a,,b", "empty"), ("", "empty"), ("a, b ,a", "'a' twice")):
        with pytest.raises(UserError, match=f"--subset: expected .*, found .*{found}"):
            terminal.split_list(value, "--subset")


def test_suggested_commands_can_be_copied() -> None:
    line = terminal.suggested("python", "-m", "x", Path("data/llm é x/bin"))
    assert line == "python -m x 'data/llm é x/bin'"


def test_progress_in_a_log_is_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in terminal.progress(range(3), desc="quick"):
        pass
    assert capsys.readouterr().err == ""  # under a minute there is nothing to say
    monkeypatch.setattr(terminal, "LOG_INTERVAL", 1e-6)
    with terminal.progress(total=3, desc="slow") as bar:
        for _ in range(3):
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 3 and lines[-1].startswith("slow: 100%")
    assert "\r" not in "".join(lines)


def test_names_and_pieces_stay_text_in_markdown_and_latex() -> None:
    table = pd.DataFrame({"a|b <x>": ["<b>bold</b> | & x_1", "< 0.0001"]})
    assert markdown_table(table).splitlines() == [
        r"| a\|b \<x> |",
        "| --- |",
        r"| \<b>bold\</b> \| & x_1 |",
        "| < 0.0001 |",
    ]
    assert escape("a|b <x_1> & 5 %") == (r"a\textbar{}b \textless{}x\_1\textgreater{} \& 5 \%")


def test_runs_without_a_sentence_are_named(tmp_path: Path) -> None:
    for method in ("finetune", "word_kd"):
        write_run_record(tmp_path / method, method, 1, "en-de", 1, "cache")
        write_texts(tmp_path / method, "test", Texts([], [], []))
    with pytest.raises(SystemExit, match=r"finetune.*test\.txt: expected a sentence a line, found"):
        gap.main([str(tmp_path)])


def test_what_rounds_to_zero_has_no_sign() -> None:
    assert number(-0.004, 2) == "0.00"
    assert number(-0.006, 2) == "-0.01"
    assert percent(-0.0004) == "0.0 %"
    assert interval(-0.0004, -0.1, 0.0, 3) == "0.000 [-0.100, 0.000]"
    assert interval(0.5, np.nan, np.nan, 1) == "0.5"
    assert interval(np.nan, np.nan, np.nan) == ""
