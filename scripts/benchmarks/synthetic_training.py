"""What the benchmarks of whole trainings share: data made up on the spot, and trainings in this
process, so that no run pays for starting Python."""

import gc
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import fairseq_cli.train
import numpy as np
import torch
from fairseq.data import Dictionary
from numpy.typing import NDArray

import sekd_fairseq.tasks  # noqa: F401 (registers)
from sekd_fairseq import build_cache
from sekd_fairseq.llm.vocabulary import Vocabulary
from sekd_fairseq.splits import write_indexed
from sekd_fairseq.teacher_cache.format import hash_symbols

ROOT = Path(__file__).resolve().parents[2]
#: fairseq reports progress here, whatever it calls the record.
PROGRESS = "fairseq.logging.progress_bar"
PLUGIN = ["--user-dir", str(ROOT / "sekd_fairseq"), "--task", "self_evolution_kd"]


def write_data(
    folder: Path, vocabulary: int, sentences: int, source: float, target: float, seed: int = 1
) -> None:
    """A binarised training set "xx" to "yy": sentences of random tokens.

    Tokens follow Zipf's law, lengths a log-normal distribution as in news text (standard deviation
    0.55), of these means; a translation is about as long as its source. The directory serves language
    models too: their prompts are the source sentences.
    """
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    dictionary = Dictionary()
    for number in range(vocabulary - len(dictionary)):
        dictionary.add_symbol(f"w{number}")
    chances = 1 / (np.arange(vocabulary - dictionary.nspecial) + 2.7)
    chances /= chances.sum()
    length = generator.lognormal(-(0.55**2) / 2, 0.55, sentences)  # of mean 1
    noise = generator.normal(1, 0.12, sentences).clip(0.5, 1.5)
    for language, mean, factor in (("xx", source, 1.0), ("yy", target, noise)):
        dictionary.save(str(folder / f"dict.{language}.txt"))
        sizes = (mean * length * factor).round().clip(1, 6 * mean).astype(int)
        write_side(folder / f"train.xx-yy.{language}", sizes, chances, dictionary, generator)
    rows = list(range(vocabulary))
    Vocabulary(rows, "", None, hash_symbols(dictionary.symbols)).save(folder)


def write_side(
    path: Path,
    sizes: NDArray[Any],
    chances: NDArray[Any],
    dictionary: Dictionary,
    generator: np.random.Generator,
) -> None:
    """One language of :func:`write_data`, each sentence with its end."""
    tokens = generator.choice(len(chances), int(sizes.sum()), p=chances) + dictionary.nspecial
    rows = np.split(tokens, sizes.cumsum()[:-1])
    sentences = (torch.tensor([*row, dictionary.eos()]) for row in rows)
    write_indexed(path, "mmap", sentences, len(dictionary))


class Run(NamedTuple):
    """A training: speed, peak memory (of a GPU), and what was logged of the updates that were timed."""

    updates_a_second: float
    peak_gib: float | None
    logs: list[dict[str, str]]

    def mean(self, key: str) -> float:
        """The mean of a logged figure; NaN where nothing was logged."""
        values = [float(log[key]) for log in self.logs]
        return sum(values) / len(values) if values else float("nan")


class Stamps(logging.Handler):
    """Keeps what a training logs, and when."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[float, dict[str, str]]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "train_inner":
            self.records.append((time.perf_counter(), json.loads(record.getMessage())))


@contextmanager
def progress_records() -> Iterator[Stamps]:
    """Let fairseq's progress be read and not be printed."""
    logger, stamps = logging.getLogger(PROGRESS), Stamps()
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.addHandler(stamps)
    logger.propagate = False
    try:
        yield stamps
    finally:
        logger.removeHandler(stamps)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def train(data: Path, options: Sequence[str], interval: int) -> Run:
    """Two epochs of ``fairseq-train`` in this process; what is measured is the second.

    The first time that a GPU meets a batch of some shape, its libraries choose and build kernels for
    it, which takes longer than the update, and keep them: of contenders that train on the same batches
    one after the other, the first would pay for all. Within the second epoch, the updates up to the
    first log, when loader workers start, are left out too, and those after the last log.

    Raises
    ------
    SystemExit
        The plugin or fairseq refuses the options, or an epoch has less than two intervals.
    """
    free_memory()
    on_gpu = torch.cuda.is_available()
    held = torch.cuda.memory_allocated() / 2**30 if on_gpu else 0
    # Nothing is saved, but the folder for it is made: not where the benchmark was started from.
    nothing = ["--no-save", "--save-dir", str(data / "save")]
    # A training that logs every update waits for the GPU in every update.
    records = run_fairseq(
        [str(data), *options, *nothing, "--max-epoch", "2", "--log-interval", str(interval)]
    )
    peak = None
    if on_gpu:  # fairseq forgets the peak whenever it logs, so it is taken from the log
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        peak = total - min(float(log["gb_free"]) for _, log in records) - held
    timed = [(at, log) for at, log in records if int(log["epoch"]) == 2]
    if len(timed) < 2:
        raise SystemExit(f"expected two times {interval} updates an epoch, found {len(timed)}")
    updates = int(timed[-1][1]["num_updates"]) - int(timed[0][1]["num_updates"])
    seconds = timed[-1][0] - timed[0][0]
    return Run(updates / seconds, peak, [log for _, log in timed[1:]])


def run_fairseq(words: Sequence[str]) -> list[tuple[float, dict[str, str]]]:
    """Run ``fairseq-train`` here; the updates that it logs, each with the time of its logging."""
    command = [
        "fairseq-train", *words, *PLUGIN, "--optimizer", "adam", "--lr", "1e-4", "--clip-norm", "1.0",
        "--disable-validation", "--distributed-world-size", "1", "--log-format", "json", "--seed", "1",
        "--bf16" if torch.cuda.is_available() else "--cpu",
    ]  # fmt: skip
    arguments, sys.argv = sys.argv, command
    try:
        with progress_records() as stamps, warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # fairseq calls hydra in ways that hydra has left behind
            fairseq_cli.train.cli_main()
    finally:
        sys.argv = arguments
    free_memory()
    return stamps.records


def free_memory() -> None:
    """Give back what a training has left in cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def make_teacher(data: Path, save: Path, options: Sequence[str]) -> Path:
    """A checkpoint of an untrained model: how good a teacher is makes no difference to time."""
    run_fairseq(
        [
            str(data), *options, "--criterion", "label_smoothed_cross_entropy", "--max-update", "1",
            "--save-dir", str(save), "--no-epoch-checkpoints", "--no-save-optimizer-state",
        ]
    )  # fmt: skip
    return save / "checkpoint_last.pt"


def make_cache(data: Path, teacher: Path, output: Path) -> float:
    """A teacher's cache of 32 tokens each; returns the seconds that it took."""
    words = [str(data), "--path", str(teacher), "--output", str(output), "--subset", "train"]
    words += ["--top-k", "32", "--allow-implausible"]
    words += ["--bf16", "--max-tokens", "16384"] if torch.cuda.is_available() else ["--cpu"]
    start = time.perf_counter()
    with quiet():
        build_cache.main(words)
    return time.perf_counter() - start


@contextmanager
def quiet() -> Iterator[None]:
    """Print nothing, on either stream."""
    with open(os.devnull, "w") as nowhere:
        streams = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = nowhere
        try:
            yield
        finally:
            sys.stdout, sys.stderr = streams
