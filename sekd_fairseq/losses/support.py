r"""Log-probabilities on a small support of a wide vocabulary, without a wide softmax.

The KD losses need the student at ``K`` tokens per position (the teacher's support), the mass it
leaves outside of them, and for label smoothing the sum of all log-probabilities, or of a teacher
whose outside mass follows a law over tokens their sum by its weights.  One pass over
the logits gives all of it, one pass gives the gradient, and neither keeps a ``(tokens, V)`` tensor
besides the logits and their gradient: what plain cross entropy needs, no more.

With ``S`` the support, ``T`` the temperature, ``q = softmax(z / T)``, ``Q`` the mass of ``q``
outside ``S``, weights ``w`` (1 if not given) of sum ``W``, and upstream gradients ``g_s`` on
``log q_s``, ``h`` on ``log Q`` and ``u`` on ``sum_v w_v (log q_v - log w_v)``::

    T dz_v = q_v (-sum_s g_s - h - W u) + w_v u + (g_v        if v in S
                                                   h q_v / Q  otherwise)

Outside ``S`` this is ``(q_v / Q) c + w_v u`` with the bounded factor
``c = h + Q (-sum_s g_s - h - W u)``, which neither overflows nor cancels when ``Q`` is tiny.

Logits are compared with their maximum before a logarithm is subtracted, ``(z - max) - log sum``, and
the outside with its own maximum: so no digits are lost where logits are large, and ``Q`` does not
underflow where the student is sure.

The passes have two bodies of one signature: :mod:`sekd_fairseq.losses.support_triton` on a GPU, and
the blocks of rows below elsewhere, and wherever there are weights.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

NEG_INF = float("-inf")
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
        Sum of the log-probabilities of all tokens that the student allows (finite logits), with
        weights ``w`` the sum of ``w_v (log q_v - log w_v)``; zeros unless asked for.
    allowed : (N,) float
        How many tokens have a finite logit, with weights the sum of theirs; ``V`` unless ``with_sum``
        was asked for.
    max_log_q : (N,) float
        Log-probability of the student's best token (no gradient).
    """

    log_q: Tensor
    log_outside: Tensor
    sum_log_q: Tensor
    allowed: Tensor
    max_log_q: Tensor


