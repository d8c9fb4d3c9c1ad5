"""Run directories: where they are and what their ``run.json`` says.

A run directory holds ``run.json`` (what was trained), ``tokens/<subset>/<step>.parquet`` (see
:mod:`analysis.runs.token_records`), ``hyps/<subset>.txt`` with ``.ref.txt`` and ``.src.txt``, ``scores.json``
and fairseq's ``train.jsonl``.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from analysis.runs.errors import UserError, one_line
from analysis.runs.files import DamagedFile, atomic_write, read_json, sealed_json
from analysis.terminal import warn

FORMAT_VERSION = 2
#: Of files of an earlier version, which have no checksum.
UNSEALED_VERSION = 1
#: Key of the checksums of a split's texts in ``scores.json``, by file name (``hash_lines``).
LINES = "sha256_of_lines"
#: Folders of a run directory in which no other run directory is looked for.
INNER_FOLDERS = {"checkpoints", "tokens", "hyps"}


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The content of ``run.json``.

    Attributes
    ----------
    name : of the directory that the run was scored into
    method : its id (:class:`analysis.runs.methods.Method`)
    direction : ``SOURCE-TARGET``
    updates : of the optimiser, at the checkpoint that stands for the run
    parameters : that the model has
    hyperparameters : nested; what differs between runs of a method tells them apart
    data : the dictionary's fingerprint, and on how many sentences the run was trained
    teacher_cache : what it was compared with; None for a teacher
    versions : of the programs
    """

    format_version: int = FORMAT_VERSION
    name: str = ""
    method: str
    seed: int
    direction: str
    updates: int
    parameters: int | None = None
    hyperparameters: dict[str, Any] = {}
    data: dict[str, Any] = {}
    teacher_cache: dict[str, Any] | None = None
    versions: dict[str, Any] = {}


@dataclass(frozen=True)
class Run:
    """One ``run.json`` with the directory that holds it.

    ``label`` is the directory's path below the runs root and so unique; ``updates`` counts
    optimiser updates; ``sealed`` is whether the record has a checksum; ``sentences`` are those that it
    was trained on, where the record says so.
    """

    path: Path
    label: str
    method: str
    seed: int
    direction: str
    updates: int
    hyperparameters: Mapping[str, Any]
    parameters: int | None
    sealed: bool = False
    sentences: int | None = None

    def steps(self, subset: str) -> list[int]:
        """Updates at which token records of ``subset`` exist, ascending."""
        names = (path.stem for path in (self.path / "tokens" / subset).glob("*.parquet"))
        return sorted(int(name) for name in names if name.isdigit())

    def records(self, subset: str, step: int) -> Path:
        """Where the token records of a step are."""
        return self.path / "tokens" / subset / f"{step}.parquet"

    def last_step(self, subset: str) -> int | None:
        """The step that stands for the finished run: ``updates``, else the last with records."""
        steps = self.steps(subset)
        return self.updates if self.updates in steps else (steps[-1] if steps else None)


@dataclass(frozen=True)
class LeftOut:
    """A run directory, or a part of one, that the report leaves out, and why (one line)."""

    label: str
    reason: str


def warn_left_out(left_out: Sequence[LeftOut]) -> None:
    """Tell a user of a command without a report what it leaves out."""
    for item in left_out:
        warn(f"left out: {item.label}: {item.reason}")


