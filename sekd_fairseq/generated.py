"""What fairseq-generate prints about each sentence: ``S-``, ``T-``, ``H-``, ``D-`` and ``P-`` lines."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from analysis.runs.texts import read_lines
from sekd_fairseq.errors import UserError

#: How these lines begin.
LABEL = re.compile(r"[STHDP]-\d+\t")


def read_generated(path: Path, prefix: str, expected: int) -> list[str]:
    """The best translation of each sentence, by its number, from fairseq-generate's output.

    ``prefix`` is ``D-`` for detokenised text or ``H-`` for the model's pieces.

    Raises
    ------
    UserError
        A sentence without a translation, or one too many: named by number.
    """
    found = printed(read_lines(path), prefix)
    missing = sorted(set(range(expected)) - set(found))
    if missing or len(found) != expected:
        which = f"sentence {missing[0]} has none" if missing else f"sentence {max(found)} is beyond"
        raise UserError(
            f"{path}: expected {expected} translations, one a reference line, found {len(found)} "
            f"({which}); fairseq-generate must run to its end with --task self_evolution_kd or "
            "--required-batch-size-multiple 1, on the data that the references belong to"
        )
    return [found[i][0] for i in range(expected)]


def printed(lines: Sequence[str], prefix: str) -> dict[int, list[str]]:
    """The texts of fairseq-generate's lines with a prefix, by sentence: of N translations the best first."""
    found: dict[int, list[str]] = defaultdict(list)
    scores = 1 if prefix in ("D-", "H-") else 0  # between label and text
    for line in lines:
        label, *rest = line.split("\t", 1 + scores)
        if label.startswith(prefix) and label[2:].isdecimal() and len(rest) == 1 + scores:
            found[int(label[2:])].append(rest[-1])
    return dict(found)
