"""Keep what a study gave, without its checkpoints and without other people's text.

    python scripts/pipeline/archive.py save scripts/configs/NAME.yaml results/STUDY
    python scripts/pipeline/archive.py restore scripts/configs/NAME.yaml results/STUDY

Several configurations are merged as snakemake merges them. ``save`` copies, of every finished run, its
record, scores, translations and token records to ``results/STUDY/runs`` (rounded, without the pieces of
the references; of updates before the last only the KL to the teacher; what is the same in all runs of a
direction once); further the report's tables and figures, the configuration, what training logged, and
the time that each step took. Run it as often as you like; what is there already stays. With
``--no-records``, for a study that is finished, the token records are left out, which are most of it.

``restore`` puts kept runs back where snakemake looks for them, on a machine that has the corpus but
no checkpoints: a direction all of whose runs were kept is then not trained again, and the report
covers it. Prepare the data first: ``snakemake ... --until prepare``.
"""

import argparse
import base64
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import torch
import yaml
from snakemake.utils import update_config

from analysis.runs.files import DamagedFile, is_sealed, read_json, sealed_parquet
from analysis.runs.languages import languages_of
from analysis.runs.run_record import FORMAT_VERSION
from analysis.runs.token_records import COLUMNS

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from benchmarking import Target, write_targets

#: Columns of token records that are the teacher's or the test set's, so the same in all runs of a
#: direction: kept once, in SHARED_FILE.
SHARED = (
    *("sentence", "position", "token", "piece", "frequency"),
    *("p_gold", "p_entropy", "p_max", "p_top1", "p_top1_piece"),
)
SHARED_FILE = "teacher.parquet"


@dataclass(frozen=True)
class Study:
    """Where the pipeline keeps a study: the key that data and main runs share, the folder of its
    runs, the split it is judged on."""

    name: str
    runs: Path
    subset: str
    config: dict[str, Any]

    @classmethod
    def of(cls, configs: Sequence[Path]) -> "Study":
        """The study of configurations given together."""
        merged: dict[str, Any] = {}
        for path in configs:
            update_config(merged, yaml.safe_load(path.read_text(encoding="utf-8")))
        name = merged["name"]
        runs = Path("runs", merged.get("runs", name))
        return cls(name, runs, merged.get("subset", "test"), merged)

    @property
    def marks(self) -> tuple[str, ...]:
        """What a finished run has, in the order in which it is made."""
        return ("train.done", f"{self.subset}.out", f"score.{self.subset}.done")


def keep_records(path: Path, place: Path, shared_file: Path, earlier: bool) -> None:
    """Token records that say the same to the analysis, in a tenth of the space: rounded numbers, and of
    each piece only whether it begins a word; of an ``earlier`` update only the KL to the teacher."""
    table = read_whole(path)
    columns: dict[str, pa.Array] = {}
    for item in table.schema:
        column = table.column(item.name)
        if item.name == "piece":
            column = pa.array(markers(column.combine_chunks().cast(pa.string()).to_pylist()))
        elif item.name.endswith("_piece"):
            column = pa.array([""] * len(table))
        elif pa.types.is_float32(item.type):
            column = pa.array(rounded(column.to_numpy()))
        columns[item.name] = column
    shared = pa.table({name: columns.pop(name) for name in SHARED})
    if not shared_file.exists():
        write_compressed(shared, shared_file)
    elif not read_whole(shared_file).equals(shared):
        sys.exit(
            f"error: {path}: expected the tokens and the teacher of {shared_file}, found others; "
            "score the run again, or delete what is kept of another study"
        )
    if earlier:
        columns = {"kl": columns["kl"]}
    else:
        del columns["kl"]  # the sum of its two parts
    kept = pa.table(columns).replace_schema_metadata(table.schema.metadata)
    write_compressed(kept, place)


