"""What runs a teacher for ``build_cache``, as the command sees it."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sekd_fairseq.teacher_cache.writer import SentenceColumns
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
        Padded tokens per batch that suit it.
    """

    task: Any
    identity: dict[str, Any]
    batch_tokens: int

    def limits(self) -> list[tuple[float, ...]]:
        """The longest source, target, and both together that it reads, of each model."""

    def sentences(
        self, sample: dict[str, Any], truncation: Truncation, temperature: float
    ) -> dict[int, SentenceColumns]:
        """Truncated distributions of a batch, by sentence id."""

    def written(self) -> None:
        """Called when all that :meth:`sentences` has given is in a shard."""

    @property
    def outside(self) -> Callable[[dict[str, Any], Truncation, float], NDArray[np.float32]] | None:
        """What each token of the vocabulary has outside the supports, summed over a batch, (V,); None
        of a teacher that gives its best tokens only."""
