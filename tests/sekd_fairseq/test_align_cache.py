"""A cache brought to another tokenizer's tokens, by the command."""

from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

from sekd_fairseq import align_cache
from sekd_fairseq.align_cache import Side, aligned_row
from sekd_fairseq.errors import CacheError
from sekd_fairseq.teacher_cache import TeacherCache, hash_symbols, hash_targets, write_shard
from sekd_fairseq.teacher_cache.description import describe
from sekd_fairseq.teacher_cache.finish import finish_cache
from sekd_fairseq.teacher_cache.format import payload_dtypes
from sekd_fairseq.teacher_cache.reader import CachedSentence
from sekd_fairseq.teacher_cache.storage import publish
from sekd_fairseq.teachers.alignment import END, Pieces, Reader
from sekd_fairseq.teachers.caching import Part
from sekd_fairseq.teachers.truncation import Truncation

from .conftest import binarise, command, error_line, sentence_pairs, train, write_text


def pieces(folder: Path, size: int, pairs: list[tuple[str, str]]) -> Path:
    """Data of these pairs in SentencePiece pieces, ``size`` of them."""
    text = folder / "text"
    write_text(text, "plain", pairs)
    sentencepiece.SentencePieceTrainer.train(
        input=[str(text / "plain.en"), str(text / "plain.de")],
        model_prefix=str(folder / "spm"),
        vocab_size=size,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    cut = [tuple(" ".join(model.encode(side, out_type=str)) for side in pair) for pair in pairs]
    write_text(text, "train", cut[:150])
    write_text(text, "valid", cut[150:])
    return binarise(text, folder / "bin")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Data in long and in short pieces, and the cache of a teacher of the long ones."""
    pairs = sentence_pairs(170, seed=4)
    long, short = (
        pieces(tmp_path_factory.mktemp(name), size, pairs)
        for name, size in (("long", 90), ("short", 40))
    )
    folder = tmp_path_factory.mktemp("teacher")
    train(
        long,
        folder,
        "--criterion",
        "cross_entropy",
        "--task",
        "translation",
        "--disable-validation",
    )
    command(
        "sekd_fairseq.build_cache", long, "--path", folder / "checkpoint_last.pt", "--output",
        folder / "cache", "--cpu", "--top-k", "8", "--shard-sentences", "60", "--allow-implausible",
    )  # fmt: skip
    return long, short, folder / "cache"


def align(
    cache: Path | str, data: Path, student: Path, output: Path, *more: object, check: bool = True
) -> str:
    return command(
        "sekd_fairseq.align_cache", cache, "--data", data, "--student-data", student, "--output", output,
        *more, check=check,
    )  # fmt: skip


def test_of_one_tokenizer_the_shards_are_the_same(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fsspec")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    long, _, cache = folders
    for split in ("train", "valid"):  # the command is a fork, which has the same memory
        publish(cache / split, f"memory://align/{split}")
    printed = align("memory://align", long, long, tmp_path / "same")
    assert "100.00% of the student's tokens carry a teacher; 100.00% one to one" in printed
    for split in ("train", "valid"):
        for shard in (cache / split).glob("shard-*"):
            assert shard.read_bytes() == (tmp_path / "same" / split / shard.name).read_bytes()


def test_of_one_tokenizer_that_cut_otherwise_nothing_is_shifted() -> None:
    both = Reader(*[Pieces([None, None, END, None, b" ab", b" a", b"b"]) for _ in range(2)])
    p = {4: 0.6, 5: 0.3}, {2: 0.9}  # the teacher at " ab" and at the end
    row = CachedSentence(
        target_hash=0,
        support_size=np.array([2, 1], np.uint16),
        gold_logprob=np.log(np.array([0.6, 0.9], np.float32)),
        outside_mass=np.array([0.1, 0.1], np.float32),
        entropy=np.array([1, 1], np.float32),
        token_id=np.array([token for one in p for token in one]),
        logprob=np.log([value for one in p for value in one.values()]).astype(np.float16),
    )
    as_it_is = aligned_row(row, [4, 2], both, Truncation())
    np.testing.assert_array_equal(as_it_is["logprob"], row.logprob)
    cut = aligned_row(row, [5, 6, 2], both, Truncation())
    np.testing.assert_array_equal(cut["support_size"], [1, 1, 1])
    np.testing.assert_allclose(np.exp(cut["gold_logprob"]), [0.9, 0.6 / 0.9, 0.9], rtol=1e-3)


def test_a_student_trains_on_an_aligned_cache(
    folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    long, short, cache = folders
    printed = align(cache, long, short, tmp_path / "aligned")
    assert "parts of a teacher's token" in printed
    assert (
        "alone, with probability 1 (the rest of a piece that no other cached piece begins like"
        in printed
    )
    aligned, own = (TeacherCache.open(place / "valid") for place in (tmp_path / "aligned", cache))
    assert aligned.manifest.teacher["aligned_from"] == own.manifest.fingerprint
    for one, other in zip(aligned, own, strict=True):
        # What the sentence costs is what its parts cost, but for texts cut otherwise.
        assert one.gold_logprob.sum() >= other.gold_logprob.sum() - 1e-3
        mass = np.bincount(
            np.repeat(np.arange(len(one.support_size)), one.support_size), np.exp(one.logprob)
        )
        np.testing.assert_allclose(mass + one.outside_mass, 1.0, atol=2e-3)
    words = (
        "--criterion",
        "cached_kd",
        "--teacher-cache",
        tmp_path / "aligned",
        "--max-update",
        "3",
    )
    train(short, tmp_path / "student", *words)
    # A build that was stopped goes on to the same bytes.
    whole = {path.name: path.read_bytes() for path in (tmp_path / "aligned" / "train").iterdir()}
    for name in ("manifest.json", "shard-00001.arrow"):
        (tmp_path / "aligned" / "train" / name).unlink()
    align(cache, long, short, tmp_path / "aligned")
    assert whole == {
        path.name: path.read_bytes() for path in (tmp_path / "aligned" / "train").iterdir()
    }


def side(symbols: str, sentence: list[int]) -> Side:
    """Four times one sentence, in pieces of a letter."""
    names = ["<s>", "<pad>", "</s>", "<unk>", *symbols]
    sentences = [torch.tensor(sentence)] * 4
    hashes = hash_targets(torch.cat(sentences).numpy(), [len(sentence)] * 4)
    pieces = Pieces([None, None, END, None, *map(str.encode, symbols)])
    return Side(symbols, names, pieces, sentences, hashes)


def cache_of(
    folder: Path, teacher: str, p_gold: float, own: Side, **truncation: object
) -> TeacherCache:
    """What a teacher that is always as sure makes of ``own``, in two shards."""
    folder.mkdir(parents=True)
    dtypes = payload_dtypes(len(own.symbols))
    tokens = own.sentences[0].tolist()
    columns = {
        "support_size": np.full(len(tokens), 2),
        "gold_logprob": np.full(len(tokens), np.log(p_gold)),
        "outside_mass": np.full(len(tokens), 0.01),
        "entropy": np.ones(len(tokens)),
        "token_id": np.array([id_ for token in tokens for id_ in (token, 6)]),
        "logprob": np.log([p_gold, 0.99 - p_gold] * len(tokens)),
    }
    for shard in range(2):
        hashes = own.hashes[2 * shard :][:2]
        write_shard(folder, shard, [columns] * 2, hashes, dtypes)
    settings = {
        "split": "train",
        "vocab_size": len(own.symbols),
        "dictionary_hash": hash_symbols(own.symbols),
        "dataset_hash": "d",
        "sentences": 4,
        "shard_sentences": 2,
        "temperature": 1.0,
        "truncation": truncation or {"rule": "top_k", "k": 2},
        "teacher": {"files": [teacher], "arch": "t", "sha256": [teacher]},
    }
    return finish_cache(folder, settings, dtypes, {}, allow_implausible=True)


@pytest.mark.parametrize(("k", "capped"), [(2, 1.0), (3, 0.0)])
def test_what_has_no_reading_is_not_blamed_on_top_k(k: int, capped: float, tmp_path: Path) -> None:
    """Two tokens with 0.99 of the mass, where --top-p asks for 0.995."""
    rule = {"rule": "top_p", "p": 0.995, "floor": 1, "k": k}
    cache = cache_of(tmp_path / "cache", "t", 0.9, side("abc", [4, 5, 2]), **rule)
    assert cache.manifest.quality["capped"] == capped
    assert ("capped" in describe(tmp_path, cache.manifest)) == bool(capped)


WHOLE = Part()


def align_part(
    cache: TeacherCache, sides: tuple[Side, Side], output: Path, part: Part = WHOLE
) -> TeacherCache | None:
    return align_cache.align(cache, *sides, output, 0.5, part, allow_implausible=True)


def test_killed_it_does_not_go_on_with_another_teachers_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = theirs, _ = side("abc", [4, 5, 2]), side("bac", [5, 4, 2])
    first, second = (
        cache_of(tmp_path / name, name, p_gold, theirs)
        for name, p_gold in (("first", 0.9), ("second", 0.5))
    )
    output = tmp_path / "aligned"

    def killed(folder: Path, index: int, *rest: object) -> None:
        if index == 1:
            raise KeyboardInterrupt
        write_shard(folder, index, *rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(align_cache, "write_shard", killed)
        align_part(first, sides, output)
    with pytest.raises(CacheError, match="holds a cache with another teacher"):
        align_part(second, sides, output)
    # The rest, in parts.
    assert align_part(first, sides, output, Part(0, 2)) is None
    aligned = align_part(first, sides, output, Part(1, 2))
    assert aligned is not None
    for row in aligned:
        np.testing.assert_allclose(np.exp(row.gold_logprob), [0.9, 0.9, 0.9], rtol=1e-6)
    assert {path.name for path in output.iterdir()} == {
        "build.json", "manifest.json", "shard-00000.arrow", "shard-00001.arrow",
    }  # fmt: skip
    with pytest.raises(CacheError, match="holds a cache with another teacher"):
        align_part(second, sides, output)
    with pytest.raises(CacheError, match="found an aligned one, which has none; take another"):
        aligned.tail_law()


def test_what_does_not_belong_together_is_refused(
    folders: tuple[Path, Path, Path], data: Path, tmp_path: Path
) -> None:
    long, short, cache = folders
    other = pieces(tmp_path / "other", 40, sentence_pairs(170, seed=5))
    line = error_line(align(cache, long, other, tmp_path / "no", check=False))
    assert "--min-share" in line and not list((tmp_path / "no").glob("*/shard*"))
    line = error_line(align(cache, short, long, tmp_path / "no", check=False))
    assert "expected the target dictionary" in line
    line = error_line(align(cache, long, data, tmp_path / "no", check=False))
    assert "SentencePiece" in line
    line = error_line(align(cache, long, tmp_path, tmp_path / "no", check=False))
    assert "expected a binarised split 'train'" in line
