"""A Hugging Face causal language model as a fairseq encoder-decoder: ``--arch hf_causal_lm``.

The "encoder" has no parameters: it turns source tokens, which hold the whole prompt, into a
left-padded prompt.  The "decoder" runs the model on ``[prompt | previous outputs]`` and keeps the
logits of target positions only; in generation the prompt's keys and values are computed once and
live in the incremental state.  So fairseq's datasets, criterions, beam search and generation, and
this project's caches, serve such models unchanged.  Without gradients, what all prompts of a batch
begin with (an instruction, k-shot examples) is computed once and kept for the next batches.

Ids are fairseq's: rows of the embedding and of the output projection are put in the dictionary's
order once, when the model is loaded (:mod:`sekd_fairseq.llm.vocabulary`), and put back by
``scripts/export_hf.py``.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.models import (
    FairseqEncoder,
    FairseqEncoderDecoderModel,
    FairseqIncrementalDecoder,
    register_model,
)
from omegaconf import II, open_dict
from torch import Tensor

from sekd_fairseq.errors import UserError, one_line_errors
from sekd_fairseq.llm.loading import from_config, keep_layers, pretrained, read_config
from sekd_fairseq.llm.vocabulary import Vocabulary, select_rows

CACHE = "hf_key_value_cache"
#: Prompts that begin alike share the computation of a beginning at least this long, in tokens.
SHARED_PREFIX = 16
#: Options of a config that change logits after the output projection.
LOGIT_OPTIONS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


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
    lora_alpha: int = field(default=16, metadata={"help": "scale of the adapters"})
    hf_state: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={"help": "set by training: the model's configuration, kept in the checkpoint"},
    )
    data: str = II("task.data")


class PromptEncoder(FairseqEncoder):  # type: ignore[misc]
    """Source tokens to a left-padded prompt, without the end-of-sentence token; no parameters."""

    def __init__(self, dictionary: Any, positions: int) -> None:
        super().__init__(dictionary)
        self.positions = positions

    def forward(
        self, src_tokens: Tensor, src_lengths: Tensor | None = None, **_: Any
    ) -> dict[str, list[Tensor]]:
        """``{"encoder_out": [prompt (B, P)], "encoder_padding_mask": [pad (B, P)]}``."""
        keep = src_tokens.ne(self.dictionary.pad()) & src_tokens.ne(self.dictionary.eos())
        # Stable: what is not kept goes to the left, the rest stays in order.
        order = keep.long().argsort(dim=1, stable=True)
        longest = int(keep.sum(dim=1).max())
        prompt = src_tokens.masked_fill(~keep, self.dictionary.pad()).gather(1, order)
        prompt = prompt[:, prompt.size(1) - longest :]
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


class CausalLMDecoder(FairseqIncrementalDecoder):  # type: ignore[misc]
    """Runs the language model on the prompt and the previous outputs."""

    def __init__(self, dictionary: Any, model: Any, positions: int) -> None:
        super().__init__(dictionary)
        self.model = model
        self.positions = positions
        self._prefix: tuple[Tensor, list[tuple[Tensor, Tensor]]] | None = None

    def train(self, mode: bool = True) -> "CausalLMDecoder":
        """As in torch; a shared prefix belongs to the weights that it was computed with."""
        self._prefix = None
        super().train(mode)
        return self

    @property
    def output_projection(self) -> Any:
        """The layer from features to logits; None where something else follows it."""
        if any(getattr(self.model.config, name, None) for name in LOGIT_OPTIONS):
            return None
        return self.model.get_output_embeddings()

    #: The logits are ``output_projection`` of the features, where that is not None.
    plain_projection = True

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: dict[str, list[Tensor]],
        incremental_state: dict[str, Any] | None = None,
        features_only: bool = False,
        longest: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Logits (or features) at every target position, or at the last with a state; (B, T, V).

        ``prev_output_tokens`` (B, T) begin with fairseq's end-of-sentence token, for which the
        prompt's last token stands in. ``longest`` is the number of tokens of the longest prompt and
        translation together, where the batch knows it; counting it on a GPU would wait for the GPU.
        """
        prompt = encoder_out["encoder_out"][0]
        length = prev_output_tokens.size(1)
        outputs = prev_output_tokens[:, 1:]
        mask = torch.cat(
            [prompt.ne(self.dictionary.pad()), outputs.ne(self.dictionary.pad())], dim=1
        )
        if incremental_state is not None:
            # Generated tokens may be anything, padding too; they are attended to all the same.
            mask[:, prompt.size(1) :] = True
        else:
            if longest is None:
                longest = mask.size(1)
                if longest > self.positions:
                    longest = int(mask.sum(dim=1).max())
            if longest > self.positions:
                with one_line_errors():
                    raise UserError(
                        f"a prompt and a translation of {longest} tokens together: "
                        f"the model has {self.positions} positions; shorten the prompt (fewer "
                        "--shots) or leave out long sentences"
                    )
            if self.output_projection is not None:
                prefix = None if torch.is_grad_enabled() else self._shared_prefix(prompt)
                features = self._features(prompt, outputs, longest, prefix)
                logits = features if features_only else self.output_projection(features)
                return logits, {"attn": [None]}
        options: dict[str, Any] = {
            "input_ids": torch.cat([prompt, outputs], dim=1),
            "attention_mask": mask.long(),
            "position_ids": (mask.long().cumsum(dim=1) - 1).clamp_min(0),
            "use_cache": incremental_state is not None,
        }
        if incremental_state is not None:
            cache = self.get_incremental_state(incremental_state, CACHE)
            if cache is None:
                from transformers import DynamicCache

                cache = {"cache": DynamicCache()}
                self.set_incremental_state(incremental_state, CACHE, cache)
            else:  # the prompt and all but the last token are in the cache
                for name in ("input_ids", "position_ids"):
                    options[name] = options[name][:, -1:]
            options["past_key_values"] = cache["cache"]
        # A row that has come to the last position ends there.
        full = None
        if incremental_state is not None and mask.size(1) >= self.positions:
            options["position_ids"] = options["position_ids"].clamp_max(self.positions - 1)
            full = mask.sum(dim=1).ge(self.positions)
        keep = length if incremental_state is None else 1
        if features_only:
            return self._body(**options).last_hidden_state[:, -keep:], {"attn": [None]}
        logits = self.model(**options, logits_to_keep=keep).logits
        if full is not None:
            others = torch.arange(logits.size(-1), device=logits.device).ne(self.dictionary.eos())
            logits = logits.masked_fill(full.view(-1, 1, 1) & others, -torch.inf)
        return logits, {"attn": [None]}

    def _body(self, **options: Any) -> Any:
        """The model without its output projection, and without the shell of adapters."""
        lm = getattr(self.model, "get_base_model", lambda: self.model)()
        # Gemma 3 has "model" too, and names another as its base (transformers 4.57).
        return getattr(lm, "model", lm.base_model)(**options)

    def _shared_prefix(self, prompt: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]] | None:
        """What all prompts (B, P) begin with, and its keys and values; None if that is little."""
        lengths = prompt.ne(self.dictionary.pad()).sum(dim=1)
        shortest = int(lengths.min())
        # Each row from its first token, as far as the shortest goes; the last token of a prompt
        # is never shared, because its output predicts the translation's first token.
        columns = torch.arange(shortest - 1, device=prompt.device)
        starts = prompt.gather(1, columns + (prompt.size(1) - lengths).unsqueeze(1))
        same = int(starts.eq(starts[0]).all(dim=0).long().cumprod(dim=0).sum())
        if same < SHARED_PREFIX:
            return None
        tokens = starts[0, :same]
        if self._prefix is not None:
            # A batch may have more in common by chance; the prefix of the others serves it too.
            known = self._prefix[0]
            fits = same // 2 <= known.numel() <= same and known.device == tokens.device
            if fits and torch.equal(known, tokens[: known.numel()]):
                return self._prefix
        from transformers import DynamicCache

        cache = self._body(
            input_ids=tokens.unsqueeze(0), past_key_values=DynamicCache(), use_cache=True
        ).past_key_values
        layers = [(cache[i][0], cache[i][1]) for i in range(len(cache))]
        self._prefix = tokens, layers
        return self._prefix

    def _features(
        self,
        prompt: Tensor,
        outputs: Tensor,
        longest: int,
        prefix: tuple[Tensor, list[tuple[Tensor, Tensor]]] | None,
    ) -> Tensor:
        """Features at target positions, (B, T, features), after a prefix's keys and values if any.

        The translation follows its prompt at once and padding comes last, where causal attention
        does not see it. So the model needs no mask and no positions, which lets the fastest
        attention run, and reads ``longest`` columns instead of the longest prompt's and the longest
        translation's. (Padding in between would also shift sliding windows.)
        """
        from transformers import DynamicCache

        joined = torch.cat([prompt, outputs], dim=1)
        keep = joined.ne(self.dictionary.pad())
        known = 0
        options: dict[str, Any] = {"use_cache": False}
        if prefix is not None:
            known = prefix[0].numel()
            keep &= keep.long().cumsum(dim=1).gt(known)
            options = {"use_cache": True, "past_key_values": DynamicCache()}
            for layer, states in enumerate(prefix[1]):
                rows = (state.expand(len(prompt), -1, -1, -1) for state in states)
                options["past_key_values"].update(*rows, layer)
        # Stable: what is kept goes to the left, in order.
        order = (~keep).long().argsort(dim=1, stable=True)[:, : longest - known]
        tokens = joined.gather(1, order)
        hidden = self._body(input_ids=tokens, **options).last_hidden_state
        last = prompt.ne(self.dictionary.pad()).sum(dim=1) - known - 1
        places = last.unsqueeze(1) + torch.arange(outputs.size(1) + 1, device=tokens.device)
        places = places.clamp_max(tokens.size(1) - 1)  # of padding, whose features nobody uses
        features: Tensor = hidden.gather(1, places.unsqueeze(2).expand(-1, -1, hidden.size(2)))
        return features

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
    """See the module. The buffer ``vocabulary_rows`` (V,) has the model's row of each symbol."""

    def __init__(self, encoder: PromptEncoder, decoder: CausalLMDecoder, rows: Tensor) -> None:
        super().__init__(encoder, decoder)
        self.register_buffer("vocabulary_rows", rows)

    @classmethod
    def build_model(cls, cfg: HFCausalLMConfig, task: Any) -> "HFCausalLM":
        """Load pretrained weights, or make a model from a configuration."""
        with one_line_errors():
            lm, rows = load_language_model(cfg, task)
        dictionary = task.target_dictionary
        positions = int(getattr(lm.config, "max_position_embeddings", 10**6))
        if cfg.hf_gradient_checkpointing:
            lm.gradient_checkpointing_enable()
        if cfg.lora_r > 0:
            from peft import LoraConfig, get_peft_model

            adapters = LoraConfig(
                r=cfg.lora_r, lora_alpha=cfg.lora_alpha, target_modules="all-linear"
            )
            lm = get_peft_model(lm, adapters)
        return cls(
            PromptEncoder(task.source_dictionary, positions),
            CausalLMDecoder(dictionary, lm, positions),
            rows,
        )

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
        return {k: v for k, v in state.items() if "lora_" in k or k.endswith("vocabulary_rows")}

    def upgrade_state_dict_named(self, state_dict: dict[str, Tensor], name: str) -> None:
        """Fill in the frozen weights, which a checkpoint of adapters does not hold."""
        if hasattr(self.decoder.model, "peft_config"):
            for key, value in super().state_dict().items():
                state_dict.setdefault(key, value)


