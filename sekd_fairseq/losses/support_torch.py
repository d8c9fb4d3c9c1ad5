"""The passes over logits of :mod:`~sekd_fairseq.losses.support` in torch, a block of rows at a time."""

from typing import NamedTuple

import torch
from torch import Tensor

from sekd_fairseq.losses.divergences import NEG_INF

#: Elements of the scratch buffer that holds a few rows of logits at a time: about one L2 cache
#: on a CPU (measured: 2**18 to 2**20 are alike, 2**24 is 1.5 times slower), 64 MiB on a GPU.
SCRATCH_ELEMENTS = {"cpu": 2**19, "cuda": 2**24}


class Reduced(NamedTuple):
    """What a pass over logits leaves, for the result and for the gradient.

    The first five are those of :class:`~sekd_fairseq.losses.support.SupportLogProbs`; ``outside_top`` (N,) is the largest
    ``z / T`` outside the support and ``outside_log_sum`` (N,) the log of the sum of
    ``exp(z / T - outside_top)`` there; both ``-inf`` where nothing lies outside.
    """

    log_q: Tensor
    log_outside: Tensor
    sum_log_q: Tensor
    allowed: Tensor
    max_log_q: Tensor
    outside_top: Tensor
    outside_log_sum: Tensor


def reduce(
    logits: Tensor,
    rows: Tensor,
    ids: Tensor,
    valid: Tensor,
    with_sum: bool,
    temperature: float,
    weights: Tensor | None = None,
) -> Reduced:
    """Arguments of :func:`~sekd_fairseq.losses.support.support_log_probs`."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    parts: list[Reduced] = []
    for part in blocks_of(logits, rows):
        scratch = logits.index_select(0, rows[part]).to(dtype)
        if temperature != 1.0:
            scratch.div_(temperature)
        parts.append(reduce_rows(scratch, ids[part], valid[part], with_sum, weights))
    if not parts:
        column = logits.new_zeros(0, dtype=dtype)
        return Reduced(column.new_zeros(ids.shape), *[column] * 6)
    return Reduced(*map(torch.cat, zip(*parts, strict=True)))


def gradient(
    logits: Tensor,
    rows: Tensor,
    ids: Tensor,
    reduced: Reduced,
    grad_log_q: Tensor,
    grad_outside: Tensor,
    grad_sum: Tensor | None,
    temperature: float,
    overwrite: bool,
    weights: Tensor | None = None,
) -> Tensor:
    """The gradient to the logits, (M, V) in their type; zero at other rows than ``rows``."""
    grad = logits.detach() if overwrite else torch.empty_like(logits)
    if rows.numel() < logits.size(0):
        padding = torch.ones(logits.size(0), 1, dtype=torch.bool, device=logits.device)
        grad.masked_fill_(padding.index_fill_(0, rows, False), 0.0)
    for part in blocks_of(logits, rows):
        scratch = logits.index_select(0, rows[part]).to(reduced.log_q.dtype)
        if temperature != 1.0:
            scratch.div_(temperature)
        scratch = fill_gradient(
            scratch,
            ids[part],
            Reduced(*(column[part] for column in reduced)),
            grad_log_q[part],
            grad_outside[part],
            None if grad_sum is None else grad_sum[part],
            weights,
        )
        if temperature != 1.0:
            scratch.div_(temperature)
        grad.index_copy_(0, rows[part], scratch.to(grad.dtype))
    return grad


def blocks_of(logits: Tensor, rows: Tensor) -> list[slice]:
    """Parts of ``rows`` whose logits fill one scratch buffer."""
    elements = SCRATCH_ELEMENTS.get(logits.device.type, 2**24)
    step = max(1, elements // max(1, logits.size(-1)))
    return [slice(start, start + step) for start in range(0, rows.numel(), step)]


def reduce_rows(
    scratch: Tensor,
    ids: Tensor,
    valid: Tensor,
    with_sum: bool,
    weights: Tensor | None = None,
) -> Reduced:
    """Reduce a scratch copy of logits, which is overwritten."""
    z_support = scratch.gather(1, ids).masked_fill(~valid, NEG_INF)  # (n, K)
    outside_top = scratch.scatter_(1, ids, NEG_INF).amax(dim=1)  # (n,)
    top = torch.maximum(outside_top, z_support.amax(dim=1))
    empty = outside_top == NEG_INF
    scratch.sub_(outside_top.masked_fill(empty, 0.0).unsqueeze(1))
    allowed = scratch.new_full((scratch.size(0),), float(scratch.size(1)))
    if with_sum:
        # Of distances from the maximum: a sum of large logits would have no digits left.
        distance = scratch.scatter_(1, ids, 0.0).sum(dim=1)
        finite = None
        if scratch.is_cuda or bool(distance.isinf().any()):  # forbidden tokens
            finite = scratch.isfinite()
        if weights is not None:
            distance, outside = weighted_outside(scratch, ids, valid, finite, weights)
        elif finite is not None:
            outside = finite.sum(dim=1).to(scratch) - valid.sum(dim=1)
            distance = scratch.masked_fill(~finite, 0.0).sum(dim=1)
        else:
            outside = allowed - valid.sum(dim=1)
        scratch.scatter_(1, ids, NEG_INF)
    outside_log_sum = scratch.exp_().sum(dim=1).log()
    log_outside = (outside_top - top) + outside_log_sum  # relative to the best token
    z_support = z_support - top.unsqueeze(1)
    log_total = (z_support.exp().sum(dim=1) + log_outside.exp()).log()
    log_q = z_support - log_total.unsqueeze(1)
    sum_log_q = torch.zeros_like(top)
    if with_sum:
        weight, relative = weighted_support(log_q, ids, weights)
        allowed = outside + weight.sum(dim=1)
        sum_log_q = distance + outside * ((outside_top - top) - log_total).masked_fill(empty, 0.0)
        sum_log_q = sum_log_q + relative.sum(dim=1)
    return Reduced(
        log_q,
        log_outside - log_total,
        sum_log_q,
        allowed,
        -log_total,
        outside_top,
        outside_log_sum,
    )


def weighted_outside(
    scratch: Tensor, ids: Tensor, valid: Tensor, finite: Tensor | None, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums over the tokens outside the support, ``w (x - log w)`` and ``w``; both (n,).

    ``scratch`` (n, V) holds ``x``, and 0 on the support; ``finite`` marks the tokens that count, None
    for all of them.
    """
    weights = weights.to(scratch)
    surplus = torch.special.xlogy(weights, weights)
    inside = valid.to(scratch)
    if finite is None:
        found = scratch @ weights - surplus.sum()
        outside = weights.sum().expand(scratch.size(0))
    else:
        found = scratch.masked_fill(~finite, 0.0) @ weights - finite.to(scratch) @ surplus
        outside = finite.to(scratch) @ weights
    found = found + (surplus[ids] * inside).sum(dim=1)
    outside = outside - (weights[ids] * inside).sum(dim=1)
    return found, outside.clamp_min(0.0)


