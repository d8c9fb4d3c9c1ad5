"""Language models as teachers and students, on tiny random models of each family."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sekd_fairseq import export_hf
from sekd_fairseq.llm.loading import pretrained as hub
from sekd_fairseq.llm.tokenizer import load_tokenizer
from sekd_fairseq.teacher_cache import TeacherCache

from .conftest import (
    command,
    error_line,
    parameters,
    prepare,
    train_in_two_processes,
)
from .language_models import (
    FAMILIES,
    PLUGIN,
    check_exported,
    load,
    pretrained,
    train_llm,
    train_llm_arguments,
)
from .training import records

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pretrained_model_is_what_transformers_says(
    llm_data: Path, tokenizer: Path, tmp_path: Path, family: str
) -> None:
    tokens = len(load_tokenizer(str(tokenizer)).pieces)
    # More rows than the tokenizer has tokens, as padded matrices have.
    source = pretrained(tmp_path / "model", family, tokens + 6)
    options = ("--criterion", "cross_entropy", "--hf-model", source, "--disable-validation")
    train_llm(llm_data, tmp_path / "save", *options, "--lr", "1e-9", "--max-update", "1")
    model, task = load(tmp_path / "save" / "checkpoint_last.pt", llm_data)
    original = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    rows = model.vocabulary_rows
    task.load_dataset("test")
    dataset = task.dataset("test")
    batch = dataset.collater([dataset[i] for i in range(5)])  # sentences of different lengths
    with torch.no_grad():
        logits = model(**batch["net_input"])[0]
        features = model(**batch["net_input"], features_only=True)[0]
    torch.testing.assert_close(model.decoder.output_projection(features), logits)
    known = rows >= 0
    for place, sentence in enumerate(batch["id"].tolist()):
        item = dataset[sentence]
        prompt, target = item["source"][:-1], item["target"]
        ids = rows[torch.cat([prompt, target[:-1]])].unsqueeze(0)
        with torch.no_grad():
            expected = original(ids).logits[0, len(prompt) - 1 :]
        found = logits[place, : len(target)]
        torch.testing.assert_close(found[:, known], expected[:, rows[known]], atol=3e-4, rtol=1e-4)
    # The prompts' common beginning was computed once, and again only for other prompts or weights.
    prefix = model.decoder._prefix[0]
    instruction = "Translate from English to German.\nEnglish:"
    assert len(prefix) >= len(load_tokenizer(str(tokenizer)).encode(instruction))
    with torch.enable_grad():
        alone = model(**batch["net_input"])[0]
    inside = batch["target"].ne(1)
    torch.testing.assert_close(logits[inside], alone[inside], atol=3e-4, rtol=1e-4)
    one_row = dataset.collater([dataset[3]])["net_input"]
    with torch.no_grad():
        model(**one_row)
        assert np.array_equal(model.decoder._prefix[0], prefix)
        model.decoder._prefix = None
        model(**one_row)
        # All but the end of sentence and the token that predicts the translation's first.
        assert len(model.decoder._prefix[0]) == int(one_row["src_lengths"]) - 2
        model(**batch["net_input"])
        assert np.array_equal(model.decoder._prefix[0], prefix)
    model.train()
    assert model.decoder._prefix is None
    model.eval()
    # Step by step with the key-value cache, the beam reordered on the way.
    encoder_out = model.encoder(batch["net_input"]["src_tokens"])
    state: dict[str, Any] = {}
    previous = batch["net_input"]["prev_output_tokens"]
    order = torch.tensor([3, 1, 4, 0, 2])
    with torch.no_grad():
        for step in range(1, 4):
            if step == 3:
                model.decoder.reorder_incremental_state_scripting(state, order)
                encoder_out = model.encoder.reorder_encoder_out(encoder_out, order)
                previous, logits, batch["target"] = (
                    x[order] for x in (previous, logits, batch["target"])
                )
            one = model.decoder(previous[:, :step], encoder_out, incremental_state=state)[0]
            inside = batch["target"][:, step - 1].ne(1)
            torch.testing.assert_close(
                one[inside, 0], logits[inside, step - 1], atol=3e-4, rtol=1e-4
            )


def test_teacher_cache_student_generation_and_export(
    llm_data: Path, tokenizer: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(FAMILIES["llama-tied"]))
    scratch = ("--hf-config", config)
    train_llm(
        llm_data, tmp_path / "teacher", "--criterion", "cross_entropy", *scratch, "--max-update",
        "150", "--disable-validation",
    )  # fmt: skip
    teacher = tmp_path / "teacher" / "checkpoint_last.pt"
    config.unlink()  # the checkpoint holds its configuration
    cache = tmp_path / "cache"
    out = command(
        "sekd_fairseq.build_cache", llm_data, "--path", teacher, "--output", cache, "--cpu",
        "--top-p", "0.95", "--subset", "train,valid,test", "--allow-implausible",
    )  # fmt: skip
    assert "hf_causal_lm" in out
    opened = TeacherCache.open(cache / "test")
    target_tokens = json.loads((llm_data.parent / "data.json").read_text())["target_tokens"]
    assert opened.manifest.tokens == target_tokens["test"]  # the prompt is not distilled
    # The cache's distributions are the teacher's.
    model, task = load(teacher, llm_data)
    task.load_dataset("test")
    sample = task.dataset("test").collater([task.dataset("test")[1]])
    log_p = model(**sample["net_input"])[0][0].log_softmax(-1)
    gold = log_p.gather(1, sample["target"][0].unsqueeze(1)).squeeze(1)
    np.testing.assert_allclose(opened[1].gold_logprob, gold.detach(), atol=1e-4)
    config.write_text(json.dumps({**FAMILIES["llama"], "num_hidden_layers": 1}))
    kd = ("--criterion", "self_evolution_kd", "--teacher-cache", cache, *scratch)
    losses = {}
    for chunk in ("0", "16"):
        log = train_llm(
            llm_data, tmp_path / chunk, *kd, "--sekd-chunk-tokens", chunk,
            "--hf-gradient-checkpointing",
        )  # fmt: skip
        assert "no effect" not in log
        losses[chunk] = [
            line.split('"loss": "')[1][:5] for line in log.splitlines() if '"loss"' in line
        ]
    assert losses["0"] == losses["16"] and len(losses["0"]) == 3
    student = tmp_path / "0" / "checkpoint_best.pt"
    generated = command(
        "fairseq_cli.generate", llm_data, *PLUGIN, "--path", student, "--gen-subset", "test",
        "--cpu", "--beam", "3", "--max-len-b", "12", "--prefix-size", "1",
    )  # fmt: skip
    lines = [line for line in generated.splitlines() if line.startswith("D-")]
    assert len(lines) == 9
    # Detokenised text, and the given first token of each reference.
    assert not any("▁" in line.split("\t")[2] for line in lines)
    pieces = {line.split("\t")[0]: line.split("\t")[-1].split() for line in generated.splitlines()}
    for number in range(9):
        reference = task.dataset("test")[number]["target"]
        assert pieces[f"H-{number}"][0] == task.target_dictionary[int(reference[0])]
    command(
        "sekd_fairseq.score", llm_data, "--path", student, "--teacher-cache", cache, "--run",
        tmp_path / "run", "--cpu",
    )  # fmt: skip
    assert list((tmp_path / "run" / "tokens" / "test").glob("*.parquet"))
    command("sekd_fairseq.export_hf", student, "--data", llm_data, "--output", tmp_path / "hf")
    check_exported(tmp_path / "hf", load(student, llm_data)[0], task.dataset("test"), 4)
    # And back again: the exported folder is a model to start from.
    log = train_llm(
        llm_data, tmp_path / "again", "--criterion", "cross_entropy", "--hf-model", tmp_path / "hf",
        "--max-update", "1", "--eval-bleu", "--eval-bleu-args", '{"beam": 1, "max_len_b": 5}',
        "--eval-bleu-print-samples",
    )  # fmt: skip
    # Of text, and not of symbols.
    shown = re.search("example reference: (.*)", log)
    assert shown and shown[1] in (llm_data.parent / "valid.de").read_text().splitlines()
    # Symbols that are joined to words are none.
    removed = ("--remove-bpe", "sentencepiece")
    (tmp_path / "one").write_text("one two\n")
    for program, options in (
        ("generate", ("--gen-subset", "test")),
        ("interactive", ("--input", tmp_path / "one")),
    ):
        line = error_line(
            command(
                f"fairseq_cli.{program}", llm_data, *PLUGIN, "--path", student, "--cpu", "--beam", "1",
                "--max-len-b", "5", *options, *removed, check=False,
            )
        )  # fmt: skip
        assert "leave out --remove-bpe" in line and len(line) < 300
    line = error_line(
        train_llm(
            llm_data, tmp_path / "bleu", "--criterion", "cross_entropy", *scratch, "--max-update",
            "1", "--eval-bleu", "--eval-bleu-args", '{"beam": 1, "max_len_b": 5}',
            "--eval-bleu-remove-bpe", "sentencepiece", check=False,
        )
    )  # fmt: skip
    assert "--eval-bleu-remove-bpe" in line


def test_two_processes_train_as_one(llm_data: Path, tokenizer: Path, tmp_path: Path) -> None:
    tokens = len(load_tokenizer(str(tokenizer)).pieces)
    source = pretrained(tmp_path / "model", "llama", tokens)
    command(
        "sekd_fairseq.import_hf", source, "--data", llm_data, "--output", tmp_path / "teacher.pt"
    )
    command(
        "sekd_fairseq.build_cache", llm_data, "--path", tmp_path / "teacher.pt", "--output",
        tmp_path / "cache", "--cpu", "--allow-implausible",
    )  # fmt: skip
    config = tmp_path / "config.json"
    config.write_text(json.dumps(FAMILIES["llama"]))
    options = (
        "--criterion", "self_evolution_kd", "--teacher-cache", tmp_path / "cache", "--hf-config",
        config, "--optimizer", "sgd", "--lr", "0.1", "--batch-size", "6", "--max-tokens", "9999",
        "--disable-validation", "--seed", "2", "--sekd-chunk-tokens", "16",
    )  # fmt: skip
    train_llm(llm_data, tmp_path / "one", *options, "--update-freq", "2")
    train_in_two_processes(train_llm_arguments(llm_data, tmp_path / "two", *options))
    one, two = (parameters(tmp_path / name / "checkpoint_last.pt") for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=0, atol=2e-5)
    # An epoch of 7 batches: in its second update the second process has one batch, and one for show.
    batches = ("--batch-size", "9", "--max-update", "2", "--gamma-type", "absolute")
    options = (*options, *batches)
    log = train_llm(llm_data, tmp_path / "three", *options, "--update-freq", "4")
    arguments = train_llm_arguments(llm_data, tmp_path / "four", *options, "--update-freq", "2")
    train_in_two_processes(arguments, tmp_path / "log")
    one, two = (parameters(tmp_path / name / "checkpoint_last.pt") for name in ("three", "four"))
    torch.testing.assert_close(one, two, rtol=0, atol=2e-5)
    last = [records(text, "")[-1] for text in (log, (tmp_path / "log").read_text())]
    assert last[0]["num_updates"] == last[1]["num_updates"] == "2"
    for key in ("loss", "wpb", "bsz", "padding", "hard_share", "difficulty"):
        assert last[0][key] == last[1][key]


def test_adapters_and_fewer_layers(llm_data: Path, tokenizer: Path, tmp_path: Path) -> None:
    tokens = len(load_tokenizer(str(tokenizer)).pieces)
    source = pretrained(tmp_path / "model", "qwen2", tokens)
    base = ("--criterion", "cross_entropy", "--hf-model", source, "--disable-validation")
    train_llm(llm_data, tmp_path / "save", *base, "--lora-r", "2", "--max-update", "5")
    path = tmp_path / "save" / "checkpoint_last.pt"
    state = torch.load(path, map_location="cpu")["model"]
    assert all("lora_" in key or key in ("vocabulary_rows", "base_sample") for key in state)
    model, task = load(path, llm_data)
    # The average of the weights, of adapters and of whole numbers that come with them.
    ema = ("--store-ema", "--ema-decay", "0", "--max-update", "2", "--lora-r", "2")
    train_llm(llm_data, tmp_path / "averaged", *base, *ema)
    averaged = torch.load(tmp_path / "averaged" / "checkpoint_last.pt", map_location="cpu")
    for key, value in averaged["model"].items():
        assert torch.equal(averaged["extra_state"]["ema"][key], value)
    command(
        "sekd_fairseq.export_hf",
        path,
        "--data",
        llm_data,
        "--output",
        tmp_path / "hf",
        "--base",
        source,
    )
    task.load_dataset("valid")
    exported, ids = check_exported(tmp_path / "hf", model, task.dataset("valid"), 0)
    # Not the model it started from: the adapters were trained.
    original = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    assert not torch.allclose(original(ids).logits, exported(ids).logits[..., :tokens], atol=1e-3)
    train_llm(llm_data, tmp_path / "one", *base, "--hf-layers", "1")
    whole = tmp_path / "one" / "checkpoint_last.pt"
    line = error_line(
        command(
            "fairseq_cli.generate",
            llm_data,
            *PLUGIN,
            "--path",
            whole,
            "--print-alignment",
            check=False,
        )
    )
    assert "--print-alignment" in line
    # Neither kind of checkpoint is a beginning of the other: adapters keep what --hf-model names.
    for options, start in ((("--lora-r", "2"), whole), (("--hf-layers", "1"), path)):
        begin = (*base, *options, "--finetune-from-model", start)
        line = error_line(train_llm(llm_data, tmp_path / "other", *begin, check=False))
        assert "sekd_fairseq.export_hf" in line
    model, _ = load(tmp_path / "one" / "checkpoint_last.pt", llm_data)
    assert len(model.decoder.model.model.layers) == 1


def test_pruned_vocabulary_is_restored(
    tokenizer: Path, llm_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = prepare(tokenizer, llm_text, tmp_path / "data", "--prune-vocab", "--shots", "2")
    assert '"unknown_tokens": 0' in out
    data = tmp_path / "data" / "bin"
    pieces = load_tokenizer(str(tokenizer)).pieces
    source = pretrained(tmp_path / "model", "gemma3", len(pieces))
    train_llm(
        data, tmp_path / "save", "--criterion", "cross_entropy", "--hf-model", source,
        "--disable-validation", "--lr", "1e-9",
    )  # fmt: skip
    model, _ = load(tmp_path / "save" / "checkpoint_last.pt", data)
    assert 259 <= len(model.vocabulary_rows) < len(pieces)
    export = ("sekd_fairseq.export_hf", tmp_path / "save" / "checkpoint_last.pt", "--data", data)
    command(*export, "--output", tmp_path / "hf")  # the others' rows are those of --hf-model
    ids = torch.arange(3, 40).unsqueeze(0)
    one, other = (
        transformers.AutoModelForCausalLM.from_pretrained(path).eval()(ids).logits
        for path in (source, tmp_path / "hf")
    )
    torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    source.rename(tmp_path / "moved")
    out = command(*export, "--output", tmp_path / "mean")
    known = model.vocabulary_rows[model.vocabulary_rows >= 0]
    assert f"{int(known.max()) + 1 - len(known)} tokens have no symbol" in out
    command(*export, "--output", tmp_path / "based", "--base", tmp_path / "moved")
    name = "model.safetensors"
    assert (tmp_path / "based" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    # A student that began from a hub id.
    state = torch.load(tmp_path / "save" / "checkpoint_last.pt", weights_only=False)
    state["cfg"]["model"]["hf_model"] = "Org/Model"
    torch.save(state, tmp_path / "hub.pt")
    monkeypatch.setattr(
        export_hf, "pretrained",
        lambda name, *_: hub({"Org/Model": str(tmp_path / "moved")}[name], None),
    )  # fmt: skip
    hub_export = (str(tmp_path / "hub.pt"), str(data), tmp_path / "hub", None, None)
    export_hf.export(*hub_export)
    assert (tmp_path / "hub" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_bad_input_ends_with_one_line(
    llm_data: Path, data: Path, tokenizer: Path, llm_text: Path, tmp_path: Path
) -> None:
    ce = ("--criterion", "cross_entropy")

    def refuse(*arguments: object) -> str:
        return error_line(train_llm(*arguments, check=False))

    save = tmp_path / "save"
    assert "found neither" in refuse(llm_data, save, *ce)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(json.dumps(FAMILIES["llama"]))
    assert "with its weights" in refuse(llm_data, save, *ce, "--hf-model", tmp_path / "empty")
    small = pretrained(tmp_path / "small", "llama", 100)
    assert "the tokenizer of this model" in refuse(llm_data, save, *ce, "--hf-model", small)
    config = ("--hf-config", tmp_path / "empty" / "config.json")
    assert "prepare_llm_data" in refuse(data, save, *ce, *config)
    (tmp_path / "empty" / "config.json").write_text(
        json.dumps({**FAMILIES["llama"], "max_position_embeddings": 20})
    )
    assert "positions" in refuse(
        llm_data, save, *ce, *config, "--skip-invalid-size-inputs-valid-test"
    )
    assert "--truncate-source" in refuse(llm_data, save, *ce, *config, "--truncate-source")
    assert "expected --hf-model" in refuse(llm_data, save, *ce, *config, "--lora-r", "2")
    gpt2 = pretrained(tmp_path / "gpt2", "gpt2", len(load_tokenizer(str(tokenizer)).pieces))
    layers = ("--hf-model", gpt2, "--hf-layers", "1")
    assert "GPT2LMHeadModel" in refuse(llm_data, save, *ce, *layers)
    template = tmp_path / "template"
    template.write_text("Translate: {source}")
    line = error_line(
        prepare(tokenizer, llm_text, tmp_path / "no", "--template", template, check=False)
    )
    assert "{src}" in line and not (tmp_path / "no").exists()
    line = error_line(prepare(tmp_path / "none", llm_text, tmp_path / "no", check=False))
    assert "--tokenizer" in line


def test_data_are_read_in_their_own_direction(llm_data: Path, tmp_path: Path) -> None:
    """Their sources are prompts of one direction; of the other they would be the translations."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(FAMILIES["llama"]))
    options = ("--criterion", "cross_entropy", "--hf-config", config)
    languages = ("--source-lang", "de", "--target-lang", "en")
    line = error_line(train_llm(llm_data, tmp_path / "save", *options, *languages, check=False))
    assert "from en to de" in line
    assert "sekd_fairseq.prepare_llm_data --source-lang de --target-lang en" in line


