"""What the rules of ``scripts/Snakefile`` read, make and run, worked out from a configuration.

A study beside the main one shares its data, teacher and caches: its configuration gives another folder of
``runs``, and maybe another ``subset`` to judge on (hyper-parameters are chosen on the validation set).
A study with other pieces has data of its own and the teacher of another study (``teacher: {of: NAME}``).
"""

import filecmp
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

from analysis.runs.errors import UserError

SCHEMA = Path(__file__).with_name("config.schema.yaml")
#: Reads the commands' options as the commands do.
CHECK = Path(__file__).with_name("check.py")


def options(mapping: Mapping[str, Any]) -> list[str]:
    """A part of the configuration as command-line options; true is an option without a value, false and
    null take out an option that another configuration gave."""
    words = []
    for key, value in mapping.items():
        if value is None or value is False:
            continue
        words += [f"--{key}"] + ([] if value is True else [str(value)])
    return words


#: Criterions that read a teacher cache.
DISTILLING = ("self_evolution_kd", "cached_kd")
#: Keys of a method that are the pipeline's own; the others are options of fairseq-train.
OWN_KEYS = ("targets", "warm-start", "stored-difficulty", "rounds")
#: What every training is told.
TRAINING = options(
    {
        "log-format": "json",
        "log-interval": 10,
        "no-epoch-checkpoints": True,
        "best-checkpoint-metric": "nll_loss",
    }
)

#: What a teacher is told beside: cross entropy without smoothing, whose mass would go to all pieces.
TEACHING = options({"criterion": "label_smoothed_cross_entropy", "label-smoothing": 0})
#: The grid of length penalties, a key of ``generation`` that is no option of fairseq-generate.
TUNED = "tune-lenpen"
#: Small models on a CPU: a second thread adds next to nothing, so jobs run side by side instead.
#: glibc gives large blocks back to the system after each use, and getting them again costs a third of
#: the time; these settings keep them.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "PYTHONWARNINGS": "ignore",
}


@dataclass(frozen=True)
class Job:
    """The wildcards of a student's training, where no rule is at hand."""

    direction: str
    method: str
    seed: int


def check_schema(config: dict[str, Any]) -> None:
    """Refuse a configuration with a key or value that :data:`SCHEMA` does not have.

    Raises
    ------
    UserError
        Says where, and what was found there.
    """
    try:
        validate(config, str(SCHEMA))
    except WorkflowError as error:  # which shows the whole schema
        wrong: Any = error.__context__
        raise UserError(f"configuration, at {wrong.json_path}: {wrong.message}") from None


def text_file(path: str) -> str:
    """A file of text, or the compressed one where only that is there."""
    return f"{path}.gz" if os.path.exists(f"{path}.gz") and not os.path.exists(path) else path


