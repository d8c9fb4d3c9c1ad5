"""What a method is called, where it stands among others, and whether it is a treatment."""

from collections.abc import Iterable
from dataclasses import dataclass

#: Methods in the order of legends and tables, with the names that readers know; others follow by id.
NAMES = {
    "teacher": "teacher",
    "finetune": "fine-tuning",
    "seq_kd": "sequence-level KD",
    "word_kd": "word-level KD",
    "seq_word_kd": "sequence- and word-level KD",
    "reverse_kl": "reverse KL",
    "skew_forward_kl": "skew KL",
    "skew_reverse_kl": "skew reverse KL",
    "adaptive_kl": "adaptive KL",
    "jsd": "Jensen-Shannon",
    "tvd": "total variation",
    "selective_kd": "selective KD",
    "atkd": "adaptive teaching",
    "se_kd_blend": "SE-KD (blend)",
    "se_kd_evolved": "SE-KD (evolved)",
    "se_kd_student": "SE-KD (student)",
    "se_kd_target": "SE-KD (target)",
    "se_kd_target_seq": "SE-KD (target), teacher's text",
    "rounds_student": "rounds (student's text)",
    "rounds_teacher": "rounds (teacher's text)",
}
_PLACES = {name: place for place, name in enumerate(NAMES)}
#: What the ids of the methods under test begin with.
_TREATMENTS = ("se_kd", "rounds")


@dataclass(frozen=True)
class Method:
    """A method of training, or a variant of one.

    Attributes
    ----------
    id : as in ``run.json``, e.g. ``word_kd``
    variant : what tells it apart from others of this id, e.g. ``(gamma=0.9)``; "" for the usual one
    """

    id: str
    variant: str = ""

    @classmethod
    def of(cls, text: str) -> "Method":
        """The method that ``str`` gave ``text``, as in the tables of a report."""
        name, _, variant = text.partition(" ")
        return cls(name, variant)

    def __str__(self) -> str:
        return f"{self.id} {self.variant}".strip()

    @property
    def label(self) -> str:
        """As readers call it."""
        return f"{NAMES.get(self.id, self.id)} {self.variant}".strip()

    @property
    def order(self) -> tuple[int, str, str]:
        """Sorts methods as legends and tables do."""
        place = _PLACES.get(self.id, len(NAMES) + (not self.is_treatment))
        return place, self.id, self.variant

    @property
    def is_treatment(self) -> bool:
        """Whether the claims are about it."""
        return self.id.startswith(_TREATMENTS)

    @property
    def is_usual(self) -> bool:
        """Whether it is no variant."""
        return not self.variant


def ordered(methods: Iterable[str]) -> list[str]:
    """Distinct methods, as text, in the order of legends."""
    return sorted(set(methods), key=lambda text: Method.of(text).order)


def label_of(method: object) -> str:
    """A method of a table, as readers call it."""
    return Method.of(str(method)).label
