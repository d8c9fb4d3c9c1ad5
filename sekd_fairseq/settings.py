"""Whether a training that goes on has the settings that it was begun with.

fairseq goes on from ``SAVE_DIR/checkpoint_last.pt`` whatever the options are now. A run that has ended
would then pass for one of the new settings, and one that was stopped would be a mixture.
"""

import hashlib
import itertools
import logging
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fairseq import utils
from omegaconf import OmegaConf, open_dict

from sekd_fairseq.errors import UserError
from sekd_fairseq.teacher_cache.storage import manifests_of

logger = logging.getLogger(__name__)

#: Sections that are compared, with the option that their name is given by.
SECTIONS = {
    "criterion": "criterion",
    "model": "arch",
    "task": "task",
    "optimizer": "optimizer",
    "lr_scheduler": "lr_scheduler",
}
#: Of other sections, these.
SINGLE = {
    "optimization": ("lr", "clip_norm", "sentence_avg", "skip_remainder_batch"),
    "dataset": (
        "max_tokens",
        "batch_size",
        "train_subset",
        "valid_subset",
        "combine_valid_subsets",
    ),
    "checkpoint": ("best_checkpoint_metric", "maximize_best_checkpoint_metric"),
    "ema": ("store_ema", "ema_decay", "ema_start_update", "ema_update_freq"),
    "common": ("seed",),
}
#: How long, where and in which precision a training runs, where its files are, what it says.
FREE = {
    "max_update", "total_num_update", "tpu", "fp16", "bf16", "fp16_adam_stats", "use_old_adam",
    "encoder_embed_path", "decoder_embed_path", "checkpoint_activations", "offload_activations", "min_params_to_wrap", "no_seed_provided",
    "data", "teacher_cache", "teacher_path", "teacher_fp16", "teacher_bf16", "stored_difficulty",
    "dataset_impl", "num_batch_buckets", "hf_state", "hf_model", "hf_gguf_file", "hf_config",
    "hf_gradient_checkpointing", "sekd_chunk_tokens", "shard_weights",
}  # fmt: skip


def check_settings(checkpoint: Path, cfg: Any) -> None:
    """Refuse to go on from a training's last checkpoint under other settings.

    Parameters
    ----------
    checkpoint
        What fairseq will go on from.
    cfg
        fairseq's whole configuration now.

    Raises
    ------
    UserError
        Names what differs.
    """
    try:  # mapped, because its tensors are not asked for
        begun = torch.load(checkpoint, map_location="cpu", mmap=True).get("cfg")
    except (RuntimeError, EOFError, zipfile.BadZipFile):
        return  # a damaged one is named when it is loaded
    if begun is None:
        return
    before, now = settings(begun), settings(plain(cfg))
    different = [
        f"{option} {before[option]} is now {now[option]}"
        for option in before
        if option in now
        and before[option] != now[option]
        and not (option == "--teacher" and same_teacher(before[option], now[option]))
    ]
    if different:
        raise UserError(
            f"{checkpoint}: begun with other settings ({'; '.join(different[:5])}); give another "
            f"--save-dir to train anew, or --restore-file {checkpoint} to go on from there all the "
            "same"
        )


def remember_teacher(cfg: Any) -> None:
    """Keep in the configuration, and so in checkpoints, which teacher a training has: its cache may
    move."""
    roots = getattr(cfg.task, "teacher_cache", None)
    if roots:
        split = cfg.dataset.train_subset
        found = [manifests_of(root, split) for root in utils.split_paths(roots)]
        if not all(found):
            return  # the data say what is missing when they are loaded
        with open_dict(cfg):
            cfg.task.teacher = ":".join(one.fingerprint for one in itertools.chain(*found))
    elif getattr(cfg.task, "teacher_path", None):
        with open_dict(cfg):
            cfg.task.teacher = ":".join(map(file_identity, cfg.task.teacher_path.split(":")))


def file_identity(path: str) -> str:
    """A checkpoint's name, and a hash of a few of each of its weights where the file can be mapped."""
    name = os.path.basename(path)
    try:
        weights = torch.load(path, map_location="cpu", mmap=True)["model"].values()
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError):
        return name  # of an old format; a damaged one is named when it is loaded
    digest = hashlib.sha256()
    for weight in weights:
        if isinstance(weight, torch.Tensor):
            digest.update(weight.reshape(-1)[:4].double().numpy().tobytes())
    return f"{name} {digest.hexdigest()[:12]}"


def same_teacher(before: Any, now: Any) -> bool:
    """Whether these may be the same: where one has a name alone (:func:`file_identity`), as trainings kept
    it once, by that."""
    one, other = str(before).split(":"), str(now).split(":")
    return len(one) == len(other) and all(
        a == b or a == b.rpartition(" ")[0] or a.rpartition(" ")[0] == b
        for a, b in zip(one, other, strict=True)
    )


def plain(cfg: Any) -> dict[str, Any]:
    """A configuration as a checkpoint keeps it."""
    content: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)  # type: ignore[assignment]
    return content


def settings(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a training what it is, by the name of its option."""
    sections = {name: members(cfg.get(name)) for name in cfg}
    found: dict[str, Any] = {}
    for section, name in SECTIONS.items():
        # A model's options may be all of the command line's, and those of what has no dataclass (of
        # optimisers, sgd, adafactor and more) are.
        has_all = section == "model" or not isinstance(cfg.get(section), Mapping)
        elsewhere = set(sections) | {
            key
            for other, keys in sections.items()
            if other != section and isinstance(cfg.get(other), Mapping)
            for key in keys
        }
        for key, value in sections.get(section, {}).items():
            if key == "_name":
                found[f"--{name.replace('_', '-')}"] = value
            elif not (key in FREE or key.startswith("eval_") or (has_all and key in elsewhere)):
                found[f"--{key.replace('_', '-')}"] = value
    for section, keys in SINGLE.items():
        for key in keys:
            if key in sections.get(section, {}):
                found[f"--{key.replace('_', '-')}"] = sections[section][key]
    processes = sections.get("distributed_training", {}).get("distributed_world_size", 1)
    freq = sections.get("optimization", {}).get("update_freq") or [1]
    found["batches an update (--update-freq times processes)"] = [one * processes for one in freq]
    return found


def members(section: Any) -> dict[str, Any]:
    """A section's options; a model's may be a namespace."""
    if isinstance(section, Mapping):
        return dict(section)
    return vars(section) if hasattr(section, "__dict__") else {}
