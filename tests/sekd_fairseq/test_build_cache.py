"""Building caches: equal to the teacher itself, restartable, and tied to their data."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.runs.files import sealed_json
from sekd_fairseq.checkpoints import load_models
from sekd_fairseq.datasets import TeacherDataset, teacher_tokens
from sekd_fairseq.logits import token_logits
from sekd_fairseq.splits import load_split
from sekd_fairseq.teacher_cache import TeacherCache
from sekd_fairseq.teachers.caching import SETTINGS, Part, shard_size

from .conftest import command, error_line, start_command, train


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
    # Complete: nothing to do, in shards as large as they are. With other settings: refused.
    build(data, teacher, tmp_path / "cache", "--top-k", "6", "--subset", "train")
    assert bytes_of(partial) == whole
    line = error_line(
        build(data, teacher, tmp_path / "cache", "--top-k", "5", *options[2:], check=False)
    )
    assert "another truncation" in line and "--output" in line


def test_shards_that_are_kept_are_of_one_teacher(
    data: Path, teacher: Path, cache_copy: Path, tmp_path: Path
) -> None:
    """A damaged shard and the manifest are deleted, as messages say, and the cache is built again."""
    state = torch.load(teacher, map_location="cpu")
    state["model"]["decoder.embed_tokens.weight"] *= 1.01
    torch.save(state, other := tmp_path / "other.pt")
    for name in ("manifest.json", "shard-00001.arrow"):
        (cache_copy / "train" / name).unlink()
    options = ("--subset", "train", "--top-k")
    for path, k, difference in ((other, "6", "teacher"), (teacher, "5", "truncation")):
        line = error_line(build(data, path, cache_copy, *options, k, check=False))
        assert f"holds a cache with another {difference}" in line
    build(data, teacher, cache_copy, *options, "6")
    TeacherCache.open(cache_copy / "train").verify()


def test_a_large_cache_has_large_shards(tmp_path: Path) -> None:
    sizes = [shard_size(tmp_path, sentences) for sentences in (9, 5_000_000, 5_000_001, 38_700_000)]
    assert sizes == [10_000, 10_000, 10_001, 77_400]
    # A build that was begun goes on with the shards that it has.
    (tmp_path / SETTINGS).write_bytes(sealed_json({"shard_sentences": 700}))
    assert shard_size(tmp_path, 38_700_000, 8) == 700


@pytest.mark.parametrize("sentences", [8, 29_000, 200_000, 38_700_000])
def test_each_of_several_processes_has_a_shard(sentences: int, tmp_path: Path) -> None:
    size = shard_size(tmp_path, sentences, 8)
    settings = {"sentences": sentences, "shard_sentences": size}
    shares = [
        sum(min(size, sentences - index * size) for index in Part(number, 8).shards(settings))
        for number in range(8)
    ]
    assert sum(shares) == sentences and min(shares) > 0
    assert sentences != 29_000 or shares == 8 * [3_625]


@pytest.mark.parametrize("sentences", [0, 1, 3])
def test_more_processes_than_sentences(sentences: int, tmp_path: Path) -> None:
    assert shard_size(tmp_path, sentences, 8) == 1


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


@pytest.mark.slow
def test_spawned_workers_read_the_same(data: Path, teacher: Path, cache: Path) -> None:
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


#: As torchrun does, but the ranks are forks: interpreters of their own would import for 15 seconds.
TORCHRUN = """
import sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from sekd_fairseq import build_cache

ranks = LaunchConfig(
    min_nodes=1, max_nodes=1, nproc_per_node=2, start_method="fork", rdzv_backend="c10d",
    rdzv_endpoint="localhost:0", run_id="test", max_restarts=0,
)
elastic_launch(ranks, build_cache.main)(sys.argv[1:])
"""


def test_torchrun_and_two_builders_on_one_directory(
    data: Path, teacher: Path, cache: Path, tmp_path: Path
) -> None:
    words = [
        "sekd_fairseq.build_cache", data, "--path", teacher, "--cpu", "--top-k", "6",
        "--shard-sentences", "50", "--subset", "train", "--output",
    ]  # fmt: skip
    torchrun = tmp_path / "torchrun.py"
    torchrun.write_text(TORCHRUN)
    running = {
        tmp_path / f"{number}.log": start_command(*line, output=tmp_path / f"{number}.log")
        for number, line in enumerate(
            (
                [torchrun, *words[1:], tmp_path / "a"],  # ranks share the work
                [*words, tmp_path / "b"],  # both do all of it, at the same time
                [*words, tmp_path / "b"],
            )
        )
    }
    for log, process in running.items():
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert status == 0, log.read_text()[-2000:]
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
    # On its way to the loss each token drawn keeps its share of the draws.
    _, _, task = load_models([str(teacher)], str(data), torch.device("cpu"))
    dataset = TeacherDataset(load_split(task, "valid", str(data)), [opened], "valid")
    sample = dataset.collater([dataset[index] for index in range(6)])
    tokens = teacher_tokens(sample["teacher"])
    assert tokens.log_weight is not None
    weight = tokens.log_weight.exp()
    draws = np.concatenate([opened[index].draws for index in sample["id"].tolist()])
    np.testing.assert_allclose(weight[tokens.valid].numpy(), draws / 8, rtol=1e-6)
    torch.testing.assert_close(weight.sum(dim=1), torch.ones(len(weight)))
    # Sampling is seeded by sentence: batches of another size give the same bytes.
    build(data, teacher, tmp_path / "other", "--sample", "8", "--subset", "valid")
    one, other = (TeacherCache.open(path / "valid") for path in (folder, tmp_path / "other"))
    assert all((a.token_id == b.token_id).all() for a, b in zip(one, other, strict=True))
    kd = ("--criterion", "cached_kd", "--missing-mass", "sampled", "--disable-validation")
    log = train(data, tmp_path / "save", *kd, "--teacher-cache", folder, "--max-update", "6")
    assert 'num_updates": "6"' in log and '"kl"' in log
    assert "agreement" not in log  # the best of the tokens drawn is not the teacher's best
    # Its supports are distributions too, so the other losses take them, and say what they are.
    both = ("--criterion", "self_evolution_kd", "--teacher-cache", folder, "--max-update", "2")
    log = train(data, tmp_path / "b", *both)
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
