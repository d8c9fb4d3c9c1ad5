"""Write the distributions of a trained teacher to a cache that students train on.

    python -m sekd_fairseq.build_cache DATA --path teacher.pt --output CACHE
    python -m sekd_fairseq.build_cache DATA --engine http --url http://HOST:8000 --output CACHE

DATA is a fairseq data directory (the student's: same dictionaries as the teacher's).  For each
split, ``CACHE/<split>`` gets the teacher's distribution at every target token, cut by ``--top-k``,
``--top-p`` or ``--sample``, the reference always among what is kept.  An interrupted build resumes;
several processes share one with ``--num-shards`` and ``--shard-id``, or under ``torchrun``.
"""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from fairseq import utils

from analysis.terminal import split_list
from sekd_fairseq.checkpoints import add_hf_model
from sekd_fairseq.devices import add_device, default_device, half_precision
from sekd_fairseq.errors import UserError, one_line_errors
from sekd_fairseq.plugin import quiet_fairseq
from sekd_fairseq.splits import check_splits
from sekd_fairseq.teacher_cache.description import describe
from sekd_fairseq.teachers.caching import Build, Part, add_part, build_split
from sekd_fairseq.teachers.engine import Engine
from sekd_fairseq.teachers.http import HTTPEngine
from sekd_fairseq.teachers.torch import TorchEngine
from sekd_fairseq.teachers.truncation import (
    MAX_SUPPORT,
)
from sekd_fairseq.teachers.vllm import VLLMEngine


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m sekd_fairseq.build_cache",
        description="Write a trained teacher's token distributions to a cache for distillation. "
        "An interrupted build resumes at the first missing shard.",
    )
    out.add_argument("data", metavar="DATA", help="fairseq data directory (fairseq-preprocess)")
    out.add_argument(
        "--path",
        metavar="TEACHER",
        help="teacher checkpoint; several joined with ':' are an ensemble (mean probability); with "
        "--engine vllm a Hugging Face folder",
    )
    out.add_argument(
        "--engine",
        choices=("torch", "vllm", "http"),
        default="torch",
        help="what runs the teacher (default: %(default)s); vllm is for large language models on "
        "GPUs, http for one that a server has (--url); both give the --top-k best tokens",
    )
    out.add_argument("--output", required=True, type=Path, metavar="CACHE", help="cache directory")
    out.add_argument(
        "--subset",
        default="train,valid",
        help="splits to cache, joined with ',' (default: %(default)s; add test to score on it)",
    )
    precision = "single precision, with --engine vllm the model's own"
    add_device(out, "run the teacher", precision)
    add_hf_model(out)
    add_truncation(out.add_argument_group("what is kept of the teacher's distributions"))
    add_work(out.add_argument_group("how the work is done"))
    add_served(out.add_argument_group("a teacher behind a server (--engine http)"))
    return out


def add_truncation(group: argparse._ActionsContainer) -> None:
    """The options of what a cache holds at each token."""
    group.add_argument(
        "--top-k",
        type=int,
        help="tokens kept at each position: the reference and the best others (default: 32; 0 is "
        "the whole vocabulary); with --top-p the most that are kept",
    )
    group.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="keep as few of the best tokens as hold this share of the mass: few where the teacher "
        "is sure, up to --top-k where it is not",
    )
    group.add_argument(
        "--top-p-floor",
        type=int,
        metavar="K",
        help="the fewest tokens that --top-p keeps (default: 2)",
    )
    group.add_argument(
        "--sample",
        type=int,
        default=0,
        metavar="N",
        help="instead of the best tokens, N drawn from the teacher, for --missing-mass sampled",
    )
    group.add_argument(
        "--logprob-bits",
        type=int,
        choices=(8, 16),
        default=16,
        help="bits of a stored log-probability (default: %(default)s); 8 rounds to a sixteenth of "
        "a nat, about 2e-4 nats of KL divergence",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="softmax temperature of the teacher, above 0 (default: %(default)s)",
    )


def add_work(group: argparse._ActionsContainer) -> None:
    """The options of batches and shards, and of what a build stops at."""
    group.add_argument(
        "--max-tokens", type=int, help="padded tokens per batch (default: 4096; with vLLM 262144)"
    )
    group.add_argument(
        "--shard-sentences",
        type=int,
        help="sentences per shard, the unit of resuming (default: 10,000, less where a process of "
        "--num-shards would have none, above 5 million sentences as many as make 500 shards)",
    )
    group.add_argument(
        "--skip-too-long",
        action="store_true",
        help="store the reference alone (probability 1) for sentences longer than the teacher's "
        "positions, and say how many, instead of ending with an error",
    )
    group.add_argument(
        "--allow-implausible",
        action="store_true",
        help="finish a cache whose teacher is worse than the references' unigram frequencies",
    )
    add_part(group)


