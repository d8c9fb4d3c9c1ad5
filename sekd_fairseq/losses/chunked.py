"""Output projection, loss and gradient in chunks of tokens: all logits are never held at once.

A loss that is a sum over tokens can be worked off a few tokens at a time.  For each chunk the
logits are made, the loss and its gradient to the features and to the projection taken, and the
logits dropped; backward only scales what forward has found.  So it costs the same three products
of features and projection as the plain path (recomputing logits in backward would cost a fourth),
and ``(chunk, V)`` instead of ``(tokens, V)`` memory.  Liger Kernel does this for cross entropy.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

#: From a chunk's logits, (chunk, V), and which tokens these are: their summed loss, 0-d, and sums
#: to log.
ChunkLoss = Callable[[Tensor, slice], tuple[Tensor, dict[str, Tensor]]]


def chunked_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    loss_of: ChunkLoss,
    chunk_tokens: int,
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
    chunk_tokens : int
        Tokens a chunk, 1 or more.

    Returns
    -------
    loss : 0-d
        With gradient to the three above (first derivatives only).
    sums
        Those of ``loss_of``, added up.
    """
    sums: dict[str, Tensor] = {}
    with_gradient = torch.is_grad_enabled()
    loss = _ChunkedLoss.apply(features, weight, bias, with_gradient, loss_of, chunk_tokens, sums)  # type: ignore[no-untyped-call]
    return loss, sums


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        with_gradient: bool,
        loss_of: ChunkLoss,
        chunk_tokens: int,
        sums: dict[str, Tensor],
    ) -> Tensor:
        total = features.new_zeros((), dtype=torch.promote_types(features.dtype, torch.float32))
        wants = [with_gradient and needed for needed in ctx.needs_input_grad[:3]]
        grad_features = torch.empty_like(features) if wants[0] else None
        # Many small parts are added up, so half precision adds in single.
        grad_weight = torch.zeros_like(weight, dtype=total.dtype) if wants[1] else None
        grad_bias = None
        if bias is not None and wants[2]:
            grad_bias = torch.zeros_like(bias, dtype=total.dtype)
        # No tokens still make one (empty) chunk, which names the sums.
        for start in range(0, max(1, features.size(0)), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = functional.linear(features[part], weight, bias)
            with torch.set_grad_enabled(any(wants)):
                logits.requires_grad_(any(wants))
                loss, found = loss_of(logits, part)
            total += loss.detach()
            for key, value in found.items():
                sums[key] = sums[key] + value if key in sums else value
            if not any(wants):
                continue
            (gradient,) = torch.autograd.grad(loss, logits)
            if grad_features is not None:
                # Not mm(out=...): for that --amp has no kernel of mixed types.
                grad_features[part] = gradient @ weight
            if grad_weight is not None and grad_weight.dtype == gradient.dtype:
                grad_weight.addmm_(gradient.t(), features[part])
            elif grad_weight is not None:
                grad_weight += gradient.t() @ features[part]
            if grad_bias is not None:
                grad_bias += gradient.sum(dim=0)
        ctx.save_for_backward(grad_features, grad_weight, grad_bias)
        ctx.dtypes = (features.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (
            None if gradient is None else (gradient * upstream).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None, None)
