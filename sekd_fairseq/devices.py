"""Which device and which precision a command runs a model in."""

import argparse
import os
from typing import Any

import torch
from fairseq import utils


def default_device(cpu: bool) -> torch.device:
    """CUDA if there is one and ``cpu`` does not forbid it; under torchrun each rank has its own."""
    if cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def add_device(
    group: argparse._ActionsContainer, what: str, precision: str = "single precision"
) -> None:
    """The options of where, and in which precision, a command does something; ``precision`` is that without
    one of them."""
    half = group.add_mutually_exclusive_group()
    half.add_argument(
        "--fp16", action="store_true", help=f"{what} in float16 (GPU; default: {precision})"
    )
    half.add_argument("--bf16", action="store_true", help=f"{what} in bfloat16")
    group.add_argument("--cpu", action="store_true", help="do not use a GPU")


def half_precision(fp16: bool, bf16: bool) -> torch.dtype:
    """The type that command-line switches ask for."""
    return torch.float16 if fp16 else torch.bfloat16 if bf16 else torch.float32


def to_device(sample: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move a batch's tensors to ``device``."""
    moved: dict[str, Any] = utils.apply_to_sample(lambda tensor: tensor.to(device), sample)
    return moved
