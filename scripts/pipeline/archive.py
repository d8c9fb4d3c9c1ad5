"""Keep what a study gave, small and without other people's text.

    python scripts/pipeline/archive.py save scripts/configs/NAME.yaml results/STUDY [--records] [--figures methods.png]
    python scripts/pipeline/archive.py restore scripts/configs/NAME.yaml results/STUDY

Several configurations are merged as snakemake merges them. ``save`` copies the report, its main tables,
the figures that are shown somewhere, the configuration, and the time of each step; ``STUDY.csv`` gets a line per run and
``STUDY.json`` the gains over word-level KD. With ``--records`` it also keeps, for one study that anyone
shall be able to judge again, what training logged, and the records, scores and translations of every
finished run, three files for each direction (:mod:`records`). Run it as often as you like.

``restore`` puts the runs of a study kept with ``--records`` back. ``python -m analysis.transfer`` then
judges them again: everything where the data are prepared (``snakemake ... --until prepare``), and without
data all but the translations, whose references are not kept. Where the data are prepared, snakemake takes
these runs for done and a larger study goes on from them.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from PIL import Image
from plan import Plan
from progress import parse_line
from records import keep_direction, restore_direction
from snakemake.utils import update_config

from analysis.chapters.quality import main_baseline
from analysis.runs.errors import UserError, one_line_errors
from analysis.runs.methods import label_of
from analysis.terminal import warn

SCRIPTS = Path(__file__).resolve().parents[1]
sys.path.append(str(SCRIPTS / "benchmarks"))
from benchmarking import Target, write_targets  # noqa: E402

#: What is kept of a report's tables.
TABLES = ("results.csv", "methods.csv", "claims.csv")
#: What gains are not counted of.
BASELINES = ("teacher", "finetune", "word_kd", "placebo")
#: What fairseq logged of a training, beside its losses.
LOGGED = (
    "loss", "difficulty", "gamma", "hard_share", "hard_lambda", "kl_easy", "kl_hard",
    "easy_gradient", "hard_gradient", "agreement",
)  # fmt: skip


def merged(configs: Sequence[Path]) -> dict[str, Any]:
    """The configuration of files given together."""
    config: dict[str, Any] = {}
    for path in configs:
        try:
            given = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: expected YAML, found {error}") from None
        if not isinstance(given, dict):
            raise UserError(f"{path}: expected keys and values, found {given!r:.50}")
        update_config(config, given)
    return config


def finished(plan: Plan) -> list[Path]:
    """The runs that are trained, translated and scored."""
    marks = ("train.done", f"{plan.subset}.out", f"score.{plan.subset}.done", "scores.json")
    runs = [path.parent for path in sorted(Path(plan.runs).glob("*/*/run.json"))]
    return [run for run in runs if all((run / mark).exists() for mark in marks)]


def save(plan: Plan, output: Path, records: bool, figures: Sequence[str]) -> None:
    """Copy what is finished."""
    runs = finished(plan)
    if not runs:
        raise UserError(f"{plan.runs}: expected finished runs, found none")
    output.mkdir(parents=True, exist_ok=True)
    settings = yaml.safe_dump(plan.config, sort_keys=False, allow_unicode=True)
    (output / "config.yaml").write_text(settings, encoding="utf-8")
    keep_report(Path(plan.report), output, figures)
    steps = seconds_of_steps(plan)
    if not steps.empty:
        steps.to_csv(output / "steps.csv", index=False)
    summarise(plan, runs, steps, output)
    if records:
        log = training_log(plan)
        if not log.empty:
            log.to_csv(output / "training.csv", index=False)
        for direction in sorted({run.parent for run in runs}):
            here = [run for run in runs if run.parent == direction]
            keep_direction(here, plan.subset, output / "runs" / direction.name)
    print(f"{output}: {len(runs)} runs")


def keep_report(report: Path, output: Path, figures: Sequence[str]) -> None:
    """Copy the report, without the figures that are not kept."""
    for folder, names in (("tables", TABLES), ("figures", figures)):
        for path in (report / folder / name for name in names):
            if path.exists():
                (output / folder).mkdir(exist_ok=True)
                copy = shutil.copyfile(path, output / folder / path.name)
                if path.suffix == ".png":
                    with_few_colours(copy)
    if (report / "report.md").exists():
        text = (report / "report.md").read_text(encoding="utf-8")
        images = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
        for name in (name for name in images if not (output / name).exists()):
            text = re.sub(rf"!\[[^\]]*\]\({re.escape(name)}\)\n*", "", text)
        (output / "report.md").write_text(text, encoding="utf-8")


def with_few_colours(figure: Path) -> None:
    """Write a PNG with a palette, which looks the same and takes two fifths."""
    with Image.open(figure) as image:
        image.convert("RGB").quantize(256).save(figure, optimize=True)


def logged(log: Path) -> list[dict[str, Any]]:
    """The records in a log of a training."""
    records = map(parse_line, log.read_text(encoding="utf-8").splitlines())
    return [record for record in records if record is not None]


def seconds_of_training(log: Path) -> float:
    """How long fairseq trained, all attempts of an interrupted run together."""
    seconds, before = 0.0, 0.0
    for record in logged(log):
        wall = float(record.get("wall", before))  # since the start of the attempt
        seconds += wall - before if wall >= before else wall
        before = wall
    return seconds


def seconds_of_steps(plan: Plan) -> pd.DataFrame:
    """How long each step took: snakemake's benchmark files, which know the last attempt only, and of
    trainings their logs."""
    rows = []
    for path in sorted(Path(plan.data, "times").glob("*.tsv")):
        direction, step = path.stem.split(".")
        rows.append(
            {"place": f"{plan.data}/{direction}", "step": step, "seconds": seconds_in(path)}
        )
    for path in sorted(Path(plan.runs).glob("*/*/times/*.tsv")):
        run, log = path.parents[1], path.parents[1] / "train.jsonl"
        trained = path.stem == "train" and log.exists()
        seconds = seconds_of_training(log) if trained else seconds_in(path)
        rows.append({"place": run.as_posix(), "step": path.stem, "seconds": round(seconds)})
    return pd.DataFrame(rows)


def seconds_in(benchmark: Path) -> int:
    """What snakemake measured of a step."""
    return round(pd.read_csv(benchmark, sep="\t")["s"].mean())


def training_log(plan: Plan, every: int = 50) -> pd.DataFrame:
    """The figures of every fiftieth update of each run."""
    rows = []
    for log in sorted(Path(plan.runs).glob("*/*/train.jsonl")):
        label = log.parent.relative_to(plan.runs).as_posix()
        for record in logged(log):
            update = int(record["num_updates"])
            if update % every == 0:
                found = {key: float(record[key]) for key in LOGGED if key in record}
                rows.append({"run": label, "update": update} | found)
    table = pd.DataFrame(rows)
    return table if table.empty else table.drop_duplicates(["run", "update"], keep="last")


def summarise(plan: Plan, runs: Sequence[Path], steps: pd.DataFrame, output: Path) -> None:
    """``STUDY.csv``, a line per run, and ``STUDY.json``, the gains over word-level KD."""
    rows = []
    for run in runs:
        record, scores = (
            json.loads((run / f"{name}.json").read_text()) for name in ("run", "scores")
        )
        row = {key: record[key] for key in ("direction", "method", "seed", "updates", "parameters")}
        row["run"] = run.relative_to(plan.runs).as_posix()
        found = scores[plan.subset]
        for metric in ("bleu", "chrf"):
            row[f"{plan.subset}_{metric}"] = round(found[metric]["score"], 4)
        row |= {key: round(found[key], 4) for key in ("length_ratio", "lenpen") if key in found}
        if not steps.empty:
            own = steps[steps["place"] == run.as_posix()]
            row |= {f"{step.step}_seconds": step.seconds for step in own.itertuples()}
        cache = Path(plan.data, record["direction"], "cache")
        if record["method"] == "teacher" and cache.is_dir():
            row["cache_bytes"] = sum(f.stat().st_size for f in cache.rglob("*") if f.is_file())
        rows.append(row)
    pd.DataFrame(rows).to_csv(output.with_name(f"{output.name}.csv"), index=False)
    methods = output / "tables" / "methods.csv"
    targets = gains(pd.read_csv(methods)) if methods.exists() else []
    write_targets(output.name, targets, torch.device("cpu"), output.parent)


def gains(table: pd.DataFrame) -> list[Target]:
    """What every method that was compared with word-level KD, or with the ``--baseline`` of the report, gains
    in BLEU, over all directions or each that it was run in, and the smallest gain that so many runs would
    detect."""
    table = table[table["metric"] == "BLEU"]
    baseline = main_baseline(table, "gain_over_")
    if baseline in ("", "finetune"):
        return []
    column, name = (
        f"gain_over_{baseline}",
        "word KD" if baseline == "word_kd" else label_of(baseline),
    )
    everywhere = table.loc[table["direction"] == "all", "method"]
    table = table[(table["direction"] == "all") | ~table["method"].isin(everywhere)]
    table = table[~table["method"].isin(BASELINES) & table[column].notna()]
    targets = []
    for row in table.to_dict("records"):
        who = f"{row['method']}, {row['direction']}, {row['seeds']} seeds"
        gain, p = row[column], row[f"{column}_p_holm"]
        targets.append(Target(f"BLEU gain over {name}: {who}", gain, 1.4, at_least=True))
        if gain > 0 and not pd.isna(p):  # of a loss there is none to speak of, of one seed none
            targets.append(Target(f"its p-value, corrected: {who}", p, 0.05))
        smallest = row[f"{column}_detectable"]
        targets.append(Target(f"smallest gain that is detected: {who}", smallest, 0.5))
    return targets


def restore(configs: Sequence[Path], plan: Plan, output: Path) -> None:
    """Put kept runs back, directions whole, and tell snakemake that they are done."""
    kept = sorted((output / "runs").glob("*.json"))
    if not kept:
        raise UserError(f"{output}: expected runs, found none; it was kept without --records")
    directions: list[str] = []
    restored: set[Path] = set()
    for path in kept:
        direction = path.stem
        teacher = Path(plan.main_runs, direction, "teacher")
        if (teacher / "checkpoints").exists() and not (teacher / "train.done").exists():
            raise UserError(
                f"{teacher}: expected a teacher that is trained, or none, found one under way, which would "
                "be marked as done; let it end, or move it away"
            )
        text = Path(plan.data, direction, plan.subset)
        prepared = text.with_name("data.json").exists()
        runs = restore_direction(
            path.with_suffix(""),
            plan.subset,
            Path(plan.runs, direction),
            text if prepared else None,
        )
        print(
            f"{direction}: {len(runs)} runs" + ("" if prepared else ", without their translations")
        )
        if prepared:
            directions.append(direction)
            restored.update(runs)
    if directions:
        mark_done(configs, plan, directions, restored)


def mark_done(
    configs: Sequence[Path], plan: Plan, directions: Sequence[str], restored: Set[Path]
) -> None:
    """Make the marks of restored runs and of what they were made from, and let snakemake date them."""
    here = Plan(plan.config | {"directions": list(directions)}, plugin="", gpu=False)
    students = {Path(run) for run in here.run_folders if not run.endswith("/teacher")}
    to_train = students - restored
    for path in here.everything:
        mark = Path(path)
        made = mark.suffix in (".done", ".out", ".parquet") and to_train.isdisjoint(mark.parents)
        if made and not mark.exists():
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
    snakemake = [
        sys.executable,
        "-m",
        "snakemake",
        "-s",
        SCRIPTS / "Snakefile",
        "-c1",
        "--quiet",
        "all",
    ]
    steps = ["--touch", "--no-hooks", "--until", "evaluate", "score"]  # nothing is run
    if subprocess.run([*snakemake, *steps, "--configfile", *configs]).returncode:
        warn(
            "the runs are restored and can be judged, but snakemake would make them again (its message is "
            "above); expected the corpus where the configuration says"
        )
        return
    print(
        f"Teachers and caches were not kept: to train more students, delete {plan.main_runs}/DIRECTION/"
        f"teacher/train.done and {plan.data}/DIRECTION/cache.done"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("save", "restore"))
    parser.add_argument("config", type=Path, nargs="+", help="configuration, or several, merged")
    parser.add_argument("output", type=Path, help="where the study is kept")
    parser.add_argument(
        "--records", action="store_true", help="save what is needed to judge the study again"
    )
    parser.add_argument(
        "--figures", nargs="+", default=[], metavar="PNG", help="figures that are shown somewhere"
    )
    args = parser.parse_args(arguments)
    with one_line_errors():
        plan = Plan(merged(args.config), plugin="", gpu=False)
        if args.action == "save":
            save(plan, args.output, args.records, args.figures)
        else:
            restore(args.config, plan, args.output)


if __name__ == "__main__":
    main()
