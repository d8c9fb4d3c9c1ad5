"""What runs a teacher for ``build_cache``, as the command sees it."""

from typing import Any, Protocol

from sekd_fairseq.teacher_cache.writer import SentenceRows
from sekd_fairseq.teachers.truncation import Truncation


class Engine(Protocol):
    """A loaded teacher.

    Attributes
    ----------
    task
        Loads datasets, has the dictionaries.
    identity
        What the manifest says of the teacher.
    batch_tokens
        Padded tokens a batch that suit it.
    """

    task: Any
    identity: dict[str, Any]
    batch_tokens: int

    def limits(self) -> list[tuple[float, ...]]:
        """The longest source, target, and both together that it reads, of each model."""

    def sentences(
        self, sample: dict[str, Any], truncation: Truncation, temperature: float
    ) -> dict[int, SentenceRows]:
        """Truncated distributions of a batch, by sentence id."""
