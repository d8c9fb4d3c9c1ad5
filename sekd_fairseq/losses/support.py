r"""Log-probabilities on a small support of a wide vocabulary, without a wide softmax.

The KD losses need the student at ``K`` tokens per position (the teacher's support), the mass it
leaves outside of them, and for label smoothing the sum of all log-probabilities.  One pass over
the logits gives all of it, one pass gives the gradient, and neither keeps a ``(tokens, V)`` tensor
besides the logits and their gradient: what plain cross entropy needs, no more.

With ``S`` the support, ``q = softmax(z)`` and ``Q`` the mass of ``q`` outside ``S``, and upstream
gradients ``g_s`` on ``log q_s``, ``h`` on ``log Q`` and ``u`` on ``sum_v log q_v``::

    dz_v = q_v (-sum_s g_s - h - V u) + u + (g_v        if v in S
                                             h q_v / Q  otherwise)

Outside ``S`` this is ``exp(z_v - log sum_{v not in S} exp(z_v)) * c`` with the bounded factor
``c = h + Q (-sum_s g_s - h - V u)``, which neither overflows nor cancels when ``Q`` is tiny.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Elements of the scratch buffer that holds a few rows of logits at a time: about one L2 cache
#: on a CPU (measured: 2**18 to 2**20 are alike, 2**24 is 1.5 times slower), 64 MiB on a GPU.
SCRATCH_ELEMENTS = {"cpu": 2**19, "cuda": 2**24}


class SupportLogProbs(NamedTuple):
    """The student on the teacher's support; ``N`` positions, ``K`` slots.

    Attributes
    ----------
    log_q : (N, K) float
        Log-probability of each support token; ``-inf`` in slots that are not valid.
    log_outside : (N,) float
        Log of the mass outside the support, summed directly (no ``1 - sum``); ``-inf`` if none.
    sum_log_q : (N,) float
        Sum of the log-probabilities of all tokens that the student allows (finite logits);
        zeros unless asked for.
    allowed : (N,) float
        How many tokens have a finite logit; ``V`` unless ``with_sum`` was asked for.
    max_log_q : (N,) float
        Log-probability of the student's best token (no gradient).
    """

    log_q: Tensor
    log_outside: Tensor
    sum_log_q: Tensor
    allowed: Tensor
    max_log_q: Tensor


def support_log_probs(
    logits: Tensor, rows: Tensor, ids: Tensor, valid: Tensor, with_sum: bool = False
) -> SupportLogProbs:
    """Evaluate ``log softmax(logits)`` on a support, with the exact mass outside of it.

    Parameters
    ----------
    logits : (M, V) float
        Student logits of any float type; arithmetic is float32 (float64 for float64 logits).
        ``-inf`` marks a forbidden token. Gradient flows here.
    rows : (N,) int64
        The positions to evaluate (those that are not padding); each at most once.
    ids : (N, K) int64
        Support tokens, distinct among the valid slots of a row. Invalid slots must repeat a valid
        token of the same row.
    valid : (N, K) bool
        Which slots count. A row has at least one.
    with_sum : bool
        Whether ``sum_log_q`` is wanted (one more pass over the scratch buffer).
    """
    outputs = _SupportLogProbs.apply(logits, rows, ids, valid, with_sum)  # type: ignore[no-untyped-call]
    return SupportLogProbs(*outputs)


def _rows_at_a_time(logits: Tensor) -> int:
    return max(1, SCRATCH_ELEMENTS.get(logits.device.type, 2**24) // max(1, logits.size(-1)))


def reduce_rows(
    scratch: Tensor, ids: Tensor, valid: Tensor, with_sum: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Reduce a scratch copy of logits, which is overwritten.

    Returns ``log_q, log_outside, sum_log_q, allowed, max_log_q, log_normaliser`` for its rows.
    """
    wide = float(scratch.size(1))
    top = scratch.amax(dim=1, keepdim=True)  # (n, 1)
    z_support = scratch.gather(1, ids)  # (n, K)
    allowed = torch.full_like(top.squeeze(1), wide)
    z_sum = torch.zeros_like(allowed)
    if with_sum:
        z_sum = scratch.sum(dim=1)
        if bool(torch.isinf(z_sum).any()):  # forbidden tokens: rare, so checked after the sum
            finite = scratch.isfinite()
            allowed = finite.sum(dim=1).to(z_sum)
            z_sum = scratch.masked_fill(~finite, 0.0).sum(dim=1)
    scratch.sub_(top).exp_().scatter_(1, ids, 0.0)
    outside = scratch.sum(dim=1)  # (n,)
    inside = (z_support - top).exp().masked_fill(~valid, 0.0).sum(dim=1)
    log_total = (outside + inside).log()
    log_normaliser = top.squeeze(1) + log_total
    log_q = (z_support - log_normaliser.unsqueeze(1)).masked_fill(~valid, float("-inf"))
    sum_log_q = z_sum - allowed * log_normaliser if with_sum else z_sum
    # Not -log_total: the best token's log_q must equal it exactly, also after rounding.
    max_log_q = top.squeeze(1) - log_normaliser
    return log_q, outside.log() - log_total, sum_log_q, allowed, max_log_q, log_normaliser


