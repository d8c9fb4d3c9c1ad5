"""The "encoder" of a language model: source tokens to the prompt that they hold."""

from typing import Any

from fairseq.models import FairseqEncoder
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
        self, src_tokens: Tensor, src_lengths: Tensor | None = None, **_: Any
    ) -> dict[str, list[Tensor]]:
        """``{"encoder_out": [prompt (B, S)], "encoder_padding_mask": [pad (B, S)]}``."""
        keep = prompt_mask(src_tokens, self.dictionary.pad(), self.dictionary.eos())
        # Stable: what is not kept goes to the left, the rest stays in order.
        order = keep.long().argsort(dim=1, stable=True)
        # As wide as the source: how long the longest prompt is, a GPU would have to be waited for.
        prompt = src_tokens.masked_fill(~keep, self.dictionary.pad()).gather(1, order)
        return {
            "encoder_out": [prompt],
            "encoder_padding_mask": [prompt.eq(self.dictionary.pad())],
        }

    def reorder_encoder_out(
        self, encoder_out: dict[str, list[Tensor]], new_order: Tensor
    ) -> dict[str, list[Tensor]]:
        """Rows in another order, as beam search asks."""
        return {
            key: [value.index_select(0, new_order) for value in values]
            for key, values in encoder_out.items()
        }

    def max_positions(self) -> int:
        """Tokens that the language model has positions for."""
        return self.positions
