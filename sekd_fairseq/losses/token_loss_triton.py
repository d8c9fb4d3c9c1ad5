"""The whole loss of a token in one Triton kernel, and its gradient in another.

For the losses that are trained most: the forward KL of a cached teacher at temperature 1, the mass
outside its support as one event (``bucket``), with every reading, difficulty and schedule of SE-KD, and
cross entropy, label-smoothed or not.  What is computed is defined elsewhere, in
:mod:`~sekd_fairseq.losses.events`, :mod:`~sekd_fairseq.losses.self_evolution` and
:mod:`~sekd_fairseq.losses.integration`; this is their arithmetic at one position, where a row of
logits has just been reduced.  In torch it takes some two hundred kernels of a few microseconds, and
with the time that a host needs to start each, more than reading the logits.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sekd_fairseq.losses.cross_entropy import cross_entropy_weights
from sekd_fairseq.losses.events import TeacherTokens
from sekd_fairseq.losses.self_evolution import SCHEDULES, SelfEvolution
from sekd_fairseq.losses.support_torch import Reduced
from sekd_fairseq.losses.support_triton import (
    WARPS,
    block_of,
    gradient,
    log_softmax,
    scan,
    sum_of_logs,
)

#: What the kernel sums over tokens, beside the loss.
SUMS = (
    "nll_loss",
    "agree",
    "hard",
    "difficulty",
    "hard_lambda",
    "kl_easy",
    "kl_hard",
    "easy_gradient",
    "hard_gradient",
)
READINGS = ("target", "student", "blend", "evolved")
MEASURES = ("teacher", "prior", "nll", "stored")


@triton.jit
def _log_add(a, b):
    top = tl.maximum(a, b)
    safe = tl.where(top == -float("inf"), 0.0, top)
    return safe + tl.log(tl.exp(a - safe) + tl.exp(b - safe))


@triton.jit
def _relative_entropy(log_a, log_a_outside, log_b, log_b_outside):
    a = tl.exp(log_a)
    a_outside = tl.exp(log_a_outside)
    inside = tl.sum(tl.where(a > 0, a * (log_a - log_b), 0.0), 0)
    return inside + tl.where(a_outside > 0, a_outside * (log_a_outside - log_b_outside), 0.0)


@triton.jit
def _token_loss(
    logits,
    rows,
    ids,
    valid,
    teacher_log_p,
    teacher_log_outside,
    stored,
    on_slots,
    columns,
    sums,
    vocabulary,
    slots,
    positions,
    alpha,
    on_nll,
    on_sum,
    gamma,
    lambda_max,
    beta,
    scale,
    reading: tl.constexpr,
    measure: tl.constexpr,
    schedule: tl.constexpr,
    confidence: tl.constexpr,
    mixes: tl.constexpr,
    with_sum: tl.constexpr,
    slot_block: tl.constexpr,
    block: tl.constexpr,
):
    position = tl.program_id(0)
    row = logits + tl.load(rows + position).to(tl.int64) * vocabulary
    slot = tl.arange(0, slot_block)
    used = slot < slots
    used = used & (tl.load(valid + position * slots + slot, mask=used, other=0) != 0)
    token = tl.load(ids + position * slots + slot, mask=used, other=0)
    z, top, log_sum, distance, finite = scan(
        row, token, used, vocabulary, 1.0, with_sum, slot_block, block
    )
    q, q_outside, max_log_q = log_softmax(z, top, log_sum)  # logarithms, as all below

    # The teacher's events; stored values are rounded, so they are normalised.
    p = tl.load(teacher_log_p + position * slots + slot, mask=used, other=-float("inf"))
    best = tl.argmax(p, 0)
    agree = tl.max(tl.where(slot == best, q, -float("inf")), 0) >= max_log_q
    p_outside = tl.load(teacher_log_outside + position)
    p_top = tl.maximum(tl.max(p, 0), p_outside)
    p_sum = tl.log(tl.sum(tl.exp(p - p_top), 0) + tl.exp(p_outside - p_top))
    p = (p - p_top) - p_sum
    p_outside = (p_outside - p_top) - p_sum

    # The prior, r = beta p + (1 - beta) y.
    share = beta
    if confidence:
        share = tl.minimum(tl.sum(tl.where(slot == 0, tl.exp(p), 0.0), 0), 1.0)
    log_share = tl.log(share)
    r = log_share + p
    r = tl.where(slot == 0, _log_add(tl.log(1.0 - share), r), r)
    r_outside = log_share + p_outside

    nll = -tl.sum(tl.where(slot == 0, q, 0.0), 0)
    kl = _relative_entropy(p, p_outside, q, q_outside)
    if measure == 0:
        difficulty = kl
    elif measure == 1:
        difficulty = _relative_entropy(r, r_outside, q, q_outside)
    elif measure == 2:
        difficulty = nll
    else:
        difficulty = tl.load(stored + position).to(tl.float32)
    if measure != 3:
        difficulty = tl.maximum(difficulty, 0.0)
    excess = difficulty - gamma
    hard = excess > 0
    if schedule == 0:
        ratio = tl.where(hard, lambda_max, 0.0)
    elif schedule == 1:
        ratio = lambda_max * tl.minimum(tl.maximum(excess / scale, 0.0), 1.0)
    else:
        ratio = lambda_max * (1.0 - tl.exp(-tl.maximum(excess, 0.0) / scale))

    # The reading: its value, and its gradient to log q and log Q.
    keep = tl.log(1.0 - ratio)
    mix = tl.log(ratio)
    if reading == 0:  # KL((1 - l) p + l r || q)
        t, t_outside = p, p_outside
        if mixes:
            t = _log_add(keep + p, mix + r)
            t_outside = _log_add(keep + p_outside, mix + r_outside)
        value = tl.maximum(_relative_entropy(t, t_outside, q, q_outside), 0.0)
        on_q, on_outside = -tl.exp(t), -tl.exp(t_outside)
    elif reading == 3:  # KL(p || q) + KL(sg[(1 - l) q + l r] || q)
        value = tl.maximum(kl, 0.0)
        on_q, on_outside = -tl.exp(p), -tl.exp(p_outside)
        if mixes:
            m = _log_add(keep + q, mix + r)
            m_outside = _log_add(keep + q_outside, mix + r_outside)
            value += tl.maximum(_relative_entropy(m, m_outside, q, q_outside), 0.0)
            on_q -= tl.exp(m)
            on_outside -= tl.exp(m_outside)
    else:  # KL(p || (1 - l) q + l r), or of r
        a, a_outside = p, p_outside
        if reading == 2:
            a, a_outside = r, r_outside
        m, m_outside = q, q_outside
        if mixes:
            m = _log_add(keep + q, mix + r)
            m_outside = _log_add(keep + q_outside, mix + r_outside)
        value = tl.maximum(_relative_entropy(a, a_outside, m, m_outside), 0.0)
        on_q, on_outside = -tl.exp(a), -tl.exp(a_outside)
        if mixes:
            on_q *= tl.where(m > -float("inf"), tl.exp(keep + q - m), 0.0)
            on_outside *= tl.where(
                m_outside > -float("inf"), tl.exp(keep + q_outside - m_outside), 0.0
            )
    on_q = tl.where(used, on_q, 0.0)
    spread = -(tl.sum(on_q, 0) + on_outside)
    length = tl.sum(tl.where(q > -float("inf"), tl.abs(tl.exp(q) * spread + on_q), 0.0), 0)
    length += tl.abs(on_outside + tl.exp(q_outside) * spread)

    loss = on_nll * nll
    if alpha > 0:  # an infinite divergence that has no weight must not become NaN
        loss += alpha * value
        on_q *= alpha
        on_outside *= alpha
    else:
        on_q = tl.zeros([slot_block], tl.float32)
        on_outside = 0.0
    on_q -= tl.where(slot == 0, on_nll, 0.0)
    count = vocabulary * 1.0
    if with_sum:
        total, count = sum_of_logs(q, z, top, distance, finite, max_log_q)
        loss += on_sum * total
        tl.store(columns + 5 * positions + position, on_sum)
    within = slot < slots
    tl.store(on_slots + position * slots + slot, q, mask=within)
    tl.store(on_slots + (positions + position) * slots + slot, on_q, mask=within)
    tl.store(columns + position, q_outside)
    tl.store(columns + positions + position, count)
    tl.store(columns + 2 * positions + position, top)
    tl.store(columns + 3 * positions + position, log_sum)
    tl.store(columns + 4 * positions + position, on_outside)
    tl.store(sums + position, loss)
    tl.store(sums + positions + position, nll)
    tl.store(sums + 2 * positions + position, agree.to(tl.float32))
    tl.store(sums + 3 * positions + position, hard.to(tl.float32))
    tl.store(sums + 4 * positions + position, difficulty)
    tl.store(sums + 5 * positions + position, tl.where(hard, ratio, 0.0))
    tl.store(sums + 6 * positions + position, tl.where(hard, 0.0, kl))
    tl.store(sums + 7 * positions + position, tl.where(hard, kl, 0.0))
    tl.store(sums + 8 * positions + position, tl.where(hard, 0.0, length))
    tl.store(sums + 9 * positions + position, tl.where(hard, length, 0.0))


def token_loss(
    logits: Tensor,
    rows: Tensor,
    teacher: TeacherTokens,
    settings: SelfEvolution,
    gamma: float,
    alpha: float,
    label_smoothing: float,
    overwrite: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``sum_i alpha D_i + (1 - alpha) CE_i``, 0-d, with its gradient to the logits, and :data:`SUMS`.

    Parameters
    ----------
    logits : (M, V) float32, bfloat16 or float16
        Gradient flows here.
    rows : (N,) int64
        The positions that count, each once.
    teacher
        Of these positions, in float32, at temperature 1 and not sampled.
    settings
        ``divergence`` ``forward_kl``, ``missing_mass`` ``bucket``.
    gamma
        The threshold of difficulty in nats.
    alpha, label_smoothing
        As of the criterions.
    overwrite
        As of :func:`~sekd_fairseq.losses.support.support_log_probs`.
    """
    options = (settings, gamma, alpha, label_smoothing, overwrite)
    loss, sums = _TokenLoss.apply(logits, rows, teacher, *options)  # type: ignore[no-untyped-call]
    return loss, dict(zip(SUMS, sums.unbind()[1:], strict=True))


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        rows: Tensor,
        teacher: TeacherTokens,
        settings: SelfEvolution,
        gamma: float,
        alpha: float,
        label_smoothing: float,
        overwrite: bool,
    ) -> tuple[Tensor, Tensor]:
        logits = logits.contiguous()
        ids = teacher.ids.contiguous()
        positions, slots = ids.shape
        empty = partial(torch.empty, dtype=torch.float32, device=logits.device)
        on_slots = empty(2, positions, slots)  # log q, gradient to it
        columns = empty(6, positions)  # as the kernel fills them
        sums = empty(1 + len(SUMS), positions)
        stored = teacher.difficulty
        if positions:
            with torch.cuda.device_of(logits):
                _token_loss[(positions,)](
                    logits,
                    rows,
                    ids,
                    teacher.valid.contiguous(),
                    teacher.log_p.contiguous(),
                    teacher.log_outside,
                    columns if stored is None else stored,
                    on_slots,
                    columns,
                    sums,
                    logits.size(1),
                    slots,
                    positions,
                    alpha,
                    *cross_entropy_weights(alpha, label_smoothing, logits.size(1)),
                    gamma,
                    settings.lambda_max,
                    0.0 if settings.beta is None else settings.beta,
                    settings.scale,
                    reading=READINGS.index(settings.integration),
                    measure=MEASURES.index("stored" if stored is not None else settings.difficulty),
                    schedule=SCHEDULES.index(settings.schedule),
                    confidence=settings.beta is None,
                    mixes=settings.lambda_max > 0,
                    with_sum=label_smoothing > 0,
                    slot_block=triton.next_power_of_2(slots),
                    block=block_of(logits),
                    num_warps=WARPS,
                )
        ctx.save_for_backward(logits, rows, ids, on_slots, columns)
        ctx.options = (label_smoothing > 0, overwrite)
        total = sums.sum(dim=1)
        ctx.mark_non_differentiable(total)
        return total[0].clone(), total

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, rows, ids, on_slots, columns = ctx.saved_tensors
        with_sum, overwrite = ctx.options
        log_q, grad_log_q = on_slots.unbind()
        log_outside, allowed, top, log_sum, grad_outside, grad_sum = columns.unbind()
        unused = log_outside
        reduced = Reduced(log_q, log_outside, unused, allowed, unused, top, log_sum)
        grad = gradient(
            logits,
            rows,
            ids,
            reduced,
            grad_log_q,
            grad_outside,
            grad_sum if with_sum else None,
            1.0,
            overwrite,
            upstream.float(),
        )
        return grad, None, None, None, None, None, None, None
