"""The output projection of a model, where a loss may apply it to some tokens at a time."""

import inspect
from typing import Any

import torch
from fairseq.models.transformer import TransformerDecoderBase

from sekd_fairseq.errors import UserError


def parse_chunk_tokens(value: str) -> int | None:
    """The value of ``--sekd-chunk-tokens``: None for ``auto``."""
    if value == "auto":
        return None
    try:
        tokens = int(value)
    except ValueError:
        tokens = -1
    if tokens < 0:
        raise UserError(f"--sekd-chunk-tokens: expected 0 or more, or auto, found {value!r}")
    return tokens


def output_projection(model: Any) -> torch.nn.Linear | None:
    """The linear layer that turns ``model(..., features_only=True)`` into its logits, if any.

    None for a decoder that changes the logits afterwards, and a weight that is sharded over
    processes.
    """
    decoder = model.decoder
    projection = getattr(decoder, "output_projection", None)
    plain = (
        isinstance(projection, torch.nn.Linear)
        and projection.weight.dim() == 2
        and "features_only" in inspect.signature(decoder.forward).parameters
        and (
            getattr(decoder, "plain_projection", False)
            or type(decoder).output_layer is TransformerDecoderBase.output_layer
        )
    )
    return projection if plain else None
