"""One view of the two kinds of tokenizers: Hugging Face's and SentencePiece models."""

from collections.abc import Sequence
from functools import lru_cache, partial
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
    """A SentencePiece model: a file, or the one that a GGUF file holds.

    ``proto`` is the serialised model.
    """

    def __init__(self, path: Path, gguf_file: str | None = None) -> None:
        import sentencepiece

        try:
            if gguf_file:
                self.proto = sentencepiece_of_gguf(path / gguf_file)
            else:
                self.proto = path.read_bytes()
            self._model = sentencepiece.SentencePieceProcessor(model_proto=self.proto)
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
        """Token ids of a text."""
        tokens: list[int] = self._model.encode(text)
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        text: str = self._model.decode(list(tokens))
        return text

    def single_bytes(self) -> set[int]:
        """Tokens that stand for one byte."""
        return {i for i in range(len(self.pieces)) if self._model.is_byte(i)}


class HFTokenizer:
    """A tokenizer that transformers loads from a folder or hub id."""

    def __init__(self, path: str, gguf_file: str | None) -> None:
        from transformers import AutoTokenizer

        try:
            options = {"gguf_file": gguf_file} if gguf_file else {}
            self.model: Any = AutoTokenizer.from_pretrained(path, **options)  # type: ignore[no-untyped-call]
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise UserError(
                f"--tokenizer {path}: expected a Hugging Face tokenizer or a SentencePiece model "
                f"(*.model), found none that loads ({' '.join(str(error).split())[:300]})"
            ) from error
        table = self.model.get_vocab()
        self.pieces = [""] * (max(table.values()) + 1)
        for piece, token in table.items():
            self.pieces[token] = piece
        self.specials = (
            self.model.bos_token_id,
            self.model.pad_token_id,
            self.model.eos_token_id,
            self.model.unk_token_id,
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        tokens: list[int] = self.model.encode(text, add_special_tokens=False)
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        text: str = self.model.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def single_bytes(self) -> set[int]:
        """Tokens that stand for one byte."""
        spelled = {i for i, p in enumerate(self.pieces) if p.startswith("<0x") and len(p) == 6}
        # Byte-level BPE has no such pieces; its bytes are characters of their own.
        return spelled or {i for i, piece in enumerate(self.pieces) if len(piece) == 1}


def load_tokenizer(path: str, gguf_file: str | None = None) -> Tokenizer:
    """A SentencePiece model (``*.model``, or mistral-common's ``*.model.v1``), or what transformers
    finds there."""
    file = Path(path)
    if file.is_file() and ".model" in file.name:
        return SentencePieceTokenizer(file)
    if gguf_file and (file / gguf_file).is_file() and _gguf_field(file / gguf_file) == "llama":
        return SentencePieceTokenizer(file, gguf_file)
    return HFTokenizer(path, gguf_file)


def sentencepiece_of_gguf(path: Path) -> bytes:
    """The SentencePiece BPE model whose pieces, scores and types a GGUF file keeps, serialised.

    transformers reads those of Gemma as a unigram model (4.57), which splits words into fragments
    that the language model never saw.
    """
    from sentencepiece import sentencepiece_model_pb2

    protocol: Any = sentencepiece_model_pb2  # its classes are made when it is imported
    field = partial(_gguf_field, path)
    unknown = field("unknown_token_id")
    model = protocol.ModelProto()
    pieces = zip(field("tokens"), field("scores"), field("token_type"), strict=True)
    for token, (text, score, kind) in enumerate(pieces):
        # Types are SentencePiece's own; a byte's name that is no byte is the character.
        if text == "<0x09>" and kind != model.SentencePiece.BYTE:
            text = "\t"
        if token == unknown:
            kind = model.SentencePiece.UNKNOWN
        model.pieces.add(piece=text.replace(" ", "▁"), score=score, type=kind)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    trainer = model.trainer_spec
    trainer.model_type, trainer.byte_fallback = trainer.BPE, True
    trainer.vocab_size = len(model.pieces)
    for role, name in names.items():
        token = field(f"{name}_token_id", -1)
        setattr(trainer, f"{role}_id", token)
        if token >= 0:
            setattr(trainer, f"{role}_piece", model.pieces[token].piece)
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = field("add_space_prefix", True)
    normalizer.remove_extra_whitespaces = False
    serialised: bytes = model.SerializeToString()
    return serialised


def _gguf_field(path: Path, name: str = "model", default: Any = None) -> Any:
    """What a GGUF file says of its tokenizer."""
    field = _gguf_reader(path).fields.get(f"tokenizer.ggml.{name}")
    return default if field is None else field.contents()


@lru_cache(maxsize=1)  # opening one reads all of its fields
def _gguf_reader(path: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except ValueError as error:
        raise UserError(f"{path}: expected a GGUF file, found another ({error})") from error
