"""A Hugging Face model as a fairseq checkpoint, untrained: a teacher that is good enough as it is.

    python -m sekd_fairseq.import_hf MODEL --data DATA --output runs/llm/teacher/checkpoint_best.pt

``build_cache``, ``score``, ``fairseq-generate`` and ``--teacher-path`` then take it like any other
checkpoint. DATA was made for its tokenizer by ``prepare_llm_data``; the reverse is
``export_hf``. Weights in half precision stay so; a symbol that the model has no token for gets a row that is rounded as
they are.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from fairseq import tasks
from omegaconf import OmegaConf

from analysis.runs.files import atomic_write
from sekd_fairseq.checkpoints import language_model_config
from sekd_fairseq.errors import one_line_errors
from sekd_fairseq.llm.loading import narrow
from sekd_fairseq.llm.vocabulary import NEW_ROW, vocabulary_parameters
from sekd_fairseq.plugin import quiet_fairseq


def import_model(folder: str, gguf: str | None, data: str, output: Path) -> int:
    """Write the checkpoint; returns the number of parameters."""
    gguf_options = ["--hf-gguf-file", gguf] if gguf else []
    cfg = language_model_config(data, "--hf-model", folder, *gguf_options)
    model = tasks.setup_task(cfg.task).build_model(cfg.model)
    lm, new = model.decoder.model, model.vocabulary_rows == NEW_ROW
    for matrix in vocabulary_parameters(lm).values():
        # Both half precisions have these values.
        matrix.data[new] = matrix.data[new].half().bfloat16().float()
    narrow(lm)
    checkpoint = {
        "args": None,
        "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
        "model": model.state_dict(),
        "optimizer_history": [{"optimizer_name": None, "lr_scheduler_state": {}, "num_updates": 0}],
        "task_state": {},
        "extra_state": {},
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as stream:
        torch.save(checkpoint, stream)
    return sum(p.numel() for p in model.parameters())


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Write the checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="folder (or hub id) of the model")
    parser.add_argument("--gguf-file", metavar="FILE", help="a GGUF file in MODEL")
    parser.add_argument("--data", required=True, help="data directory made for its tokenizer")
    parser.add_argument("--output", required=True, type=Path, metavar="CHECKPOINT")
    args = parser.parse_args(argv)
    quiet_fairseq()
    parameters = import_model(args.model, args.gguf_file, args.data, args.output)
    print(f"{args.output}: {parameters:,} parameters")


if __name__ == "__main__":
    main()