class Reduced(NamedTuple):
    """What a pass over logits leaves, for the result and for the gradient.

    The first five are those of :class:`SupportLogProbs`; ``outside_top`` (N,) is the largest
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


def support_log_probs(
    logits: Tensor,
    rows: Tensor,
    ids: Tensor,
    valid: Tensor,
    with_sum: bool = False,
    temperature: float = 1.0,
    overwrite: bool = False,
    weights: Tensor | None = None,
) -> SupportLogProbs:
    """Evaluate ``log softmax(logits / temperature)`` on a support, with the exact mass outside.

    Parameters
    ----------
    logits : (M, V) float
        Student logits of any float type; arithmetic is float32 (float64 for float64 logits).
        ``-inf`` marks a forbidden token. Gradient flows here, in the logits' type.
    rows : (N,) int64
        The positions to evaluate (those that are not padding); each at most once.
    ids : (N, K) int64
        Support tokens, distinct among the valid slots of a row. Invalid slots must repeat a valid
        token of the same row.
    valid : (N, K) bool
        Which slots count. A row has at least one.
    with_sum : bool
        Whether ``sum_log_q`` and ``allowed`` are wanted.
    temperature : float
        Above 0.
    overwrite : bool
        Let the gradient take the place of the logits in memory. For a caller who made the logits and
        has no other use for them.
    weights : (V,) float, optional
        Of tokens in ``sum_log_q``, 0 or more; 1 each if not given.
    """
    outputs = _SupportLogProbs.apply(  # type: ignore[no-untyped-call]
        logits, rows, ids, valid, with_sum, temperature, overwrite, weights
    )
    return SupportLogProbs(*outputs)


def whole_log_probs(logits: Tensor, target: Tensor) -> SupportLogProbs:
    """``log softmax(logits)`` of the whole vocabulary as a support, the reference token in slot 0.

    Slot 0 and the reference's have changed places. For teachers that give every token.

    Parameters
    ----------
    logits : (N, V) float32 or float64
        Gradient flows here.
    target : (N,) int64
        Reference tokens.
    """
    log_q = reference_first(logits, target).log_softmax(dim=-1)
    allowed = log_q > NEG_INF
    return SupportLogProbs(
        log_q,
        torch.full_like(log_q[:, 0], NEG_INF),
        log_q.masked_fill(~allowed, 0.0).sum(dim=1),
        allowed.sum(dim=1).to(log_q.dtype),
        log_q.detach().amax(dim=1),
    )


def reference_first(values: Tensor, target: Tensor) -> Tensor:
    """A copy of (N, V) values in which those of the reference and of token 0 have changed places."""
    place = target.unsqueeze(1)
    reference = values.gather(1, place)
    return values.scatter(1, place, values[:, :1]).index_copy(
        1, torch.zeros(1, dtype=torch.long, device=values.device), reference
    )


def gradient_size(
    student: SupportLogProbs,
    gradients: Sequence[Tensor],
    support_weights: Tensor | None = None,
) -> Tensor:
    """L1 norm of the gradient to the softmax's input, (N,), of gradients to ``log_q``,
    ``log_outside`` and ``sum_log_q``.

    In closed form, because outside the support all entries have one sign. With a gradient to
    ``sum_log_q`` they need not: then it is that of the support alone, and
    :func:`outside_gradient_size` has the rest. ``support_weights`` (N, K) are those of the support in
    ``sum_log_q``, if it has weights.
    """
    on_log_q, on_outside, on_sum = gradients
    spread = _spread(student, gradients)
    of_sum = on_sum.unsqueeze(1)
    if support_weights is not None:
        of_sum = of_sum * support_weights
    on_support = student.log_q.exp() * spread.unsqueeze(1) + on_log_q + of_sum
    size = on_support.masked_fill(student.log_q == NEG_INF, 0.0).abs().sum(dim=1)
    outside = on_outside + student.log_outside.exp() * spread
    return size + outside.masked_fill(on_sum != 0, 0.0).abs()


def outside_gradient_size(
    student: SupportLogProbs,
    gradients: Sequence[Tensor],
    logits: Tensor,
    rows: Tensor,
    ids: Tensor,
    valid: Tensor,
    temperature: float,
    weights: Tensor | None = None,
) -> Tensor:
    """The part of :func:`gradient_size` outside the support where ``sum_log_q`` has a gradient, (N,):
    one more pass over the logits."""
    on_sum = gradients[2]
    spread = _spread(student, gradients)
    sizes = [spread[:0]]
    with torch.no_grad():
        for part in blocks_of(logits, rows):
            z = logits.index_select(0, rows[part]).to(spread.dtype) / temperature
            origin = z.gather(1, ids[part, :1])
            q = (z - origin + student.log_q[part, :1]).exp()
            of_sum = on_sum[part].unsqueeze(1)
            entry = q * spread[part].unsqueeze(1) + (
                of_sum if weights is None else of_sum * weights
            )
            entry = entry.masked_fill(z == NEG_INF, 0.0).scatter(1, ids[part], 0.0)
            sizes.append(entry.abs().sum(dim=1))
    return torch.cat(sizes)


def _spread(student: SupportLogProbs, gradients: Sequence[Tensor]) -> Tensor:
    """The factor of ``q`` in the gradient to the softmax's input, (N,)."""
    on_log_q, on_outside, on_sum = gradients
    return -(on_log_q.sum(dim=1) + on_outside + student.allowed * on_sum)


@cache
def triton_module(name: str) -> Any:
    """A module of kernels of this package; None where Triton cannot be imported."""
    return import_module(f"sekd_fairseq.losses.{name}") if find_spec("triton") else None


