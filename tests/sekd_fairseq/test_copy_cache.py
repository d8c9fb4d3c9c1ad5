"""Caches in object storage: whole there and whole back, whatever stops a copy."""

import errno
import fcntl
import mmap
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.runs.files import hash_file
from sekd_fairseq import copy_cache
from sekd_fairseq.errors import CacheError, UserError
from sekd_fairseq.teacher_cache import TeacherCache, write_shard
from sekd_fairseq.teacher_cache.finish import finish_cache
from sekd_fairseq.teacher_cache.format import payload_dtypes
from sekd_fairseq.teacher_cache.storage import fetch, fetched, publish, remote_splits, storage
from sekd_fairseq.teacher_cache.tail import write_tail

pytest.importorskip("fsspec")


def built(folder: Path, seed: int = 0) -> Path:
    """A cache of made-up rows in three shards, with a tail law."""
    generator = np.random.default_rng(seed)
    dtypes = payload_dtypes(50)
    settings: dict[str, Any] = {
        "split": folder.name,
        "vocab_size": 50,
        "dictionary_hash": "",
        "dataset_hash": "",
        "sentences": 8,
        "shard_sentences": 3,
        "temperature": 1.0,
        "truncation": {"rule": "top_k", "k": 2},
        "teacher": {"files": [], "arch": "", "parameters": []},
    }
    folder.mkdir(parents=True)
    for index in range(3):
        rows = [
            {
                "support_size": np.full(4, 2),
                "gold_logprob": np.full(4, -0.5),
                "outside_mass": np.full(4, 0.1),
                "entropy": np.full(4, 0.5),
                "logprob": np.full(8, -1.0),
                "token_id": generator.integers(4, 50, 8),
            }
            for _ in range(3 if index < 2 else 2)
        ]
        write_shard(folder, index, rows, np.arange(len(rows)).astype(np.uint64), dtypes)
    write_tail(folder, generator.random(50), settings)
    finish_cache(folder, settings, dtypes, {}, allow_implausible=True)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(params=["memory", "s3"])
def address(request: pytest.FixtureRequest) -> str:
    """An address to copy to: in this process, or of an S3 server."""
    if request.param == "s3":
        bucket: str = request.getfixturevalue("bucket")
        return f"{bucket}/cache"
    with storage("memory://bucket") as (system, root):
        if system.exists(root):
            system.rm(root, recursive=True)
    return "memory://bucket/cache"


def test_there_and_back(address: str, tmp_path: Path) -> None:
    train, valid = built(tmp_path / "here" / "train"), built(tmp_path / "here" / "valid", 1)
    copy_cache.main([str(tmp_path / "here"), f"{address}/"])
    assert [name for _, name in remote_splits(address)] == ["train", "valid"]
    copy_cache.main([address, str(tmp_path / "back")])
    for split in (train, valid):
        assert content(split) == content(tmp_path / "back" / split.name)
    TeacherCache.open(tmp_path / "back" / "train").verify()
    # Nothing is left to do; of one split's own address only that is copied.
    assert publish(train, f"{address}/train") == 0
    assert fetch(f"{address}/train", tmp_path / "back" / "train") == 0
    copy_cache.main([f"{address}/valid", str(tmp_path / "one")])
    assert content(tmp_path / "one") == content(valid)
    other = built(tmp_path / "other" / "train", 2)
    with pytest.raises(CacheError, match="another cache"):
        publish(other, f"{address}/train")
    with pytest.raises(CacheError, match="another cache"):
        fetch(f"{address}/train", other)


