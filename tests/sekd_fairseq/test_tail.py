"""The tail law: measured as the teacher is, tied to its cache, and trained with."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sekd_fairseq.checkpoints import load_models
from sekd_fairseq.logits import token_logits
from sekd_fairseq.splits import load_split
from sekd_fairseq.teacher_cache import CacheError, TeacherCache
from sekd_fairseq.teacher_cache.tail import EVEN_SHARE, TAIL

from .conftest import command, error_line, train


def test_the_law_is_the_mean_mass_outside(data: Path, teacher: Path, cache: Path) -> None:
    built = TeacherCache.open(cache / "valid")
    models, _, task = load_models([str(teacher)], str(data), torch.device("cpu"))
    dataset = load_split(task, "valid", str(data))
    vocab = len(task.target_dictionary)
    outside = np.zeros(vocab)
    for sentence in range(len(dataset)):
        sample = dataset.collater([dataset[sentence]])
        row = built[sentence]
        ends = np.cumsum(row.support_size.astype(int))
        places = zip(token_logits(models, sample, 1), strict=False)
        p = torch.cat([z for ((_, z),) in places]).double().softmax(-1).numpy()
        for probability, support in zip(
            p, np.split(row.token_id.astype(int), ends)[:-1], strict=True
        ):
            probability[support] = 0.0
            outside += probability
    expected = (1 - EVEN_SHARE) * outside / outside.sum() + EVEN_SHARE / vocab
    np.testing.assert_allclose(built.tail_law(), expected * vocab, rtol=1e-4)


def test_another_law_is_refused(cache_copy: Path) -> None:
    train_law, valid = cache_copy / "train" / TAIL, TeacherCache.open(cache_copy / "valid")
    valid.tail_law()
    content = bytearray((cache_copy / "valid" / TAIL).read_bytes())
    content[len(content) // 2] ^= 1
    (cache_copy / "valid" / TAIL).write_bytes(content)
    with pytest.raises(CacheError, match="tail law"):
        valid.tail_law()
    (cache_copy / "valid" / TAIL).unlink()
    with pytest.raises(CacheError, match="--missing-mass"):
        valid.tail_law()
    # Of the same teacher, dictionary and truncation: as good.
    shutil.copy(train_law, cache_copy / "valid" / TAIL)
    valid.tail_law()
    manifest = valid.manifest
    object.__setattr__(manifest, "truncation", {"rule": "top_k", "k": 5})
    with pytest.raises(CacheError, match="another"):
        valid.tail_law()


def test_training_with_the_tail(data: Path, cache: Path, teacher: Path, tmp_path: Path) -> None:
    words = ("--criterion", "cached_kd", "--teacher-cache", cache, "--missing-mass", "tail")
    plain = train(data, tmp_path / "plain", *words, "--max-update", "4")
    chunked = train(
        data, tmp_path / "chunked", *words, "--max-update", "4", "--sekd-chunk-tokens", "7"
    )
    losses = [re.findall(r'train_inner.*"kl": "([^"]*)"', log) for log in (plain, chunked)]
    assert len(losses[0]) >= 4
    np.testing.assert_allclose(*(np.array(one, float) for one in losses), atol=2e-4)
    line = error_line(train(data, tmp_path / "jsd", *words, "--divergence", "jsd", check=False))
    assert "linear" in line
    printed = command(
        "sekd_fairseq.inspect_cache",
        cache / "valid",
        "--verify",
        "--against",
        teacher,
        "--data",
        data,
    )
    means = [
        float(line.partition("mean ")[2].split()[0])
        for line in printed.splitlines()
        if line.startswith("  restored")
    ]
    assert len(means) == 2 and means[1] < means[0]
