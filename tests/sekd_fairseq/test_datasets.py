"""Batches refuse their teacher's distributions where these are of other sentences, or of another kind."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.data import ConcatDataset

from sekd_fairseq.checkpoints import load_models
from sekd_fairseq.datasets import TeacherDataset
from sekd_fairseq.errors import CacheError
from sekd_fairseq.splits import load_split
from sekd_fairseq.teacher_cache import TeacherCache


@pytest.fixture
def dataset(data: Path, teacher: Path, cache: Path) -> TeacherDataset:
    _, _, task = load_models([str(teacher)], str(data), torch.device("cpu"))
    split = load_split(task, "valid", str(data))
    return TeacherDataset(split, [TeacherCache.open(cache / "valid")], "valid")


def test_targets_that_change_after_loading_are_refused(dataset: TeacherDataset) -> None:
    """Were they not, every token would learn another one's distribution, without a sign of it."""

    def collate(*changed: torch.Tensor) -> dict[str, Any]:
        items = [dict(dataset[index]) for index in range(4)]
        for item, target in zip(items, changed, strict=False):
            item["target"] = target
        return dataset.collater(items)

    first, second = (dataset[index]["target"] for index in range(2))
    assert len(collate(first, second)["teacher"]["ids"]) == sum(dataset.sizes[:4, 1])
    other = first.clone()
    other[0] = first[0] + 1
    for changed in ((first[1:],), (other,), (second, first)):
        with pytest.raises(CacheError, match="do not belong to the targets of their batch"):
            collate(*changed)


def test_sampled_caches_are_not_mixed_with_others(dataset: TeacherDataset) -> None:
    pair = copy.copy(dataset.dataset)
    pair.tgt = ConcatDataset([pair.tgt, pair.tgt])
    (whole,) = dataset.caches
    sampled = copy.copy(whole)
    sampled.manifest = replace(whole.manifest, truncation={"rule": "sample", "samples": 8})
    with pytest.raises(
        CacheError, match=r"train: expected all .* sampled or none, found some of each"
    ):
        TeacherDataset(pair, [whole, sampled], "train")
    TeacherDataset(pair, [whole, whole], "train")
