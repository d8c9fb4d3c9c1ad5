"""Every command block of the README and the docs does on small data what is written.

What a reader would replace (``DATA``, ``MODEL``, ``cache``) is a link of that name where that is possible.
"""

import gzip
import importlib.util
import json
import random
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

import analysis.compare
import analysis.gap
import analysis.plan  # noqa: F401
import sekd_fairseq.evaluate  # noqa: F401
from sekd_fairseq.llm.tokenizer import load_tokenizer
from sekd_fairseq.teacher_cache import TeacherCache

from .conftest import ROOT, WORDS, command, sentence_pairs, spread_over_two
from .pages import PAGES, TINY, block_with, blocks, commands, execute, run_block
from .standin import Served, StandIn

BEST = "checkpoints/checkpoint_best.pt"


#: What ``inspect_cache --student`` looks at.
CHECKS = 7


def link(folder: Path, **places: Path) -> None:
    """Links in a folder, by the names that a block has for what they lead to."""
    for name, place in places.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(place)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as a reader of the README has it, with raw text."""
    pairs = list(dict.fromkeys(sentence_pairs(900, seed=1)))
    sizes = {"train": pairs[200:], "valid": pairs[:40], "test": pairs[40:80]}
    (tmp_path / "text").mkdir()
    for number, language in enumerate(("en", "de")):
        (tmp_path / f"text.{language}").write_text("".join(f"{pair[number]}\n" for pair in pairs))
        for split, part in sizes.items():
            path = tmp_path / "text" / f"{split}.{language}"
            path.write_text("".join(f"{pair[number]}\n" for pair in part))
    return tmp_path


#: Blocks that no test here runs, by what they hold.
ELSEWHERE = {
    "scripts/demo.sh": "the gate runs both",
    "pip install -c constraints.txt .  ": "tests/test_install.py",
    "CACHE/train/manifest.json": "files, not commands",
    "LLAMA_SERVER_PYTHON": "a server that has to be there: tests/sekd_fairseq/test_http_engine.py",
    "/path/to/multi30k": "as the study per size, with the same configuration",
}


def test_every_block_is_run() -> None:
    call = r'(?:run_block|block_with)\(\s*(?:\w+,\s*)?"([^"]+)",\s*"([^"]+)"'
    named = re.findall(call, Path(__file__).read_text(encoding="utf-8"))
    run = {block_with(page, words) for page, words in named}
    for page in PAGES:
        for block in blocks(page):
            assert block in run or any(words in block for words in ELSEWHERE), (page.name, block)


@pytest.mark.slow
def test_own_data_from_raw_text_to_the_report(folder: Path) -> None:
    run_block(folder, "README.md", "--save-dir runs/mine/teacher")
    assert "SE-KD" in (folder / "runs/mine/report/report.md").read_text()
    run_block(folder, "docs/method.md", "tune_lenpen", {"DATA": "data/bin"})
    assert (folder / "runs/mine/se_kd/length_penalty.json").exists()
    sizes = {"--updates 600": "--updates 20 --beam 2 --max-tokens 600 --cpu"}
    model = {"--arch transformer_tiny": f"--arch transformer_tiny --cpu {' '.join(TINY)}"}
    run_block(folder, "docs/more-text.md", "sekd_fairseq.rounds", sizes | model)
    assert (folder / "runs/mine/rounds" / BEST).exists()
    pytest.importorskip("ctranslate2")
    run_block(folder, "docs/deploying.md", "ct2-fairseq-converter")
    (snippet,) = blocks(ROOT / "docs/deploying.md", ["python"])
    printed = execute(folder, f"python - <<'END'\n{snippet}END")
    assert printed.strip()


@pytest.mark.slow
def test_pages_about_a_teacher_and_its_cache(folder: Path) -> None:
    # Data, teacher and cache are those of the README.
    execute(folder, block_with("README.md", "--save-dir runs/mine/teacher").partition("# 2.")[0])
    names = {"DATA": "data/bin", "teacher.pt": f"runs/mine/teacher/{BEST}"}
    run_block(folder, "docs/tail.md", "--missing-mass tail", names)
    assert (folder / "runs/mine/tail" / BEST).exists()
    few = {"--nbest 8 --choose": "--nbest 2 --choose"}
    run_block(folder, "docs/more-text.md", "--choose reference", few)
    assert (folder / "distilled" / "train.en-de.de.bin").exists()
    batches = {"--gen-subset train": "--gen-subset train --max-tokens 200"}  # so that each has some
    run_block(folder, "docs/more-text.md", "--distributed-rank", batches)
    shares = [(folder / f"part.{job}.out").read_text().count("\nH-") for job in (0, 1)]
    assert min(shares) > 0 and (folder / "distilled-in-shares" / "train.en-de.de.bin").exists()
    few = {"--nbest 8": "--nbest 2"}
    run_block(folder, "docs/more-text.md", "--choose round-trip", few)
    assert (folder / "by-round-trip" / "train.en-de.de.bin").exists()
    text = (folder / "text.en").read_text().splitlines(keepends=True)
    held_out = (folder / "data/valid.en").read_text().splitlines(keepends=True)[:3]
    (folder / "mono.en").write_text("".join([*text[:40][::-1], "\n", *held_out]))
    printed = run_block(folder, "docs/more-text.md", "--mono mono.en")
    assert "that are in a held-out set and " in printed
    mixed = TeacherCache.open(folder / "mixed-cache/train").manifest.sentences
    assert 40 < mixed <= 86 and mixed % 2 == 0
    fewer = {"--vocab-size 2000": "--vocab-size 30"}  # 2000 is more than this text has
    run_block(folder, "docs/other-tokenizers.md", "--vocab-size 2000", fewer)
    symbols = [
        {line.split()[0] for line in (folder / data / "bin/dict.de.txt").read_text().splitlines()}
        for data in ("data", "small")
    ]
    assert symbols[0] != symbols[1]
    run_block(folder, "docs/other-tokenizers.md", "--sentencepiece-model")
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
        run_block(folder, "docs/served-teachers.md", "--engine http", {"HOST:8000": address})
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
    run_block(folder, "docs/language-models.md", "--save-dir runs/llm/student")
    assert (folder / "exported" / "model.safetensors").exists()
    run_block(folder, "docs/language-models.md", "analysis.transfer")
    assert "BLEU" in (folder / "runs/llm/report/report.md").read_text()
    if importlib.util.find_spec("ctranslate2"):
        run_block(folder, "docs/deploying.md", "ct2-transformers-converter")
        assert (folder / "deployed" / "model.bin").exists()
    printed = run_block(folder, "docs/before-training.md", "--student MODEL")
    assert printed.count("\n  ok  ") == 3 * CHECKS  # train, valid and test
    # A teacher as it is: the model that was trained, with examples in its prompts.
    command(
        "sekd_fairseq.export_hf", folder / "runs/llm/teacher/checkpoint_best.pt", "--data", folder / "data/llm/bin",
        "--output", folder / "TEACHER",
    )  # fmt: skip
    shutil.rmtree(folder / "data/llm")
    shutil.rmtree(folder / "runs/llm")
    as_it_is = {"MODEL": "TEACHER"}
    run_block(folder, "docs/language-models.md", "sekd_fairseq.import_hf", as_it_is)
    cache = TeacherCache.open(folder / "data/llm/cache/train")
    assert len(cache) == cache.manifest.sentences > 300
    (folder / "mono.de").write_text(
        "".join((folder / "text/train.de").read_text().splitlines(True)[:9])
    )
    few = {"--beam 4": "--beam 2 --max-len-b 9"}
    printed = run_block(folder, "docs/more-text.md", "--mono mono.de", few)
    assert "0 gold pairs" in printed and (folder / "data/llm/mixed/train.de-en.en.bin").exists()
    # The README's block is its beginning.
    own = commands(block_with("docs/language-models.md", "--save-dir runs/llm/student"))
    assert commands(first) == own[:2]


@pytest.mark.slow
def test_a_study_per_size(folder: Path) -> None:
    # Of the configuration, one direction with one seed and two methods, all small.
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    (folder / "sekd_fairseq").symlink_to(ROOT / "sekd_fairseq")
    path = folder / "scripts/configs/multi30k.yaml"
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    config |= {"directions": ["en-de"], "seeds": [1]}
    config["corpus"] |= {"valid": "valid", "test": "test"}
    config["data"] = {"vocab-size": 30}
    config["cache"]["allow-implausible"] = True
    config["generation"] = {"beam": 1, "max-len-b": 20}
    config["methods"] = {name: config["methods"][name] for name in ("finetune", "word_kd")}
    for kind in ("teacher", "student"):
        config[kind] |= {"max-update": 8, "warmup-updates": 4}
    path.write_text(yaml.safe_dump(config))
    small = {
        "2000 8000": "50 200",
        "/path/to/multi30k": "text",
        "multi30k-2000": "multi30k-50",
        "multi30k-8000": "multi30k-200",
    }
    printed = run_block(folder, "docs/more-text.md", "analysis.sizes", small)
    assert "word-level KD" in printed
    table = pd.read_csv(folder / "runs/sizes/sizes.csv")
    every = len((folder / "data/multi30k/en-de/train.en").read_text().splitlines())
    assert set(table[table["method"] != "teacher"]["sentences"]) == {50, 200, every}


def test_a_check_before_training(tmp_path: Path, data: Path, cache: Path, teacher: Path) -> None:
    best = f"runs/mine/finetune/{BEST}"
    link(tmp_path, **{"data/bin": data, "cache": cache, best: teacher})
    printed = run_block(tmp_path, "docs/before-training.md", "--data data/bin")
    assert printed.count("\n  ok  ") == 3 * CHECKS  # a split


@pytest.mark.slow
def test_several_teachers(tmp_path: Path) -> None:
    for number, (split, count) in enumerate({"train": 300, "valid": 20, "test": 15}.items()):
        for language in ("cs", "de"):
            pairs = sentence_pairs(count, 2 * number + (language == "cs"))
            place = tmp_path / "text" / f"{language}-en"
            place.mkdir(parents=True, exist_ok=True)
            for side, name in enumerate(("en", language)):
                lines = [pair[side][::-1] if name == "cs" else pair[side] for pair in pairs]
                (place / f"{split}.{name}").write_text("".join(f"{line}\n" for line in lines))
    run_block(tmp_path, "docs/several-teachers.md", "--output vocabulary")
    printed = run_block(tmp_path, "docs/several-teachers.md", "sekd_fairseq.join_data")
    assert "train1: cs-en, " in printed
    for subset, pair in (("test", "de-en"), ("test1", "cs-en")):
        record = json.loads((tmp_path / f"runs/joined/{subset}/run.json").read_text())
        cache = TeacherCache.open(tmp_path / pair / "cache/test")
        assert record["teacher_cache"]["fingerprint"] == cache.manifest.fingerprint


def test_a_cache_is_read_in_python(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link(tmp_path, CACHE=cache)
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(ROOT / "docs/teacher-cache.md", ("python",))
    names: dict[str, Any] = {}
    exec(block, names)
    for column in re.findall(r"row\.(\w+)", block):
        assert len(getattr(names["row"], column)) >= len(names["row"].support_size)
    assert names["cache"].manifest.quality.keys() >= {"perplexity", "accuracy", "outside_mass"}


def spoilt(lines: Sequence[str], share: float, seed: int) -> list[str]:
    """Translations of which a share of the words are others."""
    generator = random.Random(seed)
    words = list(WORDS.values())
    return [
        " ".join(
            generator.choice(words) if generator.random() < share else word for word in line.split()
        )
        for line in lines
    ]


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """One sentence per line, gzipped where the name says so."""
    text = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def test_any_systems_are_compared(tmp_path: Path) -> None:
    sources, references = map(list, zip(*sentence_pairs(40, seed=5), strict=True))
    files = re.findall(r"\S+\.gz", block_with("docs/comparing-systems.md", "analysis.compare"))
    assert len(files) == 8
    for number, name in enumerate(files):
        lines = sources if ".src." in name else spoilt(references, 0.1 * max(0, number - 2), number)
        write_lines(tmp_path / name, lines)
    more = {"--ref": "--no-ter --resamples 100 --trials 100 --ref"}
    run_block(tmp_path, "docs/comparing-systems.md", "analysis.compare", more)
    report = (tmp_path / "comparison/report.html").read_text()
    assert "ALMA-13B-LoRA" in report and "gpt3.5-text-davinci-003" in report
    assert list((tmp_path / "comparison/tables").glob("*.csv"))


def test_a_study_is_planned_and_its_gap_measured(tmp_path: Path) -> None:
    sources, references = map(list, zip(*sentence_pairs(40, seed=5), strict=True))
    write_lines(tmp_path / "test.en", sources)
    write_lines(tmp_path / "test.de", references)
    write_lines(tmp_path / "teacher.txt", spoilt(references, 0.05, 9))
    for seed in (1, 2, 3):
        for method, share in {"finetune": 0.4, "word_kd": 0.3, "mine": 0.2}.items():
            lines = spoilt(references, share, seed)
            write_lines(tmp_path / f"{method}.{seed}.txt", lines)
    run_block(tmp_path, "docs/comparing-systems.md", "sekd_fairseq.evaluate")
    printed = run_block(tmp_path, "docs/comparing-systems.md", "analysis.plan")
    assert "A gain of 0.50 needs " in printed
    printed = run_block(tmp_path, "docs/comparing-systems.md", "analysis.gap")
    assert "| en-de | mine |" in printed
    table = pd.read_csv(tmp_path / "gap.csv").set_index(["method", "metric"])
    assert 0 < table.loc[("word_kd", "BLEU"), "closed"] < table.loc[("mine", "BLEU"), "closed"] < 1


def test_a_cache_in_object_storage(
    tmp_path: Path, data: Path, cache: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    link(tmp_path, **{"data/bin": data, "cache": cache})
    names = {"s3://bucket": bucket, "/local/cache": "local/cache", "-update 2000": "-update 12"}
    printed = run_block(tmp_path, "docs/object-storage.md", "sekd_fairseq.copy_cache", names)
    assert f"{bucket}/cache/train\n" in printed
    assert (tmp_path / "runs/one/run.json").exists()
    for split in ("train", "valid", "test"):
        manifest = TeacherCache.open(tmp_path / "local/cache" / split).manifest
        assert manifest == TeacherCache.open(cache / split).manifest


def test_jobs_build_one_cache(
    tmp_path: Path,
    data: Path,
    cache: Path,
    teacher: Path,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs = 3
    link(tmp_path, **{"DATA": data, "teacher.pt": teacher})
    few = {
        "/shared": "shared",
        "--shard-sentences 100000": "--shard-sentences 50",
        "--num-shards 16": f"--num-shards {jobs}",
    }
    for job in range(jobs):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(job))
        run_block(tmp_path, "docs/billion-tokens.md", "#SBATCH", few)
    for split in ("train", "valid", "test"):
        built = TeacherCache.open(tmp_path / "shared/cache" / split).manifest
        assert built.sentences == TeacherCache.open(cache / split).manifest.sentences
    # fairseq's half precision needs a GPU.
    names = {"s3://bucket": bucket, "/shared": "shared", "/local": "local", " --bf16": ""}
    names["-update 100000"] = "-update 12"
    run_block(tmp_path, "docs/billion-tokens.md", "copy_cache", names)
    kept = {path.name.rpartition("-")[0] for path in (tmp_path / "local/sekd_fairseq").iterdir()}
    assert {"train", "valid"} <= kept and "test" not in kept


def test_a_student_is_sharded(llm_data: Path, tokenizer: Path, tmp_path: Path) -> None:
    """On GPUs the block starts a process on each; here two on the CPU, which are told of each other."""
    from . import language_models

    model = language_models.pretrained(
        tmp_path / "MODEL", "llama", len(load_tokenizer(str(tokenizer)).pieces)
    )
    link(tmp_path, **{"data/llm/bin": llm_data})
    command("sekd_fairseq.import_hf", model, "--data", llm_data, "--output", tmp_path / "t.pt")
    command(
        "sekd_fairseq.build_cache", llm_data, "--path", tmp_path / "t.pt", "--cpu", "--output",
        tmp_path / "data/llm/cache", "--top-k", "4", "--allow-implausible",
    )  # fmt: skip
    spread = shlex.join(map(str, spread_over_two()))
    block = block_with("docs/several-gpus.md", "--shard-weights").rstrip()
    block = block.replace("--max-update 1000", "--max-update 3")
    processes = [f"{block} {spread} --distributed-rank {i} --device-id {i}" for i in range(2)]
    printed = execute(tmp_path, f"{processes[1]} > other.out 2>&1 &\n{processes[0]}\nwait $!")
    here, of_all = map(int, re.findall(r"sharded: (\d+) of (\d+)", printed)[0])
    assert 0.4 * of_all < here < 0.6 * of_all
    assert (tmp_path / "runs/llm/student/checkpoint_best.pt").exists()
