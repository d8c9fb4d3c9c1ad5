"""Join data directories and their teachers' caches, for one student of several teachers.

    python -m sekd_fairseq.join_data --part de-en/bin cache/de-en --part cs-en/bin cache/cs-en \\
        --output joined
    fairseq-train joined/bin --teacher-cache joined/cache --combine-valid-subsets ...

Each training set becomes a part of one (``train``, ``train1``, ...), which fairseq combines, with its own
cache beside it, so that a sentence has the distributions of the teacher of its part.  All have the same
dictionaries.  Data and caches are linked, not copied.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from analysis.runs.files import atomic_directory, atomic_write
from analysis.terminal import warn
from sekd_fairseq.datasets import target_hashes
from sekd_fairseq.errors import CacheError, UserError, one_line_errors
from sekd_fairseq.llm.vocabulary import FILE, TOKENIZER, Vocabulary, check_same_rows
from sekd_fairseq.plugin import quiet_fairseq
from sekd_fairseq.splits import dictionary_of, languages, sentences_of, stored_as
from sekd_fairseq.teacher_cache import TeacherCache
from sekd_fairseq.teacher_cache.format import MANIFEST, parts_of
from sekd_fairseq.teacher_cache.storage import split_folder

SPLITS = ("train", "valid", "test")


class Part(NamedTuple):
    """A data directory, the cache that was built for it (a directory or an address), its languages."""

    data: Path
    cache: str
    source: str
    target: str

    def stored(self, split: str, language: str) -> tuple[str, str] | None:
        """Where one side of a split is (:func:`~sekd_fairseq.splits.stored_as`)."""
        return stored_as(self.data, split, self.source, self.target, language)

    def names(self, split: str) -> Iterator[str]:
        """The parts (``train``, ``train1``, ...) that a split has already."""
        names = parts_of(split)
        return itertools.takewhile(lambda name: self.stored(name, self.target) is not None, names)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m sekd_fairseq.join_data",
        description="Join data directories and the caches of their teachers, so that one student learns "
        "each sentence from the teacher of its language pair.",
    )
    out.add_argument(
        "--part",
        required=True,
        action="append",
        nargs=2,
        metavar=("DATA", "CACHE"),
        help="a data directory and the teacher cache that was built for it; twice or more, all with the "
        "same dictionaries",
    )
    out.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="new; gets bin/ and cache/"
    )
    return out


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Write the directory, complete or not at all."""
    args = parser().parse_args(argv)
    quiet_fairseq()
    if len(args.part) < 2:
        raise UserError("--part: expected two or more, found one, which needs no joining")
    parts = [
        Part(Path(data).absolute(), cache, *languages(Path(data), "train"))
        for data, cache in args.part
    ]
    # The side whose languages differ has no name of its own.
    source = parts[0].source if len({part.source for part in parts}) == 1 else "src"
    target = parts[0].target if len({part.target for part in parts}) == 1 else "tgt"
    check_dictionaries(parts)
    with atomic_directory(args.output) as made:
        (made / "bin").mkdir()
        for ours, theirs in ((source, parts[0].source), (target, parts[0].target)):
            link(parts[0].data / f"dict.{theirs}.txt", made / "bin" / f"dict.{ours}.txt")
        for name in (FILE, TOKENIZER):
            if (parts[0].data / name).exists():
                link(parts[0].data / name, made / "bin" / name)
        for split in SPLITS:
            found = [(part, name) for part in parts for name in part.names(split)]
            without = [str(part.data) for part in parts if not any(part.names(split))]
            without += [
                part.cache for part, name in found if not cached(part, name) and split != "train"
            ]
            if without:
                warn(f"{split} is left out: expected it of every part, found none in {without[0]}")
                continue
            for number, (part, name) in enumerate(found):
                place = f"{split}{number or ''}"
                cache = join(part, name, made, place, (source, target))
                who = ", ".join(cache.manifest.teacher["files"])
                print(f"{place}: {part.source}-{part.target}, {len(cache):,} sentences of {who}")
    if (parts[0].data / FILE).exists():
        print(f"prompts of fairseq-interactive are those of {parts[0].data}")
    print(f"{args.output}: train on {args.output}/bin with --teacher-cache {args.output}/cache")


def check_dictionaries(parts: Sequence[Part]) -> None:
    """Refuse parts whose dictionaries of a side are not the same."""
    first = parts[0]
    for part in parts[1:]:
        for ours, theirs in ((first.source, part.source), (first.target, part.target)):
            known, found = (
                dictionary_of(first.data, ours).symbols,
                dictionary_of(part.data, theirs).symbols,
            )
            if known != found:
                raise UserError(
                    f"{part.data}/dict.{theirs}.txt: expected the {len(known)} symbols of "
                    f"{first.data}/dict.{ours}.txt, found {len(found)}"
                    f"{' others' if len(found) == len(known) else ''}; make both with one vocabulary "
                    "(python -m sekd_fairseq.prepare_data --vocabulary), a cache of another teacher is "
                    "carried over with: python -m sekd_fairseq.align_cache"
                )
        if (part.data / FILE).is_file() and (first.data / FILE).is_file():
            symbols = dictionary_of(first.data, first.target).symbols
            rows, found = (Vocabulary.load(one.data, symbols).rows for one in (part, first))
            check_same_rows(part.data, rows, found, str(first.data))


def cached(part: Part, split: str) -> bool:
    """Whether a part's cache has a split."""
    try:
        return (split_folder(part.cache, split) / MANIFEST).exists()
    except CacheError:
        return False


def join(part: Part, name: str, made: Path, place: str, sides: tuple[str, str]) -> TeacherCache:
    """Link one split of a part, named ``place`` from now on, and its cache, which must be of it."""
    pair = "-".join(sides)
    for ours, theirs in zip(sides, (part.source, part.target), strict=True):
        stored = part.stored(name, theirs)
        assert stored is not None  # its targets are there
        before = Path(stored[0]).name
        for path in part.data.iterdir():
            if path.name == before or path.name.startswith(f"{before}."):
                rest = path.name.removeprefix(before)
                link(path, made / "bin" / f"{place}.{pair}.{ours}{rest}")
    dictionary = dictionary_of(part.data, part.target)
    cache = TeacherCache.open(split_folder(part.cache, name))
    cache.check_dictionary(dictionary.symbols)
    stored = part.stored(name, part.target)
    assert stored is not None
    targets = sentences_of(*stored, dictionary)
    cache.check_targets(target_hashes(targets, dictionary.pad()), f"{name} ({part.data})")
    folder = made / "cache" / place
    folder.mkdir(parents=True)
    for path in cache.directory.iterdir():
        if path.suffix == ".arrow":
            link(path, folder / path.name)
    with atomic_write(folder / MANIFEST) as stream:
        stream.write(replace(cache.manifest, split=place).to_json())
    return cache


def link(path: Path, place: Path) -> None:
    """A link that stays right when the folder is moved."""
    place.symlink_to(path.resolve())


if __name__ == "__main__":
    main()
