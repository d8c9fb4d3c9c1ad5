"""The cache format: what is written comes back, and any damage is refused."""

import json
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fairseq.data import indexed_dataset

from analysis.runs.files import atomic_write, read_json, sealed_json
from sekd_fairseq import datasets
from sekd_fairseq.errors import CacheError
from sekd_fairseq.splits import write_indexed
from sekd_fairseq.teacher_cache import TeacherCache, hash_targets
from sekd_fairseq.teacher_cache.finish import finish_cache
from sekd_fairseq.teacher_cache.format import MANIFEST

from .conftest import command, error_line


def test_hash_depends_on_tokens_order_and_length() -> None:
    tokens = np.array([4, 5, 2, 5, 4, 2, 4, 5, 2, 2])
    first, swapped, same, longer = hash_targets(tokens, [3, 3, 3, 1])[:4].tolist()
    assert first == same
    assert len({first, swapped, longer}) == 3
    # The value is part of the format: a cache must be readable by later versions.
    assert hash_targets(np.array([4, 5, 2]), [3]).tolist() == [first]
    assert first == 1675194816700735391


def test_hashes_of_a_memory_map_are_those_of_its_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "HASH_CHUNK", 4)
    generator = np.random.default_rng(0)
    rows = [generator.integers(4, 50, length) for length in (3, 1, 7, 2, 5, 4, 1, 6, 2, 3)]
    rows[5][[0, 2]] = 1  # padding, which is no token of a sentence
    hashes = np.concatenate([hash_targets(row[row != 1], [(row != 1).sum()]) for row in rows])
    assert len({*hashes}) == len(rows)
    for size in (50, 100_000):  # of two and of four bytes a token
        write_indexed(tmp_path / f"{size}", "mmap", map(torch.from_numpy, rows), size)
        dataset = indexed_dataset.make_dataset(str(tmp_path / f"{size}"), "mmap")
        assert datasets.target_hashes(dataset, pad=1).tolist() == hashes.tolist()
        tokens, lengths = datasets.mapped(dataset, 8, 10)
        assert tokens is not None and tokens.tolist() == [*rows[8], *rows[9]]
        assert lengths.tolist() == [2, 3]


def test_rows_are_distributions(cache: Path) -> None:
    opened = TeacherCache.open(cache / "train")
    assert len(opened) == 203 and len(opened.manifest.shards) == 5
    for sentence in (0, 49, 50, 202, -1):
        row = opened[sentence]
        assert (row.support_size == 6).all()
        entries = row.logprob.astype(float).reshape(-1, 6)
        mass = np.exp(entries).sum(axis=1) + row.outside_mass
        np.testing.assert_allclose(mass, 1.0, atol=2e-3)  # float16
        np.testing.assert_allclose(entries[:, 0], row.gold_logprob, rtol=1e-3, atol=1e-6)
        assert (np.diff(entries[:, 1:], axis=1) <= 0).all()
        assert all(len(set(ids)) == 6 for ids in row.token_id.reshape(-1, 6).tolist())
    assert opened[-1].target_hash == opened[202].target_hash
    with pytest.raises(IndexError):
        opened[203]


def test_a_pickled_reader_reads_the_same(cache: Path) -> None:
    opened = TeacherCache.open(cache / "valid")
    again = pickle.loads(pickle.dumps(opened))
    assert (again[3].token_id == opened[3].token_id).all()


def test_a_flipped_byte_in_any_place_is_found(cache_copy: Path) -> None:
    directory = cache_copy / "valid"
    reference = TeacherCache.open(directory)
    rows = [reference[i] for i in range(len(reference))]
    hashes = reference.target_hashes()
    path = directory / "shard-00000.arrow"
    original = path.read_bytes()
    for place in np.linspace(0, len(original) - 1, 150).astype(int):
        damaged = bytearray(original)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(CacheError):
            TeacherCache.open(directory).verify()
        # Without the full check, a row that can be read is the right row.
        opened = TeacherCache.open(directory)
        try:
            opened.check_targets(hashes, "valid")
            for i, row in enumerate(rows):
                for one, other in zip(opened[i][1:], row[1:], strict=True):
                    np.testing.assert_array_equal(one, other)
        except CacheError:
            pass


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "shard-00001.arrow").unlink(), "found no file"),
        (lambda d: (d / "shard-00001.arrow").write_bytes(b"short"), "found 5"),
        (lambda d: (d / MANIFEST).unlink(), "unfinished build"),
        (lambda d: (d / MANIFEST).write_text("{"), "not a manifest"),
        (lambda d: (d / MANIFEST).write_text("[]"), "not a manifest"),
    ],
)
def test_missing_short_or_broken_files(cache_copy: Path, damage, words: str) -> None:
    damage(cache_copy / "train")
    with pytest.raises(CacheError, match=words):
        TeacherCache.open(cache_copy / "train")
    assert words in error_line(command("sekd_fairseq.inspect_cache", cache_copy, check=False))


