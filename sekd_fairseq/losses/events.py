r"""Teacher and student over the same few events: what is done with the mass a cache left out.

A truncated teacher knows ``p`` on a support ``S`` (the reference token always in it) and the mass
``rho`` outside.  ``missing_mass`` names how the loss treats ``rho``:

``bucket``
    Everything outside ``S`` is one event on both sides.  By the data-processing inequality every
    f-divergence is then a lower bound of the full one, exact for ``S = V`` and zero at ``p = q``.
``uniform``
    ``rho`` is spread evenly over the tokens outside ``S`` that the student allows.  Right for a
    label-smoothed teacher.  Only for losses that are linear in ``log q`` outside ``S``.
``tail``
    ``rho`` is spread over the same tokens in proportion to one weight per token of the vocabulary, the
    teacher's *tail law* (:attr:`TeacherTokens.tail`); ``uniform`` is that with equal weights.  Right
    for a teacher whose unlikely tokens are likely elsewhere.  For the same losses.
``renormalize``
    Both sides are restricted to ``S`` and normalised there.  Biased: the student's mass outside
    is free.  Here for comparison with toolkits that do so.
``sampled``
    ``S`` was drawn from the teacher; stored importance weights make the forward KL and its
    gradient unbiased estimates.  The reference token is not sampled but exact.  Whatever else is
    taken from the same draws and multiplied with the loss, such as a ratio that follows the
    difficulty, would make it biased.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sekd_fairseq.losses.divergences import LINEAR, NEG_INF
from sekd_fairseq.losses.support import SupportLogProbs
from sekd_fairseq.losses.support_torch import weighted_support

MISSING_MASS = ("bucket", "uniform", "tail", "renormalize", "sampled")
#: Those that spread the mass over tokens, by a loss that is linear in their log-probabilities.
SPREAD = ("uniform", "tail")


@dataclass(frozen=True)
class TeacherTokens:
    """The teacher at ``N`` target tokens, on ``K`` slots; slot 0 is the reference token.

    Attributes
    ----------
    ids : (N, K) int64
        Support tokens, distinct among valid slots; ``ids[:, 0]`` is the reference token. Invalid
        slots repeat it.
    valid : (N, K) bool
        Which slots count.
    log_p : (N, K) float
        The teacher's log-probabilities, any float type.
    log_outside : (N,) float
        Log of the teacher's mass outside the support; ``-inf`` if none.
    log_weight : (N, K) float, optional
        Log of the importance weight ``count / samples`` of a sampled support, which stands in for
        ``p`` in sums. Column 0 is ignored: the reference token is exact.
    tail : (V,) float, optional
        The weight of each token of the vocabulary outside a support, above 0; the same for all tokens.
    temperature : float
        The softmax temperature that all of this is at.
    difficulty : (N,) float, optional
        Of each token in nats, from a stored pass.
    """

    ids: Tensor
    valid: Tensor
    log_p: Tensor
    log_outside: Tensor
    log_weight: Tensor | None = None
    tail: Tensor | None = None
    temperature: float = 1.0
    difficulty: Tensor | None = None

    def __getitem__(self, part: slice | Tensor) -> "TeacherTokens":
        """Some of these tokens, by slice, index or mask."""
        log_weight = None if self.log_weight is None else self.log_weight[part]
        difficulty = None if self.difficulty is None else self.difficulty[part]
        return TeacherTokens(
            self.ids[part],
            self.valid[part],
            self.log_p[part],
            self.log_outside[part],
            log_weight,
            self.tail,
            self.temperature,
            difficulty,
        )

    @classmethod
    def whole(cls, log_p: Tensor, target: Tensor) -> "TeacherTokens":
        """The full distribution, whose reference stands first (``reference_first``).

        ``ids`` has the reference alone: what compares all tokens needs no others.
        """
        return cls(
            ids=target.unsqueeze(1),
            valid=torch.ones(1, 1, dtype=torch.bool, device=log_p.device),
            log_p=log_p,
            log_outside=log_p.new_full((log_p.size(0),), NEG_INF),
        )

    @property
    def is_whole(self) -> bool:
        """Whether these are all tokens of the vocabulary, in the order of :meth:`whole`."""
        return self.ids.size(1) < self.log_p.size(1)

    @classmethod
    def from_dense(cls, log_p: Tensor, target: Tensor) -> "TeacherTokens":
        """The full distribution, ``k = V``, with the reference token moved to slot 0.

        Parameters
        ----------
        log_p : (N, V) float
        target : (N,) int64
        """
        ids = torch.arange(log_p.size(1), device=log_p.device).repeat(log_p.size(0), 1)
        ids.scatter_(1, target.unsqueeze(1), 0)  # swap the reference with token 0
        ids[:, 0] = target
        return cls(
            ids=ids,
            valid=torch.ones_like(ids, dtype=torch.bool),
            log_p=log_p.gather(1, ids),
            log_outside=log_p.new_full((log_p.size(0),), NEG_INF),
        )

    @classmethod
    def from_top_k(cls, log_p: Tensor, target: Tensor, k: int) -> "TeacherTokens":
        """The reference token and the ``k - 1`` best others of a full distribution.

        The mass outside is summed over the tokens outside, not taken as one minus the rest.
        """
        rest = log_p.scatter(1, target.unsqueeze(1), NEG_INF)
        best = rest.topk(min(k - 1, log_p.size(1) - 1), dim=1)
        ids = torch.cat([target.unsqueeze(1), best.indices], dim=1)
        outside = rest.scatter(1, best.indices, NEG_INF)
        return cls(
            ids=ids,
            valid=torch.ones_like(ids, dtype=torch.bool),
            log_p=log_p.gather(1, ids),
            log_outside=log_sum_exp(outside),
        )


class Events(NamedTuple):
    """Both sides over the same events; event 0 is the reference token.

    Attributes
    ----------
    log_p, log_q : (N, E) float
        The teacher's (no gradient) and the student's log-probabilities, ``-inf`` for zero.
    log_multiplicity : (N, E) float or None
        See :mod:`sekd_fairseq.losses.divergences`.
    """

    log_p: Tensor
    log_q: Tensor
    log_multiplicity: Tensor | None


def log_sum_exp(x: Tensor) -> Tensor:
    """``logsumexp`` over the last dimension whose gradient is zero, not NaN, on a row of -inf."""
    empty = (x == NEG_INF).all(dim=-1)
    return torch.logsumexp(x.masked_fill(empty.unsqueeze(-1), 0.0), dim=-1).masked_fill(
        empty, NEG_INF
    )


def log_normalize(x: Tensor) -> Tensor:
    """Subtract the log of the row sum; a row of zeros (all ``-inf``) stays as it is."""
    total = log_sum_exp(x)
    return x - total.masked_fill(total == NEG_INF, 0.0).unsqueeze(-1)


def build_events(teacher: TeacherTokens, student: SupportLogProbs, missing_mass: str) -> Events:
    """Bring teacher and student at the same tokens to common events.

    Stored teacher values are rounded (float16 leaves a sum of 1 ± 1e-3), so the teacher's events
    are normalised here; without that ``KL(p || p)`` would not be zero. ``sampled`` supports do not
    sum to one and are taken as they are.
    """
    dtype = student.log_q.dtype
    if teacher.is_whole:  # no mass is missing
        return Events(teacher.log_p.to(dtype), student.log_q, None)
    log_p = teacher.log_p.to(dtype).masked_fill(~teacher.valid, NEG_INF)
    log_outside = teacher.log_outside.to(dtype).unsqueeze(1)
    log_q = student.log_q
    if missing_mass == "bucket":
        return Events(
            log_normalize(torch.cat([log_p, log_outside], dim=1)),
            torch.cat([log_q, student.log_outside.unsqueeze(1)], dim=1),
            None,
        )
    if missing_mass == "renormalize":
        return Events(log_normalize(log_p), log_normalize(log_q), None)
    if missing_mass == "uniform":
        return _spread_events(
            log_p, log_outside, student, *weighted_support(log_q, teacher.ids, None)
        )
    if missing_mass == "tail":
        if teacher.tail is None:
            raise ValueError(
                "missing_mass='tail' expects a teacher with a tail law, this one has none: give its "
                "weights (tail=), or choose another missing_mass"
            )
        weighted = weighted_support(log_q, teacher.ids, teacher.tail)
        return _spread_events(log_p, log_outside, student, *weighted)
    if missing_mass == "sampled":
        if teacher.log_weight is None:
            raise ValueError(
                "missing_mass='sampled' expects importance weights, this teacher has none: "
                "build the cache with --sample N, or choose another missing_mass"
            )
        log_weight = teacher.log_weight.to(dtype).masked_fill(~teacher.valid, NEG_INF)
        ratio = (log_weight - log_p.masked_fill(~teacher.valid, 0.0)).index_fill(
            1, torch.zeros(1, dtype=torch.long, device=log_p.device), 0.0
        )
        return Events(log_p, log_q, ratio)
    raise ValueError(f"missing_mass is one of {', '.join(MISSING_MASS)}; found {missing_mass!r}")


def _spread_events(
    log_p: Tensor, log_outside: Tensor, student: SupportLogProbs, weight: Tensor, relative: Tensor
) -> Events:
    """One more event that stands for the outside tokens ``v``, each with ``rho w_v / W``.

    ``weight`` and ``relative`` (N, K) are ``w`` and ``w (log q - log w)`` on the support. With ``W``
    the weight outside, the event has ``log p = log rho - log W``, ``W`` times, and as ``log q`` the
    mean of ``log q - log w`` by ``w``: the divergence is linear in the student's log-probabilities
    outside, so this is the sum over all of them. ``W`` below a millionth of all weight is no number
    any more, and what mass is there is left out.
    """
    outside = (student.allowed - weight.sum(dim=1)).unsqueeze(1)  # W, (N, 1)
    none = outside <= 1e-6 * student.allowed.unsqueeze(1)
    outside = outside.masked_fill(none, 1.0)
    mean = (student.sum_log_q - relative.sum(dim=1)).unsqueeze(1) / outside
    log_all = log_normalize(torch.cat([log_p, log_outside.masked_fill(none, NEG_INF)], dim=1))
    multiplicity = torch.cat([torch.zeros_like(log_p), outside.log()], dim=1)
    log_q = torch.cat([student.log_q, mean.masked_fill(none, NEG_INF)], dim=1)
    return Events(log_all - multiplicity, log_q, multiplicity)


def check_missing_mass(missing_mass: str, divergence: str, mixes_student: bool) -> None:
    """Refuse a combination that has no meaning.

    ``mixes_student`` says whether the student is mixed with anything inside the logarithm (the
    ``student`` integration, a skew): then the loss is not linear in ``log q``.
    """
    if missing_mass not in MISSING_MASS:
        raise ValueError(
            f"missing_mass is one of {', '.join(MISSING_MASS)}; found {missing_mass!r}"
        )
    if missing_mass in SPREAD and (divergence != "forward_kl" or mixes_student):
        raise ValueError(
            f"missing_mass={missing_mass!r} needs a loss that is linear in the student's log-probabilities"
            f" outside the support; found divergence {divergence!r}"
            + (" with the student mixed inside the logarithm" if mixes_student else "")
            + ". Use divergence 'forward_kl' with integration 'target' (or lambda_max 0), or"
            " missing_mass 'bucket'"
        )
    if missing_mass == "sampled" and divergence not in LINEAR:
        raise ValueError(
            f"missing_mass='sampled' cannot estimate divergence {divergence!r}, which needs the"
            " teacher at tokens that were not sampled. Use 'forward_kl' or 'skew_forward_kl', or a"
            " top-k or top-p cache with missing_mass 'bucket'"
        )
