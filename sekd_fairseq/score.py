"""Compare a student with its teacher at every reference token of a held-out split.

    python -m sekd_fairseq.score DATA --path student.pt --teacher-cache CACHE --run runs/NAME

writes ``runs/NAME/tokens/<subset>/<updates>.parquet``, one row a reference token, and
``runs/NAME/run.json``, which ``python -m analysis.transfer`` reads.
"""

import argparse
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray
from omegaconf import OmegaConf
from torch import Tensor

import sekd_fairseq
from analysis.runs.files import hash_file
from analysis.runs.run_record import RunRecord, write_run
from analysis.runs.token_records import write_records
from analysis.terminal import progress, warn
from sekd_fairseq.checkpoints import add_hf_model, load_models, position_limits
from sekd_fairseq.criterions.self_evolution_kd import partners
from sekd_fairseq.datasets import TeacherDataset, teacher_tokens
from sekd_fairseq.devices import default_device, half_precision, to_device
from sekd_fairseq.errors import UserError, one_line_errors
from sekd_fairseq.logits import flat_logits
from sekd_fairseq.losses import TeacherTokens, build_events, support_log_probs
from sekd_fairseq.losses.decoupled import decoupled_kl
from sekd_fairseq.losses.divergences import forward_kl
from sekd_fairseq.losses.events import log_sum_exp
from sekd_fairseq.plugin import quiet_fairseq
from sekd_fairseq.splits import load_split, token_batches, too_long, train_targets
from sekd_fairseq.teacher_cache import TeacherCache, hash_symbols


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="python -m sekd_fairseq.score",
        description="Write token records of a student against its teacher's cache into a run "
        "directory, for python -m analysis.transfer.",
    )
    out.add_argument("data", metavar="DATA", help="fairseq data directory")
    out.add_argument(
        "--path", required=True, type=Path, metavar="STUDENT", help="student checkpoint"
    )
    out.add_argument(
        "--teacher-cache",
        type=Path,
        metavar="CACHE",
        help="the teacher's cache, with the split to score; without it only run.json is written, "
        "as for a teacher itself",
    )
    out.add_argument("--run", required=True, type=Path, metavar="DIR", help="run directory")
    out.add_argument("--subset", default="test", help="split to score (default: %(default)s)")
    out.add_argument(
        "--method",
        help="the run's method in reports, e.g. finetune, word_kd (default: from the checkpoint's "
        "criterion and options; teacher for one without distillation and --teacher-cache)",
    )
    out.add_argument(
        "--earlier",
        action="store_true",
        help="write records of the checkpoints that lie beside STUDENT from other updates too, as a rule "
        "earlier ones (fairseq-train --save-interval-updates N), which show what turned easy when",
    )
    out.add_argument(
        "--max-tokens", type=int, default=4096, help="padded tokens a batch (default: %(default)s)"
    )
    half = out.add_mutually_exclusive_group()
    half.add_argument("--fp16", action="store_true", help="run the student in float16 (GPU)")
    half.add_argument("--bf16", action="store_true", help="run the student in bfloat16")
    add_hf_model(out)
    out.add_argument("--cpu", action="store_true", help="do not use a GPU")
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Score the checkpoints of one run on one split."""
    args = parser().parse_args(argv)
    quiet_fairseq()
    with one_line_errors():
        if args.earlier and not args.teacher_cache:
            raise UserError("--earlier expects --teacher-cache CACHE beside it, found none")
        args.run.mkdir(parents=True, exist_ok=True)  # before the work, if it cannot be
        device = default_device(args.cpu)
        record, scored = score_checkpoint(args.path, args, device)
        for step, path in earlier_checkpoints(args.path).items() if args.earlier else ():
            if step != record.updates:
                score_checkpoint(path, args, device, scored)
        write_run(args.run, record)


def earlier_checkpoints(path: Path) -> dict[int, Path]:
    """What ``--save-interval-updates`` kept beside a checkpoint, by updates, ascending."""
    found = {}
    for other in path.parent.glob("checkpoint_*_*.pt"):
        if match := re.fullmatch(r"checkpoint_\d+_(\d+)\.pt", other.name):
            found[int(match[1])] = other
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class ScoredSplit:
    """What every checkpoint of a run is scored on, read once: the sentences with their teacher rows,
    and how often each token occurs in the training targets, (V,)."""

    cache: TeacherCache
    dataset: TeacherDataset
    symbols: list[str]
    frequencies: NDArray[np.int64]

    @classmethod
    def open(cls, task: Any, args: argparse.Namespace) -> "ScoredSplit":
        """Of the task of a run's checkpoint."""
        cache = TeacherCache.open(args.teacher_cache / args.subset)
        symbols = task.target_dictionary.symbols
        cache.check_dictionary(symbols)
        if "samples" in cache.manifest.truncation:
            warn(
                f"{cache.directory}: holds tokens drawn from the teacher (--sample); KL on them is a lower "
                "bound that depends on the draw, a cache of the best tokens (--top-k) gives a surer one"
            )
        sentences = load_split(task, args.subset, args.data)
        dataset = TeacherDataset(sentences, [cache], f"{args.subset} ({args.data})")
        return cls(cache, dataset, symbols, train_frequencies(task))


