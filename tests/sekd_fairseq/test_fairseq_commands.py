"""The plugin in fairseq's other commands: generate, interactive, validate, hydra."""

import json
from pathlib import Path

import pytest
import torch
from fairseq.ngram_repeat_block import NGramRepeatBlock
from sacrebleu.metrics import BLEU

from sekd_fairseq import run_lock
from sekd_fairseq.generated import read_generated

from .conftest import ROOT, command, error_line
from .training import PLUGIN, records


def test_the_length_penalty_is_chosen_as_fairseq_would_translate(
    data: Path, student: tuple[Path, str], text: Path, tmp_path: Path
) -> None:
    words = (
        "fairseq_cli.generate", data, *PLUGIN, "--path", student[0] / "checkpoint_best.pt",
        "--gen-subset", "valid", "--cpu", "--beam", "4", "--max-len-b", "12",
    )  # fmt: skip
    values, references = (0.0, 1.1, 3.0), (text / "valid.de").read_text().splitlines()
    expected = {}
    for value in values:
        (tmp_path / "one.out").write_text(command(*words, "--lenpen", value))
        lines = read_generated(tmp_path / "one.out", "D-", len(references))
        bleu = BLEU().corpus_score(lines, [references])
        expected[value] = (bleu.score, bleu.sys_len / bleu.ref_len)
    assert len(set(expected.values())) > 1
    generated = tmp_path / "valid.out"
    tune = (
        "sekd_fairseq.tune_lenpen", generated, "--run", tmp_path / "run", "--reference", text / "valid.de",
        "--target-lang", "de", "--values", *values,
    )  # fmt: skip
    for wrong, told in (("--lenpen=1 --nbest=4", "translate with --lenpen 0"),
                        ("--lenpen=0", "with --nbest as large as --beam")):  # fmt: skip
        generated.write_text(command(*words, *wrong.split()))
        assert told in error_line(command(*tune, check=False))
    generated.write_text(command(*words, "--lenpen", "0", "--nbest", "4"))
    printed = command(*tune)
    chosen = json.loads((tmp_path / "run" / "length_penalty.json").read_text())
    found = {row["lenpen"]: (row["bleu"], row["length_ratio"]) for row in chosen["grid"]}
    assert found == expected
    best = max(values, key=lambda value: expected[value][0])
    assert chosen["best"] == best and f"length penalty {best:g}, BLEU" in printed
    (generated.with_name("cut.out")).write_text(generated.read_text().partition("D-7")[0])
    line = error_line(command(*tune[:1], generated.with_name("cut.out"), *tune[2:], check=False))
    assert "expected translations of 21 sentences" in line


def test_generate_interactive_and_validate(
    data: Path, student: tuple[Path, str], text: Path, tmp_path: Path
) -> None:
    best = student[0] / "checkpoint_best.pt"
    out = command(
        "fairseq_cli.generate", data, *PLUGIN, "--path", best, "--gen-subset", "test", "--cpu",
        "--beam", "2", "--max-len-b", "12",
    )  # fmt: skip
    # 13 sentences are no multiple of 8: fairseq's default would drop 5 of them in silence.
    assert sum(line.startswith("D-") for line in out.splitlines()) == 13
    (tmp_path / "test.out").write_text(out)
    scores = command(
        "sekd_fairseq.evaluate", tmp_path / "test.out", "--run", tmp_path / "run", "--source",
        text / "test.en", "--reference", text / "test.de", "--target-lang", "de", "--lenpen", "1",
    )  # fmt: skip
    assert "13 sentences" in scores
    written = json.loads((tmp_path / "run" / "scores.json").read_text())["test"]
    assert written["bleu"]["signature"].startswith("nrefs:1") and written["sentences"] == 13
    assert written["lenpen"] == 1.0 and written["length_ratio"] > 0
    lines = (tmp_path / "run" / "hyps" / "test.ref.txt").read_text()
    assert lines == (text / "test.de").read_text()
    out = command(
        "fairseq_cli.interactive", data, *PLUGIN, "--path", best, "--cpu", "--max-len-b", "12",
        "--input", text / "valid.en",
    )  # fmt: skip
    assert sum(line.startswith("D-") for line in out.splitlines()) == 21
    out = command(
        "fairseq_cli.validate", data, "--user-dir", ROOT / "sekd_fairseq", "--path", best, "--cpu",
        "--log-format", "json", "--task", "self_evolution_kd", "--max-tokens", "300",
    )  # fmt: skip
    assert "kl_hard" in out
    # Fewer translations than references: counted and refused.
    (tmp_path / "cut.out").write_text(
        "".join((tmp_path / "test.out").read_text().partition("D-7")[0])
    )
    line = error_line(
        command(
            "sekd_fairseq.evaluate",
            tmp_path / "cut.out",
            "--run",
            tmp_path / "run2",
            "--source",
            text / "test.en",
            "--reference",
            text / "test.de",
            "--target-lang",
            "de",
            check=False,
        )
    )
    assert "expected 13 translations" in line and not (tmp_path / "run2").exists()


