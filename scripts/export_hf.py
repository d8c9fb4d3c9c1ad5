"""A trained student as an ordinary Hugging Face folder.

    python scripts/export_hf.py checkpoint_best.pt --data DATA --output FOLDER [--base MODEL]

Rows go back to the tokenizer's order, low-rank adapters are merged. Tokens without a symbol
(``--prune-vocab``, padding of the matrix) get their rows from ``--base``, the model that the student
started from, or else zeros. ``AutoModelForCausalLM.from_pretrained(FOLDER)`` then loads it.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from sekd_fairseq.errors import UserError, one_line_errors
from sekd_fairseq.inference import load_models, quiet_fairseq
from sekd_fairseq.llm.vocabulary import Vocabulary, restore_rows
from sekd_fairseq.models.hf_causal_lm import HFCausalLM, pretrained


def export(checkpoint: str, data: str, output: Path, base: str | None, gguf: str | None) -> None:
    """Write the folder."""
    (model,), _, task = load_models([checkpoint], data, torch.device("cpu"))
    if not isinstance(model, HFCausalLM):
        raise UserError(f"{checkpoint}: expected a student of --arch hf_causal_lm, found another")
    vocabulary = Vocabulary.load(Path(data), task.target_dictionary.symbols)
    lm = model.decoder.model
    if hasattr(lm, "merge_and_unload"):
        lm = lm.merge_and_unload()
    restore_rows(lm, vocabulary.rows, pretrained(base, gguf) if base else None)
    lm.config.torch_dtype = torch.float32
    if hasattr(lm.config, "quantization_config"):
        del lm.config.quantization_config
    lm.save_pretrained(output)
    try:
        options = {"gguf_file": gguf} if gguf else {}
        AutoTokenizer.from_pretrained(vocabulary.tokenizer, **options).save_pretrained(output)
    except (OSError, ValueError):
        print(
            f"{output}: no tokenizer written; {vocabulary.tokenizer} is none that transformers "
            "loads",
            file=sys.stderr,
        )
    print(
        f"{output}: {sum(p.numel() for p in lm.parameters()):,} parameters, "
        f"{lm.config.vocab_size} rows"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True, help="data directory that it was trained on")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--base", metavar="MODEL", help="folder (or hub id) of the original model")
    parser.add_argument("--base-gguf-file", metavar="FILE", help="a GGUF file in --base")
    args = parser.parse_args()
    quiet_fairseq()
    with one_line_errors():
        export(args.checkpoint, args.data, args.output, args.base, args.base_gguf_file)


if __name__ == "__main__":
    main()
