"""Building caches: equal to the teacher itself, restartable, and tied to their data."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sekd_fairseq.teacher_cache import TeacherCache

from .conftest import (
    ENVIRONMENT,
    binarise,
    command,
    error_line,
    needs_whole_disk,
    start_command,
    train,
    write_text,
)


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
    from sekd_fairseq.checkpoints import load_models
    from sekd_fairseq.logits import token_logits
    from sekd_fairseq.splits import load_split

    models, _, task = load_models([str(teacher)], str(data), torch.device("cpu"))
    dataset = load_split(task, "valid", str(data))
    vocab = len(task.target_dictionary)
    for sentence in range(len(dataset)):
        sample = dataset.collater([dataset[sentence]])
        ((target, z),) = token_logits(models, sample, task.target_dictionary.pad())
        log_p = z.log_softmax(dim=-1)
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


def test_killed_at_random_instants_it_ends_in_the_same_bytes(
    data: Path, teacher: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kills = 20 if request.config.getoption("--slow") else 3
    words = [
        "sekd_fairseq.build_cache", data, "--path", teacher, "--cpu", "--top-k", "6",
        "--shard-sentences", "5", "--max-tokens", "40", "--subset", "train", "--output",
    ]  # fmt: skip
    start = time.monotonic()
    command(*words, tmp_path / "whole")
    duration = time.monotonic() - start
    whole = bytes_of(tmp_path / "whole" / "train")
    generator = random.Random(4)
    stages = set()
    for _ in range(kills):
        running = start_command(*words, tmp_path / "killed")
        time.sleep(generator.uniform(0.2, 0.9) * duration)
        os.kill(running, signal.SIGKILL)
        os.waitpid(running, 0)
        if (tmp_path / "killed" / "train").is_dir():
            stages.add(len(list((tmp_path / "killed" / "train").glob("shard-*.arrow"))))
    assert stages, "every kill came before the first file"
    command(*words, tmp_path / "killed")
    left = bytes_of(tmp_path / "killed" / "train")
    # A kill may leave a temporary file, under a name that no reader looks at.
    assert {name: content for name, content in left.items() if not name.startswith(".")} == whole
    TeacherCache.open(tmp_path / "killed" / "train").verify()


def test_each_rank_has_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from sekd_fairseq.devices import default_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default_device(cpu=True) == torch.device("cpu")
    assert default_device(cpu=False) == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert default_device(cpu=False) == torch.device("cuda", 3)


def test_spawned_workers_read_the_same(data: Path, teacher: Path, cache: Path) -> None:
    from sekd_fairseq.checkpoints import load_models
    from sekd_fairseq.datasets import TeacherDataset
    from sekd_fairseq.splits import load_split

    _, _, task = load_models([str(teacher)], str(data), torch.device("cpu"))
    dataset = TeacherDataset(
        load_split(task, "valid", str(data)), [TeacherCache.open(cache / "valid")], "valid"
    )
    batches = [[3, 1, 2], [0], [20, 19]]
    found = {}
    for context in ("fork", "spawn"):
        loader = torch.utils.data.DataLoader(
            dataset, batch_sampler=batches, collate_fn=dataset.collater, num_workers=2,
            multiprocessing_context=context,
        )  # fmt: skip
        found[context] = [batch["teacher"] for batch in loader]
    for one, other, batch in zip(found["fork"], found["spawn"], batches, strict=True):
        expected = dataset.collater([dataset[i] for i in batch])["teacher"]
        for found_in in (one, other):
            torch.testing.assert_close(found_in, expected, rtol=0, atol=0)


def test_parts_make_the_same_bytes_as_one_process(
    data: Path, teacher: Path, cache: Path, tmp_path: Path
) -> None:
    options = ("--top-k", "6", "--shard-sentences", "50", "--subset", "train")
    parts = ("--num-shards", "2", "--shard-id")
    out = build(data, teacher, tmp_path / "cache", *options, *parts, "1")
    assert "still missing (3)" in out and not (tmp_path / "cache/train/manifest.json").exists()
    build(data, teacher, tmp_path / "cache", *options, *parts, "0")
    assert bytes_of(tmp_path / "cache" / "train") == bytes_of(cache / "train")
    TeacherCache.open(tmp_path / "cache" / "train").verify()
    line = error_line(build(data, teacher, tmp_path / "no", *options, *parts, "2", check=False))
    assert "--shard-id" in line


def test_torchrun_and_two_builders_on_one_directory(
    data: Path, teacher: Path, cache: Path, tmp_path: Path
) -> None:
    words = [
        "-m", "sekd_fairseq.build_cache", data, "--path", teacher, "--cpu", "--top-k", "6",
        "--shard-sentences", "50", "--subset", "train", "--output",
    ]  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    commands = [
        [*torchrun, *words, tmp_path / "a"],  # ranks share the work
        [sys.executable, *words, tmp_path / "b"],  # both do all of it, at the same time
        [sys.executable, *words, tmp_path / "b"],
    ]
    running = [
        subprocess.Popen(
            list(map(str, command)), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for command in commands
    ]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()[-2000:]
    for name in "ab":
        assert bytes_of(tmp_path / name / "train") == bytes_of(cache / "train")


def test_top_p_and_eight_bits_train(data: Path, teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    out = build(
        data, teacher, folder, "--top-p", "0.95", "--top-k", "10", "--logprob-bits", "8",
        "--subset", "train,valid",
    )  # fmt: skip
    assert "top_p (k 10, p 0.95, floor 2)" in out
    opened = TeacherCache.open(folder / "train")
    opened.verify()
    assert opened.manifest.dtypes["logprob"] == "uint8"
    sizes = np.concatenate([row.support_size for row in opened])
    assert sizes.min() >= 2 and sizes.max() <= 11 and len(set(sizes.tolist())) > 3
    log = train(
        data, tmp_path / "save", "--criterion", "self_evolution_kd", "--teacher-cache", folder,
        "--max-update", "30", "--disable-validation",
    )  # fmt: skip
    assert 'num_updates": "30' in log


def test_sampled_cache_trains_with_sampled_loss_only(
    data: Path, teacher: Path, cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    build(data, teacher, folder, "--sample", "8", "--subset", "train,valid", "--max-tokens", "200")
    opened = TeacherCache.open(folder / "valid")
    opened.verify()
    row = opened[4]
    assert row.draws is not None and row.draws.sum() == 8 * len(row.support_size)
    # Sampling is seeded by sentence: batches of another size give the same bytes.
    build(data, teacher, tmp_path / "other", "--sample", "8", "--subset", "valid")
    one, other = (TeacherCache.open(path / "valid") for path in (folder, tmp_path / "other"))
    assert all((a.token_id == b.token_id).all() for a, b in zip(one, other, strict=True))
    kd = ("--criterion", "cached_kd", "--missing-mass", "sampled", "--disable-validation")
    log = train(
        data, tmp_path / "save", *kd, "--teacher-cache", folder, "--max-update", "30"
    )  # fmt: skip
    assert 'num_updates": "30' in log and '"kl"' in log
    assert "agreement" not in log  # the best of the tokens drawn is not the teacher's best
    # Its supports are distributions too, so the other losses take them, and say what they are.
    log = train(data, tmp_path / "b", "--criterion", "self_evolution_kd", "--teacher-cache", folder)
    assert "holds tokens drawn from the teacher (--sample)" in log
    # The best token is always among them, so the teacher's accuracy is known as well as elsewhere.
    quality = [TeacherCache.open(path / "train").manifest.quality for path in (cache, folder)]
    assert quality[0]["accuracy"] == quality[1]["accuracy"] > 0.3
    line = error_line(train(data, tmp_path / "no", *kd, "--teacher-cache", cache, check=False))
    assert "--sample N" in line
    # A ratio from the same draws as the loss would make it biased.
    draws = ("--criterion", "self_evolution_kd", "--missing-mass", "sampled", "--max-update", "2")
    drawn = (*draws, "--teacher-cache", folder)
    line = error_line(train(data, tmp_path / "no", *drawn, check=False))
    assert "same draws" in line and "--stored-difficulty" in line
    train(data, tmp_path / "c", *drawn, "--lambda-max", "0")
    command(
        "sekd_fairseq.score", data, "--path", teacher, "--teacher-cache", folder, "--run",
        tmp_path / "run", "--cpu", "--subset", "train",
    )  # fmt: skip
    (stored,) = (tmp_path / "run" / "tokens" / "train").iterdir()
    train(data, tmp_path / "d", *drawn, "--stored-difficulty", stored)


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


@needs_whole_disk
def test_a_full_disk_is_one_clear_error(data: Path, teacher: Path, tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); "
    ignore = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    arguments = [
        "sekd_fairseq.build_cache", data, "--path", teacher, "--output", tmp_path / "out", "--cpu",
        "--subset", "valid",
    ]  # fmt: skip
    run = f"import runpy, sys; sys.argv = {[str(a) for a in arguments]!r}; "
    run += "runpy.run_module('sekd_fairseq.build_cache', run_name='__main__', alter_sys=True)"
    process = subprocess.run(
        [sys.executable, "-c", limit + ignore + run],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
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
