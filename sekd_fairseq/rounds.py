"""Distillation on generated text, in rounds: translate, ask the teacher, mix, train, again.

    python -m sekd_fairseq.rounds DATA --student STUDENT.pt --teacher TEACHER.pt \\
        --teacher-cache CACHE --run RUN --rounds 2 --share 0.5 -- OPTIONS OF FAIRSEQ-TRAIN

Ordinary distillation trains on the references' prefixes. In translation a student meets its own, with
its own mistakes in them. A round translates a share of the training sources, by the student as it is
then (``--by student``) or by the teacher, caches the teacher's distributions at these translations, and
goes on training with the references and the translations together, under any criterion of the plugin.
With ``--alpha 1`` (the default here) the translations teach by the teacher's distributions alone; their
own tokens are no reference. Translations that repeat themselves without end, as small students' do, are
left out: there the teacher goes on too.

Sources: student prefixes, Lin et al. 2020 (ImitKD) and Agarwal et al. 2024 (GKD), there drawn anew for
each batch, here once per round; teacher prefixes, Kim and Rush 2016; n-best translations chosen by their
score against the reference (``--nbest``), Kim and Rush 2016, section 3.3.

``RUN/checkpoints/checkpoint_best.pt`` is the best of all rounds by validation. An interrupted run
resumes: finished steps are skipped, and a training goes on from its last checkpoint.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from analysis.runs.files import atomic_directory, atomic_write, sealed_json
from sekd_fairseq.devices import add_device
from sekd_fairseq.errors import UserError, one_line_errors
from sekd_fairseq.llm.vocabulary import FILE
from sekd_fairseq.run_lock import held
from sekd_fairseq.splits import (
    check_splits,
    dictionary_of,
    languages,
    link_others,
    stored_as,
    training_side,
    write_indexed,
)
from sekd_fairseq.teacher_cache import TeacherCache
from sekd_fairseq.teacher_cache.description import another_teacher
from sekd_fairseq.teacher_cache.format import Manifest
from sekd_fairseq.teacher_cache.storage import is_address, split_folder
from sekd_fairseq.teachers.truncation import options_of
from sekd_fairseq.translations import SLACK, nearest_to_references, with_an_end

#: The plugin's folder, for ``--user-dir``.
PLUGIN = Path(__file__).parent
#: The part of the training set that a round adds to ``train``; fairseq combines both.
GENERATED = "train1"
#: Options of fairseq-train that a round gives itself.
OWN_OPTIONS = (
    "--save-dir",
    "--max-update",
    "--restore-file",
    "--finetune-from-model",
    "--task",
    "--user-dir",
    "--teacher-cache",
    "--teacher-path",
    "--log-file",
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m sekd_fairseq.rounds",
        description="Distil on generated text, in rounds: translate a share of the training "
        "sources, cache the teacher's distributions at these translations, go on training with "
        "references and translations. An interrupted run resumes.",
        epilog="Options of fairseq-train (model, criterion, optimizer, batch size) follow --. "
        "--alpha is 1 unless given there.",
    )
    out.add_argument("data", type=Path, metavar="DATA", help="fairseq data directory")
    out.add_argument(
        "--student",
        required=True,
        type=Path,
        metavar="CHECKPOINT",
        help="student to start from, trained or fine-tuned on DATA",
    )
    out.add_argument("--teacher", required=True, metavar="CHECKPOINT", help="the cache's teacher")
    out.add_argument(
        "--teacher-cache",
        required=True,
        type=lambda place: place if is_address(place) else Path(place),
        metavar="CACHE",
        help="its cache of train and valid, by build_cache; or its address (s3://...)",
    )
    out.add_argument(
        "--teacher-data",
        type=Path,
        metavar="DATA",
        help="the teacher's prompts where they are not DATA's (a language model's)",
    )
    out.add_argument("--run", required=True, type=Path, metavar="RUN", help="run directory to make")
    out.add_argument("--rounds", type=int, default=2, help="(default: %(default)s)")
    out.add_argument(
        "--updates",
        type=int,
        default=600,
        metavar="N",
        help="training updates per round (default: %(default)s)",
    )
    out.add_argument(
        "--share",
        type=float,
        default=0.5,
        help="translations per reference of the training set, above 0 and at most 1 "
        "(default: %(default)s); other sentences in each round",
    )
    out.add_argument(
        "--by",
        choices=("student", "teacher"),
        default="student",
        help="who translates (default: %(default)s)",
    )
    out.add_argument(
        "--sample",
        action="store_true",
        help="draw each token at --temperature, instead of beam search",
    )
    out.add_argument("--temperature", type=float, default=1.0, help="of --sample (default: 1)")
    out.add_argument(
        "--beam",
        type=int,
        default=4,
        help="width of the beam, or with --sample how many are drawn (default: 4)",
    )
    out.add_argument(
        "--nbest",
        type=int,
        default=1,
        metavar="N",
        help="of each source's N best translations take the one nearest to the "
        "reference, by chrF (default: 1, the model's best)",
    )
    out.add_argument(
        "--max-tokens", type=int, default=4096, help="per batch, translating and caching"
    )
    out.add_argument(
        "--seed", type=int, default=1, help="of the choice and of --sample (default: 1)"
    )
    add_device(out, "translate and cache")
    return out


@dataclass(frozen=True)
class Settings:
    """The command's settings, checked."""

    data: Path
    student: Path
    teacher: str
    teacher_cache: str | Path
    teacher_data: Path
    run: Path
    rounds: int
    updates: int
    share: float
    by: str
    sample: bool
    temperature: float
    beam: int
    nbest: int
    max_tokens: int
    seed: int
    device: tuple[str, ...]
    train: tuple[str, ...]

    @classmethod
    def of(cls, argv: Sequence[str]) -> "Settings":
        """Parse a command line.

        Raises
        ------
        UserError
            Names the option, what it expects and what was found.
        """
        end = list(argv).index("--") if "--" in argv else len(argv)
        args = vars(parser().parse_args(argv[:end]))
        train = tuple(argv[end + 1 :])
        for name in ("rounds", "updates", "beam", "nbest", "max_tokens"):
            if args[name] < 1:
                raise UserError(
                    f"--{name.replace('_', '-')}: expected 1 or more, found {args[name]}"
                )
        if not 0 < args["share"] <= 1:
            raise UserError(f"--share: expected above 0 and at most 1, found {args['share']}")
        if not args["temperature"] > 0:
            raise UserError(f"--temperature: expected above 0, found {args['temperature']}")
        if args["temperature"] != 1 and not args["sample"]:
            raise UserError(
                "--temperature: has an effect with --sample only; add it or leave it out"
            )
        if args["nbest"] > args["beam"]:
            raise UserError(
                f"--nbest: expected at most --beam {args['beam']}, found {args['nbest']}"
            )
        if not train:
            raise UserError("expected the options of fairseq-train after --, found none")
        if own := [word for word in train if word.split("=")[0] in OWN_OPTIONS]:
            raise UserError(f"{own[0]}: is given to fairseq-train by this command; leave it out")
        if "--disable-validation" in train:
            raise UserError(
                "--disable-validation: expected validation, by which the best of all rounds is chosen; leave it out"
            )
        if any(word.split("=")[0] == "--train-sentences" for word in train):
            raise UserError(
                "--train-sentences: expected none, because a round trains on all references of DATA and on its "
                "translations; binarise as many sentences as you want, and cache the teacher at these"
            )
        device = tuple(f"--{name}" for name in ("fp16", "bf16", "cpu") if args.pop(name))
        args["teacher_data"] = args["teacher_data"] or args["data"]
        return cls(**args, device=device, train=train)


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Run all rounds."""
    settings = Settings.of(sys.argv[1:] if argv is None else argv)
    check_inputs(settings)
    with held(settings.run):
        run_rounds(settings)


def run_rounds(settings: Settings) -> None:
    """Run the rounds that are not done yet, in a run directory that no other process works in."""
    remember(settings)
    last = settings.student
    history = []
    for number in range(1, settings.rounds + 1):
        last, found = one_round(settings, number, last)
        history.append(found)
        with atomic_write(settings.run / "rounds.json") as stream:
            stream.write(sealed_json({"settings": described(settings), "rounds": history}))
    publish(settings)
    best = settings.run / "checkpoints" / "checkpoint_best.pt"
    print(f"{best}: the best of {settings.rounds} rounds")


def check_inputs(settings: Settings) -> None:
    """Refuse, before any work, what a later step would."""
    for data in {settings.data, settings.teacher_data}:
        check_splits(str(data), ["train", "valid"])
        source, target = languages(data, "train")
        if stored_as(data, GENERATED, source, target, target):
            raise UserError(
                f"{data}: expected a training set of one part, found {GENERATED} too, which is where "
                "translations go; binarise the text again as one"
            )
    for path in (settings.student, *map(Path, settings.teacher.split(":"))):
        if not path.is_file():
            raise UserError(f"{path}: expected a checkpoint, found none")
    for split in ("train", "valid"):
        manifest = Manifest.load(split_folder(str(settings.teacher_cache), split))
        if split == "train" and (stranger := another_teacher(manifest, settings.teacher)):
            print(
                f"{settings.teacher_cache}: {stranger}; references and translations teach by different models, "
                "unless one file is a copy of the other's weights",
                flush=True,
            )


def described(settings: Settings) -> dict[str, Any]:
    """The settings as JSON."""
    return json.loads(json.dumps(asdict(settings), default=str))


def remember(settings: Settings) -> None:
    """Refuse a run directory that was begun with other settings; more rounds are none."""
    path = settings.run / "rounds" / "settings.json"
    free = {"rounds", "device", "max_tokens"}
    now = {name: value for name, value in described(settings).items() if name not in free}
    if path.exists():
        before = json.loads(path.read_bytes())
        different = [
            f"{name} {before.get(name)} is now {now[name]}"
            for name in now
            if before.get(name) != now[name]
        ]
        if different:
            raise UserError(
                f"{settings.run}: begun with other settings ({'; '.join(different)}); name another --run"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as stream:
        stream.write(json.dumps(now, indent=1).encode())


def one_round(settings: Settings, number: int, student: Path) -> tuple[Path, dict[str, Any]]:
    """Translate, cache, train; returns the last checkpoint and what the round is made of."""
    folder = settings.run / "rounds" / str(number)
    folder.mkdir(parents=True, exist_ok=True)
    total = len(training_side(settings.data, languages(settings.data, "train")[1]))
    generator = np.random.default_rng([settings.seed, number])
    drawn = generator.permutation(total)[: max(1, round(settings.share * total))]
    chosen = np.setdiff1d(drawn, without_teacher(settings))
    title = f"round {number} of {settings.rounds}"
    sources = folder / "sources"
    own = settings.data if settings.by == "student" else settings.teacher_data
    if not sources.exists():
        with atomic_directory(sources) as made:
            source, target = languages(own, "train")
            link_others(own, made, [f"train.{source}-{target}.{side}" for side in (source, target)])
            write_part(own, made, "train", chosen)
    output = folder / "translations.txt"
    if not output.exists():
        print(f"{title}: {len(chosen)} translations by the {settings.by}", flush=True)
        translate(settings, sources, student, number, output)
    targets, changed = nearest_to_references(output, sources)
    whole = with_an_end(targets, sources)
    if left_out := len(whole) - int(whole.sum()):
        print(
            f"{title}: without {left_out} translations that repeat themselves (longer than twice the "
            f"reference and {SLACK} tokens)",
            flush=True,
        )
    if left_out == len(whole):
        raise UserError(
            f"{output}: expected translations, found repetitions without end alone; train the student "
            "further before its text is of use"
        )
    chosen, targets = chosen[whole], [targets[place] for place in np.flatnonzero(whole)]
    data = prompts = folder / "data"
    if settings.teacher_data != settings.data:
        prompts = folder / "teacher-data"
    for made_data, gold in ((data, settings.data), (prompts, settings.teacher_data)):
        if not made_data.exists():
            with atomic_directory(made_data) as made:
                link_others(gold, made, [])
                write_part(gold, made, GENERATED, chosen, targets)
    cache = folder / "cache"
    cache.mkdir(exist_ok=True)
    for split in ("train", "valid"):
        link = cache / split
        if not link.exists():
            link.unlink(missing_ok=True)  # to a copy that was deleted
            link.symlink_to(split_folder(str(settings.teacher_cache), split).resolve())
    print(f"{title}: the teacher's distributions at them", flush=True)
    build_cache(settings, prompts, cache)
    save = folder / "checkpoints"
    last = save / "checkpoint_last.pt"
    done = folder / "train.done"
    if not done.exists():
        print(f"{title}: training", flush=True)
        run("fairseq_cli.train", training_words(settings, number, data, cache, save, student))
        if not last.exists():
            raise UserError(
                f"{last}: expected the training's last checkpoint, found none, so that the next round has "
                "nothing to go on from; leave out --no-last-checkpoints and --no-save"
            )
        done.touch()
    return last, {
        "translations": len(chosen),
        "without_end": left_out,
        "tokens": int(sum(map(len, targets))),
        "not_the_first": changed,
    }


def without_teacher(settings: Settings) -> NDArray[np.int64]:
    """Training sentences that were too long for the teacher (``--skip-too-long``): it can neither translate
    them nor be asked about their translations."""
    cache = TeacherCache.open(split_folder(str(settings.teacher_cache), "train"))
    looked_at = range(len(cache)) if cache.manifest.quality["one_hot"] else range(0)
    return np.array(
        [sentence for sentence in looked_at if cache[sentence].without_teacher], np.int64
    )


def write_part(
    data: Path,
    folder: Path,
    split: str,
    chosen: NDArray[np.int64],
    targets: Sequence[Tensor] | None = None,
) -> None:
    """Write sentences of the training set as a split, with their own targets or with others."""
    source, target = languages(data, "train")
    for language in (source, target):
        sentences = training_side(data, language)
        rows: Iterable[Tensor] = (sentences[int(i)] for i in chosen)
        if language == target and targets is not None:
            rows = targets
        path = folder / f"{split}.{source}-{target}.{language}"
        write_indexed(path, "mmap", rows, len(dictionary_of(data, language)))


def translate(settings: Settings, sources: Path, student: Path, number: int, output: Path) -> None:
    """fairseq-generate over the chosen sources, the model's pieces as they are."""
    model = str(student) if settings.by == "student" else settings.teacher
    words = [str(sources), *plugin(), "--path", model, "--gen-subset", "train"]
    words += ["--beam", str(settings.beam), "--nbest", str(settings.nbest)]
    words += ["--max-tokens", str(settings.max_tokens), "--seed", str(settings.seed + number)]
    words += longest_translation(sources)
    if settings.sample:
        words += ["--sampling", "--temperature", str(settings.temperature)]
    part = output.with_suffix(".part")
    with part.open("wb") as stream:
        run("fairseq_cli.generate", [*words, *settings.device], stdout=stream)
    os.replace(part, output)