def fill_gradient(
    scratch: Tensor,
    ids: Tensor,
    valid: Tensor,
    log_q: Tensor,
    log_outside: Tensor,
    log_normaliser: Tensor,
    allowed: Tensor,
    grad_log_q: Tensor,
    grad_outside: Tensor,
    grad_sum: Tensor | None,
) -> Tensor:
    """Turn a scratch copy of logits into the gradient with respect to them (module docstring)."""
    forbidden = None
    if grad_sum is not None and bool((allowed < scratch.size(1)).any()):
        forbidden = scratch.isinf()
    grad_log_q = grad_log_q.masked_fill(~valid, 0.0)
    spread = -(grad_log_q.sum(dim=1) + grad_outside)  # factor of q_v
    if grad_sum is not None:
        spread = spread - allowed * grad_sum
    empty = torch.isinf(log_outside)
    # Where nothing lies outside, exp(z - inf) = 0 stands in for the undefined conditional.
    log_mass_outside = (log_normaliser + log_outside).masked_fill(empty, float("inf"))
    factor = (grad_outside + log_outside.exp() * spread).masked_fill(empty, 0.0)
    scratch.sub_(log_mass_outside.unsqueeze(1)).exp_().mul_(factor.unsqueeze(1))
    on_support = log_q.exp() * spread.unsqueeze(1) + grad_log_q
    scratch.scatter_(1, ids, 0.0)
    scratch.scatter_add_(1, ids, on_support.masked_fill(~valid, 0.0))
    if grad_sum is not None:
        scratch.add_(grad_sum.unsqueeze(1))
        if forbidden is not None:
            scratch.masked_fill_(forbidden, 0.0)
    return scratch


class _SupportLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: Tensor, ids: Tensor, valid: Tensor, with_sum: bool
    ) -> tuple[Tensor, ...]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        step = _rows_at_a_time(logits)
        parts: list[tuple[Tensor, ...]] = []
        for start in range(0, rows.numel(), step):
            part = slice(start, start + step)
            scratch = logits.index_select(0, rows[part]).to(dtype)
            parts.append(reduce_rows(scratch, ids[part], valid[part], with_sum))
        if parts:
            columns = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        else:
            column = logits.new_zeros(0, dtype=dtype)
            columns = (column.new_zeros(ids.shape), column, column, column, column, column)
        log_q, log_outside, sum_log_q, allowed, max_log_q, log_normaliser = columns
        ctx.save_for_backward(logits, rows, ids, valid, log_q, log_outside, allowed, log_normaliser)
        ctx.with_sum = with_sum
        ctx.mark_non_differentiable(allowed, max_log_q)
        ctx.set_materialize_grads(True)
        return log_q, log_outside, sum_log_q, allowed, max_log_q

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(
        ctx: Any, grad_log_q: Tensor, grad_outside: Tensor, grad_sum: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        logits, rows, ids, valid, log_q, log_outside, allowed, log_normaliser = ctx.saved_tensors
        grad = torch.empty_like(logits)
        if rows.numel() < logits.size(0):
            padding = torch.ones(logits.size(0), dtype=torch.bool, device=logits.device)
            padding[rows] = False
            grad[padding] = 0.0
        step = _rows_at_a_time(logits)
        for start in range(0, rows.numel(), step):
            part = slice(start, start + step)
            scratch = logits.index_select(0, rows[part]).to(log_q.dtype)
            scratch = fill_gradient(
                scratch,
                ids[part],
                valid[part],
                log_q[part],
                log_outside[part],
                log_normaliser[part],
                allowed[part],
                grad_log_q[part],
                grad_outside[part],
                grad_sum[part] if ctx.with_sum else None,
            )
            grad.index_copy_(0, rows[part], scratch.to(grad.dtype))
        return grad, None, None, None, None
