"""Commands that read a cache at an address do as with the folder, and leave nothing half."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sekd_fairseq import rounds
from sekd_fairseq.errors import CacheError, UserError
from sekd_fairseq.teacher_cache import TeacherCache
from sekd_fairseq.teacher_cache.storage import fetched, publish, split_folder, storage

from .conftest import (
    command,
    error_line,
    parameters,
    train,
    train_arguments,
    train_in_two_processes,
)
from .test_rounds import arguments, commands  # noqa: F401 (a fixture)
from .training import PLUGIN, SE_KD, records


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this machine keeps what it fetches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "sekd_fairseq"


@pytest.fixture
def remote(bucket: str, cache: Path, home: Path) -> str:
    """The address of the cache that the tests share."""
    for split in ("train", "valid", "test"):
        publish(cache / split, f"{bucket}/cache/{split}")
    return f"{bucket}/cache"


def whole(home: Path) -> list[str]:
    """The splits that were fetched; of each its files are all there, and nothing else is."""
    folders = sorted(path for path in home.iterdir() if path.is_dir())
    for folder in folders:
        shards = {shard.file for shard in TeacherCache.open(folder).manifest.shards}
        names = {path.name for path in folder.iterdir()}
        assert names - {"tail.arrow"} == shards | {"manifest.json"}
    return [folder.name.rsplit("-", 1)[0] for folder in folders]


def test_a_training_from_s3_is_that_from_the_folder(
    data: Path, cache: Path, remote: str, home: Path, tmp_path: Path
) -> None:
    here, there = (
        train(data, tmp_path / name, *SE_KD, "--teacher-cache", place)
        for name, place in (("here", cache), ("there", remote))
    )
    for prefix in ("", "valid_"):
        figures = [
            [{key: one[key] for key in one if "loss" in key or "kl" in key} for one in found]
            for found in (records(here, prefix), records(there, prefix))
        ]
        assert figures[0] and figures[0] == figures[1]
    one, other = (tmp_path / name / "checkpoint_last.pt" for name in ("here", "there"))
    assert torch.equal(parameters(one), parameters(other))
    assert whole(home) == ["train", "valid"]  # no more than was asked for
    # It resumes from either, and with the checkpoint alone the address is known.
    with storage(remote) as (system, root):  # what is here is not fetched again
        system.rm_file(f"{root}/train/shard-00000.arrow")
    train(data, tmp_path / "there", *SE_KD, "--teacher-cache", cache, "--max-update", "13")
    train(data, tmp_path / "here", *SE_KD, "--teacher-cache", remote, "--max-update", "13")
    assert torch.equal(parameters(one), parameters(other))
    validate = ("fairseq_cli.validate", data, *PLUGIN, "--valid-subset", "test", "--cpu")
    command(*validate, "--path", one, "--max-tokens", "300", cwd=tmp_path)
    assert whole(home) == ["test", "train", "valid"]


def test_score_and_inspect_read_an_address(
    data: Path, cache: Path, remote: str, home: Path, student: tuple[Path, str], tmp_path: Path
) -> None:
    shown = command("sekd_fairseq.inspect_cache", remote)
    assert f"{remote}/train\n" in shown and not home.exists()  # manifests say it all
    local = command("sekd_fairseq.inspect_cache", cache).replace(str(cache), remote)
    assert shown == local
    assert "every checksum matches" in command(
        "sekd_fairseq.inspect_cache", f"{remote}/valid", "--verify"
    )
    assert whole(home) == ["valid"]
    refused = command("sekd_fairseq.inspect_cache", remote, "--upgrade", check=False)
    assert "expected a directory" in error_line(refused)
    path = student[0] / "checkpoint_last.pt"
    written = []
    for name, place in (("here", cache), ("there", remote)):
        command(
            "sekd_fairseq.score", data, "--path", path, "--teacher-cache", place, "--run",
            tmp_path / name, "--cpu",
        )  # fmt: skip
        (tokens,) = (tmp_path / name / "tokens" / "test").glob("*.parquet")
        written.append(tokens.read_bytes())
    assert written[0] == written[1]


@pytest.mark.slow
def test_rounds_from_s3_are_those_from_the_folder(
    data: Path,
    teacher: Path,
    cache: Path,
    remote: str,
    home: Path,
    tmp_path: Path,
    commands: list[str],  # noqa: F811
) -> None:
    sizes = ("--rounds", "1", "--updates", "2")
    best = []
    for name, place in (("here", cache), ("there", remote)):
        rounds.main(arguments(data, teacher, place, tmp_path / name, *sizes))
        best.append(parameters(tmp_path / name / "checkpoints" / "checkpoint_best.pt"))
    assert torch.equal(*best) and whole(home) == ["train", "valid"]
    shutil.rmtree(home)  # what was fetched is fetched again where it is asked for
    commands.clear()
    rounds.main(arguments(data, teacher, remote, tmp_path / "there", *sizes))
    assert commands == ["sekd_fairseq.build_cache"] and whole(home) == ["train", "valid"]


def test_a_manifest_is_read_once(remote: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    with storage(remote) as (system, _):
        cat = system.cat_file

        def counted(path: str, **options: Any) -> Any:
            read.append(path)
            return cat(path, **options)

        monkeypatch.setattr(system, "cat_file", counted)  # file systems are made once
        folder = fetched(f"{remote}/valid")
    assert [path.rsplit("/", 1)[-1] for path in read] == ["manifest.json"]
    assert folder.exists() and whole(home) == ["valid"]


def test_two_processes_fetch_once(data: Path, remote: str, home: Path, tmp_path: Path) -> None:
    options = (*SE_KD, "--teacher-cache", remote, "--max-update", "2", "--max-tokens", "150")
    train_in_two_processes(train_arguments(data, tmp_path / "save", *options))
    assert whole(home) == ["train", "valid"]


def test_what_is_missing_is_one_line(
    data: Path, remote: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(place: str) -> str:
        options = (*SE_KD, "--teacher-cache", place)
        return error_line(train(data, tmp_path / "save", *options, check=False))

    with storage(remote) as (system, root):
        shard = system.cat_file(f"{root}/train/shard-00002.arrow")
        system.rm_file(f"{root}/train/shard-00002.arrow")
    assert "train/shard-00002.arrow: expected a file of the cache, found none" in refusal(remote)
    with storage(remote) as (system, root):
        system.pipe_file(f"{root}/train/shard-00002.arrow", shard[:-1] + bytes([shard[-1] ^ 1]))
    assert "train/shard-00002.arrow: does not match its checksum" in refusal(remote)
    (kept,) = home.glob("train-*/")
    assert not list(kept.glob("*00002*")) and not (kept / "manifest.json").exists()
    with storage(remote) as (system, root):
        system.pipe_file(f"{root}/train/shard-00002.arrow", shard)
        system.rm_file(f"{root}/valid/manifest.json")
    assert f"{remote}/valid: expected a teacher cache" in refusal(remote)
    nowhere = refusal("s3://no-such-bucket/cache")
    assert "s3://no-such-bucket/cache/valid: expected a teacher cache" in nowhere
    assert "bucket does not exist" in nowhere and "sekd_fairseq.copy_cache" in nowhere
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    assert f"{remote}/valid: cannot be read or written" in refusal(remote)


def test_a_stopped_fetch_leaves_nothing_half(
    remote: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with storage(remote) as (system, _):
        whole_file = system.get_file

        def stopped(source: str, target: str) -> None:
            if "00001" in source:
                Path(target).write_bytes(b"half")
                raise KeyboardInterrupt
            whole_file(source, target)

        monkeypatch.setattr(system, "get_file", stopped)  # file systems are made once
        with pytest.raises(KeyboardInterrupt):
            fetched(f"{remote}/train")
        (folder,) = home.glob("train-*/")
        assert [path.name for path in folder.iterdir()] == ["shard-00000.arrow"]
        monkeypatch.setattr(system, "get_file", whole_file)
    before = (folder / "shard-00000.arrow").stat().st_mtime_ns
    assert fetched(f"{remote}/train") == folder and whole(home) == ["train"]
    assert (folder / "shard-00000.arrow").stat().st_mtime_ns == before
    (folder / "shard-00001.arrow").unlink()  # a temporary folder that was cleaned
    assert split_folder(remote, "train") == folder and whole(home) == ["train"]


def test_a_cache_built_anew_is_fetched_anew(cache: Path, home: Path) -> None:
    pytest.importorskip("fsspec")
    url = "memory://anew/cache/train"
    publish(cache / "train", url)
    first = fetched(url)
    with storage(url) as (system, root):
        system.rm(root, recursive=True)
    with pytest.raises(CacheError, match="expected a teacher cache"):
        fetched(url)
    publish(cache / "valid", url)
    second = fetched(url)
    assert first != second and len(TeacherCache.open(second)) == 21
    with pytest.raises(UserError, match="fsspec can open"):
        fetched("nowhere://cache/train")
