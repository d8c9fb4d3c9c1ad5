"""Write the distributions of a trained teacher to a cache that students train on.

    python -m sekd_fairseq.build_cache DATA --path teacher.pt --output CACHE
    python -m sekd_fairseq.build_cache DATA --engine http --url http://HOST:8000 --output CACHE

DATA is a fairseq data directory (the student's: same dictionaries as the teacher's).  For each
split, ``CACHE/<split>`` gets the teacher's distribution at every target token, cut by ``--top-k``,
``--top-p`` or ``--sample``, the reference always among what is kept.  A build that was stopped goes
on where it was; several processes share one with ``--num-shards`` and ``--shard-id``, or under
``torchrun``.
"""

import argparse
import hashlib
import operator
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq import utils
from numpy.typing import NDArray

import sekd_fairseq
from analysis.runs.files import DamagedFile, atomic_write, read_json, sealed_json
from analysis.terminal import progress, split_list
from sekd_fairseq.checkpoints import add_hf_model
from sekd_fairseq.datasets import target_hashes
from sekd_fairseq.devices import default_device, half_precision
from sekd_fairseq.errors import CacheError, UserError, one_line_errors
from sekd_fairseq.inspect_cache import describe
from sekd_fairseq.plugin import quiet_fairseq
from sekd_fairseq.splits import check_splits, load_split, token_batches, too_long
from sekd_fairseq.teacher_cache.finish import finish_cache, missing_shards, shard_range
from sekd_fairseq.teacher_cache.format import MANIFEST, hash_symbols, payload_dtypes, shard_name
from sekd_fairseq.teacher_cache.reader import TeacherCache
from sekd_fairseq.teacher_cache.tail import TAIL, write_tail
from sekd_fairseq.teacher_cache.writer import write_shard
from sekd_fairseq.teachers.engine import Engine
from sekd_fairseq.teachers.http import HTTPEngine
from sekd_fairseq.teachers.torch import TorchEngine
from sekd_fairseq.teachers.truncation import (
    MAX_SUPPORT,
    Truncation,
    reference_alone,
    truncation_of,
)
from sekd_fairseq.teachers.vllm import VLLMEngine

