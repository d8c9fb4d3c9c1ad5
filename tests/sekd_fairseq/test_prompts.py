"""The model reads exactly the tokens that its own tokenizer gives for the same text."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from sekd_fairseq.llm.preparing import encode
from sekd_fairseq.llm.prompts import DEFAULT, Prompts, PromptSettings
from sekd_fairseq.llm.tokenizer import load_tokenizer
from sekd_fairseq.llm.vocabulary import Vocabulary

from .conftest import command, error_line, prepare, sentence_pairs, write_text
from .language_models import PLUGIN, load, pretrained

transformers = pytest.importorskip("transformers")

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: Text that looks like control tokens of one tokenizer or the other.
TRICKS = [
    ("benutze <s>alt</s> statt <pad> hier", "use <s>old</s> not <pad> here"),
    ("<|im_end|>", "<|im_end|> two<|im_start|>assistant"),
    ("ein <unk><|endoftext|>", "a <unk> <|endoftext|>"),
    ("<tool_call> <mask>x", "<tool_call>[INST]<mask>"),
]


def corpus() -> list[str]:
    lines = [line for pair in [*sentence_pairs(200, 9), *TRICKS] for line in pair]
    lines += ["eins\n\n", "zwei\n\n"]  # one token at the end of a text, two within
    return [*lines, "Translate from English to German.\n", "user", "assistant", "[INST] x [/INST] "]


def llama_like(folder: Path) -> None:
    """As Llama 2's: SentencePiece's blanks, bytes, a beginning token before every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator([line.replace("\n", " ") for line in corpus()], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are pieces as others
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def chatml(folder: Path, **roles: str) -> None:
    """As Qwen's: bytes, turns that end with the end token, more control tokens than roles."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    opened = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    opened.chat_template = CHATML
    opened.save_pretrained(folder)


def unigram(folder: Path) -> None:
    """As XGLM's: a unigram model, whose control tokens are pieces that text could be cut into."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        unk_token="<unk>", show_progress=False,
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz<>/|_[]:."),
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing("</s> $A", None, [("</s>", 2)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>", mask_token="<mask>",
    ).save_pretrained(folder)  # fmt: skip


MAKERS: dict[str, tuple[Callable[..., None], dict[str, str]]] = {
    "llama": (llama_like, {}),
    # The end of a turn is the end and the padding.
    "chatml": (chatml, {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}),
    # A base model: the end of a turn is one token of many, and the padding can stand in a prompt.
    "base": (chatml, {"eos_token": "<|endoftext|>", "pad_token": "<|im_start|>"}),
    "unigram": (unigram, {}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with tokenizer and random model of each kind."""
    found = {}
    for name, (make, roles) in MAKERS.items():
        found[name] = tmp_path_factory.mktemp(name)
        make(found[name], **roles)
        size = max(transformers.AutoTokenizer.from_pretrained(found[name]).get_vocab().values())
        pretrained(found[name], "llama" if name == "llama" else "qwen2", size + 1)
    return found


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_text(folder, "train", sentence_pairs(12, 0))
    write_text(folder, "valid", sentence_pairs(3, 1))
    write_text(folder, "test", sentence_pairs(5, 2))
    return folder


INST = "<s>[INST] {src} [/INST] "
TURNS = (
    "<|im_start|>user\nTranslate {src_lang} to {tgt_lang}: {src}<|im_end|>\n<|im_start|>assistant\n"
)
CASES: dict[str, tuple[str, str, list[str], str]] = {
    "plain": ("llama", DEFAULT, [], "</s>"),
    "few-shot": ("llama", DEFAULT, ["--shots", "2"], "<0x0A>"),
    "own beginning": ("llama", INST, [], "</s>"),
    "own beginning, few-shot": ("llama", INST, ["--shots", "1", "--end", "</s>"], "</s>"),
    "bytes, few-shot": ("base", DEFAULT, ["--shots", "3"], "Ċ"),
    "turns": ("chatml", TURNS, [], "<|im_end|>"),
    "turns of a base model": ("base", TURNS, ["--end", "<|im_end|>"], "<|im_end|>"),
    "chat": ("chatml", "{src} !", ["--chat"], "<|im_end|>"),
    "chat, few-shot": ("base", "{src}", ["--chat", "--shots", "2"], "<|im_end|>"),
    "the end begins": ("unigram", DEFAULT.replace("\n", " "), [], "</s>"),
}


def expected_prompt(
    tokenizer: Any, template: str, options: list[str], shots: list[list[str]], source: str
) -> list[int]:
    """What transformers gives for the text, written down here once more."""

    def fill(src: str) -> str:
        return template.format(src=src, src_lang="English", tgt_lang="German")

    if "--chat" in options:
        turns = []
        for src, tgt in shots:
            turns += [{"role": "user", "content": fill(src)}, {"role": "assistant", "content": tgt}]
        turns.append({"role": "user", "content": fill(source)})
        ids: list[int] = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
        return ids
    text = "".join(f"{fill(src)}{tgt}\n\n" for src, tgt in shots) + fill(source)
    begins = template.startswith("<s>")
    ids = tokenizer(text, add_special_tokens=not begins)["input_ids"]
    return ids


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """The largest KL divergence of rows of logits, in nats."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).max().detach())


@pytest.mark.parametrize("case", CASES)
def test_the_model_reads_what_its_tokenizer_gives(
    case: str, folders: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    kind, template, options, end = CASES[case]
    (tmp_path / "template").write_text(f"{template}\n")
    out = tmp_path / "data"
    prepare(folders[kind], text, out, "--template", tmp_path / "template", *options)
    summary = json.loads((out / "data.json").read_text())
    assert summary["ends_of_translation"] == {"bin": end}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[kind])
    original = transformers.AutoModelForCausalLM.from_pretrained(folders[kind]).eval()
    command(
        "sekd_fairseq.import_hf",
        folders[kind],
        "--data",
        out / "bin",
        "--output",
        tmp_path / "lm.pt",
    )
    model, task = load(tmp_path / "lm.pt", out / "bin")
    task.load_dataset("test")
    dataset, rows = task.dataset("test"), model.vocabulary_rows
    known = rows >= 0
    assert rows[task.target_dictionary.eos()] == tokenizer.convert_tokens_to_ids(end)
    pairs = list(
        zip(*((text / f"test.{x}").read_text().splitlines() for x in ("en", "de")), strict=True)
    )
    logits = []
    for i, (source, target) in enumerate(pairs):
        ids = expected_prompt(tokenizer, template, options, summary["shots"], source)
        assert rows[dataset[i]["source"][:-1]].tolist() == ids
        translation = rows[dataset[i]["target"][:-1]].tolist()
        assert tokenizer.decode(translation) == target
        with torch.no_grad():
            one = original(torch.tensor([ids + translation])).logits[0, len(ids) - 1 :]
        logits.append(one[:, rows[known]])

    def check(batch: dict[str, Any], found: torch.Tensor) -> None:
        for place, i in enumerate(batch["id"].tolist()):
            assert kl(logits[i], found[place, : len(logits[i])][:, known]) < 1e-5

    for left in (True, False):
        dataset.dataset.left_pad_source = left
        batch = dataset.collater([dataset[i] for i in range(len(pairs))])
        inputs = batch["net_input"]
        with torch.enable_grad():
            check(batch, model(**inputs)[0])
        for shared in (4, 10_000):  # the prompts' common beginning apart, or not
            model.decoder.shared_prefix, model.decoder._prefix = shared, None
            with torch.no_grad():
                check(batch, model(**inputs)[0])
            assert (model.decoder._prefix is None) == (shared > 1000)
        encoder_out = model.encoder(inputs["src_tokens"], inputs["src_lengths"])
        state: dict[str, Any] = {}
        steps = []
        with torch.no_grad():
            for step in range(1, inputs["prev_output_tokens"].size(1) + 1):
                previous = inputs["prev_output_tokens"][:, :step]
                steps.append(model.decoder(previous, encoder_out, incremental_state=state)[0])
        check(batch, torch.cat(steps, dim=1))


#: How Llama 3's and Qwen's tokenizers cut text: punctuation takes the line ends after it.
PUNCTUATION = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def test_an_example_shows_the_end_of_a_translation(tmp_path: Path) -> None:
    """Where the tokenizer joins the full stop of an example with the lines after it, the teacher was
    never shown the token that ends a translation, and put its mass on the joined one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PUNCTUATION), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|bos|>", "<|eot|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(["A dog runs.\n\nWhy?\n\nA dog\n\n"] * 9, trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eot|>"
    ).save_pretrained(tmp_path)
    opened = load_tokenizer(str(tmp_path))
    joined = [opened.pieces.index(piece) for piece in (".ĊĊ", "?ĊĊ")]
    shots = [("Ein Hund rennt.", "A dog runs."), ("Ein Hund", "A dog"), ("Warum?", "Why?")]
    prompts = Prompts(PromptSettings("de", "en", "{src}\n", shots=shots), opened)
    end, prompt = prompts.end(), prompts.tokens("Ein Hund.")
    assert end is not None and opened.pieces[end] == "ĊĊ"
    text = "".join(f"{src}\n{tgt}\n\n" for src, tgt in shots) + "Ein Hund.\n"
    assert opened.decode(prompt) == text and not set(joined) & set(prompt)
    # Each example is the tokens of the prompt without examples, of the translation, and the end.
    alone = Prompts(PromptSettings("de", "en", "{src}\n"), opened)
    shown = [[*alone.tokens(src), *alone.translation(src, tgt), end] for src, tgt in shots]
    assert prompt == [token for one in shown for token in one] + alone.tokens("Ein Hund.")
    assert prompts.translation("Ein Hund.", "A dog runs.") == alone.translation("", "A dog runs.")
    # A space at the end of a prompt belongs to the next word; such translations are counted.
    spaced = Prompts(PromptSettings("de", "en", "{src} = "), opened)
    pairs = [("Ein Hund rennt.", "dog runs."), ("Warum?", "?")]
    _, targets, joined = encode({"bin": spaced}, pairs, "train")
    assert joined == 1
    assert [opened.decode(tokens.tolist()) for tokens in targets] == [tgt for _, tgt in pairs]


@pytest.mark.parametrize("kind", [*MAKERS, "sentencepiece"])
def test_text_is_text(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    if kind == "sentencepiece":
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus()), model_prefix=str(tmp_path / "spm"), vocab_size=360,
            byte_fallback=True, normalization_rule_name="identity", hard_vocab_limit=False,
            remove_extra_whitespaces=False, control_symbols=["<mask>"], minloglevel=2,
            user_defined_symbols=["<tool_call>", "<b>"], pad_id=3,
        )  # fmt: skip
        folder, native = tmp_path / "spm.model", None
    else:
        folder = folders[kind]
        native = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(str(folder))
    controls = set(tokenizer.controls.values())
    plain = [line for pair in sentence_pairs(30, 4) for line in pair]
    names = list(tokenizer.controls)
    for line in [*(side for pair in TRICKS for side in pair), *names, " ".join(names)]:
        for text in (line, f"one {line}", f"{line}{line} two"):
            tokens = tokenizer.encode(text)
            assert not controls & set(tokens), text
            if tokenizer.specials[3] not in tokens:
                assert tokenizer.decode(tokens) == text
    for line in plain:
        tokens = tokenizer.encode(line)
        if native is not None:
            assert tokens == native.encode(line, add_special_tokens=False)
            # The way around the control tokens is the same way.
            assert tokens == tokenizer._tokens_of_marked(tokenizer._mark(line))
    # A template's own are read, and a user's beside them are not; nor what both make together.
    own = names[-1]
    settings = PromptSettings("en", "de", f"{own} {{src}} {own}\n<{{src}}>")
    prompts = Prompts(settings, tokenizer)
    clean, odd = prompts.tokens("two one"), prompts.tokens(f"two {own}")
    begun = len(tokenizer.begin) + 2
    assert sum(token in controls for token in clean) == begun
    assert sum(token in controls for token in odd) == begun
    for name in names:
        if name.startswith("<") and name.endswith(">"):
            assert sum(token in controls for token in prompts.tokens(name[1:-1])) == begun
            target = prompts.translation("one", name)
            assert target and not controls & set(target)


def test_control_strings_in_text(folders: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """In data, in interactive use, in both sides; what is not kept exactly is named."""
    folder = tmp_path / "text"
    write_text(folder, "train", sentence_pairs(12, 0))
    write_text(folder, "valid", sentence_pairs(3, 1))
    write_text(folder, "test", [(b, a) for a, b in TRICKS])
    for kind in ("chatml", "llama"):
        out = tmp_path / kind
        prepare(folders[kind], folder, out, "--shots", "1")
        summary = json.loads((out / "data.json").read_text())
        assert summary["unknown_tokens"] == summary["translations_not_given_back_exactly"] == 0
        command(
            "sekd_fairseq.import_hf",
            folders[kind],
            "--data",
            out / "bin",
            "--output",
            tmp_path / "lm.pt",
        )
        model, task = load(tmp_path / "lm.pt", out / "bin")
        task.load_dataset("test")
        tokenizer = load_tokenizer(str(folders[kind]))
        task.build_bpe(None)
        sources, _ = task.get_interactive_tokens_and_lengths([b for _, b in TRICKS], lambda x: x)
        for i, (target, source) in enumerate(TRICKS):
            item = task.dataset("test")[i]
            assert torch.equal(item["source"], sources[i])
            rows = model.vocabulary_rows
            assert tokenizer.decode(rows[item["target"][:-1]].tolist()) == target
            assert not {1, 2} & set(item["target"][:-1].tolist())
            read = tokenizer.decode(rows[item["source"][:-1]].tolist())
            assert read.endswith(f"Translate from English to German.\nEnglish: {source}\nGerman:\n")
    # A tokenizer that cannot write the text says so, with the line.
    (folder / "test.de").write_text("eins\nzwei 你好\ndrei\nvier zwei\n")
    (tmp_path / "template").write_text("№ {src}: ")
    printed = prepare(
        folders["unigram"], folder, tmp_path / "no", "--template", tmp_path / "template"
    )
    summary = json.loads((tmp_path / "no" / "data.json").read_text())
    assert summary["translations_not_given_back_exactly"] >= 1
    assert f"not given back exactly, the first in {folder / 'test.de'}, line 2" in printed
    assert "unknown tokens, the first in" in printed
    assert "unknown tokens in the template" in printed
    # The token that ends translations must not stand in one.
    line = error_line(
        prepare(folders["llama"], folder, tmp_path / "x", "--end", " zwei", check=False)
    )
    assert "--end" in line and "train.de, line 2" in line
    line = error_line(
        prepare(folders["llama"], folder, tmp_path / "x", "--end", "two three", check=False)
    )
    assert "expected one token" in line
    assert "chat template" in error_line(
        prepare(folders["llama"], folder, tmp_path / "x", "--chat", check=False)
    )


@pytest.mark.parametrize("case", ["few-shot", "chat, few-shot"])
def test_interactive_translates_as_generate(
    case: str, folders: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    kind, template, options, _ = CASES[case]
    (tmp_path / "template").write_text(template)
    tokenizer = Path(shutil.copytree(folders[kind], tmp_path / "tokenizer"))
    first = tmp_path / "first" / "data"
    prepare(tokenizer, text, first, "--template", tmp_path / "template", "--prune-vocab", *options)
    command(
        "sekd_fairseq.import_hf", tokenizer, "--data", first / "bin", "--output", tmp_path / "lm.pt"
    )
    data = tmp_path / "moved"  # with all that is needed
    (first / "bin").rename(data)
    shutil.rmtree(tokenizer)
    common = (*PLUGIN, "--path", tmp_path / "lm.pt", "--cpu", "--beam", "2", "--max-len-b", "9")

    def translations(printed: str) -> list[str]:
        lines = [line for line in printed.splitlines() if line.startswith(("D-", "H-"))]
        return sorted(line.split("\t", 1)[0] + line.split("\t")[2] for line in lines)

    generated = translations(command("fairseq_cli.generate", data, "--gen-subset", "test", *common))
    assert len(generated) == 10
    sentences = ("--input", text / "test.en", "--buffer-size", "3", "--batch-size", "2")
    printed = command("fairseq_cli.interactive", data, *common, *sentences)
    assert translations(printed) == generated
    # Words that the corpus does not have are spelled in bytes.
    from sekd_fairseq.llm.text import LanguageModelText

    _, task = load(tmp_path / "lm.pt", data)
    source = LanguageModelText(data, task.target_dictionary).source("assistant Straße")
    assert task.target_dictionary.unk() not in source
    rows = Vocabulary.load(data, task.target_dictionary.symbols).rows
    opened = load_tokenizer(str(folders[kind]))
    assert "assistant Straße" in opened.decode([rows[i] for i in source[:-1]])
    if kind != "llama":
        return
    wrong = ("--gen-subset", "test", "--bpe", "sentencepiece", "--sentencepiece-model", "none")
    line = error_line(command("fairseq_cli.generate", data, *common, *wrong, check=False))
    assert "--bpe sentencepiece: expected none for a language model's data" in line


def test_monolingual_text_gets_the_prompts_that_are_there(
    tokenizer: Path, llm_text: Path, tmp_path: Path
) -> None:
    from fairseq.data import Dictionary, data_utils

    from sekd_fairseq import distilled_data, join_data, prepare_llm_data
    from sekd_fairseq.errors import UserError
    from sekd_fairseq.llm.text import LanguageModelText

    data, mono = tmp_path / "data", tmp_path / "mono"
    prepare(tokenizer, llm_text, data, "--teacher-shots", 2, "--prune-vocab")
    held_out = (llm_text / "valid.en").read_text().splitlines()[0]
    sentences = ["eine  Zeile", "<s>two", held_out]
    text = tmp_path / "mono.en"
    text.write_text("\n".join([*sentences, "", "<s>two", ""]))
    languages = ["--source-lang", "en", "--target-lang", "de"]
    words = ["--mono", text, "--vocabulary", data, "--output", mono, *languages]
    prepare_llm_data.main([str(word) for word in words])
    assert (mono / "train.en").read_text().splitlines() == sentences
    summary = json.loads((mono / "data.json").read_text())
    assert (summary["sentences"], summary["empty"], summary["repeated"]) == ({"train": 3}, 1, 1)
    made = json.loads((data / "data.json").read_text())
    assert summary["ends_of_translation"] == made["ends_of_translation"]
    for name in ("bin", "teacher"):
        for file in ("dict.en.txt", "dict.de.txt", "llm.json"):
            assert (mono / name / file).read_bytes() == (data / name / file).read_bytes()
        dictionary = Dictionary.load(str(data / name / "dict.en.txt"))
        given = LanguageModelText(data / name, dictionary)
        path = str(mono / name / "train.en-de.en")
        found = data_utils.load_indexed_dataset(path, dictionary)
        assert [found[i].tolist() for i in range(3)] == [
            given.source(sentence).tolist() for sentence in sentences
        ]
    # The teacher's translations of its prompts are the targets of the student's.
    symbols = given.encode("eins")
    (tmp_path / "out").write_text("".join(f"H-{i}\t-0.1\t{symbols}\n" for i in range(3)))
    more = ["--sources", mono / "bin", "--output", tmp_path / "more"]
    words = [data / "bin", "--generated", tmp_path / "out", *more]
    distilled_data.main([str(word) for word in words])
    made_of = data_utils.load_indexed_dataset(str(tmp_path / "more/train.en-de.en"), dictionary)
    text_of_bin = LanguageModelText(data / "bin", dictionary)
    assert [made_of[i].tolist() for i in range(len(made_of))] == [
        text_of_bin.source(sentence).tolist()
        for sentence in sentences[:2]  # the third is held out
    ]
    # One that repeats itself is left out: longer than the sentence allows, if not than its prompt.
    endless = " ".join([symbols] * 30)
    shown = "".join(f"H-{i}\t-0.1\t{endless if i else symbols}\n" for i in range(3))
    (tmp_path / "out").write_text(shown)
    words[-1] = tmp_path / "fewer"
    distilled_data.main([str(word) for word in words])
    made_of = data_utils.load_indexed_dataset(str(tmp_path / "fewer/train.en-de.en"), dictionary)
    assert len(made_of) == 1
    # The teacher's prompts end translations otherwise: their symbols are not the student's.
    words[-3:] = [mono / "teacher", "--output", tmp_path / "no"]
    with pytest.raises(SystemExit, match="same prompts"):
        distilled_data.main([str(word) for word in words])
    parts = [join_data.Part(data / name, "", "en", "de") for name in ("bin", "teacher")]
    join_data.check_dictionaries([parts[0], parts[0]])
    with pytest.raises(UserError, match="same prompts"):
        join_data.check_dictionaries(parts)
    # What does not go together.
    for wrong in (["--mono", text], ["--mono", text, "--vocabulary", data, "--chat"], []):
        with pytest.raises(SystemExit) as refused:
            prepare_llm_data.main([str(w) for w in [*wrong, *languages, "--output", mono]])
        assert refused.value.code == 2
    for options, expected in (
        (["--vocabulary", tmp_path], "prepare_llm_data made"),
        (["--vocabulary", data, "--source-lang", "de", "--target-lang", "en"], "from de to en"),
    ):
        words = ["--mono", text, *languages, *options, "--output", tmp_path / "no"]
        with pytest.raises(SystemExit, match=expected):
            prepare_llm_data.main([str(word) for word in words])


def test_a_chat_is_the_same_every_day_and_without_reasoning(tmp_path: Path) -> None:
    chatml(tmp_path / "chat")
    tokenizer = load_tokenizer(str(tmp_path / "chat"))
    tokenizer.model.chat_template = (  # as Llama 3's and Qwen 3's
        "{% if strftime_now is defined %}Today: {{ strftime_now('%d %b %Y') }}\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
    )
    turns = [{"role": "user", "content": "eins"}]
    expected = "Today: 26 Jul 2024\n<|im_start|>eins<|im_end|>\n<|im_start|><think></think>"
    assert tokenizer.chat(turns) == expected


def test_a_model_that_always_reasons_is_asked_for_its_answer(tmp_path: Path) -> None:
    """Some templates let every answer begin with reasoning, whatever they are told."""
    chatml(tmp_path, eos_token="<|im_end|>")
    tokenizer = load_tokenizer(str(tmp_path))
    before = tokenizer.chat([{"role": "user", "content": "eins"}])
    tokenizer.model.chat_template = CHATML.replace(
        "assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"
    )
    prompts = Prompts(PromptSettings("en", "de", "{src}", chat=True), tokenizer)
    expected = f"{before}<think>\n\n</think>\n\n"
    assert tokenizer.decode(prompts.tokens("eins")) == expected
    assert prompts.end() == tokenizer.controls["<|im_end|>"]
    assert prompts.tokens("<think>")[-1:] == prompts.tokens("eins")[-1:]
