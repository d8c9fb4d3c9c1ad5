"""Every causal language model of transformers, tiny and random: right in this plugin, or refused.

    python scripts/benchmarks/llm_families.py

The classes are those of transformers' own mapping. Each gets a small configuration by one rule for all,
is saved, and is loaded as ``--hf-model`` with its vocabulary in another order. Then padded batches are
compared with transformers' model alone on each sentence: logits with and without gradient (there with a
shared beginning), step by step with a reordered beam, and the gradient of every parameter. Writes
``results/llm_families.csv`` and ``.json``.
"""

import argparse
import inspect
import random
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from benchmarking import RESULTS, Target, write_results
from fairseq.data import Dictionary
from tqdm import tqdm
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

import sekd_fairseq.tasks  # noqa: F401 (registers the architecture)
from sekd_fairseq.errors import UserError
from sekd_fairseq.llm.families import telling_weights
from sekd_fairseq.llm.vocabulary import Vocabulary
from sekd_fairseq.models.hf_causal_lm import HFCausalLM, HFCausalLMConfig
from sekd_fairseq.teacher_cache import hash_symbols

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
#: Limits of "right": nats, and relative to a parameter's gradient.
LARGEST_KL, LARGEST_GRADIENT = 1e-5, 1e-3
VOCABULARY = 96
#: The largest value of a configuration's parameters, by their names; the first that fits.
SMALL = (
    (r"vocab_size", VOCABULARY),
    (r"dropout|_drop$|drop_rate|pdrop|layerdrop|jitter", 0.0),
    (r"num_key_value_heads|n_head_kv|num_kv_heads", 2),
    (r"experts_per_tok|moe_top_?k$|^top_k$|moe_k$", 2),
    (r"experts?$", 4),
    (r"n_group$|topk_group|mamba_n_groups", 1),
    (r"head_dim|d_kv|kv_channels|d_head|rotary_dim", 8),
    (r"lora_rank|d_state|state_size", 16),
    (r"mamba_n_heads|mamba_num_heads|chunk_size$", 8),
    (r"mamba_d_ssm", 64),
    (r"heads?$", 4),
    (r"coder_layers$", 2),
    (r"layers$|n_layer|num_blocks", 4),
    (r"hidden_size$|d_model|n_embd|embed_dim|embedding_size|hidden_dim$|^dim$", 32),
    (r"ffn|intermediate_size|n_inner|d_ff|lru_width", 48),
    (r"position_embeddings|n_positions|max_seq_len|n_ctx|context_length", 128),
    (r"sliding_window$|attention_window|window_size$", 6),
)
#: What that rule leaves inconsistent, by the model's type.
MLA = {"num_key_value_heads": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
CONSISTENT: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**MLA, "n_routed_experts": 4},
    "deepseek_v3": MLA,
    "dots1": {**MLA, "n_routed_experts": 4, "n_shared_experts": 1},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 8, "hidden_size_per_layer_input": 8,
    },
    "gemma3": {
        "text_config": {
            "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        },
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1},
    "longcat_flash": {"num_key_value_heads": 4, "moe_topk": 2},
    "mamba2": {"num_heads": 8},
    "mega": {"bidirectional": False},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "reformer": {
        "axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 16), "attn_layers": ["local", "lsh"],
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "use_mamba_kernels": False},
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    model_type: str
    model_class: str
    outcome: str  # right, refused, wrong, or not configurable
    reason: str = ""
    kl: float | None = None
    gradient: float | None = None
    key_value_cache: bool | None = None
    body: str | None = None


def small_config(model_type: str) -> Any:
    """A configuration of a few thousand parameters."""
    family = CONFIG_MAPPING[model_type]
    usual = family()
    chosen: dict[str, Any] = {}
    for name in inspect.signature(family.__init__).parameters:
        value = getattr(usual, name, None)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        limit = next((limit for pattern, limit in SMALL if re.search(pattern, name)), value)
        if value > limit:
            chosen[name] = type(value)(limit)
    if hasattr(usual, "is_decoder"):
        chosen["is_decoder"] = True
    chosen.update(bos_token_id=0, pad_token_id=1, eos_token_id=2)
    return family(**{**chosen, **CONSISTENT.get(model_type, {})})


def save_tiny(model_type: str, folder: Path) -> None:
    """A random model of a type, saved as transformers does; errors are the family's."""
    config = small_config(model_type)
    with suppress(NotImplementedError), torch.device("meta"):  # some read their own weights
        model = transformers.AutoModelForCausalLM.from_config(config)
        size = sum(parameter.numel() for parameter in model.parameters())
        if size > 8_000_000:
            raise ValueError(f"{size:,} parameters with the small configuration")
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with telling_weights(model):
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.load_state_dict(weights)
    model(input_ids=torch.arange(4, 14).unsqueeze(0))  # it runs
    model.save_pretrained(folder)


def sentences(seed: int = 1) -> Iterator[tuple[list[int], list[int]]]:
    """Prompts that begin alike, and their continuations, of all lengths."""
    draw = random.Random(seed)
    shared = draw.choices(range(4, VOCABULARY), k=18)
    for prompt, output in ((5, 9), (1, 3), (9, 6), (3, 1)):
        yield (
            shared + draw.choices(range(4, VOCABULARY), k=prompt),
            draw.choices(range(4, VOCABULARY), k=output),
        )


def compare(model_type: str, folder: Path) -> tuple[float, float, HFCausalLM]:
    """The largest KL of any path, the largest difference of a gradient, and the plugin's model."""
    words = list(range(4, VOCABULARY))
    random.Random(1).shuffle(words)
    dictionary, rows = Dictionary(), [*range(4), *words]
    for token in words:
        dictionary.add_symbol(str(token))
    Vocabulary(rows, "", None, hash_symbols(dictionary.symbols)).save(folder)
    task = SimpleNamespace(
        source_dictionary=dictionary,
        target_dictionary=dictionary,
        cfg=SimpleNamespace(data=str(folder)),
    )
    cfg = HFCausalLMConfig(hf_model=str(folder))
    # In float32 all of it: some families keep a few weights in bfloat16.
    model = HFCausalLM.build_model(cfg, task).float()
    original = transformers.AutoModelForCausalLM.from_pretrained(folder).train().float()

    pairs = list(sentences())
    pad, eos = dictionary.pad(), dictionary.eos()
    source = padded([[*prompt, eos] for prompt, _ in pairs], pad, left=True)
    previous = padded([[eos, *output] for _, output in pairs], pad)
    target = padded([[*output, eos] for _, output in pairs], pad)
    model.train()  # first, because what its family lacks is to be told by the plugin
    logits, _ = model(source, None, previous)
    order = torch.tensor(rows)
    alone = []
    for prompt, output in pairs:
        ids = order[torch.tensor([prompt + output])]
        alone.append(original(input_ids=ids).logits[0, len(prompt) - 1 :, order])
    loss = sum(
        torch.nn.functional.cross_entropy(logits, target[i, : len(logits)], reduction="sum")
        for i, logits in enumerate(alone)
    )
    loss.backward()

    kl = max(divergence(alone[i], logits[i]) for i in range(len(pairs)))
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), target.flatten(), reduction="sum", ignore_index=pad
    ).backward()
    gradient = gradient_difference(original, model.decoder.lm, order)
    model.eval()
    with torch.no_grad():
        logits, _ = model(source, None, previous)
        kl = max(kl, *(divergence(alone[i], logits[i]) for i in range(len(pairs))))
        kl = max(kl, generation_kl(model, source, previous, alone))
    return kl, gradient, model


