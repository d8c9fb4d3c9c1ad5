"""``--bpe hf_tokenizer``: text to a language model's tokens and back, for fairseq's commands."""

from dataclasses import dataclass, field
from typing import Optional

from fairseq.data.encoders import register_bpe
from fairseq.dataclass import FairseqDataclass

from sekd_fairseq.errors import UserError, one_line_errors
from sekd_fairseq.llm.tokenizer import load_tokenizer
from sekd_fairseq.llm.vocabulary import symbol_of, token_of


@dataclass
class HFTokenizerConfig(FairseqDataclass):
    """Options of the encoder."""

    hf_tokenizer: Optional[str] = field(  # noqa: UP045 (fairseq's parser needs Optional)
        default=None,
        metadata={"help": "folder (or hub id) of a tokenizer, or a SentencePiece model file"},
    )
    hf_tokenizer_gguf_file: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"help": "take the tokenizer of this GGUF file in --hf-tokenizer"}
    )


@register_bpe("hf_tokenizer", dataclass=HFTokenizerConfig)
class HFTokenizerBPE:
    """Symbols of :mod:`sekd_fairseq.llm.vocabulary`, separated by spaces."""

    def __init__(self, cfg: HFTokenizerConfig) -> None:
        with one_line_errors():
            if not cfg.hf_tokenizer:
                raise UserError("--bpe hf_tokenizer expects --hf-tokenizer PATH, found none")
            self.tokenizer = load_tokenizer(cfg.hf_tokenizer, cfg.hf_tokenizer_gguf_file)

    def encode(self, text: str) -> str:
        """Text to symbols."""
        tokens = self.tokenizer.encode(text)
        return " ".join(symbol_of(token, self.tokenizer.pieces[token]) for token in tokens)

    def decode(self, symbols: str) -> str:
        """Symbols to text, special ones left out.

        A translation is one line: what a base model goes on to write after a few-shot prompt's
        translation (the next example) does not belong to it.
        """
        tokens = [token for token in map(token_of, symbols.split()) if token >= 0]
        return self.tokenizer.decode(tokens).lstrip("\n").split("\n", 1)[0]