def stopped(directory: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy one shard of a cache to an address."""

    def hash_or_stop(path: Path) -> str:
        if path.name == "shard-00001.arrow":
            raise OSError("stopped")
        return hash_file(path)

    with monkeypatch.context() as patched:
        patched.setattr("sekd_fairseq.teacher_cache.storage.hash_file", hash_or_stop)
        with pytest.raises(UserError, match="stopped"):
            publish(directory, url)


def test_a_stopped_copy_goes_on(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = built(tmp_path / "train")
    url = f"{address}/train"
    stopped(train, url, monkeypatch)
    with pytest.raises(CacheError, match="expected a teacher cache"):
        fetch(url, tmp_path / "early")
    missing = ("shard-00001.arrow", "shard-00002.arrow", "tail.arrow", "manifest.json")
    assert publish(train, url) == sum((train / name).stat().st_size for name in missing)
    # A file that was deleted there, because it was damaged, is sent again.
    with storage(url) as (system, root):
        system.rm_file(f"{root}/shard-00001.arrow")
    assert publish(train, url) == (train / "shard-00001.arrow").stat().st_size
    back = tmp_path / "back"
    fetch(url, back)
    (back / "manifest.json").unlink()
    (back / "shard-00002.arrow").write_bytes(b"half")
    (back / "tail.arrow").write_bytes(b"of another cache")
    fetch(url, back)
    assert content(back) == content(train)


def test_a_copy_in_the_place_of_another_cache_begins_anew(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{address}/train"
    one, two = built(tmp_path / "one" / "train"), built(tmp_path / "two" / "train", 1)
    names = ("shard-00000.arrow", "tail.arrow")
    assert all((one / name).stat().st_size == (two / name).stat().st_size for name in names)
    stopped(one, url, monkeypatch)
    # Of this cache alone is what lies there: not after another stop either, nor where it is not known.
    stopped(two, url, monkeypatch)
    publish(two, url)
    fetch(url, tmp_path / "back")
    assert content(tmp_path / "back") == content(two)
    with storage(url) as (system, root):
        system.rm_file(f"{root}/manifest.json")
        assert not system.exists(f"{root}/uploading")
    publish(one, url)
    fetch(url, tmp_path / "again")
    assert content(tmp_path / "again") == content(one)
    with storage(url) as (system, root):
        system.rm_file(f"{root}/manifest.json")
    (two / "tail.arrow").unlink()  # nor does a law stay that a cache does not have
    publish(two, url)
    fetch(url, tmp_path / "third")
    assert content(tmp_path / "third") == content(two)


def test_a_file_system_without_locks_serves(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = built(tmp_path / "train")
    publish(train, f"{address}/train")

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert content(fetched(f"{address}/train")) == content(train)


def test_many_shards_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = built(tmp_path / "train")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        cache = TeacherCache.open(train)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def too_many(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    cache[0]
    monkeypatch.setattr(mmap, "mmap", too_many)
    with pytest.raises(
        CacheError, match=r"each of 3 shards, found 1 open .* \(ulimit -n\)"
    ) as found:
        cache.target_hashes()
    assert "delete" not in str(found.value)


def test_damage_is_seen(address: str, tmp_path: Path) -> None:
    train = built(tmp_path / "train")
    url = f"{address}/train"
    publish(train, url)
    with storage(url) as (system, root):
        damaged = bytearray(system.cat_file(f"{root}/shard-00000.arrow"))
        damaged[len(damaged) // 2] ^= 1
        system.pipe_file(f"{root}/shard-00000.arrow", bytes(damaged))
    with pytest.raises(CacheError, match=r"shard-00000.arrow: does not match .* delete that file"):
        fetch(url, tmp_path / "back")
    assert not (tmp_path / "back" / "manifest.json").exists()
    assert not list((tmp_path / "back").glob("*00000*"))
    with storage(url) as (system, root):
        system.pipe_file(f"{root}/manifest.json", b"{}")
    with pytest.raises(CacheError, match="not a manifest"):
        fetch(url, tmp_path / "back")
    (train / "shard-00001.arrow").write_bytes(damaged)
    with pytest.raises(CacheError, match="does not match"):
        publish(train, f"{address}/again")


def test_what_is_no_address_is_refused(tmp_path: Path) -> None:
    for words in (["a", "b"], ["memory://a", "memory://b"]):
        with pytest.raises(SystemExit, match="an address"):
            copy_cache.main(words)
    with pytest.raises(UserError, match="fsspec"), storage("nowhere://x"):
        pass
    with pytest.raises(CacheError, match="expected a teacher cache"):
        remote_splits("memory://empty")
