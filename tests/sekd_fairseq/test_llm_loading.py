"""What a language model's weights cost where they are loaded, the types that they get, and their lack."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sekd_fairseq import export_hf, import_hf
from sekd_fairseq.errors import UserError
from sekd_fairseq.llm.families import telling_weights
from sekd_fairseq.llm.loading import from_config, named_tensors
from sekd_fairseq.llm.loading import pretrained as load_pretrained
from sekd_fairseq.llm.tokenizer import load_tokenizer
from sekd_fairseq.llm.vocabulary import restore_rows
from sekd_fairseq.patches import apply_all

from .language_models import COMMON, pretrained
from .test_families import build, llm_families

transformers = pytest.importorskip("transformers")


class Draws(TorchFunctionMode):
    """Counts the numbers of matrices that are drawn at random."""

    numbers = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count, and go on."""
        kwargs = kwargs or {}
        if func in (Tensor.normal_, Tensor.uniform_) or func in vars(torch.nn.init).values():
            matrix = args[0] if args else kwargs["tensor"]
            self.numbers += matrix.numel() if matrix.dim() > 1 else 0
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    "model_type", ["opt", "bloom", "gpt2", "llama", "gemma2", "gemma3", "mixtral", "mamba", "bert"]
)
def test_a_checkpoint_s_weights_are_not_drawn_first(tmp_path: Path, model_type: str) -> None:
    llm_families.save_tiny(model_type, tmp_path)
    first = build(tmp_path, hf_model=str(tmp_path)).eval()
    state = first.state_dict()
    configuration = first.decoder.model.config.to_json_string(use_diff=False)
    with Draws() as draws:
        again = build(tmp_path, hf_state=configuration).eval()
    assert draws.numbers == 0 and again.decoder.traits == first.decoder.traits
    again.load_state_dict(state)
    source = torch.tensor([[1, 1, 9, 8, 2], [7, 6, 5, 4, 2]])
    previous = torch.tensor([[2, 11, 12], [2, 21, 1]])
    with torch.no_grad():
        assert torch.equal(again(source, None, previous)[0], first(source, None, previous)[0])
    tensors = dict(named_tensors(first.decoder.lm))
    for name, tensor in named_tensors(again.decoder.lm):
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize("model_type", ["gemma2", "vaultgemma"])
def test_caps_on_attention_scores_are_applied(tmp_path: Path, model_type: str) -> None:
    """torch's attention leaves them out in silence."""
    options = {**COMMON, "head_dim": 8, "query_pre_attn_scalar": 1, "attn_logit_softcapping": 0.5}
    made = from_config({**options, "model_type": model_type}, 40).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made.save_pretrained(tmp_path)
    loaded = load_pretrained(str(tmp_path), None).eval()
    right, without = (
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, attn_implementation=how, dtype=torch.float32
        )
        for how in ("eager", "sdpa")
    )
    tokens = torch.arange(10).unsqueeze(0)
    with torch.no_grad():
        expected, *found = (lm(input_ids=tokens).logits for lm in (right, made, loaded))
        assert not torch.allclose(without(input_ids=tokens).logits, expected, rtol=0.05)
    for logits in found:
        torch.testing.assert_close(logits, expected)


def test_a_row_that_nothing_is_known_of_is_never_the_best() -> None:
    """Rows of zeros won wherever all known logits were below 0, which softmax, and so no training, sees."""
    config = transformers.LlamaConfig(**COMMON, vocab_size=20)
    lm = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        features = lm.model(input_ids=tokens).last_hidden_state[0]
        lm.lm_head.weight -= 10 * features.mean(dim=0)
        assert (lm(input_ids=tokens).logits.amax(-1) < 0).any()
        rows = torch.arange(0, 40, 2)
        restore_rows(lm, rows.tolist(), {})
        logits = lm(input_ids=rows[tokens]).logits[0]
    assert logits.size(-1) == 39 and torch.isin(logits.argmax(-1), rows).all()
    torch.testing.assert_close(logits[:, 1], logits[:, rows].mean(dim=-1))


