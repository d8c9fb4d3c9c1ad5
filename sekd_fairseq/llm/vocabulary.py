"""The bijection between a fairseq dictionary and the rows of a language model.

fairseq's ids 0, 2 and 3 (``<s>``, ``</s>``, ``<unk>``) stand for the model's own beginning, the token
that ends a translation, and the unknown token; the tokenizer's other tokens follow in its order,
named ``ID:PIECE``.  A role that the model has no token for gets a new row, and ``<pad>`` always does:
what fills a batch is never a token that a prompt may have.  Rows beyond the tokenizer's tokens
(padding of the matrix) have no symbol, so models of one family whose matrices are padded differently
share a dictionary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.runs.files import atomic_write, read_json, sealed_json
from sekd_fairseq.errors import UserError
from sekd_fairseq.llm.prompts import PromptSettings
from sekd_fairseq.llm.tokenizer import Tokenizer
from sekd_fairseq.teacher_cache.format import hash_symbols

FILE = "llm.json"
TOKENIZER = "tokenizer"
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
EOS, UNK = (SPECIALS.index(name) for name in ("</s>", "<unk>"))
NEW_ROW = -1


@dataclass(frozen=True)
class Vocabulary:
    """What a data directory says of its symbols.

    Attributes
    ----------
    rows
        The model's row of each symbol; -1 for one that the model lacks. That of ``</s>`` is the
        token that ends a translation.
    tokenizer, gguf_file
        Where the tokenizer came from; the data have a copy of it.
    prompt
        What prompts are made of; None for data without text (benchmarks).
    dictionary_hash
        Of the dictionary that this belongs to.
    """

    rows: list[int]
    tokenizer: str
    prompt: PromptSettings | None
    dictionary_hash: str
    gguf_file: str | None = None

    @cached_property
    def _symbol_of(self) -> dict[int, int]:
        return {row: symbol for symbol, row in enumerate(self.rows) if row != NEW_ROW}

    def symbols(self, tokens: Sequence[int], tokenizer: Tokenizer) -> list[int]:
        """The symbols of tokens; one that was pruned away is spelled in bytes."""
        found: list[int] = []
        for token in tokens:
            spelled = [token] if token in self._symbol_of else tokenizer.spell(token) or [token]
            found += [self._symbol_of.get(one, UNK) for one in spelled]
        return found

    def save(self, directory: Path, tokenizer: Tokenizer | None = None) -> None:
        """Write it beside the dictionary, with the tokenizer."""
        if tokenizer is not None:
            tokenizer.save(directory / TOKENIZER)
        with atomic_write(directory / FILE) as stream:
            stream.write(sealed_json(asdict(self), indent=None))

    @classmethod
    def load(cls, directory: Path, symbols: Sequence[str]) -> "Vocabulary":
        """Read it; ``UserError`` if the directory was not made for a language model."""
        path = directory / FILE
        try:
            content = read_json(path)[0]
            prompt = content["prompt"]
            found = cls(**{**content, "prompt": PromptSettings(**prompt) if prompt else None})
        except FileNotFoundError:
            raise UserError(
                f"{directory}: expected data made for a language model ({FILE}), found none; make "
                "them with: python -m sekd_fairseq.prepare_llm_data"
            ) from None
        except (ValueError, TypeError, KeyError) as error:
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


def build_vocabulary(
    pieces: Sequence[str], specials: Sequence[int | None], keep: set[int] | None = None
) -> tuple[list[str], list[int]]:
    """Symbols of a dictionary and the model's row of each.

    Parameters
    ----------
    pieces
        Text of every token of the tokenizer, by id.
    specials
        Ids of beginning, padding, end of a translation, unknown; None where there is none. One id
        in two roles (beginning that is the end, say) counts for the role that needs it most: end,
        beginning, unknown. The padding of a tokenizer is a token as any other.
    keep
        The ids to keep, or None for all.
    """
    roles: list[int] = [NEW_ROW] * 4
    for role in (2, 0, 3):
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

    For a teacher whose prompts end translations otherwise than the student's, under one dictionary.
    """
    other, swapped = list(rows).index(token), list(rows)
    swapped[2], swapped[other] = swapped[other], swapped[2]
    return swapped


