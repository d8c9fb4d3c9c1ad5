"""The bijection between a fairseq dictionary and the rows of a language model.

fairseq's ids 0 to 3 (``<s>``, ``<pad>``, ``</s>``, ``<unk>``) stand for the model's own special
tokens of these roles; the tokenizer's other tokens follow in its order, named ``ID:PIECE``.  A role
that the model has no token for gets a new row.  Rows beyond the tokenizer's tokens (padding of the
matrix) have no symbol, so models of one family whose matrices are padded differently share a
dictionary.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sekd_fairseq.errors import UserError
from sekd_fairseq.teacher_cache.format import atomic_write, hash_symbols

FILE = "llm.json"
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
NEW_ROW = -1


@dataclass(frozen=True)
class Vocabulary:
    """What a data directory says of its symbols.

    Attributes
    ----------
    rows
        The model's row of each symbol; -1 for one that the model lacks.
    tokenizer, gguf_file
        Where the tokenizer came from.
    template
        The prompt template that the data were made with.
    dictionary_hash
        Of the dictionary that this belongs to.
    """

    rows: list[int]
    tokenizer: str
    template: str
    dictionary_hash: str
    gguf_file: str | None = None

    def save(self, directory: Path) -> None:
        """Write it beside the dictionary."""
        with atomic_write(directory / FILE) as stream:
            stream.write((json.dumps(asdict(self)) + "\n").encode())

    @classmethod
    def load(cls, directory: Path, symbols: Sequence[str]) -> "Vocabulary":
        """Read it; ``UserError`` if the directory was not made for a language model."""
        path = directory / FILE
        try:
            found = cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise UserError(
                f"{directory}: expected data made for a language model ({FILE}), found none; make "
                "them with: python scripts/prepare_llm_data.py"
            ) from None
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: cannot be read ({error}); make the data again") from error
        if found.dictionary_hash != hash_symbols(symbols):
            raise UserError(
                f"{directory}: the dictionary ({len(symbols)} symbols) is not the one that {FILE} "
                f"was written for ({len(found.rows)}); make the data again"
            )
        return found


def symbol_of(token: int, piece: str) -> str:
    """The dictionary's name of a token: its id, and its text for people; no white space in it."""
    shown = "".join(f"\\u{ord(c):04x}" if c.isspace() or not c.isprintable() else c for c in piece)
    return f"{token}:{shown}"


def token_of(symbol: str) -> int:
    """The tokenizer's id in a symbol; -1 for a special one."""
    head = symbol.partition(":")[0]
    return int(head) if head.isdigit() else NEW_ROW


def build_vocabulary(
    pieces: Sequence[str], specials: Sequence[int | None], keep: set[int] | None = None
) -> tuple[list[str], list[int]]:
    """Symbols of a dictionary and the model's row of each.

    Parameters
    ----------
    pieces
        Text of every token of the tokenizer, by id.
    specials
        The tokenizer's ids of beginning, padding, end, unknown; None where it has none. One id in
        two roles (padding that is the end, say) counts for the role that needs it most: end,
        beginning, unknown, padding.
    keep
        The ids to keep, or None for all.
    """
    roles: list[int] = [NEW_ROW] * 4
    for role in (2, 0, 3, 1):
        token = specials[role]
        if token is not None and token not in roles:
            roles[role] = token
    others = [
        token
        for token in range(len(pieces))
        if token not in roles and (keep is None or token in keep)
    ]
    symbols = [*SPECIALS, *(symbol_of(token, pieces[token]) for token in others)]
    return symbols, roles + others


def with_end(rows: Sequence[int], token: int) -> list[int]:
    """Rows where the end of sentence is another token, and that token the end of sentence.

    For few-shot prompts, after which a base model does not end the text but begins the next example.
    """
    other, swapped = list(rows).index(token), list(rows)
    swapped[2], swapped[other] = swapped[other], swapped[2]
    return swapped


@torch.no_grad()
def select_rows(lm: Any, rows: Sequence[int]) -> None:
    """Put a model's embedding and output rows in the order of ``rows``; -1 makes a new row, the
    mean of all.

    Raises
    ------
    UserError
        The model has fewer rows than the tokenizer has tokens.
    """
    embedding, projection = _layer(lm, "input"), _layer(lm, "output")
    if max(rows) >= embedding.weight.size(0):
        raise UserError(
            f"--hf-model has {embedding.weight.size(0)} vocabulary rows, the data's tokenizer at "
            f"least {max(rows) + 1} tokens: expected the tokenizer of this model; make the data "
            "again with it"
        )
    index = torch.tensor(rows, device=embedding.weight.device)

    def selected(side: str) -> Tensor:
        old = _layer(lm, side).weight
        new: Tensor = old[index.clamp_min(0)]
        new[index < 0] = old.mean(dim=0)
        return new

    _replace_matrices(lm, selected)
    if getattr(projection, "bias", None) is not None:
        projection.bias = torch.nn.Parameter(projection.bias[index.clamp_min(0)])
    embedding.padding_idx = None
    lm.config.bos_token_id, lm.config.eos_token_id, lm.config.pad_token_id = 0, 2, None


@torch.no_grad()
def restore_rows(lm: Any, rows: Sequence[int], original: Any | None) -> None:
    """The inverse of :func:`select_rows`: rows in the tokenizer's order.

    Tokens without a symbol get their rows from ``original``, the model that ``lm`` started from,
    or else zeros.
    """
    index = torch.tensor(rows)
    known = index >= 0

    def restored(side: str) -> Tensor:
        weight = _layer(lm, side).weight
        if original is None:
            full = torch.zeros(max(rows) + 1, weight.size(1))
        else:
            full = _layer(original, side).weight.detach().clone()
        full[index[known]] = weight[known].to(full.dtype)
        return full

    _replace_matrices(lm, restored)
    for config in (lm.config, lm.generation_config):
        ids = (row if row != NEW_ROW else None for row in rows[:3])
        config.bos_token_id, config.pad_token_id, config.eos_token_id = ids


def _layer(lm: Any, side: str) -> Any:
    """The embedding (``input``) or the output projection (``output``)."""
    return getattr(lm, f"get_{side}_embeddings")()


def _replace_matrices(lm: Any, new: Callable[[str], Tensor]) -> None:
    """Give a model the matrices ``new("input")`` and ``new("output")``; tied ones stay tied."""
    embedding, projection = _layer(lm, "input"), _layer(lm, "output")
    tied = projection.weight is embedding.weight
    embedding.weight = torch.nn.Parameter(new("input"))
    projection.weight = embedding.weight if tied else torch.nn.Parameter(new("output"))
    size = embedding.weight.size(0)
    embedding.num_embeddings = projection.out_features = lm.config.vocab_size = size
