"""Copy a teacher's cache to object storage, or from there to this machine.

    python -m sekd_fairseq.copy_cache CACHE s3://bucket/cache
    python -m sekd_fairseq.copy_cache s3://bucket/cache CACHE

Whatever fsspec has a file system for will do: ``s3://`` (pip install s3fs), ``gs://`` (gcsfs), ``hf://``
(huggingface_hub).  Every file is checked, and an interrupted copy resumes.  Commands that read a cache
also take its address (:mod:`sekd_fairseq.teacher_cache.storage`).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from sekd_fairseq.errors import UserError, one_line_errors
from sekd_fairseq.teacher_cache.storage import (
    fetch,
    is_address,
    publish,
    remote_splits,
    split_directories,
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m sekd_fairseq.copy_cache",
        description="Copy a teacher's cache, of all splits or of one, to object storage or from there.",
    )
    out.add_argument(
        "source", metavar="FROM", help="a cache: a directory, or an address (s3://...)"
    )
    out.add_argument("destination", metavar="TO", help="where to; one of the two is an address")
    return out


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Copy each split."""
    args = parser().parse_args(argv)
    remote = [is_address(place) for place in (args.source, args.destination)]
    if remote.count(True) != 1:
        raise UserError(
            f"expected a directory and an address (s3://...), found {args.source} and {args.destination}; "
            "between directories use cp"
        )
    copied = 0
    if remote[1]:
        source = Path(args.source)
        for directory in split_directories(source):
            place = args.destination.rstrip("/")
            if directory != source:
                place = f"{place}/{directory.name}"
            copied += publish(directory, place)
    else:
        for place, name in remote_splits(args.source):
            copied += fetch(place, Path(args.destination) / name)
    print(f"{args.destination}: {copied / 2**20:,.1f} MiB copied and checked")


if __name__ == "__main__":
    main()