def score_checkpoint(
    path: Path, args: argparse.Namespace, device: torch.device, scored: ScoredSplit | None = None
) -> tuple[RunRecord, ScoredSplit | None]:
    """Write the token records of one checkpoint; returns the content of ``run.json`` and, for the
    run's other checkpoints, what it was scored on (None without ``--teacher-cache``)."""
    models, config, task = load_models([str(path)], args.data, device, args.hf_model)
    models[0].to(half_precision(args.fp16, args.bf16))
    checkpoint = torch.load(path, map_location="cpu")
    step = int(checkpoint["optimizer_history"][-1]["num_updates"])
    record = run_record(config, models[0], args, step, task)
    # Of what it was trained with; the loaded configuration forgets the caches and their like.
    if (checkpoint.get("cfg") or {}).get("task", {}).get("stored_difficulty"):
        record.hyperparameters["criterion"]["difficulty"] = "stored"
    if args.teacher_cache:
        scored = scored or ScoredSplit.open(task, args)
        record = replace(record, teacher_cache=cache_record(scored.cache))
        too_long(scored.dataset, position_limits(models), args.subset)
        columns = score_split(models[0], scored.dataset, device, args.max_tokens, args.subset)
        columns["frequency"] = scored.frequencies[columns["token"]]
        output = args.run / "tokens" / args.subset / f"{step}.parquet"
        write_records(
            output,
            columns,
            scored.symbols,
            teacher=scored.cache.manifest.fingerprint,
            checkpoint=hash_file(path),
        )
        tokens, mean = len(columns["kl"]), float(columns["kl"].mean())
        print(f"{output}: {tokens} tokens, mean KL to the teacher {mean:.4f} nats")
    return record, scored


def score_split(
    model: Any, dataset: TeacherDataset, device: torch.device, max_tokens: int, name: str
) -> dict[str, NDArray[Any]]:
    """Token records of a split as columns, sorted by sentence and position (no pieces yet)."""
    parts: list[dict[str, NDArray[Any]]] = []
    lengths = dataset.sizes[:, 1]
    temperature = dataset.caches[0].manifest.temperature
    symbols = dataset.caches[0].manifest.vocab_size
    with progress(
        total=int(lengths.sum()), unit="tok", unit_scale=True, desc=f"score {name}"
    ) as bar:
        for batch in token_batches(dataset, np.arange(len(dataset)), max_tokens):
            sample = dataset.collater([dataset[i] for i in batch])
            part = token_columns(
                model, to_device(sample, device), dataset.pad, temperature, symbols
            )
            ids = sample["id"].numpy()
            rows = [dataset.caches[0][int(i)] for i in ids]
            sizes = [len(row.entropy) for row in rows]
            part["sentence"] = np.repeat(ids, sizes)
            part["position"] = np.concatenate([np.arange(size) for size in sizes])
            part["p_entropy"] = np.concatenate([row.entropy for row in rows])
            parts.append(part)
            bar.update(int(lengths[batch].sum()))
    columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    order = np.lexsort((columns["position"], columns["sentence"]))
    return {key: values[order] for key, values in columns.items()}


