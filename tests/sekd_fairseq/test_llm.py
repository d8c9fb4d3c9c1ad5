"""Language models as teachers and students, on tiny random models of each family."""

import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch

from sekd_fairseq.errors import UserError
from sekd_fairseq.llm.prompts import Template
from sekd_fairseq.llm.tokenizer import load_tokenizer
from sekd_fairseq.llm.vocabulary import build_vocabulary, symbol_of, token_of
from sekd_fairseq.teacher_cache import TeacherCache

from .conftest import (
    ROOT,
    command,
    error_line,
    parameters,
    sentence_pairs,
    train_in_two_processes,
    write_text,
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


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model with byte pieces, and a Llama tokenizer folder made of it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    lines = [word for pair in sentence_pairs(200, 9) for word in pair]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "spm"), vocab_size=330,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return folder / "spm.model"


@pytest.fixture(scope="module")
def llm_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm_text")
    write_text(folder, "train", sentence_pairs(60, 0))
    write_text(folder, "valid", sentence_pairs(9, 1))
    odd = [
        ("one", "你好，世界"),
        ("two", "Straße — „ja“"),
        ("a", "🙂  zwei   Lücken"),
        ("and", "ﬁ é"),
    ]
    write_text(folder, "test", odd + sentence_pairs(5, 2))
    return folder


def prepare(tokenizer: Path, text: Path, output: Path, *options: object, check: bool = True) -> str:
    splits = [word for s in ("train", "valid", "test") for word in (f"--{s}", text / s)]
    return command(
        "sekd_fairseq.prepare_llm_data", "--tokenizer", tokenizer, *splits, "--source-lang", "en",
        "--target-lang", "de", "--output", output, *options, check=check,
    )  # fmt: skip