def load_language_model(cfg: HFCausalLMConfig, task: Any) -> tuple[Any, Tensor]:
    """The transformers model with its rows in the dictionary's order, and the rows; (V,) int64."""
    size = len(task.target_dictionary)
    if cfg.lora_r > 0 and not cfg.hf_model:
        raise UserError(
            "--lora-r: expected --hf-model, whose weights the adapters are added to, found none: a "
            "checkpoint holds the adapters alone, and other weights drawn at random would not be "
            "drawn again"
        )
    if cfg.hf_state and not (cfg.hf_model and cfg.lora_r > 0):
        # From a checkpoint, whose weights are about to be loaded.
        return from_config(json.loads(cfg.hf_state), size), torch.full((size,), -1)
    if not (cfg.hf_model or cfg.hf_config):
        raise UserError(
            "--arch hf_causal_lm expects --hf-model FOLDER (pretrained) or --hf-config FILE (from "
            "scratch), found neither"
        )
    vocabulary = Vocabulary.load(Path(str(cfg.data).split(":")[0]), task.target_dictionary.symbols)
    if cfg.hf_model:
        lm = pretrained(cfg.hf_model, cfg.hf_gguf_file)
        if cfg.hf_layers:
            keep_layers(lm, cfg.hf_layers)
        select_rows(lm, vocabulary.rows)
    else:
        assert cfg.hf_config is not None
        lm = from_config(read_config(Path(cfg.hf_config)), size)
    return lm, torch.tensor(vocabulary.rows)


def remember_configuration(cfg: Any, model: Any) -> None:
    """Keep the language model's configuration in the training's own, so that a checkpoint can be
    loaded without the files that it was started from."""
    with open_dict(cfg):
        cfg.hf_state = model.decoder.model.config.to_json_string(use_diff=False)
