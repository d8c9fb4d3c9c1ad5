"""Running checkpoints over a dataset, for the commands that build caches and score students."""

import argparse
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq import checkpoint_utils, options, utils
from fairseq.data import FairseqDataset, data_utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from torch import Tensor

from sekd_fairseq.errors import UserError
from sekd_fairseq.splits import read_whole, readable


def load_models(
    paths: Sequence[str], data: str, device: torch.device, hf_model: str | None = None
) -> tuple[list[Any], Any, Any]:
    """Load checkpoints of one task, in eval mode on ``device``.

    Parameters
    ----------
    paths
        Checkpoint files; several form an ensemble.
    data
        The data directory whose dictionaries they must fit (instead of the one they were trained
        on).
    hf_model
        Where the language model is that adapters were trained on, if it has moved.

    Returns
    -------
    models, config, task
        The task has no teacher cache and no dataset loaded.

    Raises
    ------
    UserError
        A file that is missing or no fairseq checkpoint, or a model for other dictionaries.
    """
    # Registers the task and lets torch load checkpoints; here, because the task uses this module.
    import sekd_fairseq.tasks  # noqa: F401

    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"--path: expected a fairseq checkpoint, found no file at {path}")
    overrides: dict[str, Any] = {"data": data, "bf16": False, "num_batch_buckets": 0}
    overrides |= dict.fromkeys(("teacher_cache", "teacher_path", "stored_difficulty"))
    if hf_model:
        overrides["hf_model"] = hf_model
    try:
        models, config, task = checkpoint_utils.load_model_ensemble_and_task(
            list(paths), arg_overrides=overrides
        )
    except FileNotFoundError as error:
        raise UserError(
            f"{data}: expected a fairseq data directory, found none ({error})"
        ) from error
    except RuntimeError as error:
        # torch reports both a broken archive and shapes that do not fit as RuntimeError.
        reason = " ".join(str(error).split())
        raise UserError(
            f"{paths[0]}: cannot be loaded for the dictionaries of {data}: {reason[:300]}"
        ) from error
    except Exception as error:  # the unpickler's own errors share no base class
        raise UserError(
            f"{paths[0]}: not a checkpoint that can be loaded ({' '.join(f'{type(error).__name__}: {error}'.split())[:300]})"
        ) from error
    for model in models:
        model.eval().to(device)
    return models, config, task


def add_hf_model(parser: argparse.ArgumentParser) -> None:
    """``--hf-model``, for commands that load checkpoints (:func:`load_models`)."""
    parser.add_argument(
        "--hf-model",
        metavar="FOLDER",
        help="where the language model is that a checkpoint's adapters (--lora-r) were trained on, "
        "if it has moved",
    )


def language_model_config(data: str, *options_of_model: str) -> Any:
    """fairseq's configuration of a training of ``--arch hf_causal_lm`` on ``data``."""
    import sekd_fairseq.tasks  # noqa: F401 (as above)

    words = [data, "--task", "self_evolution_kd", "--arch", "hf_causal_lm", *options_of_model]
    args = options.parse_args_and_arch(options.get_training_parser(), input_args=words)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fairseq calls hydra in ways that hydra has left behind
        return convert_namespace_to_omegaconf(args)


def load_split(task: Any, split: str, data: str) -> FairseqDataset:
    """Load one split of the task's data; ``UserError`` if it is not there."""
    with readable(task.cfg, utils.split_paths(data)[0], split):
        task.load_dataset(split)
    dataset = task.dataset(split)
    read_whole(dataset)
    return dataset


def token_batches(dataset: FairseqDataset, sentences: Any, max_tokens: int) -> list[list[int]]:
    """Batches of sentences of similar length, at most ``max_tokens`` padded tokens a side, of a
    language model's data at most so many positions of prompt and translation together."""
    indices = np.asarray(sentences, dtype=np.int64)
    sizes = dataset.sizes[indices]  # (n, 2): source, target
    together = getattr(dataset, "one_row", False)
    indices = indices[np.lexsort((sizes[:, 0], sizes.sum(axis=1) if together else sizes[:, 1]))]
    lengths = dataset.num_tokens_vec(indices).astype(np.int64)
    longest = int(lengths.max()) if len(lengths) else 0
    batches = data_utils.batch_by_size(
        indices,
        num_tokens_fn=None,
        num_tokens_vec=lengths,
        max_tokens=max(max_tokens, longest),
        required_batch_size_multiple=1,
    )
    return [list(batch) for batch in batches]


