"""Families of causal language models, tiny and random, against transformers' model alone.

The table of all families is ``scripts/benchmarks/llm_families.py``; it runs here with ``--slow``.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.data import Dictionary

from sekd_fairseq.errors import UserError

from .conftest import ROOT
from .language_models import COMMON

transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(ROOT / "scripts" / "benchmarks"))
try:
    import llm_families
finally:
    sys.path.remove(str(ROOT / "scripts" / "benchmarks"))

#: Learned and rotary positions, alibi, windows, caps, experts, a state in place of a cache.
SOME = (
    "opt", "xglm", "gptj", "gpt_neo", "gpt_neox", "bloom", "llama", "qwen2", "gemma2",
    "gemma3_text", "mixtral", "mamba", "bert", "roberta",
)  # fmt: skip


def check(result: llm_families.Result) -> None:
    assert result.outcome in ("right", "refused", "not configurable"), result
    if result.outcome == "refused":
        assert result.reason.startswith("error: ") and "\n" not in result.reason


@pytest.mark.parametrize("model_type", SOME)
def test_a_padded_batch_is_what_the_model_says_alone(model_type: str) -> None:
    result = llm_families.judge(model_type)
    assert result.outcome == "right", result
    assert result.key_value_cache == (model_type not in ("mamba", "roberta", "xglm"))
    # Chunks of the output projection: not where something goes before it.
    assert (result.body is None) == (model_type in ("bert", "roberta"))


@pytest.mark.slow
def test_every_family_is_right_or_refused() -> None:
    results = [llm_families.judge(model_type) for model_type in llm_families.TYPES]
    for result in results:
        check(result)
    configured = {r.model_class for r in results if r.outcome != "not configurable"}
    right = {r.model_class for r in results if r.outcome == "right"}
    assert len(configured) >= 50 and len(right) >= 35


def build(folder: Path, **options: Any) -> Any:
    """A model of the architecture made from a configuration."""
    dictionary = Dictionary()
    for token in range(4, llm_families.VOCABULARY):
        dictionary.add_symbol(str(token))
    task = SimpleNamespace(
        source_dictionary=dictionary,
        target_dictionary=dictionary,
        cfg=SimpleNamespace(data=str(folder)),
    )
    rows = list(range(llm_families.VOCABULARY))
    symbols = llm_families.hash_symbols(dictionary.symbols)
    llm_families.Vocabulary(rows, "", None, symbols).save(folder)
    cfg = llm_families.HFCausalLMConfig(**options)
    return llm_families.HFCausalLM.build_model(cfg, task)


def test_a_model_that_looks_ahead_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = llm_families.small_config("bert")
    config.is_decoder = False
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    with pytest.raises(UserError, match=r"BertLMHeadModel.*tokens before.*is_decoder"):
        build(tmp_path, hf_config=str(tmp_path / "config.json"))


def test_what_is_right_for_a_new_model_does_not_change_its_start(tmp_path: Path) -> None:
    """Weights by which mistakes show are there for the trial alone; a cap that a new model's small
    logits hide is seen."""
    config = json.loads(llm_families.small_config("gemma2").to_json_string(use_diff=False))
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    model = build(tmp_path, hf_config=str(tmp_path / "config.json"))
    drawn = torch.rand(3)
    torch.manual_seed(1)
    from sekd_fairseq.llm.loading import from_config

    plain = from_config(config, llm_families.VOCABULARY)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.decoder.lm.get_parameter(name), parameter)
    assert torch.equal(drawn, torch.rand(3))
    assert model.decoder.traits.softcap == config["final_logit_softcapping"] > 0
    assert model.decoder._prefix is None


@pytest.mark.parametrize("left", [False, True])
def test_either_side_of_targets_may_be_padded(tmp_path: Path, left: bool) -> None:
    (tmp_path / "config.json").write_text(
        llm_families.small_config("llama").to_json_string(use_diff=False)
    )
    model = build(tmp_path, hf_config=str(tmp_path / "config.json")).eval()
    source = torch.tensor([[1, 1, 9, 8, 2], [7, 6, 5, 4, 2]])
    row = [2, 11, 12]
    previous = torch.tensor([[1, 1, *row] if left else [*row, 1, 1], [2, 21, 22, 23, 24]])
    logits, _ = model(source, None, previous)
    places = slice(2, None) if left else slice(0, 3)
    alone = model.decoder.lm(input_ids=torch.tensor([[9, 8, 11, 12]])).logits[0, 1:]
    torch.testing.assert_close(logits[0, places], alone)


def test_rows_and_bias_come_back(tmp_path: Path) -> None:
    """Everything that has one row a token is put in another order and back."""
    from sekd_fairseq.llm.vocabulary import restore_rows, select_rows, vocabulary_parameters

    for model_type in ("gptj", "bert"):  # a bias; a bias that the model holds twice
        folder = tmp_path / model_type
        llm_families.save_tiny(model_type, folder)
        original = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        lm = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        rows = [0, -1, *reversed(range(2, 90))]
        select_rows(lm, rows)
        bias = lm.get_output_embeddings().bias
        torch.testing.assert_close(bias[1], original.get_output_embeddings().bias.mean())
        assert lm.config.vocab_size == len(rows) == len(bias)
        restore_rows(lm, rows, vocabulary_parameters(original))
        ids = torch.arange(10).unsqueeze(0)
        torch.testing.assert_close(lm(ids).logits, original(ids).logits)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_positions_exact(
    tmp_path: Path, model_type: str, dtype: torch.dtype
) -> None:
    """With rounded rotary frequencies what is read after a long prompt is several times too far off."""
    config = llm_families.small_config(model_type)
    config.head_dim, config.max_position_embeddings = 64, 2048
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    torch.manual_seed(1)
    lm = transformers.AutoModelForCausalLM.from_config(config).eval()
    with llm_families.telling_weights(lm):
        weights = {name: weight.clone() for name, weight in lm.state_dict().items()}
    lm.load_state_dict(weights)
    for name, parameter in lm.named_parameters():
        if "q_proj" in name or "q_norm" in name:
            parameter.data.mul_(3.0)  # attention that is not even
    lm.save_pretrained(tmp_path)
    model = build(tmp_path, hf_model=str(tmp_path)).eval()
    row = torch.randint(4, llm_families.VOCABULARY, (1, 1200))
    source, previous = torch.cat([row[:, :1000], torch.tensor([[2]])], 1), row[:, 999:].clone()
    previous[:, 0] = 2
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    with torch.no_grad():
        expected, exact = (one(input_ids=row).logits[0, 999:] for one in (original, lm))
        found = model.to(dtype)(source, None, previous)[0][0]
    off = [(side.float() - exact).square().mean().sqrt() for side in (found, expected)]
    assert off[0] < 1.5 * off[1], off


def test_attention_has_no_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one torch does not take FlashAttention, and keys are repeated for grouped queries."""
    config = llm_families.small_config("llama")
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    model = build(tmp_path, hf_config=str(tmp_path / "config.json"))
    attend = torch.nn.functional.scaled_dot_product_attention
    calls: list[tuple[Any, ...]] = []

    def watched(query: Any, key: Any, value: Any, **options: Any) -> Any:
        calls.append((options["attn_mask"], options["is_causal"], key.size(1)))
        return attend(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    source = torch.tensor([[1, 1, 9, 8, 2], [7, 6, 5, 4, 2]])
    model.train()(source, None, torch.tensor([[2, 11, 12], [2, 21, 1]]))
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    assert calls == [(None, True, heads)] * layers


@pytest.mark.parametrize("model_type", ["gemma2", "bert"])
def test_a_prompt_has_no_logits(tmp_path: Path, model_type: str) -> None:
    """Of families whose logits are not the output projection of features alone, too (a cap; a layer before)."""
    config = llm_families.small_config(model_type)
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    model = build(tmp_path, hf_config=str(tmp_path / "config.json"))
    assert (model.decoder.output_projection is None) == (model_type == "bert")
    projected: list[int] = []
    projection = model.decoder.lm.get_output_embeddings()
    projection.register_forward_hook(lambda _, __, output: projected.append(output.size(1)))
    source = torch.tensor([[1, 1, 9, 8, 7, 6, 2], [7, 6, 5, 4, 9, 8, 2]])
    previous = torch.tensor([[2, 11, 12], [2, 21, 1]])
    assert model.train()(source, None, previous)[0].size(1) == 3
    model.eval().decoder(previous[:, :1], model.encoder(source), incremental_state={})
    assert projected == [3, 1]


def saved(folder: Path, model_type: str, **options: Any) -> Any:
    """A random model of a family in a folder, weights large enough for mistakes to show."""
    config = transformers.AutoConfig.for_model(
        **{**COMMON, "vocab_size": llm_families.VOCABULARY, "model_type": model_type, **options}
    )
    torch.manual_seed(1)
    lm = transformers.AutoModelForCausalLM.from_config(config).eval()
    for weight in lm.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    lm.save_pretrained(folder)
    return lm


def test_fewer_layers_are_the_same_when_they_are_loaded_again(tmp_path: Path) -> None:
    from sekd_fairseq.llm.loading import loads_again

    # The last of SmolLM3's layers has no rotary positions.
    saved(
        tmp_path, "smollm3", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0], pad_token_id=None,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    lm = build(tmp_path, hf_model=str(tmp_path), hf_layers=2).decoder.lm
    assert lm.config.no_rope_layers == [1, 0] and loads_again(lm)
    lm.config.no_rope_layers = [1, 1]
    assert not loads_again(lm)
    # Every second layer has experts, and three of four do not alternate: no configuration says so.
    other = tmp_path / "moe"
    saved(
        other, "qwen2_moe", num_hidden_layers=4, decoder_sparse_step=2, num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"--hf-layers 3: .*Qwen2MoeForCausalLM"):
        build(other, hf_model=str(other), hf_layers=3)
    assert len(build(other, hf_model=str(other), hf_layers=2).decoder.lm.model.layers) == 2


def test_what_text_does_not_go_through_is_not_trained(tmp_path: Path) -> None:
    text = {
        **COMMON, "vocab_size": llm_families.VOCABULARY, "head_dim": 8, "model_type": "gemma3_text",
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        "model_type": "siglip_vision_model",
    }  # fmt: skip
    saved(tmp_path, "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    source, previous = torch.tensor([[9, 8, 2], [7, 6, 2]]), torch.tensor([[2, 11], [2, 12]])
    for options in ({}, {"lora_r": 2}):
        model = build(tmp_path, hf_model=str(tmp_path), **options).train()
        model(source, None, previous)[0].sum().backward()
        learnt = {name for name, one in model.named_parameters() if one.requires_grad}
        assert learnt == {name for name, one in model.named_parameters() if one.grad is not None}
        assert not any("vision" in name or "multi_modal" in name for name in learnt)
        assert any("q_proj" in name for name in learnt)


def test_control_tokens_beside_the_vocabulary_need_no_row(tmp_path: Path, tokenizer: Path) -> None:
    """Gemma 3's tokenizer has one for images, which its small models, of text alone, lack."""
    from sekd_fairseq.export_hf import restore_rows
    from sekd_fairseq.llm.prompts import PromptSettings
    from sekd_fairseq.llm.tokenizer import load_tokenizer

    own = load_tokenizer(str(tokenizer))
    assert build_with(tmp_path / "own", own, lacks=0).vocabulary_rows.min() == -1
    folder = tmp_path / "hf"
    words = transformers.LlamaTokenizerFast(vocab_file=str(tokenizer))
    words.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    words.save_pretrained(folder)
    more = load_tokenizer(str(folder))
    size = len(more.pieces)
    model = build_with(tmp_path / "more", more, lacks=1)
    assert sorted(model.vocabulary_rows.tolist())[-1] == size - 2
    lm = model.decoder.lm
    restore_rows(lm, model.vocabulary_rows.tolist(), {})
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "more/model")
    torch.testing.assert_close(
        lm.get_input_embeddings().weight, original.get_input_embeddings().weight
    )
    # Not of words, nor of what the prompts hold.
    with pytest.raises(UserError, match=f"{size - 3} vocabulary rows, .* {size} tokens"):
        build_with(tmp_path / "more", more, lacks=3)
    prompt = PromptSettings("en", "de", "<image_soft_token>{src}")
    with pytest.raises(UserError, match="expected the tokenizer of this model"):
        build_with(tmp_path / "more", more, lacks=1, prompt=prompt)


def build_with(folder: Path, tokenizer: Any, lacks: int, prompt: Any = None) -> Any:
    """A pretrained model that lacks the last rows of a tokenizer, for data of that."""
    from sekd_fairseq.llm.preparing import make_dictionary
    from sekd_fairseq.llm.prompts import PromptSettings

    folder.mkdir(exist_ok=True)
    dictionary, rows = make_dictionary(tokenizer, tokenizer.specials[2], None)
    symbols = llm_families.hash_symbols(dictionary.symbols)
    prompt = prompt or PromptSettings("en", "de")
    llm_families.Vocabulary(rows, "", prompt, symbols).save(folder, tokenizer)
    saved(folder / "model", "llama", vocab_size=len(tokenizer.pieces) - lacks)
    task = SimpleNamespace(
        source_dictionary=dictionary,
        target_dictionary=dictionary,
        cfg=SimpleNamespace(data=str(folder)),
    )
    cfg = llm_families.HFCausalLMConfig(hf_model=str(folder / "model"))
    return llm_families.HFCausalLM.build_model(cfg, task)


def test_a_checkpoint_of_data_that_end_otherwise_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(
        llm_families.small_config("llama").to_json_string(use_diff=False)
    )
    model = build(tmp_path, hf_config=str(tmp_path / "config.json"))
    state = model.state_dict()
    model.load_state_dict(state)
    rows = state["vocabulary_rows"]
    rows[[2, 9]] = rows[[9, 2]]
    with pytest.raises(SystemExit, match=r"end with token 2 .* checkpoint's data with token 9"):
        model.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"hf_config": "c.json", "hf_layers": 2}, "--hf-layers: has an effect with --hf-model"),
        ({"hf_config": "c.json", "hf_gguf_file": "x"}, "--hf-gguf-file: has an effect"),
        ({"hf_model": "m", "lora_alpha": 32}, "--lora-alpha: has an effect with --lora-r"),
        ({"hf_model": "m", "hf_config": "c.json"}, "expected one, found both"),
        ({"hf_model": "m", "lora_r": -1}, "0 or more"),
    ],
)
def test_options_without_effect_are_refused(
    tmp_path: Path, options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        build(tmp_path, **options)
