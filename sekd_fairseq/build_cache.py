"""Write the distributions of a trained teacher to a cache that students train on.

    python -m sekd_fairseq.build_cache DATA --path teacher.pt --output CACHE

DATA is a fairseq data directory (the student's: same dictionaries as the teacher's).  For each
split, ``CACHE/<split>`` gets the teacher's distribution at every target token, cut to ``--top-k``
tokens, the reference always among them.  A build that was stopped goes on where it was.
"""

import argparse
import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from fairseq import utils
from numpy.typing import NDArray
from tqdm import tqdm

import sekd_fairseq
from sekd_fairseq.data import target_hashes
from sekd_fairseq.errors import CacheError, UserError, one_line_errors
from sekd_fairseq.inference import (
    check_lengths,
    default_device,
    load_models,
    load_split,
    quiet_fairseq,
    to_device,
    token_batches,
    token_log_probs,
)
from sekd_fairseq.inspect_cache import describe
from sekd_fairseq.losses import TeacherRows
from sekd_fairseq.teacher_cache.format import (
    MANIFEST,
    PAYLOAD,
    Manifest,
    Shard,
    atomic_write,
    hash_file,
    hash_symbols,
    shard_name,
    stored_dtype,
)
from sekd_fairseq.teacher_cache.reader import TeacherCache
from sekd_fairseq.teacher_cache.writer import SentenceRows, write_shard

SETTINGS = "build.json"


