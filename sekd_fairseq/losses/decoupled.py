"""KL divergence in the two parts of decoupled KD, and the loss of adaptive teaching made of them."""

import torch
from torch import Tensor

from sekd_fairseq.losses.divergences import forward_kl
from sekd_fairseq.losses.events import log_normalize, log_sum_exp
from sekd_fairseq.losses.selective import batch_quantile

EASY_WEIGHT, HARD_WEIGHT = 0.2, 0.8


def decoupled_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Target-class and non-target-class KL of decoupled KD (Zhao et al., 2022), TCKD and NCKD.

    TCKD is the KL of the two-event distributions (reference, everything else), NCKD that of the
    distributions over everything else, each side divided by its own mass there; event 0 is the
    reference. ``KL(p || q) = TCKD + (1 - p_y) NCKD``. Shapes (N, E) to (N,), nats.
    """
    binary_p, binary_q = (
        torch.stack([side[:, 0], log_sum_exp(side[:, 1:])], dim=1) for side in (log_p, log_q)
    )
    others = forward_kl(log_normalize(log_p[:, 1:]), log_normalize(log_q[:, 1:]))
    return forward_kl(binary_p, binary_q), others


def adaptive_teaching(log_p: Tensor, log_q: Tensor) -> Tensor:
    """ATKD (Zhong et al., 2024): 0.2 NCKD at easy tokens, 0.8 (TCKD + NCKD) at hard ones, (N,) nats.

    A token is hard where the teacher is unsure of the reference: ``1 - p_y`` at or above the median
    of these tokens, which should be a whole batch. NCKD here has no factor ``1 - p_y``. Summed over
    tokens like every loss here.
    """
    unsure = 1.0 - log_p[:, 0].exp()
    hard = unsure >= batch_quantile(unsure, 0.5)
    target_part, others = decoupled_kl(log_p, log_q)
    return torch.where(hard, HARD_WEIGHT * (target_part + others), EASY_WEIGHT * others)
