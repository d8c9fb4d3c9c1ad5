"""Distillation on generated text, in rounds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq.data import indexed_dataset

from sekd_fairseq import rounds
from sekd_fairseq.errors import UserError
from sekd_fairseq.teacher_cache import TeacherCache
from tests.sekd_fairseq.conftest import command, parameters, train

TRAIN = [
    "--arch", "transformer_tiny", "--share-all-embeddings", "--optimizer", "adam", "--lr", "5e-3",
    "--max-tokens", "300", "--no-epoch-checkpoints", "--criterion", "cached_kd", "--log-format", "json",
]  # fmt: skip


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules that were run, each in a fork of this process."""
    called: list[str] = []

    def run(module: str, words: Sequence[str], stdout: Any = None) -> None:
        called.append(module)
        printed = command(module, *words)
        if stdout is not None:
            stdout.write(printed.encode())

    monkeypatch.setattr(rounds, "run", run)
    return called


def arguments(data: Path, teacher: Path, cache: Path | str, run: Path, *options: str) -> list[str]:
    given = ["--student", teacher, "--teacher", teacher, "--teacher-cache", cache, "--run", run]
    sizes = ["--updates", "6", "--share", "0.25", "--beam", "2", "--cpu"]
    return [*map(str, [data, *given]), *sizes, *options, "--", *TRAIN]


def test_rounds_train_on_gold_and_generated_text(
    data: Path, teacher: Path, cache: Path, tmp_path: Path, commands: list[str]
) -> None:
    run = tmp_path / "run"
    words = arguments(data, teacher, cache, run)
    rounds.main(words)
    one_round = ["fairseq_cli.generate", "sekd_fairseq.build_cache", "fairseq_cli.train"]
    assert commands == 2 * one_round
    record = json.loads((run / "rounds.json").read_bytes())
    # A quarter of the 203 training sentences, others in the second round.
    for found in record["rounds"]:
        assert found["translations"] + found["without_end"] == 51 and found["translations"] > 25
    parts = [
        indexed_dataset.make_dataset(str(run / f"rounds/{n}/data/train1.en-de.en"), "mmap")
        for n in (1, 2)
    ]
    assert not all(torch.equal(*pair) for pair in zip(*parts, strict=True))
    # The training of the first round begins with the student, that of the second where it ended.
    last = [torch.load(run / f"rounds/{n}/checkpoints/checkpoint_last.pt") for n in (1, 2)]
    assert [state["optimizer_history"][-1]["num_updates"] for state in last] == [6, 12]
    assert last[0]["cfg"]["criterion"]["alpha"] == 1
    best = run / "checkpoints" / "checkpoint_best.pt"
    assert best.resolve().parent.parent.parent == (run / "rounds").resolve()
    assert not torch.equal(parameters(best), parameters(teacher))
    # Finished steps are skipped, and more rounds go on from there.
    commands.clear()
    rounds.main(words)
    assert commands == 2 * ["sekd_fairseq.build_cache"]  # which finds its shards there
    with pytest.raises(SystemExit, match=r"share 0\.25 is now 0\.5"):
        rounds.main(
            [*words[: words.index("--share") + 1], "0.5", *words[words.index("--share") + 2 :]]
        )


def test_each_round_has_its_own_patience(
    data: Path, teacher: Path, cache: Path, tmp_path: Path, commands: list[str]
) -> None:
    run = tmp_path / "run"
    words = arguments(data, teacher, cache, run, "--rounds", "3")
    words[words.index("--updates") + 1] = "40"
    # The loss is to rise, which it does not: a round ends at its second validation.
    rounds.main([*words, "--patience", "1", "--maximize-best-checkpoint-metric"])
    last = [torch.load(run / f"rounds/{n}/checkpoints/checkpoint_last.pt") for n in (1, 2, 3)]
    updates = [state["optimizer_history"][-1]["num_updates"] for state in last]
    assert 0 < updates[0] < updates[1] < updates[2]
    assert (run / "checkpoints" / "checkpoint_last.pt").is_file()


def test_a_round_that_leaves_no_checkpoint_is_not_done(
    data: Path, teacher: Path, cache: Path, tmp_path: Path, commands: list[str]
) -> None:
    run = tmp_path / "run"
    words = [*arguments(data, teacher, cache, run, "--rounds", "1"), "--no-last-checkpoints"]
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"checkpoint_last\.pt: expected .* found none"):
            rounds.main(words)


