"""Show what a teacher cache holds, and check that it is whole.

    python -m sekd_fairseq.inspect_cache CACHE [--verify]

CACHE is what build_cache wrote (all splits), or the folder of one split.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from sekd_fairseq.errors import CacheError, one_line_errors
from sekd_fairseq.teacher_cache import TeacherCache
from sekd_fairseq.teacher_cache.format import MANIFEST, Manifest


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m sekd_fairseq.inspect_cache",
        description="Show what a teacher cache holds: of which data, teacher and truncation, its "
        "size, and how well its teacher predicts the references.",
    )
    out.add_argument("cache", type=Path, metavar="CACHE", help="cache directory, or one split's")
    out.add_argument(
        "--verify",
        action="store_true",
        help="read every byte and check it against the checksums (about a second a gigabyte, "
        "then a minute for ten million tokens)",
    )
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Print each split's description; verify if asked."""
    args = parser().parse_args(argv)
    with one_line_errors():
        for directory in split_directories(args.cache):
            cache = TeacherCache.open(directory)
            print(describe(directory, cache.manifest))
            if args.verify:
                shards = range(len(cache.manifest.shards))
                cache.verify(tqdm(shards, desc=f"verify {directory.name}", unit="shard"))
                print("  verified      every checksum matches, every value is finite")


def split_directories(cache: Path) -> list[Path]:
    """The split folders of a cache, or the folder itself if it is one."""
    if not cache.is_dir():
        raise CacheError(f"{cache}: expected a teacher cache directory, found none")
    if (cache / MANIFEST).exists():
        return [cache]
    splits = sorted(path for path in cache.iterdir() if path.is_dir())
    if not splits:
        raise CacheError(
            f"{cache}: expected a folder with {MANIFEST} for each split, found none; build it "
            "with: python -m sekd_fairseq.build_cache DATA --path TEACHER --output CACHE"
        )
    return splits


def describe(directory: Path, manifest: Manifest) -> str:
    """A cache as text, one fact a line."""
    size = sum(shard.bytes for shard in manifest.shards)
    quality, teacher = manifest.quality, manifest.teacher
    tokens = max(manifest.tokens, 1)
    lines = [
        f"{directory}",
        f"  split         {manifest.split}: {manifest.sentences:,} sentences, "
        f"{manifest.tokens:,} tokens, vocabulary {manifest.vocab_size:,}",
        f"  teacher       {', '.join(teacher['files'])} ({teacher['arch']}, "
        f"{sum(teacher['parameters']):,} parameters), temperature {manifest.temperature:g}",
        f"  predicts      references with perplexity {quality['perplexity']:.2f}, accuracy "
        f"{quality['accuracy']:.1%}; mean entropy {quality['entropy']:.3f} nats",
        f"  truncation    {manifest.truncation['rule']} {manifest.truncation['k']}: mean support "
        f"{quality['support']:.1f} tokens, mean mass outside {quality['outside_mass']:.5f}",
        f"  size          {size:,} bytes in {len(manifest.shards)} shards, {size / tokens:.1f} "
        f"bytes a token (dense float16: {2 * manifest.vocab_size:,})",
        f"  fingerprint   {manifest.fingerprint}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
