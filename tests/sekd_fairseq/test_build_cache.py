"""Building caches: equal to the teacher itself, restartable, and tied to their data."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sekd_fairseq.teacher_cache import TeacherCache

from .conftest import binarise, command, error_line, train, write_text


def build(data: object, teacher: object, output: Path, *options: object, **keywords: bool) -> str:
    return command(
        "sekd_fairseq.build_cache", data, "--path", teacher, "--output", output, "--cpu", *options,
        **keywords,
    )  # fmt: skip


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_whole_vocabulary_equals_the_teacher(data: Path, teacher: Path, tmp_path: Path) -> None:
    build(data, teacher, tmp_path / "dense", "--top-k", "0", "--subset", "valid")
    cache = TeacherCache.open(tmp_path / "dense" / "valid")
    from sekd_fairseq.inference import load_models, load_split, token_log_probs

    models, _, task = load_models([str(teacher)], str(data), torch.device("cpu"))
    dataset = load_split(task, "valid", str(data))
    vocab = len(task.target_dictionary)
    for sentence in range(len(dataset)):
        sample = dataset.collater([dataset[sentence]])
        ((target, log_p),) = token_log_probs(models, sample, task.target_dictionary.pad())
        row = cache[sentence]
        ids = row.token_id.reshape(-1, vocab).astype(np.int64)
        assert (ids[:, 0] == target.numpy()).all()
        assert (np.sort(ids, axis=1) == np.arange(vocab)).all()
        exact = np.take_along_axis(log_p.numpy(), ids, axis=1)
        np.testing.assert_allclose(row.logprob.reshape(-1, vocab), exact, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(row.gold_logprob, exact[:, 0], rtol=1e-4, atol=1e-5)
        assert (row.outside_mass == 0).all()
        entropy = -(log_p.double().exp() * log_p.double()).sum(-1).numpy()
        np.testing.assert_allclose(row.entropy, entropy, rtol=1e-4, atol=1e-5)


def test_stopped_build_goes_on_to_the_same_bytes(
    data: Path, teacher: Path, cache: Path, tmp_path: Path
) -> None:
    whole = bytes_of(cache / "train")
    partial = tmp_path / "cache" / "train"
    shutil.copytree(cache / "train", partial)
    options = ("--top-k", "6", "--shard-sentences", "50", "--subset", "train")
    # As after a kill: no manifest, a shard missing, a temporary file left.
    (partial / "manifest.json").unlink()
    (partial / "shard-00003.arrow").unlink()
    (partial / ".shard-00003.arrow.x.tmp").write_bytes(b"half")
    kept = (partial / "shard-00001.arrow").stat().st_mtime_ns
    build(data, teacher, tmp_path / "cache", *options)
    (partial / ".shard-00003.arrow.x.tmp").unlink()
    assert bytes_of(partial) == whole
    assert (partial / "shard-00001.arrow").stat().st_mtime_ns == kept
    # Complete: nothing to do. With other settings: refused.
    build(data, teacher, tmp_path / "cache", *options)
    line = error_line(
        build(data, teacher, tmp_path / "cache", "--top-k", "5", *options[2:], check=False)
    )
    assert "another truncation" in line and "--output" in line


def test_ensemble_and_temperature(data: Path, teacher: Path, tmp_path: Path) -> None:
    train(
        data, tmp_path / "other", "--criterion", "cross_entropy", "--max-update", "20",
        "--disable-validation",
    )  # fmt: skip
    other = tmp_path / "other" / "checkpoint_last.pt"
    gold = {}
    for name, path in (("a", teacher), ("b", other), ("both", f"{teacher}:{other}")):
        build(data, path, tmp_path / name, "--subset", "valid", "--top-k", "4")
        cache = TeacherCache.open(tmp_path / name / "valid")
        gold[name] = np.concatenate([row.gold_logprob for row in cache])
    mean = (np.exp(gold["a"]) + np.exp(gold["b"])) / 2
    np.testing.assert_allclose(np.exp(gold["both"]), mean, rtol=1e-4, atol=1e-7)
    build(data, teacher, tmp_path / "t", "--subset", "valid", "--temperature", "3", "--top-k", "4")
    warm = TeacherCache.open(tmp_path / "t" / "valid")
    plain = TeacherCache.open(tmp_path / "a" / "valid")
    assert warm.manifest.temperature == 3.0
    assert np.mean(warm[0].entropy) > np.mean(plain[0].entropy)


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
        assert not list((tmp_path / "save").glob("*"))
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
