"""One student of several teachers: every sentence has the distributions of its own."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from sekd_fairseq.datasets import TeacherDataset
from sekd_fairseq.teacher_cache import TeacherCache
from sekd_fairseq.teacher_cache.format import Manifest
from sekd_fairseq.teacher_cache.storage import publish

from .conftest import WORDS, command, error_line, sentence_pairs, train
from .training import SE_KD, records

UPPER = ("--criterion", "cross_entropy", "--disable-validation", "--max-update", "60")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Two language pairs with one vocabulary, from raw text: data and cache of each, whose teachers
    differ."""
    folder = tmp_path_factory.mktemp("pairs")
    text = folder / "text"
    text.mkdir()
    other = {word: word[::-1] + "s" for word in WORDS}
    for number, (split, count) in enumerate({"train": 90, "valid": 9, "test": 7}.items()):
        for language, offset in (("de", 0), ("cs", 100)):
            rows = sentence_pairs(count, number + offset)
            if language == "cs":
                rows = [(en, " ".join(other[word] for word in en.split())) for en, _ in rows]
            for name, lines in zip(("en", language), zip(*rows, strict=True), strict=True):
                (text / f"{split}-{language}.{name}").write_text("\n".join(lines) + "\n")
        for side, names in (("src", ("en", "en")), ("tgt", ("de", "cs"))):
            both = [
                (text / f"{split}-{one}.{name}").read_text()
                for one, name in zip(("de", "cs"), names, strict=True)
            ]
            (text / f"{split}.{side}").write_text("".join(both))

    def prepare(source: str, target: str, mark: str, output: Path, *more: object) -> None:
        splits = [w for s in ("train", "valid", "test") for w in (f"--{s}", text / f"{s}{mark}")]
        command(
            "sekd_fairseq.prepare_data", *splits, "--source-lang", source, "--target-lang", target,
            "--output", output, "--vocab-size", "60", *more,
        )  # fmt: skip

    prepare("src", "tgt", "", folder / "both")
    made = {}
    for language in ("de", "cs"):
        home = folder / f"en-{language}"
        prepare(language, "en", f"-{language}", home, "--vocabulary", folder / "both")
        train(home / "bin", home / "teacher", *UPPER, "--seed", len(made) + 2)
        command(
            "sekd_fairseq.build_cache", home / "bin", "--path", home / "teacher" / "checkpoint_last.pt",
            "--output", home / "cache", "--cpu", "--subset", "train,valid,test", "--top-k", "5",
            "--shard-sentences", "40", "--allow-implausible",
        )  # fmt: skip
        made[language] = (home / "bin", home / "cache")
    return made


def join(pairs: dict[str, tuple[Path, Path]], output: Path, check: bool = True) -> str:
    words = [word for pair in pairs.values() for word in ("--part", *pair)]
    return command("sekd_fairseq.join_data", *words, "--output", output, check=check)