def test_weights_for_a_trial_take_little_memory(tmp_path: Path) -> None:
    """And are not the same in any two places; afterwards the model has its own, untouched."""
    config = transformers.LlamaConfig(
        **{**COMMON, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 60},
        vocab_size=96,
    )
    lm = transformers.AutoModelForCausalLM.from_config(config)
    size = sum(weight.nbytes for weight in lm.parameters())
    own = [weight.data_ptr() for weight in lm.parameters()]
    before = copy.deepcopy(lm.state_dict())
    with telling_weights(lm):
        storages = {weight.untyped_storage().data_ptr(): weight for weight in lm.parameters()}
        assert sum(weight.untyped_storage().nbytes() for weight in storages.values()) < size / 2
        first_rows = [weight.flatten()[:8] for weight in lm.parameters()]
        assert len(torch.stack(first_rows).unique(dim=0)) == len(first_rows)
        embedding = lm.get_input_embeddings().weight
        assert embedding.std().item() == pytest.approx(128**-0.5, rel=0.02)
    assert own == [weight.data_ptr() for weight in lm.parameters()]
    for name, weight in lm.state_dict().items():
        assert torch.equal(weight, before[name])


#: By family: what transformers leaves in single precision beside the frequencies of rotary positions.
SINGLE = {
    "llama": set(),
    "gemma3_text": set(),
    "ernie4_5_moe": {"gate.weight", "moe_statics.e_score_correction_bias"},
    "glm4_moe": {"gate.e_score_correction_bias"},
    "hunyuan_v1_moe": {"wg.weight"},
    "mamba": {"mixer.A_log"},
    "gpt_oss": {"input_layernorm.weight", "post_attention_layernorm.weight", "norm.weight"},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", SINGLE)
def test_single_precision_is_where_transformers_has_it(
    tmp_path: Path, model_type: str, dtype: torch.dtype
) -> None:
    llm_families.save_tiny(model_type, tmp_path)
    model = build(tmp_path, hf_model=str(tmp_path)).eval().to(dtype)
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    expected = dict(named_tensors(original))
    for name, tensor in named_tensors(model.decoder.lm):
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    single = {
        ".".join(name.split(".")[-2:]) for name, t in expected.items() if t.dtype == torch.float32
    }
    if model_type == "gpt_oss" and dtype == torch.bfloat16:  # only float16 cannot hold these
        assert single == {"rotary_emb.inv_freq"}
    else:
        assert {name for name in single if "inv_freq" not in name} == SINGLE[model_type]
    ids = torch.arange(4, 14).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model.decoder.lm(ids).logits, original(ids).logits)
    assert {t.dtype for t in model.float().state_dict().values()} == {torch.float32, torch.int64}


def test_experts_are_chosen_in_single_precision(tmp_path: Path) -> None:
    """transformers 4 rounds DeepSeek's corrections in bfloat16, with or without adapters."""
    llm_families.save_tiny("deepseek_v3", tmp_path)
    lm = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    biases = [b for name, b in lm.named_buffers() if name.endswith("e_score_correction_bias")]
    for bias in biases:
        bias.copy_(torch.linspace(1, 1.003, len(bias)))
    assert biases
    lm.save_pretrained(tmp_path)
    for options in ({}, {"lora_r": 2}):
        model = build(tmp_path, hf_model=str(tmp_path), **options).bfloat16()
        kept = [b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
        for bias, found in zip(biases, kept, strict=True):
            torch.testing.assert_close(found, bias, rtol=0, atol=0)


def test_what_inference_does_not_need_of_a_checkpoint_is_not_read(
    teacher: Path, tmp_path: Path
) -> None:
    apply_all()
    state = checkpoint_utils.load_checkpoint_to_cpu(str(teacher))
    moments = state["last_optimizer_state"]["state"][0]["exp_avg"]
    mapped = [
        range(*(int(end, 16) for end in line.split()[0].split("-")))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(teacher))
    ]
    for tensor in (moments, next(iter(state["model"].values()))):
        assert any(tensor.data_ptr() in part for part in mapped)  # not read
    # torch's format before 1.6, as of fairseq's older models, cannot be.
    old = tmp_path / "old.pt"
    whole = torch.load(teacher)
    torch.save(whole, old, _use_new_zipfile_serialization=False)
    again = checkpoint_utils.load_checkpoint_to_cpu(str(old))
    torch.testing.assert_close(again["model"], whole["model"], rtol=0, atol=0)


def test_not_every_family_computes_activations_again(tmp_path: Path) -> None:
    llm_families.save_tiny("gpt_neox_japanese", tmp_path)
    with pytest.raises(UserError, match=r"expected one for --hf-gradient-checkpointing"):
        build(tmp_path, hf_model=str(tmp_path), hf_gradient_checkpointing=True)


