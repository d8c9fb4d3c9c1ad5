"""The benchmarks for a GPU, at their smallest size on a CPU."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import bench_llm
import numpy as np
import pytest
import torch
from benchmarking import Deadline
from fairseq.data import Dictionary, indexed_dataset
from synthetic_training import write_data

ROOT = Path(__file__).parents[2]


def gpu_check(*arguments: object, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": python, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    # Nothing may depend on the folder that it is started from.
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "gpu_check.sh"), *map(str, arguments)],
        cwd=ROOT.parent, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="would take the GPU for minutes")
def test_all_of_it_runs_at_the_smallest_size(tmp_path: Path) -> None:
    found = gpu_check("--output", tmp_path, "--minutes", "30")
    assert found.returncode == 0, found.stdout + found.stderr
    assert all(len(line) < 160 for line in found.stdout.splitlines())
    folder = tmp_path / "cpu"
    contenders = {
        "bench_criterion_gpu": (
            "contender",
            {"stock", "torch", "cached", "floor", "chunked, auto"},
        ),
        "bench_training_gpu": ("method", {"SE-KD, cached", "SE-KD, cached, chunked"}),
        "bench_llm_gpu": ("loop", {*bench_llm.FAIRSEQ, *bench_llm.EXTRAS, bench_llm.LEAN}),
    }
    for name, (column, expected) in contenders.items():
        with (folder / f"{name}.csv").open(newline="") as stream:
            assert expected <= {row[column] for row in csv.DictReader(stream)}
        targets = json.loads((folder / f"{name}.json").read_text())
        assert targets and all(target["target"] in found.stdout for target in targets)
        # Only what no machine without a GPU can have has no figure.
        assert all(t["value"] is not None or "Liger" in t["target"] for t in targets)


def test_time_that_is_over_still_leaves_a_summary(tmp_path: Path) -> None:
    found = gpu_check("--output", tmp_path, "--minutes", "0.01")
    assert found.returncode == 0 and found.stdout.count("no time left") >= 3
    assert "0 of 0 targets met" in found.stdout
    assert gpu_check("--minutes", "3").returncode == 2
    assert gpu_check("--output", tmp_path, "--minutes", "soon").returncode == 2


#: A Python on a GPU, whose tests are one that fails and one that does not end.
ON_A_GPU = f"""#!/bin/bash
case "$*" in
    *get_device_name*) echo a-gpu ;;
    *'import xdist'* | *bench_*) exit 1 ;;
    *-m\\ pytest*) exec {sys.executable} -m pytest -q -p no:cacheprovider -c /dev/null TESTS ;;
    *) exec {sys.executable} "$@" ;;
esac
"""
TESTS = """import time
def test_failing(): assert "a" == "the reason"
def test_endless(): time.sleep(60)
"""


@pytest.mark.slow
def test_tests_that_do_not_end_say_what_failed(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    python = tmp_path / "python"
    python.write_text(ON_A_GPU.replace("TESTS", str(tmp_path / "test_it.py")))
    python.chmod(0o755)
    found = gpu_check("--output", tmp_path, "--minutes", "1.5", python=str(python))
    assert found.returncode == 1 and "command_tests: stopped after" in found.stdout
    assert "the reason" in (tmp_path / "a-gpu" / "command_tests.log").read_text()


def test_tests_of_a_gpu_need_little_beside_it() -> None:
    script = (ROOT / "scripts" / "gpu_check.sh").read_text()
    (commands,) = re.findall("tests command_tests [0-9]+ (.*)", script)
    kernels = [f"tests/losses/test_{name}.py" for name in ("support", "token_loss", "chunked")]
    without = (  # on a machine that is there for its GPU
        "import sys, pytest\n"
        "class Without:\n"
        "    def find_spec(name, *_):\n"
        "        if name in ('hypothesis', 'snakemake', 'jsonschema'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Without)\n"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", without, "--collect-only", "-q", "-m", "gpu", *commands.split(), *kernels],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    every = subprocess.run(
        ["grep", "-rlE", r"mark\.gpu\b", "tests", "--include=test_*.py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert {*every} - {"tests/test_options.py", "tests/scripts/test_gpu_check.py"} == {
        *commands.split(), *kernels,
    }  # fmt: skip


def test_deadline() -> None:
    assert not Deadline(None).passed() and Deadline(None).share(3, 5.0) == 5.0
    assert Deadline(0).passed() and Deadline(0).share(3, 5.0) == 0.0
    assert not Deadline(1).passed() and Deadline(1).passed(ahead=61)
    assert Deadline(1).share(3, 100.0) == pytest.approx(10, abs=0.1)


def test_synthetic_sentences(tmp_path: Path) -> None:
    write_data(tmp_path / "data", 1000, 3000, source=60, target=25)
    dictionary = Dictionary.load(str(tmp_path / "data" / "dict.xx.txt"))
    assert len(dictionary) == 1000
    for language, mean in (("xx", 60), ("yy", 25)):
        path = str(tmp_path / "data" / f"train.xx-yy.{language}")
        sides = indexed_dataset.make_dataset(path, "mmap")
        sizes = np.array(sides.sizes) - 1
        assert len(sides) == 3000 and sizes.mean() == pytest.approx(mean, rel=0.05)
        assert all(int(sides[i][-1]) == dictionary.eos() for i in range(50))
        tokens = torch.cat([sides[i][:-1] for i in range(3000)])
        counts = torch.bincount(tokens, minlength=1000)
        assert counts[:4].sum() == 0 and counts[4] > counts[10] > counts[100] > counts[999]
        # Zipf's law: the 1st is seen (100 + 2.7) / 2.7 times as often as the 101st.
        near = counts[94:114].float().mean()
        assert counts[4] / near == pytest.approx(102.7 / 2.7, rel=0.1)


def len_of(rows: dict[str, torch.Tensor]) -> int:
    """The tokens of a batch."""
    return int(rows["attention_mask"].sum())


def test_both_bare_loops_have_the_same_loss(tmp_path: Path) -> None:
    folder, vocabulary = bench_llm.save_model(None, tmp_path / "model", smallest=True)
    write_data(tmp_path / "data", vocabulary, 60, source=20, target=10)
    size = bench_llm.SMALLEST._replace(interval=2, batch_tokens=300)
    batches = bench_llm.Batches(tmp_path / "data", folder, size)
    assert 0 < len(batches.timed) < len(batches.second)
    assert sum(map(len_of, batches.first)) == sum(map(len_of, batches.second))
    model = bench_llm.transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for rows in batches.timed[:3]:
        places = rows["labels"].view(-1).ne(-100).nonzero().squeeze(1)
        lean = bench_llm.lean_loss(model, {**rows, "places": places})
        torch.testing.assert_close(bench_llm.whole_loss(model, rows), lean)


def test_both_time_the_same_batches(tmp_path: Path) -> None:
    folder, vocabulary = bench_llm.save_model(None, tmp_path / "model", smallest=True)
    write_data(tmp_path / "data", vocabulary, 150, source=20, target=10)
    size = bench_llm.SMALLEST._replace(interval=3, batch_tokens=300)
    batches = bench_llm.Batches(tmp_path / "data", folder, size)
    # Else logs would fall on multiples of the interval within the epoch too.
    assert len(batches.first) % size.interval and len(batches.timed) >= 2 * size.interval
    command = [*bench_llm.FAIRSEQ[bench_llm.OURS]]
    found = bench_llm.with_fairseq(tmp_path / "data", folder, batches, size, command)
    assert found.tokens_a_second > 0 and found.padding == pytest.approx(batches.padding(), abs=0.01)
