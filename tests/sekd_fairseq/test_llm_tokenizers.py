"""Tokenizers of language models: SentencePiece, byte-level, of GGUF files; text comes back as it was."""

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

from sekd_fairseq.errors import UserError
from sekd_fairseq.llm.prompts import Template
from sekd_fairseq.llm.text import LanguageModelText
from sekd_fairseq.llm.tokenizer import load_tokenizer
from sekd_fairseq.llm.vocabulary import Vocabulary, build_vocabulary, symbol_of

from .conftest import (
    command,
    error_line,
    prepare,
)
from .language_models import check_exported, load, pretrained, train_llm

transformers = pytest.importorskip("transformers")


def test_text_comes_back_exactly(llm_data: Path, tokenizer: Path, llm_text: Path) -> None:
    from fairseq.data import Dictionary, indexed_dataset

    dictionary = Dictionary.load(str(llm_data / "dict.de.txt"))
    opened = load_tokenizer(str(tokenizer))
    rows = Vocabulary.load(llm_data, dictionary.symbols).rows
    for language, column in (("de", slice(0, None)), ("en", slice(1, None))):
        dataset = indexed_dataset.make_dataset(str(llm_data / f"test.en-de.{language}"), "mmap")
        lines = (llm_text / f"test.{language}").read_text(encoding="utf-8").split("\n")
        for i, line in enumerate(lines[:-1]):
            text = opened.decode([rows[symbol] for symbol in dataset[i][column][:-1]])
            if language == "en":
                line = Template(
                    "Translate from {src_lang} to {tgt_lang}.\n{src_lang}: {src}\n{tgt_lang}:\n",
                    "en", "de",
                ).fill(line)  # fmt: skip
            assert text == line
            assert dataset[i][-1] == dictionary.eos()


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
    # A translation is one line, whatever the model wrote before and after it.
    text_of = LanguageModelText(data / "bin", dictionary)
    line = "Straße  \u2028 zwei"
    for written in (line, f"{line}\n\nTranslate from", f"\n{line}"):
        assert text_of.decode(f"<s> {text_of.encode(written)} </s>") == line
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


def test_vocabulary_by_hand() -> None:
    pieces = ["<unk>", "<s>", "</s>", "a b", "\n", "c"]
    symbols, rows = build_vocabulary(pieces, (1, None, 2, 0))
    assert symbols == ["<s>", "<pad>", "</s>", "<unk>", "3:a\\u0020b", "4:\\u000a", "5:c"]
    assert rows == [1, -1, 2, 0, 3, 4, 5]
    # Padding that is the end of sentence: the end needs it more.
    assert build_vocabulary(pieces, (1, 2, 2, 0))[1] == rows
    assert build_vocabulary(pieces, (1, None, 2, 0), keep={5})[1] == [1, -1, 2, 0, 5]
    assert symbol_of(7, "12:x") == "7:12:x"


def test_templates() -> None:
    template = Template("{src_lang}: {src}\n{tgt_lang}: ", "de", "xx")
    assert template.fill("Ja {x}") == "German: Ja {x}\nxx: "
    for text in ("no field", "{src} {other}", "{src"):
        with pytest.raises(UserError, match="prompt template"):
            Template(text, "de", "en")
