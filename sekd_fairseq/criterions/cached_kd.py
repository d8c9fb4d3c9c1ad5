"""The criterion ``cached_kd``: the baselines, on the same cache and code path as SE-KD."""

import math
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from fairseq.criterions import register_criterion
from fairseq.dataclass import ChoiceEnum
from fairseq.distributed.utils import all_gather, get_data_parallel_group
from fairseq.logging import metrics
from torch import Tensor
from torch.nn import functional

from sekd_fairseq.criterions.configuration import DistillationConfig
from sekd_fairseq.criterions.distillation import DistillationCriterion, Distilled
from sekd_fairseq.errors import UserError
from sekd_fairseq.losses import DIVERGENCES, Events, SelfEvolution, TeacherTokens
from sekd_fairseq.losses.decoupled import adaptive_teaching
from sekd_fairseq.losses.divergences import divergence, relative_entropy
from sekd_fairseq.losses.events import check_missing_mass
from sekd_fairseq.losses.selective import TokenQueue, hardest

SELECTIONS = ("all", "batch", "queue")


@dataclass
class CachedKDConfig(DistillationConfig):
    """Options of the criterion."""

    divergence: ChoiceEnum((*DIVERGENCES, "atkd")) = field(  # type: ignore[valid-type]
        default="forward_kl",
        metadata={
            "help": "divergence between teacher and student; atkd is the loss of adaptive teaching "
            "(Zhong et al. 2024), decoupled KD with weights for easy and hard tokens of a batch (of "
            "one process, so results depend on --max-tokens and the number of GPUs)"
        },
    )
    select: ChoiceEnum(SELECTIONS) = field(  # type: ignore[valid-type]
        default="all",
        metadata={
            "help": "which tokens distil: all, or those of largest cross entropy in the batch "
            "of one process (batch: results depend on --max-tokens and the number of GPUs) or "
            "against a queue of past tokens (queue; all in the first update), as Wang et al. 2021"
        },
    )
    select_share: Optional[float] = field(  # noqa: UP045 (fairseq's parser needs Optional)
        default=None,
        metadata={
            "help": "share of tokens that distil with --select, above 0 and below 1; 0.5 if left out"
        },
    )
    queue_size: Optional[int] = field(  # noqa: UP045
        default=None,
        metadata={"help": "tokens in the queue of --select queue, 1 or more; 30000 if left out"},
    )