@dataclass
class Teacher:
    """A loaded teacher and what identifies it."""

    models: list[Any]
    task: Any
    device: torch.device
    identity: dict[str, Any] = field(default_factory=dict)


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
        required=True,
        metavar="TEACHER",
        help="teacher checkpoint; several joined with ':' are an ensemble (mean probability)",
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
        default=32,
        help="tokens kept at each position: the reference and the best others (default: "
        "%(default)s; 0 keeps the whole vocabulary)",
    )
    out.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="softmax temperature of the teacher, above 0 (default: %(default)s)",
    )
    out.add_argument(
        "--max-tokens", type=int, default=4096, help="padded tokens a batch (default: %(default)s)"
    )
    out.add_argument(
        "--shard-sentences",
        type=int,
        default=10_000,
        help="sentences a shard, the unit of restarting (default: %(default)s)",
    )
    out.add_argument("--cpu", action="store_true", help="do not use a GPU")
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Build the cache of each split."""
    args = parser().parse_args(argv)
    quiet_fairseq()
    with one_line_errors():
        for name, low in (("top_k", 0), ("max_tokens", 1), ("shard_sentences", 1)):
            if getattr(args, name) < low:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag}: expected {low} or more, found {getattr(args, name)}")
        if not args.temperature > 0:
            raise UserError(f"--temperature: expected above 0, found {args.temperature}")
        paths = utils.split_paths(args.path)
        device = default_device(args.cpu)
        models, config, task = load_models(paths, args.data, device)
        identity = {
            "files": [Path(path).name for path in paths],
            "sha256": [hash_file(Path(path)) for path in paths],
            "arch": config.model._name,
            "parameters": [sum(p.numel() for p in model.parameters()) for model in models],
        }
        teacher = Teacher(models, task, device, identity)
        for split in args.subset.split(","):
            cache = build_split(teacher, args, split)
            print(describe(cache.directory, cache.manifest), flush=True)


def build_split(teacher: Teacher, args: argparse.Namespace, split: str) -> TeacherCache:
    """Build (or finish) the cache of one split and open it."""
    directory = args.output / split
    dataset = load_split(teacher.task, split, args.data)
    symbols = teacher.task.target_dictionary.symbols
    hashes = target_hashes(dataset.tgt, teacher.task.target_dictionary.pad())
    top_k = min(args.top_k or len(symbols), len(symbols))
    settings = {
        "split": split,
        "vocab_size": len(symbols),
        "dictionary_hash": hash_symbols(symbols),
        "dataset_hash": _hash_of(hashes),
        "sentences": len(dataset),
        "shard_sentences": args.shard_sentences,
        "temperature": args.temperature,
        "truncation": {"rule": "top_k", "k": top_k},
        "teacher": teacher.identity,
    }
    if (directory / MANIFEST).exists():
        cache = TeacherCache.open(directory)
        _check_same(directory, settings, {key: getattr(cache.manifest, key) for key in settings})
        return cache
    directory.mkdir(parents=True, exist_ok=True)
    _begin(directory, settings)
    check_lengths(dataset, teacher.models, split)
    lengths = dataset.sizes[:, 1].astype(np.int64)
    starts = range(0, len(dataset), args.shard_sentences)
    with tqdm(total=int(lengths.sum()), unit="tok", unit_scale=True, desc=f"{split}") as bar:
        for index, start in enumerate(starts):
            sentences = np.arange(start, min(start + args.shard_sentences, len(dataset)))
            if (directory / shard_name(index)).exists():
                bar.update(int(lengths[sentences].sum()))
                continue
            rows: dict[int, SentenceRows] = {}
            for batch in token_batches(dataset, sentences, args.max_tokens):
                sample = dataset.collater([dataset[i] for i in batch])
                rows.update(teacher_sentences(teacher, sample, top_k, args.temperature))
                bar.update(int(lengths[batch].sum()))
            try:
                ordered = [rows[i] for i in sentences]
                write_shard(directory, index, ordered, hashes[sentences], len(symbols))
            except OSError as error:
                raise UserError(f"{directory}: cannot write shard {index} ({error})") from error
    return _finish(directory, settings)


def teacher_sentences(
    teacher: Teacher, sample: dict[str, Any], top_k: int, temperature: float
) -> dict[int, SentenceRows]:
    """Truncated teacher distributions of a batch, by sentence id."""
    pad = teacher.task.target_dictionary.pad()
    parts: dict[str, list[NDArray[Any]]] = {}
    chunks = token_log_probs(teacher.models, to_device(sample, teacher.device), pad, temperature)
    for target, log_p in chunks:
        cut = (
            TeacherRows.from_top_k(log_p, target, top_k)
            if top_k < log_p.size(1)
            else TeacherRows.from_dense(log_p, target)
        )
        entropy = -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(dim=1)
        for name, values in (
            ("token_id", cut.ids),
            ("logprob", cut.log_p),
            ("gold_logprob", cut.log_p[:, 0]),
            ("outside_mass", cut.log_outside.exp()),
            ("entropy", entropy),
        ):
            parts.setdefault(name, []).append(values.cpu().numpy())
    columns = {name: np.concatenate(values) for name, values in parts.items()}
    sizes = np.full(len(columns["entropy"]), columns["token_id"].shape[1])
    lengths = sample["target"].ne(pad).sum(dim=1).cumsum(dim=0).tolist()
    sentences = {}
    for sentence, start, end in zip(sample["id"].tolist(), [0, *lengths], lengths, strict=False):
        row = {name: values[start:end].reshape(-1) for name, values in columns.items()}
        sentences[sentence] = SentenceRows({**row, "support_size": sizes[start:end]})
    return sentences


def _hash_of(hashes: NDArray[np.uint64]) -> str:
    return hashlib.sha256(hashes.tobytes()).hexdigest()


def _begin(directory: Path, settings: dict[str, Any]) -> None:
    """Record what is being built, so that another build cannot go on in the same directory."""
    path = directory / SETTINGS
    if path.exists():
        _check_same(directory, settings, json.loads(path.read_text(encoding="utf-8")))
    else:
        with atomic_write(path) as stream:
            stream.write(json.dumps(settings, indent=1).encode())


def _check_same(directory: Path, wanted: dict[str, Any], found: dict[str, Any]) -> None:
    for key, value in wanted.items():
        if found.get(key) != value:
            raise CacheError(
                f"{directory}: holds a cache with another {key.replace('_', ' ')} (expected "
                f"{value}, found {found.get(key)}); give another --output or delete the directory"
            )


def _finish(directory: Path, settings: dict[str, Any]) -> TeacherCache:
    """Write the manifest over all shards; from then on the cache is complete."""
    count = -(-settings["sentences"] // settings["shard_sentences"])
    shards, totals = [], np.zeros(5)
    for index in range(count):
        path = directory / shard_name(index)
        shard, sums = _measure(path)
        shards.append(shard)
        totals += sums
    tokens = sum(shard.tokens for shard in shards)
    mean = totals / max(tokens, 1)
    manifest = Manifest(
        **settings,
        tokens=tokens,
        quality={
            "perplexity": float(np.exp(mean[0])),
            "accuracy": float(mean[1]),
            "outside_mass": float(mean[2]),
            "entropy": float(mean[3]),
            "support": float(mean[4]),
        },
        dtypes={name: str(stored_dtype(name, settings["vocab_size"])) for name in PAYLOAD},
        shards=tuple(shards),
        versions={
            "sekd_fairseq": sekd_fairseq.__version__,
            "torch": torch.__version__,
            "pyarrow": pyarrow.__version__,
            "python": platform.python_version(),
        },
    )
    with atomic_write(directory / MANIFEST) as stream:
        stream.write(manifest.to_json().encode())
    (directory / SETTINGS).unlink(missing_ok=True)
    return TeacherCache.open(directory)


def _measure(path: Path) -> tuple[Shard, NDArray[np.float64]]:
    """A finished shard's entry in the manifest, and sums over its tokens.

    The sums: negative log-likelihood, tokens whose reference is the teacher's best, outside mass,
    entropy, support size.
    """
    with pyarrow.memory_map(str(path)) as source:
        batch = pyarrow.ipc.open_file(source).get_batch(0)
    column = {name: batch.column(name) for name in batch.schema.names}
    values = {
        name: column[name].values.to_numpy()
        for name in ("support_size", "gold_logprob", "outside_mass", "entropy", "logprob")
    }
    sizes = values["support_size"].astype(np.int64)
    first = np.cumsum(sizes) - sizes
    best = np.maximum.reduceat(values["logprob"], first) if len(first) else values["logprob"]
    sums = np.array(
        [
            -values["gold_logprob"].sum(dtype=np.float64),
            (values["logprob"][first] >= best).sum(),
            values["outside_mass"].sum(dtype=np.float64),
            values["entropy"].sum(dtype=np.float64),
            sizes.sum(),
        ]
    )
    shard = Shard(
        file=path.name,
        sentences=batch.num_rows,
        tokens=len(sizes),
        entries=int(sizes.sum()),
        bytes=path.stat().st_size,
        sha256=hash_file(path),
    )
    return shard, sums


if __name__ == "__main__":
    main()
