"""The teacher itself in the training loop, for those who would rather spend compute than disk."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fairseq import utils
from torch import Tensor

from sekd_fairseq.checkpoints import load_models
from sekd_fairseq.logits import TokenLogits
from sekd_fairseq.losses import TeacherTokens
from sekd_fairseq.losses.support import reference_first


class OnlineTeacher:
    """One or several checkpoints that give every loss their full distribution, ``k = V``.

    A plain object and no module: it never enters the student's checkpoint, optimiser or parameter
    count. It stays in evaluation mode, whatever the student does.

    Parameters
    ----------
    paths
        Checkpoints; several joined with ``:`` are an ensemble (mean probability).
    data
        The data directory whose dictionaries they must fit.
    dtype
        What they run in.
    """

    def __init__(self, paths: str, data: str, dtype: torch.dtype) -> None:
        cpu = torch.device("cpu")
        self.models, _, _ = load_models(utils.split_paths(paths), data, cpu, dtype=dtype)
        for model in self.models:
            model.requires_grad_(False)

    @torch.no_grad()
    def at(self, sample: dict[str, Any], positions: Tensor) -> "TeacherLogits":
        """The teacher at some positions, (N,), of a batch's flattened target, (B T)."""
        logits = []
        for model in self.models:
            if next(model.parameters()).device != positions.device:
                model.to(positions.device)  # which looks at every weight
            logits.append(TokenLogits(model, sample, positions))
        return TeacherLogits(logits, sample["target"].view(-1).index_select(0, positions))


@dataclass(frozen=True)
class TeacherLogits:
    """The teacher at ``N`` target tokens, whose logits are made for some of them at a time.

    Attributes
    ----------
    logits
        Of each model of an ensemble, (n, V) for a slice of the tokens.
    target : (N,) int64
        Their reference tokens.
    """

    logits: Sequence[TokenLogits | Tensor]
    target: Tensor

    @torch.no_grad()
    def __getitem__(self, part: slice) -> "DenseTeacher":
        """The teacher at some of these tokens."""
        return DenseTeacher([one[part] for one in self.logits], self.target[part])


@dataclass(frozen=True)
class DenseTeacher:
    """Full distributions at ``N`` target tokens.

    Attributes
    ----------
    logits
        (N, V) in the teacher's type, of each model of an ensemble.
    target : (N,) int64
        Their reference tokens.
    """

    logits: list[Tensor]
    target: Tensor

    @torch.no_grad()
    def tokens(self, part: slice) -> TeacherTokens:
        """Distributions of some of these tokens in float32; of an ensemble the mean probability."""
        log_p = [z[part].log_softmax(dim=-1, dtype=torch.float32) for z in self.logits]
        mean = log_p[0]
        if len(log_p) > 1:
            mean = torch.stack(log_p).logsumexp(dim=0) - math.log(len(log_p))
        target = self.target[part]
        return TeacherTokens.whole(reference_first(mean, target), target)
