"""Language models from a folder, a hub id, a GGUF file or a configuration, by transformers."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import open_dict
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

from sekd_fairseq.errors import UserError
from sekd_fairseq.llm.families import TOLERANCE, alone, apart, text_config
from sekd_fairseq.llm.prompts import Prompts
from sekd_fairseq.llm.tokenizer import load_tokenizer
from sekd_fairseq.llm.vocabulary import (
    EOS,
    NEW_ROW,
    TOKENIZER,
    Vocabulary,
    vocabulary_parameters,
)

logger = logging.getLogger(__name__)

#: The scale of adapters where none is given.
LORA_ALPHA = 16


def pretrained(folder: str, gguf_file: str | None, revision: str | None = None) -> Any:
    """A pretrained causal language model in float32, with adapters that PEFT has saved merged into theirs.

    Raises
    ------
    UserError
        There is none that loads, or some of its weights are not there: transformers would draw them.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.peft_utils import find_adapter_config_file

    given = {"gguf_file": gguf_file, "revision": revision}
    options = {name: value for name, value in given.items() if value}
    try:
        if find_adapter_config_file(folder):
            return with_adapters(folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **options
        )
    except UserError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--hf-model {folder}: expected a causal language model with its weights "
            f"(config.json and *.safetensors, or --hf-gguf-file), found none that loads: {reason}"
        ) from error
    lm, found = loaded
    if missing := found["missing_keys"]:
        raise UserError(
            f"--hf-model {folder}: expected all weights of {type(lm).__name__}, found none for "
            f"{len(missing)} ({', '.join(missing[:3])}); is it another kind of model, or are files missing?"
        )
    return attending_rightly(lm)


def attending_rightly(lm: Any) -> Any:
    """A model whose attention is computed as its configuration says.

    torch's attention knows no cap on the scores, which Gemma 2 has, and transformers leaves it out
    in silence.
    """
    if getattr(text_config(lm), "attn_logit_softcapping", None):
        lm.set_attn_implementation("eager")
    return lm


def with_adapters(folder: str) -> Any:
    """The model that a folder's adapters were trained on, the adapters merged into it.

    Raises
    ------
    UserError
        Adapters that cannot be merged (of prompts).
    """
    from peft import PeftConfig, PeftModel, load_peft_weights

    config = PeftConfig.from_pretrained(folder)
    lm = pretrained(str(config.base_model_name_or_path), None, config.revision)
    embedding = lm.get_input_embeddings()
    name = next(name for name, module in lm.named_modules() if module is embedding)
    own = load_peft_weights(folder, device="cpu").get(f"base_model.model.{name}.weight")
    if (
        own is not None and len(own) != embedding.num_embeddings
    ):  # tokens were added for the training
        lm.resize_token_embeddings(len(own), mean_resizing=False)
    adapted: Any = PeftModel.from_pretrained(lm, folder)
    if not hasattr(adapted, "merge_and_unload"):
        raise UserError(
            f"--hf-model {folder}: expected adapters that can be merged into a model's weights, as LoRA's, "
            f"found {config.peft_type}; give the model that they were trained on"
        )
    return adapted.merge_and_unload()