def test_ngrams_are_not_repeated() -> None:
    """fairseq looks at the padding after the tokens, where its CUDA extension is not built."""
    tokens = torch.tensor([[2, 5, 6, 7, 5, 6, 1, 1], [2, 5, 6, 7, 6, 5, 1, 1]])
    allowed = NGramRepeatBlock(3, use_extension=False)(tokens, torch.zeros(2, 9), 1, 2, 5)
    assert allowed.isinf().nonzero().tolist() == [[0, 7]]


def test_validation_sees_every_sentence(student: tuple[Path, str]) -> None:
    # 21 sentences in batches that are no multiple of 8.
    record = records(student[1], "valid_")[-1]
    batches = 21 / float(record["valid_bsz"])
    assert batches == pytest.approx(round(batches), abs=0.01)


@pytest.mark.slow
def test_hydra_configuration(data: Path, cache: Path, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.mkdir()
    (config / "train.yaml").write_text(
        f"""
common: {{user_dir: {ROOT / "sekd_fairseq"}, cpu: true, log_format: json, log_interval: 1}}
task: {{_name: self_evolution_kd, data: {data}, teacher_cache: {cache}}}
criterion: {{_name: self_evolution_kd, lambda_max: 0.4, gamma_type: absolute, gamma: 0.5}}
model: {{_name: transformer, share_all_embeddings: true,
        encoder: {{embed_dim: 32, ffn_embed_dim: 32, layers: 1, attention_heads: 2}},
        decoder: {{embed_dim: 32, ffn_embed_dim: 32, layers: 1, attention_heads: 2}}}}
optimizer: {{_name: adam}}
lr_scheduler: {{_name: fixed}}
dataset: {{max_tokens: 300}}
optimization: {{max_update: 5, lr: [0.005]}}
checkpoint: {{save_dir: {tmp_path / "save"}, no_epoch_checkpoints: true}}
"""
    )
    out = command(
        "fairseq_cli.hydra_train",
        "--config-dir",
        config,
        "--config-name",
        "train",
        cwd=tmp_path,
        fresh=True,
    )
    assert (tmp_path / "save" / "checkpoint_last.pt").exists(), out
    assert (tmp_path / "save" / run_lock.NAME).exists()  # no other training writes there meanwhile
    command(
        "fairseq_cli.generate", data, *PLUGIN, "--path", tmp_path / "save" / "checkpoint_last.pt",
        "--gen-subset", "test", "--cpu",
    )  # fmt: skip


def block_of_docs(after: str, language: str) -> str:
    """The first block of a language after some words of docs/method.md."""
    rest = (ROOT / "docs" / "method.md").read_text(encoding="utf-8").split(after, 1)[1]
    return rest.split(f"```{language}\n", 1)[1].split("```", 1)[0]


@pytest.mark.slow
def test_the_hydra_configuration_of_the_docs_trains(
    data: Path, cache: Path, tmp_path: Path
) -> None:
    """As it stands, from a directory with a space, where its relative paths lie."""
    here = tmp_path / "a b"
    (here / "conf").mkdir(parents=True)
    text = block_of_docs("fairseq-hydra-train", "yaml")
    for name, place in (("DATA", data), ("CACHE", cache), ("sekd_fairseq", ROOT / "sekd_fairseq")):
        (here / name).symlink_to(place)
        assert f": {name}" in text
    (here / "conf" / "sekd.yaml").write_text(text)
    out = command(
        "fairseq_cli.hydra_train", "--config-dir", "conf", "--config-name", "sekd",
        "optimization.max_update=3", "common.cpu=true", cwd=here, fresh=True,
    )  # fmt: skip
    assert (here / "runs/mine/se_kd/checkpoints/checkpoint_best.pt").exists(), out


def test_every_option_is_listed() -> None:
    out = command("sekd_fairseq.options")
    for option in ("--teacher-cache", "--lambda-max", "--hf-model", "--select-share", "--alpha"):
        assert f"  {option} " in out
