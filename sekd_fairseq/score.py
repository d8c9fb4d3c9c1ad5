"""Compare a student with its teacher at every reference token of a held-out split.

    python -m sekd_fairseq.score DATA --path student.pt --teacher-cache CACHE --run runs/NAME

writes ``runs/NAME/tokens/<subset>/<updates>.parquet``, one row per reference token, and
``runs/NAME/run.json``, which ``python -m analysis.transfer`` reads.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq import checkpoint_utils
from msgspec.structs import replace
from numpy.typing import NDArray
from omegaconf import OmegaConf

from analysis.runs.files import hash_file
from analysis.runs.run_record import RunRecord, write_run
from analysis.runs.token_records import write_records
from analysis.terminal import warn
from sekd_fairseq.checkpoints import add_hf_model, load_models, position_limits
from sekd_fairseq.comparison import compare_split
from sekd_fairseq.criterions.self_evolution_kd import partners
from sekd_fairseq.datasets import TeacherDataset, mapped
from sekd_fairseq.devices import add_device, default_device, half_precision
from sekd_fairseq.errors import UserError, one_line_errors
from sekd_fairseq.plugin import quiet_fairseq
from sekd_fairseq.splits import load_split, too_long, train_targets, training_part
from sekd_fairseq.teacher_cache import TeacherCache, hash_symbols
from sekd_fairseq.teacher_cache.storage import split_folder
from sekd_fairseq.versions import versions

#: Sentences whose tokens are counted at a time.
SENTENCES = 10_000


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m sekd_fairseq.score",
        description="Write token records of a student against its teacher's cache into a run "
        "directory, for python -m analysis.transfer.",
    )
    out.add_argument("data", metavar="DATA", help="fairseq data directory")
    out.add_argument(
        "--path", required=True, type=Path, metavar="STUDENT", help="student checkpoint"
    )
    out.add_argument(
        "--teacher-cache",
        metavar="CACHE",
        help="the teacher's cache (a directory, or an address as s3://...), with the split to score; "
        "without it only run.json is written, "
        "as for a teacher itself",
    )
    out.add_argument("--run", required=True, type=Path, metavar="DIR", help="run directory")
    out.add_argument("--subset", default="test", help="split to score (default: %(default)s)")
    out.add_argument(
        "--method",
        help="the run's method in reports, e.g. finetune, word_kd (default: from the checkpoint's "
        "criterion and options; teacher for one without distillation and --teacher-cache)",
    )
    out.add_argument(
        "--earlier",
        action="store_true",
        help="write records of the checkpoints that lie beside STUDENT from other updates too, as a rule "
        "earlier ones (fairseq-train --save-interval-updates N), which show what turned easy when",
    )
    out.add_argument(
        "--max-tokens",
        type=int,
        default=4096,
        help="padded tokens per batch (default: %(default)s)",
    )
    add_device(out, "run the student")
    add_hf_model(out)
    return out


@dataclass(frozen=True)
class Scoring:
    """What the checkpoints of a run are scored on and how; attributes are named as the options are."""

    data: str
    teacher_cache: str | None
    run: Path
    subset: str
    method: str | None
    max_tokens: int
    hf_model: str | None
    device: torch.device
    dtype: torch.dtype


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Score the checkpoints of one run on one split."""
    args = parser().parse_args(argv)
    quiet_fairseq()
    if args.earlier and not args.teacher_cache:
        raise UserError("--earlier expects --teacher-cache CACHE beside it, found none")
    scoring = Scoring(
        data=args.data,
        teacher_cache=args.teacher_cache,
        run=args.run,
        subset=args.subset,
        method=args.method,
        max_tokens=args.max_tokens,
        hf_model=args.hf_model,
        device=default_device(args.cpu),
        dtype=half_precision(args.fp16, args.bf16),
    )
    scoring.run.mkdir(parents=True, exist_ok=True)  # before the work, if it cannot be
    record, split = score_checkpoint(args.path, scoring)
    for step, path in earlier_checkpoints(args.path).items() if args.earlier else ():
        if step != record.updates:
            score_checkpoint(path, scoring, split)
    write_run(scoring.run, record)