def test_adapters_travel(
    llm_data: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data and base moved, the checkpoint used from another directory: what is given wins."""
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(llm_data, first / "data")
    pretrained(first / "base", "llama", len(load_tokenizer(str(tokenizer)).pieces))
    monkeypatch.chdir(first)
    arguments = train_llm_arguments(
        Path("data"), Path("lora"), "--criterion", "cross_entropy", "--hf-model", "base", "--lora-r",
        "2", "--disable-validation",
    )  # fmt: skip
    command(*arguments, cwd=first)
    path = first / "lora" / "checkpoint_last.pt"
    second.mkdir()
    generate = [
        "fairseq_cli.generate", *PLUGIN, "--path", path, "--cpu", "--beam", "2", "--max-len-b", "4",
    ]  # fmt: skip
    # From elsewhere, the base where it was.
    command(*generate, first / "data", cwd=second)
    data, base = ((first / name).rename(second / name) for name in ("data", "base"))
    line = error_line(command(*generate, "data", cwd=second, check=False))
    assert str(first / "base") in line and "--hf-model" in line and "--model-overrides" in line
    out = command(*generate, "data", "--model-overrides", "{'hf_model': 'base'}", cwd=second)
    assert out.count("H-") == 9
    score = ["sekd_fairseq.score", "data", "--path", path, "--run", "run", "--cpu"]
    assert "--hf-model" in error_line(command(*score, cwd=second, check=False))
    command(*score, "--hf-model", "base", cwd=second)
    build = ["sekd_fairseq.build_cache", "data", "--path", path, "--output", "cache", "--cpu"]
    build += ["--subset", "test", "--allow-implausible"]
    assert "--hf-model" in error_line(command(*build, cwd=second, check=False))
    command(*build, "--hf-model", "base", cwd=second)
    command(
        "sekd_fairseq.export_hf", path, "--data", data, "--output", tmp_path / "hf", "--base", base
    )
