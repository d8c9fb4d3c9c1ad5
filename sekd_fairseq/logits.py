"""Logits of models at the target positions of a batch."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sekd_fairseq.errors import UserError

#: Logits in single precision that are held at a time: 256 MB, and a few times as much beside them.
BLOCK_ELEMENTS = 2**26


def flat_logits(logits: Tensor, target: Tensor, symbols: int | None = None) -> Tensor:
    """Logits, or features, at every target position, (B, T, X) to (B T, X).

    Raises
    ------
    UserError
        They are not at the positions of ``target`` (B, T), or logits of another number of symbols.
    """
    expected = (*target.shape, symbols or logits.size(-1))
    if logits.shape != expected:
        raise UserError(
            f"the model gives logits of shape {tuple(logits.shape)}: expected {expected}, one for "
            "each target token and each symbol of the data's dictionary; the model and DATA do not "
            "belong together, or this --arch does not give logits at target positions"
        )
    return logits.reshape(-1, logits.size(-1))


@torch.no_grad()
def token_logits(
    models: Sequence[Any],
    sample: dict[str, Any],
    pad: int,
    temperature: float = 1.0,
    symbols: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Next-token distributions of an ensemble at a batch's target tokens, some tokens at a time.

    Yields
    ------
    target : (n,) int64
        Reference tokens that are not padding, in the batch's order.
    z : (n, V) float32
        Logits over ``temperature``; of several models the log of their mean probability. The
        caller may overwrite it.

    Raises
    ------
    UserError
        A model gives no logits for each target token and each of ``symbols``.
    """
    target = sample["target"]
    rows = target.view(-1).ne(pad).nonzero().squeeze(1)
    logits = [flat_logits(model(**sample["net_input"])[0], target, symbols) for model in models]
    step = max(1, BLOCK_ELEMENTS // logits[0].size(-1))
    for start in range(0, rows.numel(), step):
        part = rows[start : start + step]
        z = [one[part].float() for one in logits]
        if temperature != 1.0:
            z = [one.div_(temperature) for one in z]
        if len(z) > 1:
            log_p = torch.stack([one.log_softmax(dim=-1) for one in z])
            z = [log_p.logsumexp(dim=0) - np.log(len(z))]
        yield target.view(-1)[part], z[0]
