"""fairseq's two cross entropies, for language models.

The same options, losses and logs, but for rounding.  fairseq makes log-probabilities in single precision at
every position, padding too: with them, their gradient and the copies on the way it holds six times the logits
in bfloat16 (12 GiB of 4,096 positions and 262,144 symbols).  Here the logits are read in their own type, and
their gradient takes their place; where it is less, the output projection is applied to some tokens at a time
(:func:`~sekd_fairseq.criterions.projection.saves_memory`).
"""

from typing import Any

import torch
from fairseq.criterions import FairseqCriterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from torch import Tensor

from sekd_fairseq.criterions.projection import batch_loss, outputs, target_positions
from sekd_fairseq.losses import support_log_probs
from sekd_fairseq.losses.cross_entropy import cross_entropy_weights


class _LanguageModelCrossEntropy(FairseqCriterion):  # type: ignore[misc]
    """Before one of fairseq's classes: its forward pass."""

    eps = 0.0
    logs_nll = False

    def forward(
        self, model: Any, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, Any, dict[str, Any]]:
        """Loss of a batch: ``(sum over tokens, denominator, sums to log)``."""
        positions = target_positions(sample, self.padding_idx)
        target = sample["target"].view(-1).index_select(0, positions).unsqueeze(1)  # (N, 1)
        valid = torch.ones_like(target, dtype=torch.bool)

        def loss_of(
            logits: Tensor, rows: Tensor, part: slice, overwrite: bool
        ) -> tuple[Tensor, dict[str, Tensor]]:
            student = support_log_probs(
                logits, rows, target[part], valid[part], self.eps > 0, overwrite=overwrite
            )
            on_nll, on_sum = cross_entropy_weights(0.0, self.eps, logits.size(-1))
            nll = -student.log_q[:, 0].sum()
            loss = on_nll * nll + (on_sum * student.sum_log_q.sum() if self.eps > 0 else 0.0)
            return loss, {"nll_loss": nll.detach()} if self.logs_nll else {}

        symbols = len(self.task.target_dictionary)
        loss, sums = batch_loss(model, sample, positions, loss_of, None, symbols)
        return outputs(sample, loss, sums, self.sentence_avg)


class LanguageModelCrossEntropy(_LanguageModelCrossEntropy, CrossEntropyCriterion):  # type: ignore[misc]
    """``--criterion cross_entropy``."""


class LanguageModelLabelSmoothedCrossEntropy(  # type: ignore[misc]
    _LanguageModelCrossEntropy, LabelSmoothedCrossEntropyCriterion
):
    """``--criterion label_smoothed_cross_entropy``; with ``--report-accuracy`` or
    ``--ignore-prefix-size`` fairseq's own."""

    logs_nll = True

    def forward(
        self, model: Any, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, Any, dict[str, Any]]:
        """Loss of a batch: ``(sum over tokens, denominator, sums to log)``."""
        if self.report_accuracy or self.ignore_prefix_size:
            found: tuple[Tensor, Any, dict[str, Any]] = LabelSmoothedCrossEntropyCriterion.forward(
                self, model, sample, reduce
            )
            return found
        return super().forward(model, sample, reduce)


#: By fairseq's class.
OF_LANGUAGE_MODELS = {
    CrossEntropyCriterion: LanguageModelCrossEntropy,
    LabelSmoothedCrossEntropyCriterion: LanguageModelLabelSmoothedCrossEntropy,
}