def longest_translation(sources: Path) -> list[str]:
    """How far a translation is searched, in fairseq's options: what is longer is left out. A language model's
    source is its whole prompt, so the longest reference counts there."""
    if not (sources / FILE).is_file():
        return ["--max-len-a", "2", "--max-len-b", "50"]
    references = training_side(sources, languages(sources, "train")[1])
    return ["--max-len-a", "0", "--max-len-b", str(2 * int(max(references.sizes)) + SLACK)]


def build_cache(settings: Settings, data: Path, cache: Path) -> None:
    """Add the translations' distributions, truncated as those of the references are."""
    manifest = Manifest.load(cache / "train")
    words = [str(data), "--path", settings.teacher, "--output", str(cache), "--subset", GENERATED]
    words += ["--temperature", str(manifest.temperature), *options_of(manifest.truncation)]
    words += ["--max-tokens", str(settings.max_tokens), "--skip-too-long", *settings.device]
    run("sekd_fairseq.build_cache", words)


def training_words(
    settings: Settings, number: int, data: Path, cache: Path, save: Path, student: Path
) -> list[str]:
    """Arguments of fairseq-train for a round: the first starts from the student's parameters, the others
    where the one before ended, with its optimizer."""
    words = [str(data), *plugin(), *settings.train]
    if not any(word.split("=")[0] == "--alpha" for word in settings.train):
        words += ["--alpha", "1"]
    words += ["--teacher-cache", str(cache), "--save-dir", str(save)]
    words += ["--log-file", str(settings.run / "train.jsonl")]
    words += ["--max-update", str(number * settings.updates)]
    if not (save / "checkpoint_last.pt").exists():
        start = (
            ["--finetune-from-model"] if number == 1 else ["--reset-dataloader", "--restore-file"]
        )
        words += [*start, str(student)]
    return words + [word for word in settings.device if word == "--cpu"]