def kernels_for(logits: Tensor, name: str) -> Any:
    """A module of kernels where these logits are on a GPU that runs them, else None."""
    return triton_module(name) if logits.is_cuda and logits.dtype != torch.float64 else None


def body_for(logits: Tensor, weighted: bool = False) -> Any:
    """What has ``reduce`` and ``gradient`` for these logits: the kernels on a GPU, which know no
    weights, else this module's class of blocks."""
    return (None if weighted else kernels_for(logits, "support_triton")) or Blocks


def one_kernel(logits: Tensor) -> Callable[..., tuple[Tensor, dict[str, Tensor]]] | None:
    """:func:`~sekd_fairseq.losses.token_loss_triton.token_loss` where it can run, else None."""
    module = kernels_for(logits, "token_loss_triton")
    return None if module is None else module.token_loss


class Blocks:
    """The passes in torch, a block of rows at a time."""

    @staticmethod
    def reduce(
        logits: Tensor,
        rows: Tensor,
        ids: Tensor,
        valid: Tensor,
        with_sum: bool,
        temperature: float,
        weights: Tensor | None = None,
    ) -> Reduced:
        """Arguments of :func:`support_log_probs`."""
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

    @staticmethod
    def gradient(
        logits: Tensor,
        rows: Tensor,
        ids: Tensor,
        valid: Tensor,
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
                valid[part],
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
    valid: Tensor,
    reduced: Reduced,
    grad_log_q: Tensor,
    grad_outside: Tensor,
    grad_sum: Tensor | None,
    weights: Tensor | None = None,
) -> Tensor:
    """Turn a scratch copy of logits into the gradient with respect to them (module docstring)."""
    log_q, log_outside, _, allowed, _, outside_top, outside_log_sum = reduced
    forbidden = None
    if grad_sum is not None and (
        scratch.is_cuda
        or weights is not None
        or bool((allowed < scratch.size(1)).any())  # rare, so looked for first
    ):
        forbidden = scratch.isinf()
    grad_log_q = grad_log_q.masked_fill(~valid, 0.0)
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
    scratch.scatter_add_(1, ids, on_support.masked_fill(~valid, 0.0))
    if grad_sum is not None:
        if weights is None:
            scratch.add_(grad_sum.unsqueeze(1))
        else:
            scratch.addr_(grad_sum, weights.to(scratch))
        if forbidden is not None:
            scratch.masked_fill_(forbidden, 0.0)
    return scratch


class _SupportLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        rows: Tensor,
        ids: Tensor,
        valid: Tensor,
        with_sum: bool,
        temperature: float,
        overwrite: bool,
        weights: Tensor | None,
    ) -> tuple[Tensor, ...]:
        logits = logits.contiguous()
        body = body_for(logits, weighted=weights is not None)
        options = {} if weights is None else {"weights": weights}
        reduced = body.reduce(logits, rows, ids, valid, with_sum, temperature, **options)
        ctx.save_for_backward(logits, weights, rows, ids, valid, *reduced)
        ctx.options = (with_sum, temperature, overwrite)
        ctx.mark_non_differentiable(reduced.allowed, reduced.max_log_q)
        ctx.set_materialize_grads(True)
        return tuple(reduced[:5])

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(
        ctx: Any, grad_log_q: Tensor, grad_outside: Tensor, grad_sum: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        logits, weights, rows, ids, valid, *columns = ctx.saved_tensors
        with_sum, temperature, overwrite = ctx.options
        gradient = body_for(logits, weighted=weights is not None).gradient(
            logits,
            rows,
            ids,
            valid,
            Reduced(*columns),
            grad_log_q,
            grad_outside,
            grad_sum if with_sum else None,
            temperature,
            overwrite,
            **({} if weights is None else {"weights": weights}),
        )
        return gradient, None, None, None, None, None, None, None
