"""Updates per second and peak memory of whole `fairseq-train` runs: fairseq's cross entropy, distillation
from a cache, and distillation from a teacher that runs beside the student.

    python scripts/benchmarks/bench_training.py DATA

DATA is any fairseq data directory. Its first training sentences are trained on with dictionaries
filled up to 8,192 and 32,768 symbols; the models are not trained before, because how good they are
makes no difference to time. The runs of a setting go in turn, some rounds of them. Writes
results/bench_training.csv, .json and .png.

    python scripts/benchmarks/bench_training.py --minutes 4

With a GPU: a transformer-base (65 million parameters) on made-up sentences under a
dictionary of 32,768 symbols, 16,384 tokens a batch, 4 loader workers, bfloat16, distilled from a
teacher of three times its size; two epochs, the second measured. Writes bench_training_gpu.csv and
.json after each run.

One file of more than 400 lines: both machines measure and draw the same contenders.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from benchmarking import RESULTS, Deadline, Target, keep_below, with_project, write_results
from fairseq.data import Dictionary, data_utils, indexed_dataset
from synthetic_training import Run, make_cache, make_teacher, write_data
from synthetic_training import train as train_here

from analysis.terminal import progress
from sekd_fairseq.llm.vocabulary import Vocabulary
from sekd_fairseq.splits import write_indexed
from sekd_fairseq.teacher_cache.format import hash_symbols

ROOT = Path(__file__).resolve().parents[2]
VOCABULARIES = (8192, 32768)
SENTENCES, TOKENS, WARM_UP = 2000, 1000, 5
STUDENT = (256, 2)  # width, layers a side
TEACHER = {8192: (512, 2), 32768: (512, 3)}  # about three times the student's parameters
LLM = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}  # fmt: skip
GPU_MEMORY = 70  # GiB that a GPU has surely
STOCK = "stock cross entropy"
METHODS: dict[str, list[str]] = {
    STOCK: ["--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1"],
    "word KD, cached": ["--criterion", "cached_kd"],
    "SE-KD, cached": ["--criterion", "self_evolution_kd", "--integration", "student"],
    "word KD, online": ["--criterion", "cached_kd"],
}


class Size(NamedTuple):
    """What is trained on a GPU, or instead of it."""

    vocabulary: int
    sentences: int
    batch_tokens: int
    student: tuple[int, int, int]  # width, layers a side, attention heads
    teacher: tuple[int, int, int]
    workers: int
    interval: int  # updates from one log to the next


GPU = Size(32768, 26_000, 16384, (512, 6, 8), (1024, 6, 16), 4, 15)
SMALLEST = Size(512, 200, 400, (16, 1, 2), (32, 1, 2), 0, 2)
#: What --minutes is spent on first comes first.
GPU_METHODS: dict[str, list[str]] = {
    STOCK: METHODS[STOCK],
    "SE-KD, cached": ["--criterion", "self_evolution_kd", "--teacher-cache", "CACHE"],
    "word KD, online": ["--criterion", "cached_kd", "--teacher-path", "TEACHER"],
    "SE-KD, cached, chunked": [
        "--criterion", "self_evolution_kd", "--teacher-cache", "CACHE",
        "--sekd-chunk-tokens", "auto",
    ],
    "word KD, cached": ["--criterion", "cached_kd", "--teacher-cache", "CACHE"],
    "word KD, online, teacher of the student's size": [
        "--criterion", "cached_kd", "--teacher-path", "TWIN",
    ],
}  # fmt: skip


def prepare(source: Path, folder: Path, size: int) -> str:
    """The first training sentences under a dictionary of ``size`` symbols; the language pair."""
    folder.mkdir()
    pair = data_utils.infer_language_pair(str(source))
    dictionary = Dictionary.load(str(source / f"dict.{pair[0]}.txt"))
    if len(dictionary) > size:
        sys.exit(f"error: {source}: expected at most {size} symbols, found {len(dictionary)}")
    for number in range(size - len(dictionary)):
        dictionary.add_symbol(f"filler{number}")
    for language in pair:
        dictionary.save(str(folder / f"dict.{language}.txt"))
        name = f"train.{pair[0]}-{pair[1]}.{language}"
        old = indexed_dataset.make_dataset(str(source / name), "mmap")
        sentences = (old[i] for i in range(min(SENTENCES, len(old))))
        write_indexed(folder / name, "mmap", sentences, size)
    symbols = dictionary.symbols
    Vocabulary(list(range(size)), "", None, hash_symbols(symbols)).save(folder)
    return f"{pair[0]}-{pair[1]}"


def transformer(width: int, layers: int, heads: int = 4, expansion: int = 2) -> list[str]:
    words = ["--arch", "transformer", "--share-all-embeddings", "--dropout", "0.1"]
    for side in ("encoder", "decoder"):
        words += [f"--{side}-layers", str(layers), f"--{side}-embed-dim", str(width)]
        words += [f"--{side}-ffn-embed-dim", str(expansion * width)]
        words += [f"--{side}-attention-heads", str(heads)]
    return words


def train(data: Path, save: Path, updates: int, options: Sequence[str]) -> dict[str, float]:
    """Run fairseq-train; seconds an update after the first few, and peak memory of all processes."""
    command = [
        sys.executable, "-m", "fairseq_cli.train", str(data), "--user-dir",
        str(ROOT / "sekd_fairseq"), "--task", "self_evolution_kd", "--optimizer", "adam", "--lr",
        "1e-4", "--max-tokens", str(TOKENS), "--max-update", str(updates), "--save-dir", str(save),
        "--disable-validation", "--no-epoch-checkpoints", "--log-format", "json", "--log-interval",
        "1", "--seed", "1", *options,
    ]  # fmt: skip
    if not torch.cuda.is_available():
        command.append("--cpu")
    environment = {**with_project(), "PYTHONWARNINGS": "ignore"}
    running = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    stamps, tail, free = [], [], []
    assert running.stdout is not None
    for line in running.stdout:
        tail = [*tail[-30:], line]
        if '"num_updates"' in line and '"ups"' in line:
            stamps.append(time.perf_counter())
            record = json.loads(line[line.index("{") :])
            free.append(float(record.get("gb_free", "nan")))
    _, status, usage = os.wait4(running.pid, 0)
    if status:
        sys.exit("error: fairseq-train failed:\n" + "".join(tail))
    memory = usage.ru_maxrss / 2**20
    if torch.cuda.is_available():
        memory = torch.cuda.mem_get_info()[1] / 2**30 - min(free)
    steps = np.diff(stamps[WARM_UP:])
    return {"seconds": float(np.mean(steps)), "gib": memory}


def measure(data: Path, folder: Path, updates: int, rounds: int) -> list[dict[str, Any]]:
    """All runs on one data directory, in turn."""
    size = int(data.name)
    student = transformer(*STUDENT)
    teacher = folder / f"teacher-{size}"
    train(data, teacher, 1, [*transformer(*TEACHER[size]), *METHODS[STOCK]])
    path, cache = teacher / "checkpoint_last.pt", folder / f"cache-{size}"
    start = time.perf_counter()
    subprocess.run(
        [
            sys.executable, "-m", "sekd_fairseq.build_cache", str(data), "--path", str(path),
            "--output", str(cache), "--subset", "train", "--top-k", "32", "--allow-implausible",
        ],
        check=True, env=with_project(), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    building = time.perf_counter() - start
    config = folder / "llm.json"
    config.write_text(json.dumps(LLM))
    llm = ["--arch", "hf_causal_lm", "--hf-config", str(config), "--sekd-chunk-tokens", "256"]
    settings = []
    for workers in (0, 2):
        for method, criterion in METHODS.items():
            options = [*student, *criterion, "--num-workers", str(workers)]
            if "cached" in method:
                options += ["--teacher-cache", str(cache)]
            elif "online" in method:
                options += ["--teacher-path", str(path)]
            settings.append(("transformer", workers, method, options))
    if size == VOCABULARIES[-1]:
        settings.append(("language model", 0, STOCK, [*llm[:4], *METHODS[STOCK]]))
        kd = [*llm, *METHODS["SE-KD, cached"], "--teacher-cache", str(cache)]
        settings.append(("language model", 0, "SE-KD, cached, chunked", kd))
    found: dict[int, list[dict[str, float]]] = {i: [] for i in range(len(settings))}
    with progress(total=rounds * len(settings), desc=f"{size} symbols", unit="run") as bar:
        for _ in range(rounds):
            for i, (_, _, _, options) in enumerate(settings):
                with tempfile.TemporaryDirectory(dir=folder) as save:
                    found[i].append(train(data, Path(save), updates, options))
                bar.update()
    rows = [{"part": "building", "vocabulary": size, "seconds": round(building, 2)}]
    for i, (model, workers, method, _) in enumerate(settings):
        seconds = statistics.median(run["seconds"] for run in found[i])
        rows.append(
            {
                "part": "training",
                "model": model,
                "vocabulary": size,
                "workers": workers,
                "method": method,
                "seconds": round(seconds, 4),
                "updates_a_second": round(1 / seconds, 3),
                "peak_gib": round(max(run["gib"] for run in found[i]), 3),
                "rounds": rounds,
            }
        )
    return rows


def whole_experiment(rows: list[dict[str, Any]], epochs: int, updates_an_epoch: float) -> None:
    """Add what 1, 3 and 10 students cost, the building of the cache included."""
    for size in VOCABULARIES:
        chosen = {
            row["method"]: row["seconds"]
            for row in rows
            if row["part"] == "training"
            and (row["model"], row["vocabulary"], row["workers"]) == ("transformer", size, 0)
        }
        building = next(
            row["seconds"] for row in rows if (row["part"], row["vocabulary"]) == ("building", size)
        )
        for students in (1, 3, 10):
            updates = students * epochs * updates_an_epoch
            cached = building + updates * chosen["SE-KD, cached"]
            online = updates * chosen["word KD, online"]
            rows.append(
                {
                    "part": "experiment",
                    "vocabulary": size,
                    "students": students,
                    "seconds": round(cached, 1),
                    "seconds_online": round(online, 1),
                    "ratio": round(cached / online, 3),
                }
            )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and memory beside fairseq's criterion."""
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.6), constrained_layout=True)
    own = [r for r in rows if r.get("model") == "transformer" and r["workers"] == 0]
    for axis, key, title in zip(
        axes, ("seconds", "peak_gib"), ("time an update", "peak memory"), strict=True
    ):
        for offset, size in enumerate(VOCABULARIES):
            part = {r["method"]: r[key] for r in own if r["vocabulary"] == size}
            values = [part[method] / part[STOCK] for method in METHODS]
            axis.barh(
                np.arange(len(values)) + 0.38 * offset,
                values,
                height=0.36,
                color=("#0072B2", "#E69F00")[offset],
                hatch=("", "////")[offset],
                edgecolor="white",
                label=f"V = {size // 1024}k",
            )
        axis.axvline(1, color="0.3", linewidth=0.8)
        axis.set_yticks(np.arange(len(METHODS)) + 0.19, list(METHODS))
        axis.invert_yaxis()
        axis.set_xlabel(f"{title} / fairseq's cross entropy")
    axes[0].legend(loc="lower right")
    figure.savefig(path, dpi=200)