def markers(pieces: Sequence[str]) -> list[str]:
    """Of each piece what says whether it, or the next, begins a word
    (:func:`analysis.sums.buckets.by_piece`), and nothing of the text."""
    found = []
    for piece in pieces:
        end = "@@" if piece.endswith("@@") else ""
        found.append(piece[0] if piece.startswith(("▁", "Ġ")) else end)
    return found


def restore_records(place: Path, shared: pa.Table) -> None:
    """Turn kept token records into whole ones, in place; what was not kept is NaN, -1 or empty."""
    kept = read_whole(place)
    columns = {name: kept.column(name) for name in kept.column_names}
    if "kl" not in columns:
        columns["kl"] = pa.compute.add(columns["kl_target"], columns["kl_nontarget"])
    else:
        empty = {"float": np.nan, "int": -1, "text": ""}
        for name, column in COLUMNS.items():
            if name not in columns and name not in shared.column_names:
                dtype = {"float": np.float32, "int": np.int32, "text": object}[column.kind]
                columns[name] = pa.array(np.full(len(kept), empty[column.kind], dtype))
    columns |= {name: shared.column(name) for name in shared.column_names}
    table = pa.table({name: columns[name] for name in COLUMNS})
    # Kept by an earlier version or not, what is written now carries a checksum.
    version = {b"sekd.format_version": str(FORMAT_VERSION).encode()}
    write_compressed(table.replace_schema_metadata(kept.schema.metadata | version), place)


def read_whole(path: Path) -> pa.Table:
    """A Parquet file, after a look at its checksum."""
    try:
        is_sealed(path)
        return pq.read_table(path)
    except (DamagedFile, OSError, pa.ArrowException) as error:
        sys.exit(f"error: {path}: expected a whole Parquet file ({' '.join(str(error).split())})")


