"""One view of the two kinds of tokenizers: Hugging Face's and SentencePiece models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from sekd_fairseq.errors import UserError


class Tokenizer(Protocol):
    """Text to token ids and back, without special tokens."""

    pieces: list[str]
    #: Ids of beginning, padding, end, unknown; None where there is none.
    specials: tuple[int | None, int | None, int | None, int | None]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""

    def single_bytes(self) -> set[int]:
        """Tokens that stand for one byte, which spell what has no piece."""


class SentencePieceTokenizer:
    """A SentencePiece model file."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"--tokenizer {path}: expected a SentencePiece model, found none that loads "
                f"({' '.join(str(error).split())})"
            ) from error
        model = self._model
        self.pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
        ids = (model.bos_id(), model.pad_id(), model.eos_id(), model.unk_id())
        bos, pad, eos, unk = (i if i >= 0 else None for i in ids)
        self.specials = (bos, pad, eos, unk)

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = self._model.encode(text)
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._model.decode(list(tokens))
        return text

    def single_bytes(self) -> set[int]:
        return {i for i in range(len(self.pieces)) if self._model.is_byte(i)}


class HFTokenizer:
    """A tokenizer that transformers loads from a folder or hub id."""

    def __init__(self, path: str, gguf_file: str | None) -> None:
        from transformers import AutoTokenizer

        try:
            options = {"gguf_file": gguf_file} if gguf_file else {}
            self._model: Any = AutoTokenizer.from_pretrained(path, **options)  # type: ignore[no-untyped-call]
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise UserError(
                f"--tokenizer {path}: expected a Hugging Face tokenizer or a SentencePiece model "
                f"(*.model), found none that loads ({' '.join(str(error).split())[:300]})"
            ) from error
        table = self._model.get_vocab()
        self.pieces = [""] * (max(table.values()) + 1)
        for piece, token in table.items():
            self.pieces[token] = piece
        self.specials = (
            self._model.bos_token_id,
            self._model.pad_token_id,
            self._model.eos_token_id,
            self._model.unk_token_id,
        )

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = self._model.encode(text, add_special_tokens=False)
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._model.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def single_bytes(self) -> set[int]:
        spelled = {i for i, p in enumerate(self.pieces) if p.startswith("<0x") and len(p) == 6}
        # Byte-level BPE has no such pieces; its bytes are characters of their own.
        return spelled or {i for i, piece in enumerate(self.pieces) if len(piece) == 1}


def load_tokenizer(path: str, gguf_file: str | None = None) -> Tokenizer:
    """A SentencePiece model (``*.model``, or mistral-common's ``*.model.v1``), or what transformers
    finds there."""
    file = Path(path)
    if file.is_file() and ".model" in file.name:
        return SentencePieceTokenizer(file)
    return HFTokenizer(path, gguf_file)
