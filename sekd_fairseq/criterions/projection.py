"""From a model to the summed loss of a batch: the plain way, or in chunks of the output projection."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sekd_fairseq.errors import UserError
from sekd_fairseq.logits import capped, flat_logits, output_projection, softcap
from sekd_fairseq.losses import chunked_loss
from sekd_fairseq.losses.chunked import is_trained, logits_dtype, tokens_per_chunk

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


def chunked_projection(model: Any, tokens: int, chunk_tokens: int | None) -> nn.Linear | None:
    """The output projection where it is applied to some of ``tokens`` at a time, else None.

    ``chunk_tokens`` is how many: 0 for no chunks, None for chunks where they save memory.

    Raises
    ------
    UserError
        A number of tokens, where torch cannot reduce the projection's gradient (:func:`is_unseen`).
    """
    projection = None if chunk_tokens == 0 else output_projection(model)
    if projection is None:
        return None
    if chunk_tokens is None and not saves_memory(projection.weight, tokens):
        return None
    if not is_unseen(model, projection.weight):
        return projection
    if chunk_tokens is None:
        return None
    raise UserError(
        f"--sekd-chunk-tokens {chunk_tokens}: expected no --find-unused-parameters beside it, which takes "
        "an output projection that is applied in chunks for unused; leave one of them out, or tie the "
        "projection to the embedding (--share-decoder-input-output-embed)"
    )


def saves_memory(weight: Tensor, tokens: int) -> bool:
    """Whether a chunk's logits, and the sum of the gradient of the projection's weight, (V, D) in single
    precision, take less memory than the logits of all tokens, (N, V); gradients take the place of logits.
    """
    size = logits_dtype(weight).itemsize
    added_up = 4 * weight.size(1) if is_trained(weight) else 0
    return tokens * size > tokens_per_chunk(tokens, weight) * size + added_up


def is_unseen(model: nn.Module, weight: Tensor) -> bool:
    """Whether torch's DDP takes a weight that is applied to the model's output for unused.

    With ``find_unused_parameters`` it follows the output back to the weights; the gradient of another
    one, which is there all the same, ends the training. A tied weight has made the features.
    """
    if not is_trained(weight):
        return False
    wrapper: Any = model
    while wrapper is not None and not isinstance(wrapper, DistributedDataParallel):
        wrapper = getattr(wrapper, "module", None)
    if wrapper is None or not wrapper.find_unused_parameters:
        return False
    modules = [m for m in wrapper.modules() if any(p is weight for p in m.parameters(False))]
    return len(modules) < 2


def batch_loss(
    model: Any,
    sample: dict[str, Any],
    positions: Tensor,
    loss_of: LossOf,
    chunk_tokens: int | None,
    symbols: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The summed loss of a batch, and sums to log.

    Parameters
    ----------
    positions : (N,) int64
        The places of the tokens that count (:func:`target_positions`).
    chunk_tokens
        As of :func:`chunked_projection`.
    symbols
        Of the dictionary.
    """
    projection = chunked_projection(model, positions.numel(), chunk_tokens)
    if projection is None:
        logits = model(**sample["net_input"])[0]
        logits = flat_logits(logits, sample["target"], symbols)  # (B T, V)
        # No layer that makes them reads them again, so that gradients may take their place.
        overwrite = output_projection(model) is not None
        # As in chunks: sums over the vocabulary are too large for autocast's float16.
        with torch.autocast(logits.device.type, enabled=False):
            return loss_of(logits, positions, slice(None), overwrite)
    features = model(**sample["net_input"], features_only=True)[0]
    features = flat_logits(features, sample["target"]).index_select(0, positions)  # (N, D)
    cap = softcap(model)

    def part_loss(logits: Tensor, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        logits = capped(logits, cap)
        return loss_of(logits, torch.arange(len(logits), device=logits.device), part, True)

    return chunked_loss(features, projection.weight, projection.bias, part_loss, chunk_tokens)