def earlier_checkpoints(path: Path) -> dict[int, Path]:
    """What ``--save-interval-updates`` kept beside a checkpoint, by updates, ascending."""
    found = {}
    for other in path.parent.glob("checkpoint_*_*.pt"):
        if match := re.fullmatch(r"checkpoint_\d+_(\d+)\.pt", other.name):
            found[int(match[1])] = other
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class ScoredSplit:
    """What every checkpoint of a run is scored on, read once: the sentences with their teacher,
    and how often each token occurs in the training targets, (V,)."""

    cache: TeacherCache
    dataset: TeacherDataset
    symbols: list[str]
    frequencies: NDArray[np.int64]

    @classmethod
    def open(cls, task: Any, cache: TeacherCache, scoring: Scoring) -> "ScoredSplit":
        """Of the task of a run's checkpoint."""
        symbols = task.target_dictionary.symbols
        cache.check_dictionary(symbols)
        if "samples" in cache.manifest.truncation:
            warn(
                f"{cache.directory}: holds tokens drawn from the teacher (--sample); KL on them is a lower "
                "bound that depends on the draw, a cache of the best tokens (--top-k) gives a surer one"
            )
        sentences = load_split(task, scoring.subset, scoring.data)
        dataset = TeacherDataset(sentences, [cache], f"{scoring.subset} ({scoring.data})")
        return cls(cache, dataset, symbols, train_frequencies(task))


def score_checkpoint(
    path: Path, scoring: Scoring, split: ScoredSplit | None = None
) -> tuple[RunRecord, ScoredSplit | None]:
    """Write the token records of one checkpoint; returns the content of ``run.json`` and, for the
    run's other checkpoints, what it was scored on (None without ``--teacher-cache``)."""
    where = (scoring.data, scoring.device, scoring.hf_model, scoring.dtype)
    models, config, task = load_models([str(path)], *where)
    checkpoint = checkpoint_utils.load_checkpoint_to_cpu(str(path))
    step = int(checkpoint["optimizer_history"][-1]["num_updates"])
    record = run_record(config, models[0], scoring, step, task)
    # Of what it was trained with; the loaded configuration forgets the caches and their like.
    if (checkpoint.get("cfg") or {}).get("task", {}).get("stored_difficulty"):
        record.hyperparameters["criterion"]["difficulty"] = "stored"
    if scoring.teacher_cache:
        if split is None:
            cache = TeacherCache.open(split_folder(scoring.teacher_cache, scoring.subset))
            split = ScoredSplit.open(task, cache, scoring)
        record = replace(record, teacher_cache=cache_record(split.cache))
        too_long(split.dataset, position_limits(models), scoring.subset)
        output = scoring.run / "tokens" / scoring.subset / f"{step}.parquet"
        write_tokens(output, models[0], split, scoring, hash_file(path))
    return record, split


def write_tokens(
    output: Path, model: Any, split: ScoredSplit, scoring: Scoring, checkpoint: str
) -> None:
    """Write the token records of a model (of a checkpoint with this hash), and say what they hold."""
    device, max_tokens = scoring.device, scoring.max_tokens
    columns = compare_split(model, split.dataset, device, max_tokens, scoring.subset)
    columns["frequency"] = split.frequencies[columns["token"]]
    write_records(
        output,
        columns,
        split.symbols,
        teacher=split.cache.manifest.fingerprint,
        checkpoint=checkpoint,
    )
    tokens, mean = len(columns["kl"]), float(columns["kl"].mean())
    print(f"{output}: {tokens} tokens, mean KL to the teacher {mean:.4f} nats")