def position_limits(models: Sequence[Any]) -> list[tuple[float, ...]]:
    """The longest source, target, and both together that each model reads."""
    limits = []
    for model in models:
        found = utils.resolve_max_positions(model.max_positions())
        pair = found if isinstance(found, tuple) else (found, found)
        limits.append((*pair, getattr(model, "joint_positions", math.inf)))
    return limits


def too_long(
    dataset: FairseqDataset,
    limits_of_models: Sequence[tuple[float, ...]],
    split: str,
    allow: bool = False,
) -> frozenset[int]:
    """Sentences longer than a model's positions; ``UserError`` names the first unless allowed."""
    found: set[int] = set()
    lengths = np.column_stack([dataset.sizes, dataset.sizes.sum(axis=1)])
    for limits in limits_of_models:
        lines = np.flatnonzero((lengths > np.array(limits)).any(axis=1))
        if len(lines) and not allow:
            source, target = dataset.sizes[lines[0]]
            raise UserError(
                f"{split} line {lines[0] + 1}: {source} source and {target} target tokens, "
                f"but the model takes {limits[0]} and {limits[1]}, together {limits[2]} "
                f"({len(lines)} such lines); remove or split them and binarise again"
            )
        found.update(lines.tolist())
    return frozenset(found)


def flat_logits(logits: Tensor, target: Tensor, symbols: int | None = None) -> Tensor:
    """Logits, or features, at every target position, (B, T, X) to (B T, X).

    Raises
    ------
    UserError
        They are not at the positions of ``target`` (B, T), or logits of another number of symbols.
    """
    expected = (*target.shape, symbols or logits.size(-1))
    if logits.shape != expected:
        raise UserError(
            f"the model gives logits of shape {tuple(logits.shape)}: expected {expected}, one for "
            "each target token and each symbol of the data's dictionary; the model and DATA do not "
            "belong together, or this --arch does not give logits at target positions"
        )
    return logits.reshape(-1, logits.size(-1))


@torch.no_grad()
def token_logits(
    models: Sequence[Any],
    sample: dict[str, Any],
    pad: int,
    temperature: float = 1.0,
    symbols: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Next-token distributions of an ensemble at a batch's target tokens, some tokens at a time.

    Yields
    ------
    target : (n,) int64
        Reference tokens that are not padding, in the batch's order.
    z : (n, V) float32
        Logits over ``temperature``; of several models the log of their mean probability. The
        caller may overwrite it.

    Raises
    ------
    UserError
        A model gives no logits for each target token and each of ``symbols``.
    """
    target = sample["target"]
    rows = target.view(-1).ne(pad).nonzero().squeeze(1)
    logits = [flat_logits(model(**sample["net_input"])[0], target, symbols) for model in models]
    step = max(1, 2**26 // logits[0].size(-1))
    for start in range(0, rows.numel(), step):
        part = rows[start : start + step]
        z = [one[part].float() for one in logits]
        if temperature != 1.0:
            z = [one.div_(temperature) for one in z]
        if len(z) > 1:
            log_p = torch.stack([one.log_softmax(dim=-1) for one in z])
            z = [log_p.logsumexp(dim=0) - np.log(len(z))]
        yield target.view(-1)[part], z[0]


def quiet_fairseq() -> None:
    """Silence fairseq's reports on every dictionary and dataset that it loads.

    For a command's ``main``, which prints what matters itself.
    """
    for name in ("fairseq", "hydra"):
        logging.getLogger(name).setLevel(logging.WARNING)


def default_device(cpu: bool) -> torch.device:
    """CUDA if there is one and ``cpu`` does not forbid it; under torchrun each rank has its own."""
    if cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def half_precision(fp16: bool, bf16: bool) -> torch.dtype:
    """The type that command-line switches ask for."""
    return torch.float16 if fp16 else torch.bfloat16 if bf16 else torch.float32


def to_device(sample: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move a batch's tensors to ``device``."""
    moved: dict[str, Any] = utils.apply_to_sample(lambda tensor: tensor.to(device), sample)
    return moved
