"""What the benchmarks share: fair timing, peak memory, and the files in results/."""

import csv
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory profiler would report every start

import torch

RESULTS = Path(__file__).resolve().parents[2] / "results"


def with_project() -> dict[str, str]:
    """The environment of a command that imports this project, installed or not."""
    known = [str(RESULTS.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, known))}


class Timing(NamedTuple):
    """Seconds a call: median and quartiles over rounds."""

    median: float
    low: float
    high: float
    rounds: int


class Deadline:
    """A limit of time, in minutes from now; None is no limit."""

    def __init__(self, minutes: float | None) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    def passed(self, ahead: float = 0.0) -> bool:
        """Whether time is over, or will be in so many seconds."""
        return self.end is not None and time.monotonic() + ahead >= self.end

    def share(self, parts: int, most: float) -> float:
        """Seconds that each of ``parts`` may still take, ``most`` at most; some are kept for what
        is around the measurement itself."""
        if self.end is None:
            return most
        return max(0.0, min(most, 0.5 * (self.end - time.monotonic()) / parts))


def keep_below(gib: float, device: torch.device) -> None:
    """Let torch take no more than so much of a GPU's memory."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib / total))


def time_in_turn(
    contenders: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: tuple[int, int] = (5, 20),
    seconds: float = 10.0,
) -> dict[str, Timing]:
    """Time several functions by turns, so that a change of the machine's speed meets all alike.

    Each is called unmeasured first (on a GPU a few times: kernels are compiled and chosen then),
    then in rounds, at least ``rounds[0]``, until ``seconds`` have passed or ``rounds[1]`` are done.
    """
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for function in contenders.values():
        for _ in range(3 if device.type == "cuda" else 1):
            function()
    start = time.perf_counter()
    for done in range(rounds[1]):
        if done >= rounds[0] and time.perf_counter() - start > seconds:
            break
        for name, function in contenders.items():
            taken[name].append(time_once(function, device))
    return {name: summary(values) for name, values in taken.items()}


#: Calls that a GPU is given at once: as in training, one is prepared while another runs.
QUEUED = 4


def time_once(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, by CUDA events on a GPU."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(QUEUED):
            function()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000 / QUEUED
    begin_time = time.perf_counter()
    function()
    return time.perf_counter() - begin_time


def summary(values: Sequence[float]) -> Timing:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return Timing(median, low, high, len(values))


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most that torch held at once during a call, above what it held before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    kineto = profile.profiler.kineto_results  # type: ignore[union-attr]
    held = peak = 0
    events = (event for event in kineto.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def hardware(device: torch.device) -> str:
    """The machine in words: processor, cores in use, GPU, and the versions that matter."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    gpu = f", {torch.cuda.get_device_name()}" if device.type == "cuda" else ""
    return (
        f"{model}, {torch.get_num_threads()} threads{gpu}; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


class Target(NamedTuple):
    """A limit that a figure has to keep: at most, or with ``at_least`` no less than."""

    name: str
    value: float | None
    limit: float
    at_least: bool = False

    def met(self) -> bool:
        """Whether it was kept; a figure that could not be had keeps nothing."""
        if self.value is None or isnan(self.value):
            return False
        kept = self.value >= self.limit if self.at_least else self.value <= self.limit
        return bool(kept)  # a NumPy figure gives NumPy's bool, which JSON does not know

    def figure(self) -> float | None:
        """The value rounded; none where it could not be had (None or nan, which JSON does not know)."""
        return None if self.value is None or isnan(self.value) else round(self.value, 4)


def write_results(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    targets: Sequence[Target],
    device: torch.device,
    folder: Path = RESULTS,
    quiet: bool = False,
    add: bool = False,
) -> None:
    """Write ``NAME.csv`` (measurements) and ``NAME.json`` (targets), and print the targets; with ``add``
    other targets that the file has stay in it."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_targets(name, targets, device, folder, quiet, add)
    if not quiet:
        print(f"{folder / name}.csv, .json")


def write_targets(
    name: str,
    targets: Sequence[Target],
    device: torch.device,
    folder: Path = RESULTS,
    quiet: bool = False,
    add: bool = False,
) -> None:
    """Write ``NAME.json``, and print which targets were met unless ``quiet``; with ``add`` other targets
    that the file has stay in it."""
    command = shlex.join(["python", *sys.argv])
    entries = [
        {
            "target": target.name,
            "value": target.figure(),
            "limit": target.limit,
            "met": target.met(),
            "command": command,
            "hardware": hardware(device),
            "date": date.today().isoformat(),
        }
        for target in targets
    ]
    path = folder / f"{name}.json"
    if add:
        measured = {target.name for target in targets}
        known = json.loads(path.read_text(encoding="utf-8"))
        entries += [entry for entry in known if entry["target"] not in measured]
    text = json.dumps(entries, indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
    for target in () if quiet else targets:
        figure = target.figure()
        value = "no figure" if figure is None else f"{figure:.3f}"
        bound = "at least" if target.at_least else "at most"
        word = "met" if target.met() else "MISSED"
        print(f"{word:6} {target.name}: {value} ({bound} {target.limit})")
