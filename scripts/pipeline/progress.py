"""A readable line every few seconds out of the log of a training, the whole log to a file.

    fairseq-train ... --log-format json 2>&1 | python scripts/pipeline/progress.py se_kd --total 1200 --log FILE

prints ``se_kd: update 410 of 1,200, epoch 3, loss 4.21, 2:10 left``.  Plain lines and no bar,
because several trainings print to the same terminal.  If the log ends in an error, its last lines
are printed, so that nobody has to look for the file.
"""

import argparse
import json
import sys
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: Seconds between two lines.
INTERVAL = 10.0
#: How much of a failed log is shown.
TAIL = 15


def parse_line(line: str) -> dict[str, Any] | None:
    """The record of a line of fairseq's JSON log that reports on training updates, or None."""
    start = line.find("{")
    if start < 0 or "num_updates" not in line:
        return None
    try:
        record = json.loads(line[start:])
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and "num_updates" in record else None


def duration(seconds: float) -> str:
    """Minutes and seconds, as in 2:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def describe(
    record: dict[str, Any], total: int, first: tuple[int, float], now: float, at_most: bool = False
) -> str:
    """One line on a training.

    Parameters
    ----------
    record
        The newest log record.
    total
        Updates of the whole training.
    first
        Number of updates and time (seconds) when this process first reported; a resumed training
        does not start at zero.
    now
        Time, in seconds.
    at_most
        Whether the training may end before, when the validation loss no longer falls.
    """
    done = int(record["num_updates"])
    limit = "at most " if at_most else ""
    text = f"update {done:,} of {limit}{total:,}, epoch {record.get('epoch', '?')}"
    if "loss" in record:
        text += f", loss {float(record['loss']):.3f}"
    if done > first[0]:
        rate = (now - first[1]) / (done - first[0])
        text += f", {limit}{duration(rate * max(0, total - done))} left"
    return text


def follow(lines: Iterable[str], label: str, total: int, log: Path, at_most: bool = False) -> None:
    """Copy ``lines`` to ``log`` and print what happens."""
    started = last_print = time.monotonic()
    first: tuple[int, float] | None = None
    tail: deque[str] = deque(maxlen=TAIL)
    finished = False
    with log.open("a", encoding="utf-8") as stream:
        for line in lines:
            stream.write(line)
            stream.flush()
            tail.append(line)
            finished = finished or "done training" in line
            record = parse_line(line)
            now = time.monotonic()
            if record is None:
                continue
            first = first or (int(record["num_updates"]), now)
            if now - last_print >= INTERVAL:
                print(f"  {label}: {describe(record, total, first, now, at_most)}", flush=True)
                last_print = now
    if finished:
        print(f"  {label}: trained in {duration(time.monotonic() - started)}", flush=True)
    else:
        print(f"  {label}: stopped before its end; the last lines of {log}:", flush=True)
        print("".join(f"    {line}" for line in tail), end="", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; see ``--help``."""
    parser = argparse.ArgumentParser(description="Show the progress of a fairseq training.")
    parser.add_argument("label", help="name of the training")
    parser.add_argument("--total", type=int, required=True, help="its number of updates")
    parser.add_argument(
        "--at-most", action="store_true", help="the training has --patience and may end before"
    )
    parser.add_argument("--log", type=Path, required=True, help="file that gets every line")
    args = parser.parse_args(arguments)
    args.log.parent.mkdir(parents=True, exist_ok=True)
    follow(sys.stdin, args.label, args.total, args.log, args.at_most)


if __name__ == "__main__":
    main()