def test_a_folder_without_all_weights_is_refused(tmp_path: Path) -> None:
    llm_families.save_tiny("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"found none for 1 \(model.layers.1.mlp.up_proj.weight\)"):
        build(tmp_path, hf_model=str(tmp_path))


def test_a_folder_of_adapters_is_the_model_that_they_make(tmp_path: Path) -> None:
    """As PEFT saves them: they are merged, so that every checkpoint and export holds all weights."""
    peft = pytest.importorskip("peft")
    llm_families.save_tiny("llama", tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    options = peft.LoraConfig(
        r=2, target_modules="all-linear", modules_to_save=["lm_head"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(base, options).eval()
    adapted.save_pretrained(tmp_path / "adapters")
    model = build(tmp_path, hf_model=str(tmp_path / "adapters")).eval()
    assert not any("lora" in name for name in model.state_dict())
    ids = torch.arange(4, 14).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(model.decoder.lm(ids).logits, adapted(ids).logits)


def test_adapters_of_more_tokens_and_of_prompts(tmp_path: Path) -> None:
    """Tokens of a chat are added to a model before its adapters are trained; prompts are no weights."""
    peft = pytest.importorskip("peft")
    llm_families.save_tiny("llama", tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    options = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(base, options).save_pretrained(tmp_path / "prompt")
    with pytest.raises(UserError, match=r"^--hf-model .*prompt: expected adapters .*PROMPT_TUNING"):
        load_pretrained(str(tmp_path / "prompt"), None)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(base.config.vocab_size + 4, mean_resizing=False)
    options = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(base, options).eval()
    adapted.save_pretrained(tmp_path / "more")
    ids = torch.arange(base.config.vocab_size - 5, base.config.vocab_size).unsqueeze(0)
    with torch.no_grad():
        found = load_pretrained(str(tmp_path / "more"), None).eval()(ids).logits
        torch.testing.assert_close(found, adapted(ids).logits)


def test_from_scratch_a_model_of_images_has_the_dictionary_s_vocabulary() -> None:
    text = {**COMMON, "head_dim": 8, "vocab_size": 500, "pad_token_id": 0}
    content = {
        **json.loads(llm_families.small_config("gemma3").to_json_string()),
        "text_config": text,
    }
    lm = from_config(content, 96)
    assert lm.get_input_embeddings().num_embeddings == lm.config.get_text_config().vocab_size == 96
    assert lm.get_input_embeddings().padding_idx is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_checkpoints_and_exports_have_the_type_of_the_model(
    llm_data: Path, tokenizer: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    source = pretrained(tmp_path / "model", "qwen2", len(load_tokenizer(str(tokenizer)).pieces) + 3)
    trained = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    trained.save_pretrained(source)
    checkpoint, out = tmp_path / "checkpoint.pt", tmp_path / "out"
    import_hf.main([str(source), "--data", str(llm_data), "--output", str(checkpoint)])
    weights = torch.load(checkpoint)["model"].values()
    assert {weight.dtype for weight in weights} == {dtype, torch.int64}
    export_hf.main(
        [str(checkpoint), "--data", str(llm_data), "--output", str(out), "--base", str(source)]
    )
    assert {weight.dtype for weight in load_file(out / "model.safetensors").values()} == {dtype}
    exported = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    for name, weight in exported.named_parameters():
        assert torch.equal(weight, trained.get_parameter(name)), name


def test_adapters_on_another_base_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a chat model's on the model before its instruction: of one shape, and nothing else would tell."""
    llm_families.save_tiny("llama", tmp_path / "base")
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for weight in other.parameters():
        weight.data.mul_(1.01)
    other.save_pretrained(tmp_path / "other")
    state = build(tmp_path, hf_model=str(tmp_path / "base"), lora_r=2).state_dict()
    assert not any("base_layer" in name for name in state)
    again = build(tmp_path, hf_model=str(tmp_path / "base"), lora_r=2)
    again.bfloat16().load_state_dict(dict(state))
    earlier = {name: value for name, value in state.items() if name != "base_sample"}
    again.load_state_dict(earlier)  # of a version that kept no sample
    moved = build(tmp_path, hf_model=str(tmp_path / "other"), lora_r=2)
    with pytest.raises(SystemExit, match="adapters were trained on, found one with other weights"):
        moved.load_state_dict(dict(state))
