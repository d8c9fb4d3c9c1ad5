"""Speed and memory of the analysis on ten million token records, and its error rates where the
truth is known.

    python scripts/benchmarks/bench_analysis.py --parts scale errors nulls

Simulated runs: each method errs in its own way, and each run a little differently. With methods that
are equally far from the teacher on average, claim 1 (on hard tokens the student is closer to the
teacher) must hold in few of 500 studies; with a planted difference it must be found. Writes
results/bench_analysis.csv and .json, in which parts that are not measured stay as they are. What is known
of each study stands in OUTPUT/bench_analysis.part until then, so that an interrupted run resumes.
"""

import argparse
import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from analysis_nulls import KINDS, claims_of, rejects, renamed_wins
from benchmarking import RESULTS, Target, write_results
from numpy.typing import NDArray

from analysis.claims.verdicts import PLACEBO
from analysis.runs.files import atomic_write
from analysis.runs.simulated import PIECES, write_columns, write_run_directory, write_run_record
from analysis.sums.direction import Options
from analysis.terminal import progress

PARTS = ("scale", "errors", "nulls")
TOKENS, LENGTH = 2_500_000, 25
METHODS = ("finetune", "word_kd", "se_kd_student", "se_kd_target")
#: Seeds and sentences of the studies with a planted gain, the last of a real study's size.
SIZES = ((3, 120), (3, 1000), (5, 120), (5, 1000))


