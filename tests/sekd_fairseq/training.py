"""What is logged of a training, and a student that tests share."""

import json

from .conftest import ROOT

PLUGIN = ("--user-dir", ROOT / "sekd_fairseq", "--task", "self_evolution_kd")

SE_KD = ("--criterion", "self_evolution_kd")

GRADIENTS = {"easy_gradient", "hard_gradient"}  # in training only

LOGGED = {
    "loss", "nll_loss", "ppl", "difficulty", "gamma", "hard_share", "hard_lambda", "kl_easy",
    "kl_hard", "easy_gradient", "hard_gradient", "agreement",
}  # fmt: skip


def logged(prefix: str) -> set[str]:
    """What is logged in training ("", "train_") or in validation ("valid_")."""
    return LOGGED - GRADIENTS if prefix == "valid_" else LOGGED


def records(output: str, prefix: str) -> list[dict[str, str]]:
    """The JSON log records that have ``{prefix}num_updates``."""
    found = []
    for line in output.splitlines():
        if "{" in line and f'"{prefix}num_updates"' in line:
            found.append(json.loads(line[line.index("{") :]))
    return found
