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
:mod:`sekd_fairseq.losses.support_torch` elsewhere, and wherever there are weights.
"""

import logging
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sekd_fairseq.losses import support_torch
from sekd_fairseq.losses.divergences import NEG_INF
from sekd_fairseq.losses.support_torch import Reduced, blocks_of

logger = logging.getLogger(__name__)

#: The widest support that the kernels take. They hold all of it, some twenty numbers a slot, in the
#: registers of 128 threads; a whole vocabulary (``build_cache --top-k 0``) would not fit.
MOST_SLOTS = 1024


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
    """A module of kernels of this package; None where Triton does not run."""
    return import_module(f"sekd_fairseq.losses.{name}") if triton_runs() else None


@cache
def triton_runs() -> bool:
    """Whether Triton is there and runs kernels; where it fails to, that is told."""
    if not find_spec("triton"):
        return False
    triton = import_module("triton")
    if triton.knobs.runtime.interpret:
        return True
    try:
        # Compiles C that launches kernels, as the first of them would.
        _ = triton.runtime.driver.active.utils
    except Exception as error:
        logger.warning(
            "Triton cannot compile its launcher (%r): losses run in torch, slower, with the same numbers "
            "to rounding; it needs a C compiler (gcc) and Python's headers (python3-dev)",
            error,
        )
        return False
    return True


def kernels_for(logits: Tensor, ids: Tensor, name: str) -> Any:
    """A module of kernels where these logits are on a GPU that runs them, with such a support, else
    None."""
    fits = logits.is_cuda and logits.dtype != torch.float64 and ids.size(1) <= MOST_SLOTS
    return triton_module(name) if fits else None


def body_for(logits: Tensor, ids: Tensor, weighted: bool = False) -> Any:
    """What has ``reduce`` and ``gradient`` for these logits: the kernels on a GPU, which know no
    weights, else torch."""
    return (None if weighted else kernels_for(logits, ids, "support_triton")) or support_torch


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
        body = body_for(logits, ids, weighted=weights is not None)
        options = {} if weights is None else {"weights": weights}
        with torch.autocast(logits.device.type, enabled=False):  # products with weights
            reduced = body.reduce(logits, rows, ids, valid, with_sum, temperature, **options)
        ctx.save_for_backward(logits, weights, rows, ids, *reduced)
        ctx.options = (with_sum, temperature, overwrite)
        ctx.mark_non_differentiable(reduced.allowed, reduced.max_log_q)
        ctx.set_materialize_grads(True)
        return tuple(reduced[:5])

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(
        ctx: Any, grad_log_q: Tensor, grad_outside: Tensor, grad_sum: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        logits, weights, rows, ids, *columns = ctx.saved_tensors
        with_sum, temperature, overwrite = ctx.options
        gradient = body_for(logits, ids, weighted=weights is not None).gradient(
            logits,
            rows,
            ids,
            Reduced(*columns),
            grad_log_q,
            grad_outside,
            grad_sum if with_sum else None,
            temperature,
            overwrite,
            **({} if weights is None else {"weights": weights}),
        )
        return gradient, None, None, None, None, None, None, None