def large_records(path: Path, noise: float, seed: int) -> None:
    """Records of one run: made-up numbers that keep the identities of the columns."""
    shared, own = np.random.default_rng(1), np.random.default_rng([2, seed])
    base = shared.exponential(0.4, TOKENS) * noise
    kl = base * own.uniform(0.8, 1.2, TOKENS)
    target = kl * shared.uniform(0.1, 0.9, TOKENS)
    token = shared.integers(0, len(PIECES), TOKENS)
    p_gold = shared.uniform(0.01, 0.99, TOKENS)
    top = own.integers(0, len(PIECES), TOKENS)
    columns: dict[str, Any] = {
        "sentence": np.repeat(np.arange(TOKENS // LENGTH), LENGTH),
        "position": np.tile(np.arange(LENGTH), TOKENS // LENGTH),
        "token": token,
        "frequency": 10 ** (token % 5),
        "p_gold": p_gold,
        "q_gold": p_gold * own.uniform(0.5, 1.0, TOKENS),
        "kl": kl,
        "kl_target": target,
        "kl_nontarget": kl - target,
        "p_entropy": shared.exponential(1, TOKENS),
        "q_entropy": own.exponential(1, TOKENS),
        "p_top1": shared.integers(0, len(PIECES), TOKENS),
        "q_top1": top,
        "p_max": np.maximum(p_gold, shared.uniform(0.3, 0.99, TOKENS)),
        "q_max": np.full(TOKENS, 0.995),
        "p_of_q_top1": p_gold * 0.5,
        "overlap_top5": own.integers(0, 6, TOKENS),
    }
    write_columns(path, columns, cache="c", rows=1 << 20)


def scale(folder: Path) -> dict[str, Any]:
    """Seconds and peak memory of ``python -m analysis.transfer`` on ten million records."""
    for number, method in enumerate(progress(METHODS, desc="write ten million records")):
        run = folder / method
        write_run_record(run, method, seed=1, direction="en-de", updates=100, cache="c")
        large_records(run / "tokens" / "test" / "100.parquet", 1.0 - 0.1 * number, number)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "analysis.transfer", str(folder)], check=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {
        "part": "scale",
        "case": f"{len(METHODS) * TOKENS} records",
        "seconds": round(seconds, 2),
        "peak_gib": round(peak / 2**30, 3),
    }


def judge_claim(better: float, study: int, seeds: int, sentences: int) -> tuple[bool, float]:
    """Whether claim 1 is supported in a simulated study, where word-level KD's error is 0.8; and the
    share of its tests with an uncorrected p of at most 0.05."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for seed in range(1, seeds + 1):
            for method, noise in (("finetune", 1.0), ("word_kd", 0.8), ("se_kd_student", better)):
                write_run_directory(
                    root,
                    f"{method}{seed}-{study}",
                    method,
                    seed=seed,
                    sentences=sentences,
                    noise=noise,
                    own=0.3,
                    habit=0.5,
                    wrong=None,
                    corpus_seed=study,
                )
        claims = claims_of(root, Options(resamples=200, seed=study))
    chosen = claims[(claims["scope"] == "all") & claims["decides"].astype(bool)]
    chosen = chosen[chosen["treatment"] != PLACEBO]
    chosen = chosen[chosen["claim"] == 1]
    return bool((chosen["verdict"] == "supported").all()), float((chosen["p"] <= 0.05).mean())


@dataclass
class Studies:
    """Verdicts on simulated studies, kept in a file from the first to the last."""

    path: Path

    def __post_init__(self) -> None:
        self.known: dict[str, list[list[float]]] = {}
        if self.path.exists():
            self.known = json.loads(self.path.read_text(encoding="utf-8"))

    def mean(
        self, case: str, count: int, judge: Callable[[int], Sequence[float]]
    ) -> NDArray[np.float64]:
        """What ``judge`` says of studies 0, 1, ..., in the mean of ``count``."""
        verdicts = self.known.setdefault(case, [])
        for study in progress(range(count), desc=case):
            if study >= len(verdicts):
                verdicts.append([float(value) for value in judge(study)])
                with atomic_write(self.path) as stream:
                    stream.write(json.dumps(self.known).encode())
        return np.mean(verdicts[:count], axis=0)


def error_rows(studies: Studies, count: int) -> list[dict[str, Any]]:
    """How often claim 1 is found where nothing differs, first, and where a gain is planted."""
    cases = [("no difference", 0.8, count, 3, 120)]
    cases += [("planted: 0.7 for 0.8", 0.7, max(count // 5, 1), *size) for size in SIZES]
    rows = []
    for case, better, number, seeds, sentences in cases:
        judge = partial(judge_claim, better, seeds=seeds, sentences=sentences)
        name = f"{case}, {seeds} seeds, {sentences} sentences"
        supported, single = studies.mean(name, number, judge).tolist()
        rows.append(
            {
                "part": "errors",
                "case": case,
                "seeds": seeds,
                "sentences": sentences,
                "studies": number,
                "supported": round(supported, 4),
                "single_tests_rejected": round(single, 4),
            }
        )
    return rows


def null_rows(studies: Studies, count: int) -> list[dict[str, Any]]:
    """The share of studies without an effect in which one is found, by kind."""
    judges: dict[str, Callable[[int], bool]] = {kind: partial(rejects, kind) for kind in KINDS}
    judges["error shared with a reference"] = renamed_wins
    rows = []
    for kind, judge in judges.items():
        (share,) = studies.mean(f"null: {kind}", count, lambda i, judge=judge: [judge(i)])
        row = {"part": "nulls", "case": kind, "studies": count, "rejected": float(share)}
        rows.append(row)
    return rows


def scale_targets(size: Mapping[str, Any]) -> list[Target]:
    """The limits of speed and memory."""
    return [
        Target("seconds for ten million token records", size["seconds"], 20),
        Target("peak memory for ten million token records, GiB", size["peak_gib"], 2),
    ]


def error_targets(errors: Sequence[Mapping[str, Any]]) -> list[Target]:
    """The limits of claim 1 without and with a planted gain."""
    return [
        Target(
            "claim 1 supported though nothing differs, share of studies",
            value=errors[0]["supported"],
            limit=0.05,
        ),
        Target(
            "single test rejects at 0.05 though nothing differs, share",
            value=errors[0]["single_tests_rejected"],
            limit=0.08,
        ),
        Target(
            "claim 1 supported where a gain is planted, {} seeds, {} sentences".format(*SIZES[-1]),
            value=errors[-1]["supported"],
            limit=0.8,
            at_least=True,
        ),
    ]


def null_targets(nulls: Sequence[Mapping[str, Any]]) -> list[Target]:
    """The limit of each kind of null: two standard errors of a share of 5 % may come by chance."""
    return [
        Target(
            f"null rejected: {row['case']}, share of studies",
            value=row["rejected"],
            limit=0.05 + 2 * (0.05 * 0.95 / row["studies"]) ** 0.5,
        )
        for row in nulls
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=["scale", "errors"],
        help="what to measure; the six kinds of null take about an hour (default: scale errors)",
    )
    parser.add_argument("--studies", type=int, default=500, help="simulated of each kind")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    studies = Studies(args.output / "bench_analysis.part")
    rows: list[dict[str, Any]] = []
    targets: list[Target] = []
    if "scale" in args.parts:
        with tempfile.TemporaryDirectory() as name:
            size = scale(Path(name) / "runs")
        rows.append(size)
        targets += scale_targets(size)
    if "errors" in args.parts:
        errors = error_rows(studies, args.studies)
        rows += errors
        targets += error_targets(errors)
    if "nulls" in args.parts:
        nulls = null_rows(studies, args.studies)
        rows += nulls
        targets += null_targets(nulls)
    kept = [row for row in known_rows(args.output) if row["part"] not in args.parts]
    rows = sorted([*kept, *rows], key=lambda row: PARTS.index(row["part"]))
    write_results("bench_analysis", rows, targets, torch.device("cpu"), args.output, add=bool(kept))
    studies.path.unlink(missing_ok=True)


def known_rows(folder: Path) -> list[dict[str, Any]]:
    """What an earlier run has measured."""
    path = folder / "bench_analysis.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


if __name__ == "__main__":
    main()
