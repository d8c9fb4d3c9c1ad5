"""Options of the whole suite."""

import os

# Before torch is there: the tests fork, and a fork of a process with OpenMP threads hangs in them.
os.environ["OMP_NUM_THREADS"] = "1"
# Asking whether there is CUDA must not start it, for the same reason.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import pytest
import torch
from hypothesis import settings

# The same examples in every run: the gate is no matter of luck. scripts/robustness.py searches on.
settings.register_profile("gate", derandomize=True, deadline=None)
settings.load_profile("gate")

if not torch.cuda.is_available():
    # The kernels run in Triton's interpreter, which has to be chosen before Triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="long; run with --slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))