def train_frequencies(task: Any) -> NDArray[np.int64]:
    """How often each token occurs in the training targets, all parts of all data directories, of each
    directory those that ``--train-sentences`` took, (V,); the dictionary's own counts if there is no
    training split."""
    dictionary = task.target_dictionary
    counts = np.zeros(len(dictionary), dtype=np.int64)
    # Checkpoints of earlier versions lack it.
    wanted = getattr(task.cfg, "train_sentences", 0)
    for parts in train_targets(task):
        sizes = [len(targets) for targets in parts]
        chosen = np.sort(training_part(sum(sizes), wanted)) if wanted else None
        for first, targets in zip(np.cumsum([0, *sizes]), parts, strict=False):
            own = None
            if chosen is not None:
                own = chosen[(chosen >= first) & (chosen < first + len(targets))] - first
            for tokens in token_blocks(targets, own):
                counts += np.bincount(tokens, minlength=len(counts))
    return counts if counts.any() else np.asarray(dictionary.count, dtype=np.int64)


def token_blocks(
    targets: Any, chosen: NDArray[np.int64] | None = None
) -> Iterator[NDArray[np.integer]]:
    """The tokens of all sentences of a dataset, or of those ``chosen``, many at a time."""
    numbers = np.arange(len(targets)) if chosen is None else chosen
    for start in range(0, len(numbers), SENTENCES):
        part = numbers[start : start + SENTENCES]
        tokens = mapped(targets, start, start + len(part))[0] if chosen is None else None
        if tokens is None:
            tokens = np.concatenate([targets[number].numpy() for number in part])
        yield tokens


def cache_record(cache: TeacherCache) -> dict[str, Any]:
    """What ``run.json`` says of the teacher cache."""
    manifest = cache.manifest
    return {
        "fingerprint": manifest.fingerprint,
        "dataset": manifest.dataset_hash[:16],
        "teacher": ":".join(manifest.teacher["files"]),
        "truncation": manifest.truncation,
        "temperature": manifest.temperature,
    }


def run_record(config: Any, model: Any, scoring: Scoring, step: int, task: Any) -> RunRecord:
    """The content of ``run.json``, without a teacher cache."""
    optimisation = OmegaConf.to_container(config.optimization, resolve=False)
    criterion = OmegaConf.to_container(config.criterion, resolve=False)
    # Checkpoints of earlier versions lack it.
    sentences = getattr(config.task, "train_sentences", 0)
    of_all = sum(len(targets) for parts in train_targets(task) for targets in parts)
    if config.criterion._name == "self_evolution_kd":
        criterion |= partners(config.criterion)
    return RunRecord(
        name=scoring.run.name,
        method=scoring.method or method_id(config.criterion, bool(scoring.teacher_cache)),
        seed=int(config.common.seed),
        direction=f"{task.cfg.source_lang}-{task.cfg.target_lang}",
        updates=step,
        parameters=sum(p.numel() for p in model.parameters()),
        hyperparameters={
            "criterion": criterion,
            "arch": config.model._name,
            "lr": optimisation["lr"],
            "max_update": optimisation["max_update"],
            "update_freq": optimisation["update_freq"],
            "max_tokens": config.dataset.max_tokens,
            **({"train_sentences": sentences} if sentences else {}),
            **({"warm_start": True} if config.checkpoint.finetune_from_model else {}),
        },
        data={
            "fingerprint": hash_symbols(task.target_dictionary.symbols)[:16],
            **({"sentences": sentences or of_all} if of_all else {}),
        },
        versions=versions(),
    )


def method_id(criterion: Any, compared: bool) -> str:
    """The id of the method that a criterion's options amount to; what is not ``compared`` with a teacher may be
    the teacher itself."""
    if criterion._name == "self_evolution_kd" and (
        # Without a ratio, blend still distils from the prior and not from the teacher.
        criterion.lambda_max > 0 or criterion.integration == "blend"
    ):
        return f"se_kd_{criterion.integration}"
    if criterion._name in ("self_evolution_kd", "cached_kd"):
        if getattr(criterion, "select", "all") != "all":
            return "selective_kd"
        return "word_kd" if criterion.divergence == "forward_kl" else str(criterion.divergence)
    if criterion._name in ("cross_entropy", "label_smoothed_cross_entropy"):
        return "finetune" if compared else "teacher"
    return str(criterion._name)


if __name__ == "__main__":
    main()