def weighted_support(log_q: Tensor, ids: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """``w`` and ``w (log q - log w)`` on the support, zero at slots that are not valid or forbidden;
    both (N, K). ``w`` is 1 without ``weights``."""
    inside = log_q > NEG_INF
    log_q = log_q.masked_fill(~inside, 0.0)
    if weights is None:
        return inside.to(log_q), log_q
    weight = weights.to(log_q)[ids].masked_fill(~inside, 0.0)
    return weight, weight * log_q - torch.special.xlogy(weight, weight)


def fill_gradient(
    scratch: Tensor,
    ids: Tensor,
    reduced: Reduced,
    grad_log_q: Tensor,
    grad_outside: Tensor,
    grad_sum: Tensor | None,
    weights: Tensor | None = None,
) -> Tensor:
    """Turn a scratch copy of logits into the gradient with respect to them (docstring of
    :mod:`~sekd_fairseq.losses.support`)."""
    log_q, log_outside, _, allowed, _, outside_top, outside_log_sum = reduced
    forbidden = None
    if grad_sum is not None and (
        scratch.is_cuda
        or weights is not None
        or bool((allowed < scratch.size(1)).any())  # rare, so looked for first
    ):
        forbidden = scratch.isinf()
    unused = log_q == NEG_INF
    grad_log_q = grad_log_q.masked_fill(unused, 0.0)
    spread = -(grad_log_q.sum(dim=1) + grad_outside)  # factor of q_v
    if grad_sum is not None:
        spread = spread - allowed * grad_sum
    empty = outside_top == NEG_INF
    factor = (grad_outside + log_outside.exp() * spread).masked_fill(empty, 0.0)
    # Where nothing lies outside, exp(z - inf) = 0 stands in for the undefined conditional.
    scratch.sub_(outside_top.masked_fill(empty, float("inf")).unsqueeze(1))
    scratch.sub_(outside_log_sum.masked_fill(empty, 0.0).unsqueeze(1))
    scratch.exp_().mul_(factor.unsqueeze(1))
    on_support = log_q.exp() * spread.unsqueeze(1) + grad_log_q
    scratch.scatter_(1, ids, 0.0)
    scratch.scatter_add_(1, ids, on_support.masked_fill(unused, 0.0))
    if grad_sum is not None:
        if weights is None:
            scratch.add_(grad_sum.unsqueeze(1))
        else:
            scratch.addr_(grad_sum, weights.to(scratch))
        if forbidden is not None:
            scratch.masked_fill_(forbidden, 0.0)
    return scratch