@pytest.fixture(scope="module")
def joined(pairs: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("joined") / "joined"
    printed = join(pairs, output)
    assert "train1: cs-en, 88 sentences of checkpoint_last.pt" in printed
    return output


def test_every_sentence_has_its_own_teachers_distribution(
    pairs: dict[str, tuple[Path, Path]], joined: Path
) -> None:
    words = [joined / "bin", "--task", "self_evolution_kd", "--arch", "transformer_tiny"]
    words += ["--teacher-cache", joined / "cache"]
    parsed = options.parse_args_and_arch(options.get_training_parser(), list(map(str, words)))
    task = tasks.setup_task(convert_namespace_to_omegaconf(parsed).task)
    assert (task.cfg.source_lang, task.cfg.target_lang) == ("src", "en")
    for split in ("train", "valid"):
        task.load_dataset(split, combine=True)
        dataset = task.dataset(split)
        assert isinstance(dataset, TeacherDataset)
        alone = [TeacherCache.open(pairs[name][1] / split) for name in ("de", "cs")]
        own = [sentence for cache in alone for sentence in cache]
        assert len(dataset) == len(own)
        assert alone[0].manifest.fingerprint != alone[1].manifest.fingerprint
        order = np.random.default_rng(0).permutation(len(dataset))
        for batch in np.array_split(order, 7):
            sample = dataset.collater([dataset[int(i)] for i in batch])
            tokens = sample["target"].ne(task.target_dictionary.pad()).sum(dim=1).cumsum(0).tolist()
            for row, (index, end) in enumerate(zip(sample["id"].tolist(), tokens, strict=True)):
                known = own[index]
                start = tokens[row - 1] if row else 0
                teacher = {
                    name: sample["teacher"][name][start:end]
                    for name in ("ids", "size", "log_p", "gold_log_p")
                }
                used = np.arange(teacher["ids"].size(1)) < teacher["size"].numpy()[:, None]
                np.testing.assert_array_equal(teacher["size"].numpy(), known.support_size)
                np.testing.assert_array_equal(teacher["ids"].numpy()[used], known.token_id)
                np.testing.assert_array_equal(teacher["log_p"].numpy()[used], known.logprob)
                np.testing.assert_array_equal(
                    teacher["gold_log_p"].numpy(), known.gold_logprob.astype(np.float64)
                )


def test_one_student_learns_from_both(
    pairs: dict[str, tuple[Path, Path]], joined: Path, tmp_path: Path
) -> None:
    options = (*SE_KD, "--teacher-cache", joined / "cache", "--combine-valid-subsets")
    log = train(joined / "bin", tmp_path / "save", *options, "--max-update", "40")
    losses = [float(record["loss"]) for record in records(log, "")]
    assert losses[-1] < 0.8 * losses[0] and "valid_loss" in log
    path = tmp_path / "save" / "checkpoint_last.pt"
    for subset, language in (("test", "de"), ("test1", "cs")):
        command(
            "sekd_fairseq.score", joined / "bin", "--path", path, "--teacher-cache", joined / "cache",
            "--subset", subset, "--run", tmp_path / subset, "--cpu",
        )  # fmt: skip
        record = json.loads((tmp_path / subset / "run.json").read_text())
        cache = TeacherCache.open(pairs[language][1] / "test")
        assert record["teacher_cache"]["fingerprint"] == cache.manifest.fingerprint
    shown = command(
        "sekd_fairseq.inspect_cache", joined / "cache" / "train1", "--verify", "--student", path,
        "--data", joined / "bin", "--cpu",
    )  # fmt: skip
    assert "the 88 that the cache was built from" in shown
    # A training of other teachers is another training; so is one of the same in another order.
    turned = join(dict(reversed(pairs.items())), tmp_path / "turned")
    assert turned.count("sentences of") == 6
    refused = train(
        tmp_path / "turned" / "bin", tmp_path / "save", *SE_KD, "--teacher-cache",
        tmp_path / "turned" / "cache", "--combine-valid-subsets", "--max-update", "50", check=False,
    )  # fmt: skip
    assert "begun with other settings (--teacher" in error_line(refused)
    refused = train(
        joined / "bin", tmp_path / "tail", "--criterion", "cached_kd", "--teacher-cache",
        joined / "cache", "--combine-valid-subsets", "--missing-mass", "tail", check=False,
    )  # fmt: skip
    assert "expected one teacher" in error_line(refused)
    # Nor where each data directory has its own, of which one is read an epoch.
    data, caches = zip(*pairs.values(), strict=True)
    same = f"{data[0]}:{data[0]}"
    one, other = (f"{caches[0]}:{cache}" for cache in (caches[0], tmp_path / "other"))
    shutil.copytree(caches[0], tmp_path / "other")
    path = tmp_path / "other" / "train" / "manifest.json"
    manifest = Manifest.load(path.parent)
    teacher = {**manifest.teacher, "sha256": "0" * 64}
    path.write_bytes(replace(manifest, teacher=teacher).to_json())
    for name, roots, check in (("one", one, True), ("two", other, False)):
        log = train(
            same, tmp_path / name, "--criterion", "cached_kd", "--teacher-cache", roots,
            "--missing-mass", "tail", "--max-update", "2", check=check,
        )  # fmt: skip
    assert "expected one teacher" in error_line(log)


def test_what_was_joined_is_joined_with_more(
    pairs: dict[str, tuple[Path, Path]], joined: Path, tmp_path: Path
) -> None:
    both = {"both": (joined / "bin", joined / "cache"), "de": pairs["de"]}
    printed = join(both, tmp_path / "three")
    assert "train1: src-en, 88 sentences" in printed and "train2: de-en, 90 sentences" in printed
    cache = TeacherCache.open(tmp_path / "three" / "cache" / "train2")
    assert (
        cache.manifest.fingerprint
        == TeacherCache.open(pairs["de"][1] / "train").manifest.fingerprint
    )


def test_what_does_not_belong_together_is_refused(
    pairs: dict[str, tuple[Path, Path]], data: Path, cache: Path, tmp_path: Path
) -> None:
    refused = error_line(
        join({"de": pairs["de"], "en": (data, cache)}, tmp_path / "a", check=False)
    )
    assert "--vocabulary" in refused and "align_cache" in refused
    swapped = {"de": (pairs["de"][0], pairs["cs"][1]), "cs": pairs["cs"]}
    assert "expected 88 sentences" in error_line(join(swapped, tmp_path / "a", check=False))
    assert "expected two or more" in error_line(
        join({"de": pairs["de"]}, tmp_path / "a", check=False)
    )
    assert not list(tmp_path.iterdir())


def test_a_part_may_lie_in_object_storage(
    pairs: dict[str, tuple[Path, Path]],
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for split in ("train", "valid"):
        publish(pairs["cs"][1] / split, f"{bucket}/cs/{split}")
    there = {"de": pairs["de"], "cs": (pairs["cs"][0], f"{bucket}/cs")}
    printed = join(there, tmp_path / "joined")
    assert "test is left out: expected it of every part, found none in s3://" in printed
    cache = TeacherCache.open(tmp_path / "joined" / "cache" / "valid1")
    cache.verify()
    assert cache.manifest.split == "valid1" and len(cache) == 9
