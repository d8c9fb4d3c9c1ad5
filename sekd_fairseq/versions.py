"""The versions that what is written here is recorded with."""

import platform

import torch

import sekd_fairseq


def versions() -> dict[str, str]:
    """Of this package, of torch and of Python, by name."""
    return {
        "sekd_fairseq": sekd_fairseq.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
