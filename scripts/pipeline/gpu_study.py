"""A study of a language model on one GPU, in a given time: teacher, cache, students, report.

    bash scripts/gpu_study.sh --data DATA --model FOLDER --output runs/gemma-gpu --minutes 9

DATA is made by prepare_llm_data. The model, fine-tuned, is the teacher; some of its layers, fine-tuned
too, are what every student goes on from (scripts/configs/gemma-gpu.yaml says how). Several trainings
share the card. Steps are done in the order of their importance; one that would not end in time is not
begun, and the report is about the runs that are there. The same command again resumes: finished steps
are skipped, an interrupted one starts over.

OUTPUT/runs has the runs and the report (small files, each complete as soon as its run is), OUTPUT/work
checkpoints, the cache and logs.

One file of more than 400 lines: the steps of the study, in the order in which they are done.
"""

import argparse
import hashlib
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ("--user-dir", ROOT / "sekd_fairseq", "--task", "self_evolution_kd")
SUBSET = "test"
#: Reads the commands' options as the commands do.
CHECK = Path(__file__).with_name("check.py")


@dataclass(frozen=True)
class Step:
    """One job: a shell command, what must be finished before, and how long it may take.

    Attributes
    ----------
    kind
        Steps of a kind take about as long: ``student``, ``judge``, else of their own.
    folders
        Where it writes, emptied before it begins.
    """

    name: str
    kind: str
    command: str
    folders: tuple[Path, ...]
    needs: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """What it takes a place of: trainings fill the card's memory, the others do not."""
        return "judge" if self.kind == "judge" else "training"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bash scripts/gpu_study.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", required=True, type=Path, metavar="DIR", help="made by prepare_llm_data"
    )
    parser.add_argument(
        "--model", required=True, type=Path, metavar="DIR", help="folder of a causal language model"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        default=[ROOT / "scripts" / "configs" / "gemma-gpu.yaml"],
        metavar="FILE",
        help="what is trained, and what further files change (default: scripts/configs/gemma-gpu.yaml)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=0,
        help="end after so many, with a report; 0: when all is done",
    )
    parser.add_argument("--plan", action="store_true", help="print the steps and do nothing")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU, nor half precision")
    return parser.parse_args(arguments)


def options(*mappings: Mapping[str, Any], cpu: bool = False) -> list[str]:
    """Parts of the configuration as command-line options; true is an option without a value. Of two
    values of a key the later counts, false and null take it out."""
    words: list[str] = []
    for key, value in {k: v for mapping in mappings for k, v in mapping.items()}.items():
        if value is None or value is False or (cpu and key in ("bf16", "fp16")):
            continue
        words += [f"--{key}"] + ([] if value is True else [str(value)])
    return words + (["--cpu"] if cpu else [])


