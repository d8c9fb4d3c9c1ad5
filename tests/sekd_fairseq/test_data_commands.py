"""Preparing text: nothing is lost, leaked or misaligned, and bad files end with one line."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import sentencepiece
from fairseq.data import Dictionary

from analysis.runs.errors import UserError
from analysis.runs.files import atomic_directory
from analysis.runs.texts import read_lines
from sekd_fairseq.parallel_text import normalise, read_pairs, split, without_leaks

from .conftest import completed


def run(*arguments: object, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    return completed("sekd_fairseq.prepare_data", *arguments, fresh=fresh)


def text_files(folder: Path, count: int = 80) -> tuple[Path, Path]:
    source, target = folder / "text.en", folder / "text.de"
    words = ["red", "green", "blue", "house", "tree", "water", "bread", "light"]
    lines = [f"the {words[i % 8]} {words[i // 8 % 8]} number {i}" for i in range(count)]
    source.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    target.write_text("".join(f"Übersetzung: {line} 😀\n" for line in lines), encoding="utf-8")
    return source, target


def test_split_leaks_nothing_and_is_repeatable() -> None:
    pairs = [(f"s{i // 2}", f"t{i // 3}") for i in range(300)]
    parts = split(pairs, valid_size=24, test_size=32, seed=4)
    assert parts == split(pairs, valid_size=24, test_size=32, seed=4)
    assert len(parts["valid"]) == 24 and len(parts["test"]) == 32
    assert sorted(pair for part in parts.values() for pair in part) == sorted(set(pairs))
    for side in (0, 1):
        seen = [{pair[side] for pair in part} for part in parts.values()]
        assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    with pytest.raises(UserError, match="found 200 different pairs"):
        split(pairs, valid_size=200, test_size=200)


def test_held_out_sentences_leave_the_training_set() -> None:
    kept, leaked = without_leaks([("a", "x"), ("b", "y"), ("c", "z")], [[("a", "q")], [("p", "z")]])
    assert kept == [("b", "y")] and leaked == 2


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("one\u2028still one\r\n\ufefftwo\n\n".encode())
    (tmp_path / "b").write_bytes(b"eins\nzwei\ndrei\n")
    assert read_lines(tmp_path / "a")[0] == "one\u2028still one"  # Windows' carriage return is gone
    pairs, empty = read_pairs(tmp_path / "a", tmp_path / "b")
    assert pairs == [("one still one", "eins"), ("two", "zwei")] and empty == 1
    assert normalise("e\u0301  \u00ad x") == "é x"


def test_prepared_data_round_trip(tmp_path: Path) -> None:
    source, target = text_files(tmp_path)
    common = ("--source-lang", "en", "--target-lang", "de", "--vocab-size", "60")
    sizes = ("--valid-size", "10", "--test-size", "11")
    for name in ("one", "two"):  # in two interpreters, which order their sets differently
        done = run(
            "--src", source, "--tgt", target, *common, *sizes,
            "--output", tmp_path / name, fresh=name == "two",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "data.json").read_text()) for name in ("one", "two"))
    assert one == two and one["sentences"] == {"train": 59, "valid": 10, "test": 11}
    model = sentencepiece.SentencePieceProcessor(
        model_file=str(tmp_path / "one" / "sentencepiece.model")
    )
    for name in ("train.en", "test.de"):
        raw = (tmp_path / "one" / name).read_text(encoding="utf-8").splitlines()
        pieces = (tmp_path / "one" / "pieces" / name).read_text(encoding="utf-8").splitlines()
        assert [model.decode(line.split()) for line in pieces] == raw
    assert (tmp_path / "one" / "bin" / "train.en-de.de.idx").exists()


def test_bad_text_ends_with_one_line_and_nothing_written(tmp_path: Path) -> None:
    source, target = text_files(tmp_path)
    output = tmp_path / "out"

    def refuse(*arguments: object) -> str:
        done = run(
            *arguments, "--source-lang", "en", "--target-lang", "de",
            "--output", output, "--valid-size", "10", "--test-size", "11",
        )  # fmt: skip
        assert done.returncode == 1 and not output.exists()
        assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: ")
        return done.stderr

    longer = tmp_path / "longer.de"
    longer.write_bytes(target.read_bytes() + b"noch eine\n")
    message = refuse("--src", source, "--tgt", longer)
    assert "80 lines" in message and "81" in message
    latin = tmp_path / "latin.de"
    latin.write_bytes(target.read_bytes().replace(b"number 7 ", b"number \xfc "))
    assert "latin.de, line 8" in refuse("--src", source, "--tgt", latin)
    assert "none that can be read" in refuse("--src", source, "--tgt", tmp_path / "no.de")
    empty = tmp_path / "empty"
    empty.write_bytes(b"\n" * 80)
    assert "at least one pair" in refuse("--src", source, "--tgt", empty)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_only_prepared_data_are_replaced(tmp_path: Path) -> None:
    source, target = text_files(tmp_path)
    given = ("--src", source, "--tgt", target, "--source-lang", "en", "--target-lang", "de")
    before = sorted(tmp_path.iterdir())
    done = run(*given, "--output", tmp_path)
    assert done.returncode == 1 and "choose another" in done.stderr
    assert sorted(tmp_path.iterdir()) == before
    sizes = ("--valid-size", "10", "--test-size", "11", "--vocab-size")
    for size in ("60", "61"):
        done = run(*given, *sizes, size, "--output", tmp_path / "out")
        assert done.returncode == 0, done.stderr
    # What others put there is not deleted.
    for place in ("cache/train/shard-00000.arrow", "bin/test1.en-de.en.bin"):
        other = tmp_path / "out" / place
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_text("days of work")
        done = run(*given, *sizes, "60", "--output", tmp_path / "out")
        assert (
            done.returncode == 1
            and f"found {tmp_path}/out/{place.split('/train')[0]};" in done.stderr
        )
        assert other.read_text() == "days of work"
        shutil.rmtree(tmp_path / "out" / "cache", ignore_errors=True)


def test_a_link_for_an_output_is_followed(tmp_path: Path) -> None:
    source, target = text_files(tmp_path)
    given = ("--src", source, "--tgt", target, "--source-lang", "en", "--target-lang", "de")
    for name in ("there", "not there", "new"):
        (tmp_path / f"link to {name}").symlink_to(tmp_path / name)
    (tmp_path / "there").mkdir()
    for name in ("there", "there", "not there"):  # at the second time it is replaced
        link = tmp_path / f"link to {name}"
        done = run(*given, "--vocab-size", 60, "--output", link)
        assert done.returncode == 0, done.stderr
        assert link.is_symlink() and (tmp_path / name / "bin" / "dict.en.txt").is_file()
    with atomic_directory(tmp_path / "link to new") as folder:
        (folder / "file").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_recorded_vocabulary_is_that_of_the_models(tmp_path: Path) -> None:
    """Characters that SentencePiece leaves out get symbols of their own."""
    source, target = text_files(tmp_path)
    lines = source.read_text().splitlines()
    source.write_text("".join(f"{line} {chr(0x4E00 + i)}\n" for i, line in enumerate(lines)))
    done = run(
        "--src", source, "--tgt", target, "--source-lang", "en",
        "--target-lang", "de", "--output", tmp_path / "out", "--valid-size", "10",
        "--test-size", "11", "--vocab-size", "60", "--character-coverage", "0.98",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = Dictionary.load(str(tmp_path / "out" / "bin" / "dict.en.txt"))
    assert json.loads((tmp_path / "out" / "data.json").read_text())["vocabulary"] == len(found) > 60


PIECES = ["a", "▁", "▁house", "half▁way", "<pad>x", "x<pad>", "</s>", "<unk>", "<s>"]


def test_text_that_looks_like_pieces_or_symbols(tmp_path: Path) -> None:
    source, target = text_files(tmp_path)
    lines = target.read_text(encoding="utf-8").splitlines()
    odd = [f"{line} {PIECES[i % 9]}" for i, line in enumerate(lines)]
    target.write_text("".join(f"{line}\n" for line in odd), encoding="utf-8")
    done = run(
        "--src", source, "--tgt", target, "--source-lang", "en",
        "--target-lang", "de", "--output", tmp_path / "out", "--valid-size", "10",
        "--test-size", "11", "--vocab-size", "120",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "data.json").read_text())
    dictionary = Dictionary.load(str(tmp_path / "out" / "bin" / "dict.de.txt"))
    for subset in ("train", "valid", "test"):
        text = (tmp_path / "out" / f"{subset}.de").read_text(encoding="utf-8").splitlines()
        pieces = (tmp_path / "out" / "pieces" / f"{subset}.de").read_text(encoding="utf-8")
        wrong = [
            i
            for i, (line, cut) in enumerate(zip(text, pieces.splitlines(), strict=True))
            if cut.replace(" ", "").replace("▁", " ").strip() != line
        ]
        assert len(wrong) == summary["inexact"][subset] == sum("▁" in line for line in text)
        assert all("▁" in text[i] for i in wrong)
        if wrong:
            message = next(x for x in done.stderr.splitlines() if f"{subset}.de line" in x)
            assert message.startswith(f"warning: {len(wrong)} sentences hold '▁' (U+2581)")
            assert f"first {subset}.de line {wrong[0] + 1};" in message
        # No piece of the text is one of fairseq's own symbols.
        ids = dictionary.encode_line(pieces.replace("\n", " "), append_eos=False).tolist()
        assert not {dictionary.pad(), dictionary.eos(), dictionary.bos()} & set(ids)


def test_a_small_text_is_not_held_out_whole(tmp_path: Path) -> None:
    source, target = text_files(tmp_path, 1014)
    given = ("--src", source, "--tgt", target, "--source-lang", "en", "--target-lang", "de")
    done = run(*given, "--output", tmp_path / "a", "--vocab-size", "32000")
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "a" / "data.json").read_text())["sentences"]
    assert counts == {"train": 804, "valid": 84, "test": 126}
    assert "fewer than --vocab-size 32000" in done.stderr and "leave fewer" not in done.stderr
    sizes = ("--valid-size", "400", "--test-size", "600")
    done = run(*given, *sizes, "--output", tmp_path / "b")
    assert "400 validation and 600 test pairs leave fewer" in done.stderr


def test_lists_of_prefixes_and_options_without_effect(tmp_path: Path) -> None:
    for name, first in (("one", 0), ("two", 30), ("dev", 60), ("test", 70)):
        for side, language in zip(text_files(tmp_path, 90), ("en", "de"), strict=True):
            lines = side.read_text(encoding="utf-8").splitlines(keepends=True)[first : first + 30]
            lines = lines[: 10 if first >= 60 else 30]
            (tmp_path / f"{name}.{language}").write_text("".join(lines), encoding="utf-8")
    base = ("--source-lang", "en", "--target-lang", "de", "--output", tmp_path / "out")
    rest = ("--valid", tmp_path / "dev", "--test", tmp_path / "test", "--vocab-size", "60", *base)
    train = f"{tmp_path}/one, {tmp_path}/two"
    done = run("--train", train, *rest)
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "out" / "data.json").read_text())["sentences"]
    assert counts == {"train": 60, "valid": 10, "test": 10}
    done = run("--train", f"{train},{tmp_path}/one", *rest)
    assert done.returncode == 1 and "one' twice" in done.stderr
    done = run("--train", train, *rest, "--valid-size", "400")
    assert done.returncode == 2 and "--valid-size is for --src and --tgt" in done.stderr


def test_an_output_that_cannot_be_made_ends_with_one_line(tmp_path: Path) -> None:
    source, target = text_files(tmp_path)
    done = run(
        "--src", source, "--tgt", target, "--source-lang", "en",
        "--target-lang", "de", "--output", source / "below" / "a file",
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_monolingual_text_is_cut_into_the_pieces_that_are_there(tmp_path: Path) -> None:
    source, target = text_files(tmp_path)
    languages = ("--source-lang", "en", "--target-lang", "de")
    made = run(
        "--src",
        source,
        "--tgt",
        target,
        *languages,
        "--vocab-size",
        60,
        "--output",
        tmp_path / "data",
    )
    assert made.returncode == 0, made.stderr
    mono = tmp_path / "mono.en"
    mono.write_text("the  red tree\n\nthe blue bread\nthe red tree\n" + "the house " * 300 + "\n")
    words = ("--mono", mono, "--output", tmp_path / "mono", *languages)
    made = run(*words, "--vocabulary", tmp_path / "data")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "mono/train.en").read_text() == "the red tree\nthe blue bread\n"
    summary = json.loads((tmp_path / "mono/data.json").read_text())
    assert summary["sentences"] == {"train": 2}
    assert summary["dropped"] == {"empty": 1, "repeated": 1, "too_long": {"train": 1}}
    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(tmp_path / "data/sentencepiece.model")
    )
    pieces = (tmp_path / "mono/pieces/train.en").read_text().splitlines()
    assert [processor.decode(line.split()) for line in pieces] == ["the red tree", "the blue bread"]
    symbols = [
        (tmp_path / name / "bin/dict.en.txt").read_text().split()[::2] for name in ("data", "mono")
    ]
    assert symbols[0] == symbols[1]
    for wrong, expected in (
        (words, "--mono expects --vocabulary"),
        ((*words, "--src", source, "--tgt", target), "or --mono"),
    ):
        refused = run(*wrong)
        assert refused.returncode == 2 and expected in refused.stderr