@torch.no_grad()
def token_columns(
    model: Any,
    sample: dict[str, Any],
    pad: int,
    temperature: float = 1.0,
    symbols: int | None = None,
) -> dict[str, NDArray[Any]]:
    """Teacher and student at the target tokens of a batch, in the batch's order.

    Both at the teacher's temperature, which is 1 unless its cache was built with another.
    ``p_of_q_top1`` of a token outside the teacher's support is the outside mass spread evenly.
    """
    logits = model(**sample["net_input"])[0].float() / temperature
    logits = flat_logits(logits, sample["target"], symbols)
    target = sample["target"].view(-1)
    rows = target.ne(pad).nonzero().squeeze(1)
    teacher = teacher_tokens(sample["teacher"])
    events = build_events(
        teacher, support_log_probs(logits, rows, teacher.ids, teacher.valid), "bucket"
    )
    kl = forward_kl(events.log_p, events.log_q)
    kl_target, others = decoupled_kl(events.log_p, events.log_q)
    kl_nontarget = log_sum_exp(events.log_p[:, 1:]).exp() * others
    log_q = torch.log_softmax(logits[rows], dim=-1)
    q_max, q_top = log_q.max(dim=-1)
    best_p, best_slot = teacher.log_p.masked_fill(~teacher.valid, -torch.inf).max(dim=1)
    return {
        name: values.cpu().numpy()
        for name, values in {
            "token": target[rows],
            "p_gold": events.log_p[:, 0].exp(),
            "q_gold": events.log_q[:, 0].exp(),
            "kl": kl,
            "kl_target": kl_target,
            "kl_nontarget": kl_nontarget,
            "q_entropy": -(log_q.exp() * log_q.clamp_min(torch.finfo(log_q.dtype).min)).sum(-1),
            "p_top1": teacher.ids.gather(1, best_slot.unsqueeze(1)).squeeze(1),
            "q_top1": q_top,
            "p_max": best_p.exp(),
            "q_max": q_max.exp(),
            "p_of_q_top1": probability_of(teacher, q_top, log_q.size(-1)),
            "overlap_top5": top_overlap(teacher, log_q, 5),
        }.items()
    }


def probability_of(teacher: TeacherTokens, token: Tensor, vocab_size: int) -> Tensor:
    """The teacher's probability of one token a row, (N,); outside the support the mean there."""
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


def train_frequencies(task: Any) -> NDArray[np.int64]:
    """How often each token occurs in the training targets, all parts of all data directories, (V,);
    the dictionary's own counts if there is no training split."""
    dictionary = task.target_dictionary
    counts = np.zeros(len(dictionary), dtype=np.int64)
    for targets in train_targets(task):
        for index in range(len(targets)):
            np.add.at(counts, targets[index].numpy(), 1)
    return counts if counts.any() else np.asarray(dictionary.count, dtype=np.int64)


def cache_record(cache: TeacherCache) -> dict[str, Any]:
    """What ``run.json`` says of the teacher cache."""
    manifest = cache.manifest
    return {
        "fingerprint": manifest.fingerprint,
        "dataset": manifest.dataset_hash[:16],
        "teacher": ":".join(manifest.teacher["files"]),
        "truncation": manifest.truncation,
        "temperature": manifest.temperature,
    }


def run_record(
    config: Any, model: Any, args: argparse.Namespace, step: int, task: Any
) -> RunRecord:
    """The content of ``run.json``, without a teacher cache."""
    optimisation = OmegaConf.to_container(config.optimization, resolve=False)
    criterion = OmegaConf.to_container(config.criterion, resolve=False)
    if config.criterion._name == "self_evolution_kd":
        criterion |= partners(config.criterion)
    return RunRecord(
        name=args.run.name,
        method=args.method or method_id(config.criterion, bool(args.teacher_cache)),
        seed=int(config.common.seed),
        direction=f"{task.cfg.source_lang}-{task.cfg.target_lang}",
        updates=step,
        parameters=sum(p.numel() for p in model.parameters()),
        hyperparameters={
            "criterion": criterion,
            "arch": config.model._name,
            "lr": optimisation["lr"],
            "max_update": optimisation["max_update"],
            "update_freq": optimisation["update_freq"],
            "max_tokens": config.dataset.max_tokens,
            **({"warm_start": True} if config.checkpoint.finetune_from_model else {}),
        },
        data={"fingerprint": hash_symbols(task.target_dictionary.symbols)[:16]},
        versions={
            "sekd_fairseq": sekd_fairseq.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    )


def method_id(criterion: Any, compared: bool) -> str:
    """The id of the method that a criterion's options amount to; what is not ``compared`` with a teacher may be
    the teacher itself."""
    if criterion._name == "self_evolution_kd" and (
        # Without a ratio, blend still distils from the prior and not from the teacher.
        criterion.lambda_max > 0 or criterion.integration == "blend"
    ):
        return f"se_kd_{criterion.integration}"
    if criterion._name in ("self_evolution_kd", "cached_kd"):
        if getattr(criterion, "select", "all") != "all":
            return "selective_kd"
        return "word_kd" if criterion.divergence == "forward_kl" else str(criterion.divergence)
    if criterion._name in ("cross_entropy", "label_smoothed_cross_entropy"):
        return "finetune" if compared else "teacher"
    return str(criterion._name)


if __name__ == "__main__":
    main()