def measure_on_gpu(size: Size, rounds: int, minutes: float | None, output: Path) -> None:
    """All methods in turn, round after round while time lasts; results are written after each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_below(GPU_MEMORY, device)
    deadline = Deadline(minutes)
    student = [*transformer(*size.student, expansion=4), "--max-tokens", str(size.batch_tokens)]
    found: dict[str, list[Run]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, cache = folder / "data", folder / "cache"
        write_data(data, size.vocabulary, size.sentences, source=25, target=25)
        larger = [*transformer(*size.teacher, expansion=4), "--max-tokens", str(size.batch_tokens)]
        begin = time.monotonic()
        teacher = make_teacher(data, folder / "teacher", larger)
        print(f"  the teacher: {time.monotonic() - begin:.0f} s")
        building = make_cache(data, teacher, cache)
        print(f"  its cache: {building:.0f} s")
        paths = {"CACHE": str(cache), "TEACHER": str(teacher)}
        taken, refused = 0.0, set[str]()
        for _ in range(rounds):
            for method, words in GPU_METHODS.items():
                # Stop where a run like the last would not end in time, but never before the first.
                if method in refused or (found and deadline.passed(taken)):
                    continue
                if "TWIN" in words and "TWIN" not in paths:
                    paths["TWIN"] = str(make_teacher(data, folder / "twin", student))
                options = [*student, *(paths.get(word, word) for word in words)]
                options += ["--num-workers", str(size.workers)]
                if "online" in method and device.type == "cuda":
                    options.append("--teacher-bf16")
                start = time.monotonic()
                try:
                    run = train_here(data, options, size.interval)
                except (SystemExit, torch.OutOfMemoryError) as error:
                    print(f"  {method}: not measured ({str(error)[:80]})")
                    refused.add(method)
                    continue
                taken = time.monotonic() - start
                print(f"  {method}: {taken:.0f} s")
                found.setdefault(method, []).append(run)
                write_gpu_results(found, building, device, output, quiet=True)
    write_gpu_results(found, building, device, output)


def write_gpu_results(
    found: dict[str, list[Run]],
    building: float,
    device: torch.device,
    output: Path,
    quiet: bool = False,
) -> None:
    """The table and the targets of what is measured so far."""
    speeds = {
        method: statistics.median(run.updates_a_second for run in runs)
        for method, runs in found.items()
    }
    rows: list[dict[str, Any]] = [{"method": "building the cache", "seconds": round(building, 2)}]
    for method, runs in found.items():
        row: dict[str, Any] = {
            "method": method,
            "seconds": round(1 / speeds[method], 4),
            "updates_a_second": round(speeds[method], 3),
            "target_tokens_a_second": round(speeds[method] * runs[-1].mean("wpb")),
            "rounds": len(runs),
        }
        if runs[0].peak_gib is not None:
            row["peak_gib"] = round(max(run.peak_gib or 0.0 for run in runs), 3)
        rows.append(row)

    def ratio(method: str, base: str) -> float | None:
        return speeds[method] / speeds[base] if {method, base} <= speeds.keys() else None

    targets = [
        Target(
            "cached SE-KD: speed / fairseq's criterion",
            value=ratio("SE-KD, cached", STOCK),
            limit=1.0,
            at_least=True,
        ),
        Target(
            "cached SE-KD: speed / online KD, teacher three times as large",
            value=ratio("SE-KD, cached", "word KD, online"),
            limit=2.0,
            at_least=True,
        ),
    ]
    write_results("bench_training_gpu", rows, targets, device, output, quiet)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "data", type=Path, nargs="?", metavar="DATA", help="fairseq data directory, on a CPU"
    )
    parser.add_argument(
        "--updates", type=int, default=25, help="of each run on a CPU (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of all runs (%(default)s)")
    parser.add_argument(
        "--smallest",
        action="store_true",
        help="what is measured on a GPU, at a size for any machine",
    )
    parser.add_argument("--minutes", type=float, help="end after about so long (on a GPU)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args()
    if args.smallest or torch.cuda.is_available():
        logging.getLogger().setLevel(logging.WARNING)
        size = SMALLEST if args.smallest else GPU
        rounds = 1 if args.smallest else args.rounds
        measure_on_gpu(size, rounds, args.minutes, args.output)
        return
    if args.data is None:
        parser.error("expected DATA, a fairseq data directory, on a machine without a GPU")
    logging.disable(logging.INFO)  # fairseq has everything that is imported report
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size in VOCABULARIES:
            data = folder / str(size)
            pair = prepare(args.data, data, size)
            rows += measure(data, folder, args.updates, args.rounds)
        target = pair.split("-")[1]
        # Sizes are a view into the dataset, which has to stay while they are read.
        targets_of = indexed_dataset.make_dataset(str(data / f"train.{pair}.{target}"), "mmap")
        tokens = float(targets_of.sizes.sum())
        whole_experiment(rows, epochs=10, updates_an_epoch=tokens / TOKENS)

    def value(method: str, key: str, size: int, workers: int, model: str = "transformer") -> float:
        return next(
            float(row[key])
            for row in rows
            if row["part"] == "training"
            and (row["model"], row["vocabulary"], row["workers"], row["method"])
            == (model, size, workers, method)
        )

    targets = []
    for size in VOCABULARIES:
        for workers in (0, 2):
            where = f"V={size}, {workers} workers"
            speeds = {m: value(m, "updates_a_second", size, workers) for m in METHODS}
            memory = {m: value(m, "peak_gib", size, workers) for m in METHODS}
            targets += [
                Target(
                    f"cached SE-KD: speed / stock criterion, {where}",
                    value=speeds["SE-KD, cached"] / speeds[STOCK],
                    limit=0.93,
                    at_least=True,
                ),
                Target(
                    f"cached SE-KD: peak memory / stock criterion, {where}",
                    value=memory["SE-KD, cached"] / memory[STOCK],
                    limit=1.05,
                ),
                Target(
                    f"cached SE-KD: speed / online KD, teacher three times as large, {where}",
                    value=speeds["SE-KD, cached"] / speeds["word KD, online"],
                    limit=1.5,
                    at_least=True,
                ),
            ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_results("bench_training", rows, targets, device, args.output)
    draw(rows, args.output / "bench_training.png")


if __name__ == "__main__":
    main()
