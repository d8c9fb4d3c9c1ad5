"""The suite's own options."""

import re
from pathlib import Path

import pytest
import torch

from tests.sekd_fairseq.conftest import completed

TESTS = """
import pytest

@pytest.mark.gpu
def test_on_a_gpu() -> None: ...

@pytest.mark.gpu(optional=True)
def test_on_a_gpu_or_without() -> None: ...

def test_without() -> None: ...
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
@pytest.mark.parametrize(
    ("options", "counts"),
    [((), {"passed": 2, "skipped": 1}), (("--gpu",), {"errors": 2, "deselected": 1})],
)
def test_without_cuda(tmp_path: Path, options: tuple[str, ...], counts: dict[str, int]) -> None:
    path = tmp_path / "test_gpu.py"
    path.write_text(TESTS)
    words = ("-p", "tests.conftest", "-p", "no:cacheprovider", *options, path)
    found = completed("pytest", *words, cwd=tmp_path)
    last = found.stdout.splitlines()[-1]
    counted = {
        what: int(n) for n, what in re.findall(r"(\d+) (passed|errors|skipped|desel\w+)", last)
    }
    assert counted == counts, found.stdout + found.stderr
    assert ("--gpu: expected CUDA, found none" in found.stdout) == bool(options)
