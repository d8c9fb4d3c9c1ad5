"""Output projection, loss and gradient in chunks of tokens: all logits are never held at once.

A loss that is a sum over tokens can be worked off a few tokens at a time.  For each chunk the
logits are made, the loss and its gradient to the features and to the projection taken, and the
logits dropped; backward only scales what forward has found.  So it costs the same three products
of features and projection as the plain path (recomputing logits in backward would cost a fourth),
and ``(chunk, V)`` instead of ``(tokens, V)`` memory.  Liger Kernel does this for cross entropy.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sekd_fairseq.losses.known_gradient import with_gradient
from sekd_fairseq.losses.support_torch import blocks_of

#: From a chunk's logits, (chunk, V), and which tokens these are: their summed loss, 0-d, and sums
#: to log. The loss's gradient may take the place of the logits in memory.
ChunkLoss = Callable[[Tensor, slice], tuple[Tensor, dict[str, Tensor]]]

#: Bytes of a chunk's logits, at least, where the size of chunks is not given: products of matrices are
#: then as fast as of whole batches, and a small part of the memory that these take.
CHUNK_BYTES = 2**28
#: Gradients to float16 logits are kept times this factor, as a loss scaler would: those of tokens that
#: the student knows well are too small for the type.
HALF_SCALE = 1024.0


def logits_dtype(weight: Tensor) -> torch.dtype:
    """The type of logits that a weight makes: autocast's where that is on, else the weight's."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def is_trained(weight: Tensor) -> bool:
    """Whether chunks add up a gradient of this weight."""
    return weight.requires_grad and torch.is_grad_enabled()


def tokens_per_chunk(tokens: int, weight: Tensor) -> int:
    """The size of equal chunks of ``tokens``, 1 or more, under the projection ``weight`` (V, D).

    Their logits take at most :data:`CHUNK_BYTES`. Of a weight that is trained they take up to a quarter of
    the sum of its gradient, (V, D) in single precision, where that is more: the sum is held anyway, and each
    chunk reads and writes all of it (results/bench_criterion_gpu.csv: 8 chunks of 131,072 symbols and width
    2,048 take 1.38 times as long as all at once, 2 chunks of 32,768 and 1,024 1.18 times).
    """
    symbols, width = weight.shape
    most = max(CHUNK_BYTES, symbols * width) if is_trained(weight) else CHUNK_BYTES
    most = max(1, most // (symbols * logits_dtype(weight).itemsize))
    return max(1, math.ceil(tokens / math.ceil(tokens / most))) if tokens else 1


def chunked_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    loss_of: ChunkLoss,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The summed loss of logits ``features @ weight.T + bias`` that are made chunk by chunk.

    Parameters
    ----------
    features : (N, D) float
        What the output projection reads, at tokens that are not padding. Gradient flows here,
    weight : (V, D) float
        here,
    bias : (V,) float or None
        and here.
    loss_of
        Called once a chunk; must be additive over tokens, so no threshold taken from the chunk.
    chunk_tokens : int, optional
        Tokens per chunk, 1 or more; by default :func:`tokens_per_chunk`.

    Returns
    -------
    loss : 0-d
        With gradient to the three above (first derivatives only).
    sums
        Those of ``loss_of``, added up.
    """
    inputs = (features, weight, bias)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    size = chunk_tokens or tokens_per_chunk(len(features), weight)
    dtype = logits_dtype(weight)
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        # Once, and not once per chunk.
        features, weight = features.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        scale = kept_times(weight.dtype)
        value, sums, found = _in_chunks(features, weight, bias, loss_of, size, wanted, scale)
    return with_gradient(value, list(zip(inputs, found, strict=True)), scale), sums


def blockwise_loss(
    logits: Tensor, rows: Tensor, loss_of: ChunkLoss, at_once: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """The summed loss of some rows of logits, worked off in blocks (:func:`blocks_of`).

    For losses that look at all of the vocabulary in single precision: beside the gradient, in the
    logits' type, only one block of that is held.

    Parameters
    ----------
    logits : (M, V) float
        Gradient flows here.
    rows : (N,) int64
        The rows that count, each once.
    loss_of
        Called once a block with its logits, (n, V) in single precision.
    at_once
        Take all rows as one block, for a loss that ranks the tokens of a batch.
    """
    sums: dict[str, Tensor] = {}
    wanted = torch.is_grad_enabled() and logits.requires_grad
    scale = kept_times(logits.dtype)
    with torch.no_grad():
        gradient = torch.zeros_like(logits) if wanted else None
        total = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
        # No tokens still make one (empty) block, which names the sums.
        blocks = [slice(None)] if at_once else blocks_of(logits, rows) or [slice(0, 0)]
        for part in blocks:
            block = logits.index_select(0, rows[part]).to(total.dtype)
            with torch.set_grad_enabled(wanted):
                loss, found = loss_of(block.requires_grad_(wanted), part)
            total += loss.detach()
            _add(sums, found)
            if gradient is not None:
                (on_block,) = torch.autograd.grad(loss, block, loss.new_full((), scale))
                gradient.index_copy_(0, rows[part], on_block.to(gradient.dtype))
    return with_gradient(total, [(logits, gradient)], scale), sums


def kept_times(dtype: torch.dtype) -> float:
    """The factor that gradients to logits of this type are kept with until backward."""
    return HALF_SCALE if dtype == torch.float16 else 1.0


def _add(sums: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for key, value in found.items():
        sums[key] = sums[key] + value if key in sums else value


def _in_chunks(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    loss_of: ChunkLoss,
    size: int,
    wanted: Sequence[bool],
    scale: float,
) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
    """The summed loss, the sums to log, and ``scale`` times the gradients to the three, where wanted."""
    sums: dict[str, Tensor] = {}
    single = torch.promote_types(features.dtype, torch.float32)
    total = features.new_zeros((), dtype=single)
    # Many small parts are added up, so half precision adds in single; and so does one part that is kept
    # times a factor, because that may be too large for float16.
    summed = weight.dtype if size >= len(features) and scale == 1.0 else single
    grad_features = torch.empty_like(features) if wanted[0] else None
    grad_weight = torch.empty_like(weight, dtype=summed) if wanted[1] else None
    grad_bias = torch.zeros_like(bias, dtype=single) if bias is not None and wanted[2] else None
    # No tokens still make one (empty) chunk, which names the sums.
    for start in range(0, max(1, len(features)), size):
        part = slice(start, start + size)
        logits = functional.linear(features[part], weight, bias)
        with torch.set_grad_enabled(any(wanted)):
            loss, found = loss_of(logits.requires_grad_(any(wanted)), part)
        total += loss.detach()
        _add(sums, found)
        if any(wanted):
            (gradient,) = torch.autograd.grad(loss, logits, loss.new_full((), scale))
            if grad_features is not None:
                torch.mm(gradient, weight, out=grad_features[part])
            if grad_weight is not None:
                _add_product(grad_weight, gradient.t(), features[part], first=start == 0)
            if grad_bias is not None:
                grad_bias += gradient.sum(dim=0, dtype=single)
            del gradient
        del logits, loss, found  # else they are held while the next chunk's are made
    return total, sums, [grad_features, grad_weight, grad_bias]


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """``total += a @ b``, or ``total = a @ b`` for the first; products in half precision are added in
    single, on a GPU without a copy."""
    kept = 0 if first else 1  # with 0 what is there is not read
    if total.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, beta=kept, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=kept)