def read_config(path: Path) -> dict[str, Any]:
    """A model's configuration file."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--hf-config {path}: expected a model's config.json, found none ({error})"
        ) from error
    return content


class Undrawn(TorchFunctionMode):
    """Where models are made whose weights come from elsewhere: no matrix is drawn at random.

    To draw 7 billion weights, which torch's constructors and transformers do one after the other, takes
    minutes on a CPU. Memory that nothing is written to is not taken either.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Leave a matrix as it is, and do anything else."""
        kwargs = kwargs or {}
        if (
            func in (Tensor.normal_, Tensor.uniform_)
            or getattr(func, "__module__", "") == init.__name__
        ):
            matrix = args[0] if args else kwargs["tensor"]
            if matrix.dim() > 1:
                return matrix
        return func(*args, **kwargs)


def from_config(content: dict[str, Any], size: int) -> Any:
    """A model with fresh weights for a dictionary of ``size`` symbols."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if "model_type" not in content:
        raise UserError("--hf-config: expected a configuration with a model_type, found none")
    content = {**content, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    if "text_config" not in content:
        content["vocab_size"] = size
    config = AutoConfig.for_model(**content)
    text = config.get_text_config()  # all of it, or a part beside those of images or sound
    text.vocab_size = size
    # No padding_idx: fairseq's mask keeps padding out, and a zero row would change the model.
    text.pad_token_id = config.pad_token_id = None
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    return attending_rightly(made)


def keep_layers(lm: Any, count: int) -> None:
    """Drop layers of a decoder, so that ``count`` evenly spaced ones stay, the first and the last
    among them.

    Raises
    ------
    UserError
        The model has no layers where Llama's are, or not so many; or its configuration cannot say which
        stay, so that a checkpoint would be loaded as others.
    """
    layers = getattr(getattr(lm, "model", None), "layers", None)
    if layers is None:
        raise UserError(
            f"--hf-layers: expected a model whose layers are model.layers, as Llama's, found "
            f"{type(lm).__name__}; train a small one from scratch with --hf-config instead"
        )
    total = len(layers)
    if not 1 <= count <= total:
        raise UserError(f"--hf-layers: expected 1 to {total}, found {count}")
    chosen = [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]
    lm.model.layers = torch.nn.ModuleList([layers[i] for i in chosen])
    for place, layer in enumerate(lm.model.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    for name, value in lm.config.to_dict().items():
        if isinstance(value, list) and len(value) == total:  # of each layer, as layer_types
            setattr(lm.config, name, [value[i] for i in chosen])
    lm.config.num_hidden_layers = count
    if not loads_again(lm):
        raise UserError(
            f"--hf-layers {count}: expected a model whose configuration says what each layer is, found "
            f"{type(lm).__name__}, which would be loaded from a checkpoint with layers of other kinds; "
            "train a small one from scratch with --hf-config instead"
        )


def loads_again(lm: Any) -> bool:
    """Whether a model made from the configuration, with the same weights, gives the same logits."""
    vocabulary = lm.get_input_embeddings().num_embeddings
    tokens = [vocabulary * i // 8 for i in range(8)]
    try:
        with Undrawn():
            made = from_config(json.loads(lm.config.to_json_string(use_diff=False)), vocabulary)
        made.load_state_dict(lm.state_dict(), assign=True)  # shares them
        found, expected = (alone(model.eval(), tokens) for model in (made, lm))
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError):
        return False
    return apart(found, expected) <= TOLERANCE


def left_in_single(lm: Any, dtype: torch.dtype) -> list[Tensor]:
    """Weights and buffers of a model that are in single precision where the rest is in ``dtype``.

    As transformers has them: frequencies of rotary positions, which in bfloat16 would turn a token at
    position 1,000 by a whole radian too much, what chooses among experts, decays of states. And the
    corrections of that choice in all families, which transformers 4 rounds in DeepSeek's.
    """
    from transformers import AutoModelForCausalLM

    with Undrawn():
        made = AutoModelForCausalLM.from_config(lm.config, dtype=dtype)  # type: ignore[no-untyped-call]
    single = {name for name, one in named_tensors(made) if one.dtype == torch.float32}
    parts = list(getattr(lm, "_keep_in_fp32_modules_strict", None) or [])
    if dtype == torch.float16:
        parts += getattr(lm, "_keep_in_fp32_modules", None) or []
    parts.append("e_score_correction_bias")
    left = []
    for name, tensor in named_tensors(lm):
        original = name.replace(".base_layer.", ".")  # without the shell of an adapter
        if tensor.dtype == torch.float32 and (
            original in single or not set(parts).isdisjoint(original.split("."))
        ):
            left.append(tensor)
    return left


def narrow(lm: Any) -> torch.dtype:
    """Turn a model's weights into half precision if that changes none of them; returns their type.

    Those that transformers leaves in single precision stay so.
    """
    for dtype in (torch.bfloat16, torch.float16):
        single = {id(weight) for weight in left_in_single(lm, dtype)}
        rest = [weight for weight in lm.parameters() if id(weight) not in single]
        if all(weight.to(dtype).float().equal(weight) for weight in rest):
            for weight in rest:
                weight.data = weight.data.to(dtype)
            return dtype
    return torch.float32


def named_tensors(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights and buffers, those too that a checkpoint does not hold."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def weights_in_checkpoint(cfg: Any) -> bool:
    """Whether a checkpoint is about to be loaded that holds all weights, and not adapters alone."""
    return bool(cfg.hf_state) and not cfg.lora_r


def load_language_model(cfg: Any, task: Any) -> tuple[Any, list[int]]:
    """The transformers model, and its row of each symbol of the dictionary.

    The rows of a pretrained model are where it has them; one made from a configuration has the
    dictionary's.
    """
    size = len(task.target_dictionary)
    if cfg.hf_state is None:
        check_options(cfg)
    if cfg.lora_r > 0 and not cfg.hf_model:
        raise UserError(
            "--lora-r: expected --hf-model, whose weights the adapters are added to, found none: a "
            "checkpoint holds the adapters alone, and other weights drawn at random would not be "
            "drawn again"
        )
    if weights_in_checkpoint(cfg):
        with Undrawn():
            return from_config(json.loads(cfg.hf_state or ""), size), [NEW_ROW] * size
    if not (cfg.hf_model or cfg.hf_config):
        raise UserError(
            "--arch hf_causal_lm expects --hf-model FOLDER (pretrained) or --hf-config FILE (from "
            "scratch), found neither"
        )
    data = data_directory(task)
    vocabulary = Vocabulary.load(data, task.target_dictionary.symbols)
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
        return lm, rows_of(lm, vocabulary, data)
    assert cfg.hf_config is not None
    return from_config(read_config(Path(cfg.hf_config)), size), vocabulary.rows


def check_options(cfg: Any) -> None:
    """Refuse options of the architecture that have no effect beside the others."""
    for option, value, beside in (
        ("hf-layers", cfg.hf_layers, "hf-model"),
        ("hf-gguf-file", cfg.hf_gguf_file, "hf-model"),
        ("lora-alpha", cfg.lora_alpha != LORA_ALPHA, "lora-r"),
    ):
        if value and not getattr(cfg, beside.replace("-", "_")):
            raise UserError(
                f"--{option}: has an effect with --{beside} only; add it or leave it out"
            )
    if cfg.hf_model and cfg.hf_config:
        raise UserError(
            f"--hf-model and --hf-config: expected one, found both ({cfg.hf_model} and {cfg.hf_config})"
        )
    if cfg.lora_r < 0 or cfg.hf_layers < 0:
        raise UserError("--lora-r and --hf-layers: expected 0 or more")


def data_directory(task: Any) -> Path:
    """The task's data: a checkpoint remembers where they were when it was trained."""
    return Path(str(task.cfg.data).split(":")[0])


def rows_of(lm: Any, vocabulary: Vocabulary, data: Path) -> list[int]:
    """A model's row of each symbol, -1 where it has none: of control tokens that its tokenizer has
    beside its vocabulary (of images, in Gemma 3's), which no prompt holds.

    Raises
    ------
    UserError
        The model lacks other tokens, or those that prompts hold or translations end with.
    """
    size = min(len(matrix) for matrix in vocabulary_parameters(lm).values())
    beyond = {row for row in vocabulary.rows if row >= size}
    if not beyond:
        return vocabulary.rows
    needed = beyond
    if (data / TOKENIZER).is_dir() and vocabulary.prompt is not None:
        tokenizer = load_tokenizer(str(data / TOKENIZER))
        used = {vocabulary.rows[EOS], *Prompts(vocabulary.prompt, tokenizer).tokens("a")}
        needed = beyond - (set(tokenizer.controls.values()) - used)
    if needed:
        raise UserError(
            f"--hf-model has {size} vocabulary rows, the data's tokenizer at least {max(beyond) + 1} "
            "tokens: expected the tokenizer of this model; make the data again with it"
        )
    logger.info("%d control tokens of the tokenizer have no row in the model", len(beyond))
    return [row if row < size else NEW_ROW for row in vocabulary.rows]


def remember_configuration(cfg: Any, model: Any) -> None:
    """Keep the language model's configuration in the training's own, so that a checkpoint can be
    loaded without the files that it was started from, and the place of these from anywhere."""
    with open_dict(cfg):
        if cfg.hf_model and Path(cfg.hf_model).exists():  # or it is a hub id
            cfg.hf_model = str(Path(cfg.hf_model).resolve())
        cfg.hf_state = model.decoder.model.config.to_json_string(use_diff=False)
