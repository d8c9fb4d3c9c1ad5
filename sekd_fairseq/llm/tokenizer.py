"""One view of the two kinds of tokenizers: Hugging Face's and SentencePiece models.

Text is text: what a user wrote never becomes a control token (``<s>``, ``<pad>``, ``<|im_end|>``),
only what a template says of its own does.  A text that has both is made by a function that passes
each of the user's strings through a :data:`Mark`, which breaks control strings apart by
:data:`MARK`; what is still whole is the template's.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

from sekd_fairseq.errors import UserError

#: A noncharacter, which no text has; taken out again before a text is tokenized.
MARK = "\ufdd0"
#: Another, for names that no text has.
PRIVATE = "\ufdd1"
#: What a SentencePiece model is called in a data directory.
SENTENCEPIECE = "sentencepiece.model"
#: Tags that are no special tokens by their type but by their use: "<|user|>", "<start_of_turn>".
TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
#: As SentencePiece models name theirs; "<h1>" and "<table>" are text.
UNDERSCORED_TAG = re.compile(r"<[^<>\s]*[|_｜][^<>\s]*>")

#: The day for chat templates that name one (Llama 3's), that of Llama's where it knows none: prompts would
#: be others every day.
DATE = date(2024, 7, 26)

#: Where templates of models that always reason (DeepSeek R1's, Qwen3's Thinking) let an answer begin, and
#: what ends the reasoning: nothing of it, as Qwen3's own templates write it.
THINKS, THOUGHT = "<think>", "</think>"

Mark = Callable[[str], str]


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes
    ----------
    pieces
        Text of every token, by id.
    specials
        Ids of beginning, padding, end, unknown; None where there is none.
    controls
        Tokens that text never makes, by their strings.
    begin
        What it puts before a text.
    """

    pieces: list[str]
    specials: tuple[int | None, int | None, int | None, int | None]
    controls: dict[str, int]
    begin: list[int]

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write it to a folder, from which :func:`load_tokenizer` reads the same."""

    @abstractmethod
    def _tokens(self, text: str) -> list[int]:
        """As the tokenizer does it by itself: control strings are control tokens."""

    @abstractmethod
    def _tokens_of_marked(self, text: str) -> list[int]:
        """The same, of a text with marks, which are left out."""

    def chat(self, messages: Sequence[dict[str, str]], answer: bool = True) -> str:
        """A conversation by the tokenizer's own chat template, up to where the answer begins."""
        raise UserError(
            "--chat: expected a tokenizer with a chat template, found a SentencePiece model, which "
            "has none; give the prompt with --template"
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a user's text, without special tokens."""
        return self.encode_filled(lambda mark: mark(text))

    def encode_filled(self, fill: Callable[[Mark], str]) -> list[int]:
        """Token ids of the text that ``fill`` makes, without special tokens but those in it.

        ``fill(mark)`` passes every string of a user through ``mark``. They are the tokens that the
        tokenizer gives for the whole text, unless a user's string would make a control token.
        """
        plain, marked = fill(str), fill(self._mark)
        if self._control.findall(plain) == self._control.findall(marked):
            return self._tokens(plain)
        return self._tokens_of_marked(marked)

    def _mark(self, text: str) -> str:
        """A text in which no control string is whole, nor joined to one by what stands around it.

        White space stays outside, because chat templates take it away.
        """
        core = text.strip()
        if not core:
            return text
        before, _, after = text.partition(core)
        broken = self._control.sub(lambda found: MARK.join(["", *found[0], ""]), core)
        return f"{before}{MARK}{broken}{MARK}{after}"

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Any control string, the longest that fits."""
        names = sorted(self.controls, key=len, reverse=True)
        if not names:
            return re.compile(r"(?!)")
        # The look-ahead keeps a search over thousands of names fast.
        starts = "".join(sorted({re.escape(name[0]) for name in names}))
        return re.compile(f"(?=[{starts}])({'|'.join(map(re.escape, names))})")

    def _by_segment(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Tokens of a marked text whose control strings are cut out first."""
        tokens: list[int] = []
        for place, segment in enumerate(self._control.split(text)):
            if place % 2:
                tokens.append(self.controls[segment])
            elif segment:
                tokens += encode(segment.replace(MARK, ""))
        return tokens

    @cached_property
    def _token_of(self) -> dict[str, int]:
        return {piece: token for token, piece in enumerate(self.pieces)}

    @property
    def _has_byte_pieces(self) -> bool:
        return byte_piece(0) in self._token_of

    def single_bytes(self) -> set[int]:
        """Tokens that stand for one byte, which spell what has no piece."""
        if self._has_byte_pieces:
            return {self._token_of[byte_piece(byte)] for byte in range(256)}
        # Byte-level BPE has no such pieces; its bytes are characters of their own.
        return {token for token, piece in enumerate(self.pieces) if len(piece) == 1}

    def spell(self, token: int) -> list[int]:
        """The tokens of single bytes that say the same as a token; empty if there are none."""
        names: Iterable[str] = self.pieces[token]
        if self._has_byte_pieces:
            names = map(byte_piece, self.pieces[token].replace("▁", " ").encode())
        spelled = [self._token_of.get(name) for name in names]
        return [] if None in spelled else [one for one in spelled if one is not None]


def byte_piece(byte: int) -> str:
    """The name of a byte's piece."""
    return f"<0x{byte:02X}>"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model: a file, or the one that a GGUF file holds.

    ``proto`` is the serialised model. It never makes control tokens of text; a template's are cut
    out before.
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
        self.begin = [] if bos is None else [bos]
        content = sentencepiece_proto(self.proto)
        kinds = content.SentencePiece
        self.controls = {}
        for token, piece in enumerate(content.pieces):
            tag = piece.type == kinds.USER_DEFINED and UNDERSCORED_TAG.fullmatch(piece.piece)
            if piece.type in (kinds.CONTROL, kinds.UNKNOWN) or tag:
                self.controls[piece.piece] = token
            if tag:
                piece.type = kinds.UNUSED
        self._plain = sentencepiece.SentencePieceProcessor(model_proto=content.SerializeToString())

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        text: str = self._model.decode(list(tokens))
        return text

    def save(self, folder: Path) -> None:
        """Write the model file."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SENTENCEPIECE).write_bytes(self.proto)

    def _tokens(self, text: str) -> list[int]:
        return self._by_segment(text, self._plain.encode)

    _tokens_of_marked = _tokens


class HFTokenizer(Tokenizer):
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
        model = self.model
        table = model.get_vocab()
        self.pieces = [""] * (max(table.values()) + 1)
        for piece, token in table.items():
            self.pieces[token] = piece
        self.specials = (
            model.bos_token_id,
            model.pad_token_id,
            model.eos_token_id,
            model.unk_token_id,
        )
        own = set(model.backend_tokenizer.get_vocab(False)) if model.is_fast else set()
        special = set(model.all_special_tokens)
        self.controls = {
            added.content: token
            for token, added in model.added_tokens_decoder.items()
            if added.special
            or added.content in special
            or (added.content not in own and TAG.fullmatch(added.content))
        }
        bare, full = (model.encode("a", add_special_tokens=added) for added in (False, True))
        self.begin = next(
            (full[:i] for i in range(len(full)) if full[i : i + len(bare)] == bare), []
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        text: str = self.model.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def save(self, folder: Path) -> None:
        """Write the folder, as transformers does."""
        self.model.save_pretrained(folder)

    def chat(self, messages: Sequence[dict[str, str]], answer: bool = True) -> str:
        """A conversation by the tokenizer's own chat template, up to where the answer begins."""
        try:
            text: str = self.model.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=answer,
                strftime_now=DATE.strftime,
                enable_thinking=False,  # a translation is wanted, and no reasoning before it
            )
        except Exception as error:  # no template, or what the template itself raises
            raise UserError(
                "--chat: expected a tokenizer with a chat template for turns of user and "
                f"assistant, found none that works ({' '.join(str(error).split())[:200]}); give "
                "the prompt with --template"
            ) from error
        if answer and text.rstrip().endswith(THINKS):
            text = f"{text.rstrip()}\n\n{THOUGHT}\n\n"
        return text

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self.model.encode(text, add_special_tokens=False)
        return tokens

    def _tokens_of_marked(self, text: str) -> list[int]:
        if not self.model.is_fast:
            return self._by_segment(text, self._plain_tokens)
        private = self._control.sub(lambda found: private_name(found[0]), text)
        encoded = self._with_private_controls.encode(
            private.replace(MARK, ""), add_special_tokens=False
        )
        tokens: list[int] = encoded.ids
        return tokens

    def _plain_tokens(self, text: str) -> list[int]:
        """Of a tokenizer written in Python: no added token is looked for."""
        pieces = self.model.tokenize(text, split_special_tokens=True)
        tokens: list[int] = self.model.convert_tokens_to_ids(pieces)
        return tokens

    @cached_property
    def _with_private_controls(self) -> Any:
        """The same tokenizer where control tokens have names that no text has."""
        from tokenizers import Tokenizer as FastTokenizer  # type: ignore[import-untyped]

        content = json.loads(self.model.backend_tokenizer.to_str())
        names = {name: private_name(name) for name in self.controls}
        content.update(post_processor=None, truncation=None, padding=None)
        for added in content["added_tokens"]:
            added["content"] = names.get(added["content"], added["content"])
        model = content["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(p, p): token for p, token in model["vocab"].items()}
        else:  # a unigram model's pieces with their scores
            model["vocab"] = [[names.get(p, p), score] for p, score in model["vocab"]]
        if "merges" in model:
            pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
            model["merges"] = [m for m in pairs if not {*m, "".join(m)} & set(names)]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        renamed = FastTokenizer.from_str(json.dumps(content))
        assert all(renamed.token_to_id(names[n]) == token for n, token in self.controls.items())
        return renamed


def private_name(control: str) -> str:
    """A name of a control token that no text has."""
    return f"{PRIVATE}{control}{PRIVATE}"


def load_tokenizer(path: str, gguf_file: str | None = None) -> Tokenizer:
    """A SentencePiece model (``*.model``, or mistral-common's ``*.model.v1``), or what transformers
    finds there."""
    file = Path(path)
    if file.is_file() and ".model" in file.name:
        return SentencePieceTokenizer(file)
    if (file / SENTENCEPIECE).is_file():
        return SentencePieceTokenizer(file / SENTENCEPIECE)
    if gguf_file and (file / gguf_file).is_file() and _gguf_field(file / gguf_file) == "llama":
        return SentencePieceTokenizer(file, gguf_file)
    return HFTokenizer(path, gguf_file)


def sentencepiece_proto(serialised: bytes = b"") -> Any:
    """A SentencePiece model's content."""
    from sentencepiece import sentencepiece_model_pb2

    protocol: Any = sentencepiece_model_pb2  # its classes are made when it is imported
    return protocol.ModelProto.FromString(serialised)


def sentencepiece_of_gguf(path: Path) -> bytes:
    """The SentencePiece BPE model whose pieces, scores and types a GGUF file keeps, serialised.

    transformers reads those of Gemma as a unigram model (4.57), which splits words into fragments
    that the language model never saw.
    """
    field = partial(_gguf_field, path)
    unknown = field("unknown_token_id")
    model = sentencepiece_proto()
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
        if role == "bos" and not field("add_bos_token", True):
            token = -1  # it puts nothing before a text
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
