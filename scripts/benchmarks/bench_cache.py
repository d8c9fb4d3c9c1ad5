"""Size, error and speed of the teacher cache.

    python scripts/benchmarks/bench_cache.py DATA --teacher teacher.pt [--smoothed-teacher smoothed.pt]

DATA and the teachers are those of a real task (scripts/configs/multi30k.yaml makes them). Measured:
bytes a token against the KL divergence from the dense teacher to what the cache restores, its
outside mass spread evenly and by the tail law (drawn), for several rules; the speed of building
against that of the forward pass alone; the time of training with the loader reading a cache against
without; opening a cache of ten million tokens. Writes results/bench_cache.csv, .json and .png.
"""

import argparse
import io
import os
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from benchmarking import RESULTS, Target, summary, time_in_turn, write_results
from fairseq.criterions.cross_entropy import CrossEntropyCriterion

from analysis.terminal import progress
from sekd_fairseq import build_cache
from sekd_fairseq.checkpoints import load_models
from sekd_fairseq.datasets import TeacherDataset
from sekd_fairseq.devices import to_device
from sekd_fairseq.inspect_cache import restoration_error
from sekd_fairseq.plugin import quiet_fairseq
from sekd_fairseq.splits import load_split, token_batches
from sekd_fairseq.teacher_cache import TeacherCache, write_shard
from sekd_fairseq.teacher_cache.finish import finish_cache
from sekd_fairseq.teacher_cache.format import payload_dtypes
from sekd_fairseq.teachers.torch import TorchEngine
from sekd_fairseq.teachers.truncation import Truncation

RULES = [("top_k", k) for k in (4, 8, 16, 21, 24, 32, 64)]
RULES += [("top_p", p) for p in (0.9, 0.95, 0.98, 0.99, 0.995, 0.999)]
CAP = 64
BYTES, ERROR = 80, 1e-3


def build(data: str, teacher: str, output: Path, *options: str) -> TeacherCache:
    """Run build_cache on the validation set, quietly."""
    words = [data, "--path", teacher, "--output", str(output), "--subset", "valid", *options]
    with redirect_stdout(io.StringIO()):
        build_cache.main(words)
    return TeacherCache.open(output / "valid")


def curve(data: str, teacher: str, name: str, folder: Path) -> list[dict[str, Any]]:
    """Bytes a token and restoration error of every rule."""
    rows = []
    cases = [(rule, value, bits) for rule, value in RULES for bits in (16, 8)]
    for rule, value, bits in progress(cases, desc=f"rules, {name}"):
        options = ["--logprob-bits", str(bits)]
        options += ["--top-k", str(value if rule == "top_k" else CAP)]
        options += ["--top-p", str(value)] if rule == "top_p" else []
        output = folder / f"{name}-{rule}-{value}-{bits}"
        cache = build(data, teacher, output, *options)
        error = restoration_error(cache, teacher, data, 200)
        by_tail = restoration_error(cache, teacher, data, 200, cache.tail_law())
        size = sum(shard.bytes for shard in cache.manifest.shards) / cache.manifest.tokens
        rows.append(
            {
                "part": "truncation",
                "teacher": name,
                "rule": rule,
                "value": value,
                "bits": bits,
                "vocabulary": cache.manifest.vocab_size,
                "support": round(cache.manifest.quality["support"], 2),
                "bytes_a_token": round(size, 2),
                "kl_mean": float(f"{error.mean():.4g}"),
                "kl_p99": float(f"{np.quantile(error, 0.99):.4g}"),
                "kl_max": float(f"{error.max():.4g}"),
                "kl_mean_tail": float(f"{by_tail.mean():.4g}"),
            }
        )
    return rows


def best_error(rows: list[dict[str, Any]], teacher: str) -> float | None:
    """The smallest mean error among the rules that keep the size."""
    fitting = [
        min(row["kl_mean"], row["kl_mean_tail"])
        for row in rows
        if row.get("teacher") == teacher and row["bytes_a_token"] <= BYTES
    ]
    return min(fitting) if fitting else None


