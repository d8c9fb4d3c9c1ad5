"""inspect_cache --student: what fits is ok, what does not is named with what fixes it."""

from pathlib import Path

import numpy as np
import pytest

from sekd_fairseq.readiness import Seen, shift

from .conftest import binarise, command, error_line, sentence_pairs, write_text


def inspect(cache: Path, student: Path, data: Path, check: bool = True) -> str:
    return command(
        "sekd_fairseq.inspect_cache", cache, "--student", student, "--data", data, "--cpu",
        "--max-tokens", "300", check=check,
    )  # fmt: skip


def test_a_student_that_fits(cache: Path, teacher: Path, data: Path) -> None:
    printed = inspect(cache / "valid", teacher, data)
    lines = [line.split() for line in printed.splitlines() if line.startswith("  ok")]
    names = " ".join(" ".join(line[1:]) for line in lines)
    for name in ("vocabulary", "sentences", "end", "template", "shift", "ranks first", "cost"):
        assert f"{name}: " in names
    assert "FIX" not in printed and "minutes per epoch" in printed


def test_a_student_that_does_not_fit(
    cache: Path, teacher: Path, data: Path, text: Path, tmp_path: Path
) -> None:
    write_text(tmp_path / "text", "train", sentence_pairs(30, seed=9))
    write_text(tmp_path / "text", "valid", sentence_pairs(21, seed=9))
    other = binarise(
        tmp_path / "text", tmp_path / "bin", data
    )  # the dictionary, but other sentences
    printed = inspect(cache / "valid", teacher, other, check=False)
    assert "FIX" in printed and "sentences: " in printed and "build the cache again" in printed
    assert "found 1 to fix" in error_line(printed)
    fewer = tmp_path / "fewer"
    write_text(fewer, "train", [("one two", "eins zwei")])
    write_text(fewer, "valid", [("one", "eins")])
    printed = inspect(cache / "valid", teacher, binarise(fewer, tmp_path / "few"), check=False)
    assert "FIX           vocabulary: " in printed
    line = error_line(
        command("sekd_fairseq.inspect_cache", cache, "--student", teacher, check=False)
    )
    assert "--data" in line


@pytest.mark.parametrize("off", [-1, 1])
def test_a_teacher_off_by_a_token_is_seen(off: int) -> None:
    reference = np.tile(np.arange(10, 17), 30)
    end = np.arange(len(reference)) % 7 == 6
    gold = np.zeros(len(reference))
    assert shift(Seen(reference, reference, end, gold)).good
    found = shift(Seen(reference, np.roll(reference, off), end, gold))
    assert not found.good and "off by a token" in found.found
