"""What of fairseq 0.12 and torch is fixed for current Python, torch and NumPy: :data:`PATCHES`.

Beside that, :data:`BATCH_SIZE_MULTIPLE`, :func:`collect_before_fork` and :func:`patience_state` are what
the task calls, and :func:`take_rows_as_one_sequence` what a language model does, because importing
transformers takes seconds.
"""

import argparse
import collections
import functools
import gc
import logging
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from fairseq import checkpoint_utils, options
from fairseq.data import indexed_dataset
from fairseq.distributed import utils as fairseq_distributed
from fairseq.models.ema import EMA
from fairseq.ngram_repeat_block import NGramRepeatBlock
from fairseq.optim import AMPOptimizer, FP16Optimizer
from fairseq.trainer import Trainer
from omegaconf import DictConfig, ListConfig
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.nodes import AnyNode

from sekd_fairseq.errors import UserError, one_line_errors
from sekd_fairseq.run_lock import hold_for_training
from sekd_fairseq.settings import check_settings, remember_teacher
from sekd_fairseq.sharding import shard_weights

logger = logging.getLogger(__name__)

#: Adam moves a weight by about the learning rate. Half the distance of bfloat16 numbers about 0.02, the
#: usual size of a pretrained weight, is 3e-5: at 3e-5 two thirds of the weights stay where they are.
LEAST_RATE = 1e-4

#: torch >= 2.6 loads checkpoints with ``weights_only=True`` and refuses unknown types. These are
#: plain containers that fairseq puts into a checkpoint; the check itself stays on.
CHECKPOINT_TYPES: tuple[Any, ...] = (
    argparse.Namespace,  # resume, generate, validate of a model trained from the command line
    # --eval-bleu stores its counts as NumPy arrays:
    np.ndarray,
    np.dtype,
    np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    np._core.multiarray.scalar,  # type: ignore[attr-defined]
    *(type(np.dtype(kind)) for kind in (np.int32, np.int64, np.float32, np.float64)),
    # A checkpoint that rank 0 broadcasts to the other processes:
    fairseq_distributed._TensorPlaceholder,
    DictConfig,
    ListConfig,
    ContainerMetadata,
    Metadata,
    AnyNode,
    Any,
    dict,
    list,
    int,
    collections.defaultdict,
)


#: Where an optimiser's state, as it is saved, has the float32 weight that it updates.
WEIGHT = "float32_weight"


def allow_checkpoint_types() -> None:
    """Let torch load what fairseq saves (:data:`CHECKPOINT_TYPES`), and nothing else."""
    torch.serialization.add_safe_globals(list(CHECKPOINT_TYPES))


@functools.cache
def keep_checkpoints_whole() -> None:
    """Replace three functions of fairseq that a killed training, or its user, would suffer from.

    ``checkpoint_last.pt`` is a copy of the checkpoint just written, and fairseq copies onto it in
    place: killed in that instant, a training cannot go on. And where it meets a damaged checkpoint,
    it says "please ensure that the architectures match" or shows a traceback, as it does where
    ``--save-dir`` cannot be written to.

    A checkpoint is also mapped into memory in place of read: what is not looked at, as the state of the
    optimiser where a model is only to translate or to score, is three times the model or more.
    """
    checkpoint_utils.PathManager.copy = staticmethod(_copy_whole)
    load = checkpoint_utils.load_checkpoint_to_cpu

    @functools.wraps(load)
    def load_or_name(path: str, *args: Any, **kwargs: Any) -> Any:
        try:
            with _files_mapped():
                return load(path, *args, **kwargs)
        except (RuntimeError, EOFError, zipfile.BadZipFile) as error:
            reason = " ".join(str(error).split())[:200]
            with one_line_errors():
                raise UserError(
                    f"{path}: expected a whole checkpoint, found a damaged one ({reason}); delete it, "
                    "or go on from another with --restore-file"
                ) from error

    checkpoint_utils.load_checkpoint_to_cpu = load_or_name
    verify = checkpoint_utils.verify_checkpoint_directory

    @functools.wraps(verify)
    def verify_or_name(save_dir: str) -> None:
        with one_line_errors():
            verify(save_dir)

    checkpoint_utils.verify_checkpoint_directory = verify_or_name


@contextmanager
def _files_mapped() -> Iterator[None]:
    """Let ``torch.load`` map an open file into memory where that can be."""
    load = torch.load

    def load_mapped(file: IO[bytes], **options: Any) -> Any:
        try:
            return load(file.name, mmap=True, **options)
        except RuntimeError:  # torch's format before 1.6, a file system that maps nothing, damage
            return load(file, **options)

    torch.load = load_mapped  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.load = load