def test_swapped_shards_and_edited_manifest(cache_copy: Path) -> None:
    directory = cache_copy / "train"
    first, second = directory / "shard-00000.arrow", directory / "shard-00001.arrow"
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    with pytest.raises(CacheError):
        opened = TeacherCache.open(directory)  # refuses by size, unless the sizes are equal
        opened.verify()
    first.write_bytes(one)
    second.write_bytes(other)
    TeacherCache.open(directory).verify()
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest["temperature"] = 2.0
    (directory / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match="edited"):
        TeacherCache.open(directory)
    manifest = {**manifest, "format_version": 99}
    del manifest["checksum"]
    (directory / MANIFEST).write_bytes(sealed_json(manifest))
    with pytest.raises(CacheError, match="found 99"):
        TeacherCache.open(directory)


def test_no_byte_that_describes_a_shard_is_believed(cache_copy: Path) -> None:
    """Whatever its Arrow messages say (they once led the reader out of the file), the rows are those
    that were written."""
    directory = cache_copy / "valid"
    rows = list(TeacherCache.open(directory))
    path = directory / "shard-00000.arrow"
    original = path.read_bytes()
    layout = json.loads((directory / MANIFEST).read_text())["shards"][0]["layout"]
    first, end = min(layout.values()), max(layout.values())
    for place in [*range(0, first, 5), *range(end + 2048, len(original), 5)]:
        damaged = bytearray(original)
        damaged[place] ^= 0xF1
        path.write_bytes(damaged)
        for row, known in zip(TeacherCache.open(directory), rows, strict=True):
            assert all(np.array_equal(*pair) for pair in zip(row[:-1], known[:-1], strict=True))
    with pytest.raises(CacheError, match="SHA-256"):
        TeacherCache.open(directory).verify()


def test_target_hashes_are_protected_without_the_data(cache_copy: Path) -> None:
    directory = cache_copy / "valid"
    path = directory / "shard-00000.arrow"
    damaged = bytearray(path.read_bytes())
    damaged[
        json.loads((directory / MANIFEST).read_text())["shards"][0]["layout"]["target_hash"]
    ] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CacheError, match="target_hash does not match"):
        TeacherCache.open(directory)[3]


def test_a_cache_of_the_first_version_is_brought_up_to_date(cache_copy: Path) -> None:
    """Its shards carry no checksum and its manifest says nothing of their inside."""
    directory = cache_copy / "train"
    known = TeacherCache.open(directory)
    rows, fingerprint = list(known), known.manifest.fingerprint
    content, _ = read_json(directory / MANIFEST)
    for shard in content["shards"]:
        del shard["layout"], shard["target_hash_crc"]
    old = sealed_json({**content, "format_version": 1})
    (directory / MANIFEST).write_bytes(old)
    line = error_line(command("sekd_fairseq.inspect_cache", directory, check=False))
    assert "found 1" in line and "inspect_cache" in line and "--upgrade" in line
    path = directory / content["shards"][1]["file"]
    whole = path.read_bytes()
    path.write_bytes(whole[:500] + b"\xf1" + whole[501:])
    line = error_line(command("sekd_fairseq.inspect_cache", directory, "--upgrade", check=False))
    assert "shard-00001.arrow" in line and (directory / MANIFEST).read_bytes() == old
    path.write_bytes(whole)
    command("sekd_fairseq.inspect_cache", cache_copy, "--upgrade", "--verify")
    opened = TeacherCache.open(directory)
    assert opened.manifest.fingerprint == fingerprint
    for row, before in zip(opened, rows, strict=True):
        assert all(np.array_equal(*pair) for pair in zip(row[:-1], before[:-1], strict=True))


def test_a_shard_that_was_damaged_before_the_end_of_its_build(cache_copy: Path) -> None:
    directory = cache_copy / "valid"
    settings = {
        key: value
        for key, value in read_json(directory / MANIFEST)[0].items()
        if key in ("split", "vocab_size", "dictionary_hash", "dataset_hash", "sentences")
        or key in ("shard_sentences", "temperature", "truncation", "teacher")
    }
    dtypes = TeacherCache.open(directory).manifest.dtypes
    before = (directory / MANIFEST).read_bytes()
    path = directory / "shard-00000.arrow"
    whole = path.read_bytes()
    (directory / MANIFEST).unlink()
    for place in (200, len(whole) // 2, len(whole) - 300):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CacheError, match=r"shard-00000.arrow: expected a whole shard"):
            finish_cache(directory, settings, dtypes, {})
    path.write_bytes(whole)
    finish_cache(directory, settings, dtypes, json.loads(before)["versions"])
    assert (directory / MANIFEST).read_bytes() == before


def test_a_split_that_is_not_there_is_built_by_the_command_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"--path TEACHER --output CACHE --subset test$"):
        TeacherCache.open(tmp_path / "test")


