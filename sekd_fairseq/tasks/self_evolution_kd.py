"""The task ``self_evolution_kd``: translation whose batches carry cached teacher distributions."""

import itertools
import logging
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq.criterions import FairseqCriterion
from fairseq.logging import metrics
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from torch import Tensor

from analysis.terminal import suggested
from sekd_fairseq.criterions.cross_entropy import OF_LANGUAGE_MODELS
from sekd_fairseq.criterions.distillation import DistillationCriterion
from sekd_fairseq.datasets import (
    StableOrderDataset,
    StoredDifficulty,
    TeacherDataset,
    teacher_tokens,
)
from sekd_fairseq.devices import half_precision
from sekd_fairseq.errors import CacheError, UserError, one_line_errors
from sekd_fairseq.llm.loading import remember_configuration
from sekd_fairseq.llm.text import LanguageModelText
from sekd_fairseq.llm.vocabulary import FILE
from sekd_fairseq.losses import TeacherTokens
from sekd_fairseq.models.hf_causal_lm import HFCausalLM
from sekd_fairseq.patches import BATCH_SIZE_MULTIPLE, collect_before_fork, patience_state
from sekd_fairseq.splits import count_sentences, read_whole, readable, stored_as, training_part
from sekd_fairseq.tasks.configuration import (
    SelfEvolutionKDTaskConfig,
    check_options,
    joined,
    paths,
)
from sekd_fairseq.teacher_cache import TeacherCache
from sekd_fairseq.teacher_cache.format import MANIFEST, parts_of
from sekd_fairseq.teacher_cache.storage import is_address, manifests_of, split_folder
from sekd_fairseq.teachers.online import OnlineTeacher, TeacherLogits

logger = logging.getLogger(__name__)


