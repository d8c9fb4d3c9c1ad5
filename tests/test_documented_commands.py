"""Every command in the README and the docs: its options exist, and on small text it does what is written."""

import contextlib
import functools
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fairseq import options

import sekd_fairseq.tasks  # noqa: F401 (registers what --user-dir names)
from sekd_fairseq.llm.tokenizer import load_tokenizer
from sekd_fairseq.teacher_cache import TeacherCache
from tests.sekd_fairseq.conftest import ROOT, WORDS, sentence_pairs
from tests.sekd_fairseq.standin import Served, StandIn

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FAIRSEQ = {
    "fairseq-train": options.get_training_parser,
    "fairseq-generate": options.get_generation_parser,
    "fairseq-interactive": options.get_interactive_generation_parser,
    "fairseq-validate": options.get_validation_parser,
    "fairseq-preprocess": options.get_preprocessing_parser,
}


def blocks(page: Path) -> list[str]:
    """The shell blocks of a page."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [text for language, text in found if language in ("", "bash")]


def commands(text: str) -> list[list[str]]:
    """The words of each command of a block that is one of ours, without what the shell does around it."""
    lines = text.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        for part in re.split(r"\s(?:\||&&)\s|>", line.strip()):
            with contextlib.suppress(ValueError):  # of no quotation is an end
                words = shlex.split(part, comments=True)
                if words[:2] == ["python", "-m"] or (words[:1] and words[0] in FAIRSEQ):
                    found.append(words)
    return found


def inline(page: Path) -> list[list[str]]:
    """Commands within a sentence."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    spans = re.findall(r"`((?:python\s+-m|fairseq-)[^`]*)`", text)
    return [words for span in spans for words in commands(" ".join(span.split()))]


SHOWN = {
    f"{page.name}: {shlex.join(words)}": words
    for page in PAGES
    for words in [*(w for block in blocks(page) for w in commands(block)), *inline(page)]
}


@functools.cache
def help_of(module: str) -> str:
    """What ``python -m MODULE --help`` prints."""
    out, before = io.StringIO(), sys.argv
    sys.argv = [module, "--help"]
    try:
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.argv = before
    assert end.value.code in (0, None)
    return out.getvalue()


def known(words: list[str]) -> set[str]:
    """The options of a command; of fairseq's those of what it is given the names of, too."""
    if words[0] == "python":
        return set(re.findall(r"(?<![\w-])--[\w-]+", help_of(words[2])))
    plugin = runpy.run_module("sekd_fairseq.options")["GROUPS"]
    names = {
        f"--{name.replace('_', '-')}"
        for config in plugin.values()
        for name in config.__dataclass_fields__
    }
    parser = FAIRSEQ[words[0]]()
    every = {name for action in parser._actions for name in action.option_strings}
    every |= {
        "--lr",
        "--warmup-updates",
        "--label-smoothing",
        "--remove-bpe",
        "--share-all-embeddings",
    }
    return every | names


@pytest.mark.parametrize("shown", SHOWN)
def test_its_options_exist(shown: str) -> None:
    words = SHOWN[shown]
    if words[0] == "python" and not words[2].startswith(("sekd_fairseq", "analysis")):
        pytest.skip("another project's")
    end = words.index("--") if "--" in words else len(words)
    for part in (
        words[:end],
        ["fairseq-train", *words[end + 1 :]],
    ):  # after --, as rounds takes them
        given = [word.split("=")[0] for word in part[1:] if re.match(r"--[a-z]", word)]
        assert set(given) <= known(part), (given, shown)


def test_every_page_is_read() -> None:
    assert len(SHOWN) > 15 and any(shown.startswith("README.md: fairseq-train") for shown in SHOWN)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert link.startswith("http") or (page.parent / link).exists(), link


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


#: Sizes that replace those of the text, so that a training takes seconds. The rest stays as written.
SMALL = {
    "--max-update": "60", "--warmup-updates": "10", "--max-tokens": "600", "--lr": "0.01", "--beam": "2",
    "--nbest": "2",
}  # fmt: skip
#: And the size of the Transformers.
TINY = [
    f"--{side}-{name}={size}"
    for side in ("encoder", "decoder")
    for name, size in (
        ("layers", 1),
        ("embed-dim", 32),
        ("ffn-embed-dim", 32),
        ("attention-heads", 2),
    )
]
SHIM = f"""#!{sys.executable}
import os, sys
words = sys.argv[1:]
small = {SMALL!r}
for place, word in enumerate(words[:-1]):
    words[place + 1] = small.get(word, words[place + 1])
name = os.path.basename(sys.argv[0]).removeprefix("fairseq-")
if name == "train" and "hf_causal_lm" not in words:
    words += {TINY!r}
os.execv({sys.executable!r}, [{sys.executable!r}, "-m", "fairseq_cli." + name, *words, "--cpu"])
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a reader has it, with raw text; ``fairseq-...`` on the path make small models."""
    (tmp_path / "sekd_fairseq").symlink_to(ROOT / "sekd_fairseq")
    (tmp_path / "bin").mkdir()
    for name in ("train", "generate", "interactive", "validate"):
        path = tmp_path / "bin" / f"fairseq-{name}"
        path.write_text(SHIM)
        path.chmod(0o755)
    pairs = list(dict.fromkeys(sentence_pairs(900, seed=1)))
    sizes = {"train": pairs[200:], "valid": pairs[:40], "test": pairs[40:80]}
    (tmp_path / "text").mkdir()
    for number, language in enumerate(("en", "de")):
        (tmp_path / f"text.{language}").write_text("".join(f"{pair[number]}\n" for pair in pairs))
        for split, part in sizes.items():
            path = tmp_path / "text" / f"{split}.{language}"
            path.write_text("".join(f"{pair[number]}\n" for pair in part))
    path = os.pathsep.join(
        [str(tmp_path / "bin"), os.path.dirname(sys.executable), os.environ["PATH"]]
    )
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    return tmp_path


def execute(folder: Path, block: str) -> str:
    """Run a block as it is written; the first failure ends it."""
    lines = [line for line in block.splitlines() if not line.startswith("pip install")]
    script = "set -euo pipefail\n" + "\n".join(lines)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def block_with(page: str, words: str) -> str:
    """The block of a page that holds some words."""
    (found,) = [block for block in blocks(ROOT / page) if words in block]
    return found


@pytest.mark.slow
def test_own_data_from_raw_text_to_the_report(folder: Path) -> None:
    execute(folder, block_with("README.md", "--save-dir runs/mine/teacher"))
    assert "SE-KD" in (folder / "runs/mine/report/report.md").read_text()
    block = block_with("docs/method.md", "tune_lenpen").replace("DATA", "data/bin")
    execute(folder, block)
    assert (folder / "runs/mine/se_kd/length_penalty.json").exists()
    block = block_with("docs/more-text.md", "sekd_fairseq.rounds")
    for option, value in {"updates": 20, "beam": 2, "max-tokens": 600}.items():
        block = re.sub(rf"--{option} \S+", f"--{option} {value}", block)
    execute(folder, block.replace(" -- ", " --cpu -- --cpu ").rstrip() + " " + " ".join(TINY))
    assert (folder / "runs/mine/rounds/checkpoints/checkpoint_best.pt").exists()


@pytest.mark.slow
def test_pages_about_a_teacher_and_its_cache(folder: Path) -> None:
    # Data, teacher and cache are those of the README.
    execute(folder, block_with("README.md", "--save-dir runs/mine/teacher").partition("# 2.")[0])
    for page, words in (("tail", "--missing-mass tail"), ("more-text", "--choose reference")):
        block = block_with(f"docs/{page}.md", words).replace("DATA", "data/bin")
        block = block.replace("teacher.pt", "runs/mine/teacher/checkpoints/checkpoint_best.pt")
        execute(folder, block.replace("--nbest 8 --choose", "--nbest 2 --choose"))
    assert (folder / "runs/mine/tail/checkpoints/checkpoint_best.pt").exists()
    assert (folder / "DISTILLED" / "train.en-de.de.bin").exists()
    align, distil = blocks(ROOT / "docs" / "other-tokenizers.md")
    assert "--vocab-size 2000" in align  # more than this text has
    execute(folder, align.replace("--vocab-size 2000", "--vocab-size 30"))
    symbols = [
        {line.split()[0] for line in (folder / data / "bin/dict.de.txt").read_text().splitlines()}
        for data in ("data", "small")
    ]
    assert symbols[0] != symbols[1]
    execute(folder, distil)
    for method in ("word_kd", "seq_kd"):
        assert (folder / f"runs/small/{method}/checkpoints/checkpoint_best.pt").exists()


@pytest.mark.slow
def test_a_teacher_behind_a_server(folder: Path) -> None:
    pytest.importorskip("httpx")
    make_tokenizer(folder / "MODEL")
    for path in (folder / "text").iterdir():
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:20]))
    own = load_tokenizer(str(folder / "MODEL"))
    with Knowing(Served(own), lambda tokens: None).running() as url:
        address = url.removeprefix("http://").removesuffix("/v1")
        block = block_with("docs/served-teachers.md", "--engine http")
        assert "http://HOST:8000" in block
        execute(folder, block.replace("HOST:8000", address))
    cache = TeacherCache.open(folder / "data/llm/cache/train")
    assert len(cache) == 20 and cache.manifest.teacher["arch"] == "server, vllm"
    np.testing.assert_allclose(
        np.concatenate([row.gold_logprob for row in cache]), np.log(0.5), atol=1e-3
    )


class Knowing(StandIn):
    """A server whose model gives every text's next token a probability of one half."""

    def rows(self, tokens: Sequence[int]) -> Any:
        vocab = len(self.tokenizer.pieces)
        found = np.full((len(tokens) - 1, vocab), np.log(0.5 / (vocab - 1)))
        found[np.arange(len(found)), list(tokens[1:])] = np.log(0.5)
        return found


def make_tokenizer(model: Path) -> int:
    """Write a tokenizer as a model's folder has one; returns how many pieces it has."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    pieces = tokenizers.ByteLevelBPETokenizer()
    pieces.train_from_iterator([*WORDS, *WORDS.values()], 330, special_tokens=[*special.values()])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces._tokenizer, **special
    ).save_pretrained(model)
    return int(pieces.get_vocab_size())


@pytest.mark.slow
def test_a_language_model_from_raw_text_to_its_export(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    vocab_size = make_tokenizer(folder / "MODEL")
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "MODEL")
    first = block_with("README.md", "--save-dir runs/llm/teacher")
    execute(folder, block_with("docs/language-models.md", "--save-dir runs/llm/student"))
    assert (folder / "exported" / "model.safetensors").exists()
    # The README's block is its beginning.
    own = commands(block_with("docs/language-models.md", "--save-dir runs/llm/student"))
    assert commands(first) == own[:2]