def test_inspect_shows_and_verifies(cache: Path) -> None:
    out = command("sekd_fairseq.inspect_cache", cache, "--verify")
    for words in ("203 sentences", "bytes per token", "perplexity", "every checksum matches"):
        assert words in out
    assert "no" in error_line(command("sekd_fairseq.inspect_cache", cache / "nothing", check=False))


def test_parquet_holds_every_row(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    command("sekd_fairseq.inspect_cache", cache / "train", "--to-parquet", path)
    table = pd.read_parquet(path)
    opened = TeacherCache.open(cache / "train")
    assert len(table) == opened.manifest.tokens
    for sentence in (0, 77, 202):
        row, part = opened[sentence], table[table["sentence"] == sentence]
        assert part["position"].tolist() == list(range(len(row.entropy)))
        assert np.concatenate(part["token_id"].to_list()).tolist() == row.token_id.tolist()
        assert np.concatenate(part["logprob"].to_list()).tolist() == row.logprob.tolist()
        assert part["token"].tolist() == row.token_id.reshape(-1, 6)[:, 0].tolist()
        np.testing.assert_array_equal(part["entropy"], row.entropy)
    line = error_line(
        command("sekd_fairseq.inspect_cache", cache, "--to-parquet", path, check=False)
    )
    assert "one split" in line


def test_restoration_error_is_the_kl_from_the_dense_teacher(
    data: Path, teacher: Path, cache: Path, tmp_path: Path
) -> None:
    from sekd_fairseq.inspect_cache import dense_row, restoration_error

    out = command(
        "sekd_fairseq.inspect_cache", cache, "--verify", "--against", teacher, "--data", data
    )
    assert "is not the cache's" not in out
    for how in ("evenly", "by the tail law"):  # once for each of three splits
        assert out.count(f"KL from the dense teacher, outside mass spread {how}") == 3
    other = tmp_path / "again.pt"
    torch.save(torch.load(teacher, map_location="cpu") | {"note": "saved again"}, other)
    out = command(
        "sekd_fairseq.inspect_cache", cache / "valid", "--verify", "--against", other, "--data", data
    )  # fmt: skip
    assert "again.pt" in out and f"is not the cache's teacher: {teacher.name}" in out
    assert "KL from that other model" in out and "dense teacher" not in out
    vocab = TeacherCache.open(cache / "valid").manifest.vocab_size
    row = TeacherCache.open(cache / "valid")[2]
    dense = dense_row(row, vocab)
    np.testing.assert_allclose(dense.sum(axis=1), 1.0, atol=1e-12)
    # Spread evenly: the tokens outside a support are alike.
    law = TeacherCache.open(cache / "valid").tail_law()
    by_law = dense_row(row, vocab, law)
    np.testing.assert_allclose(by_law.sum(axis=1), 1.0, atol=1e-12)
    support = row.token_id.reshape(-1, 6)[0]
    ratio = np.delete(by_law[0], support) / np.delete(law, support)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)
    outside = np.delete(dense[0], row.token_id.reshape(-1, 6)[0])
    np.testing.assert_allclose(
        outside, row.outside_mass[0] / (vocab - 6), rtol=2e-3
    )  # fmt: skip
    errors = {}
    for k in ("0", "12", "3"):
        command(
            "sekd_fairseq.build_cache", data, "--path", teacher, "--output", tmp_path / k, "--cpu",
            "--subset", "valid", "--top-k", k,
        )  # fmt: skip
        found = restoration_error(
            TeacherCache.open(tmp_path / k / "valid"), str(teacher), str(data), 100
        )
        errors[k] = found.mean()
        assert found.min() > -1e-6
    assert errors["0"] < 1e-6 < errors["12"] < errors["3"]
    line = error_line(
        command("sekd_fairseq.inspect_cache", cache, "--against", teacher, check=False)
    )
    assert "--data" in line


def test_atomic_write_leaves_nothing_of_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(RuntimeError), atomic_write(path) as stream:
        stream.write(b"half")
        raise RuntimeError
    assert path.read_text() == "before"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
