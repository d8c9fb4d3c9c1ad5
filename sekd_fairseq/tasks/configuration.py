"""Options of the task ``self_evolution_kd``, and which of them do not go together."""

from dataclasses import dataclass, field
from typing import Optional

from fairseq import utils
from fairseq.tasks.translation import TranslationConfig
from omegaconf import II

from sekd_fairseq.errors import UserError
from sekd_fairseq.teacher_cache.storage import is_address


@dataclass
class SelfEvolutionKDTaskConfig(TranslationConfig):
    """Options of the task, beside those of ``translation``."""

    teacher_cache: Optional[str] = field(  # noqa: UP045 (fairseq's parser needs Optional)
        default=None,
        metadata={
            "help": "directory that python -m sekd_fairseq.build_cache wrote, with one folder a "
            "split, or its address in object storage (s3://...); with several data directories "
            "(bin1:bin2) as many caches (cache1:cache2; of addresses s3://one|s3://two). "
            "Off by default: then the task is plain translation"
        },
    )
    teacher_path: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "instead of a cache, the teacher's checkpoint (several joined with ':' are an "
            "ensemble): it runs beside the student and gives full distributions"
        },
    )
    teacher_fp16: bool = field(
        default=False, metadata={"help": "run the teacher of --teacher-path in float16 (GPU)"}
    )
    teacher_bf16: bool = field(
        default=False, metadata={"help": "run the teacher of --teacher-path in bfloat16 (GPU)"}
    )
    stored_difficulty: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "token records that python -m sekd_fairseq.score --subset train wrote "
            "(RUN/tokens/train/UPDATES.parquet); training takes its tokens' difficulty from there "
            "and not from the student as it is now. With bin1:bin2 as many files (file1:file2)"
        },
    )
    train_sentences: int = field(
        default=0,
        metadata={
            "help": "train on so many sentences of the training set, always the same ones, those of a "
            "smaller number among those of a larger (default: 0, all)"
        },
    )
    shard_weights: bool = field(
        default=False,
        metadata={
            "help": "shard the student's weights, gradients and optimiser state over the processes "
            "(torch's FSDP2), for a student that does not fit one GPU; with one process no change"
        },
    )
    bf16: bool = II("common.bf16")
    teacher: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={"help": "set by training: which teacher it has, kept in the checkpoint"},
    )


def paths(value: str | None) -> list[str]:
    """The paths of an option that takes several, ``a:b`` or ``s3://a|s3://b``; none for an option left out."""
    return utils.split_paths(value) if value else []


def joined(values: list[str]) -> str | None:
    """The inverse of :func:`paths`: fairseq separates with ``|`` where there is an address."""
    return ("|" if any(map(is_address, values)) else ":").join(values) or None


def check_options(cfg: SelfEvolutionKDTaskConfig) -> None:
    """Refuse options that do not go together, or that this fairseq cannot serve."""
    data, caches = paths(cfg.data), paths(cfg.teacher_cache)
    if caches and len(caches) != len(data):
        raise UserError(
            f"--teacher-cache: expected one cache for each of {len(data)} data "
            f"directories ({cfg.data}), found {len(caches)} ({cfg.teacher_cache})"
        )
    if caches and cfg.teacher_path:
        raise UserError("--teacher-cache and --teacher-path: expected one, found both")
    if (cfg.teacher_fp16 or cfg.teacher_bf16) and not cfg.teacher_path:
        raise UserError(
            "--teacher-fp16 and --teacher-bf16 expect --teacher-path TEACHER, found none; a "
            "cache's teacher has run already"
        )
    if cfg.num_batch_buckets:
        raise UserError(
            "--num-batch-buckets: expected 0, because fairseq 0.12 cannot make buckets with "
            f"NumPy 2, found {cfg.num_batch_buckets}; they are for TPUs, leave the option out"
        )
    if cfg.train_sentences and len(data) > 1:
        raise UserError(
            f"--train-sentences {cfg.train_sentences}: expected one data directory, of which so many are "
            f"taken, found {len(data)} ({cfg.data}); binarise so much of each, and leave the option out"
        )
    stored = paths(cfg.stored_difficulty)
    if stored and len(stored) != len(caches):
        raise UserError(
            f"--stored-difficulty: expected one file for each of {len(caches)} teacher "
            f"caches, found {len(stored)} ({cfg.stored_difficulty})"
        )
