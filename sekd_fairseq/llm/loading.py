"""Language models from a folder, a hub id, a GGUF file or a configuration, by transformers."""

import json
from pathlib import Path
from typing import Any

import torch

from sekd_fairseq.errors import UserError


def pretrained(folder: str, gguf_file: str | None) -> Any:
    """A pretrained causal language model in float32."""
    from transformers import AutoModelForCausalLM

    try:
        options = {"gguf_file": gguf_file} if gguf_file else {}
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--hf-model {folder}: expected a causal language model with its weights "
            f"(config.json and *.safetensors, or --hf-gguf-file), found none that loads: {reason}"
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """A model's configuration file."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--hf-config {path}: expected a model's config.json, found none ({error})"
        ) from error
    return content


def from_config(content: dict[str, Any], size: int) -> Any:
    """A model with fresh weights for a dictionary of ``size`` symbols."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if "model_type" not in content:
        raise UserError("--hf-config: expected a configuration with a model_type, found none")
    content = {**content, "vocab_size": size, "bos_token_id": 0, "pad_token_id": 1}
    content["eos_token_id"] = 2
    config = AutoConfig.for_model(**content)
    # No padding_idx: fairseq's mask keeps padding out, and a zero row would change the model.
    config.pad_token_id = None
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]


def keep_layers(lm: Any, count: int) -> None:
    """Drop layers of a decoder, so that ``count`` evenly spaced ones stay, the first and the last
    among them."""
    layers = getattr(getattr(lm, "model", None), "layers", None)
    if layers is None:
        raise UserError(
            f"--hf-layers: expected a model whose layers are model.layers, as Llama's, found "
            f"{type(lm).__name__}; train a small one from scratch with --hf-config instead"
        )
    if not 1 <= count <= len(layers):
        raise UserError(f"--hf-layers: expected 1 to {len(layers)}, found {count}")
    chosen = [round(i * (len(layers) - 1) / max(count - 1, 1)) for i in range(count)]
    lm.model.layers = torch.nn.ModuleList([layers[i] for i in chosen])
    for place, layer in enumerate(lm.model.layers):
        if hasattr(layer.self_attn, "layer_idx"):
            layer.self_attn.layer_idx = place
    lm.config.num_hidden_layers = count
    if getattr(lm.config, "layer_types", None):
        lm.config.layer_types = [lm.config.layer_types[i] for i in chosen]
