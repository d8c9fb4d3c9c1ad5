"""Options that every criterion with a teacher has."""

from dataclasses import dataclass, field

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from omegaconf import II

from sekd_fairseq.losses import DIVERGENCES, MISSING_MASS, SelfEvolution


@dataclass
class DistillationConfig(FairseqDataclass):
    """Options of :class:`~sekd_fairseq.criterions.distillation.DistillationCriterion`."""

    alpha: float = field(
        default=0.7,
        metadata={
            "help": "weight of the distillation loss, from 0 to 1; cross entropy has 1 - alpha. "
            "0 is plain (label-smoothed) cross entropy"
        },
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "label smoothing of the cross entropy; 0 is off"}
    )
    divergence: ChoiceEnum(tuple(DIVERGENCES)) = field(  # type: ignore[valid-type]
        default=SelfEvolution.divergence,
        metadata={"help": "divergence between teacher and student inside the loss"},
    )
    divergence_weight: float = field(
        default=SelfEvolution.divergence_weight,
        metadata={"help": "weight inside jsd and the skew divergences, above 0 and below 1"},
    )
    missing_mass: ChoiceEnum(MISSING_MASS) = field(  # type: ignore[valid-type]
        default=SelfEvolution.missing_mass,
        metadata={
            "help": "what is done with the teacher's mass outside the cached support: one event "
            "(bucket), spread evenly (uniform) or as the teacher's mass is on average (tail), ignored "
            "(renormalize), estimated (sampled)"
        },
    )
    sekd_chunk_tokens: str = field(
        default="0",
        metadata={
            "help": "apply the output projection and the loss to so many tokens at a time, so that "
            "the logits of a whole batch are never held: a number, or 'auto' for as many as make "
            "some hundred megabytes of logits, where that takes less memory; 0 is off"
        },
    )
    sentence_avg: bool = II("optimization.sentence_avg")