def merged(first: dict[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the values of a second one put in."""
    both = dict(first)
    for key, value in second.items():
        nested = isinstance(value, dict) and isinstance(both.get(key), dict)
        both[key] = merged(both[key], value) if nested else value
    return both


def direction_of(data: Path) -> tuple[str, str]:
    """Source and target language of a data directory."""
    for path in sorted((data / "bin").glob(f"{SUBSET}.*-*.*.idx")):
        source, _, target = path.name.split(".")[1].partition("-")
        return source, target
    sys.exit(
        f"error: {data}: expected bin/{SUBSET}.XX-YY.XX.idx, found none; "
        "make the folder with python -m sekd_fairseq.prepare_llm_data"
    )


class Plan:
    """The steps of a study, in the order of their importance."""

    def __init__(self, args: argparse.Namespace, config: Mapping[str, Any]) -> None:
        self.config = config
        self.cpu = args.cpu or not torch.cuda.is_available()
        self.data, self.model = args.data, args.model
        self.work = args.output / "work"
        self.runs = args.output / "runs"
        self.source, self.target = direction_of(args.data)

    def steps(self) -> list[Step]:
        """Teacher, start and cache; then each method's seeds, trained and judged, so that what is left out
        is a method and not a seed."""
        methods = {name: own for name, own in self.config["methods"].items() if own}
        first = next(iter(methods), None)
        cross_entropy = {"criterion": "label_smoothed_cross_entropy", "label-smoothing": 0}
        steps = [
            self._train("teacher", "teacher", self.config["teacher"], cross_entropy),
            self._train("start", "start", self.config["start"], cross_entropy),
            self._cache(),
        ]
        for method, own in methods.items():
            for seed in self.config["seeds"]:
                name = f"{method}.{seed}"
                start = {"finetune-from-model": self._checkpoint("start"), "seed": seed}
                needs = ["start"]
                if own["criterion"] in ("cached_kd", "self_evolution_kd"):
                    start["teacher-cache"] = self.work / "cache"
                    needs.append("cache")
                steps.append(
                    self._train(name, "student", self.config["student"], own, start, needs=needs)
                )
                steps.append(self._judge(name))
            if method == first:
                steps.append(self._judge("teacher"))
        return steps

    def report(self) -> list[str]:
        """The command that compares the runs that are there."""
        command = [sys.executable, "-m", "analysis.transfer", self.runs, "--subset", SUBSET]
        return [str(word) for word in [*command, "--output", self.runs / "report"]]

    def _checkpoint(self, name: str) -> Path:
        return self.work / name / "checkpoints" / "checkpoint_best.pt"

    def _train(
        self, name: str, kind: str, *mappings: Mapping[str, Any], needs: Iterable[str] = ()
    ) -> Step:
        folder = self.work / name
        command = [sys.executable, "-m", "fairseq_cli.train", self.data / "bin", *PLUGIN]
        command += ["--hf-model", self.model, "--log-format", "json", "--log-interval", "10"]
        command += ["--no-epoch-checkpoints", "--no-last-checkpoints", "--no-save-optimizer-state"]
        command += ["--best-checkpoint-metric", "nll_loss", "--save-dir", folder / "checkpoints"]
        command += ["--log-file", folder / "train.jsonl"]
        command += options(self.config["training"], *mappings, cpu=self.cpu)
        return Step(name, kind, shell(command), (folder,), tuple(needs))

    def _cache(self) -> Step:
        command = [sys.executable, "-m", "sekd_fairseq.build_cache", self.data / "bin"]
        command += ["--path", self._checkpoint("teacher"), "--output", self.work / "cache"]
        command += ["--subset", f"train,valid,{SUBSET}"]
        command += options(self.config["cache"], cpu=self.cpu)
        return Step("cache", "cache", shell(command), (self.work / "cache",), ("teacher",))

    def _judge(self, name: str) -> Step:
        """Translate the test set, score the translations, and compare with the teacher token by token."""
        python, run = sys.executable, self.runs / f"{self.source}-{self.target}" / name
        model, folder = self._checkpoint(name), self.work / f"{name}.judge"
        out = folder / f"{SUBSET}.out"
        generate = [python, "-m", "fairseq_cli.generate", self.data / "bin", *PLUGIN]
        generate += ["--path", model, "--gen-subset", SUBSET, "--log-format", "none"]
        generate += options(self.config["generation"], cpu=self.cpu)
        text = self.data / SUBSET
        evaluate = [python, "-m", "sekd_fairseq.evaluate", out, "--run", run, "--subset", SUBSET]
        evaluate += ["--source", f"{text}.{self.source}", "--reference", f"{text}.{self.target}"]
        evaluate += ["--target-lang", self.target]
        score = [python, "-m", "sekd_fairseq.score", self.data / "bin", "--path", model]
        score += ["--subset", SUBSET, "--run", run, *options(self.config["score"], cpu=self.cpu)]
        needs: tuple[str, ...] = (name,)
        if name == "teacher":  # is not compared with itself
            score += ["--method", "teacher"]
        else:
            score += ["--teacher-cache", self.work / "cache"]
            needs = (name, "cache")
        # score writes run.json, by which the report finds a run, so it comes last.
        steps = [f"{shell(generate)} > {shlex.quote(str(out))}", shell(evaluate), shell(score)]
        return Step(f"{name}.judge", "judge", " && ".join(steps), (folder, run), needs)


def shell(words: Sequence[object]) -> str:
    """Words as a shell command."""
    return shlex.join(map(str, words))


def commands_of(steps: Sequence[Step]) -> dict[str, list[str]]:
    """Module and arguments of each command of Python, by step and module, as check.py reads them."""
    found = {}
    for step in steps:
        for command in step.command.split(" && "):
            match list(itertools.takewhile(">".__ne__, shlex.split(command))):
                case [_, "-m", module, *words]:
                    found[f"{step.name}, {module}"] = [module, *words]
    return found


def check_options(steps: Sequence[Step]) -> None:
    """Exit where a command would refuse its options, some of them after hours."""
    if commands := commands_of(steps):
        done = subprocess.run(
            [sys.executable, CHECK],
            input=json.dumps(commands),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"error: {'; '.join(done.stdout.splitlines()) or done.stderr}")


@dataclass
class Running:
    """A step under way."""

    step: Step
    process: subprocess.Popen[bytes]
    start: float


@dataclass
class Scheduler:
    """Does steps side by side until all are done, none may be begun any more, or time is up.

    Parameters
    ----------
    steps
        Of two that are ready, the one that stands first is begun first.
    jobs
        How many at a time: ``judge`` of those that judge, ``training`` of all others.
    work
        Where logs and marks of steps are.
    inputs
        Changes where the data or the model do: then nothing that was done counts.
    expected
        Seconds of a kind of step, until one has been measured; a kind that is not there takes none.
    end
        ``time.monotonic()`` at which steps that are not done are stopped, or infinity.
    """

    steps: Sequence[Step]
    work: Path
    inputs: str
    jobs: Mapping[str, int]
    expected: dict[str, float]
    end: float
    start: float = field(default_factory=time.monotonic)
    failed: set[str] = field(default_factory=set)
    running: list[Running] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.digests: dict[str, str] = {}
        for step in self.steps:
            parts = [self.inputs, step.command, *(self.digests[name] for name in step.needs)]
            self.digests[step.name] = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        self.done = {step.name for step in self.steps if self._marked(step)}

    def run(self) -> None:
        """Do what can be done; no child is left behind, whatever happens."""
        try:
            while time.monotonic() < self.end:
                self._collect()
                self._begin()
                if not self.running:
                    return
                time.sleep(0.2)
        finally:
            self._stop()

    def tell(self, text: str) -> None:
        """A line on the terminal, with the seconds since the start."""
        print(f"{time.monotonic() - self.start:6.0f} s  {text}", flush=True)

    def log(self, step: Step) -> Path:
        return self.work / "logs" / f"{step.name}.log"

    def _mark(self, step: Step) -> Path:
        return self.work / "marks" / step.name

    def _marked(self, step: Step) -> bool:
        mark = self._mark(step)
        return mark.exists() and mark.read_text() == self.digests[step.name]

    def _begin(self) -> None:
        busy = {item.step.name: item.step.place for item in self.running}
        for step in self.steps:
            if step.name in self.done | self.failed | busy.keys():
                continue
            free = self.jobs[step.place] - list(busy.values()).count(step.place)
            if free > 0 and self.done.issuperset(step.needs) and self._fits(step):
                self._start(step)
                busy[step.name] = step.place

    def _fits(self, step: Step) -> bool:
        """Whether a step, and for a training what makes use of it, would end in time."""
        needed = self.expected.get(step.kind, 0.0)
        if step.kind == "student":
            needed += self.expected.get("judge", 0.0)
        return time.monotonic() + needed <= self.end

    def _start(self, step: Step) -> None:
        for folder in step.folders:
            shutil.rmtree(
                folder, ignore_errors=True
            )  # what a stopped one left, or one of other settings
            folder.mkdir(parents=True)
        self._mark(step).unlink(missing_ok=True)
        with self.log(step).open("wb") as log:
            process = subprocess.Popen(
                ["bash", "-c", step.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.running.append(Running(step, process, time.monotonic()))
        self.tell(f"{step.name} begins")

    def _collect(self) -> None:
        for item in list(self.running):
            status = item.process.poll()
            if status is None:
                continue
            self.running.remove(item)
            step, seconds = item.step, time.monotonic() - item.start
            if status == 0:
                self._mark(step).write_text(self.digests[step.name])
                self.done.add(step.name)
                self.expected[step.kind] = seconds
                self.tell(f"{step.name} is done, {seconds:.0f} s")
            else:
                self.failed.add(step.name)
                self.tell(f"{step.name} has failed ({self.log(step)}):")
                lines = self.log(step).read_text(errors="replace").splitlines()
                print("\n".join(lines[-15:]), flush=True)

    def _stop(self) -> None:
        for item in self.running:
            self.tell(f"{item.step.name} is stopped")
            os.killpg(item.process.pid, signal.SIGTERM)
        for item in self.running:
            try:
                item.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(item.process.pid, signal.SIGKILL)
                item.process.wait()
        self.running.clear()


def inputs_of(data: Path, model: Path) -> str:
    """What data and model are, as text: the data's record, the sizes of the model's files."""
    record = (
        (data / "data.json").read_text(encoding="utf-8") if (data / "data.json").exists() else ""
    )
    files = sorted((path.name, path.stat().st_size) for path in model.iterdir() if path.is_file())
    return record + json.dumps(files)


def stop(*_: object) -> None:
    """End as after an interrupt, so that no step goes on alone."""
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    begin = time.monotonic()
    args = parse(arguments)
    for path, what in ((args.data / "bin", "data directory"), (args.model, "model")):
        if not path.is_dir():
            sys.exit(f"error: {path}: expected the {what}, found no such folder")
    config: dict[str, Any] = {}
    for path in args.config:
        config = merged(config, yaml.safe_load(path.read_text(encoding="utf-8")))
    plan = Plan(args, config)
    steps = plan.steps()
    if args.plan:
        print("\n".join(f"{step.name}: {step.command}" for step in steps))
        return
    check_options(Plan(args, config | {"seeds": config["seeds"][:1]}).steps())
    for folder in ("logs", "marks"):
        (plan.work / folder).mkdir(parents=True, exist_ok=True)
    expected = {kind: float(value) for kind, value in config["seconds"].items()}
    end = begin + 60 * args.minutes - expected["report"] if args.minutes else float("inf")
    # transformers would import jax where that is installed, in each of the many processes.
    for key, value in (("OMP_NUM_THREADS", "2"), ("HF_HUB_OFFLINE", "1"), ("USE_FLAX", "0")):
        os.environ.setdefault(key, value)
    signal.signal(signal.SIGTERM, stop)
    inputs = inputs_of(args.data, args.model)
    scheduler = Scheduler(steps, plan.work, inputs, config["jobs"], expected, end, begin)
    try:
        scheduler.run()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    left = [step.name for step in steps if step.name not in scheduler.done]
    if left:
        scheduler.tell(f"not done: {', '.join(left)}; the same command goes on with them")
    judged = [name for name in scheduler.done if name.endswith(".judge")]
    status = 0
    if judged:
        status = subprocess.run(plan.report(), check=False).returncode
        scheduler.tell(f"report on {len(judged)} runs: {plan.runs / 'report' / 'report.md'}")
    sys.exit(1 if scheduler.failed or status else 0)


if __name__ == "__main__":
    main()