def visible_gpus(count: int) -> list[str]:
    """The names of this machine's GPUs, as CUDA_VISIBLE_DEVICES has them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[:count] if given else [str(number) for number in range(count)]


def one_of(gpus: Sequence[str]) -> str:
    """Commands of bash that give a job one of several GPUs: one that no other job has, where one is free.

    Its lock ends with the job. Jobs of other studies of this user on this machine keep to it too.
    """
    locks = shlex.quote(os.path.join(tempfile.gettempdir(), f"sekd-gpus-{os.getuid()}"))
    return (
        f"mkdir -p {locks}; gpus=({shlex.join(gpus)}); "
        f"CUDA_VISIBLE_DEVICES=${{gpus[BASHPID % {len(gpus)}]}}; "
        f'for gpu in "${{gpus[@]}}"; do exec {{lock}}> {locks}/"$gpu"; '
        "if flock --nonblock $lock; then CUDA_VISIBLE_DEVICES=$gpu; break; fi; "
        "done; export CUDA_VISIBLE_DEVICES; "
    )


class Plan:
    """Folders, files and arguments of a study.

    ``wildcards`` are snakemake's (``direction``, and ``run``, or ``method`` and ``seed``). Paths are
    relative to the folder that snakemake works in.

    Parameters
    ----------
    config
        The configuration, as :data:`SCHEMA` describes it.
    plugin
        The folder of sekd_fairseq.
    gpu
        Whether the jobs have a GPU, unless the configuration says so itself.

    Raises
    ------
    UserError
        The configuration is not as described, or asks for what cannot be done; says where.
    """

    def __init__(self, config: dict[str, Any], plugin: str, gpu: bool) -> None:
        check_schema(config)
        self.config = config
        self.data = f"data/{config['name']}"
        self.main_runs = f"runs/{config['name']}"
        self.runs = f"runs/{config.get('runs', config['name'])}"
        #: Holds the runs that others start from.
        self.starts = f"runs/{config.get('starts', config['name'])}"
        self.subset: str = config.get("subset", "test")
        # The same runs can be judged on two splits, one after the other.
        split = "" if self.subset == "test" else f"-{self.subset}"
        self.report = f"{self.runs}/report{split}"
        self.seeds = [int(seed) for seed in config["seeds"]]
        #: null takes a method out
        self.methods = {name: given for name, given in config["methods"].items() if given}
        #: Data of language models, with the prompt as source side.
        self.language_model = bool(config["data"].get("tokenizer"))
        #: Told to every command that runs a model. No part of its arguments below: where a study is made is no
        #: reason to make it again. On a cluster the machine that plans the jobs often has no GPU and the
        #: others have: gpu: true.
        self.cpu = [] if config.get("gpu", gpu) else ["--cpu"]
        self.task = ["--user-dir", plugin, "--task", "self_evolution_kd"]
        # Taken out of another configuration (null), these two have the pipeline's own value again.
        self.generation = {
            key: value
            for key, value in config.get("generation", {}).items()
            if value is not None or key not in ("beam", "lenpen")
        }
        #: Length penalties to choose from on the validation set, for each run; or None.
        self.length_penalties: list[float] | None = self.generation.pop(TUNED, None)
        #: The study whose teacher this one has, with other pieces; or None.
        self.teacher_of: str | None = config["teacher"].get("of")
        self._check_corpus()
        self._check_methods()
        self._check_teacher()

    def _check_corpus(self) -> None:
        """Refuse one pair of files for several directions."""
        corpus, directions = self.config["corpus"], self.config["directions"]
        if corpus.get("src") and not corpus.get("train") and len(directions) > 1:
            raise UserError(
                "corpus: {src, tgt}: expected one direction, whose source language is that of src, found "
                f"{', '.join(directions)}; for several give corpus: {{train, valid, test}}, prefixes of files "
                "that end in their languages"
            )

    def _check_methods(self) -> None:
        """Refuse methods for which the teacher would have to read the students' data."""
        if not self.teacher_prompts:
            return
        for method, own in self.methods.items():
            if own["criterion"] in DISTILLING and self.distilled(method):
                raise UserError(
                    f"{method}: a cache of the teacher's translations is made for students' prompts, and "
                    "the teacher has prompts of its own; expected a criterion without a teacher"
                )

    def _check_teacher(self) -> None:
        """Refuse a teacher of another study that is not there."""
        if not self.teacher_of:
            return
        if self.language_model:
            raise UserError(
                f"teacher: {{of: {self.teacher_of}}}: expected students with SentencePiece's pieces, found a "
                "language model's (data: {tokenizer})"
            )
        for direction in self.config["directions"]:
            data, teacher = self.teacher_data(direction), self.teacher_run(direction)
            model = f"{data}/sentencepiece.model"
            targets = [f"{teacher}/train.done", f"{data}/cache.done"]
            for path in (*targets, model):
                if not os.path.exists(path):
                    raise UserError(
                        f"teacher: {{of: {self.teacher_of}}}: expected {path}, found none; make it with the "
                        f"configuration of {self.teacher_of}: snakemake ... {' '.join(targets)}"
                    )
            own = f"{self.data}/{direction}/sentencepiece.model"
            if (
                self.in_rounds
                and os.path.exists(own)
                and not filecmp.cmp(own, model, shallow=False)
            ):
                raise UserError(
                    f"{self.in_rounds[0]}: rounds need a teacher that reads the students' pieces, found that "
                    f"of {self.teacher_of}, with {model}; take the method out (null)"
                )

    @cached_property
    def run_folders(self) -> list[str]:
        """Every run that is translated and scored; the teacher is one of the main study."""
        names = [f"{method}.{seed}" for method in self.methods for seed in self.seeds]
        if self.runs == self.main_runs:
            names.append("teacher")
        return [f"{self.runs}/{d}/{name}" for d in self.config["directions"] for name in names]

    @cached_property
    def everything(self) -> list[str]:
        """What the study makes: every step and not the report alone. Of a step that failed the output is
        gone, and snakemake makes an intermediate file again only where something asks for it."""
        directions = self.config["directions"]
        students = [
            Job(direction, method, seed)
            for direction in directions
            for method in self.methods
            for seed in self.seeds
        ]
        return [
            f"{self.report}/report.md",
            *self.texts,
            *self.scored,
            *[f"{run}/{self.subset}.out" for run in self.run_folders],
            *[f"{run}/train.done" for run in self.run_folders],
            *[f"{self.main_runs}/{direction}/teacher/train.done" for direction in directions],
            *[f"{self.data}/{direction}/cache.done" for direction in directions],
            *dict.fromkeys(
                path for s in students for path in [*self.corpus_inputs(s), *self.method_inputs(s)]
            ),
        ]

    def check_options(self) -> None:
        """Refuse what the commands of the study would refuse, some of them after hours.

        What has been found right is kept in the folder of runs and not looked at again.

        Raises
        ------
        UserError
            Names the part of the configuration, the option and what mends it.
        """
        commands = json.dumps(self.commands(), indent=1)
        checked = Path(self.runs) / "checked.json"
        if checked.exists() and checked.read_text(encoding="utf-8") == commands:
            return
        done = subprocess.run(
            [sys.executable, CHECK], input=commands, capture_output=True, text=True, check=False
        )
        if done.returncode:
            found = "; ".join(done.stdout.splitlines())
            raise UserError(f"configuration, {found}" if found else done.stderr)
        checked.parent.mkdir(parents=True, exist_ok=True)
        checked.write_text(commands, encoding="utf-8")

    def commands(self) -> dict[str, list[str]]:
        """Module and arguments of each command that is given options of the configuration, of the first
        direction and seed, by the part that they are in."""
        direction, seed = self.config["directions"][0], self.seeds[0]
        data, made = f"{self.data}/{direction}/bin", self.data
        any_student = Job(direction, "", seed)
        model, run, text = ["--path", "model.pt"], ["--run", made], ["--generated", "text"]
        build = [*model, "--output", made, "--subset", "train"]
        distill = ["--output", made, *self.distill_arguments(any_student)]
        found = {
            "cache": [
                "sekd_fairseq.build_cache",
                data,
                *self.cpu,
                *build,
                *options(self.config["cache"]),
            ],
            "distill": ["sekd_fairseq.distilled_data", data, *text, *distill],
            "generation": [
                "fairseq_cli.generate",
                data,
                *self.cpu,
                *model,
                *self.generate_arguments(self.subset),
            ],
        }
        if self.teacher_of:
            sides = ["--data", data, "--student-data", data, "--output", made]
            align = options(self.config.get("align", {}))
            found["align"] = ["sekd_fairseq.align_cache", made, *sides, *align]
        elif "import" not in self.config["teacher"]:
            words = self.train_arguments(any_student, "teacher")
            found["teacher"] = ["fairseq_cli.train", data, *self.cpu, *words, *TEACHING]
        for method in self.methods:
            student = Job(direction, method, seed)
            if method in self.in_rounds:
                words = [
                    "sekd_fairseq.rounds",
                    data,
                    *self.cpu,
                    *run,
                    *self.rounds_arguments(student),
                ]
            else:
                arguments = self.train_arguments(student, "student")
                words = ["fairseq_cli.train", data, *self.cpu, *arguments]
            found[f"methods: {method}"] = words
        return found

    @cached_property
    def texts(self) -> list[str]:
        """The translations of every run."""
        return [f"{run}/hyps/{self.subset}.txt" for run in self.run_folders]

    @cached_property
    def scored(self) -> list[str]:
        """The marks of every run that was compared with its teacher."""
        return [f"{run}/score.{self.subset}.done" for run in self.run_folders]

    # Corpus and data.

    def text_of(self, subset: str, direction: str) -> str:
        """Prefixes of a given split's files: one for all, or one for each direction; joined with ','."""
        corpus = self.config["corpus"]
        given = corpus[subset]
        names = given[direction] if isinstance(given, dict) else given
        return ",".join(os.path.join(corpus.get("folder", ""), name) for name in names.split(","))

    def corpus_arguments(self, wildcards: Any) -> list[str]:
        """Where the command that prepares the data finds the text."""
        corpus = self.config["corpus"]
        if corpus.get("train"):
            splits = ("train", "valid", "test")
            return [
                word for s in splits for word in (f"--{s}", self.text_of(s, wildcards.direction))
            ]
        raw = f"{self.data}/raw/{wildcards.direction}"
        source, target = wildcards.direction.split("-")
        arguments = ["--src", corpus.get("src") or f"{raw}.{source}"]
        return [*arguments, "--tgt", corpus.get("tgt") or f"{raw}.{target}"]

    def corpus_inputs(self, wildcards: Any) -> list[str]:
        """The files of text, or the mark of the corpus that is fetched."""
        corpus = self.config["corpus"]
        if corpus.get("train"):
            prefixes = [
                prefix
                for split in ("train", "valid", "test")
                for prefix in self.text_of(split, wildcards.direction).split(",")
            ]
            languages = wildcards.direction.split("-")
            return [text_file(f"{prefix}.{lang}") for prefix in prefixes for lang in languages]
        if corpus.get("src"):
            return [corpus["src"], corpus["tgt"]]
        return [f"{self.data}/raw/{wildcards.direction}.json"]

    @cached_property
    def teacher_prompts(self) -> bool:
        """Whether a language-model teacher has prompts of its own."""
        given = self.config["data"].items()
        return any(name.startswith("teacher-") and value for name, value in given)

    def teacher_data(self, direction: str) -> str:
        """The folder of the data that the teacher was trained on, in the study that made it."""
        return f"data/{self.teacher_of or self.config['name']}/{direction}"

    def teacher_run(self, direction: str) -> str:
        """The teacher's run, in the study that made it."""
        return f"runs/{self.teacher_of or self.config['name']}/{direction}/teacher"

    def data_of(self, wildcards: Any) -> str:
        """The data directory that a run reads; a teacher may have prompts, or pieces, of its own."""
        folder = f"{self.data}/{wildcards.direction}"
        if getattr(wildcards, "run", "teacher") == "teacher":
            if self.teacher_of:
                return f"{self.teacher_data(wildcards.direction)}/bin"
            if self.teacher_prompts:
                return f"{folder}/teacher"
        return f"{folder}/bin"

    # Teachers and students.

    def training_options(self, wildcards: Any, kind: str) -> dict[str, Any]:
        """Options of fairseq-train that the configuration gives a teacher or a student; of an option that
        several parts give, the value of the last, a method's own."""
        own = self.methods[wildcards.method] if kind == "student" else {}
        given = self.config["training"] | self.config[kind] | own
        return {key: value for key, value in given.items() if key not in OWN_KEYS}

    def train_arguments(self, wildcards: Any, kind: str) -> list[str]:
        """Arguments of fairseq-train for a teacher or a student."""
        arguments = [*TRAINING, *self.task, *options(self.training_options(wildcards, kind))]
        return arguments + (self.made_from(wildcards) if kind == "student" else [])

    def updates(self, wildcards: Any, kind: str) -> list[str]:
        """Arguments of progress.py: how long a training is, at most where it has patience."""
        given = self.training_options(wildcards, kind)
        return ["--total", str(given["max-update"])] + (
            ["--at-most"] if given.get("patience") else []
        )

    def distilled(self, method: str) -> bool:
        """Whether a method trains on the teacher's translations (sequence-level KD)."""
        return self.methods.get(method, {}).get("targets") == "distilled"

    def student_data(self, wildcards: Any) -> str:
        """The data directory that a student trains on."""
        kind = "distilled" if self.distilled(wildcards.method) else "bin"
        return f"{self.data}/{wildcards.direction}/{kind}"

    def student_cache(self, wildcards: Any) -> str | None:
        """The teacher's distributions at the targets that a student trains on, if it is distilled from
        them."""
        if self.methods[wildcards.method]["criterion"] not in DISTILLING:
            return None
        kind = "distilled-cache" if self.distilled(wildcards.method) else "cache"
        return f"{self.data}/{wildcards.direction}/{kind}"

    def distill_arguments(self, wildcards: Any) -> list[str]:
        """Arguments of sekd_fairseq.distilled_data for the students' data."""
        return self._distill(f"{self.data}/{wildcards.direction}")

    def teacher_distill_arguments(self, wildcards: Any) -> list[str]:
        """The same for the data of a teacher with other pieces."""
        return self._distill(self.teacher_data(wildcards.direction))

    def _distill(self, data: str) -> list[str]:
        """References are mixed in from the same data, and text of a teacher with other pieces is cut."""
        given = dict(self.config.get("distill", {}))
        if given.get("gold-share"):
            given["sources"] = f"{data}/bin"
        if self.teacher_of:
            given["sentencepiece-model"] = f"{data}/sentencepiece.model"
        return options(given)

    def distill_generate_arguments(self) -> list[str]:
        """Arguments of fairseq-generate for the teacher's translations of the training set."""
        nbest = self.config.get("distill", {}).get("nbest")
        arguments = self.generate_arguments("train", detokenize=bool(self.teacher_of))
        return [*arguments, "--nbest", str(nbest)] if nbest else arguments

    def warm_start(self, wildcards: Any) -> str | None:
        """The run whose parameters a student starts from, of the main study or the one that ``starts``
        names: METHOD.SEED, one for all, or METHOD, with the student's own seed."""
        start = self.methods[wildcards.method].get("warm-start")
        if start is None:
            return None
        name, _, seed = start.rpartition(".")
        # A method's name may end as METHOD.SEED does, and may be one that is taken out here.
        one_for_all = start not in self.config["methods"] and name and seed.isdecimal()
        own = start if one_for_all else f"{start}.{wildcards.seed}"
        return f"{self.starts}/{wildcards.direction}/{own}"

    @cached_property
    def in_rounds(self) -> list[str]:
        """The methods that train on generated text in rounds."""
        return [name for name, own in self.methods.items() if own.get("rounds")]

    def rounds_arguments(self, wildcards: Any) -> list[str]:
        """Arguments of sekd_fairseq.rounds, those of fairseq-train after --."""
        folder = f"{self.main_runs}/{wildcards.direction}"
        own = self.methods[wildcards.method]
        student = f"{self.warm_start(wildcards)}/checkpoints/checkpoint_best.pt"
        arguments = ["--student", student, "--seed", str(wildcards.seed)]
        arguments += ["--teacher", f"{folder}/teacher/checkpoints/checkpoint_best.pt"]
        arguments += ["--teacher-cache", str(self.student_cache(wildcards))]
        arguments += [*options(own["rounds"]), "--", *TRAINING]
        return arguments + options(
            self.training_options(wildcards, "student") | {"max-update": None}
        )

    def stored_difficulty(self, wildcards: Any) -> str | None:
        """How hard another student of this study, of the same seed, finds the training set."""
        method = self.methods[wildcards.method].get("stored-difficulty")
        run = f"{self.runs}/{wildcards.direction}/{method}.{wildcards.seed}"
        return f"{run}/difficulty.parquet" if method else None

    def made_from(self, wildcards: Any) -> list[str]:
        """Arguments of fairseq-train that name what a student is made from."""
        arguments = []
        if start := self.warm_start(wildcards):
            arguments += ["--finetune-from-model", f"{start}/checkpoints/checkpoint_best.pt"]
        if stored := self.stored_difficulty(wildcards):
            arguments += ["--stored-difficulty", stored]
        if cache := self.student_cache(wildcards):
            arguments += ["--teacher-cache", cache]
        return arguments

    def method_inputs(self, wildcards: Any) -> list[str]:
        """What a student is made from."""
        data = f"{self.data}/{wildcards.direction}"
        needed = [f"{data}/data.json"]
        if self.distilled(wildcards.method):
            needed.append(f"{data}/distilled.done")
        if cache := self.student_cache(wildcards):
            needed.append(f"{cache}.done")
        if start := self.warm_start(wildcards):
            needed.append(f"{start}/train.done")
        if stored := self.stored_difficulty(wildcards):
            needed.append(stored)
        return needed

    # Translations and scores.

    def generate_arguments(self, subset: str, detokenize: bool = True) -> list[str]:
        """Arguments of fairseq-generate."""
        chosen = {"beam": 4, "max-tokens": 6000, "log-format": "none", "gen-subset": subset}
        if detokenize and not self.language_model:  # whose data know their text
            chosen["remove-bpe"] = "sentencepiece"
        return [*self.task, *options(chosen | self.generation)]

    def beam_arguments(self) -> list[str]:
        """Arguments of fairseq-generate that keep what the length penalty chooses from."""
        beam = self.generation.get("beam", 4)
        return [*self.generate_arguments("valid"), "--nbest", str(beam), "--lenpen", "0"]

    def penalty_inputs(self, wildcards: Any) -> list[str]:
        """The length penalty that a run's translations take, where it is tuned."""
        if self.length_penalties is None:
            return []
        return [f"{self.runs}/{wildcards.direction}/{wildcards.run}/length_penalty.json"]

    def penalty_arguments(self, wildcards: Any) -> list[str]:
        """The length penalty of a run's translations, as an option; once its file is there."""
        if self.length_penalties is None:
            return ["--lenpen", str(self.generation.get("lenpen", 1.0))]
        (path,) = self.penalty_inputs(wildcards)
        return ["--lenpen", str(json.loads(Path(path).read_text(encoding="utf-8"))["best"])]

    def score_arguments(self, wildcards: Any) -> list[str]:
        """What a run is compared with; a teacher has a record but is not compared with itself.

        Earlier checkpoints are scored where all are kept, and not the latest ones alone, to resume from.
        """
        if wildcards.run == "teacher":
            return ["--method", "teacher"]
        method = wildcards.run.rsplit(".", 1)[0]
        own = self.methods.get(method, {})
        given = self.config["training"] | self.config["student"] | own
        latest = given.get("keep-interval-updates")
        arguments = [] if latest else ["--earlier"]
        arguments += ["--teacher-cache", f"{self.data}/{wildcards.direction}/cache"]
        if own.get("rounds"):
            arguments += ["--method", f"rounds_{own['rounds'].get('by', 'student')}"]
        elif self.distilled(method):
            ids = {
                "cached_kd": "seq_word_kd",
                "self_evolution_kd": f"se_kd_{own.get('integration', 'target')}_seq",
            }
            arguments += ["--method", ids.get(own["criterion"], "seq_kd")]
        return arguments
