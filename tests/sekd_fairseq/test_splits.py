"""Data in every format that fairseq writes, in parts and in several directories."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fairseq.data import Dictionary, indexed_dataset

from sekd_fairseq.errors import UserError
from sekd_fairseq.score import train_frequencies
from sekd_fairseq.splits import sentences_of, side_of, training_part, write_indexed
from sekd_fairseq.teacher_cache import TeacherCache

from .conftest import command, error_line, parameters, sentence_pairs, train, write_text


def binarise_as(kind: str, text: Path, data: Path, destination: Path, *options: object) -> Path:
    command(
        "fairseq_cli.preprocess", "-s", "en", "-t", "de", "--destdir", destination,
        "--srcdict", data / "dict.en.txt", "--joined-dictionary", "--dataset-impl", kind,
        "--trainpref", text / "train", "--validpref", text / "valid", *options,
    )  # fmt: skip
    return destination


@pytest.fixture(scope="module")
def word_kd(data: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """Parameters of a training on mmap data."""
    folder = tmp_path_factory.mktemp("mmap")
    train(data, folder, "--criterion", "cached_kd", "--teacher-cache", cache)
    return parameters(folder / "checkpoint_last.pt")


@pytest.mark.parametrize("kind", ["lazy", "cached", "raw"])
def test_every_format_gives_the_same(
    kind: str,
    text: Path,
    data: Path,
    teacher: Path,
    cache: Path,
    word_kd: torch.Tensor,
    tmp_path: Path,
) -> None:
    own = binarise_as(kind, text, data, tmp_path / "bin")
    built = tmp_path / "cache"
    command(
        "sekd_fairseq.build_cache", own, "--path", teacher, "--output", built, "--cpu",
        "--top-k", "6", "--shard-sentences", "50",
    )  # fmt: skip
    same = [TeacherCache.open(folder / "train").manifest for folder in (cache, built)]
    assert [shard.sha256 for shard in same[0].shards] == [shard.sha256 for shard in same[1].shards]
    train(
        own, tmp_path / "save", "--criterion", "cached_kd", "--teacher-cache", built,
        "--dataset-impl", kind, "--num-workers", "2",
    )  # fmt: skip
    student = tmp_path / "save" / "checkpoint_last.pt"
    assert torch.equal(parameters(student), word_kd)
    command(
        "sekd_fairseq.score", own, "--path", student, "--cpu", "--run", tmp_path / "run",
        "--teacher-cache", built, "--subset", "valid",
    )  # fmt: skip

    generated = tmp_path / "out"
    pairs = [line.split() for line in (text / "valid.de").read_text().splitlines()]
    generated.write_text(
        "".join(f"H-{i}\t-0.5\t{' '.join(w[::-1])}\n" for i, w in enumerate(pairs))
    )
    distilled = tmp_path / "distilled"
    command(
        "sekd_fairseq.distilled_data", own, "--generated", generated, "--output", distilled,
        "--subset", "valid",
    )  # fmt: skip
    dictionary = Dictionary.load(str(data / "dict.de.txt"))
    stem = str(distilled / "valid.en-de.de")
    targets = indexed_dataset.make_dataset(
        stem, "lazy" if kind == "cached" else kind, fix_lua_indexing=True, dictionary=dictionary
    )
    assert [dictionary.string(targets[i]) for i in range(len(targets))] == [
        " ".join(words[::-1]) for words in pairs
    ]
    if kind == "raw":  # the others are read as the first cache's were
        command(
            "sekd_fairseq.build_cache", distilled, "--path", teacher, "--cpu", "--output",
            tmp_path / "second", "--subset", " train , valid ", "--allow-implausible",
        )  # fmt: skip


def test_frequencies_are_of_all_training_targets(
    text: Path, data: Path, teacher: Path, cache: Path, tmp_path: Path
) -> None:
    for part, seed in (("train", 8), ("train1", 7)):
        for split, count in (("train", 40), ("valid", 3)):
            write_text(tmp_path / part, split, sentence_pairs(count, seed))
    second = binarise_as("lazy", tmp_path / "train", data, tmp_path / "second")
    for path in binarise_as("lazy", tmp_path / "train1", data, tmp_path / "more").glob("train.*"):
        path.rename(second / path.name.replace("train.", "train1."))
    command(
        "sekd_fairseq.score", f"{data}:{second}", "--path", teacher, "--cpu", "--teacher-cache", cache,
        "--run", tmp_path / "run",
    )  # fmt: skip
    (records,) = (tmp_path / "run" / "tokens" / "test").iterdir()
    table = pd.read_parquet(records)
    files = [text / "train.de", *(tmp_path / part / "train.de" for part in ("train", "train1"))]
    words = " ".join(path.read_text() for path in files).split()
    lines = sum(path.read_text().count("\n") for path in files)
    for piece, frequency in zip(table["piece"], table["frequency"], strict=True):
        assert frequency == (lines if piece == "</s>" else words.count(piece))
    # Of a student that was given a part of each directory, what is in these parts.
    dictionary = Dictionary.load(str(data / "dict.de.txt"))
    cfg = SimpleNamespace(
        data=f"{data}:{second}", source_lang="en", target_lang="de", train_sentences=30
    )
    found = train_frequencies(SimpleNamespace(cfg=cfg, target_dictionary=dictionary))
    first = files[0].read_text().splitlines()
    rest = [line for path in files[1:] for line in path.read_text().splitlines()]
    expected = Counter(
        word
        for part in (first, rest)
        for number in training_part(len(part), 30)
        for word in [*part[number].split(), "</s>"]
    )
    assert {word: found[dictionary.index(word)] for word in expected} == expected
    assert found.sum() == expected.total() and expected["</s>"] == 60


def test_splits_are_looked_for_before_the_teacher_runs(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    def refuse(subset: str, folder: object = data) -> str:
        output = command(
            "sekd_fairseq.build_cache", folder, "--path", teacher, "--cpu", "--subset", subset,
            "--output", tmp_path / "cache", check=False,
        )  # fmt: skip
        assert not (tmp_path / "cache").exists()
        return error_line(output)

    assert "split 'dev', found ['test', 'train', 'valid']" in refuse("train,dev")
    assert "'valid' twice" in refuse("valid, valid")
    assert "an empty one" in refuse("valid,")
    assert "expected a fairseq data directory, found none" in refuse("valid", tmp_path / "no")
    line = error_line(
        command("sekd_fairseq.distilled_data", data, "--generated", "x", "--output",
                tmp_path / "out", "--subset", "dev", check=False)
    )  # fmt: skip
    assert "split 'dev', found ['test'" in line
    line = error_line(train(data, tmp_path / "save", "--valid-subset", "dev", "--criterion",
                            "cross_entropy", check=False))  # fmt: skip
    assert "split 'dev', found ['test'" in line
    line = error_line(train(data, tmp_path / "save", "--num-batch-buckets", "4", "--criterion",
                            "cross_entropy", check=False))  # fmt: skip
    assert "--num-batch-buckets: expected 0" in line


def test_a_part_that_is_not_distilled_is_said(text: Path, data: Path, tmp_path: Path) -> None:
    own = binarise_as("mmap", text, data, tmp_path / "bin")
    for path in list(own.glob("valid.en-de.*")):
        (own / path.name.replace("valid", "train1")).write_bytes(path.read_bytes())
    lines = (text / "train.de").read_text().splitlines()
    (tmp_path / "out").write_text("".join(f"H-{i}\t-1\t{w}\n" for i, w in enumerate(lines)))
    printed = command(
        "sekd_fairseq.distilled_data", own, "--generated", tmp_path / "out", "--output",
        tmp_path / "distilled",
    )  # fmt: skip
    assert "holds train1 as it is" in printed


def test_places_beyond_two_gibibytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        sentences = [torch.tensor([4, 5, 2]), torch.tensor([6, 2])]
        write_indexed(tmp_path / name, "mmap", sentences, 100_000)
    builder: Any = indexed_dataset.make_builder(f"{tmp_path}/all.bin", "mmap", vocab_size=100_000)
    for name in ("first", "second"):
        builder.merge_file_(str(tmp_path / name))
    # As of many files: sums are not kept in the 32 bits of a length.
    writer = indexed_dataset.MMapIndexedDataset.Index.writer(f"{tmp_path}/x.idx", np.int32)
    with writer as index:
        places = index._get_pointers([2**31 - 1, *builder._sizes])
    assert places == [4 * (2**31 - 1) * (i > 0) + 4 * n for i, n in enumerate((0, 0, 3, 5, 8))]
    assert all(type(size) is int for size in builder._sizes)
    builder.finalize(f"{tmp_path}/all.idx")
    dictionary = Dictionary()
    found = sentences_of(f"{tmp_path}/all", "mmap", dictionary)
    assert [found[i].tolist() for i in range(4)] == [[4, 5, 2], [6, 2], [4, 5, 2], [6, 2]]
    # Where they were: the last sentence ends elsewhere than the file.
    content = bytearray((tmp_path / "all.idx").read_bytes())
    content[-8:] = (2**32 - 40).to_bytes(8, "little")
    (tmp_path / "all.idx").write_bytes(content)
    with pytest.raises(
        UserError, match=r"all.idx: expected sentences up to the end of .*all.bin, 40"
    ):
        sentences_of(f"{tmp_path}/all", "mmap", dictionary)


def test_the_old_format_has_the_tokens_of_the_new(text: Path, data: Path, tmp_path: Path) -> None:
    own = binarise_as("cached", text, data, tmp_path / "own")
    dictionary = Dictionary.load(str(data / "dict.de.txt"))
    old, new = (side_of(folder, "valid", ("en", "de"), "de", dictionary) for folder in (own, data))
    assert len(old) == len(new)
    assert all(torch.equal(old[i].int(), new[i].int()) for i in reversed(range(len(new))))
