"""Language models from a folder, a hub id, a GGUF file or a configuration, by transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import open_dict

from sekd_fairseq.errors import UserError
from sekd_fairseq.llm.vocabulary import NEW_ROW, Vocabulary, check_rows


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


def weights_in_checkpoint(cfg: Any) -> bool:
    """Whether a checkpoint is about to be loaded that holds all weights, and not adapters alone."""
    return bool(cfg.hf_state) and not cfg.lora_r


def load_language_model(cfg: Any, task: Any) -> tuple[Any, list[int]]:
    """The transformers model, and its row of each symbol of the dictionary.

    The rows of a pretrained model are where it has them; one made from a configuration has the
    dictionary's.
    """
    size = len(task.target_dictionary)
    if cfg.lora_r > 0 and not cfg.hf_model:
        raise UserError(
            "--lora-r: expected --hf-model, whose weights the adapters are added to, found none: a "
            "checkpoint holds the adapters alone, and other weights drawn at random would not be "
            "drawn again"
        )
    if weights_in_checkpoint(cfg):
        return from_config(json.loads(cfg.hf_state or ""), size), [NEW_ROW] * size
    if not (cfg.hf_model or cfg.hf_config):
        raise UserError(
            "--arch hf_causal_lm expects --hf-model FOLDER (pretrained) or --hf-config FILE (from "
            "scratch), found neither"
        )
    vocabulary = Vocabulary.load(
        # The task's data: a checkpoint remembers where they were when it was trained.
        Path(str(task.cfg.data).split(":")[0]),
        task.target_dictionary.symbols,
    )
    if cfg.hf_model:
        try:
            lm = pretrained(cfg.hf_model, cfg.hf_gguf_file)
        except UserError as error:
            if cfg.hf_state is None:
                raise
            raise UserError(
                f"{error}; this checkpoint has adapters alone: say where the model is that they "
                "were trained on, --hf-model FOLDER, or for fairseq's own commands "
                "--model-overrides \"{'hf_model': 'FOLDER'}\""
            ) from error
        if cfg.hf_layers:
            keep_layers(lm, cfg.hf_layers)
        check_rows(lm, vocabulary.rows)
    else:
        assert cfg.hf_config is not None
        lm = from_config(read_config(Path(cfg.hf_config)), size)
    return lm, vocabulary.rows


def remember_configuration(cfg: Any, model: Any) -> None:
    """Keep the language model's configuration in the training's own, so that a checkpoint can be
    loaded without the files that it was started from, and the place of these from anywhere."""
    with open_dict(cfg):
        if cfg.hf_model and Path(cfg.hf_model).exists():  # or it is a hub id
            cfg.hf_model = str(Path(cfg.hf_model).resolve())
        cfg.hf_state = model.decoder.model.config.to_json_string(use_diff=False)