@register_criterion("cached_kd", dataclass=CachedKDConfig)
class CachedKDCriterion(DistillationCriterion):
    """``D_i`` is a plain divergence, at all tokens or at those that selective KD chooses.

    Selective KD differs from Wang et al. in the weights alone: theirs is ``CE + alpha KD`` on
    selected tokens and ``CE`` elsewhere, here it is ``(1 - alpha) CE + alpha D`` and
    ``(1 - alpha) CE``, the same up to scale.

    Logged, beside what every criterion logs: ``kl`` (mean KL(p || q), nats) and ``selected``
    (share of tokens that distil).
    """

    def __init__(self, cfg: CachedKDConfig, task: Any) -> None:
        super().__init__(cfg, task)
        self._check(cfg)
        if task.cfg.stored_difficulty:
            raise UserError(
                "--stored-difficulty expects --criterion self_evolution_kd, found cached_kd, "
                "which has no difficulty"
            )
        self.divergence_weight = float(cfg.divergence_weight)
        self.select = str(cfg.select)
        self.share = 0.5 if cfg.select_share is None else float(cfg.select_share)
        size = 30_000 if cfg.queue_size is None else int(cfg.queue_size)
        self.queue = TokenQueue(size, self.share) if self.select == "queue" else None

    @staticmethod
    def _check(cfg: CachedKDConfig) -> None:
        select = str(cfg.select)
        for option, modes in (("select_share", ("batch", "queue")), ("queue_size", ("queue",))):
            if getattr(cfg, option) is not None and select not in modes:
                raise UserError(
                    f"--{option.replace('_', '-')}: has an effect with --select {' or '.join(modes)} only, "
                    f"found --select {select}; add it or leave the option out"
                )
        if cfg.select_share is not None and not 0 < cfg.select_share < 1:
            raise UserError(
                f"--select-share: expected above 0 and below 1, found {cfg.select_share}"
            )
        if cfg.queue_size is not None and cfg.queue_size < 1:
            raise UserError(f"--queue-size: expected 1 or more, found {cfg.queue_size}")
        name = str(cfg.divergence)
        if name == "atkd" and str(cfg.select) != "all":
            raise UserError(
                "--divergence atkd tells easy from hard tokens itself; expected --select all with "
                f"it, found {cfg.select}"
            )
        try:
            check_missing_mass(str(cfg.missing_mass), name, mixes_student="skew" in name)
        except ValueError as error:
            raise UserError(f"criterion cached_kd: {error}") from error

    @staticmethod
    def whole_batch(cfg: CachedKDConfig) -> str:
        """The option that needs a whole batch at once, if any."""
        if str(cfg.divergence) == "atkd":
            return "--divergence atkd"
        return "--select batch" if str(cfg.select) == "batch" else ""

    def distill(self, events: Events, nll: Tensor, teacher: TeacherTokens) -> Distilled:
        """The divergence at selected tokens, zero at the others."""
        selected = self._selected(nll)
        if self.training and self.queue is not None:
            # Nothing of a batch that does not count, but on the device where the processes gather.
            self.queue.push(nll if self.counted else nll[:0])
        value = self._distance(events)
        kl = relative_entropy(events.log_p, events.log_q.detach(), events.log_multiplicity)
        # The mask drops infinity at a token that does not distil, where a factor would make NaN.
        sums = {"kl": kl.sum(), "selected": selected.sum()}
        return Distilled(value.masked_fill(~selected, 0.0), sums)

    def _distance(self, events: Events) -> Tensor:
        if self.divergence == "atkd":
            return adaptive_teaching(events.log_p, events.log_q)
        return divergence(self.divergence, *events, self.divergence_weight)

    def kernel_settings(self) -> tuple[SelfEvolution, float] | None:
        """Word-level KD of all tokens, with the outside as one event: SE-KD without hard tokens."""
        usual = (self.divergence, self.missing_mass) == ("forward_kl", "bucket")
        if not usual or self.select != "all":
            return None
        return SelfEvolution(lambda_max=0.0), math.inf

    def sums_of_kernel(self, sums: dict[str, Tensor], tokens: int, gamma: float) -> dict[str, Any]:
        """The mean KL; no token is hard."""
        own = {"kl": sums["kl_easy"], "selected": torch.full_like(sums["kl_easy"], tokens)}
        return {"nll_loss": sums["nll_loss"], "agree": sums["agree"], **own}

    def begin_update(self) -> None:
        """Forget the tokens of an update that was skipped."""
        if self.queue is not None:
            self.queue.take_pending()

    def end_update(self, logging_outputs: list[dict[str, Any]]) -> None:
        """Let the update's tokens into the queue, those of all processes."""
        if self.queue is not None:
            self.queue.commit(of_all_processes(self.queue.take_pending()))

    def running_state(self) -> dict[str, Any]:
        """The queue."""
        return {} if self.queue is None else {"queue": self.queue.values.cpu()}

    def load_running_state(self, state: dict[str, Any]) -> None:
        """Restore the queue."""
        if self.queue is not None and "queue" in state:
            self.queue.load(state["queue"])

    def _selected(self, nll: Tensor) -> Tensor:
        if self.queue is not None:
            return self.queue.select(nll)
        if self.select == "batch":
            return hardest(nll, self.share)
        return torch.ones_like(nll, dtype=torch.bool)

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Divide the sums."""
        super().reduce_metrics(logging_outputs)
        tokens = sum(log["ntokens"] for log in logging_outputs)
        for key in ("kl", "selected"):
            total = sum(log[key] for log in logging_outputs)
            metrics.log_scalar(key, total / tokens, tokens, round=4)


def of_all_processes(values: Tensor) -> Tensor:
    """The values of every process that trains, one process after the other: (N,) of each.

    Every process then has the same queue, and a checkpoint, which one of them writes, is whole.
    """
    if not torch.distributed.is_initialized():
        return values
    group = get_data_parallel_group()
    sizes = torch.cat(all_gather(values.new_tensor([values.numel()], dtype=torch.long), group))
    longest = functional.pad(values, (0, int(sizes.max()) - values.numel()))
    parts = zip(all_gather(longest, group), sizes.tolist(), strict=True)
    return torch.cat([part[:size] for part, size in parts])
