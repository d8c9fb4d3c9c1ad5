"""From a model to the summed loss of a batch: the plain way, or in chunks of the output projection."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sekd_fairseq.errors import UserError
from sekd_fairseq.logits import capped, flat_logits, softcap
from sekd_fairseq.losses import chunked_loss

#: From logits, the rows of them that count, which of the batch's tokens these are, and whether the
#: gradient may take the place of the logits in memory: their summed loss, 0-d, and sums to log.
LossOf = Callable[[Tensor, Tensor, slice, bool], tuple[Tensor, dict[str, Tensor]]]


def parse_chunk_tokens(value: str) -> int | None:
    """The value of ``--sekd-chunk-tokens``: None for ``auto``."""
    if value == "auto":
        return None
    try:
        tokens = int(value)
    except ValueError:
        tokens = -1
    if tokens < 0:
        raise UserError(f"--sekd-chunk-tokens: expected 0 or more, or auto, found {value!r}")
    return tokens


def target_positions(sample: dict[str, Any], pad: int) -> Tensor:
    """The places of a batch's target tokens that are not padding in the flattened target, (N,)."""
    if (positions := sample.get("target_positions")) is not None:
        found: Tensor = positions
        return found
    # With the number of tokens given, a GPU does not have to be waited for.
    mask = sample["target"].view(-1).ne(pad)
    return torch.nonzero_static(mask, size=int(sample["ntokens"])).squeeze(1)


def outputs(
    sample: dict[str, Any], loss: Tensor, sums: dict[str, Tensor], sentence_avg: bool
) -> tuple[Tensor, Any, dict[str, Any]]:
    """What fairseq wants of a criterion: ``(summed loss, denominator, sums to log)``.

    The sums are in the order of their names: fairseq adds up those of all processes by their place.
    """
    sentences = len(sample["target"])
    sample_size = sentences if sentence_avg else sample["ntokens"]
    logged = {
        "loss": loss.detach(),
        "ntokens": sample["ntokens"],
        "nsentences": sentences,
        "sample_size": sample_size,
    }
    return loss, sample_size, dict(sorted((logged | sums).items()))


def batch_loss(
    model: Any,
    sample: dict[str, Any],
    positions: Tensor,
    loss_of: LossOf,
    projection: torch.nn.Linear | None,
    chunk_tokens: int | None,
    symbols: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The summed loss of a batch, and sums to log.

    Parameters
    ----------
    positions : (N,) int64
        The places of the tokens that count (:func:`target_positions`).
    projection
        What is applied to ``chunk_tokens`` at a time (None: as memory allows); None for all at once.
    symbols
        Of the dictionary.
    """
    if projection is None:
        logits = model(**sample["net_input"])[0]
        logits = flat_logits(logits, sample["target"], symbols)  # (B T, V)
        return loss_of(logits, positions, slice(None), False)
    features = model(**sample["net_input"], features_only=True)[0]
    features = flat_logits(features, sample["target"]).index_select(0, positions)  # (N, D)
    cap = softcap(model)

    def part_loss(logits: Tensor, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        logits = capped(logits, cap)
        return loss_of(logits, torch.arange(len(logits), device=logits.device), part, True)

    return chunked_loss(features, projection.weight, projection.bias, part_loss, chunk_tokens)