@functools.cache
def resume_as_left() -> None:
    """Put right how fairseq goes on with a training.

    It does so whatever the settings are now: others are refused (:mod:`sekd_fairseq.settings`). It does so
    beside another process that writes the same checkpoints: that is refused (:mod:`sekd_fairseq.run_lock`).
    It looks at ``--max-update`` only after an update, so that each new start of a finished training
    would make one more: that ends at once, and one that has made more than so many updates is refused.
    ``--patience`` counts from nothing after each start: the count is restored, and a training that ran out
    of patience has ended. And with ``--reset-dataloader``, for other data, it goes on with the optimiser
    but not with what the criterion has learnt over updates.
    """
    load = checkpoint_utils.load_checkpoint

    @functools.wraps(load)
    def load_as_left(cfg: Any, trainer: Any, **kwargs: Any) -> Any:
        with one_line_errors():
            if fairseq_distributed.is_master(trainer.cfg.distributed_training) and not cfg.no_save:
                hold_for_training(Path(cfg.save_dir))
            check_precision(trainer)
            check_validation(trainer.cfg)
            remember_teacher(trainer.cfg)
            last_one = Path(cfg.save_dir) / f"checkpoint_last{trainer.checkpoint_suffix}.pt"
            resets = ("optimizer", "lr_scheduler", "meters", "dataloader")
            deliberate = cfg.restore_file != "checkpoint_last.pt" or any(
                getattr(cfg, f"reset_{name}") for name in resets
            )
            if last_one.is_file() and not deliberate:
                check_settings(last_one, trainer.cfg)
            begins = cfg.finetune_from_model is not None and not last_one.is_file()
        with one_line_errors():
            loaded = _loaded(load, cfg, trainer, **kwargs)
        updates, last = trainer.get_num_updates(), trainer.cfg.optimization.max_update
        if 0 < last < updates and not deliberate:
            with one_line_errors():
                raise UserError(
                    f"{last_one}: expected at most --max-update {last} updates, found {updates}; give another "
                    "--save-dir to train anew, or a larger --max-update"
                )
        if 0 < last <= updates:
            logger.info("done training before: %d updates of --max-update %d", updates, last)
            raise SystemExit(0)
        extra_state, _ = loaded
        # A training on other data (--reset-dataloader) has a patience of its own.
        anew = begins or cfg.reset_optimizer or cfg.reset_meters or cfg.reset_dataloader
        if extra_state and not anew:
            restore_patience(extra_state.get("early_stopping", {}))
            without_gain = patience_state().get("num_runs", 0)
            if 0 < cfg.patience <= without_gain:
                logger.info("done training before: no gain in %d validations", without_gain)
                raise SystemExit(0)
        if extra_state and cfg.reset_dataloader and not cfg.reset_optimizer:
            state = extra_state.get(type(trainer.task).__name__)
            if state and hasattr(trainer.task, "set_checkpoint_dict"):
                trainer.task.set_checkpoint_dict(state)
        return loaded

    checkpoint_utils.load_checkpoint = load_as_left


