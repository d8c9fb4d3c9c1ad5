"""A trained student as an ordinary Hugging Face folder.

    python -m sekd_fairseq.export_hf checkpoint_best.pt --data DATA --output FOLDER [--base MODEL]

Rows go back to the tokenizer's order, low-rank adapters are merged. Weights are written in half precision
where that is all of them, as after a training with ``--bf16`` (which fairseq saves as float32). Tokens without a symbol
(``--prune-vocab``, padding of the matrix) get their rows from ``--base``, the model that the student
started from (that of its training, a folder or a hub id, if it is still there), or else the mean of all rows, which is never the best token.
``AutoModelForCausalLM.from_pretrained(FOLDER)`` then loads it.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from sekd_fairseq.checkpoints import load_models
from sekd_fairseq.errors import UserError, one_line_errors
from sekd_fairseq.llm.loading import narrow, pretrained
from sekd_fairseq.llm.tokenizer import (
    HFTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    sentencepiece_proto,
)
from sekd_fairseq.llm.vocabulary import (
    TOKENIZER,
    Vocabulary,
    restore_rows,
    vocabulary_parameters,
)
from sekd_fairseq.models.hf_causal_lm import HFCausalLM
from sekd_fairseq.plugin import quiet_fairseq

#: Text on which tokenizers differ that differ at all.
PROBE = "Straße,  zwei\tTage\nNaïve 你好 🙂"


def export(checkpoint: str, data: str, output: Path, base: str | None, gguf: str | None) -> None:
    """Write the folder."""
    # First, so that no two models are in memory.
    originals = vocabulary_parameters(pretrained(base, gguf)) if base else {}
    (model,), config, task = load_models([checkpoint], data, torch.device("cpu"), base)
    if not isinstance(model, HFCausalLM):
        raise UserError(f"{checkpoint}: expected a student of --arch hf_causal_lm, found another")
    Vocabulary.load(Path(data), task.target_dictionary.symbols)  # that they are a language model's
    rows = model.vocabulary_rows.tolist()
    lm = model.decoder.model
    if hasattr(lm, "merge_and_unload"):
        lm = lm.merge_and_unload()
    if lacking := set(range(max(rows) + 1)).difference(
        rows, range(len(originals.get("input", ())))
    ):
        start, there = config.model.hf_model, None
        if start:
            with suppress(UserError):  # it has moved, or the hub is not reached
                there = pretrained(start, config.model.hf_gguf_file)
        if there is not None:
            originals = vocabulary_parameters(there)
        else:
            print(
                f"{output}: {len(lacking)} tokens have no symbol and get the mean of all rows, because the "
                f"model that the student started from is not there ({start or 'trained from scratch'}); give "
                "--base MODEL for their own",
                file=sys.stderr,
            )
    restore_rows(lm, rows, originals)
    lm.config.dtype = narrow(lm)
    tokenizer = load_tokenizer(str(Path(data) / TOKENIZER))
    for one in filter(None, (lm.config, lm.generation_config)):
        one.pad_token_id = tokenizer.specials[1]
    if hasattr(lm.config, "quantization_config"):
        del lm.config.quantization_config
    lm.save_pretrained(output)
    export_tokenizer(tokenizer, type(lm.config), output)
    print(
        f"{output}: {sum(p.numel() for p in lm.parameters()):,} parameters, "
        f"{lm.config.get_text_config().vocab_size} rows"
    )


def export_tokenizer(tokenizer: Tokenizer, config: type, output: Path) -> None:
    """Write the data's tokenizer as the model's family has it, if that gives the same tokens."""
    if isinstance(tokenizer, HFTokenizer):
        tokenizer.save(output)
        return
    assert isinstance(tokenizer, SentencePieceTokenizer)
    family, _ = TOKENIZER_MAPPING.get(config, (None, None))
    reads_models = getattr(family, "vocab_files_names", {}).get("vocab_file", "").endswith(".model")
    proto = sentencepiece_proto(tokenizer.proto)
    specials = {
        f"{role}_token": None if token is None else tokenizer.pieces[token]
        for role, token in zip(("bos", "pad", "eos", "unk"), tokenizer.specials, strict=True)
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "written"
        (Path(name) / "tokenizer.model").write_bytes(tokenizer.proto)
        same = False
        if family is not None and reads_models:
            with suppress(Exception):  # transformers' converters fail anyhow on others' models
                family(
                    vocab_file=str(Path(name) / "tokenizer.model"),
                    legacy=False,
                    add_prefix_space=proto.normalizer_spec.add_dummy_prefix,
                    **specials,
                ).save_pretrained(folder)
                same = load_tokenizer(str(folder)).encode(PROBE) == tokenizer.encode(PROBE)
        if same:
            shutil.copytree(folder, output, dirs_exist_ok=True)
        else:
            print(
                f"{output}: no tokenizer written; this family's tokenizers do not read the data's "
                "SentencePiece model as it is, use that one",
                file=sys.stderr,
            )


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True, help="data directory that it was trained on")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="folder (or hub id) of the original model, if it is not where it was in training; of adapters "
        "the one that they were trained on",
    )
    parser.add_argument("--base-gguf-file", metavar="FILE", help="a GGUF file in --base")
    args = parser.parse_args(argv)
    quiet_fairseq()
    export(args.checkpoint, args.data, args.output, args.base, args.base_gguf_file)


if __name__ == "__main__":
    main()
