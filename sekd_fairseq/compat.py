"""What fairseq 0.12 needs to work with current Python, torch and NumPy; each with its reason.

Nothing of fairseq is patched: this registers types with torch, and gives the task what it calls.
"""

import argparse
import collections
import gc
from typing import Any

import numpy as np
import torch
from fairseq.distributed import utils as fairseq_distributed
from omegaconf import DictConfig, ListConfig
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.nodes import AnyNode

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


def allow_checkpoint_types() -> None:
    """Let torch load what fairseq saves (:data:`CHECKPOINT_TYPES`), and nothing else."""
    torch.serialization.add_safe_globals(list(CHECKPOINT_TYPES))


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