def _loaded(load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What fairseq's ``load_checkpoint`` returns; ``UserError`` where the options or the file do not fit."""
    try:
        return load(*args, **kwargs)
    except Exception as error:
        # fairseq's own: another architecture, a file that is not there, options that do not go together.
        if type(error) is not Exception and not str(error).startswith("--finetune-from-model"):
            raise
        reason = " ".join(str(error.__context__ or "").split())[:300]
        raise UserError(f"{str(error)[:300]}{reason and f' ({reason})'}") from error


def check_validation(cfg: Any) -> None:
    """Refuse what fairseq would find in its first validation, after an epoch, or not at all.

    That is ``--valid-subset`` beside ``--combine-valid-subsets``, which loads valid, valid1, ... as one; to
    choose the best checkpoint by what is not logged; and ``--patience`` that counts validations which no
    checkpoint is kept of.
    """
    dataset = cfg.dataset
    if dataset.disable_validation:
        return
    if dataset.combine_valid_subsets and dataset.valid_subset != "valid":
        raise UserError(
            "--combine-valid-subsets: validates on valid, valid1, ... as one set, expected no "
            f"--valid-subset with it, found {dataset.valid_subset}; leave out one of the two"
        )
    metric = cfg.checkpoint.best_checkpoint_metric
    if metric == "bleu" and not getattr(cfg.task, "eval_bleu", True):
        raise UserError(
            "--best-checkpoint-metric bleu: expected --eval-bleu with it, found none; add it, or take nll_loss"
        )
    every, saved = dataset.validate_interval_updates, cfg.checkpoint.save_interval_updates
    if cfg.checkpoint.patience > 0 and every > 0 and (saved <= 0 or every % saved):
        raise UserError(
            f"--validate-interval-updates {every} with --patience: expected --save-interval-updates {every} "
            f"--keep-interval-updates 1 beside it, found --save-interval-updates {saved}; fairseq keeps "
            "nothing of the validations between, so the best of them would be lost"
        )
    per_token = not cfg.optimization.sentence_avg
    if metric == "nll_loss" and cfg.criterion._name == "cross_entropy" and per_token:
        raise UserError(
            "--best-checkpoint-metric nll_loss: --criterion cross_entropy logs loss alone, which is the same; "
            "expected --best-checkpoint-metric loss, or --criterion label_smoothed_cross_entropy "
            "--label-smoothing 0"
        )


def _early_stopping() -> Any:
    """fairseq's function that ``--patience`` is counted in, as attributes; it belongs to the command."""
    for name in ("__main__", "fairseq_cli.train"):
        if found := getattr(sys.modules.get(name), "should_stop_early", None):
            return found
    return None


def patience_state() -> dict[str, Any]:
    """The best validation so far (``best``) and how many since were no better (``num_runs``)."""
    counter = _early_stopping()
    return dict(vars(counter)) if counter else {}


def restore_patience(state: dict[str, Any]) -> None:
    """Let ``--patience`` count on from :func:`patience_state`."""
    if counter := _early_stopping():
        vars(counter).update(state)


def check_precision(trainer: Any) -> None:
    """Refuse two options on a CPU: fairseq's ``--fp16`` asks CUDA for a device there, and its
    ``--amp`` trains in float32 in silence. Warn where updates get lost."""
    common = trainer.cfg.common
    rates = trainer.cfg.optimization.lr
    pretrained = getattr(trainer.cfg.model, "hf_model", None)
    if pretrained and common.memory_efficient_bf16 and min(rates) < LEAST_RATE:
        logger.warning(
            "--memory-efficient-bf16 with --lr %g: weights are kept in bfloat16, where most of such small "
            "updates round to nothing; give --bf16, which keeps them in single precision too",
            min(rates),
        )
    asked = {"--fp16": common.fp16 and not common.memory_efficient_fp16, "--amp": common.amp}
    for option, given in asked.items():
        if given and not trainer.cuda:
            raise UserError(
                f"{option}: expected a GPU, found {'--cpu' if common.cpu else 'none'}; leave it out, "
                "or give --bf16, which works on a CPU too"
            )


@functools.cache
def train_in_half_precision() -> None:
    """Put right what fairseq does with two of its options.

    ``--bf16`` makes it take the machine for a TPU, and ask a package for one that is not there.
    With ``--amp`` gradients are divided by the loss scale twice: once when they are clipped, for
    torch's optimiser, and again in the step, for fairseq's, which the scaler takes for another.
    """
    AMPOptimizer.step = _step_unscaled
    parse = options.parse_args_and_arch

    @functools.wraps(parse)
    def parse_for_gpus(parser: Any, input_args: Any = None, *args: Any, **kwargs: Any) -> Any:
        parsed = parse(parser, input_args, *args, **kwargs)
        found = parsed[0] if isinstance(parsed, tuple) else parsed
        if getattr(found, "tpu", False):
            found.tpu = "--tpu" in (sys.argv if input_args is None else input_args)
        return parsed

    options.parse_args_and_arch = parse_for_gpus


def _step_unscaled(optimizer: AMPOptimizer) -> None:
    """fairseq's ``AMPOptimizer.step``, for the optimiser whose gradients have been scaled back."""
    optimizer.scaler.step(optimizer.optimizer)
    optimizer.scaler.update()


@functools.cache
def resume_in_full_precision() -> None:
    """Save the float32 weights that ``--bf16`` and ``--fp16`` update, and resume with them.

    fairseq saves the model's, in half precision, and begins again from these: what updates have added up
    below their last digit is lost.
    """
    save, load = FP16Optimizer.state_dict, FP16Optimizer.load_state_dict

    def weights(optimizer: Any) -> list[Any]:
        groups = optimizer.fp32_optimizer.optimizer.param_groups
        return [weight for group in groups for weight in group["params"]]  # as torch numbers them

    @functools.wraps(save)
    def state_dict(self: Any) -> dict[str, Any]:
        found: dict[str, Any] = save(self)
        if "state" not in found:  # --optimizer composite
            return found
        known = found["state"]
        with_weights = {
            number: {**known.get(number, {}), WEIGHT: weight.detach()}
            for number, weight in enumerate(weights(self))
        }
        return {**found, "state": with_weights}

    @functools.wraps(load)
    def load_state_dict(self: Any, found: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        kept = {n: of.get(WEIGHT) for n, of in found.get("state", {}).items()}
        if any(weight is not None for weight in kept.values()):
            rest = {
                n: {k: v for k, v in of.items() if k != WEIGHT} for n, of in found["state"].items()
            }
            found = {**found, "state": {n: of for n, of in rest.items() if of}}
            half, now = self.fp16_params[0].dtype, weights(self)
            saved = [kept.get(number) for number in range(len(now))]
            # Not those of another model, such as an average of checkpoints: rounded, they are the model's.
            # Those that the model has in single precision are so as they are.
            if all(
                own is not None
                and (own.to(weight).to(half).float().eq(weight) | own.to(weight).eq(weight)).all()
                for own, weight in zip(saved, now, strict=True)
            ):
                for own, weight in zip(saved, now, strict=True):
                    weight.data.copy_(own)
        load(self, found, *args, **kwargs)

    FP16Optimizer.state_dict, FP16Optimizer.load_state_dict = state_dict, load_state_dict


@functools.cache
def count_whole_updates() -> None:
    """Let a process count all its tokens in the last update of an epoch.

    Where the batches of an epoch do not fill that, fairseq gives some processes a batch for show, as
    their last, and then counts none of their tokens, whose gradient is there all the same: with
    ``--update-freq`` the update is too large. Here the one for show comes first, and the task counts
    nothing of it (``counts_no_fillers``).
    """
    step = Trainer.train_step

    @functools.wraps(step)
    def train_step(self: Trainer, samples: list[Any], *args: Any, **kwargs: Any) -> Any:
        if getattr(self.task, "counts_no_fillers", False):
            samples = sorted(samples, key=bool)
        return step(self, samples, *args, **kwargs)

    Trainer.train_step = train_step


def average_weights_once() -> None:
    """Let ``--store-ema`` average each weight once an update, and copy what is no floating-point number.

    fairseq does so once for each name in the model's state: of embeddings that encoder, decoder and
    output share three times, each with ``--ema-decay``. And it cannot multiply integers, of which a
    language model has some (the rows of its vocabulary).
    """
    EMA._step_internal = _average_weights


def _average_weights(ema: EMA, new_model: Any, updates: int | None = None) -> None:
    """fairseq's ``EMA._step_internal``."""
    averages = dict(ema.fp32_params if ema.config.ema_fp32 else ema.model.state_dict())
    done = set()
    for name, weight in new_model.state_dict().items():
        average = averages[name]
        if average.data_ptr() in done:
            continue
        done.add(average.data_ptr())
        if average.is_floating_point():
            average.lerp_(weight.to(average), 1 - ema.get_decay())
        else:
            average.copy_(weight)
    ema.restore(averages, build_fp32_params=False)


@functools.cache
def forbid_repeats() -> None:
    """Let ``--no-repeat-ngram-size`` see the tokens so far.

    Where fairseq's CUDA extension is not built, it compares with the end of the buffer that tokens are
    written to, which is padding, and forbids nothing.
    """
    forbid = NGramRepeatBlock._no_repeat_ngram

    @functools.wraps(forbid)
    def forbid_after(
        self: NGramRepeatBlock, tokens: Any, lprobs: Any, bsz: int, beam_size: int, step: int
    ) -> Any:
        return forbid(self, tokens[:, : step + 1], lprobs, bsz, beam_size, step)

    NGramRepeatBlock._no_repeat_ngram = forbid_after


def _copy_whole(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
    """fairseq's ``PathManager.copy``, so that the destination never holds a part."""
    if os.path.exists(dst_path) and not overwrite:
        return False
    shutil.copyfile(src_path, f"{dst_path}.tmp")
    os.replace(f"{dst_path}.tmp", dst_path)
    return True


#: Batches must be built with this ``required_batch_size_multiple``: with fairseq's default of 8,
#: some builds of fairseq drop a whole last batch whose size is not a multiple, so of 100 test
#: sentences 96 are translated, and nothing is said.
BATCH_SIZE_MULTIPLE = 1


def collect_before_fork() -> None:
    """Collect garbage before loader workers are forked.

    Otherwise an old epoch iterator may be collected inside a worker, which then tries to join the
    workers of its parent and dies ("can only test a child process", EOFError).
    """
    gc.collect()


def attend_without_plans() -> None:
    """Leave cuDNN out of torch's choice of attention.

    With a padding mask torch asks cuDNN first on Hopper and Blackwell, which compiles a plan for every
    shape of batch that it has not seen, some tenths of a second forward and backward. Sentences give
    nearly every batch a shape of its own: on an H200 (torch 2.11) updates of a transformer-base took
    0.45 s on new shapes and 0.10 s on known ones. ``TORCH_CUDNN_SDPA_AVOID_RECOMPILE=1``, torch's own
    switch for plans that fit all lengths, keeps cuDNN.
    """
    if os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE") != "1":
        torch.backends.cuda.enable_cudnn_sdp(False)


def take_rows_as_one_sequence() -> None:
    """Tell transformers that no row holds several sequences.

    Where there is no mask it looks for such rows, which a GPU has to be waited for, and makes a mask of
    what it finds, whatever that is. With a mask torch cannot take its fastest attention, and keys and
    values are repeated for each head. Nothing here packs sequences into rows.
    """
    try:
        from transformers import masking_utils
    except ImportError:  # before 4.53, which looks for none
        return
    masking_utils.find_packed_sequence_indices = _no_packed_sequences  # type: ignore[assignment]


def _no_packed_sequences(position_ids: torch.Tensor) -> None:
    """transformers' ``find_packed_sequence_indices``, of rows of one sequence each."""


@functools.cache
def merge_large_files() -> None:
    """Let several workers of fairseq-preprocess write more than 2 GiB.

    The lengths of sentences that a worker wrote come back as NumPy integers of 32 bits, and so, since
    NumPy 2, do their sums, the places of sentences in the file.
    """
    builder = indexed_dataset.MMapIndexedDatasetBuilder
    merge = builder.merge_file_

    @functools.wraps(merge)
    def merge_exactly(self: Any, other: str) -> None:
        merge(self, other)
        self._sizes = [int(size) for size in self._sizes]

    builder.merge_file_ = merge_exactly


class Patch(NamedTuple):
    """One fix.

    Attributes
    ----------
    apply
        Does it, once however often it is called; its docstring has the details.
    what
        The function or class that is changed.
    why
        What happens otherwise.
    """

    apply: Callable[[], None]
    what: str
    why: str


PATCHES = (
    Patch(
        allow_checkpoint_types,
        "torch.serialization",
        "torch refuses the types that fairseq saves in a checkpoint",
    ),
    Patch(
        keep_checkpoints_whole,
        "PathManager.copy, checkpoint_utils.load_checkpoint_to_cpu and verify_checkpoint_directory",
        "a kill leaves half of checkpoint_last.pt, a damaged file is called another architecture, and the "
        "optimiser's state is read to translate",
    ),
    Patch(
        resume_as_left,
        "checkpoint_utils.load_checkpoint",
        "a training resumes under other settings, without its patience, after its end, and twice at a time",
    ),
    Patch(
        train_in_half_precision,
        "AMPOptimizer.step, options.parse_args_and_arch",
        "--amp scales gradients back twice, and --bf16 asks for a TPU",
    ),
    Patch(
        resume_in_full_precision,
        "FP16Optimizer.state_dict and load_state_dict",
        "with --bf16 and --fp16 a resumed training begins from rounded weights",
    ),
    Patch(
        count_whole_updates,
        "Trainer.train_step",
        "with --update-freq on several GPUs the last update of an epoch is too large",
    ),
    Patch(
        average_weights_once,
        "EMA",
        "--store-ema averages shared embeddings three times an update, and fails with integers",
    ),
    Patch(
        forbid_repeats,
        "NGramRepeatBlock",
        "--no-repeat-ngram-size has no effect",
    ),
    Patch(
        attend_without_plans,
        "torch.backends.cuda",
        "cuDNN's attention compiles a plan for each new shape of batch, which takes longer than the update",
    ),
    Patch(
        merge_large_files,
        "MMapIndexedDatasetBuilder.merge_file_",
        "fairseq-preprocess --workers writes wrong places of sentences beyond 2 GiB",
    ),
    Patch(
        shard_weights,
        "DistributedFairseqModel, Trainer._build_optimizer, consolidate_optimizer and clip_grad_norm",
        "sharded weights need fairscale, which is no longer maintained",
    ),
)


def apply_all() -> None:
    """Apply all :data:`PATCHES`."""
    for patch in PATCHES:
        patch.apply()
