"""inspect_cache --student: what fits is ok, what does not is named with what fixes it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq.models.transformer import TransformerModel

from sekd_fairseq.llm.tokenizer import SENTENCEPIECE, load_tokenizer, sentencepiece_proto
from sekd_fairseq.readiness import Seen, shift

from .conftest import binarise, command, error_line, sentence_pairs, write_text
from .language_models import pretrained


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


def test_a_trial_that_does_not_fit_the_gpu(
    cache: Path, teacher: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 74.51 GiB.")

    monkeypatch.setattr(TransformerModel, "forward", forward)
    printed = inspect(cache, teacher, data)
    costs = [line for line in printed.splitlines() if line.startswith("  ok            cost: ")]
    splits = list(cache.iterdir())
    assert len(costs) == len(splits) > 1 and "FIX" not in printed
    for line in costs:
        assert (
            "136,448 parameters with Adam (0.00 with --bf16) and 0.00 GiB for the logits of 300"
            in line
        )
        assert "a trial in float32 does not fit this CPU: --hf-gradient-checkpointing" in line


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


def test_a_language_model(
    llm_data: Path,
    tokenizer: Path,
    tmp_path: Path,
) -> None:
    rows = len(load_tokenizer(str(tokenizer)).pieces)
    model = pretrained(tmp_path / "model", "llama", rows)
    command("sekd_fairseq.import_hf", model, "--data", llm_data, "--output", tmp_path / "t.pt")
    command(
        "sekd_fairseq.build_cache", llm_data, "--path", tmp_path / "t.pt", "--cpu", "--output",
        tmp_path / "cache", "--subset", "valid", "--top-k", "4", "--allow-implausible",
    )  # fmt: skip
    # A random teacher does not rank references first; the rest fits.
    printed = inspect(tmp_path / "cache" / "valid", model, llm_data, check=False)
    assert "ok            vocabulary: " in printed and "ok            cost: " in printed
    assert "ok            template: plain text, as in the data" in printed
    assert "FIX           ranks first: " in printed
    # The model's own tokenizer beside it, and another's.
    load_tokenizer(str(tokenizer)).save(model)
    assert "template: plain text, as in the data" in inspect(
        tmp_path / "cache" / "valid", model, llm_data, check=False
    )
    other = (llm_data / "tokenizer" / SENTENCEPIECE).read_bytes()
    content = sentencepiece_proto(other)
    content.pieces[-1].piece = "another"
    (model / SENTENCEPIECE).write_bytes(content.SerializeToString())
    printed = inspect(tmp_path / "cache" / "valid", model, llm_data, check=False)
    assert "FIX           template: " in printed and "align_cache" in printed
