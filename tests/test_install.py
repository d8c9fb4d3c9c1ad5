"""Installed from another directory, on each Python: the analysis without torch, then the plugin.

Needs a package index; run with ``--slow``.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def run(*words: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIP_USER")}
    done = subprocess.run(
        [*map(str, words)], cwd=cwd, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_installed_package(version: str, tmp_path: Path) -> None:
    interpreter = shutil.which(f"python{version}")
    if interpreter is None:
        pytest.skip(f"no python{version} in PATH")
    source = tmp_path / "source"  # pip builds beside the files, which must not be these
    ignored = shutil.ignore_patterns(".*", "runs", "data", "*.egg-info", "build", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    run(interpreter, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    pip = (python, "-m", "pip", "install", "-q", "-c", source / "constraints.txt")
    run(*pip, source, cwd=tmp_path)
    code = "import importlib.util as u, analysis; print(analysis.__file__, u.find_spec('torch'))"
    place, torch = run(python, "-c", code, cwd=tmp_path).split()
    assert "site-packages" in place and torch == "None"
    write = "from analysis.runs.simulated import write_study; from pathlib import Path; "
    write += "write_study(Path('runs'), 1, 20)"
    run(python, "-c", write, cwd=tmp_path)
    out = run(python.parent / "analysis-transfer", "runs", cwd=tmp_path)
    assert "claim 1 (se_kd_student): inconclusive" in out
    assert (tmp_path / "runs" / "report" / "report.html").exists()
    run(*pip, f"{source}[fairseq,llm]", "pytest", "hypothesis", cwd=tmp_path)
    out = run(python.parent / "sekd-build-cache", "--help", cwd=tmp_path)
    assert "--engine" in out
    run(
        python, "-m", "pytest", "-q", "tests/sekd_fairseq/test_same_numbers.py", "tests/losses",
        cwd=source,
    )  # fmt: skip


@pytest.mark.slow
def test_the_triton_is_the_one_that_torch_requires_on_a_gpu(tmp_path: Path) -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line and not line.startswith("#")
    )
    report = tmp_path / "report.json"
    # "===" is that very build, and not one for the CPU alone, which requires no triton.
    run(
        sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "-q",
        "--report", report, f"torch==={pins['torch']}", cwd=tmp_path,
    )  # fmt: skip
    (build,) = json.loads(report.read_text(encoding="utf-8"))["install"]
    required = [Requirement(one) for one in build["metadata"]["requires_dist"]]
    (triton,) = (one for one in required if one.name == "triton")
    assert pins["triton"] in triton.specifier
