"""Show what a teacher cache holds, and check that it is whole.

    python -m sekd_fairseq.inspect_cache CACHE [--verify [--against TEACHER --data DATA]]
    python -m sekd_fairseq.inspect_cache CACHE --student MODEL --data DATA
    python -m sekd_fairseq.inspect_cache CACHE/train --to-parquet train.parquet

CACHE is what build_cache wrote (all splits), or the folder of one split; or the address of either
(``s3://...``), of which no more is fetched than is asked for.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from analysis.runs.files import atomic_write
from analysis.terminal import progress
from sekd_fairseq.errors import UserError, one_line_errors
from sekd_fairseq.teacher_cache import CachedSentence, TeacherCache
from sekd_fairseq.teacher_cache.description import another_teacher, describe
from sekd_fairseq.teacher_cache.finish import upgrade_cache
from sekd_fairseq.teacher_cache.format import ENTRY_COLUMNS
from sekd_fairseq.teacher_cache.storage import (
    is_address,
    remote_manifest,
    remote_splits,
    split_directories,
)
from sekd_fairseq.teacher_cache.tail import TAIL


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m sekd_fairseq.inspect_cache",
        description="Show what a teacher cache holds: of which data, teacher and truncation, its "
        "size, and how well its teacher predicts the references.",
    )
    out.add_argument(
        "cache", metavar="CACHE", help="cache directory, or one split's, or its address (s3://...)"
    )
    out.add_argument(
        "--upgrade",
        action="store_true",
        help="first bring a cache of an earlier version up to date; reads every byte, rewrites the "
        "manifest alone",
    )
    out.add_argument(
        "--verify",
        action="store_true",
        help="read every byte and check it against the checksums (about a second per gigabyte, "
        "then a minute for ten million tokens)",
    )
    out.add_argument(
        "--against",
        metavar="TEACHER",
        help="with --verify: run the teacher on some sentences and print the KL divergence from "
        "its distributions to those that the cache restores",
    )
    out.add_argument(
        "--student",
        metavar="MODEL",
        help="check whether this checkpoint, or folder of a language model, can be trained on the cache: "
        "vocabulary, sentences, end of translations, prompts, places of tokens, memory and time",
    )
    out.add_argument(
        "--max-tokens",
        type=int,
        default=4096,
        help="tokens per batch, for the memory and time of --student (default: %(default)s)",
    )
    out.add_argument("--cpu", action="store_true", help="with --student: do not use a GPU")
    out.add_argument(
        "--data", metavar="DATA", help="fairseq data directory, for --against and --student"
    )
    out.add_argument(
        "--sentences",
        type=int,
        default=200,
        help="how many sentences --against compares (default: %(default)s)",
    )
    out.add_argument(
        "--to-parquet",
        type=Path,
        metavar="FILE",
        help="write one split's cache as a Parquet table, one row per target token, for pandas, DuckDB "
        "and the like",
    )
    return out


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Print each split's description; verify, compare or export if asked."""
    args = parser().parse_args(argv)
    if args.against and not (args.verify and args.data):
        raise UserError("--against expects --verify and --data DATA beside it")
    if args.student and not args.data:
        raise UserError("--student expects --data DATA beside it, found none")
    if args.data and not (args.against or args.student):
        raise UserError("--data expects --against TEACHER or --student MODEL beside it, found none")
    if args.against or args.student:
        # Only here: without a teacher this module needs neither torch nor fairseq.
        from sekd_fairseq.plugin import quiet_fairseq

        quiet_fairseq()
    unfit = 0
    if is_address(args.cache) and args.upgrade:
        raise UserError(f"--upgrade: expected a directory, found {args.cache}; copy it here first")
    if is_address(args.cache) and not (args.verify or args.student or args.to_parquet):
        for place, _ in remote_splits(args.cache):
            print(describe(place, remote_manifest(place)), flush=True)
        return
    directories = split_directories(args.cache)
    if args.to_parquet and len(directories) > 1:
        raise UserError(
            f"--to-parquet: expected the folder of one split, found {len(directories)} in "
            f"{args.cache}; name one, such as {directories[0]}"
        )
    for directory in directories:
        cache = (upgrade_cache if args.upgrade else TeacherCache.open)(directory)
        print(describe(directory, cache.manifest), flush=True)
        if args.verify:
            shards = range(len(cache.manifest.shards))
            cache.verify(progress(shards, desc=f"verify {directory.name}", unit="shard"))
            print("  verified      every checksum matches, every value is finite")
        if args.against:
            whose = "the dense teacher"
            if stranger := another_teacher(cache.manifest, args.against):
                print(
                    f"  another       {stranger}; the figures below compare different models, unless one "
                    "file is a copy of the other's weights",
                    flush=True,
                )
                whose = "that other model"
            laws: dict[str, NDArray[np.float32] | None] = {"evenly": None}
            if (directory / TAIL).exists():
                laws["by the tail law"] = cache.tail_law()
            for how, law in laws.items():
                error = restoration_error(cache, args.against, args.data, args.sentences, law)
                print(
                    f"  restored      KL from {whose}, outside mass spread {how}, {len(error):,} "
                    f"tokens: mean {error.mean():.2e} nats, p99 {np.quantile(error, 0.99):.2e}, "
                    f"maximum {error.max():.2e}"
                )
        if args.student:
            # As above: only here is torch needed.
            from sekd_fairseq.devices import default_device
            from sekd_fairseq.readiness import checks

            device = default_device(args.cpu)
            for check in checks(cache, args.student, args.data, device, args.max_tokens):
                print(check, flush=True)
                unfit += not check.good
        if args.to_parquet:
            write_parquet(cache, args.to_parquet)
            print(f"{args.to_parquet}: {cache.manifest.tokens:,} rows")
    if unfit:
        raise UserError(f"--student {args.student}: expected a fit, found {unfit} to fix (above)")


