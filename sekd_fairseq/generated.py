"""What fairseq-generate prints about each sentence: ``S-``, ``T-``, ``H-``, ``D-`` and ``P-`` lines."""

import html
import itertools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from analysis.runs.texts import each_line
from sekd_fairseq.errors import UserError

#: How these lines begin.
LABEL = re.compile(r"[STHDP]-\d+\t")


def read_generated(path: Path, prefix: str, expected: int) -> list[str]:
    """The best translation of each sentence, by its number; as :func:`read_nbest`."""
    found = read_nbest(path, prefix, expected)
    return [found[sentence][0] for sentence in range(expected)]


def read_nbest(path: Path, prefix: str, expected: int) -> dict[int, list[str]]:
    """All translations of each sentence, the best first, from fairseq-generate's output, in its order.

    ``prefix`` is ``D-`` for detokenised text or ``H-`` for the model's pieces.

    Raises
    ------
    UserError
        A sentence without a translation, one too many, or one that was translated twice: named by number.
    """
    found: dict[int, list[str]] = defaultdict(list)
    for kind, sentence, text in printed(path, "S-", prefix):
        if kind == prefix:
            found[sentence].append(text)
        elif sentence in found:
            raise UserError(
                f"{path}: expected each sentence once, found sentence {sentence} twice; fairseq-generate does "
                "not share out work by --num-shards: run each of N jobs with --distributed-world-size N "
                "--distributed-rank I, and join what they printed of one data set"
            )
    missing = next((sentence for sentence in range(expected) if sentence not in found), None)
    if missing is not None or len(found) != expected:
        which = (
            f"sentence {max(found)} is beyond"
            if missing is None
            else f"sentence {missing} has none"
        )
        raise UserError(
            f"{path}: expected {expected} translations, one a reference line, found {len(found)} "
            f"({which}); fairseq-generate must run to its end with --task self_evolution_kd or "
            "--required-batch-size-multiple 1, on the data that the references belong to"
        )
    return dict(found)


def printed(path: Path, *prefixes: str) -> Iterator[tuple[str, int, str]]:
    """Those of fairseq-generate's lines that have one of some prefixes, as they are read: prefix,
    sentence and text; of N translations of a sentence the best first."""
    for line in each_line(path):
        if line[:2] in prefixes:
            scores = 1 if line[:2] in ("D-", "H-") else 0  # between label and text
            label, *rest = line.split("\t", 1 + scores)
            if label[2:].isdecimal() and len(rest) == 1 + scores:
                yield label[:2], int(label[2:]), rest[-1]


def check_sentences(path: Path, texts: Mapping[str, Callable[[int], str]], count: int) -> None:
    """Refuse translations of other sentences than those of the data.

    Parameters
    ----------
    texts
        The data's sentences by number, to be compared with the ``S-`` lines, and ``T-`` lines. Those are
        looked at where the former say nothing of the sentences: of a language model's prompt
        fairseq-generate prints the first line.
    count
        How many sentences there are.

    Raises
    ------
    UserError
        Names the first sentence that is another.
    """
    for prefix, text_of in texts.items():
        different: set[str] = set()
        other = None
        for _, sentence, text in printed(path, prefix):
            if len(different) < 2:
                different.add(text)
            if other is None and sentence < count and not same_text(text, text_of(sentence)):
                other = sentence, text
        if len(different) < 2:
            continue
        if other is not None:
            sentence, text = other
            raise UserError(
                f"{path}: expected translations of the data's sentences, found for sentence {sentence} "
                f"{prefix}{sentence} {text[:60]!r}, where the data have {text_of(sentence)[:60]!r}; translate "
                "this split of these data again, or where the model translates in the other direction, give "
                "--source-lang and --target-lang"
            )
        return


def same_text(one: str, other: str) -> bool:
    """Whether two strings are of one sentence, perhaps in other pieces and with other unknown words."""
    same = one == other or letters(one) == letters(other)
    return same or alike(one, other) or alike(other, one)


def letters(text: str) -> str:
    """Letters and digits of a sentence: what tokenising, pieces and case leave alone."""
    text = unicodedata.normalize("NFKC", html.unescape(text)).casefold()
    return "".join(filter(str.isalnum, text.replace("<<unk>>", "").replace("<unk>", "")))


def alike(text: str, printed: str) -> bool:
    """Whether at least half of the pairs of letters of ``text`` stand in ``printed``."""
    pairs, among = (Counter(itertools.pairwise(letters(side))) for side in (text, printed))
    return 2 * (pairs & among).total() >= pairs.total()