def write_compressed(table: pa.Table, path: Path) -> None:
    """Write a Parquet file as small as zstd makes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(sealed_parquet(table, compression="zstd", compression_level=19))


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 with 7 significant bits, which compress well; 1 and 0 stay what they are."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(mantissa * 2**7) / 2**7, exponent).astype(np.float32)


def seconds_of_training(log: Path) -> float:
    """How long fairseq trained, all attempts of a run that was stopped and went on together."""
    seconds, before = 0.0, 0.0
    for record in logged(log):
        wall = float(record.get("wall", before))  # since the start of the attempt
        seconds += wall - before if wall >= before else wall
        before = wall
    return seconds


def logged(log: Path) -> Iterator[dict[str, Any]]:
    """The records in a log of a training."""
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line[line.index("{") :])
        except ValueError:
            continue
        if isinstance(record, dict) and "num_updates" in record:
            yield record


def seconds_of_steps(study: Study) -> list[dict[str, Any]]:
    """How long each step took: snakemake's own records, which know the last attempt only, and of
    trainings their logs."""
    rows = []
    for path in Path(".snakemake/metadata").rglob("*"):
        if not path.is_file():
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        try:
            output = base64.b64decode(path.name).decode()
        except ValueError:
            continue
        start, end = record.get("starttime"), record.get("endtime")
        folders = (f"{study.runs}/", f"data/{study.name}/")
        if output.startswith(folders) and start and end:
            log = Path(output).with_name("train.jsonl")
            trained = output.endswith("/train.done") and log.exists()
            seconds = round(seconds_of_training(log) if trained else end - start)
            rows.append({"rule": record["rule"], "output": output, "seconds": seconds})
    return rows


def add_kept(path: Path, rows: list[dict[str, Any]], key: str) -> pd.DataFrame:
    """New rows, and of those kept in ``path`` before what has another ``key``."""
    before = pd.read_csv(path).to_dict("records") if path.exists() else []
    known = {row[key] for row in rows}
    return pd.DataFrame(rows + [row for row in before if row[key] not in known])


def save(study: Study, output: Path, records: bool = True) -> None:
    """Copy what is finished."""
    kept = 0
    for record in sorted(study.runs.glob("*/*/run.json")):
        run = record.parent
        if not all((run / mark).exists() for mark in (*study.marks, "scores.json")):
            continue
        target = output / "runs" / run.relative_to(study.runs)
        target.mkdir(parents=True, exist_ok=True)
        for file in ("run.json", "scores.json"):
            shutil.copyfile(run / file, target / file)
        (target / "hyps").mkdir(exist_ok=True)
        text = Path("hyps", f"{study.subset}.txt")
        shutil.copyfile(run / text, target / text)
        last = read_json(record)[0]["updates"]
        for path in sorted((run / "tokens" / study.subset).glob("*.parquet")) if records else ():
            place, shared = target / path.relative_to(run), target.parent / SHARED_FILE
            keep_records(path, place, shared, earlier=path.stem != str(last))
        kept += 1
    if not kept:
        sys.exit(f"error: {study.runs}: expected finished runs, found none")
    report = study.runs / ("report" if study.subset == "test" else f"report-{study.subset}")
    for part in ("tables", "figures"):
        if (report / part).is_dir():
            shutil.copytree(report / part, output / part, dirs_exist_ok=True)
    if (report / "report.md").exists():
        shutil.copyfile(report / "report.md", output / "report.md")
    settings = yaml.safe_dump(study.config, sort_keys=False, allow_unicode=True)
    (output / "config.yaml").write_text(settings, encoding="utf-8")
    steps = add_kept(output / "steps.csv", seconds_of_steps(study), "output")
    if not steps.empty:
        steps.sort_values("output").to_csv(output / "steps.csv", index=False)
    training_log(study, output)
    summarise(study, output)
    print(f"{output}: {kept} runs")


#: What fairseq logged of a training, beside its losses.
LOGGED = (
    *("loss", "difficulty", "gamma", "hard_share", "hard_lambda", "kl_easy", "kl_hard"),
    *("easy_gradient", "hard_gradient", "agreement"),
)


def training_log(study: Study, output: Path, every: int = 50) -> None:
    """``training.csv``: the figures of every fiftieth update of each run."""
    path = output / "training.csv"
    rows = []
    for log in sorted(study.runs.glob("*/*/train.jsonl")):
        label = log.parent.relative_to(study.runs).as_posix()
        for record in logged(log):
            update = int(record["num_updates"])
            if update % every == 0:
                found = {key: float(record[key]) for key in LOGGED if key in record}
                rows.append({"run": label, "update": update} | found)
    table = add_kept(path, rows, "run")
    if not table.empty:
        table = table.drop_duplicates(["run", "update"], keep="last")
        table.sort_values(["run", "update"]).to_csv(path, index=False)


def summarise(study: Study, output: Path) -> None:
    """``STUDY.csv``, a line a run, and ``STUDY.json``, the gains of SE-KD over word-level KD."""
    steps = pd.read_csv(output / "steps.csv") if (output / "steps.csv").exists() else None
    rows = []
    for path in sorted((output / "runs").glob("*/*/scores.json")):
        run, (scores, _) = path.parent, read_json(path)
        record, _ = read_json(run / "run.json")
        label = run.relative_to(output / "runs").as_posix()
        row = {key: record[key] for key in ("direction", "method", "seed", "updates", "parameters")}
        row["run"] = label
        for subset, found in scores.items():
            row |= {
                f"{subset}_{metric}": round(found[metric]["score"], 4)
                for metric in ("bleu", "chrf")
            }
        if steps is not None:
            for step, mark in zip(("train", "score"), study.marks[::2], strict=True):
                wanted = steps["output"] == f"{study.runs}/{label}/{mark}"
                row[f"{step}_seconds"] = steps.loc[wanted, "seconds"].max()
            wanted = steps["output"] == f"data/{study.name}/{record['direction']}/cache.done"
            if record["method"] == "teacher":
                row["cache_seconds"] = steps.loc[wanted, "seconds"].max()
        cache = Path("data", study.name, record["direction"], "cache")
        if record["method"] == "teacher" and cache.is_dir():
            row["cache_bytes"] = sum(f.stat().st_size for f in cache.rglob("*") if f.is_file())
        rows.append(row)
    pd.DataFrame(rows).to_csv(output.with_name(f"{output.name}.csv"), index=False)
    methods = output / "tables" / "methods.csv"
    targets = []
    if methods.exists():
        table = pd.read_csv(methods)
        table = table[table["metric"] == "BLEU"]
        scope = "all" if "all" in set(table["direction"]) else table["direction"].iloc[0]
        table = table[table["direction"] == scope]
        for row in table[table["method"].str.startswith("se_kd")].to_dict("records"):
            who = f"{row['method']}, {scope}, {row['seeds']} seeds"
            gain, p = row["gain_over_word_kd"], row["gain_over_word_kd_p_holm"]
            targets.append(Target(f"BLEU gain over word KD: {who}", gain, 1.4, at_least=True))
            if gain > 0:  # of a loss there is none to speak of
                targets.append(Target(f"its p-value, corrected: {who}", p, 0.05))
    write_targets(output.name, targets, torch.device("cpu"), output.parent)


def restore(study: Study, output: Path) -> None:
    """Put kept runs back, directions whole."""
    for direction in sorted(path for path in (output / "runs").iterdir() if path.is_dir()):
        source, target = languages_of(direction.name)
        data = Path("data", study.name, direction.name)
        if not (data / "data.json").exists():
            sys.exit(
                f"error: {data}: expected prepared data, found none; run snakemake with --until "
                "prepare first"
            )
        if not (direction / SHARED_FILE).exists():
            sys.exit(
                f"error: {direction}: expected token records, found none; the study was kept with "
                "--no-records and can only be read"
            )
        subset = study.subset
        kept = sorted(path for path in direction.iterdir() if path.is_dir())
        runs = [study.runs / direction.name / run.name for run in kept]
        shared = read_whole(direction / SHARED_FILE)
        for place in runs:
            shutil.copytree(direction / place.name, place, dirs_exist_ok=True)
            for records in (place / "tokens" / subset).glob("*.parquet"):
                restore_records(records, shared)
            for suffix, language in ((".src", source), (".ref", target)):
                text = data / f"{subset}.{language}"
                shutil.copyfile(text, place / "hyps" / f"{subset}{suffix}.txt")
        # None older than what it is made of, so that snakemake takes all for done, and none newer than
        # it must be: runs of the main study may be there already.
        main = Path("runs", study.name, direction.name)
        methods = [method for method in study.config["methods"].values() if method]
        made = [main / "teacher" / "train.done", data / "cache.done"]
        if any(method.get("targets") == "distilled" for method in methods):
            made.append(data / "distilled.done")
        starts = {method["warm-start"] for method in methods if "warm-start" in method}
        made += [
            main / f"{start}.{seed}" / "train.done"
            for start in sorted(starts)
            for seed in study.config["seeds"]
        ]
        latest = (data / "data.json").stat().st_mtime_ns
        for mark in made:
            if not mark.exists():
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.touch()
                os.utime(mark, ns=(latest, latest))
            latest = max(latest, mark.stat().st_mtime_ns)
        for run in runs:
            if run.name != "teacher":
                (run / "train.done").touch()
        for file in (f"{subset}.out", f"hyps/{subset}.txt", f"score.{subset}.done"):
            for run in runs:
                (run / file).touch()
        print(f"{direction.name}: {len(runs)} runs")
    print(
        "The teachers and caches of these directions were not kept: to train more students there, delete "
        f"their runs/{study.name}/DIRECTION/teacher/train.done and data/{study.name}/DIRECTION/cache.done"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("save", "restore"))
    parser.add_argument("config", type=Path, nargs="+", help="configuration, or several, merged")
    parser.add_argument("output", type=Path, help="where its outputs are kept")
    parser.add_argument(
        "--no-records", dest="records", action="store_false", help="save without token records"
    )
    args = parser.parse_args()
    study = Study.of(args.config)
    if args.action == "save":
        save(study, args.output, args.records)
    else:
        restore(study, args.output)


if __name__ == "__main__":
    main()
