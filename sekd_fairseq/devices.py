"""Which device and which precision a command runs a model in."""

import os
from typing import Any

import torch
from fairseq import utils


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
