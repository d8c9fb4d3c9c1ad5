"""Logits of models at the target positions of a batch."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from fairseq.models.transformer import TransformerDecoderBase
from torch import Tensor

from sekd_fairseq.errors import UserError

#: Logits in single precision that are held at a time: 256 MB, and a few times as much beside them.
BLOCK_ELEMENTS = 2**26


def flat_logits(logits: Tensor, target: Tensor, symbols: int | None = None) -> Tensor:
    """Logits, or features, at every target position, (B, T, X) to (B T, X).

    Raises
    ------
    UserError
        They are not at the positions of ``target`` (B, T), or logits of another number of symbols.
    """
    expected = (*target.shape, symbols or logits.size(-1))
    if logits.shape != expected:
        raise other_shape(tuple(logits.shape), expected)
    return logits.reshape(-1, logits.size(-1))


def other_shape(found: tuple[int | None, ...], expected: tuple[int | None, ...]) -> UserError:
    """The line about logits that are not at the target's places and of its symbols."""
    return UserError(
        f"the model gives logits of shape {found}: expected {expected}, one for each target token and "
        "each symbol of the data's dictionary; the model and DATA do not belong together, or this "
        "--arch does not give logits at target positions"
    )


def output_projection(model: Any) -> torch.nn.Linear | None:
    """The linear layer that turns ``model(..., features_only=True)`` into its logits, but for a cap on
    these (:func:`softcap`), if any.

    None for a decoder that changes the logits afterwards.
    """
    decoder = model.decoder
    projection = getattr(decoder, "output_projection", None)
    plain = (
        isinstance(projection, torch.nn.Linear)
        and "features_only" in inspect.signature(decoder.forward).parameters
        and (
            getattr(decoder, "plain_projection", False)
            or type(decoder).output_layer is TransformerDecoderBase.output_layer
        )
    )
    return projection if plain else None


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """``c tanh(z / c)``, as Gemma 2 has it; without a cap the logits as they are."""
    return logits if cap is None else torch.tanh(logits / cap) * cap


def softcap(model: Any) -> float | None:
    """The cap on what :func:`output_projection` gives, if any."""
    found: float | None = getattr(model.decoder, "softcap", None)
    return found


class TokenLogits:
    """A model's logits at ``N`` target tokens of a batch, made for some of them at a time.

    Where a linear layer makes them of features, these alone are held: the logits of a wide vocabulary are
    most of what a model takes otherwise.

    Parameters
    ----------
    model, sample
        The model is run on the batch.
    positions : (N,) int64
        The tokens' places in the flattened target.
    symbols
        Of the dictionary.

    Raises
    ------
    UserError
        As :func:`flat_logits`.
    """

    def __init__(
        self, model: Any, sample: dict[str, Any], positions: Tensor, symbols: int | None = None
    ) -> None:
        self.projection, self._softcap = output_projection(model), softcap(model)
        target = sample["target"]
        if self.projection is None:
            self._found = flat_logits(model(**sample["net_input"])[0], target, symbols)
            self._positions = positions
            return
        if symbols not in (None, self.projection.out_features):
            raise other_shape(
                (*target.shape, self.projection.out_features), (*target.shape, symbols)
            )
        features = model(**sample["net_input"], features_only=True)[0]
        self._found = flat_logits(features, target).index_select(0, positions)

    def __getitem__(self, part: slice) -> Tensor:
        """Those of some of the tokens, (n, V) in the model's type; nothing else shares their memory."""
        if self.projection is None:
            return self._found.index_select(0, self._positions[part])
        return capped(self.projection(self._found[part]), self._softcap)


@torch.no_grad()
def token_logits(
    models: Sequence[Any],
    sample: dict[str, Any],
    pad: int,
    temperature: float = 1.0,
    symbols: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Next-token distributions of an ensemble at a batch's target tokens, some tokens at a time.

    Yields
    ------
    target : (n,) int64
        Reference tokens that are not padding, in the batch's order.
    z : (n, V) float32
        Logits over ``temperature``; of several models the log of their mean probability. The
        caller may overwrite it.

    Raises
    ------
    UserError
        A model gives no logits for each target token and each of ``symbols``.
    """
    target = sample["target"].view(-1)
    positions = target.ne(pad).nonzero().squeeze(1)
    logits = [TokenLogits(model, sample, positions, symbols) for model in models]
    target = target[positions]
    step = max(1, BLOCK_ELEMENTS // logits[0][:0].size(1))
    for start in range(0, len(target), step):
        part = slice(start, start + step)
        z = [one[part].float() for one in logits]
        if temperature != 1.0:
            z = [one.div_(temperature) for one in z]
        if len(z) > 1:
            log_p = torch.stack([one.log_softmax(dim=-1) for one in z])
            z = [log_p.logsumexp(dim=0) - np.log(len(z))]
        yield target[part], z[0]
