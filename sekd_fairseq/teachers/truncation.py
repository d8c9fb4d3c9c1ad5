"""Cutting a teacher's full distributions down to what a cache stores."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sekd_fairseq.errors import UserError
from sekd_fairseq.losses.support_torch import blocks_of
from sekd_fairseq.teacher_cache.writer import SentenceColumns

NEG_INF = float("-inf")


@dataclass(frozen=True)
class Truncation:
    """Which tokens of a distribution are kept, beside the reference, which always is.

    Parameters
    ----------
    rule : {"top_k", "top_p", "sample"}
        ``top_k``: the ``k - 1`` most probable others.  ``top_p``: as few of the most probable as
        hold ``p`` of the mass, at least ``floor`` and at most ``k``.  ``sample``: ``samples``
        draws with replacement, with their counts, and the best token, so that a teacher's accuracy and
        a student's agreement with it are known; seeded by sentence, so that shards do not depend
        on how the work was split.
    """

    rule: str = "top_k"
    k: int = 32
    p: float = 1.0
    floor: int = 1
    samples: int = 0
    seed: int = 1

    def record(self) -> dict[str, Any]:
        """What the manifest says of it: the rule and the numbers that it uses."""
        used = {
            "top_k": ("rule", "k"),
            "top_p": ("rule", "p", "floor", "k"),
            "sample": ("rule", "samples", "seed"),
        }[self.rule]
        return {key: value for key, value in asdict(self).items() if key in used}


#: The format counts a support, which has the reference too, and draws in 16 bits.
MAX_SUPPORT = 2**16 - 2


def truncation_of(
    top_k: int, top_p: float | None, floor: int, samples: int, vocab_size: int
) -> Truncation:
    """The rule that command-line values amount to; ``top_k = 0`` is the whole vocabulary."""
    for flag, value, low in (
        ("top-k", top_k, 0),
        ("top-p-floor", floor, 1),
        ("sample", samples, 0),
    ):
        if value < low:
            raise UserError(f"--{flag}: expected {low} or more, found {value}")
    k = min(top_k or vocab_size, vocab_size)
    # Beside what is drawn the best token is kept.
    flag, kept, most = (
        ("sample", samples, MAX_SUPPORT - 1) if samples else ("top-k", k, MAX_SUPPORT)
    )
    if kept > most:
        raise UserError(
            f"--{flag}: a cache holds up to {most} tokens of a distribution, found {kept}"
            f"{'' if samples else ' (0 is the whole vocabulary)'}; give a smaller one"
        )
    if samples and top_p is not None:
        raise UserError("--sample and --top-p: expected one of them, found both")
    if samples:
        return Truncation(rule="sample", samples=samples)
    if top_p is None:
        return Truncation(rule="top_k", k=k)
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p: expected a share of the mass, above 0 up to 1, found {top_p}")
    if floor > k:
        raise UserError(f"--top-p-floor: expected at most --top-k ({k}), found {floor}")
    return Truncation(rule="top_p", p=top_p, floor=floor, k=k)


def options_of(record: Mapping[str, Any]) -> list[str]:
    """The options of build_cache that truncate as a manifest's ``truncation`` says."""
    names = {"k": "--top-k", "p": "--top-p", "floor": "--top-p-floor", "samples": "--sample"}
    return [
        word for key, name in names.items() if key in record for word in (name, str(record[key]))
    ]


def uniforms(seed: int, sentences: Sequence[int], lengths: Sequence[int], draws: int) -> Tensor:
    """Random numbers in [0, 1) for each token of some sentences, (sum of lengths, draws) float64."""
    parts = [
        np.random.Generator(np.random.Philox(key=[seed, sentence])).random((length, draws))
        for sentence, length in zip(sentences, lengths, strict=True)
    ]
    return torch.from_numpy(np.concatenate(parts))


