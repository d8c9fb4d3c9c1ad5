"""What a cache is not built from, or not trained on: each ends in one line that says why."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sekd_fairseq.teacher_cache import TeacherCache

from .conftest import (
    binarise,
    command,
    completed,
    error_line,
    needs_whole_disk,
    train,
    write_text,
)
from .test_build_cache import build


def test_a_cap_below_top_p_is_said(data: Path, teacher: Path, tmp_path: Path) -> None:
    options = ("--subset", "valid", "--top-p", "0.98")
    printed = build(data, teacher, tmp_path / "a", *options, "--top-k", "3")
    cache = TeacherCache.open(tmp_path / "a" / "valid")
    short = np.concatenate([row.outside_mass > 0.0201 for row in cache]).mean()
    assert short > 0.1
    assert cache.manifest.quality["capped"] == pytest.approx(short, abs=0.02)
    line = next(line for line in printed.splitlines() if line.startswith("  capped"))
    assert f"{cache.manifest.quality['capped']:.1%} of tokens" in line
    assert "--top-p 0.98" in line and "--top-k 3" in line
    assert "capped" not in build(data, teacher, tmp_path / "b", *options, "--top-k", "0")


def test_options_without_effect_are_refused(data: Path, teacher: Path, tmp_path: Path) -> None:
    for given, words in (
        (("--sample", "8", "--top-k", "32"), "--sample and --top-k"),
        (("--top-p-floor", "4"), "--top-p-floor expects --top-p"),
    ):
        line = error_line(build(data, teacher, tmp_path / "out", *given, check=False))
        assert words in line and not (tmp_path / "out").exists()


def test_implausible_teachers_are_refused(
    data: Path, teacher: Path, cache: Path, tmp_path: Path
) -> None:
    # A teacher that is shifted by one token in its vocabulary.
    state = torch.load(teacher, map_location="cpu")
    for key, value in state["model"].items():
        if "embed_tokens" in key or "output_projection" in key:
            state["model"][key] = value.roll(1, dims=0)
    torch.save(state, tmp_path / "shifted.pt")
    options = ("--subset", "valid", "--top-k", "6")
    line = error_line(build(data, tmp_path / "shifted.pt", tmp_path / "out", *options, check=False))
    assert "worse than their unigram frequencies" in line
    assert not (tmp_path / "out" / "valid" / "manifest.json").exists()
    out = build(data, tmp_path / "shifted.pt", tmp_path / "out", *options, "--allow-implausible")
    assert "perplexity" in out
    # A good teacher is no worse for a high temperature, at which it is as flat as that.
    out = build(data, teacher, tmp_path / "hot", *options, "--temperature", "9")
    assert "at temperature 9 with perplexity" in out
    quality = TeacherCache.open(tmp_path / "hot" / "valid").manifest.quality
    assert quality["perplexity"] > quality["unigram_perplexity"]
    # A teacher that gives NaN.
    state["model"]["decoder.layers.0.fc1.bias"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    line = error_line(build(data, tmp_path / "nan.pt", tmp_path / "nan", *options, check=False))
    assert "= nan" in line and not list((tmp_path / "nan" / "valid").glob("shard*"))
    quality = TeacherCache.open(cache / "valid").manifest.quality
    assert 1 < quality["perplexity"] < quality["unigram_perplexity"] < 20
    assert 0.2 < quality["accuracy"] <= quality["reference_kept"] <= 1
    assert quality["one_hot"] == 0


def test_sentences_too_long_for_the_teacher(data: Path, tmp_path: Path) -> None:
    train(
        data, tmp_path / "short", "--criterion", "cross_entropy", "--max-update", "60",
        "--max-source-positions", "9", "--max-target-positions", "9", "--disable-validation",
        "--skip-invalid-size-inputs-valid-test",
    )  # fmt: skip
    short = tmp_path / "short" / "checkpoint_last.pt"
    line = error_line(build(data, short, tmp_path / "no", "--subset", "valid", check=False))
    assert "valid line" in line and not (tmp_path / "no").exists()
    out = build(data, short, tmp_path / "out", "--subset", "valid", "--skip-too-long")
    assert "have the reference alone" in out
    skipped = [row for row in TeacherCache.open(tmp_path / "out/valid") if len(row.entropy) > 9]
    assert skipped
    for row in skipped:
        assert (row.support_size == 1).all() and (row.gold_logprob == 0).all()
    # What a comparison with the dense teacher leaves out, and a divergence that would be infinite.
    out = command(
        "sekd_fairseq.inspect_cache",
        tmp_path / "out",
        "--verify",
        "--against",
        short,
        "--data",
        data,
    )
    assert "maximum inf" not in out and "KL from the dense teacher" in out
    build(data, short, tmp_path / "out", "--subset", "train", "--skip-too-long")
    line = error_line(
        train(
            data, tmp_path / "save", "--criterion", "cached_kd", "--divergence", "reverse_kl",
            "--teacher-cache", tmp_path / "out", check=False,
        )
    )  # fmt: skip
    assert "--divergence reverse_kl" in line and "--skip-too-long" in line


#: Runs a module where no file can have more than 3,000 bytes.
FULL_DISK = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@needs_whole_disk
def test_a_full_disk_is_one_clear_error(data: Path, teacher: Path, tmp_path: Path) -> None:
    script = tmp_path / "on_a_full_disk.py"
    script.write_text(FULL_DISK)
    process = completed(
        script, "sekd_fairseq.build_cache", data, "--path", teacher, "--output", tmp_path / "out", "--cpu",
        "--subset", "valid",
    )  # fmt: skip
    assert process.returncode == 1
    assert "cannot write shard 0" in error_line(process.stderr)
    left = sorted(path.name for path in (tmp_path / "out" / "valid").iterdir())
    assert left == ["build.json", "tail.arrow"]  # what was whole before


def test_bad_input_ends_with_one_line(
    text: Path, data: Path, teacher: Path, tmp_path: Path
) -> None:
    def refuse(*arguments: object) -> str:
        line = error_line(build(*arguments, check=False))
        assert not (tmp_path / "out").exists()
        return line

    out = tmp_path / "out"
    assert "no file at" in refuse(data, tmp_path / "none.pt", out)
    broken = tmp_path / "broken.pt"
    broken.write_bytes(teacher.read_bytes()[:5000])
    assert "broken.pt" in refuse(data, broken, out)
    assert "--temperature" in refuse(data, teacher, out, "--temperature", "0")
    assert "'valid7'" in refuse(data, teacher, out, "--subset", "valid7")
    assert "one data directory" in refuse(f"{data}:{data}", teacher, out)
    assert "data directory" in refuse(tmp_path / "nowhere", teacher, out)
    write_text(tmp_path / "text", "train", [("one x y z", "eins x y z")] * 3)
    other = binarise(tmp_path / "text", tmp_path / "bin")
    assert "dictionaries" in refuse(other, teacher, out, "--subset", "train")


def test_other_data_are_refused_in_training(
    text: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    kd = ("--criterion", "self_evolution_kd", "--teacher-cache", cache)

    def refuse(folder: object) -> str:
        line = error_line(train(folder, tmp_path / "save", *kd, check=False))
        assert not list((tmp_path / "save").glob("*.pt"))
        return line

    changed = tmp_path / "changed"
    shutil.copytree(text, changed)
    lines = (changed / "train.de").read_text().splitlines()
    lines[116] = "drei drei drei drei"
    (changed / "train.de").write_text("\n".join(lines) + "\n")
    line = refuse(binarise(changed, tmp_path / "bin1", dictionary=data))
    assert "target line 117" in line and "1 of 203" in line
    (changed / "train.de").write_text("\n".join(lines[:-1]) + "\n")
    source = (changed / "train.en").read_text().splitlines()[:-1]
    (changed / "train.en").write_text("\n".join(source) + "\n")
    line = refuse(binarise(changed, tmp_path / "bin2", dictionary=data))
    assert "expected 203 sentences" in line and "found 202" in line
    # Another dictionary of the same size: two symbols change places.
    shutil.copytree(data, tmp_path / "bin3")
    for language in ("en", "de"):
        path = tmp_path / "bin3" / f"dict.{language}.txt"
        symbols = path.read_text().splitlines()
        symbols[0], symbols[1] = symbols[1], symbols[0]
        path.write_text("\n".join(symbols) + "\n")
    assert "same size" in refuse(tmp_path / "bin3")
    for split in ("train", "valid"):
        write_text(tmp_path / "small", split, [("one x y z", "eins x y z")] * 3)
    assert "dictionary of" in refuse(binarise(tmp_path / "small", tmp_path / "bin4"))


@pytest.mark.parametrize("split", ["train", "valid"])
def test_missing_split_or_cache_of_another_split(
    data: Path, cache_copy: Path, tmp_path: Path, split: str
) -> None:
    shutil.rmtree(cache_copy / split)
    kd = ("--criterion", "self_evolution_kd", "--teacher-cache", cache_copy)
    line = error_line(train(data, tmp_path / "save", *kd, check=False))
    assert f"split '{split}'" in line and f"--subset {split}" in line
    shutil.copytree(cache_copy / "test", cache_copy / split)
    line = error_line(train(data, tmp_path / "save", *kd, check=False))
    assert "13 sentences" in line and "'test'" in line