def add_served(group: argparse._ActionsContainer) -> None:
    """The options of a server and of what is asked of it."""
    group.add_argument(
        "--url",
        help="its address, http://HOST:PORT: vLLM, SGLang, or llama-cpp-python's server with "
        "--logits_all true; a key is read from the environment variable OPENAI_API_KEY",
    )
    group.add_argument(
        "--served-model", metavar="NAME", help="which, where it serves several models"
    )
    group.add_argument(
        "--parallel-requests",
        type=int,
        default=16,
        metavar="N",
        help="requests at a time (default: %(default)s)",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="how long to wait for an answer (default: %(default)s)",
    )
    group.add_argument(
        "--retries",
        type=int,
        default=6,
        help="how often a request that failed is sent again, with growing pauses (default: %(default)s, "
        "about a minute)",
    )


def build_of(args: argparse.Namespace) -> Build:
    """How the command line wants caches built; ``UserError`` on what is out of range or does not go
    together."""
    for name in ("max_tokens", "shard_sentences"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected 1 or more, found {value}")
    if not args.temperature > 0:
        raise UserError(f"--temperature: expected above 0, found {args.temperature}")
    if len(utils.split_paths(args.data)) > 1:
        raise UserError(
            f"expected one data directory, found {args.data}; build a cache of each, and give "
            "training all, --teacher-cache CACHE1:CACHE2, in the order of the data"
        )
    if args.sample and args.top_k is not None:
        raise UserError("--sample and --top-k: expected one of them, found both")
    if args.top_p is None and args.top_p_floor is not None:
        raise UserError("--top-p-floor expects --top-p beside it, found none")
    options = vars(args) | {"part": Part.of(args)}
    given = {field.name: options[field.name] for field in fields(Build)}
    given["top_k"] = 32 if args.top_k is None else args.top_k
    given["top_p_floor"] = 2 if args.top_p_floor is None else args.top_p_floor
    build = Build(**given)
    build.truncation(MAX_SUPPORT)  # refuses what suits no vocabulary
    return build


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Build the cache of each split."""
    args = parser().parse_args(argv)
    quiet_fairseq()
    splits = split_list(args.subset, "--subset")
    build = build_of(args)
    check_splits(args.data, splits)
    engine = engine_of(args, build)
    for split in splits:
        cache = build_split(engine, build, split)
        if cache is not None:
            print(describe(cache.directory, cache.manifest), flush=True)
    if isinstance(engine, HTTPEngine):
        engine.forget()


def engine_of(args: argparse.Namespace, build: Build) -> Engine:
    """The teacher that the command line names, and what runs it."""
    if (args.engine == "http") != (args.url is not None) or (args.path is None) == (
        args.url is None
    ):
        raise UserError(
            "expected --path TEACHER, or --engine http with --url URL, found "
            f"--engine {args.engine} with {'a' if args.path else 'no'} --path and "
            f"{'a' if args.url else 'no'} --url"
        )
    dtype = half_precision(args.fp16, args.bf16)
    if args.engine == "torch":
        paths = utils.split_paths(args.path)
        return TorchEngine(paths, args.data, default_device(args.cpu), dtype, args.hf_model)
    if args.engine == "vllm":
        if not Path(args.path).is_dir():
            raise UserError(
                f"--engine vllm: expected --path to be a Hugging Face folder, found {args.path}; "
                "python -m sekd_fairseq.export_hf makes one of a checkpoint"
            )
        check_best_tokens(args.engine, build)
        given = dtype if args.fp16 or args.bf16 else None
        return VLLMEngine(args.path, args.data, given, build.top_k)
    check_best_tokens(args.engine, build)
    for name, low in (("parallel_requests", 1), ("retries", 0)):
        if getattr(args, name) < low:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}: expected {low} or more, found {getattr(args, name)}")
    if not args.timeout > 0:
        raise UserError(f"--timeout: expected seconds above 0, found {args.timeout:g}")
    return HTTPEngine(
        args.url,
        args.data,
        build.top_k,
        args.output / f"answers-{args.shard_id}.sqlite",
        args.served_model,
        args.parallel_requests,
        args.timeout,
        args.retries,
    )


def check_best_tokens(engine: str, build: Build) -> None:
    """Refuse what a teacher that tells its best tokens alone cannot give."""
    if build.sample or build.top_k == 0 or build.temperature != 1.0:
        raise UserError(
            f"--engine {engine}: it tells the best tokens at temperature 1 only; expected --top-k "
            "above 0, no --sample and no --temperature"
        )


if __name__ == "__main__":
    main()
