"""The passes of :mod:`sekd_fairseq.losses.support` as Triton kernels: one program per position.

Each program reads its row of logits once, in their own type, and computes in float32.  So that the
mass outside the support is summed by itself, the forward pass sets the logits of the support to
``-inf`` while it reads the row, and puts them back before it ends; the backward pass writes the
gradient of the whole row and then that of the support over it.  Triton's interpreter
(``TRITON_INTERPRET=1``) runs the same kernels on a CPU, which is how the tests prove them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sekd_fairseq.losses.support_torch import Reduced

#: Logits that a program holds at a time, and the warps that share them.
BLOCK = 4096
WARPS = 4


@triton.jit
def scan(
    row,
    token,
    used,
    vocabulary,
    inverse_temperature,
    with_sum: tl.constexpr,
    slot_block: tl.constexpr,
    block: tl.constexpr,
):
    """A row's logits on the support, and of those outside: their maximum, the log of the sum of
    ``exp(z - maximum)``, the sum of ``z - maximum`` and the number of those that are finite."""
    kept = tl.load(row + token, mask=used, other=-float("inf"))
    tl.debug_barrier()
    marked = tl.full([slot_block], -float("inf"), tl.float32)
    tl.store(row + token, marked.to(row.dtype.element_ty), mask=used)
    tl.debug_barrier()
    top = -float("inf")
    total = 0.0
    distance = 0.0
    finite = 0.0
    for start in range(0, vocabulary, block):
        column = start + tl.arange(0, block)
        z = tl.load(row + column, mask=column < vocabulary, other=-float("inf")).to(tl.float32)
        z = z * inverse_temperature
        new_top = tl.maximum(top, tl.max(z, 0))
        origin = tl.where(new_top == -float("inf"), 0.0, new_top)
        if with_sum:
            here = z > -float("inf")
            distance += finite * tl.where(finite > 0, top - origin, 0.0)
            distance += tl.sum(tl.where(here, z - origin, 0.0), 0)
            finite += tl.sum(here.to(tl.float32), 0)
        total = total * tl.exp(top - origin) + tl.sum(tl.exp(z - origin), 0)
        top = new_top
    tl.debug_barrier()
    tl.store(row + token, kept, mask=used)
    return kept.to(tl.float32) * inverse_temperature, top, tl.log(total), distance, finite


@triton.jit
def log_softmax(z, top, log_sum):
    """Log-probabilities on the support and of the outside, and that of the best token."""
    best = tl.maximum(top, tl.max(z, 0))
    outside = (top - best) + log_sum
    log_total = tl.log(tl.sum(tl.exp(z - best), 0) + tl.exp(outside))
    return (z - best) - log_total, outside - log_total, -log_total


@triton.jit
def sum_of_logs(values, z, top, distance, finite, max_log_q):
    """The sum of the log-probabilities of all finite tokens, and how many these are."""
    best = tl.maximum(top, tl.max(z, 0))
    inside = values > -float("inf")
    total = distance + finite * tl.where(finite > 0, (top - best) + max_log_q, 0.0)
    total += tl.sum(tl.where(inside, values, 0.0), 0)
    return total, finite + tl.sum(inside.to(tl.float32), 0)


@triton.jit
def _reduce(
    logits,
    rows,
    ids,
    valid,
    log_q,
    log_outside,
    sum_log_q,
    allowed,
    max_log_q,
    outside_top,
    outside_log_sum,
    vocabulary,
    slots,
    inverse_temperature,
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
        row, token, used, vocabulary, inverse_temperature, with_sum, slot_block, block
    )
    values, outside, best = log_softmax(z, top, log_sum)
    total = 0.0
    count = vocabulary * 1.0
    if with_sum:
        total, count = sum_of_logs(values, z, top, distance, finite, best)
    tl.store(log_q + position * slots + slot, values, mask=slot < slots)
    tl.store(log_outside + position, outside)
    tl.store(sum_log_q + position, total)
    tl.store(allowed + position, count)
    tl.store(max_log_q + position, best)
    tl.store(outside_top + position, top)
    tl.store(outside_log_sum + position, log_sum)


@triton.jit
def _gradient(
    logits,
    out,
    position_of_row,
    rows,
    ids,
    log_q,
    log_outside,
    allowed,
    outside_top,
    outside_log_sum,
    grad_log_q,
    grad_outside,
    grad_sum,
    factor_of_all,
    vocabulary,
    slots,
    inverse_temperature,
    every_row: tl.constexpr,
    scaled: tl.constexpr,
    with_sum: tl.constexpr,
    slot_block: tl.constexpr,
    block: tl.constexpr,
):
    if every_row:
        position = tl.program_id(0)
        number = tl.load(rows + position).to(tl.int64)
    else:
        number = tl.program_id(0).to(tl.int64)
        position = tl.load(position_of_row + number)
    row = logits + number * vocabulary
    target = out + number * vocabulary
    if position < 0:  # padding
        for start in range(0, vocabulary, block):
            column = start + tl.arange(0, block)
            zeros = tl.zeros([block], target.dtype.element_ty)
            tl.store(target + column, zeros, mask=column < vocabulary)
    else:
        slot = tl.arange(0, slot_block)
        values = tl.load(log_q + position * slots + slot, mask=slot < slots, other=-float("inf"))
        used = values > -float("inf")  # others do not count, or have a gradient of zero
        token = tl.load(ids + position * slots + slot, mask=used, other=0)
        upstream = tl.load(grad_log_q + position * slots + slot, mask=used, other=0.0)
        on_outside = tl.load(grad_outside + position)
        top = tl.load(outside_top + position)
        log_sum = tl.load(outside_log_sum + position)
        spread = -(tl.sum(upstream, 0) + on_outside)  # factor of q
        on_sum = 0.0
        if with_sum:
            on_sum = tl.load(grad_sum + position)
            spread -= tl.load(allowed + position) * on_sum
        empty = top == -float("inf")
        factor = tl.where(empty, 0.0, on_outside + tl.exp(tl.load(log_outside + position)) * spread)
        scale = inverse_temperature
        if scaled:
            scale *= tl.load(factor_of_all)
        factor *= scale
        on_sum *= scale
        # Where nothing lies outside, exp(z - inf) = 0 stands in for the undefined conditional.
        top = tl.where(empty, float("inf"), top)
        log_sum = tl.where(empty, 0.0, log_sum)
        for start in range(0, vocabulary, block):
            column = start + tl.arange(0, block)
            inside = column < vocabulary
            z = tl.load(row + column, mask=inside, other=-float("inf")).to(tl.float32)
            z = z * inverse_temperature
            value = tl.exp((z - top) - log_sum) * factor
            if with_sum:
                value += tl.where(z == -float("inf"), 0.0, on_sum)
            tl.store(target + column, value.to(target.dtype.element_ty), mask=inside)
        tl.debug_barrier()
        value = (tl.exp(values) * spread + upstream) * scale + on_sum
        tl.store(target + token, value.to(target.dtype.element_ty), mask=used)


def reduce(
    logits: Tensor,
    rows: Tensor,
    ids: Tensor,
    valid: Tensor,
    with_sum: bool,
    temperature: float,
) -> Reduced:
    """As :func:`sekd_fairseq.losses.support_torch.reduce`."""
    positions, slots = ids.shape
    log_q = torch.empty(ids.shape, dtype=torch.float32, device=logits.device)
    columns = torch.empty(6, positions, dtype=torch.float32, device=logits.device).unbind()
    if positions:
        with torch.cuda.device_of(logits):
            _reduce[(positions,)](
                logits,
                rows,
                ids.contiguous(),
                valid.contiguous(),
                log_q,
                *columns,
                logits.size(1),
                slots,
                1.0 / temperature,
                with_sum=with_sum,
                slot_block=triton.next_power_of_2(slots),
                block=block_of(logits),
                num_warps=WARPS,
            )
    return Reduced(log_q, *columns)


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
    factor: Tensor | None = None,
) -> Tensor:
    """As :func:`sekd_fairseq.losses.support_torch.gradient`, times ``factor``, 0-d, if there is one."""
    grad = logits.detach() if overwrite else torch.empty_like(logits)
    positions, slots = ids.shape
    every_row = positions == logits.size(0)
    position_of_row = rows
    if not every_row:
        position_of_row = rows.new_full((logits.size(0),), -1)
        position_of_row.scatter_(0, rows, torch.arange(positions, device=rows.device))
    if logits.size(0):
        with torch.cuda.device_of(logits):
            _gradient[(logits.size(0),)](
                logits,
                grad,
                position_of_row,
                rows,
                ids.contiguous(),
                reduced.log_q,
                reduced.log_outside,
                reduced.allowed,
                reduced.outside_top,
                reduced.outside_log_sum,
                grad_log_q.contiguous(),
                grad_outside.contiguous(),
                grad_outside if grad_sum is None else grad_sum.contiguous(),
                grad_outside if factor is None else factor,
                logits.size(1),
                slots,
                1.0 / temperature,
                every_row=every_row,
                scaled=factor is not None,
                with_sum=grad_sum is not None,
                slot_block=triton.next_power_of_2(slots),
                block=block_of(logits),
                num_warps=WARPS,
            )
    return grad


def block_of(logits: Tensor) -> int:
    """How many logits a program holds at a time."""
    return min(BLOCK, triton.next_power_of_2(logits.size(1)))