def on_host(logging_outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sums to log as numbers, fetched from a GPU at once.

    fairseq's meters look at each of them, some twenty times an update, and each look would wait.
    """
    tensors = [
        value for log in logging_outputs for value in log.values() if isinstance(value, Tensor)
    ]
    if not tensors:
        return logging_outputs
    numbers = iter(torch.stack([tensor.reshape(()) for tensor in tensors]).tolist())
    return [
        {key: next(numbers) if isinstance(value, Tensor) else value for key, value in log.items()}
        for log in logging_outputs
    ]


@register_task("self_evolution_kd", dataclass=SelfEvolutionKDTaskConfig)
class SelfEvolutionKDTask(TranslationTask):  # type: ignore[misc]
    """Translation with a teacher cache.

    With ``--teacher-cache``, every loaded split is checked against its cache and each batch holds
    ``batch["teacher"]`` (:class:`~sekd_fairseq.datasets.TeacherDataset`). Without, it is fairseq's
    translation task with fixes for known problems of fairseq (:mod:`sekd_fairseq.patches`), for
    teachers, baselines and generation.

    fairseq enters the plugin by this class, so an error of the user's ends the program in one line
    here and is an exception everywhere below.
    """

    cfg: SelfEvolutionKDTaskConfig
    #: :func:`~sekd_fairseq.patches.count_whole_updates` looks for this.
    counts_no_fillers = True

    def __init__(self, cfg: SelfEvolutionKDTaskConfig, src_dict: Any, tgt_dict: Any) -> None:
        super().__init__(cfg, src_dict, tgt_dict)
        self.criterion: FairseqCriterion | None = None
        #: What the criterion of a loaded checkpoint had learnt, for the one that is built next.
        self._learnt: dict[str, Any] = {}
        self.online_teacher: OnlineTeacher | None = None
        self._tail_law: Tensor | None = None
        #: Prompts and translations of a language model, once a command needs text.
        self.text: LanguageModelText | None = None
        self._knows_directories = False
        #: The longest source and target together that the model reads.
        self.joint_positions = math.inf
        if cfg.upsample_primary == -1:
            cfg.upsample_primary = 1  # fairseq's default of -1 fails when train and train1 combine

    @classmethod
    @one_line_errors()
    def setup_task(cls, cfg: SelfEvolutionKDTaskConfig, **kwargs: Any) -> "SelfEvolutionKDTask":
        """Load dictionaries and check the caches' directories against the data's."""
        check_options(cfg)
        return super().setup_task(cfg, **kwargs)

    @one_line_errors()
    def load_dataset(
        self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any
    ) -> None:
        """Load a split, with its teacher cache if there is one."""
        data = paths(self.cfg.data)
        earlier = [one for one in self.datasets.values() if isinstance(one, TeacherDataset)]
        turn = (epoch - 1) % len(data) if split == self.cfg.train_subset else 0
        with readable(self.cfg, data[turn], split):
            super().load_dataset(split, epoch=epoch, combine=combine, **kwargs)
        read_whole(self.datasets[split])
        self.datasets[split] = StableOrderDataset(
            self.datasets[split], one_row=self.joint_positions < math.inf
        )
        roots = paths(self.cfg.teacher_cache)
        if not roots:
            return
        root = roots[turn]
        dataset = self.datasets[split]
        parts = len(getattr(dataset.tgt, "datasets", [dataset.tgt]))
        names = list(itertools.islice(parts_of(split), parts))
        caches = [self._open_cache(root, name, turn) for name in names]
        if isinstance(self.criterion, DistillationCriterion):
            for cache in caches:
                self.criterion.check_cache(cache)
        where = f"{self.cfg.target_lang} side of {split} ({self.cfg.data})"
        difficulty = None
        if self.cfg.stored_difficulty and split == self.cfg.train_subset:
            if parts > 1:
                raise UserError(
                    f"--stored-difficulty: expected a training set of one part, found {parts} "
                    f"({', '.join(names)}); binarise them as one"
                )
            stored = paths(self.cfg.stored_difficulty)[turn]
            difficulty = [StoredDifficulty(Path(stored))]
        for other in earlier:
            for cache in caches:
                other.check_temperature(cache)
        self.datasets[split] = TeacherDataset(dataset, caches, where, difficulty)
        if split == self.cfg.train_subset and not self._knows_directories:
            self._check_other_directories(split, turn)
            self._knows_directories = True
        logger.info(
            "teacher cache %s: %d sentences, %d tokens",
            os.path.join(root, split),
            sum(len(cache) for cache in caches),
            sum(cache.manifest.tokens for cache in caches),
        )

    def _check_other_directories(self, split: str, turn: int) -> None:
        """Look at the training sets of all data directories but one, and their caches: fairseq loads each
        in an epoch of its own, long after the training began."""
        languages = self.cfg.source_lang, self.cfg.target_lang
        stored_difficulty = paths(self.cfg.stored_difficulty)
        for other, (data, root) in enumerate(
            zip(paths(self.cfg.data), paths(self.cfg.teacher_cache), strict=True)
        ):
            if other == turn:
                continue
            with readable(self.cfg, data, split):
                pass  # it is there
            for name in parts_of(split):
                stored = stored_as(data, name, *languages, self.cfg.target_lang)
                if stored is None:
                    break
                cache = self._open_cache(root, name, other)
                self.datasets[split].check_temperature(cache)
                where = f"{self.cfg.target_lang} side of {name} ({data})"
                cache.check_length(count_sentences(*stored, self.tgt_dict), where)
                if isinstance(self.criterion, DistillationCriterion):
                    self.criterion.check_cache(cache)
                if stored_difficulty:
                    StoredDifficulty(Path(stored_difficulty[other])).check_teacher(cache)

    def _open_cache(self, root: str, split: str, turn: int) -> TeacherCache:
        if not is_address(root) and not Path(root).is_dir():
            raise CacheError(
                f"{root}: expected a teacher cache, found no directory; give its place with "
                "--teacher-cache CACHE, or leave that out for plain translation"
            )
        folder = split_folder(root, split)
        if not folder.is_dir():
            built = sorted(path.name for path in Path(root).iterdir() if path.is_dir())
            words = ("python", "-m", "sekd_fairseq.build_cache", paths(self.cfg.data)[turn])
            command = suggested(*words, "--path", "TEACHER", "--output", root, "--subset", split)
            raise CacheError(
                f"{root}: expected the cache of split {split!r}, found {built or 'nothing'}; add "
                f"it with: {command}"
            )
        cache = TeacherCache.open(folder)
        cache.check_dictionary(self.tgt_dict.symbols)
        return cache

    @one_line_errors()
    def tail_law(self, device: torch.device) -> Tensor:
        """The weights of ``--missing-mass tail``, (V,): those of the training set's cache, or where that
        is not there of the split's.

        Raises
        ------
        UserError
            The parts of a split, or the data directories, have several teachers, each with a law of its own.
        """
        if self._tail_law is None:
            loaded = [one for one in self.datasets.values() if isinstance(one, TeacherDataset)]
            roots, split = paths(self.cfg.teacher_cache), self.cfg.train_subset
            sets = [[cache.manifest for cache in dataset.caches] for dataset in loaded]
            sets.append([one for root in roots for one in manifests_of(root, split)])
            for manifests in sets:
                models = [manifest.teacher.get("sha256") for manifest in manifests]
                if any(model != models[0] for model in models):
                    raise UserError(
                        "--missing-mass tail: expected one teacher, whose law it is, found several in "
                        f"{len(models)} caches (of data directories, or of parts of a split); take "
                        "--missing-mass bucket or uniform"
                    )
            directory = split_folder(roots[0], split)
            if (directory / MANIFEST).exists():
                cache = TeacherCache.open(directory)
            else:
                cache = loaded[0].caches[0]
            self._tail_law = torch.from_numpy(cache.tail_law())
        self._tail_law = self._tail_law.to(device)
        return self._tail_law

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        """Build the model; a language model leaves its configuration in ``cfg``, which fairseq
        keeps in the checkpoint.

        One that is loaded takes ``--bf16``, of which fairseq's generation and validation know
        nothing.
        """
        with one_line_errors():  # not as a decorator, because fairseq reads this signature
            return self._built(cfg, from_checkpoint)

    def _built(self, cfg: Any, from_checkpoint: bool) -> Any:
        model = super().build_model(cfg, from_checkpoint)
        model.shard_weights = self.cfg.shard_weights and not from_checkpoint
        if from_checkpoint and self.cfg.bf16:
            model.bfloat16()
        self.joint_positions = getattr(model, "joint_positions", math.inf)
        if self.cfg.eval_bleu and (text := self.build_bpe(None)) is not None:
            self.tokenizer = text  # a language model's BLEU is of text
        if isinstance(model, HFCausalLM):
            if self.cfg.truncate_source:
                raise UserError(
                    "--truncate-source: expected whole prompts for a language model; leave it "
                    "out, and give --skip-invalid-size-inputs-valid-test for long sentences"
                )
            if not from_checkpoint:
                remember_configuration(cfg, model)
            if model.shard_weights:
                # Whose batch shares a beginning runs the layers once more, and the others would
                # wait for it, or it for them.
                model.decoder.shared_prefix = math.inf
        return model

    @one_line_errors()
    def build_bpe(self, args: Any) -> Any:
        """As fairseq's; data of a language model have their own."""
        data = Path(paths(self.cfg.data)[0])
        if not (data / FILE).is_file():
            return super().build_bpe(args)
        if given := getattr(args, "_name", None):
            raise UserError(f"--bpe {given}: expected none for a language model's data ({data})")
        self.text = LanguageModelText(data, self.tgt_dict)
        return self.text

    @one_line_errors()
    def build_generator(self, models: Any, args: Any, *others: Any, **options: Any) -> Any:
        """As fairseq's; a language model has no attention from translation to source to print."""
        if getattr(args, "print_alignment", None) and any(
            isinstance(m, HFCausalLM) for m in models
        ):
            raise UserError(
                "--print-alignment: expected a model with an encoder, found a language model, which has no "
                "attention of its own to the source; leave it out"
            )
        return super().build_generator(models, args, *others, **options)

    def get_interactive_tokens_and_lengths(self, lines: list[str], encode_fn: Any) -> Any:
        """As fairseq's; a language model gets the prompts that its data have."""
        if self.text is None:
            return super().get_interactive_tokens_and_lengths(lines, encode_fn)
        tokens = [self.text.source(line) for line in lines]
        return tokens, [len(prompt) for prompt in tokens]

    @one_line_errors()
    def build_criterion(self, cfg: Any, from_checkpoint: bool = False) -> FairseqCriterion:
        """Build the criterion, with what it learnt before the checkpoint that the task was loaded
        from, and load the teacher where it is not a cache; of a language model, fairseq's cross
        entropies are this project's."""
        self.criterion = super().build_criterion(cfg, from_checkpoint=from_checkpoint)
        teacher = self.cfg.teacher_cache or self.cfg.teacher_path
        if teacher and type(self.criterion).__module__.startswith("fairseq."):
            flag = "--teacher-cache" if self.cfg.teacher_cache else "--teacher-path"
            raise UserError(
                f"{flag} {teacher}: has no effect with --criterion {cfg._name}, which knows no "
                "teacher; expected --criterion self_evolution_kd or cached_kd, or no teacher"
            )
        own = OF_LANGUAGE_MODELS.get(type(self.criterion))
        if own is not None and self.joint_positions < math.inf:
            self.criterion = own.build_criterion(cfg, self)
        if self._learnt and isinstance(self.criterion, DistillationCriterion):
            self.criterion.load_running_state(self._learnt)
        if self.cfg.teacher_path and isinstance(self.criterion, DistillationCriterion):
            dtype = half_precision(self.cfg.teacher_fp16, self.cfg.teacher_bf16)
            data = paths(self.cfg.data)[0]
            self.online_teacher = OnlineTeacher(self.cfg.teacher_path, data, dtype)
        return self.criterion

    def teacher_at(
        self, sample: dict[str, Any], positions: Tensor
    ) -> TeacherTokens | TeacherLogits:
        """The teacher at a batch's target tokens that are not padding, whose places in the flattened
        target are ``positions``, (N,): from the batch, or the teacher beside the student."""
        if self.online_teacher is not None:
            return self.online_teacher.at(sample, positions)
        return teacher_tokens(sample["teacher"])

    @one_line_errors()
    def train_step(
        self,
        sample: dict[str, Any],
        model: Any,
        criterion: Any,
        optimizer: Any,
        update_num: int,
        ignore_grad: bool = False,
    ) -> Any:
        """As fairseq's. Of a batch that is there to fill up an update a criterion is told, and nothing
        is counted; of a language model's batch is also logged how much of it is padding."""
        criterion.counted = not ignore_grad
        loss, sample_size, logging_output = super().train_step(
            sample, model, criterion, optimizer, update_num, ignore_grad
        )
        if "positions" in sample:
            logging_output["positions"], logging_output["padding"] = sample["positions"]
        if ignore_grad:
            sample_size = 0
            # Tensors stay tensors: processes add up theirs and plain numbers apart.
            logging_output = {
                key: torch.zeros_like(value) if isinstance(value, Tensor) else 0
                for key, value in logging_output.items()
            }
        return loss, sample_size, logging_output

    @one_line_errors()
    def valid_step(self, sample: dict[str, Any], model: Any, criterion: Any) -> Any:
        """As fairseq's."""
        return super().valid_step(sample, model, criterion)

    @one_line_errors()
    def inference_step(self, *args: Any, **kwargs: Any) -> Any:
        """As fairseq's."""
        return super().inference_step(*args, **kwargs)

    def reduce_metrics(self, logging_outputs: list[dict[str, Any]], criterion: Any) -> None:
        """Log, and end the update for a criterion that keeps a state over updates.

        This is where the sums over accumulation steps and processes are at hand, so a running
        threshold is the same however a batch was split. ``padding``, of a language model in training:
        the share of computed positions that are padding.
        """
        logging_outputs = on_host(logging_outputs)
        super().reduce_metrics(logging_outputs, criterion)
        if "positions" in logging_outputs[0]:
            positions, padding = (
                sum(log[key] for log in logging_outputs) for key in ("positions", "padding")
            )
            metrics.log_scalar("padding", padding / positions, positions, round=4)
        if criterion.training and isinstance(criterion, DistillationCriterion):
            criterion.end_update(logging_outputs)

    # A checkpoint keeps what the criterion learnt twice, because fairseq hands a training that
    # resumes the one (after it has built the criterion), and every other command the other (before).

    def get_checkpoint_dict(self) -> dict[str, Any]:
        """What a training that resumes goes on with: the criterion's state over updates, and the count
        of ``--patience``."""
        kept = {type(self).__name__: self.state_dict().get("criterion")}
        kept["early_stopping"] = patience_state()
        return {name: state for name, state in kept.items() if state}

    def set_checkpoint_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`get_checkpoint_dict`."""
        if isinstance(self.criterion, DistillationCriterion):
            self.criterion.load_running_state(state)

    def state_dict(self) -> dict[str, Any]:
        """The criterion's state over updates, for ``fairseq-validate`` and its like, and where
        relative paths start."""
        state: dict[str, Any] = {"directory": os.getcwd()}
        if isinstance(self.criterion, DistillationCriterion):
            state["criterion"] = self.criterion.running_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the criterion's part of :meth:`state_dict` for :meth:`build_criterion`; relative paths
        start where the checkpoint was trained, unless they lead somewhere from here."""
        self._learnt = state.get("criterion", {})
        for name in ("teacher_cache", "teacher_path"):
            found = [
                path
                if is_address(path) or os.path.exists(path)
                else os.path.join(state.get("directory", ""), path)
                for path in paths(getattr(self.cfg, name))
            ]
            setattr(self.cfg, name, joined(found))

    @one_line_errors()
    def eval_lm_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """fairseq-eval-lm calls this of every task."""
        raise UserError(
            "fairseq-eval-lm: expected a task of language modelling, found self_evolution_kd, whose "
            "data have two sides; perplexity of translations: fairseq-validate DATA --user-dir "
            "sekd_fairseq --task self_evolution_kd --path CHECKPOINT --valid-subset test"
        )

    def begin_epoch(self, epoch: int, model: Any) -> None:
        """Before the loader workers of an epoch are forked."""
        collect_before_fork()
        super().begin_epoch(epoch, model)

    def begin_valid_epoch(self, epoch: int, model: Any) -> None:
        """Before the loader workers of a validation are forked."""
        collect_before_fork()
        super().begin_valid_epoch(epoch, model)

    def max_positions(self) -> tuple[float, float]:
        """As fairseq's, but its default of 1,024 is no limit of a language model, which has its own."""
        given = super().max_positions()
        if self.joint_positions == math.inf:
            return given
        usual = (TranslationConfig.max_source_positions, TranslationConfig.max_target_positions)
        source, target = (
            math.inf if limit == default else limit
            for limit, default in zip(given, usual, strict=True)
        )
        return source, target

    @one_line_errors()
    def filter_indices_by_size(
        self,
        indices: Any,
        dataset: Any,
        max_positions: Any = None,
        ignore_invalid_inputs: bool = False,
    ) -> Any:
        """As fairseq's, but a set of which nothing is left is an error that says so, a sentence must fit
        a batch, and of a language model prompt and translation the model's positions together."""
        wanted = self.cfg.train_sentences
        if wanted and dataset is self.datasets.get(self.cfg.train_subset):
            if wanted > len(dataset):
                raise UserError(
                    f"--train-sentences {wanted}: expected at most the {len(dataset)} sentences of "
                    f"{self.cfg.train_subset}"
                )
            indices = indices[np.isin(indices, training_part(len(dataset), wanted))]
        try:
            kept = super().filter_indices_by_size(
                indices, dataset, max_positions, ignore_invalid_inputs
            )
        except Exception as error:
            if type(error) is not Exception:
                raise
            raise UserError(str(error)) from error  # fairseq's own of sizes, which says it all
        sizes = dataset.sizes  # (n, 2), or without targets (n,)
        together = (sizes.sum(axis=1) if sizes.ndim == 2 else sizes)[kept]
        fits = together <= self.joint_positions
        if not fits.all() and not ignore_invalid_inputs:
            raise UserError(
                f"sentence {kept[~fits][0]}: prompt and translation have {together[~fits][0]} "
                f"tokens, but the model takes {self.joint_positions} ({(~fits).sum()} such "
                "sentences); take them out, or give --skip-invalid-size-inputs-valid-test"
            )
        if not fits.all():
            logger.warning(
                "%d sentences are left out: prompt and translation together are longer than the "
                "model's %d positions",
                (~fits).sum(),
                self.joint_positions,
            )
            kept = kept[fits]
        kept = self._that_fit_a_batch(kept, dataset, ignore_invalid_inputs)
        if len(indices) and not len(kept):
            raise UserError(
                f"all {len(indices)} sentences are longer than the model's positions "
                f"{max_positions} or than --max-tokens; expected some that fit: give the model more "
                "positions, or shorten the sentences (of a language model, the prompt)"
            )
        return kept

    @staticmethod
    def _that_fit_a_batch(indices: Any, dataset: Any, ignore_invalid_inputs: bool) -> Any:
        """Sentences of at most ``--max-tokens``, which fairseq cuts no batch of otherwise."""
        limit = getattr(dataset, "max_tokens", None)
        if not limit:
            return indices
        tokens = dataset.num_tokens_vec(indices)
        fits = tokens <= limit
        if fits.all():
            return indices
        if not ignore_invalid_inputs:
            raise UserError(
                f"sentence {indices[~fits][0]} has {tokens[~fits][0]} tokens (of a language model, prompt "
                f"and translation together), but --max-tokens is {limit} ({(~fits).sum()} such "
                f"sentences); give --max-tokens (or --max-tokens-valid) {tokens.max()}, take them out, or give "
                "--skip-invalid-size-inputs-valid-test"
            )
        logger.warning(
            "%d of %d sentences are left out: longer than a batch, --max-tokens %d",
            (~fits).sum(),
            len(fits),
            limit,
        )
        return indices[fits]

    def get_batch_iterator(
        self, dataset: Any, max_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As fairseq's, but no sentence is dropped and batches are the same after a restart, and of
        several data directories loader workers end with their epoch: the next has another data set, and
        torch waits 5 s for workers that it finds among the garbage."""
        collect_before_fork()
        kwargs["required_batch_size_multiple"] = BATCH_SIZE_MULTIPLE
        if isinstance(dataset, StableOrderDataset):
            dataset.seed = kwargs.get("seed", dataset.seed)
            dataset.max_tokens = max_tokens
        iterator = super().get_batch_iterator(dataset, max_tokens, *args, **kwargs)
        if len(paths(self.cfg.data)) > 1:
            iterator.persistent_workers = False
        return iterator
