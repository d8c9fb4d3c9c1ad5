"""Easy and hard tokens while a run trains: from records of several steps, and from the log.

A token is hard at a step if its KL to the teacher is above Γ then, with one Γ (in nats) for all
steps of a run.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.chapters.chapter import Figure
from analysis.chapters.transitions import aligned
from analysis.runs.methods import label_of
from analysis.runs.run_record import Run
from analysis.stats import ratio
from analysis.style import Look, among, direction_panels
from analysis.sums.direction import Direction, Options, ScoredRun

STATES = ("easy", "hard")


def training_table(directions: Sequence[Direction], options: Options) -> pd.DataFrame:
    """One row a run, step, source and bucket: mean KL of easy and hard tokens, and the hard share.

    Source ``records``: the tokens are those of the reference run's buckets, the same at every step.
    Source ``log``: what fairseq logged in validation, where each step's own difficulty cuts.
    ``hard_share`` is the share of all tokens that are hard at that step.
    """
    rows: list[dict[str, Any]] = []
    for direction in directions:
        if direction.tokens is None:
            continue
        for run in direction.runs:
            columns = {
                "direction": direction.name,
                "method": str(run.method),
                "seed": run.seed,
                "run": run.label,
            }
            rows.extend(columns | row for row in _record_rows(run))
            rows.extend(columns | row for row in _log_rows(run.run))
    names = ["direction", "method", "seed", "run", "step", "source", "bucket", "tokens", "kl"]
    return pd.DataFrame(rows, columns=[*names, "hard_share"])


def _record_rows(run: ScoredRun) -> list[dict[str, Any]]:
    if run.partition is None:
        return []
    codes = run.partition.codes("difficulty")
    rows = []
    for step, difficulty in run.history.items():
        tokens = np.bincount(codes, minlength=2).astype(np.float64)
        means = ratio(np.bincount(codes, difficulty, 2).astype(np.float64), tokens)
        share = float((difficulty > run.partition.gamma).mean())
        for state, name in enumerate(STATES):
            rows.append(
                {
                    "step": step,
                    "source": "records",
                    "bucket": name,
                    "tokens": int(tokens[state]),
                    "kl": means[state],
                    "hard_share": share,
                }
            )
    return rows


def _log_rows(run: Run) -> list[dict[str, Any]]:
    rows = []
    for step, line in sorted(read_log(run).items()):
        for name in STATES:
            value = line.get(f"valid_kl_{name}")
            if value is not None:
                rows.append(
                    {
                        "step": step,
                        "source": "log",
                        "bucket": name,
                        "kl": value,
                        "hard_share": line.get("valid_hard_share", np.nan),
                    }
                )
    return rows


def read_log(run: Run) -> dict[int, dict[str, float]]:
    """The numbers of the validation lines of ``train.jsonl``, by update; a later line of the same
    update counts (a resumed run repeats some). Lines that are no JSON object are passed over: the
    last one may be half-written, and fairseq logs other text too."""
    try:
        text = (run.path / "train.jsonl").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    found: dict[int, dict[str, float]] = {}
    for line in text.splitlines():
        try:
            content = json.loads(line)
            step = int(content["valid_num_updates"])
        except (ValueError, KeyError, TypeError):
            continue
        numbers = {}
        for key, value in content.items():
            try:
                numbers[key] = float(value)
            except (ValueError, TypeError):
                continue
        found[step] = numbers
    return found


def draw_training(table: pd.DataFrame, path: Path, looks: Mapping[str, Look]) -> None:
    """KL on easy and hard tokens over training (mean over seeds), from records where a direction has some,
    else from the log; a panel a direction."""
    recorded = table["source"] == "records"
    table = table[recorded | ~table["direction"].isin(table.loc[recorded, "direction"])]
    with direction_panels(table, 2.1, path) as panels:
        for axis, part in panels:
            for method, look in among(looks, table["method"]).items():
                for bucket, line in (("hard", "-"), ("easy", (0, (2, 1.2)))):
                    own = part[(part["method"] == method) & (part["bucket"] == bucket)]
                    if own.empty:
                        continue
                    by_run = own.set_index(["run", "step"])["kl"]
                    steps = aligned(
                        {run: set(own["step"][own["run"] == run]) for run in set(own["run"])}
                    )
                    axis.plot(
                        [np.mean(list(step.values())) for step in steps],
                        [np.mean([by_run[place] for place in step.items()]) for step in steps],
                        color=look.colour,
                        marker=look.marker,
                        linestyle=line,
                        label=f"{label_of(method)}, {bucket}",
                    )
            axis.set_yscale("log")
            axis.set_xlabel("updates")
            axis.set_ylabel("KL(p‖q), nats")
        handles, labels = panels[0][0].get_legend_handles_labels()
        panels[0][0].figure.legend(
            handles, labels, loc="outside lower center", ncols=2, handlelength=2.6
        )


FIGURE = Figure(
    "training",
    draw_training,
    "KL to the teacher on easy and hard tokens while runs train.",
    by_look=True,
)
