"""A Hugging Face causal language model as a fairseq encoder-decoder: ``--arch hf_causal_lm``.

The "encoder" has no parameters: it turns source tokens, which hold the whole prompt, into a
left-padded prompt.  The "decoder" runs the model on ``[prompt | previous outputs]`` and keeps the
logits of target positions only, which are chosen here, whatever a family offers; in generation the
prompt's keys and values are computed once and live in the incremental state.  So fairseq's datasets, criterions, beam search and generation, and
this project's caches, serve such models unchanged.  Without gradients, what all prompts of a batch
begin with (an instruction, k-shot examples) is computed once and kept for the next batches.

Ids are fairseq's: rows of the embedding and of the output projection are put in the dictionary's
order once, when the model is loaded (:mod:`sekd_fairseq.llm.vocabulary`), and put back by
``python -m sekd_fairseq.export_hf``.
"""

import inspect
import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.models import (
    FairseqEncoderDecoderModel,
    FairseqIncrementalDecoder,
    register_model,
)
from numpy.typing import NDArray
from torch import Tensor

from sekd_fairseq.datasets import common_beginning
from sekd_fairseq.errors import UserError, one_line_errors
from sekd_fairseq.llm.families import (
    Probe,
    Traits,
    find_traits,
    positions_of,
    refused,
    telling_weights,
    text_config,
)
from sekd_fairseq.llm.loading import (
    LORA_ALPHA,
    data_directory,
    left_in_single,
    load_language_model,
    weights_in_checkpoint,
)
from sekd_fairseq.llm.prompt_encoder import PromptEncoder
from sekd_fairseq.llm.vocabulary import FILE, Vocabulary, check_same_rows, select_rows
from sekd_fairseq.logits import capped
from sekd_fairseq.patches import take_rows_as_one_sequence

logger = logging.getLogger(__name__)

#: What :class:`~sekd_fairseq.llm.prompt_encoder.PromptEncoder` makes of a batch's sources.
EncoderOut = dict[str, list[Any]]
CACHE = "hf_key_value_cache"
#: How far a :func:`sample_of` one model may differ: 1e-5, less than bfloat16's step at most weights.
SAME_SAMPLE = 168
#: Prompts that begin alike share the computation of a beginning at least this long, in tokens.
SHARED_PREFIX = 16


@dataclass
class HFCausalLMConfig(FairseqDataclass):
    """Options of the architecture."""

    hf_model: Optional[str] = field(  # noqa: UP045 (fairseq's parser needs Optional)
        default=None,
        metadata={"help": "folder (or hub id) of a pretrained model, to start from its weights"},
    )
    hf_gguf_file: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"help": "a GGUF file in --hf-model, to start from its weights"}
    )
    hf_config: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "config.json of a model, to start from scratch (its vocab_size is replaced)"
        },
    )
    hf_layers: int = field(
        default=0,
        metadata={"help": "keep only so many layers of --hf-model, evenly spaced; 0 keeps all"},
    )
    hf_gradient_checkpointing: bool = field(
        default=False, metadata={"help": "compute activations again in backward: less memory"}
    )
    lora_r: int = field(
        default=0,
        metadata={
            "help": "rank of low-rank adapters to train instead of all weights; checkpoints then "
            "hold the adapters, and --hf-model must stay where it is. 0 is off"
        },
    )
    lora_alpha: int = field(default=LORA_ALPHA, metadata={"help": "scale of the adapters"})
    hf_state: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={"help": "set by training: the model's configuration, kept in the checkpoint"},
    )