def publish(settings: Settings) -> None:
    """Link the best of all rounds where a run's checkpoints are: each round keeps its best only where
    that is better than those before."""
    kept = [settings.run / "rounds" / str(n + 1) / "checkpoints" for n in range(settings.rounds)]
    best = [
        folder / "checkpoint_best.pt" for folder in kept if (folder / "checkpoint_best.pt").exists()
    ]
    folder = settings.run / "checkpoints"
    folder.mkdir(exist_ok=True)
    for name, path in (("best", best[-1]), ("last", kept[-1] / "checkpoint_last.pt")):
        link = folder / f"checkpoint_{name}.pt"
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(path, folder))


def plugin() -> list[str]:
    """What makes fairseq's commands know the plugin."""
    return ["--user-dir", str(PLUGIN), "--task", "self_evolution_kd"]


def run(module: str, words: Sequence[str], **streams: Any) -> None:
    """Run a command of Python.

    Raises
    ------
    UserError
        It failed; its own message is above.
    """
    # With the lock of the run: what goes on after this process was killed holds it until it ends.
    found = subprocess.run([sys.executable, "-m", module, *words], close_fds=False, **streams)
    if found.returncode:
        raise UserError(
            f"python -m {module} ended with {found.returncode} (its message is above); mend that and run "
            "the same command again: finished steps are skipped"
        )


if __name__ == "__main__":
    main()
