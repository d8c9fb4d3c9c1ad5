"""Columns of token records: a student against its teacher at every target token of a split."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analysis.terminal import progress
from sekd_fairseq.datasets import TeacherDataset, teacher_tokens
from sekd_fairseq.devices import to_device
from sekd_fairseq.logits import token_logits
from sekd_fairseq.losses import Events, TeacherTokens, build_events, support_log_probs
from sekd_fairseq.losses.decoupled import decoupled_kl
from sekd_fairseq.losses.divergences import forward_kl
from sekd_fairseq.losses.events import log_sum_exp
from sekd_fairseq.splits import token_batches


def compare_split(
    model: Any, dataset: TeacherDataset, device: torch.device, max_tokens: int, name: str
) -> dict[str, NDArray[Any]]:
    """Columns of all target tokens of a split, sorted by sentence and position (no pieces yet)."""
    parts: list[dict[str, NDArray[Any]]] = []
    lengths = dataset.sizes[:, 1]
    cache = dataset.caches[0]
    with progress(
        total=int(lengths.sum()), unit="tok", unit_scale=True, desc=f"score {name}"
    ) as bar:
        for batch in token_batches(dataset, np.arange(len(dataset)), max_tokens):
            sample = dataset.collater([dataset[i] for i in batch])
            moved = to_device(sample, device)
            part = token_columns(model, moved, dataset.pad, cache.manifest.vocab_size)
            ids = sample["id"].numpy()
            entropies = [cache[int(i)].entropy for i in ids]
            sizes = [len(one) for one in entropies]
            part["sentence"] = np.repeat(ids, sizes)
            part["position"] = np.concatenate([np.arange(size) for size in sizes])
            part["p_entropy"] = np.concatenate(entropies)
            parts.append(part)
            bar.update(int(lengths[batch].sum()))
    columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    order = np.lexsort((columns["position"], columns["sentence"]))
    return {key: values[order] for key, values in columns.items()}


@torch.no_grad()
def token_columns(
    model: Any, sample: dict[str, Any], pad: int, symbols: int | None = None
) -> dict[str, NDArray[Any]]:
    """Teacher and student at the target tokens of a batch, in the batch's order.

    Both at the teacher's temperature, which is 1 unless its cache was built with another.
    ``p_of_q_top1`` of a token outside the teacher's support is the outside mass spread evenly.
    """
    teacher = teacher_tokens(sample["teacher"])
    parts: list[dict[str, Tensor]] = []
    done = 0
    for target, z in token_logits([model], sample, pad, teacher.temperature, symbols):
        part = slice(done, done := done + len(target))
        parts.append({"token": target, **student_columns(z, teacher[part])})
    return {key: torch.cat([part[key] for part in parts]).cpu().numpy() for key in parts[0]}


def student_columns(z: Tensor, teacher: TeacherTokens) -> dict[str, Tensor]:
    """Columns of some tokens from the student's logits over the temperature, (n, V) float32."""
    every = torch.arange(len(z), device=z.device)
    student = support_log_probs(z, every, teacher.ids, teacher.valid)
    log_q = z.log_softmax(dim=-1)
    own = {**distances(build_events(teacher, student, "bucket")), **best_tokens(teacher, log_q)}
    return {**own, "q_entropy": entropy(log_q)}


def distances(events: Events) -> dict[str, Tensor]:
    """Probabilities of the reference, and KL(p || q) with its two parts, (N,) each."""
    kl_target, others = decoupled_kl(events.log_p, events.log_q)
    return {
        "p_gold": events.log_p[:, 0].exp(),
        "q_gold": events.log_q[:, 0].exp(),
        "kl": forward_kl(events.log_p, events.log_q),
        "kl_target": kl_target,
        "kl_nontarget": log_sum_exp(events.log_p[:, 1:]).exp() * others,
    }


def best_tokens(teacher: TeacherTokens, log_q: Tensor) -> dict[str, Tensor]:
    """The best token of each side, its probability, and what the sides have in common, (N,) each."""
    q_max, q_top = log_q.max(dim=-1)
    best_p, best_slot = teacher.log_p.masked_fill(~teacher.valid, -torch.inf).max(dim=1)
    return {
        "p_top1": teacher.ids.gather(1, best_slot.unsqueeze(1)).squeeze(1),
        "q_top1": q_top,
        "p_max": best_p.exp(),
        "q_max": q_max.exp(),
        "p_of_q_top1": probability_of(teacher, q_top, log_q.size(-1)),
        "overlap_top5": top_overlap(teacher, log_q, 5),
    }


def entropy(log_q: Tensor) -> Tensor:
    """Entropy of distributions (N, V) in nats, (N,); an impossible token adds nothing."""
    return -(log_q.exp() * log_q.clamp_min(torch.finfo(log_q.dtype).min)).sum(-1)


def probability_of(teacher: TeacherTokens, token: Tensor, vocab_size: int) -> Tensor:
    """The teacher's probability of one token at each position, (N,); outside the support the mean there."""
    found = (teacher.ids == token.unsqueeze(1)) & teacher.valid
    inside = (teacher.log_p.exp() * found).sum(dim=1)
    outside = teacher.log_outside.exp() / (vocab_size - teacher.valid.sum(dim=1)).clamp_min(1)
    return torch.where(found.any(dim=1), inside, outside)


def top_overlap(teacher: TeacherTokens, log_q: Tensor, n: int) -> Tensor:
    """How many of the teacher's ``n`` best tokens are among the student's, (N,), int8.

    Where the cache holds fewer, the same share of those that it holds, rounded to a whole of ``n``.
    """
    log_p = teacher.log_p.masked_fill(~teacher.valid, -torch.inf)
    slots = log_p.topk(min(n, log_p.size(1)), dim=1)
    best_p = teacher.ids.gather(1, slots.indices).masked_fill(slots.values.isinf(), -1)
    best_q = log_q.topk(min(n, log_q.size(1)), dim=1).indices
    found = (best_p.unsqueeze(2) == best_q.unsqueeze(1)).any(dim=2).sum(dim=1)
    known = slots.values.isfinite().sum(dim=1)
    return (found * n / known).round().to(torch.int8)
