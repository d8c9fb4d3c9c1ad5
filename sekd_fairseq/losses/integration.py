r"""Self-evolution: what a token's loss compares, once its ratio of prior knowledge is known.

The paper's abstract says that the teacher distribution and the one-hot reference are integrated, as
prior knowledge, into the student's distribution, and no more, so each reading is a function here, of
the same arguments:

``distance(a, b)``
    The divergence ``D(a || b)`` of each token from the log-probabilities of both, (N,) nats.
``events``
    ``p`` and ``q`` over the events of :mod:`sekd_fairseq.losses.events`, event 0 the reference ``y``.
``log_prior`` : (N, E)
    ``log r``, ``r = beta p + (1 - beta) y``.
``ratio`` : (N, 1), or None where it is zero at all tokens
    ``lambda``, without gradient; zero at easy tokens.

Each returns the token losses, (N,) nats.  Gradients are said for the forward KL, with respect to the
student's logits; ``q~ = (1 - lambda) q + lambda r``.
"""

from collections.abc import Callable

from torch import Tensor

from sekd_fairseq.losses.divergences import log_mix
from sekd_fairseq.losses.events import SPREAD, Events

Distance = Callable[[Tensor, Tensor], Tensor]


def blend(distance: Distance, events: Events, log_prior: Tensor, ratio: Tensor | None) -> Tensor:
    """``D(r || q~)``, so ``D(r || q)`` at easy tokens.

    *Optimum*: ``q = r``, whatever the ratio, for every divergence. The reference is in ``r``, so
    that the cross entropy is not needed beside it (``alpha = 1``).
    *Gradient* at a hard token: ``-(1 - lambda) q_j (w_j - sum_v w_v q_v)``, ``w = r / q~``: small
    while the student gives ``r``'s tokens almost nothing, since ``w <= 1 / lambda``. At an easy one
    ``q - r = beta (q - p) + (1 - beta) (q - y)``: word-level KD with ``alpha = beta``.
    *Source*: ours, nearest to public summaries of Song et al. (2025): hard tokens by a KL divergence
    between a blend of reference and teacher and the student, and for these a proxy distribution.
    """
    return distance(log_prior, _toward_prior(events.log_q, log_prior, ratio))


def evolved(distance: Distance, events: Events, log_prior: Tensor, ratio: Tensor | None) -> Tensor:
    """``D(p || q) + D(sg[q~] || q)``, ``sg`` without gradient: word-level KD, which easy tokens learn
    from alone, and beside it the student's own prediction, evolved towards the prior, as a target.

    *Optimum* of the second term: ``q = r``; of both: ``q = (p + lambda r) / (1 + lambda)``.
    *Gradient* at a hard token: ``lambda (q - r)`` more than the ``q - p`` of word-level KD, that of
    ``KL(p || q) + lambda KL(r || q)``. So it is ``1 + lambda`` times that of :func:`target` at the
    ratio ``lambda / (1 + lambda)``: word-level KD in which hard tokens weigh more.
    *Truncated teachers*: with ``bucket`` the value is a lower bound of that over the vocabulary, exact
    for a whole one; the gradient is exact on the support, and outside of it has the right sum, spread
    as the student spreads its mass there.
    *Source*: ours, the authors' self-evolution learning for pretraining (Zhong et al., 2023: a detached
    mix of the model's own prediction and the one-hot as target of hard tokens) with a teacher in it.
    """
    base = distance(events.log_p, events.log_q)
    if ratio is None:
        return base
    evolved_q = log_mix(events.log_q.detach(), log_prior, ratio)
    return base + distance(evolved_q, events.log_q)


def student(distance: Distance, events: Events, log_prior: Tensor, ratio: Tensor | None) -> Tensor:
    """``D(p || q~)``.

    *Optimum*: ``q = p + lambda / (1 - lambda) (1 - beta) (p - y)``, where that is a distribution:
    biased, below the teacher on the reference.
    *Gradient* at a hard token: ``-(1 - lambda) q_j (w_j - sum_v w_v q_v)``, ``w = p / q~``: almost
    none at a token that the student gives almost nothing.
    *Source*: ours, the abstract's words taken literally. With ``beta = 1`` and a constant ratio it is
    the skew KL of DistiLLM (Ko et al., 2024).
    """
    return distance(events.log_p, _toward_prior(events.log_q, log_prior, ratio))


def target(distance: Distance, events: Events, log_prior: Tensor, ratio: Tensor | None) -> Tensor:
    """``D((1 - lambda) p + lambda r || q)``.

    *Optimum*: ``q = (1 - lambda) p + lambda r``.
    *Gradient* at a hard token: the full ``q - (1 - lambda) p - lambda r``. As that equals
    ``(1 - lambda (1 - beta)) (q - p) + lambda (1 - beta) (q - y)``, the forward KL with weight
    ``alpha`` beside the cross entropy **is** word-level KD with a weight a token,
    ``alpha_i = alpha (1 - lambda_i (1 - beta_i))``, up to a constant.
    *Source*: ours.
    """
    return distance(_toward_prior(events.log_p, log_prior, ratio), events.log_q)


def _toward_prior(log_a: Tensor, log_prior: Tensor, ratio: Tensor | None) -> Tensor:
    return log_a if ratio is None else log_mix(log_a, log_prior, ratio)


#: The readings by their command-line name.
READINGS: dict[str, Callable[[Distance, Events, Tensor, Tensor | None], Tensor]] = {
    "blend": blend,
    "evolved": evolved,
    "student": student,
    "target": target,
}


def check_integration(integration: str, divergence: str, missing_mass: str) -> None:
    """Refuse a reading, with ratios above zero, that has no meaning with the divergence or with what
    is done with the missing mass (``ValueError``)."""
    if integration == "evolved" and divergence == "tvd":
        raise ValueError(
            "integration 'evolved' expects a divergence whose gradient grows with the ratio; found "
            "'tvd', whose gradient is as large for every ratio above zero. Use another divergence"
        )
    if integration == "evolved" and missing_mass in (*SPREAD, "sampled"):
        raise ValueError(
            "integration 'evolved' has the student's own distribution as a target, which a "
            f"teacher's support cannot stand in for outside of it; found missing_mass {missing_mass!r}"
            ". Use missing_mass 'bucket' with a top-k or top-p cache"
        )
