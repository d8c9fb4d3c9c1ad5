"""Simulated runs (analysis/runs/simulated.py) as fixtures."""

from collections.abc import Callable
from pathlib import Path

import pytest

from analysis.runs.simulated import write_run_directory

WriteRun = Callable[..., Path]


@pytest.fixture
def write_run() -> WriteRun:
    """:func:`write_run_directory`."""
    return write_run_directory


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A root with a teacher and three students, the SE-KD one nearest to the teacher."""
    root = tmp_path / "runs"
    write_run_directory(root, "teacher", "teacher", wrong=0.1)
    write_run_directory(root, "finetune", "finetune", noise={50: 2.0, 100: 1.0}, wrong=0.3)
    write_run_directory(root, "word_kd", "word_kd", noise={50: 2.0, 100: 0.8}, wrong=0.25)
    write_run_directory(root, "se_kd", "se_kd_student", noise={50: 1.5, 100: 0.5}, wrong=0.2)
    return root
