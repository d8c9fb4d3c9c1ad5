"""Losses for knowledge distillation from full or truncated teachers; torch only, no fairseq.

>>> student = support_log_probs(logits, rows, teacher.ids, teacher.valid)
>>> events = build_events(teacher, student, missing_mass="bucket")
>>> loss = self_evolution_kd(events, SelfEvolution(gamma=1.0, gamma_type="absolute")).divergence
"""

from sekd_fairseq.losses.chunked import blockwise_loss, chunked_loss
from sekd_fairseq.losses.divergences import DIVERGENCES
from sekd_fairseq.losses.events import MISSING_MASS, Events, TeacherTokens, build_events
from sekd_fairseq.losses.self_evolution import (
    RunningQuantile,
    SelfEvolution,
    SelfEvolutionOutput,
    self_evolution_kd,
)
from sekd_fairseq.losses.support import SupportLogProbs, support_log_probs

__all__ = [
    "DIVERGENCES",
    "MISSING_MASS",
    "Events",
    "RunningQuantile",
    "SelfEvolution",
    "SelfEvolutionOutput",
    "SupportLogProbs",
    "TeacherTokens",
    "blockwise_loss",
    "build_events",
    "chunked_loss",
    "self_evolution_kd",
    "support_log_probs",
]