class CausalLMDecoder(FairseqIncrementalDecoder):  # type: ignore[misc]
    """Runs the language model on the prompt and the previous outputs.

    Attributes
    ----------
    traits
        What is right for this model (:func:`sekd_fairseq.llm.families.find_traits`).
    """

    def __init__(self, dictionary: Any, model: Any, positions: int) -> None:
        super().__init__(dictionary)
        self.model = model
        self.positions = positions
        self.traits = Traits()
        self.shared_prefix: float = SHARED_PREFIX
        self._prefix: tuple[NDArray[np.int64], list[tuple[Tensor, Tensor]]] | None = None

    def _apply(self, fn: Any, recurse: bool = True) -> "CausalLMDecoder":
        """As in torch (``half()``, ``to()``), but what transformers leaves in single precision keeps its type
        (:func:`~sekd_fairseq.llm.loading.left_in_single`)."""
        dtype = fn(torch.zeros(())).dtype
        kept = set()
        if dtype in (torch.float16, torch.bfloat16):
            kept = {id(tensor) for tensor in left_in_single(self.lm, dtype)}

        def applied(tensor: Tensor) -> Tensor:
            if id(tensor) in kept:
                return tensor.to(fn(tensor.new_empty(0)).device)
            found: Tensor = fn(tensor)
            return found

        super()._apply(applied, recurse)
        return self

    def train(self, mode: bool = True) -> "CausalLMDecoder":
        """As in torch; a shared prefix belongs to the weights that it was computed with."""
        self._prefix = None
        super().train(mode)
        return self

    @property
    def lm(self) -> Any:
        """The model without the shell of adapters."""
        return getattr(self.model, "get_base_model", lambda: self.model)()

    @property
    def output_projection(self) -> Any:
        """The layer from features to logits; None where something lies between."""
        return None if self.traits.body is None else self.lm.get_output_embeddings()

    @property
    def softcap(self) -> float | None:
        """The cap on what :attr:`output_projection` gives."""
        return self.traits.softcap

    #: The logits are ``output_projection`` of the features, with :attr:`softcap`, where that is not None.
    plain_projection = True

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: EncoderOut,
        incremental_state: dict[str, Any] | None = None,
        features_only: bool = False,
        longest: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Logits (or features) at every target position, or at the last with a state; (B, T, V).

        ``prev_output_tokens`` (B, T) begin with fairseq's end-of-sentence token, for which the
        prompt's last token stands in. ``longest`` is the number of tokens of the longest prompt and
        translation together, where the batch knows it; counting it on a GPU would wait for the GPU.
        Features are there where :attr:`output_projection` is.
        """
        if incremental_state is None:
            features = self._all_places(encoder_out, prev_output_tokens, longest)
        elif self.traits.cache:
            features = self._step(encoder_out, prev_output_tokens[:, 1:], incremental_state)
        else:
            features = self._last_place(encoder_out, prev_output_tokens, longest)
        if self.traits.scale != 1.0:
            features = features * self.traits.scale
        if features_only:
            return features, {"attn": [None]}
        logits: Tensor = features
        if self.output_projection is not None:
            logits = capped(self.output_projection(features), self.softcap)
        if incremental_state is not None:
            padding = encoder_out["encoder_padding_mask"][0]
            logits = self._end_at_last_position(logits, padding, prev_output_tokens)
        return logits, {"attn": [None]}

    def _all_places(self, encoder_out: EncoderOut, previous: Tensor, longest: int | None) -> Tensor:
        """Features or logits at every place of the translations, (B, T, X)."""
        real = previous.ne(self.dictionary.pad())
        rows, places = self._join(encoder_out, previous, real, longest)
        if rows.size(1) > self.positions:
            raise UserError(
                f"a prompt and a translation of {rows.size(1)} tokens together: the model "
                f"has {self.positions} positions; shorten the prompt (fewer --shots) or "
                "leave out long sentences"
            )
        return self._read(rows, places, encoder_out)

    def _last_place(self, encoder_out: EncoderOut, previous: Tensor, longest: int | None) -> Tensor:
        """Features or logits at the last place in generation, without a cache, (B, 1, X)."""
        real = torch.ones_like(previous, dtype=torch.bool)  # padding too, where it was generated
        rows, places = self._join(encoder_out, previous, real, longest)
        rows = rows[:, : self.positions]
        places = places[:, -1:].clamp_max(rows.size(1) - 1)
        return self._read(rows, places, encoder_out)

    def _end_at_last_position(self, logits: Tensor, padding: Tensor, previous: Tensor) -> Tensor:
        """Logits that allow the end alone where the next token would have no position."""
        if padding.size(1) + previous.size(1) <= self.positions:
            return logits
        full = (~padding).sum(dim=1) + previous.size(1) > self.positions
        others = torch.arange(logits.size(-1), device=logits.device).ne(self.dictionary.eos())
        return logits.masked_fill(full.view(-1, 1, 1) & others, -torch.inf)

    def _join(
        self, encoder_out: EncoderOut, previous: Tensor, real: Tensor, longest: int | None
    ) -> tuple[Tensor, Tensor]:
        """Each prompt with what follows it, padded on the right, (B, L); and the places in them
        that give the logits, (B, T), anything for padding.

        No causal model sees what comes after a token, so padding there changes nothing, whatever a
        family makes of masks, positions, windows and states; and without a mask the fastest
        attention can run.
        """
        prompt, padding = (encoder_out[key][0] for key in ("encoder_out", "encoder_padding_mask"))
        number = real.long().cumsum(dim=1)  # 1 for the token that the prompt's last stands in for
        keep = torch.cat([~padding, real & number.gt(1)], dim=1)
        lengths = keep.sum(dim=1, keepdim=True)
        width = int(lengths.max()) if longest is None else longest
        order = (~keep).long().argsort(dim=1, stable=True)[:, :width]
        rows = torch.cat([prompt, previous], dim=1).gather(1, order)
        inside = torch.arange(rows.size(1), device=rows.device) < lengths
        rows = rows.masked_fill(~inside, self.dictionary.pad())
        places = number + (~padding).sum(dim=1, keepdim=True) - 2
        return rows, places.clamp(0, rows.size(1) - 1)

    def _read(self, rows: Tensor, places: Tensor, encoder_out: EncoderOut) -> Tensor:
        """Features at some places of rows (B, L), or the logits where there are no features."""
        if self.traits.body is None:
            return self._logits(partial(take, places=places), input_ids=rows, use_cache=False)
        if self.traits.cache and not torch.is_grad_enabled():
            prefix = self._shared_prefix(encoder_out)
            if prefix is not None:
                return self._after_prefix(rows, places, *prefix)
        return take(self._body(input_ids=rows, use_cache=False).last_hidden_state, places)

    def _step(
        self, encoder_out: EncoderOut, outputs: Tensor, incremental_state: dict[str, Any]
    ) -> Tensor:
        """Features or logits at the last place, from the keys and values of those before it."""
        state = self.get_incremental_state(incremental_state, CACHE)
        if state is None:
            features, cache = self._read_prompts(encoder_out)
            self.set_incremental_state(incremental_state, CACHE, {"cache": cache})
            if outputs.size(1) == 0:
                return features
        else:
            cache = state["cache"]
        prompt, padding = (encoder_out[key][0] for key in ("encoder_out", "encoder_padding_mask"))
        mask = torch.cat([~padding, torch.ones_like(outputs, dtype=torch.bool)], dim=1)
        return self._go_on(torch.cat([prompt, outputs], dim=1), mask, cache)

    def _read_prompts(self, encoder_out: EncoderOut) -> tuple[Tensor, Any]:
        """Features or logits at the last place of each row's prompt, and the keys and values.

        The rows of a beam have one prompt, which is read once, and what all prompts begin with is known.
        """
        from transformers import DynamicCache

        prompt, padding = encoder_out["prompts"]
        cache = DynamicCache()
        prefix = None if self.traits.body is None else self._shared_prefix(encoder_out)
        if prefix is not None:
            tokens, layers = prefix
            columns = torch.arange(len(tokens), device=prompt.device)
            # Which of the prefix's tokens stands in a column; before it is padding.
            places = (columns - padding.sum(dim=1, keepdim=True)).clamp_min(0)
            for layer, both in enumerate(layers):
                key, value = (states[0][:, places].transpose(0, 1) for states in both)
                cache.update(key, value, layer)
        features = self._go_on(prompt, ~padding, cache)
        (source,) = encoder_out["source"]
        cache.reorder_cache(source)
        return features.index_select(0, source), cache

    def _go_on(self, tokens: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """Features or logits at the last of tokens (B, L), of which the first are in the cache."""
        known = cache.get_seq_length()
        positions = (mask.long().cumsum(dim=1) - 1).clamp(0, self.positions - 1)
        options = {
            "input_ids": tokens[:, known:],
            "attention_mask": mask.long(),
            "position_ids": positions[:, known:],
            "past_key_values": cache,
            "use_cache": True,
        }
        if self.traits.body is None:
            return self._logits(lambda x: x[:, -1:], **options)
        features: Tensor = self._body(**options).last_hidden_state[:, -1:]
        return features

    def _logits(self, keep: Callable[[Tensor], Tensor], **options: Any) -> Tensor:
        """Logits of the model at the places that ``keep`` takes of all, (B, L, X) to (B, T, X).

        What the output projection reads is taken already: a prompt's logits are of no use, and over
        a wide vocabulary they are most of what a model needs of memory.
        """
        kept = False

        def before(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            nonlocal kept
            if kept or inputs[0].dim() != 3:
                return None
            kept = True
            return (keep(inputs[0]), *inputs[1:])

        hook = self.lm.get_output_embeddings().register_forward_pre_hook(before)
        try:
            logits: Tensor = self._run(self.lm, **options).logits
        finally:
            hook.remove()
        return logits if kept else keep(logits)

    def _body(self, **options: Any) -> Any:
        """The model without its output projection."""
        assert self.traits.body is not None
        return self._run(getattr(self.lm, self.traits.body), **options)

    def _run(self, module: Any, **options: Any) -> Any:
        """Run the model or its body with those options that the family knows."""
        known = inspect.signature(type(self.lm).forward).parameters
        try:
            return module(**{name: value for name, value in options.items() if name in known})
        except (ValueError, TypeError, AssertionError, NotImplementedError) as error:
            mode = "training" if self.training else "evaluation"
            raise refused(self.lm, f"one that reads token ids alone in {mode}", error) from error

    def _shared_prefix(
        self, encoder_out: EncoderOut
    ) -> tuple[NDArray[np.int64], list[tuple[Tensor, Tensor]]] | None:
        """What all prompts begin with, and its keys and values; None if that is little."""
        if self.shared_prefix == math.inf:
            return None
        prompt, padding = encoder_out["prompts"]
        (beginning,) = encoder_out.get("beginning") or [beginning_of(prompt, padding)]
        same = len(beginning)
        if same < self.shared_prefix:
            return None
        if self._prefix is not None:
            # A batch may have more in common by chance; the prefix of the others serves it too.
            known, layers = self._prefix
            fits = same // 2 <= len(known) <= same and layers[0][0].device == prompt.device
            if fits and np.array_equal(known, beginning[: len(known)]):
                return self._prefix
        from transformers import DynamicCache

        cache = self._body(
            input_ids=torch.from_numpy(beginning).to(prompt.device).unsqueeze(0),
            past_key_values=DynamicCache(),
            use_cache=True,
        ).past_key_values
        layers = [(cache[i][0], cache[i][1]) for i in range(len(cache))]
        self._prefix = beginning, layers
        return self._prefix

    def _after_prefix(
        self,
        rows: Tensor,
        places: Tensor,
        prefix: NDArray[np.int64],
        layers: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Features at some places of rows (B, L), from the prefix's keys and values."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (key, value) in enumerate(layers):
            cache.update(
                key.expand(len(rows), -1, -1, -1), value.expand(len(rows), -1, -1, -1), layer
            )
        positions = torch.arange(len(prefix), rows.size(1), device=rows.device)
        hidden = self._body(
            input_ids=rows[:, len(prefix) :],
            attention_mask=torch.ones_like(rows),
            position_ids=positions.expand(len(rows), -1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return take(hidden, (places - len(prefix)).clamp_min(0))

    def reorder_incremental_state(
        self, incremental_state: dict[str, Any], new_order: Tensor
    ) -> None:
        """Reorder the key-value cache as the beam is reordered."""
        cache = self.get_incremental_state(incremental_state, CACHE)
        if cache is not None:
            cache["cache"].reorder_cache(new_order)

    def max_positions(self) -> int:
        """Tokens that the language model has positions for."""
        return self.positions


@register_model("hf_causal_lm", dataclass=HFCausalLMConfig)
class HFCausalLM(FairseqEncoderDecoderModel):  # type: ignore[misc]
    """See the module. The buffer ``vocabulary_rows`` (V,) has the model's row of each symbol; with adapters,
    ``base_sample`` is the :func:`sample_of` the model that they belong to."""

    def __init__(
        self,
        encoder: PromptEncoder,
        decoder: CausalLMDecoder,
        rows: Tensor,
        data: Path,
        base_sample: Tensor | None = None,
    ) -> None:
        super().__init__(encoder, decoder)
        self.register_buffer("vocabulary_rows", rows)
        if base_sample is not None:
            self.register_buffer("base_sample", base_sample)
        self.data = data

    @classmethod
    def build_model(cls, cfg: HFCausalLMConfig, task: Any) -> "HFCausalLM":
        """Load pretrained weights, or make a model from a configuration."""
        take_rows_as_one_sequence()
        lm, rows = load_language_model(cfg, task)
        fresh = weights_in_checkpoint(cfg) or not cfg.hf_model
        sample = sample_of(lm) if cfg.lora_r > 0 else None
        # In evaluation: dropout would make every row another.
        lm.eval()
        with telling_weights(lm) if fresh else nullcontext():
            size = len(task.target_dictionary)
            probe = Probe.of(lm, range(size) if fresh else rows)
            if not fresh:
                select_rows(lm, rows)
            decoder = CausalLMDecoder(task.target_dictionary, lm, positions_of(lm))
            find_traits(decoder, probe)
        if not decoder.traits.cache:
            logger.info(
                "%s: its key-value cache does not serve padded batches, so generation reads the "
                "whole prefix at every step",
                type(lm).__name__,
            )
        if cfg.hf_gradient_checkpointing:
            try:
                lm.gradient_checkpointing_enable()
            except ValueError as error:
                raise refused(lm, "one for --hf-gradient-checkpointing", error) from error
        others = freeze_beside_text(lm)
        if cfg.lora_r > 0:
            from peft import LoraConfig, get_peft_model

            adapters = LoraConfig(
                r=cfg.lora_r,
                lora_alpha=cfg.lora_alpha,
                target_modules="all-linear",
                exclude_modules=others or None,
            )
            decoder.model = get_peft_model(lm, adapters)
        encoder = PromptEncoder(task.source_dictionary, decoder.positions)
        return cls(encoder, decoder, torch.tensor(rows), data_directory(task), sample)

    @property
    def joint_positions(self) -> int:
        """The longest prompt and translation together, as their sizes in the data count them: the
        end of the source is not part of the prompt, and that of the translation is not read."""
        positions: int = self.decoder.positions
        return positions + 2

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """All weights, or with adapters these alone."""
        state: dict[str, Tensor] = super().state_dict(*args, **kwargs)
        if not hasattr(self.decoder.model, "peft_config"):
            return state
        kept = ("vocabulary_rows", "base_sample")
        return {k: v for k, v in state.items() if "lora_" in k or k.endswith(kept)}

    def upgrade_state_dict_named(self, state_dict: dict[str, Tensor], name: str) -> None:
        """Refuse a checkpoint made with data of another order; fill in the frozen weights, which a
        checkpoint of adapters does not hold.

        A checkpoint of all weights is none that adapters can begin with, nor the other way round: those
        of adapters keep what ``--hf-model`` names.
        """
        adapters = any(".lora_A." in key for key in state_dict)
        if adapters != hasattr(self.decoder.model, "peft_config"):
            kinds = ("of all weights", "of adapters")
            with one_line_errors():  # fairseq would take it for another architecture
                raise UserError(
                    f"expected a checkpoint {kinds[not adapters]}, found one {kinds[adapters]}; make a folder "
                    "of it with python -m sekd_fairseq.export_hf CHECKPOINT --data DATA --output FOLDER, and "
                    "give --hf-model FOLDER in its place"
                )
        if (self.data / FILE).is_file() and "vocabulary_rows" in state_dict:
            with one_line_errors():
                rows = Vocabulary.load(self.data, self.decoder.dictionary.symbols).rows
                found = state_dict["vocabulary_rows"].tolist()
                check_same_rows(self.data, rows, found, "the checkpoint's data")
        if adapters:
            own = self.get_buffer("base_sample")
            sample = state_dict.get("base_sample", own).to(own)
            with one_line_errors():
                if sample.shape != own.shape or (sample - own).abs().max() > SAME_SAMPLE:
                    raise UserError(
                        "--hf-model: expected the model that the checkpoint's adapters were trained on, found "
                        "one with other weights; give the place of that one"
                    )
            for key, value in super().state_dict().items():
                state_dict.setdefault(key, value)


def sample_of(lm: Any) -> Tensor:
    """A few of each of a model's weights, by which it is known again, in units of 2^-24, (n,) int64.

    Whole numbers, because half precision rounds none of them, nor an average of checkpoints.
    """
    values = torch.cat([weight.detach().flatten()[:4].double() for weight in lm.parameters()])
    return (values * 2**24).round().long()


def freeze_beside_text(lm: Any) -> list[str]:
    """Freeze what text does not go through, of images or sound; returns its linear layers, by name.

    No gradient would come to it, but memory for the optimiser, and weight decay.
    """
    if text_config(lm) is lm.config:
        return []
    parts = (lm.get_decoder(), lm.get_input_embeddings(), lm.get_output_embeddings())
    text = {id(weight) for part in parts for weight in part.parameters()}
    for weight in lm.parameters():
        weight.requires_grad_(id(weight) in text)
    return [
        name
        for name, module in lm.named_modules()
        if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad
    ]


def beginning_of(prompt: Tensor, padding: Tensor) -> NDArray[np.int64]:
    """What left-padded prompts (B, S) begin with, but for the last token of the shortest."""
    tokens, before = prompt.cpu().numpy(), padding.sum(dim=1, keepdim=True).cpu().numpy()
    shortest = tokens.shape[1] - int(before.max())
    rows = np.take_along_axis(tokens, before + np.arange(shortest), axis=1)
    return common_beginning(rows, shortest - 1)


def take(x: Tensor, places: Tensor) -> Tensor:
    """Some places (B, T) of a sequence (B, L, D), as (B, T, D)."""
    return x.gather(1, places.unsqueeze(2).expand(-1, -1, x.size(2)))
