"""Loading trained models: fairseq checkpoints with the task and the dictionaries that they belong to."""

import argparse
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, options, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from sekd_fairseq.errors import UserError


def load_models(
    paths: Sequence[str],
    data: str,
    device: torch.device,
    hf_model: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Any], Any, Any]:
    """Load checkpoints of one task, in eval mode on ``device``; the plugin is registered
    (:mod:`sekd_fairseq.plugin`).

    Parameters
    ----------
    paths
        Checkpoint files; several form an ensemble.
    data
        The data directory whose dictionaries they must fit (instead of the one they were trained
        on).
    hf_model
        Where the language model is that adapters were trained on, if it has moved.
    dtype
        What they run in; a GPU never holds them in another.

    Returns
    -------
    models, config, task
        The task has no teacher cache and no dataset loaded.

    Raises
    ------
    UserError
        A file that is missing or no fairseq checkpoint, or a model for other dictionaries.
    """
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"--path: expected a fairseq checkpoint, found no file at {path}")
    overrides: dict[str, Any] = {
        "data": data,
        # The task makes the model so, and the host never holds it in single precision.
        "bf16": dtype == torch.bfloat16,
        "num_batch_buckets": 0,
    }
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
        model.eval().to(device=device, dtype=dtype)
    return models, config, task


def add_hf_model(parser: argparse._ActionsContainer) -> None:
    """``--hf-model``, for commands that load checkpoints (:func:`load_models`)."""
    parser.add_argument(
        "--hf-model",
        metavar="FOLDER",
        help="where the language model is that a checkpoint's adapters (--lora-r) were trained on, "
        "if it has moved",
    )


def language_model_config(data: str, *options_of_model: str) -> Any:
    """fairseq's configuration of a training of ``--arch hf_causal_lm`` on ``data``."""
    words = [data, "--task", "self_evolution_kd", "--arch", "hf_causal_lm", *options_of_model]
    args = options.parse_args_and_arch(options.get_training_parser(), input_args=words)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fairseq calls hydra in ways that hydra has left behind
        return convert_namespace_to_omegaconf(args)


def position_limits(models: Sequence[Any]) -> list[tuple[float, ...]]:
    """The longest source, target, and both together that each model reads."""
    limits = []
    for model in models:
        found = utils.resolve_max_positions(model.max_positions())
        pair = found if isinstance(found, tuple) else (found, found)
        limits.append((*pair, getattr(model, "joint_positions", math.inf)))
    return limits