def best_tokens(z: Tensor, k: int) -> Tensor:
    """Ids of the ``k`` largest of each row, largest first; (n, V) to (n, k).

    The ``k`` blocks with the largest maxima hold all of them, so most of a wide row is read once
    and not sorted.
    """
    block = int(math.sqrt(z.size(1) / max(k, 1)))
    if block < 4:
        return z.topk(k, dim=1).indices
    tail = z.size(1) % block
    blocks = z[:, : z.size(1) - tail].reshape(z.size(0), -1, block)
    chosen = blocks.amax(dim=2).topk(k, dim=1).indices  # (n, k) numbers of blocks
    within = torch.arange(block, device=z.device)
    candidates = (chosen.unsqueeze(2) * block + within).flatten(1)
    rest = torch.arange(z.size(1) - tail, z.size(1), device=z.device).expand(z.size(0), tail)
    candidates = torch.cat([candidates, rest], dim=1)
    return candidates.gather(1, z.gather(1, candidates).topk(k, dim=1).indices)


@torch.no_grad()
def truncate(
    z: Tensor, target: Tensor, truncation: Truncation, uniform: Tensor | None = None
) -> dict[str, NDArray[Any]]:
    """The columns of a cache (:mod:`sekd_fairseq.teacher_cache.format`) at ``n`` tokens.

    ``gold_logprob``, ``outside_mass`` (summed directly) and ``entropy`` come from the full
    distribution in float32, before anything is cut.

    Parameters
    ----------
    z : (n, V) float32
        Logits or log-probabilities; overwritten.
    target : (n,) int64
        Reference tokens.
    uniform : (n, samples) float64
        Random numbers, for the rule ``sample``.
    """
    parts: dict[str, list[NDArray[Any]]] = {}
    for part in blocks_of(z, target):
        draws = None if uniform is None else uniform[part].to(z.device)
        for name, values in _truncate(z[part], target[part], truncation, draws).items():
            parts.setdefault(name, []).append(values.cpu().numpy())
    return {name: np.concatenate(values) for name, values in parts.items()}


@torch.no_grad()
def outside_mass(z: Tensor, target: Tensor, truncation: Truncation) -> Tensor:
    """What each token of the vocabulary has outside the supports of ``n`` tokens, summed over these;
    (V,) float32. Arguments as of :func:`truncate`."""
    found = z.new_zeros(z.size(1))
    for part in blocks_of(z, target):
        block, gold = z[part], target[part].unsqueeze(1)
        p = block.softmax(dim=1)
        ids, valid = _best(block, p, torch.ones_like(p[:, 0]), gold, truncation)
        found += p.scatter_(1, torch.where(valid, ids, gold), 0.0).sum(dim=0)
    return found


def _truncate(
    z: Tensor, target: Tensor, truncation: Truncation, uniform: Tensor | None
) -> dict[str, Tensor]:
    gold = target.unsqueeze(1)
    top = z.amax(dim=1, keepdim=True)
    weight = (z - top).exp_()  # p up to a factor
    total = weight.sum(dim=1)
    log_normaliser = top.squeeze(1) + total.log()
    mean_z = torch.linalg.vecdot(weight, z) / total
    if bool(mean_z.isnan().any()):  # 0 * -inf, at tokens that the teacher forbids
        mean_z = torch.linalg.vecdot(weight, z.clamp_min(torch.finfo(z.dtype).min)) / total
    if truncation.rule == "sample":
        assert uniform is not None
        ids, valid, count = _sample(weight, total, gold, uniform)
    else:
        ids, valid = _best(z, weight, total, gold, truncation)
        count = None
    logprob = z.gather(1, ids) - log_normaliser.unsqueeze(1)
    outside = weight.scatter_(1, torch.where(valid, ids, gold), 0.0).sum(dim=1) / total
    columns = {
        "support_size": valid.sum(dim=1),
        "gold_logprob": logprob[:, 0],
        "outside_mass": outside,
        "entropy": (log_normaliser - mean_z).clamp_min(0.0),
        "token_id": ids[valid],
        "logprob": logprob[valid],
    }
    return columns if count is None else {**columns, "draws": count[valid]}


