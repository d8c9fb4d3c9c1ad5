"""Tiny random language models of each family, their data, and trainings of them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import (
    ROOT,
    command,
)

transformers = pytest.importorskip("transformers")


PLUGIN = ("--user-dir", ROOT / "sekd_fairseq", "--task", "self_evolution_kd")

COMMON = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**COMMON, "model_type": "llama"},
    "llama-tied": {**COMMON, "model_type": "llama", "tie_word_embeddings": True},
    "mistral": {**COMMON, "model_type": "mistral", "sliding_window": 6},
    "qwen2": {**COMMON, "model_type": "qwen2", "tie_word_embeddings": True},
    "gemma3": {
        **COMMON, "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    # Learned positions, and another name for what is below the output projection.
    "gpt2": {
        "model_type": "gpt2", "n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4,
        "n_positions": 256,
    },
}  # fmt: skip


def pretrained(folder: Path, family: str, rows: int) -> Path:
    """A random model of a family, saved as transformers does."""
    torch.manual_seed(1)
    options = {**FAMILIES[family], "vocab_size": rows}
    config = transformers.AutoConfig.for_model(
        **options, bos_token_id=1, eos_token_id=2, pad_token_id=None
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # larger than the default, so that errors show
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def train_llm_arguments(data: Path, save: Path, *options: object) -> list[object]:
    return [
        "fairseq_cli.train", data, *PLUGIN, "--arch", "hf_causal_lm", "--optimizer", "adam", "--lr",
        "3e-3", "--max-tokens", "600", "--max-update", "3", "--save-dir", save, "--cpu",
        "--no-epoch-checkpoints", "--log-format", "json", "--log-interval", "1", *options,
    ]  # fmt: skip


def train_llm(data: Path, save: Path, *options: object, check: bool = True) -> str:
    return command(*train_llm_arguments(data, save, *options), check=check)


def load(path: Path, data: Path) -> tuple[Any, Any]:
    from sekd_fairseq.checkpoints import load_models

    (model,), _, task = load_models([str(path)], str(data), torch.device("cpu"))
    return model, task


def check_exported(folder: Path, model: Any, dataset: Any, sentence: int) -> tuple[Any, Any]:
    """An exported folder gives the student's logits; returns its model and the ids compared on."""
    exported = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    rows, item = model.vocabulary_rows, dataset[sentence]
    ids = rows[torch.cat([item["source"][:-1], item["target"][:-1]])].unsqueeze(0)
    with torch.no_grad():
        expected = model(**dataset.collater([item])["net_input"])[0][0]
        found = exported(ids).logits[0, len(item["source"]) - 2 :]
    torch.testing.assert_close(
        found[:, rows[rows >= 0]], expected[:, rows >= 0], atol=1e-4, rtol=1e-4
    )
    return exported, ids