def restoration_error(
    cache: TeacherCache,
    teacher: str,
    data: str,
    sentences: int,
    law: NDArray[np.float32] | None = None,
) -> NDArray[np.float64]:
    """``KL(dense || restored)`` at the tokens of some sentences, evenly spaced; (n,) nats.

    The restored distribution is the stored one, normalised, its outside mass spread over the tokens
    outside evenly, or by a tail law (V,).
    """
    # As in main: only a comparison needs torch and fairseq.
    import torch
    from fairseq import utils

    from sekd_fairseq.checkpoints import load_models
    from sekd_fairseq.datasets import target_hashes
    from sekd_fairseq.logits import token_logits
    from sekd_fairseq.splits import load_split

    models, _, task = load_models(utils.split_paths(teacher), data, torch.device("cpu"))
    pad = task.target_dictionary.pad()
    dataset = load_split(task, cache.manifest.split, data)
    cache.check_dictionary(task.target_dictionary.symbols)
    cache.check_targets(target_hashes(dataset.tgt, pad), f"{cache.manifest.split} ({data})")
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(sentences, len(dataset))).astype(int))
    errors = [np.zeros(0)]
    for sentence in progress(chosen, desc=f"compare {cache.manifest.split}", unit="sentence"):
        row = cache[int(sentence)]
        if row.without_teacher:
            continue
        sample = dataset.collater([dataset[int(sentence)]])
        logits = token_logits(models, sample, pad, cache.manifest.temperature)
        log_p = torch.cat([z.log_softmax(dim=-1) for _, z in logits]).double().numpy()
        restored = dense_row(row, log_p.shape[1], law)
        log_q = np.log(np.where(restored > 0, restored, 1.0))
        p = np.exp(log_p)
        terms = np.where(p > 0, p * (np.where(p > 0, log_p, 0.0) - log_q), 0.0)
        errors.append(np.where((p > 0) & (restored == 0), np.inf, terms).sum(axis=1))
    return np.concatenate(errors)


def dense_row(
    row: CachedSentence, vocab_size: int, law: NDArray[np.float32] | None = None
) -> NDArray[np.float64]:
    """The full distributions that a cached sentence restores, (T, V), its outside mass spread evenly or
    by a tail law."""
    sizes = row.support_size.astype(np.int64)
    token = np.repeat(np.arange(len(sizes)), sizes)
    mass = np.exp(row.log_p)
    outside = row.outside_mass.astype(np.float64)
    total = np.bincount(token, mass, minlength=len(sizes)) + outside
    weights = np.ones(vocab_size) if law is None else law.astype(np.float64)
    dense = np.repeat(weights[None], len(sizes), axis=0)
    dense[token, row.token_id.astype(np.int64)] = 0.0
    left = dense.sum(axis=1)
    dense *= (outside / total / np.where(left > 0, left, 1.0))[:, None]
    dense[token, row.token_id.astype(np.int64)] = mass / total[token]
    return dense


def write_parquet(cache: TeacherCache, path: Path) -> None:
    """One row a target token, complete or not at all; columns as in the cache's format, and
    ``sentence``, ``position``, ``token`` (the reference)."""
    entries = [name for name in cache.manifest.dtypes if name in ENTRY_COLUMNS]
    writer = None
    with atomic_write(path) as stream:
        for start in progress(range(0, len(cache), 1000), desc="parquet", unit="k sentences"):
            rows = cache[start : start + 1000]
            sizes = np.concatenate([row.support_size for row in rows]).astype(np.int64)
            lengths = np.array([len(row.support_size) for row in rows])
            offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
            columns: dict[str, Any] = {
                "sentence": np.repeat(np.arange(start, start + len(rows)), lengths),
                "position": np.concatenate([np.arange(length) for length in lengths]),
                "token": np.concatenate([row.token_id for row in rows])[offsets[:-1]],
            }
            for name in ("gold_logprob", "outside_mass", "entropy"):
                columns[name] = np.concatenate([getattr(row, name) for row in rows])
            for name in entries:
                values = pa.array(np.concatenate([getattr(row, name) for row in rows]))
                columns[name] = pa.ListArray.from_arrays(pa.array(offsets), values)
            table = pa.table(columns)
            if writer is None:
                writer = pq.ParquetWriter(stream, table.schema, compression="zstd")
            writer.write_table(table)
        if writer is not None:
            writer.close()


if __name__ == "__main__":
    main()