SETTINGS = "build.json"
#: Tokens, about, from which a tail law is measured.
TAIL_TOKENS = 5000


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m sekd_fairseq.build_cache",
        description="Write a trained teacher's token distributions to a cache for distillation. "
        "Started again after a stop, it goes on at the first missing shard.",
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
    served = out.add_argument_group("a teacher behind a server (--engine http)")
    served.add_argument(
        "--url",
        help="its address, http://HOST:PORT: vLLM, SGLang, or llama-cpp-python's server with "
        "--logits_all true; a key is read from the environment variable OPENAI_API_KEY",
    )
    served.add_argument(
        "--served-model", metavar="NAME", help="which, where it serves several models"
    )
    served.add_argument(
        "--parallel-requests",
        type=int,
        default=16,
        metavar="N",
        help="requests at a time (default: %(default)s)",
    )
    served.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="how long to wait for an answer (default: %(default)s)",
    )
    served.add_argument(
        "--retries",
        type=int,
        default=6,
        help="how often a request that failed is sent again, with growing pauses (default: %(default)s, "
        "about a minute)",
    )
    out.add_argument("--output", required=True, type=Path, metavar="CACHE", help="cache directory")
    out.add_argument(
        "--subset",
        default="train,valid",
        help="splits to cache, joined with ',' (default: %(default)s; add test to score on it)",
    )
    out.add_argument(
        "--top-k",
        type=int,
        help="tokens kept at each position: the reference and the best others (default: 32; 0 is "
        "the whole vocabulary); with --top-p the most that are kept",
    )
    out.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="keep as few of the best tokens as hold this share of the mass: few where the teacher "
        "is sure, up to --top-k where it is not",
    )
    out.add_argument(
        "--top-p-floor",
        type=int,
        metavar="K",
        help="the fewest tokens that --top-p keeps (default: 2)",
    )
    out.add_argument(
        "--sample",
        type=int,
        default=0,
        metavar="N",
        help="instead of the best tokens, N drawn from the teacher, for --missing-mass sampled",
    )
    out.add_argument(
        "--logprob-bits",
        type=int,
        choices=(8, 16),
        default=16,
        help="bits of a stored log-probability (default: %(default)s); 8 rounds to a sixteenth of "
        "a nat, about 2e-4 nats of KL divergence",
    )
    out.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="softmax temperature of the teacher, above 0 (default: %(default)s)",
    )
    out.add_argument(
        "--max-tokens", type=int, help="padded tokens a batch (default: 4096; with vLLM 262144)"
    )
    out.add_argument(
        "--shard-sentences",
        type=int,
        default=10_000,
        help="sentences a shard, the unit of restarting (default: %(default)s)",
    )
    out.add_argument(
        "--skip-too-long",
        action="store_true",
        help="store the reference alone (probability 1) for sentences longer than the teacher's "
        "positions, and say how many, instead of ending with an error",
    )
    out.add_argument(
        "--allow-implausible",
        action="store_true",
        help="finish a cache whose teacher is worse than the references' unigram frequencies",
    )
    half = out.add_mutually_exclusive_group()
    half.add_argument("--fp16", action="store_true", help="run the teacher in float16 (GPU)")
    half.add_argument("--bf16", action="store_true", help="run the teacher in bfloat16 (GPU)")
    out.add_argument(
        "--num-shards",
        type=int,
        default=int(os.environ.get("WORLD_SIZE", 1)),
        metavar="N",
        help="share the work among N processes or jobs; each builds every N-th shard, and the one "
        "that finishes last completes the cache (default: 1, or the processes of torchrun)",
    )
    out.add_argument(
        "--shard-id",
        type=int,
        default=int(os.environ.get("RANK", 0)),
        metavar="I",
        help="which of these this is, from 0 (default: 0, or the rank under torchrun)",
    )
    add_hf_model(out)
    out.add_argument("--cpu", action="store_true", help="do not use a GPU")
    return out


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Build the cache of each split."""
    args = parser().parse_args(argv)
    quiet_fairseq()
    for name in ("max_tokens", "shard_sentences", "num_shards"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected 1 or more, found {value}")
    if not 0 <= args.shard_id < args.num_shards:
        raise UserError(f"--shard-id: expected 0 to {args.num_shards - 1}, found {args.shard_id}")
    if not args.temperature > 0:
        raise UserError(f"--temperature: expected above 0, found {args.temperature}")
    if len(utils.split_paths(args.data)) > 1:
        raise UserError(
            f"expected one data directory, found {args.data}; build a cache of each, and give "
            "training all, --teacher-cache CACHE1:CACHE2, in the order of the data"
        )
    splits = split_list(args.subset, "--subset")
    check_splits(args.data, splits)
    if args.sample and args.top_k is not None:
        raise UserError("--sample and --top-k: expected one of them, found both")
    if args.top_p is None and args.top_p_floor is not None:
        raise UserError("--top-p-floor expects --top-p beside it, found none")
    args.top_k = 32 if args.top_k is None else args.top_k
    args.top_p_floor = 2 if args.top_p_floor is None else args.top_p_floor
    truncation_of(args.top_k, args.top_p, args.top_p_floor, args.sample, MAX_SUPPORT)
    dtype = half_precision(args.fp16, args.bf16)
    engine: Engine
    if (args.engine == "http") != (args.url is not None) or (args.path is None) == (
        args.url is None
    ):
        raise UserError(
            "expected --path TEACHER, or --engine http with --url URL, found "
            f"--engine {args.engine} with {'a' if args.path else 'no'} --path and "
            f"{'a' if args.url else 'no'} --url"
        )
    if args.engine == "vllm":
        engine = vllm_engine(args, dtype)
    elif args.engine == "http":
        engine = http_engine(args)
    else:
        paths = utils.split_paths(args.path)
        engine = TorchEngine(paths, args.data, default_device(args.cpu), dtype, args.hf_model)
    for split in splits:
        cache = build_split(engine, args, split)
        if cache is not None:
            print(describe(cache.directory, cache.manifest), flush=True)
    if isinstance(engine, HTTPEngine):
        engine.forget()


def vllm_engine(args: argparse.Namespace, dtype: torch.dtype) -> Engine:
    """The engine ``--engine vllm``, after a look at what it cannot do."""
    if not Path(args.path).is_dir():
        raise UserError(
            f"--engine vllm: expected --path to be a Hugging Face folder, found {args.path}; "
            "python -m sekd_fairseq.export_hf makes one of a checkpoint"
        )
    check_best_tokens(args)
    return VLLMEngine(args.path, args.data, dtype, args.top_k)


def http_engine(args: argparse.Namespace) -> HTTPEngine:
    """The engine ``--engine http``, after a look at what it cannot do."""
    check_best_tokens(args)
    for name, low in (("parallel_requests", 1), ("retries", 0)):
        if getattr(args, name) < low:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}: expected {low} or more, found {getattr(args, name)}")
    if not args.timeout > 0:
        raise UserError(f"--timeout: expected seconds above 0, found {args.timeout:g}")
    return HTTPEngine(
        args.url,
        args.data,
        args.top_k,
        args.output / f"answers-{args.shard_id}.sqlite",
        args.served_model,
        args.parallel_requests,
        args.timeout,
        args.retries,
    )


def check_best_tokens(args: argparse.Namespace) -> None:
    """Refuse what a teacher that tells its best tokens alone cannot give."""
    if args.sample or args.top_k == 0 or args.temperature != 1.0:
        raise UserError(
            f"--engine {args.engine}: it tells the best tokens at temperature 1 only; expected --top-k "
            "above 0, no --sample and no --temperature"
        )


def build_split(engine: Engine, args: argparse.Namespace, split: str) -> TeacherCache | None:
    """Build (or finish) the cache of one split and open it; None while others have to finish."""
    directory = args.output / split
    dataset = load_split(engine.task, split, args.data)
    symbols = engine.task.target_dictionary.symbols
    hashes = target_hashes(dataset.tgt, engine.task.target_dictionary.pad())
    truncation = truncation_of(
        args.top_k, args.top_p, args.top_p_floor, args.sample, vocab_size=len(symbols)
    )
    dtypes = payload_dtypes(len(symbols), args.logprob_bits, counts=bool(args.sample))
    settings = {
        "split": split,
        "vocab_size": len(symbols),
        "dictionary_hash": hash_symbols(symbols),
        "dataset_hash": hash_of(hashes),
        "sentences": len(dataset),
        "shard_sentences": args.shard_sentences,
        "temperature": args.temperature,
        "truncation": truncation.record(),
        "teacher": engine.identity,
    }
    wanted = {**settings, "dtypes": {name: str(dtype) for name, dtype in dtypes.items()}}
    if (directory / MANIFEST).exists():
        cache = TeacherCache.open(directory)
        _check_same(directory, wanted, {key: getattr(cache.manifest, key) for key in wanted})
        return cache
    skipped = too_long(dataset, engine.limits(), split, allow=args.skip_too_long)
    directory.mkdir(parents=True, exist_ok=True)
    settings["teacher"] = _begin(directory, wanted)["teacher"]
    measure_tail(engine, dataset, truncation, settings, directory)
    lengths = dataset.sizes[:, 1].astype(np.int64)
    spans = {
        index: np.arange(len(dataset))[index * args.shard_sentences :][: args.shard_sentences]
        for index in shard_range(settings)[args.shard_id :: args.num_shards]
    }
    total = int(sum(lengths[sentences].sum() for sentences in spans.values()))
    with progress(total=total, unit="tok", unit_scale=True, desc=f"{split}") as bar:
        for index, sentences in spans.items():
            if (directory / shard_name(index)).exists():
                bar.update(int(lengths[sentences].sum()))
                continue
            rows = {i: reference_alone(dataset.tgt[i].numpy()) for i in sentences if i in skipped}
            readable = np.array([i for i in sentences if i not in skipped], dtype=np.int64)
            for batch in token_batches(dataset, readable, args.max_tokens or engine.batch_tokens):
                sample = dataset.collater([dataset[i] for i in batch])
                rows.update(engine.sentences(sample, truncation, args.temperature))
                bar.update(int(lengths[batch].sum()))
            try:
                ordered = [rows[i] for i in sentences]
                write_shard(directory, index, ordered, hashes[sentences], dtypes)
            except OSError as error:
                raise UserError(f"{directory}: cannot write shard {index} ({error})") from error
    missing = missing_shards(directory, settings)
    if missing:
        print(
            f"{directory}: part {args.shard_id} of {args.num_shards} is built; shards of other "
            f"parts are still missing ({len(missing)})"
        )
        return None
    versions = {
        "sekd_fairseq": sekd_fairseq.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    cache = finish_cache(directory, settings, dtypes, versions, args.allow_implausible)
    (directory / SETTINGS).unlink(missing_ok=True)
    return cache


def measure_tail(
    engine: Engine, dataset: Any, truncation: Truncation, settings: dict[str, Any], directory: Path
) -> None:
    """Write the teacher's tail law, from some sentences, where the engine gives whole distributions
    and the cache has supports of the best tokens."""
    if engine.outside is None or truncation.rule == "sample" or (directory / TAIL).exists():
        return
    lengths = dataset.sizes[:, 1].astype(np.int64)
    count = max(1, min(len(dataset), int(TAIL_TOKENS / max(lengths.mean(), 1.0))))
    chosen = np.unique(np.linspace(0, len(dataset) - 1, count).astype(np.int64))
    total = np.zeros(settings["vocab_size"])
    for batch in token_batches(dataset, chosen, engine.batch_tokens):
        sample = dataset.collater([dataset[i] for i in batch])
        total += engine.outside(sample, truncation, settings["temperature"])
    write_tail(directory, total, settings)


def hash_of(hashes: NDArray[np.uint64]) -> str:
    """Identifies a split by the hashes of its target sentences."""
    return hashlib.sha256(hashes.tobytes()).hexdigest()


def _begin(directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Record what is being built, so that another build cannot go on in the same directory; returns
    the record, which an earlier run may have made."""
    path = directory / SETTINGS
    if path.exists():
        found = read_settings(directory)
        _check_same(directory, settings, found)
        return found
    with atomic_write(path) as stream:
        stream.write(sealed_json(settings))
    return settings


