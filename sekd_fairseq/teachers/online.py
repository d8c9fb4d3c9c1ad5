"""The teacher itself in the training loop, for those who would rather spend compute than disk."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from fairseq import utils
from torch import Tensor

from sekd_fairseq.checkpoints import load_models
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
    def at(self, sample: dict[str, Any], positions: Tensor) -> "DenseTeacher":
        """The teacher at some positions, (N,), of a batch's flattened target, (B T)."""
        logits = []
        for model in self.models:
            if next(model.parameters()).device != positions.device:
                model.to(positions.device)  # which looks at every weight
            found = model(**sample["net_input"])[0]
            logits.append(found.reshape(-1, found.size(-1)))
        return DenseTeacher(logits, positions, sample["target"].view(-1)[positions])


@dataclass(frozen=True)
class DenseTeacher:
    """Full distributions at ``N`` target tokens, made a few tokens at a time.

    Attributes
    ----------
    logits
        (M, V) in the teacher's type, of each model of an ensemble.
    positions : (N,) int64
        Where they are in ``logits``.
    target : (N,) int64
        Their reference tokens.
    """

    logits: list[Tensor]
    positions: Tensor
    target: Tensor

    def __getitem__(self, part: slice) -> "DenseTeacher":
        """The teacher at some of these tokens."""
        return DenseTeacher(self.logits, self.positions[part], self.target[part])

    @torch.no_grad()
    def tokens(self, part: slice) -> TeacherTokens:
        """Distributions of some of these tokens in float32; of an ensemble the mean probability."""
        log_p = [z.index_select(0, self.positions[part]) for z in self.logits]
        log_p = [z.log_softmax(dim=-1, dtype=torch.float32) for z in log_p]
        mean = log_p[0]
        if len(log_p) > 1:
            mean = torch.stack(log_p).logsumexp(dim=0) - math.log(len(log_p))
        target = self.target[part]
        return TeacherTokens.whole(reference_first(mean, target), target)
