"""The task ``self_evolution_kd``: translation whose batches carry cached teacher distributions."""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from fairseq import utils
from fairseq.criterions import FairseqCriterion
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from sekd_fairseq.compat import BATCH_SIZE_MULTIPLE, collect_before_fork
from sekd_fairseq.data import StableOrderDataset, TeacherDataset
from sekd_fairseq.errors import CacheError, UserError, one_line_errors
from sekd_fairseq.losses import RunningQuantile
from sekd_fairseq.teacher_cache import TeacherCache

logger = logging.getLogger(__name__)


@dataclass
class SelfEvolutionKDConfig(TranslationConfig):
    """Options of the task, beside those of ``translation``."""

    teacher_cache: Optional[str] = field(  # noqa: UP045 (fairseq's parser needs Optional)
        default=None,
        metadata={
            "help": "directory that python -m sekd_fairseq.build_cache wrote, with one folder a "
            "split; with several data directories (bin1:bin2) as many caches (cache1:cache2). "
            "Off by default: then the task is plain translation"
        },
    )


@register_task("self_evolution_kd", dataclass=SelfEvolutionKDConfig)
class SelfEvolutionKDTask(TranslationTask):  # type: ignore[misc]
    """Translation with a teacher cache.

    With ``--teacher-cache``, every loaded split is checked against its cache and each batch holds
    ``batch["teacher"]`` (:class:`~sekd_fairseq.data.TeacherDataset`). Without, it is fairseq's
    translation task with this fairseq's traps closed (:mod:`sekd_fairseq.compat`), for teachers,
    baselines and generation.
    """

    cfg: SelfEvolutionKDConfig

    def __init__(self, cfg: SelfEvolutionKDConfig, src_dict: Any, tgt_dict: Any) -> None:
        super().__init__(cfg, src_dict, tgt_dict)
        self.running_quantile: RunningQuantile | None = None
        if cfg.upsample_primary == -1:
            cfg.upsample_primary = 1  # fairseq's default of -1 fails when train and train1 combine

    @classmethod
    def setup_task(cls, cfg: SelfEvolutionKDConfig, **kwargs: Any) -> "SelfEvolutionKDTask":
        """Load dictionaries and check the caches' directories against the data's."""
        with one_line_errors():
            data, caches = utils.split_paths(cfg.data), cls._cache_roots(cfg)
            if caches and len(caches) != len(data):
                raise UserError(
                    f"--teacher-cache: expected one cache for each of {len(data)} data "
                    f"directories ({cfg.data}), found {len(caches)} ({cfg.teacher_cache})"
                )
            return super().setup_task(cfg, **kwargs)

    @staticmethod
    def _cache_roots(cfg: SelfEvolutionKDConfig) -> list[str]:
        return utils.split_paths(cfg.teacher_cache) if cfg.teacher_cache else []

    def load_dataset(
        self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any
    ) -> None:
        """Load a split, with its teacher cache if there is one."""
        super().load_dataset(split, epoch=epoch, combine=combine, **kwargs)
        self.datasets[split] = StableOrderDataset(self.datasets[split])
        roots = self._cache_roots(self.cfg)
        if not roots:
            return
        root = roots[(epoch - 1) % len(roots)] if split == self.cfg.train_subset else roots[0]
        dataset = self.datasets[split]
        with one_line_errors():
            parts = len(getattr(dataset.tgt, "datasets", [dataset.tgt]))
            names = [split + (str(part) if part else "") for part in range(parts)]
            caches = [self._open_cache(Path(root), name) for name in names]
            where = f"{self.cfg.target_lang} side of {split} ({self.cfg.data})"
            self.datasets[split] = TeacherDataset(dataset, caches, where)
        logger.info(
            "teacher cache %s: %d sentences, %d tokens",
            os.path.join(root, split),
            sum(len(cache) for cache in caches),
            sum(cache.manifest.tokens for cache in caches),
        )

    def _open_cache(self, root: Path, split: str) -> TeacherCache:
        if root.is_dir() and not (root / split).is_dir():
            built = sorted(path.name for path in root.iterdir() if path.is_dir())
            raise CacheError(
                f"{root}: expected the cache of split {split!r}, found {built or 'nothing'}; add "
                f"it with: python -m sekd_fairseq.build_cache {self.cfg.data} --path TEACHER "
                f"--output {root} --subset {split}"
            )
        cache = TeacherCache.open(root / split)
        cache.check_dictionary(self.tgt_dict.symbols)
        return cache

    def build_criterion(self, cfg: Any, from_checkpoint: bool = False) -> FairseqCriterion:
        """Build the criterion; its running threshold becomes part of the task's saved state."""
        criterion = super().build_criterion(cfg, from_checkpoint=from_checkpoint)
        self.running_quantile = getattr(criterion, "running_quantile", None)
        return criterion

    def reduce_metrics(self, logging_outputs: list[dict[str, Any]], criterion: Any) -> None:
        """Log, and after a training update move the running threshold of difficulty.

        This is where the sums over accumulation steps and processes are at hand, so the threshold
        is the same however a batch was split.
        """
        super().reduce_metrics(logging_outputs, criterion)
        if self.running_quantile is not None and criterion.training:
            hard = float(sum(log["hard"] for log in logging_outputs))
            tokens = float(sum(log["ntokens"] for log in logging_outputs))
            self.running_quantile.update(hard, tokens)

    def get_checkpoint_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the task: the running threshold."""
        if self.running_quantile is None:
            return {}
        return {type(self).__name__: {"running_gamma": self.running_quantile.value}}

    def set_checkpoint_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`get_checkpoint_dict` when a training resumes."""
        if self.running_quantile is not None and "running_gamma" in state:
            self.running_quantile.value = state["running_gamma"]

    def begin_epoch(self, epoch: int, model: Any) -> None:
        collect_before_fork()
        super().begin_epoch(epoch, model)

    def begin_valid_epoch(self, epoch: int, model: Any) -> None:
        collect_before_fork()
        super().begin_valid_epoch(epoch, model)

    def get_batch_iterator(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As fairseq's, but no sentence is dropped and batches are the same after a restart."""
        collect_before_fork()
        kwargs["required_batch_size_multiple"] = BATCH_SIZE_MULTIPLE
        if isinstance(dataset, StableOrderDataset):
            dataset.seed = kwargs.get("seed", dataset.seed)
        return super().get_batch_iterator(dataset, *args, **kwargs)