def test_another_teacher_than_the_caches_is_named(
    data: Path, teacher: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds.check_inputs(rounds.Settings.of(arguments(data, teacher, cache, tmp_path)))
    assert not capsys.readouterr().out
    (other := tmp_path / "other.pt").write_bytes(b"another")
    rounds.check_inputs(rounds.Settings.of(arguments(data, other, cache, tmp_path)))
    found = capsys.readouterr().out
    assert found.startswith(f"{cache}: {other} (sha256 ")
    assert f"is not the cache's teacher: {teacher.name} (" in found


def test_sentences_too_long_for_the_teacher_are_not_drawn(
    data: Path, tmp_path: Path, commands: list[str]
) -> None:
    positions = ["--max-source-positions", "9", "--max-target-positions", "9"]
    positions.append("--skip-invalid-size-inputs-valid-test")
    words = ["--criterion", "cross_entropy", "--max-update", "60", "--disable-validation"]
    train(data, tmp_path / "short", *words, *positions)
    short = tmp_path / "short" / "checkpoint_last.pt"
    command(
        "sekd_fairseq.build_cache", data, "--path", short, "--output", tmp_path / "cache", "--cpu",
        "--top-k", "6", "--skip-too-long",
    )  # fmt: skip
    gold = indexed_dataset.make_dataset(str(data / "train.en-de.en"), "mmap")
    assert (gold.sizes > 9).any()
    run = tmp_path / "run"
    rounds.main([*arguments(data, short, tmp_path / "cache", run, "--rounds", "1"), *positions])
    drawn = indexed_dataset.make_dataset(str(run / "rounds/1/sources/train.en-de.en"), "mmap")
    assert 25 < len(drawn) < 51 and (drawn.sizes <= 9).all()
    assert len(TeacherCache.open(run / "rounds/1/cache/train1")) > 10


def test_a_prompt_is_not_counted_in_the_length_of_a_translation(data: Path, llm_data: Path) -> None:
    assert rounds.longest_translation(data) == ["--max-len-a", "2", "--max-len-b", "50"]
    references = indexed_dataset.make_dataset(str(llm_data / "train.en-de.de"), "mmap")
    longest = max(map(len, references))
    expected = ["--max-len-a", "0", "--max-len-b", str(2 * longest + 10)]
    assert rounds.longest_translation(llm_data) == expected


def test_a_teacher_translates_and_the_nearest_to_the_reference_is_taken(
    data: Path, teacher: Path, cache: Path, tmp_path: Path, commands: list[str]
) -> None:
    run = tmp_path / "run"
    options = ["--by", "teacher", "--nbest", "2", "--rounds", "1"]
    rounds.main(arguments(data, teacher, cache, run, *options))
    record = json.loads((run / "rounds.json").read_bytes())["rounds"]
    assert record[0]["not_the_first"] > 0
    # The teacher's own distributions at these prefixes, truncated as the cache of the references is.
    made = TeacherCache.open(run / "rounds/1/cache/train1")
    assert made.manifest.truncation == TeacherCache.open(cache / "train").manifest.truncation
    assert len(made) == record[0]["translations"] <= 51
    targets = indexed_dataset.make_dataset(str(run / "rounds/1/data/train1.en-de.de"), "mmap")
    assert made.manifest.tokens == sum(len(targets[i]) for i in range(len(made)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--share", "0"], "--share: expected above 0 and at most 1, found 0.0"),
        (["--nbest", "3"], "--nbest: expected at most --beam 2, found 3"),
        (["--temperature", "0.5"], "--temperature: has an effect with --sample only"),
        (["--rounds", "0"], "--rounds: expected 1 or more, found 0"),
    ],
)
def test_refused(change: list[str], message: str, tmp_path: Path) -> None:
    words = arguments(tmp_path, tmp_path, tmp_path, tmp_path, *change)
    with pytest.raises(UserError, match=message):
        rounds.Settings.of(words)
    with pytest.raises(UserError, match="--max-update: is given to fairseq-train by this command"):
        rounds.Settings.of(
            [*arguments(tmp_path, tmp_path, tmp_path, tmp_path), "--max-update", "5"]
        )
    with pytest.raises(UserError, match="--disable-validation: expected validation"):
        rounds.Settings.of(
            [*arguments(tmp_path, tmp_path, tmp_path, tmp_path), "--disable-validation"]
        )
    with pytest.raises(UserError, match="--train-sentences: expected none"):
        rounds.Settings.of(
            [*arguments(tmp_path, tmp_path, tmp_path, tmp_path), "--train-sentences", "5"]
        )
    assert np.isclose(
        rounds.Settings.of(arguments(tmp_path, tmp_path, tmp_path, tmp_path)).share, 0.25
    )
