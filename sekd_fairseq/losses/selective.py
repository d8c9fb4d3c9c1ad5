"""Selective knowledge distillation of Wang et al. (ACL 2021), for NMT: only some tokens distil.

Tokens whose cross entropy of the reference is among the largest ``share`` receive the teacher,
the others the reference alone.  *Batch level* compares within a batch, *global level* with a
first-in-first-out queue of past tokens.
"""

import torch
from torch import Tensor


def hardest(nll: Tensor, share: float) -> Tensor:
    """The ``round(share * N)`` tokens of largest ``nll``, a bool mask (N,); ties go to the first."""
    count = round(share * nll.numel())
    chosen = nll.detach().sort(descending=True, stable=True).indices[:count]
    return torch.zeros_like(nll, dtype=torch.bool).index_fill(0, chosen, True)


def batch_quantile(values: Tensor, level: float) -> Tensor:
    """The quantile of all these values, (N,) to 0-d, interpolated linearly as NumPy does; no values
    give 0."""
    if values.numel() == 0:
        return values.new_zeros(())
    ordered = values.sort().values  # torch.quantile refuses more than 2^24 values
    place = level * (values.numel() - 1)
    low = int(place)
    high = min(low + 1, values.numel() - 1)
    return torch.lerp(ordered[low], ordered[high], place - low)


class TokenQueue:
    """The last ``size`` values of past updates, and the threshold that they give.

    Values that :meth:`push` takes count from the next :meth:`commit` on, which belongs at the end
    of an update: the threshold is then the same for every part of an accumulated batch.  All
    tensors stay on the device of the values, and nothing here waits for it.

    Parameters
    ----------
    size : int
        Wang et al. use 30,000.
    share : float
        Share of tokens above the threshold, in (0, 1); Wang et al. use 0.5.
    """

    def __init__(self, size: int, share: float) -> None:
        self.size = size
        self.share = share
        self.values = torch.zeros(0)
        self._pending: list[Tensor] = []
        self._threshold: Tensor | None = None

    def push(self, values: Tensor) -> None:
        """Note the values of a part of an update, (N,)."""
        self._pending.append(values.detach().float())

    def take_pending(self) -> Tensor:
        """The values noted since an update began, (N,), which are noted no longer."""
        pending, self._pending = self._pending, []
        return torch.cat(pending) if pending else self.values.new_zeros(0)

    def commit(self, values: Tensor) -> None:
        """End an update: its values enter, the oldest leave, the threshold moves."""
        if values.numel():
            self.load(torch.cat([self.values.to(values), values])[-self.size :])

    def load(self, values: Tensor) -> None:
        """Replace all values, oldest first."""
        self.values = values
        place = max(1, round((1.0 - self.share) * values.numel()))
        self._threshold = values.kthvalue(place).values if values.numel() else None

    def select(self, nll: Tensor) -> Tensor:
        """Tokens above the threshold, bool (N,); all of them while the queue is empty.

        Nothing else would be the same however an update is cut into parts.
        """
        if self._threshold is None:
            return torch.ones_like(nll, dtype=torch.bool)
        self._threshold = self._threshold.to(nll.device)  # of a checkpoint, on the CPU
        return nll.detach() > self._threshold