def building_speed(data: str, path: str, device: torch.device) -> list[dict[str, Any]]:
    """Seconds of the teacher's forward passes alone, and with truncation, over the same batches."""
    engine = TorchEngine([path], data, device, torch.float32)
    dataset = load_split(engine.task, "valid", data)
    batches = token_batches(dataset, range(min(len(dataset), 400)), 4096)
    samples = [dataset.collater([dataset[i] for i in batch]) for batch in batches]

    @torch.no_grad()
    def forward() -> None:
        for sample in samples:
            moved = to_device(sample, device)
            engine.models[0](**moved["net_input"])

    def full(truncation: Truncation) -> None:
        for sample in samples:
            engine.sentences(sample, truncation, 1.0)

    timing = time_in_turn(
        {
            "forward": forward,
            "top_k 32": lambda: full(Truncation(k=32)),
            "top_p 0.98": lambda: full(Truncation(rule="top_p", p=0.98, k=CAP, floor=2)),
        },
        device,
        rounds=(5, 15),
    )
    return [
        {
            "part": "building",
            "rule": name,
            "seconds": round(found.median, 4),
            "seconds_low": round(found.low, 4),
            "seconds_high": round(found.high, 4),
            "forward_share": round(timing["forward"].median / found.median, 4),
        }
        for name, found in timing.items()
    ]


def loading_speed(data: str, path: str, cache: TeacherCache) -> list[dict[str, Any]]:
    """Seconds of training steps of a small student, the loader with and without the cache."""
    _, _, task = load_models([path], data, torch.device("cpu"))
    plain = load_split(task, "valid", data)
    cached = TeacherDataset(plain, [cache], "valid")
    student = task_student(task)
    criterion = CrossEntropyCriterion(task, sentence_avg=False)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-4)
    batches = token_batches(plain, range(len(plain)), 1000)

    def step(dataset: Any, batch: list[int]) -> float:
        start = time.perf_counter()
        sample = dataset.collater([dataset[i] for i in batch])
        optimizer.zero_grad()
        criterion(student, sample)[0].backward()
        optimizer.step()
        return time.perf_counter() - start

    taken: dict[str, list[float]] = {"without": [], "with": []}
    for turn in progress(range(4), desc="loader"):
        sums = {"without": 0.0, "with": 0.0}
        for batch in batches:
            for name, dataset in (("without", plain), ("with", cached)):
                sums[name] += step(dataset, batch)
        if turn:  # the first round warms up
            for name, value in sums.items():
                taken[name].append(value)
    rows = []
    for name, values in taken.items():
        found = summary(values)
        rows.append({"part": "loading", "rule": name, "seconds": round(found.median, 4)})
    return rows


def task_student(task: Any) -> Any:
    """A Transformer of 128 dimensions and two layers a side."""
    from fairseq.models.transformer import TransformerConfig, TransformerModelBase

    config = TransformerConfig()
    for side in (config.encoder, config.decoder):
        side.embed_dim, side.ffn_embed_dim, side.layers, side.attention_heads = 128, 256, 2, 4
    config.decoder.input_dim = config.decoder.output_dim = 128
    config.share_all_embeddings = True
    return TransformerModelBase.build_model(config, task)


