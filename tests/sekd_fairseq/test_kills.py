"""Killed at any instant and started again, every command ends in the same result.

Building caches is in test_build_cache.py. One kill of each here, seven with ``--slow``.
"""

import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from analysis.runs.simulated import write_study

from .conftest import (
    command,
    error_line,
    needs_whole_disk,
    parameters,
    start_command,
    train,
    train_arguments,
)


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    return 7 if request.config.getoption("--slow") else 1


def kill_at_random_instants(
    words: Callable[[Path], list[object]], whole: Path, killed: Path, kills: int
) -> None:
    """Run once to the end in ``whole``; in ``killed`` stop it some times, then let it end."""
    start = time.monotonic()
    command(*words(whole))
    duration = time.monotonic() - start
    generator = random.Random(6)
    for _ in range(kills):
        running = start_command(*words(killed))
        time.sleep(generator.uniform(0.3, 1.0) * duration)
        os.kill(running, signal.SIGKILL)
        os.waitpid(running, 0)
    command(*words(killed))


def files(folder: Path) -> dict[str, bytes]:
    """The files of a folder; a kill may leave temporary ones, under names that nobody looks at."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    }


def test_training(data: Path, cache: Path, tmp_path: Path, kills: int) -> None:
    def words(save: Path) -> list[object]:
        return train_arguments(
            data, save, "--criterion", "self_evolution_kd", "--teacher-cache", cache, "--lr", "1e-3",
            "--gamma-type", "running_quantile", "--max-update", 40, "--save-interval-updates", 3,
            "--keep-interval-updates", 2, "--disable-validation",
        )  # fmt: skip

    kill_at_random_instants(words, tmp_path / "whole", tmp_path / "killed", kills)
    whole, killed = (parameters(tmp_path / n / "checkpoint_last.pt") for n in ("whole", "killed"))
    assert whole.equal(killed)


def test_scoring(data: Path, cache: Path, teacher: Path, tmp_path: Path, kills: int) -> None:
    def words(run: Path) -> list[object]:
        return [
            "sekd_fairseq.score", data, "--path", teacher, "--teacher-cache", cache, "--run", run,
            "--subset", "train", "--cpu", "--max-tokens", 20, "--method", "finetune",
        ]  # fmt: skip

    kill_at_random_instants(words, tmp_path / "a" / "run", tmp_path / "b" / "run", kills)
    assert files(tmp_path / "a" / "run") == files(tmp_path / "b" / "run")


@pytest.mark.slow
def test_analysis(tmp_path: Path, kills: int) -> None:
    runs = write_study(tmp_path / "runs", seeds=2, sentences=30)

    def words(output: Path) -> list[object]:
        return ["analysis.transfer", runs, "--output", output, "--resamples", 100]

    kill_at_random_instants(words, tmp_path / "whole", tmp_path / "killed", kills)
    assert files(tmp_path / "whole") == files(tmp_path / "killed")


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes, here and in forks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
@needs_whole_disk
def test_a_full_disk_and_directories_that_cannot_be_made(
    data: Path, cache: Path, teacher: Path, tmp_path: Path
) -> None:
    runs = write_study(tmp_path / "runs", seeds=1, sentences=20)
    blocked = tmp_path / "file"
    blocked.write_text("no directory")

    def commands(output: Path) -> list[list[object]]:
        build = ["sekd_fairseq.build_cache", data, "--path", teacher, "--cpu", "--output"]
        score = ["sekd_fairseq.score", data, "--path", teacher, "--teacher-cache", cache, "--cpu"]
        return [
            [*build, output / "cache", "--subset", "train"],
            [*score, "--subset", "train", "--method", "finetune", "--run", output / "run"],
            ["analysis.transfer", runs, "--resamples", 100, "--output", output / "report"],
        ]

    for words in commands(tmp_path / "full"):
        with full_disk(8000):
            line = error_line(command(*words, check=False))
        assert "File too large" in line, line
    for words in commands(blocked):
        assert "file" in error_line(command(*words, check=False))
    # With room they go on from what is there.
    for words in commands(tmp_path / "full"):
        command(*words)


def test_a_damaged_checkpoint_is_named(data: Path, tmp_path: Path) -> None:
    base = ("--criterion", "cross_entropy", "--disable-validation")
    train(data, tmp_path, *base, "--max-update", 2)
    last = tmp_path / "checkpoint_last.pt"
    last.write_bytes(last.read_bytes()[:-5000])
    line = error_line(train(data, tmp_path, *base, "--max-update", 4, check=False))
    assert "checkpoint_last.pt: expected a whole checkpoint" in line and "--restore-file" in line
    line = error_line(
        command(
            "sekd_fairseq.build_cache", data, "--path", last, "--output", tmp_path / "cache",
            "--cpu", check=False,
        )
    )  # fmt: skip
    assert "damaged" in line
