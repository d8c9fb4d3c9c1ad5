"""Divergences between two distributions over the same few events.

Every function takes log-probabilities ``log_p`` (teacher) and ``log_q`` (student) of shape
``(N, E)``: ``N`` tokens, ``E`` events that sum to one on both sides; ``-inf`` is a probability of
zero.  They return one value a token, ``(N,)``, in nats.  Conventions: ``0 log 0 = 0`` and
``0 log (0 / 0) = 0``; mass where the other side has none gives ``+inf``, never NaN.  Gradient flows
through both arguments, as autograd follows them; callers detach the teacher.

``log_multiplicity`` (same shape, or None for all zero) says how many equal tokens an event stands
for, or the importance weight of a sampled one: a sum over events weighs each by
``exp(log_multiplicity)``.  Only divergences that are linear in ``log q`` take it.

Where both sides are nearly equal, rounding can leave a sum at about -1e-7; that value is returned
as zero and its gradient is left as it is.  Nothing else is clamped.
"""

from collections.abc import Callable

import torch
from torch import Tensor

NEG_INF = float("-inf")


def in_float32(value: float) -> float:
    """A setting as the losses compute with it: what is just below 1 may be 1 there."""
    return torch.tensor(value, dtype=torch.float32).item()


def log_mix(log_a: Tensor, log_b: Tensor, weight: float | Tensor) -> Tensor:
    """``log((1 - weight) a + weight b)``, the mixture of probabilities (not of their logs).

    ``weight`` lies in [0, 1] and broadcasts against the arguments. Where both terms are zero the
    result is ``-inf`` and its gradient zero (``logaddexp`` alone would give NaN).
    """
    weight = like(weight, log_a)
    first = log_a + torch.log1p(-weight)
    second = log_b + torch.log(weight)
    dead = (first == NEG_INF) & (second == NEG_INF)
    mixed = torch.logaddexp(first.masked_fill(dead, 0.0), second.masked_fill(dead, 0.0))
    return mixed.masked_fill(dead, NEG_INF)


def like(value: float | Tensor, other: Tensor) -> Tensor:
    """A value with the type and on the device of ``other``; a number without a copy from the host,
    which would make a GPU wait."""
    return value.to(other) if isinstance(value, Tensor) else other.new_full((), value)


def forget_rounding(value: Tensor) -> Tensor:
    """Replace a negative value, which only rounding can cause, by zero; keep the gradient."""
    return value + (-value).clamp_min(0.0).detach()


def relative_entropy(log_a: Tensor, log_b: Tensor, log_multiplicity: Tensor | None) -> Tensor:
    """``sum_e m_e a_e (log a_e - log b_e)`` over the last dimension, with the conventions above."""
    weight = (log_a if log_multiplicity is None else log_a + log_multiplicity).exp()
    active = weight > 0  # and not log a > -inf: exp may underflow to zero, and 0 * inf is NaN
    difference = log_a.masked_fill(~active, 0.0) - log_b.masked_fill(~active, 0.0)
    # Where a is not zero but b is, the difference is +inf and so is the sum.
    return (weight * difference).sum(dim=-1)


def forward_kl(log_p: Tensor, log_q: Tensor, log_multiplicity: Tensor | None = None) -> Tensor:
    """``KL(p || q) = sum p (log p - log q)``: word-level KD of Kim and Rush (2016).

    With sampled events the value is an unbiased estimate that may be negative, so it is left as
    it is; else rounding below zero is forgotten (module docstring).
    """
    value = relative_entropy(log_p, log_q, log_multiplicity)
    return value if log_multiplicity is not None else forget_rounding(value)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(q || p)``, mode-seeking; used for LLMs by MiniLLM (Gu et al., 2024), token by token."""
    return forget_rounding(relative_entropy(log_q, log_p, None))


def jsd(log_p: Tensor, log_q: Tensor, weight: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence of GKD (Agarwal et al., 2024).

    ``w KL(p || m) + (1 - w) KL(q || m)`` with ``m = w p + (1 - w) q`` and ``0 < w < 1``. It lies
    in ``[0, log 2]`` and is symmetric for ``w = 1/2``; divided by ``w`` it tends to KL(p || q) for
    ``w -> 0``.
    """
    log_m = log_mix(log_q, log_p, weight)
    value = weight * relative_entropy(log_p, log_m, None)
    return forget_rounding(value + (1.0 - weight) * relative_entropy(log_q, log_m, None))


