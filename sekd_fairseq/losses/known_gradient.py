"""A value whose gradient was found along with it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def with_gradient(
    value: Tensor, pairs: Sequence[tuple[Tensor | None, Tensor | None]], scale: float = 1.0
) -> Tensor:
    """``value`` (0-d), through which a known gradient flows to each input.

    ``pairs`` holds inputs and gradients, which have the shape of their input and are ``scale`` times
    too large; an input may occur twice, and what flows is in its type. None for no input or no
    gradient. A loss of a few numbers per token is cheaper to differentiate where it is computed than
    to keep a graph of, and what its gradient is can then be logged. First derivatives only.
    """
    inputs, gradients = zip(*pairs, strict=True)
    return _KnownGradient.apply(value, scale, *inputs, *gradients)  # type: ignore[no-untyped-call]


def gradients_of(value: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradient of ``value`` to each input; zeros where there is none."""
    if not value.requires_grad:
        return tuple(map(torch.zeros_like, inputs))
    return torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: float, *tensors: Tensor | None) -> Tensor:
        count = len(tensors) // 2
        ctx.scale = scale
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors[:count]]
        ctx.save_for_backward(*tensors[count:])
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        inputs = zip(gradients, ctx.dtypes, ctx.needs_input_grad[2:], strict=False)
        factor = upstream / ctx.scale
        scaled = (_times(one, factor, dtype) if needed else None for one, dtype, needed in inputs)
        return (None, None, *scaled, *[None] * len(gradients))


def _times(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """``gradient * factor`` in another type, without a copy in the first."""
    if gradient is None:
        return None
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
