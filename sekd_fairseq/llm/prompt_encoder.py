"""The "encoder" of a language model: source tokens to the prompt that they hold."""

from typing import Any

import numpy as np
import torch
from fairseq.models import FairseqEncoder
from numpy.typing import NDArray
from torch import Tensor


def prompt_mask(src_tokens: Tensor, pad: int, eos: int) -> Tensor:
    """Which source tokens (B, S) are the prompt's: all but padding and the one end that closes a
    source. Ends inside (of turns, of examples) belong to it."""
    content = src_tokens.ne(pad)
    left = content.flip(1).long().cumsum(dim=1).flip(1)  # so many from here to the last
    return content & ~(left.eq(1) & src_tokens.eq(eos))


class PromptEncoder(FairseqEncoder):  # type: ignore[misc]
    """Source tokens to a left-padded prompt, without the end that closes them; no parameters."""

    def __init__(self, dictionary: Any, positions: int) -> None:
        super().__init__(dictionary)
        self.positions = positions

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Tensor | None = None,
        beginning: NDArray[np.int64] | None = None,
        **_: Any,
    ) -> dict[str, list[Any]]:
        """Make the prompts of a batch.

        Returns
        -------
        encoder_out : (B, S) int64
            The prompt of each row.
        encoder_padding_mask : (B, S) bool
            Its padding.
        prompts
            The same two as they were made: of each source once, where rows are repeated for a beam.
        source : (B,) int64
            Which of these each row has.
        beginning : (n,) int64 array
            What all prompts begin with, where the batch knows it
            (:class:`~sekd_fairseq.datasets.StableOrderDataset`); finding it on a GPU would wait for it.
        """
        keep = prompt_mask(src_tokens, self.dictionary.pad(), self.dictionary.eos())
        # Stable: what is not kept goes to the left, the rest stays in order.
        order = keep.long().argsort(dim=1, stable=True)
        # As wide as the source: how long the longest prompt is, a GPU would have to be waited for.
        prompt = src_tokens.masked_fill(~keep, self.dictionary.pad()).gather(1, order)
        padding = prompt.eq(self.dictionary.pad())
        return {
            "encoder_out": [prompt],
            "encoder_padding_mask": [padding],
            "prompts": [prompt, padding],
            "source": [torch.arange(len(prompt), device=prompt.device)],
            "beginning": [] if beginning is None else [beginning],
        }

    def reorder_encoder_out(
        self, encoder_out: dict[str, list[Any]], new_order: Tensor
    ) -> dict[str, list[Any]]:
        """Rows in another order, as beam search asks."""
        moved = ("encoder_out", "encoder_padding_mask", "source")
        return encoder_out | {
            key: [value.index_select(0, new_order) for value in encoder_out[key]] for key in moved
        }

    def max_positions(self) -> int:
        """Tokens that the language model has positions for."""
        return self.positions