def opening(folder: Path, tokens: int = 10_000_000) -> dict[str, Any]:
    """Write a large cache of made-up rows; seconds and resident memory of opening it."""
    vocabulary, length, k, shard = 6000, 25, 8, 20_000
    generator = np.random.default_rng(0)
    dtypes = payload_dtypes(vocabulary)
    sentences = tokens // length
    ids = generator.integers(4, vocabulary, (shard, length * k))
    columns = {
        "support_size": np.full(length, k),
        "gold_logprob": np.full(length, -0.1),
        "outside_mass": np.full(length, 0.01),
        "entropy": np.full(length, 0.5),
        "logprob": np.full(length * k, -2.0),
    }
    hashes = generator.integers(0, 2**63, sentences).astype(np.uint64)
    folder.mkdir()
    for index in progress(range(sentences // shard), desc="ten million tokens"):
        rows = [{**columns, "token_id": one} for one in ids]
        part = slice(index * shard, (index + 1) * shard)
        write_shard(folder, index, rows, hashes[part], dtypes)
    settings = {
        "split": "train",
        "vocab_size": vocabulary,
        "dictionary_hash": "",
        "dataset_hash": "",
        "sentences": sentences,
        "shard_sentences": shard,
        "temperature": 1.0,
        "truncation": {"rule": "top_k", "k": k},
        "teacher": {"files": [], "arch": "", "parameters": []},
    }
    finish_cache(folder, settings, dtypes, {}, allow_implausible=True)
    before, start = resident(), time.perf_counter()
    cache = TeacherCache.open(folder)
    cache.target_hashes()
    _ = cache[len(cache) // 2]
    seconds = time.perf_counter() - start
    return {
        "part": "opening",
        "rule": f"{cache.manifest.tokens} tokens",
        "seconds": round(seconds, 4),
        "mib": round((resident() - before) / 2**20, 1),
        "bytes_a_token": round(sum(s.bytes for s in cache.manifest.shards) / tokens, 2),
    }


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Size against error."""
    chosen = [row for row in rows if row["part"] == "truncation"]
    teachers = list(dict.fromkeys(row["teacher"] for row in chosen))
    figure, axes = plt.subplots(
        1, len(teachers), figsize=(3.8 * len(teachers), 3.2), sharey=True, layout="constrained"
    )
    for axis, teacher in zip(np.atleast_1d(axes), teachers, strict=True):
        for (rule, bits), style in {
            ("top_k", 16): "o-C0",
            ("top_k", 8): "o--C0",
            ("top_p", 16): "s-C1",
            ("top_p", 8): "s--C1",
        }.items():
            points = [
                (row["bytes_a_token"], row["kl_mean_tail"])
                for row in chosen
                if (row["teacher"], row["rule"], row["bits"]) == (teacher, rule, bits)
            ]
            axis.plot(
                *zip(*points, strict=True), style, label=f"{rule}, {bits} bits", markersize=3.5
            )
        dense = 2 * chosen[0]["vocabulary"]
        axis.axhline(ERROR, color="black", linewidth=0.6)
        axis.axvline(BYTES, color="black", linewidth=0.6)
        axis.set(
            xlabel=f"bytes a token (dense float16: {dense:,})",
            yscale="log",
            title=f"{teacher} teacher",
        )
    np.atleast_1d(axes)[0].set_ylabel("KL(dense || restored), nats")
    np.atleast_1d(axes)[0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("--teacher", required=True, help="trained without label smoothing")
    parser.add_argument("--smoothed-teacher", help="trained with label smoothing")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args()
    quiet_fairseq()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = curve(args.data, args.teacher, "plain", folder)
        if args.smoothed_teacher:
            rows += curve(args.data, args.smoothed_teacher, "label-smoothed", folder)
        rows += building_speed(args.data, args.teacher, device)
        rows += loading_speed(
            args.data, args.teacher, TeacherCache.open(folder / "plain-top_k-32-16" / "valid")
        )
        rows.append(opening(folder / "large"))
    seconds = {(row["part"], row["rule"]): row for row in rows}
    loading = seconds["loading", "with"]["seconds"] / seconds["loading", "without"]["seconds"]
    targets = [
        Target(
            f"mean KL error (nats) at no more than {BYTES} bytes a token, plain teacher",
            best_error(rows, "plain"),
            ERROR,
        ),
        Target(
            f"mean KL error (nats) at no more than {BYTES} bytes a token, label-smoothed teacher",
            best_error(rows, "label-smoothed"),
            ERROR,
        ),
        Target(
            "speed of building / forward pass alone",
            seconds["building", "top_k 32"]["forward_share"],
            0.9,
            at_least=True,
        ),
        Target("training time, loader with cache / without", loading, 1.05),
        Target(
            "seconds to open a cache of ten million tokens",
            rows[-1]["seconds"],
            1.0,
        ),
    ]
    write_results("bench_cache", rows, targets, device, args.output)
    draw(rows, args.output / "bench_cache.png")


if __name__ == "__main__":
    main()
