"""Checkpoints used elsewhere than they were trained, and trained on with other settings."""

import inspect
import re
import shutil
from pathlib import Path

import pytest
import torch

from sekd_fairseq.errors import UserError
from sekd_fairseq.logits import flat_logits
from sekd_fairseq.settings import file_identity, same_teacher
from sekd_fairseq.tasks.self_evolution_kd import SelfEvolutionKDTask

from .conftest import ROOT, command, error_line, train, train_arguments


def test_relative_paths_of_a_checkpoint(data: Path, cache: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(cache, first / "cache")
    second.mkdir()
    options = ("--criterion", "self_evolution_kd", "--teacher-cache", "cache", "--max-update", "2")
    command(*train_arguments(data, first / "save", *options), cwd=first)
    path = first / "save" / "checkpoint_last.pt"
    validate = [
        "fairseq_cli.validate", data, "--user-dir", ROOT / "sekd_fairseq", "--task",
        "self_evolution_kd", "--path", path, "--max-tokens", "300", "--cpu",
    ]  # fmt: skip
    command(*validate, cwd=second)
    (first / "cache").rename(second / "moved")
    line = error_line(command(*validate, cwd=second, check=False))
    assert str(first / "cache") in line and "--teacher-cache" in line
    command(*validate, "--teacher-cache", "moved", cwd=second)


def test_other_settings_do_not_go_on_from_a_checkpoint(
    data: Path, teacher: Path, cache: Path, tmp_path: Path
) -> None:
    save = tmp_path / "save"
    base = ("--criterion", "self_evolution_kd", "--teacher-cache", cache, "--disable-validation")
    train(data, save, *base, "--max-update", "2")

    def refused(*options: object) -> str:
        line = error_line(train(data, save, *base, "--max-update", "3", *options, check=False))
        assert "begun with other settings" in line and "--save-dir" in line
        return line

    assert "--lr [0.005] is now [0.004]" in refused("--lr", "4e-3")
    assert "--alpha None is now 0.5" in refused("--alpha", "0.5")
    assert "--encoder-layers 2 is now 1" in refused("--encoder-layers", "1")
    both = refused("--update-freq", "2", "--best-checkpoint-metric", "ppl")
    assert "--best-checkpoint-metric loss is now ppl" in both
    assert "times processes) [1] is now [2]" in both
    other = tmp_path / "other"
    command(
        "sekd_fairseq.build_cache", data, "--path", teacher, "--output", other, "--cpu", "--subset",
        "train", "--top-k", "3",
    )  # fmt: skip
    assert "--teacher " in refused("--teacher-cache", other)
    # The same cache elsewhere, longer, with other logs and workers.
    shutil.copytree(cache, tmp_path / "moved")
    free = ("--teacher-cache", tmp_path / "moved", "--log-interval", "2", "--num-workers", "1")
    assert '"train_num_updates": "4"' in train(data, save, *base, "--max-update", "4", *free)
    # Deliberately.
    given = ("--lr", "4e-3", "--max-update", "5")
    train(data, save, *base, *given, "--restore-file", save / "checkpoint_last.pt")
    train(data, save, *base, "--lr", "3e-3", "--reset-optimizer", "--max-update", "6")


def test_a_teacher_beside_the_student_is_known_again(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    save = tmp_path / "save"
    base = ("--criterion", "self_evolution_kd", "--disable-validation", "--teacher-path")
    train(data, save, *base, teacher, "--max-update", "2")
    # The same file elsewhere, and another of the same name.
    for folder in ("moved", "other"):
        (tmp_path / folder).mkdir()
    moved, other = (tmp_path / folder / teacher.name for folder in ("moved", "other"))
    shutil.copy(teacher, moved)
    state = torch.load(teacher, weights_only=False)
    for weight in state["model"].values():
        weight.mul_(1.01)
    torch.save(state, other)
    assert '"train_num_updates": "3"' in train(data, save, *base, moved, "--max-update", "3")
    line = error_line(train(data, save, *base, other, "--max-update", "4", check=False))
    assert f"--teacher {teacher.name} " in line and "begun with other settings" in line
    # One that was begun when the name alone was kept.
    last = save / "checkpoint_last.pt"
    state = torch.load(last, weights_only=False)
    state["cfg"]["task"]["teacher"] = teacher.name
    torch.save(state, last)
    assert '"train_num_updates": "4"' in train(data, save, *base, other, "--max-update", "4")


def test_which_teacher_a_file_is(teacher: Path, tmp_path: Path) -> None:
    known = file_identity(str(teacher))
    assert re.fullmatch(rf"{re.escape(teacher.name)} [0-9a-f]{{12}}", known)
    # A file that cannot be mapped has its name.
    old = tmp_path / teacher.name
    torch.save(torch.load(teacher, weights_only=False), old, _use_new_zipfile_serialization=False)
    assert file_identity(str(old)) == teacher.name
    assert same_teacher(known, teacher.name) and same_teacher(teacher.name, known)
    assert same_teacher(f"{known}:{known}", f"{known}:{teacher.name}")
    assert not same_teacher(f"{teacher.name}:b.pt", teacher.name)
    for other in (f"{teacher.name} 0123456789ab", "other.pt", f"{known}:{known}", None):
        assert not same_teacher(known, other)


@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adafactor", marks=pytest.mark.slow)])
def test_an_optimizer_without_dataclass_holds_no_other_settings(
    data: Path, tmp_path: Path, optimizer: str
) -> None:
    """fairseq keeps the whole command line as its options, the rank of a process too."""
    save = tmp_path / "save"
    base = ("--criterion", "cross_entropy", "--disable-validation", "--optimizer", optimizer)
    train(data, save, *base, "--max-update", "2")
    other = ("--max-update", "3", "--distributed-port", "12345", "--log-interval", "2")
    assert "Loaded checkpoint" in train(data, save, *base, *other)
    line = error_line(train(data, save, *base, *other, "--weight-decay", "0.1", check=False))
    assert "begun with other settings (--weight-decay 0.0 is now 0.1);" in line


def test_logits_that_do_not_match_the_targets() -> None:
    target = torch.zeros(2, 3, dtype=torch.long)
    assert flat_logits(torch.zeros(2, 3, 7), target, 7).shape == (6, 7)
    for shape in ((2, 4, 7), (3, 2, 7), (2, 3, 8)):
        with pytest.raises(UserError, match=r"expected \(2, 3, 7\)"):
            flat_logits(torch.zeros(shape), target, 7)


def test_fairseq_sees_what_build_model_takes() -> None:
    """fairseq reads the signature, and tells a task that does not show it nothing of a checkpoint."""
    shown = inspect.getfullargspec(SelfEvolutionKDTask.build_model).args
    assert shown == ["self", "cfg", "from_checkpoint"]
