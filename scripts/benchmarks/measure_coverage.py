"""How much of `sekd_fairseq` and `analysis` the tests run: results/coverage.csv and .json.

    python scripts/benchmarks/measure_coverage.py

Arguments go to pytest. Fails when a test does.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from benchmarking import RESULTS, Target, write_results

ROOT = Path(__file__).resolve().parents[2]
COVERAGE = (sys.executable, "-m", "coverage")


def main() -> None:
    for old in ROOT.glob(".coverage*"):
        old.unlink()
    tests = subprocess.run([*COVERAGE, "run", "-m", "pytest", *sys.argv[1:]], cwd=ROOT, check=False)
    # Processes that a test kills leave data files that cannot be read; that is no failure.
    subprocess.run([*COVERAGE, "combine", "--quiet"], cwd=ROOT, check=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "coverage.json"
        subprocess.run([*COVERAGE, "json", "--quiet", "-o", path], cwd=ROOT, check=True)
        report = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        {
            "file": name,
            "statements": found["summary"]["num_statements"],
            "missed": found["summary"]["missing_lines"],
            "percent": round(found["summary"]["percent_covered"], 1),
        }
        for name, found in sorted(report["files"].items())
    ]
    percent = round(report["totals"]["percent_covered"], 2)
    target = Target(
        "coverage of sekd_fairseq and analysis by the tests, %", percent, 90, at_least=True
    )
    write_results("coverage", rows, [target], torch.device("cpu"), RESULTS)
    print(f"{percent}% of the statements")
    sys.exit(tests.returncode)


if __name__ == "__main__":
    main()