def read_settings(directory: Path) -> dict[str, Any]:
    """What an unfinished build in ``directory`` is of; ``CacheError`` where that is damaged."""
    path = directory / SETTINGS
    try:
        settings, sealed = read_json(path)
    except DamagedFile as error:
        raise CacheError(f"{error}; delete {directory} and build it again") from error
    if not sealed:
        raise CacheError(
            f"{path}: expected settings with a checksum, found none (an earlier version began "
            f"here); delete {directory} and build it again"
        )
    return settings


def _check_same(directory: Path, wanted: dict[str, Any], found: dict[str, Any]) -> None:
    for key, value in wanted.items():
        same = same_teacher if key == "teacher" else operator.eq
        if not same(value, found.get(key)):
            raise CacheError(
                f"{directory}: holds a cache with another {key.replace('_', ' ')} (expected "
                f"{value}, found {found.get(key)}); give another --output or delete the directory"
            )


def same_teacher(one: dict[str, Any], other: Any) -> bool:
    """Whether two records are of one teacher. What a served one says of a known text (``probe``) may
    differ as much as the kernels of a GPU do from run to run."""
    if not isinstance(other, dict) or {**one, "probe": 0} != {**other, "probe": 0}:
        return False
    mine, theirs = (np.array(record.get("probe", []), np.float64) for record in (one, other))
    return mine.shape == theirs.shape and bool(np.allclose(mine, theirs, rtol=0.02, atol=0.1))


if __name__ == "__main__":
    main()