@pytest.fixture(scope="module")
def llm_data(tokenizer: Path, llm_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm_data") / "data"
    out = prepare(tokenizer, llm_text, folder)
    assert '"unknown_tokens": 0' in out and '"translations_not_given_back_exactly": 0' in out
    return folder / "bin"


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


def test_text_comes_back_exactly(llm_data: Path, tokenizer: Path, llm_text: Path) -> None:
    from fairseq.data import Dictionary, indexed_dataset

    dictionary = Dictionary.load(str(llm_data / "dict.de.txt"))
    opened = load_tokenizer(str(tokenizer))
    for language, column in (("de", slice(0, None)), ("en", slice(1, None))):
        dataset = indexed_dataset.make_dataset(str(llm_data / f"test.en-de.{language}"), "mmap")
        lines = (llm_text / f"test.{language}").read_text(encoding="utf-8").split("\n")
        for i, line in enumerate(lines[:-1]):
            symbols = [dictionary[token] for token in dataset[i][column][:-1]]
            text = opened.decode([token_of(symbol) for symbol in symbols])
            if language == "en":
                line = Template(
                    "Translate from {src_lang} to {tgt_lang}.\n{src_lang}: {src}\n{tgt_lang}:\n",
                    "en", "de",
                ).prompt(line)  # fmt: skip
            assert text == line
            assert dataset[i][-1] == dictionary.eos()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pretrained_model_is_what_transformers_says(
    llm_data: Path, tokenizer: Path, tmp_path: Path, family: str
) -> None:
    tokens = len(load_tokenizer(str(tokenizer)).pieces)
    # More rows than the tokenizer has tokens, as padded matrices have.
    source = pretrained(tmp_path / "model", family, tokens + 6)
    options = ("--criterion", "cross_entropy", "--hf-model", source, "--disable-validation")
    train_llm(llm_data, tmp_path / "save", *options, "--lr", "1e-9", "--max-update", "1")
    model, task = load(tmp_path / "save" / "checkpoint_last.pt", llm_data)
    original = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    rows = model.vocabulary_rows
    task.load_dataset("test")
    dataset = task.dataset("test")
    batch = dataset.collater([dataset[i] for i in range(5)])  # sentences of different lengths
    with torch.no_grad():
        logits = model(**batch["net_input"])[0]
        features = model(**batch["net_input"], features_only=True)[0]
    torch.testing.assert_close(model.decoder.output_projection(features), logits)
    known = rows >= 0
    for place, sentence in enumerate(batch["id"].tolist()):
        item = dataset[sentence]
        prompt, target = item["source"][:-1], item["target"]
        ids = rows[torch.cat([prompt, target[:-1]])].unsqueeze(0)
        with torch.no_grad():
            expected = original(ids).logits[0, len(prompt) - 1 :]
        found = logits[place, : len(target)]
        torch.testing.assert_close(found[:, known], expected[:, rows[known]], atol=3e-4, rtol=1e-4)
    # The prompts' common beginning was computed once, and again only for other prompts or weights.
    prefix = model.decoder._prefix[0]
    instruction = "Translate from English to German.\nEnglish:"
    assert len(prefix) >= len(load_tokenizer(str(tokenizer)).encode(instruction))
    with torch.enable_grad():
        alone = model(**batch["net_input"])[0]
    inside = batch["target"].ne(1)
    torch.testing.assert_close(logits[inside], alone[inside], atol=3e-4, rtol=1e-4)
    one_row = dataset.collater([dataset[3]])["net_input"]
    with torch.no_grad():
        model(**one_row)
        assert torch.equal(model.decoder._prefix[0], prefix)
        model.decoder._prefix = None
        model(**one_row)
        # All but the end of sentence and the token that predicts the translation's first.
        assert len(model.decoder._prefix[0]) == int(one_row["src_lengths"]) - 2
        model(**batch["net_input"])
        assert torch.equal(model.decoder._prefix[0], prefix)
    model.train()
    assert model.decoder._prefix is None
    model.eval()
    # Step by step with the key-value cache, the beam reordered on the way.
    encoder_out = model.encoder(batch["net_input"]["src_tokens"])
    state: dict[str, Any] = {}
    previous = batch["net_input"]["prev_output_tokens"]
    order = torch.tensor([3, 1, 4, 0, 2])
    with torch.no_grad():
        for step in range(1, 4):
            if step == 3:
                model.decoder.reorder_incremental_state_scripting(state, order)
                encoder_out = model.encoder.reorder_encoder_out(encoder_out, order)
                previous, logits, batch["target"] = (
                    x[order] for x in (previous, logits, batch["target"])
                )
            one = model.decoder(previous[:, :step], encoder_out, incremental_state=state)[0]
            inside = batch["target"][:, step - 1].ne(1)
            torch.testing.assert_close(
                one[inside, 0], logits[inside, step - 1], atol=3e-4, rtol=1e-4
            )


def test_teacher_cache_student_generation_and_export(
    llm_data: Path, tokenizer: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(FAMILIES["llama-tied"]))
    scratch = ("--hf-config", config)
    train_llm(
        llm_data, tmp_path / "teacher", "--criterion", "cross_entropy", *scratch, "--max-update",
        "150", "--disable-validation",
    )  # fmt: skip
    teacher = tmp_path / "teacher" / "checkpoint_last.pt"
    config.unlink()  # the checkpoint holds its configuration
    cache = tmp_path / "cache"
    out = command(
        "sekd_fairseq.build_cache", llm_data, "--path", teacher, "--output", cache, "--cpu",
        "--top-p", "0.95", "--subset", "train,valid,test", "--allow-implausible",
    )  # fmt: skip
    assert "hf_causal_lm" in out
    opened = TeacherCache.open(cache / "test")
    target_tokens = json.loads((llm_data.parent / "data.json").read_text())["target_tokens"]
    assert opened.manifest.tokens == target_tokens["test"]  # the prompt is not distilled
    # The cache's distributions are the teacher's.
    model, task = load(teacher, llm_data)
    task.load_dataset("test")
    sample = task.dataset("test").collater([task.dataset("test")[1]])
    log_p = model(**sample["net_input"])[0][0].log_softmax(-1)
    gold = log_p.gather(1, sample["target"][0].unsqueeze(1)).squeeze(1)
    np.testing.assert_allclose(opened[1].gold_logprob, gold.detach(), atol=1e-4)
    config.write_text(json.dumps({**FAMILIES["llama"], "num_hidden_layers": 1}))
    kd = ("--criterion", "self_evolution_kd", "--teacher-cache", cache, *scratch)
    losses = {}
    for chunk in ("0", "16"):
        log = train_llm(
            llm_data, tmp_path / chunk, *kd, "--sekd-chunk-tokens", chunk,
            "--hf-gradient-checkpointing",
        )  # fmt: skip
        assert "no effect" not in log
        losses[chunk] = [
            line.split('"loss": "')[1][:5] for line in log.splitlines() if '"loss"' in line
        ]
    assert losses["0"] == losses["16"] and len(losses["0"]) == 3
    student = tmp_path / "0" / "checkpoint_best.pt"
    generated = command(
        "fairseq_cli.generate", llm_data, *PLUGIN, "--path", student, "--gen-subset", "test",
        "--cpu", "--beam", "3", "--max-len-b", "12", "--bpe", "hf_tokenizer", "--hf-tokenizer",
        tokenizer, "--prefix-size", "1",
    )  # fmt: skip
    lines = [line for line in generated.splitlines() if line.startswith("D-")]
    assert len(lines) == 9
    # Detokenised text, and the given first token of each reference.
    assert not any("▁" in line.split("\t")[2] for line in lines)
    pieces = {line.split("\t")[0]: line.split("\t")[-1].split() for line in generated.splitlines()}
    for number in range(9):
        reference = task.dataset("test")[number]["target"]
        assert pieces[f"H-{number}"][0] == task.target_dictionary[int(reference[0])]
    command(
        "sekd_fairseq.score", llm_data, "--path", student, "--teacher-cache", cache, "--run",
        tmp_path / "run", "--cpu",
    )  # fmt: skip
    assert list((tmp_path / "run" / "tokens" / "test").glob("*.parquet"))
    command("sekd_fairseq.export_hf", student, "--data", llm_data, "--output", tmp_path / "hf")
    check_exported(tmp_path / "hf", load(student, llm_data)[0], task.dataset("test"), 4)
    # And back again: the exported folder is a model to start from.
    log = train_llm(
        llm_data, tmp_path / "again", "--criterion", "cross_entropy", "--hf-model", tmp_path / "hf",
        "--max-update", "1", "--eval-bleu", "--eval-bleu-args", '{"beam": 1, "max_len_b": 5}',
        "--eval-bleu-print-samples",
    )  # fmt: skip
    # Of text, and not of symbols.
    shown = re.search("example reference: (.*)", log)
    assert shown and shown[1] in (llm_data.parent / "valid.de").read_text().splitlines()


def test_two_processes_train_as_one(llm_data: Path, tokenizer: Path, tmp_path: Path) -> None:
    tokens = len(load_tokenizer(str(tokenizer)).pieces)
    source = pretrained(tmp_path / "model", "llama", tokens)
    command(
        "sekd_fairseq.import_hf", source, "--data", llm_data, "--output", tmp_path / "teacher.pt"
    )
    command(
        "sekd_fairseq.build_cache", llm_data, "--path", tmp_path / "teacher.pt", "--output",
        tmp_path / "cache", "--cpu", "--allow-implausible",
    )  # fmt: skip
    config = tmp_path / "config.json"
    config.write_text(json.dumps(FAMILIES["llama"]))
    options = (
        "--criterion", "self_evolution_kd", "--teacher-cache", tmp_path / "cache", "--hf-config",
        config, "--optimizer", "sgd", "--lr", "0.1", "--batch-size", "6", "--max-tokens", "9999",
        "--disable-validation", "--seed", "2", "--sekd-chunk-tokens", "16",
    )  # fmt: skip
    train_llm(llm_data, tmp_path / "one", *options, "--update-freq", "2")
    train_in_two_processes(train_llm_arguments(llm_data, tmp_path / "two", *options))
    one, two = (parameters(tmp_path / name / "checkpoint_last.pt") for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=0, atol=2e-5)


def test_adapters_and_fewer_layers(llm_data: Path, tokenizer: Path, tmp_path: Path) -> None:
    tokens = len(load_tokenizer(str(tokenizer)).pieces)
    source = pretrained(tmp_path / "model", "qwen2", tokens)
    base = ("--criterion", "cross_entropy", "--hf-model", source, "--disable-validation")
    train_llm(llm_data, tmp_path / "save", *base, "--lora-r", "2", "--max-update", "5")
    path = tmp_path / "save" / "checkpoint_last.pt"
    state = torch.load(path, map_location="cpu")["model"]
    assert all("lora_" in key or key == "vocabulary_rows" for key in state)
    model, task = load(path, llm_data)
    command(
        "sekd_fairseq.export_hf",
        path,
        "--data",
        llm_data,
        "--output",
        tmp_path / "hf",
        "--base",
        source,
    )
    task.load_dataset("valid")
    exported, ids = check_exported(tmp_path / "hf", model, task.dataset("valid"), 0)
    # Not the model it started from: the adapters were trained.
    original = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    assert not torch.allclose(original(ids).logits, exported(ids).logits[..., :tokens], atol=1e-3)
    train_llm(llm_data, tmp_path / "one", *base, "--hf-layers", "1")
    model, _ = load(tmp_path / "one" / "checkpoint_last.pt", llm_data)
    assert len(model.decoder.model.model.layers) == 1


def test_pruned_vocabulary_is_restored(tokenizer: Path, llm_text: Path, tmp_path: Path) -> None:
    out = prepare(tokenizer, llm_text, tmp_path / "data", "--prune-vocab", "--shots", "2")
    assert '"unknown_tokens": 0' in out
    data = tmp_path / "data" / "bin"
    pieces = load_tokenizer(str(tokenizer)).pieces
    source = pretrained(tmp_path / "model", "gemma3", len(pieces))
    train_llm(
        data, tmp_path / "save", "--criterion", "cross_entropy", "--hf-model", source,
        "--disable-validation", "--lr", "1e-9",
    )  # fmt: skip
    model, _ = load(tmp_path / "save" / "checkpoint_last.pt", data)
    assert 259 <= len(model.vocabulary_rows) < len(pieces)
    command(
        "sekd_fairseq.export_hf", tmp_path / "save" / "checkpoint_last.pt", "--data", data, "--output",
        tmp_path / "hf", "--base", source,
    )  # fmt: skip
    ids = torch.arange(3, 40).unsqueeze(0)
    one, other = (
        transformers.AutoModelForCausalLM.from_pretrained(path).eval()(ids).logits
        for path in (source, tmp_path / "hf")
    )
    torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def bpe_folder(llm_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer, as GPT-2 and Qwen have, and a model of 4 more rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"], show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator((llm_text / "train.de").read_text().splitlines(), trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    pretrained(folder, "qwen2", tokenizer.get_vocab_size() + 4)
    return folder


def gguf_model(folder: Path, spm: Path) -> None:
    """A random Llama in one GGUF file with a SentencePiece BPE tokenizer."""
    gguf = pytest.importorskip("gguf")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    size, width, hidden = processor.get_piece_size(), 32, 48
    folder.mkdir()
    writer = gguf.GGUFWriter(str(folder / "model.gguf"), "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(width // 4)
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("llama")
    ids = range(size)
    kinds = [
        6
        if processor.is_byte(i)
        else 3
        if processor.is_control(i) or processor.is_unknown(i)
        else 1
        for i in ids
    ]
    writer.add_token_list([processor.id_to_piece(i) for i in ids])
    writer.add_token_scores([processor.get_score(i) for i in ids])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(processor.bos_id())
    writer.add_eos_token_id(processor.eos_id())
    writer.add_unk_token_id(processor.unk_id())
    writer.add_add_space_prefix(False)
    random = np.random.default_rng(1)
    shapes = {
        "token_embd": (size, width), "output": (size, width), "output_norm": (width,),
        "blk.0.attn_norm": (width,), "blk.0.ffn_norm": (width,),
        "blk.0.attn_q": (width, width), "blk.0.attn_k": (width // 2, width),
        "blk.0.attn_v": (width // 2, width), "blk.0.attn_output": (width, width),
        "blk.0.ffn_gate": (hidden, width), "blk.0.ffn_up": (hidden, width),
        "blk.0.ffn_down": (width, hidden),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.3, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_file(llm_text: Path, tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((llm_text / "train.de").read_text(encoding="utf-8").splitlines()),
        model_prefix=str(tmp_path / "spm"), vocab_size=300, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    folder = tmp_path / "model"
    gguf_model(folder, tmp_path / "spm.model")
    name = "model.gguf"
    original = load_tokenizer(str(tmp_path / "spm.model"))
    opened = load_tokenizer(str(folder), name)
    for line in [*(llm_text / "test.de").read_text(encoding="utf-8").splitlines(), " a  b\t"]:
        assert opened.encode(line) == original.encode(line)
        assert opened.decode(opened.encode(line)) == line
    assert opened.specials == original.specials and opened.pieces == original.pieces
    data = tmp_path / "data"
    prepare(folder, llm_text, data, "--gguf-file", name)
    out = command(
        "sekd_fairseq.import_hf", folder, "--gguf-file", name, "--data", data / "bin", "--output",
        tmp_path / "teacher.pt",
    )  # fmt: skip
    assert "parameters" in out
    model, task = load(tmp_path / "teacher.pt", data / "bin")
    task.load_dataset("test")
    item = task.dataset("test")[1]
    rows = model.vocabulary_rows
    same = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name).eval()
    ids = rows[torch.cat([item["source"][:-1], item["target"][:-1]])].unsqueeze(0)
    with torch.no_grad():
        found = model(**task.dataset("test").collater([item])["net_input"])[0][0]
        expected = same(ids).logits[0, len(item["source"]) - 2 :]
    known = rows >= 0
    torch.testing.assert_close(found[:, known], expected[:, rows[known]], atol=3e-4, rtol=1e-4)
    # Exported, it is an ordinary folder whose tokenizer says the same.
    command(
        "sekd_fairseq.export_hf",
        tmp_path / "teacher.pt",
        "--data",
        data / "bin",
        "--output",
        tmp_path / "hf",
    )
    exported = load_tokenizer(str(tmp_path / "hf"))
    for line in (llm_text / "test.de").read_text(encoding="utf-8").splitlines():
        assert exported.encode(line) == original.encode(line)
        assert exported.decode(exported.encode(line)) == line
    check_exported(tmp_path / "hf", model, task.dataset("test"), 1)


def test_byte_level_tokenizer_and_few_shot_teacher(
    bpe_folder: Path, llm_text: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    out = prepare(bpe_folder, llm_text, data, "--teacher-shots", "2", "--prune-vocab", "--train-limit", "20")  # fmt: skip
    summary = json.loads((data / "data.json").read_text())
    assert summary["translations_not_given_back_exactly"] == summary["unknown_tokens"] == 0
    assert summary["sentences"] == {"train": 20, "valid": 9, "test": 9}, out
    tokenizer = load_tokenizer(str(bpe_folder))
    # The teacher's prompts: the student's after two examples, in the same symbols.
    scripted = {}
    for name in ("bin", "teacher"):
        command(
            "sekd_fairseq.import_hf",
            bpe_folder,
            "--data",
            data / name,
            "--output",
            tmp_path / f"{name}.pt",
        )
        model, task = load(tmp_path / f"{name}.pt", data / name)
        task.load_dataset("test")
        scripted[name] = model, task.dataset("test"), task.target_dictionary
    (student, plain, dictionary), (teacher, shots, same) = scripted["bin"], scripted["teacher"]
    assert dictionary.symbols == same.symbols
    for i in range(9):
        assert torch.equal(plain[i]["target"], shots[i]["target"])
        text = tokenizer.decode(teacher.vocabulary_rows[shots[i]["source"][:-1]].tolist())
        examples = "".join(
            f"Translate from English to German.\nEnglish: {src}\nGerman:\n{tgt}\n\n"
            for src, tgt in summary["shots"]
        )
        assert text.startswith(examples) and text.endswith("\nGerman:\n")
    # The end of sentence is what ends an example; the two tokens have changed places.
    end = tokenizer.encode("\n\n")[0]
    eos = tokenizer.specials[2]
    row = dictionary.index(symbol_of(end, tokenizer.pieces[end]))
    assert student.vocabulary_rows[[2, row]].tolist() == [eos, end]
    assert teacher.vocabulary_rows[[2, row]].tolist() == [end, eos]
    # A cache of the teacher serves the student.
    command(
        "sekd_fairseq.build_cache", data / "teacher", "--path", tmp_path / "teacher.pt",
        "--output", tmp_path / "cache", "--cpu", "--allow-implausible",
    )  # fmt: skip
    log = train_llm(
        data / "bin", tmp_path / "save", "--hf-model", bpe_folder, "--criterion",
        "self_evolution_kd", "--teacher-cache", tmp_path / "cache",
    )  # fmt: skip
    assert "difficulty" in log
    too_many = prepare(
        bpe_folder, llm_text, tmp_path / "no", "--shots", "61", check=False
    )  # fmt: skip
    assert "--shots" in error_line(too_many)


@dataclass
class FakeLogprob:
    """As vLLM's ``Logprob``: what ``prompt_logprobs`` holds for a token id."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


def fake_vllm(folder: Path) -> ModuleType:
    """A module with vLLM's documented interface, on transformers: not vLLM itself."""

    class SamplingParams:
        def __init__(self, max_tokens: int, prompt_logprobs: int, detokenize: bool) -> None:
            assert max_tokens >= 1
            self.prompt_logprobs = prompt_logprobs

    class LLM:
        def __init__(self, model: str, dtype: str, max_logprobs: int) -> None:
            assert model == str(folder) and dtype == "float32"
            self.max_logprobs = max_logprobs
            self.model = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
            positions = self.model.config.max_position_embeddings
            self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=positions))

        def generate(self, prompts: Any, sampling_params: Any, use_tqdm: bool) -> list[Any]:
            best = sampling_params.prompt_logprobs
            assert best <= self.max_logprobs
            return [self.one(prompt["prompt_token_ids"], best) for prompt in prompts]

        def one(self, ids: list[int], best: int) -> Any:
            with torch.no_grad():
                log_p = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            found: list[Any] = [None]  # nothing predicts the first token
            for row, token in zip(log_p[:-1], ids[1:], strict=True):
                chosen = {*row.topk(best).indices.tolist(), token}
                found.append({i: FakeLogprob(row[i].item()) for i in chosen})
            return SimpleNamespace(prompt_token_ids=ids, prompt_logprobs=found)

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    return module


def test_vllm_engine(
    tokenizer: Path, llm_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sekd_fairseq import build_cache

    data = tmp_path / "data"
    # Few-shot prompts, which have the end of sentence within.
    prepare(tokenizer, llm_text, data, "--prune-vocab", "--shots", "2")
    pieces = load_tokenizer(str(tokenizer)).pieces
    source = pretrained(tmp_path / "model", "llama", len(pieces))
    command_line = [
        str(data / "bin"),
        "--path",
        str(source),
        "--engine",
        "vllm",
        "--subset",
        "test",
    ]
    command_line.append("--allow-implausible")
    with pytest.raises(SystemExit):
        build_cache.main([*command_line, "--output", str(tmp_path / "no")])  # no vLLM here
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm(source))
    for wrong in (["--sample", "4"], ["--temperature", "2"], ["--top-k", "0"]):
        with pytest.raises(SystemExit):
            build_cache.main([*command_line, "--output", str(tmp_path / "no"), *wrong])
    assert not (tmp_path / "no").exists()
    build_cache.main([*command_line, "--output", str(tmp_path / "k"), "--top-k", "6"])
    build_cache.main(
        [*command_line, "--output", str(tmp_path / "p"), "--top-k", "6", "--top-p", "0.3"]
    )
    top_k, top_p = (TeacherCache.open(tmp_path / name / "test") for name in "kp")
    command(
        "sekd_fairseq.import_hf",
        source,
        "--data",
        data / "bin",
        "--output",
        tmp_path / "teacher.pt",
    )
    model, task = load(tmp_path / "teacher.pt", data / "bin")
    task.load_dataset("test")
    dataset = task.dataset("test")
    rows = model.vocabulary_rows
    original = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    known = rows[rows >= 0]
    for i in range(len(dataset)):
        item = dataset[i]
        ids = rows[torch.cat([item["source"][:-1], item["target"]])].unsqueeze(0)
        with torch.no_grad():
            log_p = original(ids).logits[0, len(item["source"]) - 2 : -1].log_softmax(-1)
        sentence, ends = top_k[i], top_k[i].support_size.cumsum()
        fewer = top_p[i]
        for place, gold in enumerate(item["target"].tolist()):
            entries = slice(ends[place] - sentence.support_size[place], ends[place])
            kept, values = sentence.token_id[entries], sentence.logprob[entries]
            exact = log_p[place, rows[kept.astype(int)]]
            assert kept[0] == gold
            np.testing.assert_allclose(values, exact, atol=2e-2)  # stored in 16 bits
            np.testing.assert_allclose(sentence.gold_logprob[place], exact[0], atol=1e-4)
            # Of the model's six best, those that have a symbol, and what they leave.
            best = [t for t in log_p[place].topk(6).indices.tolist() if t in known.tolist()]
            expected = {int(rows[gold]), *[t for t in best if t != rows[gold]][:5]}
            assert {int(rows[t]) for t in kept.astype(int)} == expected
            rest = 1 - exact.exp().sum()
            np.testing.assert_allclose(sentence.outside_mass[place], rest, atol=1e-3)
            assert sentence.entropy[place] <= -(log_p[place].exp() * log_p[place]).sum() + 1e-3
        assert (fewer.support_size <= sentence.support_size + 1).all()
    assert top_p.manifest.tokens == top_k.manifest.tokens
    assert top_k.manifest.teacher["arch"] == "vllm"


def test_bad_input_ends_with_one_line(
    llm_data: Path, data: Path, tokenizer: Path, llm_text: Path, tmp_path: Path
) -> None:
    ce = ("--criterion", "cross_entropy")

    def refuse(*arguments: object) -> str:
        return error_line(train_llm(*arguments, check=False))

    save = tmp_path / "save"
    assert "found neither" in refuse(llm_data, save, *ce)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(json.dumps(FAMILIES["llama"]))
    assert "with its weights" in refuse(llm_data, save, *ce, "--hf-model", tmp_path / "empty")
    small = pretrained(tmp_path / "small", "llama", 100)
    assert "the tokenizer of this model" in refuse(llm_data, save, *ce, "--hf-model", small)
    config = ("--hf-config", tmp_path / "empty" / "config.json")
    assert "prepare_llm_data" in refuse(data, save, *ce, *config)
    (tmp_path / "empty" / "config.json").write_text(
        json.dumps({**FAMILIES["llama"], "max_position_embeddings": 20})
    )
    assert "positions" in refuse(
        llm_data, save, *ce, *config, "--skip-invalid-size-inputs-valid-test"
    )
    assert "--truncate-source" in refuse(llm_data, save, *ce, *config, "--truncate-source")
    assert "expected --hf-model" in refuse(llm_data, save, *ce, *config, "--lora-r", "2")
    gpt2 = pretrained(tmp_path / "gpt2", "gpt2", len(load_tokenizer(str(tokenizer)).pieces))
    layers = ("--hf-model", gpt2, "--hf-layers", "1")
    assert "GPT2LMHeadModel" in refuse(llm_data, save, *ce, *layers)
    template = tmp_path / "template"
    template.write_text("Translate: {source}")
    line = error_line(
        prepare(tokenizer, llm_text, tmp_path / "no", "--template", template, check=False)
    )
    assert "{src}" in line and not (tmp_path / "no").exists()
    line = error_line(prepare(tmp_path / "none", llm_text, tmp_path / "no", check=False))
    assert "--tokenizer" in line


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_positions_are_for_prompt_and_translation_together(
    llm_data: Path, tmp_path: Path, family: str
) -> None:
    import fairseq.tasks
    from fairseq.sequence_generator import SequenceGenerator

    from sekd_fairseq.checkpoints import language_model_config, position_limits
    from sekd_fairseq.splits import too_long

    name = "n_positions" if family == "gpt2" else "max_position_embeddings"
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**FAMILIES[family], name: 60}))
    cfg = language_model_config(str(llm_data), "--hf-config", str(config))
    task = fairseq.tasks.setup_task(cfg.task)
    torch.manual_seed(1)
    model = task.build_model(cfg.model).eval()
    task.load_dataset("train")
    dataset = task.dataset("train")
    assert model.joint_positions == 62
    # A long prompt and a long translation that fit, each with another's short one.
    word = torch.arange(10, 20)
    rows = [
        {"id": i, "source": torch.cat([word.repeat(6)[:prompt], torch.tensor([2])]),
         "target": torch.cat([word.repeat(6)[:translation], torch.tensor([2])])}
        for i, (prompt, translation) in enumerate([(55, 5), (10, 50)])
    ]  # fmt: skip
    batch = dataset.collater(rows)["net_input"]
    with torch.enable_grad():
        logits = model(**batch)[0]
    for i, row in enumerate(rows):
        alone = model(**dataset.collater([row])["net_input"])[0]
        length = len(row["target"])
        place = int(dataset.collater(rows)["id"].eq(i).nonzero())
        torch.testing.assert_close(logits[place, :length], alone[0], atol=1e-4, rtol=1e-4)
    rows[1]["source"] = torch.cat([word.repeat(2)[:11], torch.tensor([2])])
    with pytest.raises(UserError), torch.enable_grad():
        model(**dataset.collater(rows)["net_input"])
    # Data that do not fit are named before they are read, and left out where that is asked for.
    sizes = dataset.sizes.sum(axis=1)
    model_limit = int(np.median(sizes))
    limits = [(1000, 1000, model_limit)]
    assert len(too_long(dataset, limits, "train", allow=True)) == (sizes > model_limit).sum() > 0
    assert position_limits([model]) == [(60, 60, 62)]
    task.joint_positions = model_limit
    indices = np.arange(len(dataset))
    kept = task.filter_indices_by_size(indices, dataset, None, True)
    assert len(kept) == (sizes <= model_limit).sum()
    with pytest.raises(SystemExit):
        task.filter_indices_by_size(indices, dataset, None, False)
    # Generation ends at the last position.
    generator = SequenceGenerator([model], task.target_dictionary, beam_size=2, max_len_b=200)
    found = generator.generate([model], dataset.collater([rows[0], rows[1]]))
    prompts = dict(zip(dataset.collater(rows)["id"].tolist(), found, strict=True))
    for i, row in enumerate(rows):
        for hypothesis in prompts[i]:
            assert len(row["source"]) - 1 + len(hypothesis["tokens"]) - 1 <= 60
            assert torch.isfinite(hypothesis["score"])


def test_batches_are_cut_by_prompt_and_translation_together(llm_data: Path, tmp_path: Path) -> None:
    import fairseq.tasks

    from sekd_fairseq.checkpoints import language_model_config
    from sekd_fairseq.splits import token_batches

    config = tmp_path / "config.json"
    config.write_text(json.dumps(FAMILIES["llama"]))
    cfg = language_model_config(str(llm_data), "--hf-config", str(config))
    task = fairseq.tasks.setup_task(cfg.task)
    model = task.build_model(cfg.model)
    task.load_dataset("train")
    dataset = task.dataset("train")
    iterator = task.get_batch_iterator(dataset, max_tokens=600, seed=3)
    for batches in (iterator.frozen_batches, token_batches(dataset, range(len(dataset)), 600)):
        assert sorted(i for batch in batches for i in batch) == list(range(len(dataset)))
        computed = padding = 0
        for indices in batches:
            batch = dataset.collater([dataset[i] for i in indices])
            read: list[tuple[int, ...]] = []
            embedding = model.decoder.model.get_input_embeddings()
            hook = embedding.register_forward_hook(
                lambda _, inputs, __, read=read: read.append(tuple(inputs[0].shape))
            )
            model(**batch["net_input"])
            hook.remove()
            # By hand: each row is a prompt without its end and a translation without its end.
            source, target = dataset.sizes[indices].T
            rows = source - 1 + target - 1
            assert read == [(len(indices), rows.max())] and rows.max() * len(indices) <= 600
            assert batch["net_input"]["longest"] == rows.max()
            assert batch["positions"] == (rows.max() * len(rows), (rows.max() - rows).sum())
            computed, padding = computed + batch["positions"][0], padding + batch["positions"][1]
        assert 0 < padding / computed < 0.1
    # A model that is no language model counts the longer side, as fairseq does.
    plain = fairseq.tasks.setup_task(cfg.task)
    plain.load_dataset("train")
    indices = np.arange(len(dataset))
    assert (plain.dataset("train").num_tokens_vec(indices) == dataset.sizes.max(axis=1)).all()
    assert "longest" not in plain.dataset("train").collater([dataset[0]])["net_input"]


def test_training_logs_the_share_of_padding(llm_data: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(FAMILIES["llama"]))
    out = train_llm(
        llm_data, tmp_path / "save", "--criterion", "cross_entropy", "--hf-config", config,
        "--disable-validation",
    )  # fmt: skip
    records = [json.loads(line[line.index("{") :]) for line in out.splitlines() if '"ups"' in line]
    shares = [float(record["padding"]) for record in records]
    assert len(shares) == 3 and all(0 <= share < 0.1 for share in shares)


def test_vocabulary_by_hand() -> None:
    pieces = ["<unk>", "<s>", "</s>", "a b", "\n", "c"]
    symbols, rows = build_vocabulary(pieces, (1, None, 2, 0))
    assert symbols == ["<s>", "<pad>", "</s>", "<unk>", "3:a\\u0020b", "4:\\u000a", "5:c"]
    assert rows == [1, -1, 2, 0, 3, 4, 5]
    assert [token_of(symbol) for symbol in symbols] == [-1, -1, -1, -1, 3, 4, 5]
    # Padding that is the end of sentence: the end needs it more.
    assert build_vocabulary(pieces, (1, 2, 2, 0))[1] == rows
    assert build_vocabulary(pieces, (1, None, 2, 0), keep={5})[1] == [1, -1, 2, 0, 5]
    assert symbol_of(7, "12:x") == "7:12:x" and token_of("7:12:x") == 7


def test_a_translation_is_one_line(bpe_folder: Path) -> None:
    from sekd_fairseq.llm.bpe import HFTokenizerBPE, HFTokenizerConfig

    bpe = HFTokenizerBPE(HFTokenizerConfig(hf_tokenizer=str(bpe_folder)))
    text = "Straße  \u2028 zwei"
    assert bpe.decode(bpe.encode(text)) == text
    assert bpe.decode(bpe.encode(f"{text}\n\nTranslate from")) == text
    assert bpe.decode(f"<s> {bpe.encode(chr(10) + text)} </s>") == text


def test_templates() -> None:
    template = Template("{src_lang}: {src}\n{tgt_lang}: ", "de", "xx")
    assert template.prompt("Ja {x}") == "German: Ja {x}\nxx: "
    assert template.prompt("b", [("a", "A")]) == "German: a\nxx: A\n\nGerman: b\nxx: "
    for text in ("no field", "{src} {other}", "{src"):
        with pytest.raises(UserError, match="prompt template"):
            Template(text, "de", "en")


def test_adapters_travel(
    llm_data: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data and base moved, the checkpoint used from another directory: what is given wins."""
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(llm_data, first / "data")
    pretrained(first / "base", "llama", len(load_tokenizer(str(tokenizer)).pieces))
    monkeypatch.chdir(first)
    arguments = train_llm_arguments(
        Path("data"), Path("lora"), "--criterion", "cross_entropy", "--hf-model", "base", "--lora-r",
        "2", "--disable-validation",
    )  # fmt: skip
    command(*arguments, cwd=first)
    path = first / "lora" / "checkpoint_last.pt"
    second.mkdir()
    generate = [
        "fairseq_cli.generate", *PLUGIN, "--path", path, "--cpu", "--beam", "2", "--max-len-b", "4",
    ]  # fmt: skip
    # From elsewhere, the base where it was.
    command(*generate, first / "data", cwd=second)
    data, base = ((first / name).rename(second / name) for name in ("data", "base"))
    line = error_line(command(*generate, "data", cwd=second, check=False))
    assert str(first / "base") in line and "--hf-model" in line and "--model-overrides" in line
    out = command(*generate, "data", "--model-overrides", "{'hf_model': 'base'}", cwd=second)
    assert out.count("H-") == 9
    score = ["sekd_fairseq.score", "data", "--path", path, "--run", "run", "--cpu"]
    assert "--hf-model" in error_line(command(*score, cwd=second, check=False))
    command(*score, "--hf-model", "base", cwd=second)
    build = ["sekd_fairseq.build_cache", "data", "--path", path, "--output", "cache", "--cpu"]
    build += ["--subset", "test", "--allow-implausible"]
    assert "--hf-model" in error_line(command(*build, cwd=second, check=False))
    command(*build, "--hf-model", "base", cwd=second)
    command(
        "sekd_fairseq.export_hf", path, "--data", data, "--output", tmp_path / "hf", "--base", base
    )