def generation_kl(
    model: HFCausalLM, source: torch.Tensor, previous: torch.Tensor, alone: Sequence[torch.Tensor]
) -> float:
    """The largest KL step by step, the beam reordered before every other step."""
    encoder_out = model.encoder(source)
    state: dict[str, Any] = {}
    rows, worst = list(range(len(alone))), 0.0
    for step in range(1, previous.size(1) + 1):
        if step % 2 == 0:
            order = torch.tensor([*range(1, len(rows)), 0])
            rows = [rows[i] for i in order]
            encoder_out = model.encoder.reorder_encoder_out(encoder_out, order)
            model.decoder.reorder_incremental_state_scripting(state, order)
        logits, _ = model.decoder(previous[rows, :step], encoder_out, incremental_state=state)
        for place, row in enumerate(rows):
            if step <= len(alone[row]):
                worst = max(worst, divergence(alone[row][step - 1 : step], logits[place]))
    return worst


def divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The largest KL of next-token distributions, nats."""
    found = found[: len(expected)].detach()
    p, q = expected.detach().double().log_softmax(-1), found.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).max()
    return float("inf") if kl.isnan() else float(kl)


def gradient_difference(original: Any, ours: Any, order: torch.Tensor) -> float:
    """The largest difference of a parameter's gradient, relative to it."""
    expected = dict(original.named_parameters())
    vocabulary = {
        id(parameter)
        for layer in (original.get_input_embeddings(), original.get_output_embeddings())
        for parameter in layer.parameters()
    }
    gradients = {}
    for name, parameter in ours.named_parameters():
        one, other = expected[name].grad, parameter.grad
        if one is None and other is None:
            continue
        one, other = (
            torch.zeros_like(parameter) if gradient is None else gradient
            for gradient in (one, other)
        )
        gradients[name] = one[order] if id(expected[name]) in vocabulary else one, other
    whole = sum(float(one.norm()) ** 2 for one, _ in gradients.values()) ** 0.5
    # A gradient that is all rounding is no measure.
    return max(
        float((one - other).norm()) / (float(one.norm()) + 1e-3 * whole)
        for one, other in gradients.values()
    )