def _best(
    z: Tensor, weight: Tensor, total: Tensor, gold: Tensor, truncation: Truncation
) -> tuple[Tensor, Tensor]:
    """Ids, the reference first, then the best others; and which of them are kept. (n, k)."""
    if truncation.rule == "top_k":
        # The reference need not be among the best, so it is set apart while these are sought.
        gold_z = z.gather(1, gold)
        z.scatter_(1, gold, NEG_INF)
        others = best_tokens(z, truncation.k - 1)
        z.scatter_(1, gold, gold_z)
        ids = torch.cat([gold, others], dim=1)
        # Where the teacher forbids tokens, the reference may be among what is left.
        valid = torch.cat([torch.ones_like(gold, dtype=torch.bool), others != gold], dim=1)
    else:
        best = best_tokens(z, truncation.k)
        mass = weight.gather(1, best)
        # Kept if the mass before it does not reach p yet.
        kept = mass.cumsum(dim=1) - mass < truncation.p * total.unsqueeze(1)
        kept[:, : truncation.floor] = True
        ids = torch.cat([gold, best], dim=1)
        valid = torch.cat([torch.ones_like(gold, dtype=torch.bool), kept & (best != gold)], dim=1)
    if bool(torch.isneginf(top_values := z.gather(1, ids[:, 1:])).any()):
        valid[:, 1:] &= ~torch.isneginf(top_values)  # a token of probability zero says nothing
    return ids, valid


def _sample(
    weight: Tensor, total: Tensor, gold: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct drawn tokens and the best one, the reference first, then by id; which slots are used;
    how often each was drawn (never, perhaps, the reference and the best)."""
    cumulative = weight.double().cumsum(dim=1)
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    drawn = drawn.clamp_max(weight.size(1) - 1).sort(dim=1).values
    kept = torch.cat([drawn, weight.argmax(dim=1, keepdim=True)], dim=1).sort(dim=1).values
    ids = torch.cat([gold, kept], dim=1)
    before = torch.searchsorted(drawn, ids)
    count = torch.searchsorted(drawn, ids, right=True) - before  # (n, 2 + samples)
    first = torch.ones_like(kept, dtype=torch.bool)
    first[:, 1:] = kept[:, 1:] != kept[:, :-1]
    valid = torch.cat([torch.ones_like(gold, dtype=torch.bool), first & (kept != gold)], dim=1)
    return ids, valid, count


def keep_best(log_p: dict[int, float], gold: int, truncation: Truncation) -> list[int]:
    """The reference first, then the best others that a truncation keeps of some known tokens."""
    order = sorted(log_p, key=lambda token: -log_p[token])
    if truncation.rule == "top_k":
        return [gold, *[token for token in order if token != gold][: truncation.k - 1]]
    mass = np.cumsum([np.exp(log_p[token]) for token in order])
    before = np.concatenate([[0.0], mass[:-1]])
    best = order[: max(truncation.floor, min(truncation.k, int((before < truncation.p).sum())))]
    return [gold, *[token for token in best if token != gold]]


def best_columns(
    known: Sequence[dict[int, float]], target: Sequence[int], truncation: Truncation
) -> SentenceColumns:
    """A sentence's columns from the log-probabilities that are known at each of its tokens, the
    reference's among them.

    What is not known, the rest, is what the known ones lack of 1, as far as float32 log-probabilities
    tell: 0 at a sure token. It is outside, and one event in the entropy, which is so a lower bound.
    """
    columns: dict[str, list[Any]] = {}
    for log_p, gold in zip(known, target, strict=True):
        ids = keep_best(log_p, gold, truncation)
        logprob = np.array([log_p[i] for i in ids])
        every = np.array(list(log_p.values()))
        dropped = sum(np.exp(value) for token, value in log_p.items() if token not in ids)
        rest = max(0.0, 1.0 - np.exp(every).sum())
        entropy = -(np.exp(every) * every).sum() - (rest * np.log(rest) if rest else 0.0)
        for name, value in (
            ("support_size", [len(ids)]),
            ("gold_logprob", logprob[:1]),
            ("outside_mass", [rest + dropped]),
            ("entropy", [max(0.0, entropy)]),
            ("token_id", ids),
            ("logprob", logprob),
        ):
            columns.setdefault(name, []).append(value)
    return {name: np.concatenate(values) for name, values in columns.items()}


def reference_alone(target: NDArray[np.int64]) -> SentenceColumns:
    """A sentence that the teacher says nothing of: probability 1 for each reference token."""
    zeros = np.zeros(len(target), np.float32)
    return {
        "support_size": np.ones(len(target), np.int64),
        "gold_logprob": zeros,
        "outside_mass": zeros,
        "entropy": zeros,
        "token_id": target,
        "logprob": zeros,
        "draws": np.zeros(len(target), np.int64),
    }