def check_same_rows(data: Path, rows: Sequence[int], found: Sequence[int], whose: str) -> None:
    """Refuse what was made for data whose symbols stand for other tokens than those of ``data``.

    The end of translations is a symbol of its own, so prompts that end them otherwise have another order
    of the same symbols. Tokens beyond the last of ``found``, which a model may lack, are not compared.
    """
    most = max(found, default=NEW_ROW)
    if all(one == two or one > most for one, two in zip(rows, found, strict=False)):
        return
    raise UserError(
        f"{data}: its translations end with token {rows[EOS]} of the model, those of {whose} with token "
        f"{found[EOS]}; expected both to be made for the same prompts (bin, or teacher, of one "
        "prepare_llm_data)"
    )


@torch.no_grad()
def select_rows(lm: Any, rows: Sequence[int]) -> None:
    """Put a model's embedding and output rows in the order of ``rows``; -1 makes a new row, the
    mean of all."""

    def selected(side: str, old: Tensor) -> Tensor:
        index = torch.tensor(rows, device=old.device)
        new = old[index.clamp_min(0)]
        new[index < 0] = old.mean(dim=0)
        return new

    _replace(lm, selected)
    lm.config.bos_token_id, lm.config.eos_token_id, lm.config.pad_token_id = 0, 2, None


@torch.no_grad()
def restore_rows(lm: Any, rows: Sequence[int], originals: Mapping[str, Tensor]) -> None:
    """The inverse of :func:`select_rows`: rows in the tokenizer's order.

    Tokens without a symbol get their rows from ``originals``, the :func:`vocabulary_parameters` of the
    model that ``lm`` started from, or else the mean of all, whose logit is below the largest.
    """
    index = torch.tensor(rows)
    known = index >= 0

    def restored(side: str, old: Tensor) -> Tensor:
        if side in originals:
            full = originals[side].detach().to(old.dtype, copy=True)
        else:
            full = old[known].mean(dim=0).repeat(max(rows) + 1, *[1] * (old.dim() - 1))
        full[index[known]] = old[known]
        return full

    _replace(lm, restored)
    for config in filter(None, (lm.config, lm.generation_config)):
        ids = (row if row != NEW_ROW else None for row in rows[:3])
        config.bos_token_id, config.pad_token_id, config.eos_token_id = ids


def vocabulary_parameters(lm: Any) -> dict[str, Tensor]:
    """What has one row per token: the embedding (``input``), the output projection (``output``, the
    same where they are tied), and the projection's ``bias`` if there is one."""
    embedding, projection = lm.get_input_embeddings(), lm.get_output_embeddings()
    if not (isinstance(embedding, torch.nn.Embedding) and isinstance(projection, torch.nn.Linear)):
        found = " and ".join(type(layer).__name__ for layer in (embedding, projection))
        raise UserError(
            f"{type(lm).__name__} is no model for --arch hf_causal_lm: expected an Embedding of its "
            f"tokens and a Linear output projection, found {found}"
        )
    parameters = {"input": embedding.weight, "output": projection.weight}
    return parameters if projection.bias is None else {**parameters, "bias": projection.bias}


def _replace(lm: Any, new: Callable[[str, Tensor], Tensor]) -> None:
    """Give a model ``new(name, parameter)`` for its :func:`vocabulary_parameters`, wherever it holds
    them; tied ones stay tied."""
    made: dict[int, torch.nn.Parameter] = {}
    for name, old in vocabulary_parameters(lm).items():
        if id(old) not in made:
            made[id(old)] = torch.nn.Parameter(new(name, old))
    size = len(next(iter(made.values())))
    for module in lm.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if id(old) in made:
                setattr(module, name, made[id(old)])
                if isinstance(module, torch.nn.Embedding):
                    module.num_embeddings, module.padding_idx = size, None
                elif isinstance(module, torch.nn.Linear):
                    module.out_features = size
    lm.config.get_text_config().vocab_size = size
