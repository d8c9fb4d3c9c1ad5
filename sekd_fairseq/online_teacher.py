"""The teacher itself in the training loop, for those who would rather spend compute than disk."""

from typing import Any

import torch
from fairseq import utils

from sekd_fairseq.inference import load_models, token_logits
from sekd_fairseq.losses import TeacherRows


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
        self.models, _, _ = load_models(utils.split_paths(paths), data, torch.device("cpu"))
        for model in self.models:
            model.to(dtype).requires_grad_(False)

    @torch.no_grad()
    def rows(self, sample: dict[str, Any], pad: int) -> TeacherRows:
        """The teacher at a batch's target tokens that are not padding."""
        device = sample["target"].device
        for model in self.models:
            model.to(device)
        targets, log_p = zip(
            *(
                (target, z.log_softmax(dim=-1))
                for target, z in token_logits(self.models, sample, pad)
            ),
            strict=True,
        )
        return TeacherRows.from_dense(torch.cat(log_p), torch.cat(targets))
