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
        # Autocast (--amp) would run it in another type than was asked for.
        with torch.autocast(positions.device.type, enabled=False):
            for model in self.models:
                if next(model.parameters()).device != positions.device:
                    model.to(positions.device)  # which looks at every weight
                logits.append(TokenLogits(model, sample, positions))
        return TeacherLogits(logits, sample["target"].view(-1).index_select(0, positions))


@dataclass(frozen=True)
class TeacherLogits:
    """The teacher's full distributions at ``N`` target tokens.

    Attributes
    ----------
    logits
        Of each model of an ensemble, in its type: (N, V), or what gives (n, V) for a slice of the tokens.
    target : (N,) int64
        Their reference tokens.
    """

    logits: Sequence[TokenLogits | Tensor]
    target: Tensor

    @torch.no_grad()
    def __getitem__(self, part: slice) -> "TeacherLogits":
        """The teacher at some of these tokens, its logits made."""
        return TeacherLogits([one[part] for one in self.logits], self.target[part])

    @torch.no_grad()
    def tokens(self, part: slice) -> TeacherTokens:
        """Distributions of some of these tokens in float32; of an ensemble the mean probability."""
        log_p = [z[part].log_softmax(dim=-1, dtype=torch.float32) for z in self.logits]
        mean = log_p[0]
        if len(log_p) > 1:
            mean = torch.stack(log_p).logsumexp(dim=0) - math.log(len(log_p))
        target = self.target[part]
        return TeacherTokens.whole(reference_first(mean, target), target)