def skew_forward_kl(
    log_p: Tensor, log_q: Tensor, weight: float = 0.1, log_multiplicity: Tensor | None = None
) -> Tensor:
    """``KL(p || (1 - w) q + w p)``, skew KL of DistiLLM (Ko et al., 2024); their alpha is ``w``."""
    return forward_kl(log_p, log_mix(log_q, log_p, weight), log_multiplicity)


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, weight: float = 0.1) -> Tensor:
    """``KL(q || (1 - w) p + w q)``, skew reverse KL of DistiLLM (Ko et al., 2024)."""
    return forget_rounding(relative_entropy(log_q, log_mix(log_p, log_q, weight), None))


def tvd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Total variation distance ``1/2 sum |p - q|``, in [0, 1]; used by f-DISTILL (Wen et al., 2023)."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(dim=-1)


def adaptive_kl(log_p: Tensor, log_q: Tensor, head_mass: float = 0.5) -> Tensor:
    """Adaptive KL of Wu et al. (2024), *Rethinking Kullback-Leibler Divergence in KD for LLMs*.

    ``g_h / (g_h + g_t) KL(p || q) + g_t / (g_h + g_t) KL(q || p)``, where ``g_h`` and ``g_t`` are
    ``sum |p - q|`` over the head (the teacher's most probable events, as few as reach
    ``head_mass``) and over the tail. The weights carry no gradient; both gaps zero gives zero.
    On a truncated teacher the mass outside the support is one event and belongs to the tail unless
    it is among the most probable. Differs from the authors' code in that: they see all tokens.
    """
    with torch.no_grad():
        p = log_p.exp()
        ordered, order = p.sort(dim=-1, descending=True)
        # An event is in the head if the mass before it has not reached head_mass yet.
        in_head_sorted = ordered.cumsum(dim=-1) - ordered < head_mass
        in_head = torch.zeros_like(in_head_sorted).scatter(-1, order, in_head_sorted)
        gap = (p - log_q.exp()).abs()
        head = gap.masked_fill(~in_head, 0.0).sum(dim=-1)
        total = gap.sum(dim=-1)
        share = torch.where(total > 0, head / total.clamp_min(torch.finfo(gap.dtype).tiny), 0.5)
    terms = ((share, forward_kl(log_p, log_q)), (1.0 - share, reverse_kl(log_p, log_q)))
    # A share of zero drops its term, even an infinite one.
    first, second = (part * value.masked_fill(part == 0, 0.0) for part, value in terms)
    return first + second


#: Divergences by their command-line name; each is called as ``f(log_p, log_q)``, those in
#: :data:`WEIGHTED` also with ``weight=``, those in :data:`LINEAR` also with ``log_multiplicity=``.
DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "adaptive_kl": adaptive_kl,
}
WEIGHTED = frozenset({"jsd", "skew_forward_kl", "skew_reverse_kl"})
LINEAR = frozenset({"forward_kl", "skew_forward_kl"})


def divergence(
    name: str, log_p: Tensor, log_q: Tensor, log_multiplicity: Tensor | None, weight: float
) -> Tensor:
    """The divergence of that name, (N,) nats, given the arguments that it takes."""
    options: dict[str, object] = {}
    if name in WEIGHTED:
        options["weight"] = weight
    if name in LINEAR:
        options["log_multiplicity"] = log_multiplicity
    return DIVERGENCES[name](log_p, log_q, **options)