def padded(rows: Sequence[Sequence[int]], pad: int, left: bool = False) -> torch.Tensor:
    """Rows of one length."""
    width = max(map(len, rows))
    fill = [[pad] * (width - len(row)) for row in rows]
    return torch.tensor(
        [[*p, *row] if left else [*row, *p] for p, row in zip(fill, rows, strict=True)]
    )


def judge(model_type: str) -> Result:
    """What becomes of a family."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            name = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]].__name__
            save_tiny(model_type, folder)
        except Exception as error:  # whatever a family raises
            return Result(model_type, name, "not configurable", words(error))
        try:
            kl, gradient, model = compare(model_type, folder)
        except UserError as error:
            return Result(model_type, name, "refused", f"error: {error}")
        except Exception as error:  # no line: a traceback for a user
            return Result(model_type, name, "wrong", words(error))
    right = kl <= LARGEST_KL and gradient <= LARGEST_GRADIENT
    traits = model.decoder.traits
    return Result(
        model_type, name, "right" if right else "wrong", "", kl, gradient, traits.cache, traits.body
    )


def words(error: Exception) -> str:
    """An error in one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types (default: all)")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = []
    for model_type in tqdm(args.types or TYPES, unit="family"):
        results.append(judge(model_type))
        tqdm.write(str(results[-1]))
    configured = [result for result in results if result.outcome != "not configurable"]
    right = {result.model_class for result in configured if result.outcome == "right"}
    safe = [result for result in configured if result.outcome in ("right", "refused")]
    largest = [result.kl for result in configured if result.kl is not None]
    targets = [
        Target(
            "share of classes right or refused", len(safe) / len(configured), 1.0, at_least=True
        ),
        Target("classes right", len(right), 35, at_least=True),
        Target("classes configured", len({r.model_class for r in configured}), 50, at_least=True),
        Target("largest KL of a class that is right, nats", max(largest), LARGEST_KL),
    ]
    write_results(
        "llm_families", [asdict(r) for r in results], targets, torch.device("cpu"), args.output
    )


if __name__ == "__main__":
    main()