def discover(root: Path) -> tuple[list[Run], list[LeftOut]]:
    """Find the runs below ``root``, sorted by path, and the directories that look like runs but
    cannot be used.

    Raises
    ------
    UserError
        ``root`` is not a directory, or holds nothing that looks like a run.
    """
    if not root.is_dir():
        raise UserError(f"{root}: expected a directory of runs, found none; check the path")
    runs: list[Run] = []
    left_out: list[LeftOut] = []
    labels: dict[str, str] = {}  # by the directory that links lead to

    def unreadable(error: OSError) -> None:
        label = os.path.relpath(error.filename, root)
        left_out.append(LeftOut(label, f"the directory cannot be read ({error.strerror})"))

    for folder, subfolders, files in os.walk(root, onerror=unreadable, followlinks=True):
        path = Path(folder)
        label = path.relative_to(root).as_posix() if path != root else root.resolve().name
        first = labels.setdefault(os.path.realpath(path), label)
        if first != label:
            left_out.append(LeftOut(label, f"a link to the same directory as {first}"))
            subfolders.clear()
            continue
        for name in files:
            if not (path / name).exists():
                there = (path / name).relative_to(root).as_posix()
                left_out.append(
                    LeftOut(there, f"a link to {os.readlink(path / name)}, which is not there")
                )
        trained = "train.jsonl" in files or "checkpoints" in subfolders
        if "run.json" in files:
            try:
                runs.append(read_run(path, label))
            except UserError as error:
                left_out.append(LeftOut(label, str(error)))
        elif trained:
            left_out.append(
                LeftOut(label, "unfinished: no run.json yet (it is written when the run is scored)")
            )
        # The parts of a training in rounds are no runs; but a run may have that name.
        inner = INNER_FOLDERS | ({"rounds"} if trained or "run.json" in files else set())
        subfolders[:] = sorted(
            (name for name in subfolders if name not in inner and name[0] != "."),
            key=lambda name: (os.path.islink(path / name), name),
        )
    if not runs and not left_out:
        raise UserError(
            f"{root}: expected run directories (a run.json in each), found none; train and score a "
            "run first, or check the path"
        )
    return sorted(runs, key=lambda run: run.label), left_out


def read_run(path: Path, label: str) -> Run:
    """Read and check ``run.json`` in the directory ``path``."""
    file = path / "run.json"
    content, sealed = _read_json(file, "score the run")
    try:
        record = msgspec.convert(content, RunRecord)
    except msgspec.ValidationError as error:
        problem = str(error).replace("Expected", "expected", 1).replace(", got", ", found")
        raise UserError(f"{file}: {problem}; score the run again") from error
    expected = FORMAT_VERSION if sealed else UNSEALED_VERSION
    if record.format_version != expected:
        raise UserError(
            f"{file}: expected format_version {expected} {'with' if sealed else 'without'} a "
            f"checksum, found {record.format_version}; score the run again with the same "
            "version of both packages"
        )
    if "-" not in record.direction:
        raise UserError(f"{file}: expected a direction like 'en-de', found {record.direction!r}")
    return Run(
        path=path,
        label=label,
        method=record.method,
        seed=record.seed,
        direction=record.direction,
        updates=record.updates,
        hyperparameters=record.hyperparameters,
        parameters=record.parameters,
        sealed=sealed,
        sentences=record.data.get("sentences"),
    )


def write_run(path: Path, record: RunRecord) -> None:
    """Write ``run.json`` into the directory ``path``, complete or not at all."""
    with atomic_write(path / "run.json") as stream:
        stream.write(sealed_json(msgspec.to_builtins(record)))


def read_scores(path: Path) -> tuple[dict[str, Any], bool]:
    """The splits in ``scores.json`` of the run directory ``path``, and whether it has a checksum;
    nothing where there is no such file.

    Raises
    ------
    UserError
        It is damaged, or was edited.
    """
    file = path / "scores.json"
    if not file.exists():
        return {}, False
    content, sealed = _read_json(file, "delete the file and evaluate the run")
    for subset, scores in content.items():
        if not isinstance(scores, dict):
            raise UserError(
                f"{file}: expected the scores of a split at {subset!r}, found {scores!r}; evaluate "
                "the run again"
            )
    return content, sealed


def write_scores(path: Path, subset: str, scores: Mapping[str, Any]) -> None:
    """Put the scores of a split into ``scores.json`` of the run directory ``path``."""
    with atomic_write(path / "scores.json") as stream:
        stream.write(sealed_json(read_scores(path)[0] | {subset: dict(scores)}))


def _read_json(file: Path, mend: str) -> tuple[dict[str, Any], bool]:
    try:
        return read_json(file)
    except OSError as error:
        raise UserError(f"{file}: expected a JSON file, {one_line(error)}") from error
    except DamagedFile as error:
        raise UserError(f"{error}; {mend} again") from error
