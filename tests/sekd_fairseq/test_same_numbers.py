"""A training gives the same numbers however its batches are split, loaded and spread."""

import json
from pathlib import Path

import pytest
import torch

from .conftest import (
    ROOT,
    binarise,
    command,
    parameters,
    sentence_pairs,
    train,
    train_arguments,
    train_in_two_processes,
    write_text,
)

#: Figures of each update, as fairseq logged them when the losses had been proved.
TRACE = ROOT / "tests" / "golden" / "training_trace.json"
UPDATES = 6
FIGURES = ("loss", "nll_loss", "difficulty", "hard_share", "hard_lambda", "kl_hard", "agreement")
# Adam would turn the rounding of gradients near zero, which differs between processors, into whole
# steps: of the student, and of its teacher.
SGD = ("--optimizer", "sgd")


@pytest.fixture(scope="module")
def eight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Eight training sentences, which are one batch, two of four or one of four a process; and
    their teacher cache."""
    folder = tmp_path_factory.mktemp("eight")
    train(
        data, folder / "teacher", "--criterion", "cross_entropy", "--max-update", "80",
        "--disable-validation", *SGD, "--lr", "0.1",
    )  # fmt: skip
    teacher = folder / "teacher" / "checkpoint_last.pt"
    write_text(folder / "text", "train", sentence_pairs(8, 5))
    binarised = binarise(folder / "text", folder / "bin", data)
    command(
        "sekd_fairseq.build_cache", binarised, "--path", teacher, "--output", folder / "cache",
        "--cpu", "--subset", "train", "--top-k", "6",
    )  # fmt: skip
    return binarised, folder / "cache"


def options(cache: Path) -> list[object]:
    return [
        "--criterion", "self_evolution_kd", "--teacher-cache", cache, "--disable-validation",
        "--gamma", "0.5", "--integration", "student", "--max-tokens", "100000", "--max-update", UPDATES, "--seed", "3",
        *SGD, "--lr", "0.03",
    ]  # fmt: skip


def trace(log: str) -> list[dict[str, float]]:
    """The figures of each update, from fairseq's JSON log."""
    found = [json.loads(line[line.index("{") :]) for line in log.splitlines() if '"gnorm"' in line]
    return [{name: float(record[name]) for name in FIGURES} for record in found if "ups" in record]


def test_one_golden_trace(eight: tuple[Path, Path], tmp_path: Path) -> None:
    data, cache = eight
    golden = json.loads(TRACE.read_text(encoding="utf-8"))
    assert len(golden) == UPDATES and golden[0]["hard_share"] > 0
    ends = {}
    for name, words in {
        "batch of 8": ("--batch-size", 8),
        "two batches of 4": ("--batch-size", 4, "--update-freq", 2),
        "two workers": ("--batch-size", 8, "--num-workers", 2),
    }.items():
        log = train(data, tmp_path / name, *options(cache), *words)
        for found, expected in zip(trace(log), golden, strict=True):
            assert found == pytest.approx(expected, abs=2e-3), name
        ends[name] = parameters(tmp_path / name / "checkpoint_last.pt")
    save = tmp_path / "two processes"
    train_in_two_processes(train_arguments(data, save, *options(cache), "--batch-size", 4))
    ends["two processes"] = parameters(save / "checkpoint_last.pt")
    torch.testing.assert_close(ends["two workers"], ends["batch of 8"], rtol=0, atol=0)
    for name in ("two batches of 4", "two processes"):
        torch.testing.assert_close(ends[name], ends["batch of 8"], rtol=0, atol=2e-5, msg=name)


def test_without_a_teacher_the_task_is_fairseqs_translation(data: Path, tmp_path: Path) -> None:
    """The same batches in the same order: every update, validation and BLEU is the same."""
    words = (
        "--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1", "--dropout", "0.1",
        "--eval-bleu", "--eval-bleu-args", '{"max_len_b": 12}', "--required-batch-size-multiple", 1,
    )  # fmt: skip
    logs = [
        train(data, tmp_path / task, *words, "--task", task, *more)
        for task, *more in (("self_evolution_kd",), ("translation", "--upsample-primary", 1))
    ]
    ours, theirs = (
        [figures(line) for line in log.splitlines() if '"gnorm"' in line or '"valid_bleu"' in line]
        for log in logs
    )
    assert ours == theirs and len(ours) > 12
    ends = [
        parameters(tmp_path / name / "checkpoint_last.pt")
        for name in ("self_evolution_kd", "translation")
    ]
    assert ends[0].equal(ends[1])


def figures(line: str) -> dict[str, str]:
    """What a line of fairseq's JSON log says of the model, and not of the clock."""
    found: dict[str, str] = json.loads(line[line.index("{") :])
    clock = ("wps", "ups", "wall")
    return {name: value for name, value in found.items() if not name.endswith(clock)}


@pytest.mark.parametrize(
    ("precision", "cpu"),
    [
        pytest.param(
            "--memory-efficient-fp16", True
        ),  # the only one that fairseq has without a GPU
        pytest.param("--fp16", False, marks=pytest.mark.gpu),
        pytest.param("--bf16", False, marks=pytest.mark.gpu),
    ],
)
def test_half_precision_and_overflow(
    eight: tuple[Path, Path], tmp_path: Path, precision: str, cpu: bool
) -> None:
    """Half precision follows single precision; updates that overflow are no updates: they do not
    move the running threshold."""
    data, cache = eight
    logs = []
    scale = 4 if cpu else 2**20
    for place, chosen in (("single", ()), ("half", (precision, "--fp16-init-scale", scale))):
        words = train_arguments(data, tmp_path / place, *options(cache), "--batch-size", 8, *chosen)
        words += ["--optimizer", "adam", "--lr", "1e-3"]  # memory-efficient fp16 has no SGD
        logs.append(command(*(word for word in words if cpu or word != "--cpu")))
    assert ("gradient overflow detected" in logs[1]) == (precision == "--fp16")
    single, half = map(trace, logs)
    assert len(single) == len(half) == UPDATES
    for found, expected in zip(half, single, strict=True):
        for name in ("loss", "nll_loss", "difficulty"):
            assert found[name] == pytest.approx(expected[name], rel=0.02), (name, found, expected)
        assert abs(found["hard_share"] - expected["hard_share"]) <= 0.1
