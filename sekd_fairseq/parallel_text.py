"""Parallel text: reading with checks, normalisation, and a split without leaks.

Pure functions on lists of (source, target) pairs; :mod:`sekd_fairseq.prepare_data` is the command.
"""

import random
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from analysis.runs.errors import UserError
from analysis.runs.texts import read_lines

Pair = tuple[str, str]

# Marks that change how text is laid out, not what it says: byte order mark, soft hyphen, zero
# width space. The zero width joiners stay, because Persian and Indic scripts spell with them.
_INVISIBLE = dict.fromkeys(map(ord, "\ufeff\u00ad\u200b"))


def normalise(line: str) -> str:
    """Return a line in Unicode NFC, without invisible marks, white space collapsed.

    NFC keeps what was written. NFKC rewrites characters ("…", "²"), so that a reference would no longer be
    what its author wrote.
    """
    return " ".join(unicodedata.normalize("NFC", line.translate(_INVISIBLE)).split())


def read_aligned(source: Path, target: Path) -> tuple[list[str], list[str]]:
    """Return the lines of two files that belong together, as they are.

    Raises
    ------
    UserError
        A file is missing or not UTF-8, or the two differ in length.
    """
    sources, targets = read_lines(source), read_lines(target)
    if len(sources) != len(targets):
        raise UserError(
            f"{source} has {len(sources)} lines and {target} has {len(targets)}; expected as many "
            "in both, one sentence a line, aligned by line; align them and start again"
        )
    return sources, targets


def read_pairs(source: Path, target: Path) -> tuple[list[Pair], int]:
    """Return the normalised pairs of two aligned files and how many had an empty side.

    Raises
    ------
    UserError
        A file is missing or not UTF-8, the two differ in length, or no pair is left.
    """
    sources, targets = read_aligned(source, target)
    normalised = zip(map(normalise, sources), map(normalise, targets), strict=True)
    pairs = [pair for pair in normalised if all(pair)]
    if not pairs:
        raise UserError(
            f"{source} and {target}: expected at least one pair with text on both sides, found "
            f"none among {len(sources)} lines; check the files"
        )
    return pairs, len(sources) - len(pairs)


def _groups(pairs: Sequence[Pair]) -> list[list[int]]:
    """Return the pairs' indices, grouped so that a sentence occurs in one group only.

    Groups are the connected components of the graph whose nodes are the source and the target
    sentences and whose edges are the pairs; found by union-find with path halving.
    """
    parent = list(range(len(pairs)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first_use: dict[tuple[str, str], int] = {}
    for index, pair in enumerate(pairs):
        for side, sentence in zip(("source", "target"), pair, strict=True):
            earlier = first_use.setdefault((side, sentence), index)
            parent[root(index)] = root(earlier)
    groups: dict[int, list[int]] = {}
    for index in range(len(pairs)):
        groups.setdefault(root(index), []).append(index)
    return list(groups.values())


def split(
    pairs: Sequence[Pair], valid_size: int, test_size: int, seed: int = 1
) -> dict[str, list[Pair]]:
    """Divide pairs into ``train``, ``valid`` and ``test`` without a leak.

    Repeated pairs are kept once. No source sentence and no target sentence stands in two
    subsets: pairs that share one, directly or through other pairs, stay together. The result
    depends on the pairs, the sizes and the seed only; within a subset the order is the input's.

    Parameters
    ----------
    pairs
        (source, target), normalised.
    valid_size, test_size
        Number of pairs wanted in each, at least 1.
    seed
        Of the draw.

    Raises
    ------
    UserError
        Too few independent pairs for the sizes.
    """
    unique = list(dict.fromkeys(pairs))
    groups = _groups(unique)
    random.Random(seed).shuffle(groups)
    chosen: dict[str, list[int]] = {"test": [], "valid": [], "train": []}
    for group in groups:
        # A group that is too large for what is still wanted goes on to the next subset.
        if len(chosen["test"]) + len(group) <= test_size:
            chosen["test"] += group
        elif len(chosen["valid"]) + len(group) <= valid_size:
            chosen["valid"] += group
        else:
            chosen["train"] += group
    found = [len(chosen[subset]) for subset in ("valid", "test")]
    if found != [valid_size, test_size] or not chosen["train"]:
        raise UserError(
            f"expected enough text for {valid_size} validation and {test_size} test pairs and "
            f"some to train on, found {len(unique)} different pairs in {len(groups)} independent "
            "groups; pass more text or lower --valid-size and --test-size"
        )
    return {
        subset: [unique[index] for index in sorted(chosen[subset])]
        for subset in ("train", "valid", "test")
    }


def without_leaks(
    train: Sequence[Pair], held_out: Sequence[Sequence[Pair]]
) -> tuple[list[Pair], int]:
    """Return the training pairs that share no sentence with held-out text, and how many did.

    For splits that others made: their valid and test sets are fixed, so the training set gives
    way. Repeated training pairs are kept, since they belong to the given data.
    """
    sources = {source for subset in held_out for source, _ in subset}
    targets = {target for subset in held_out for _, target in subset}
    kept = [pair for pair in train if pair[0] not in sources and pair[1] not in targets]
    return kept, len(train) - len(kept)


def repeated(pairs: Sequence[Pair]) -> int:
    """Return how many pairs are repetitions of an earlier one."""
    return sum(count - 1 for count in Counter(pairs).values())
