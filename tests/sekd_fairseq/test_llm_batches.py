"""Batches of prompts and translations: positions, sizes, padding."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq.data.indexed_dataset import MMapIndexedDataset
from fairseq.utils import resolve_max_positions

from sekd_fairseq.errors import UserError
from sekd_fairseq.teacher_cache import TeacherCache

from .conftest import command, error_line, train
from .language_models import FAMILIES, train_llm


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_positions_are_for_prompt_and_translation_together(
    llm_data: Path, tmp_path: Path, family: str
) -> None:
    import fairseq.tasks
    from fairseq.sequence_generator import SequenceGenerator

    from sekd_fairseq.checkpoints import language_model_config, position_limits
    from sekd_fairseq.splits import too_long

    name = "n_positions" if family == "gpt2" else "max_position_embeddings"
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**FAMILIES[family], name: 60}))
    cfg = language_model_config(str(llm_data), "--hf-config", str(config))
    task = fairseq.tasks.setup_task(cfg.task)
    torch.manual_seed(1)
    model = task.build_model(cfg.model).eval()
    task.load_dataset("train")
    dataset = task.dataset("train")
    assert model.joint_positions == 62
    # A long prompt and a long translation that fit, each with another's short one.
    word = torch.arange(10, 20)
    rows = [
        {"id": i, "source": torch.cat([word.repeat(6)[:prompt], torch.tensor([2])]),
         "target": torch.cat([word.repeat(6)[:translation], torch.tensor([2])])}
        for i, (prompt, translation) in enumerate([(55, 5), (10, 50)])
    ]  # fmt: skip
    batch = dataset.collater(rows)["net_input"]
    with torch.enable_grad():
        logits = model(**batch)[0]
    for i, row in enumerate(rows):
        alone = model(**dataset.collater([row])["net_input"])[0]
        length = len(row["target"])
        place = int(dataset.collater(rows)["id"].eq(i).nonzero())
        torch.testing.assert_close(logits[place, :length], alone[0], atol=1e-4, rtol=1e-4)
    rows[1]["source"] = torch.cat([word.repeat(2)[:11], torch.tensor([2])])
    with pytest.raises(UserError), torch.enable_grad():
        model(**dataset.collater(rows)["net_input"])
    # Data that do not fit are named before they are read, and left out where that is asked for.
    sizes = dataset.sizes.sum(axis=1)
    model_limit = int(np.median(sizes))
    limits = [(1000, 1000, model_limit)]
    assert len(too_long(dataset, limits, "train", allow=True)) == (sizes > model_limit).sum() > 0
    assert position_limits([model]) == [(60, 60, 62)]
    task.joint_positions = model_limit
    indices = np.arange(len(dataset))
    kept = task.filter_indices_by_size(indices, dataset, None, True)
    assert len(kept) == (sizes <= model_limit).sum()
    with pytest.raises(SystemExit):
        task.filter_indices_by_size(indices, dataset, None, False)
    # Generation ends at the last position.
    generator = SequenceGenerator([model], task.target_dictionary, beam_size=2, max_len_b=200)
    found = generator.generate([model], dataset.collater([rows[0], rows[1]]))
    prompts = dict(zip(dataset.collater(rows)["id"].tolist(), found, strict=True))
    for i, row in enumerate(rows):
        for hypothesis in prompts[i]:
            assert len(row["source"]) - 1 + len(hypothesis["tokens"]) - 1 <= 60
            assert torch.isfinite(hypothesis["score"])


def test_a_long_prompt_needs_no_option(llm_data: Path, tmp_path: Path) -> None:
    """fairseq takes 1,024 tokens of each side unless it is told otherwise."""
    import fairseq.tasks

    from sekd_fairseq.checkpoints import language_model_config

    config = tmp_path / "config.json"
    config.write_text(json.dumps({**FAMILIES["llama"], "max_position_embeddings": 3000}))
    options = ("--hf-config", str(config))
    for more, limits in (((), (3000, 3000)), (("--max-source-positions", "50"), (50, 3000))):
        cfg = language_model_config(str(llm_data), *options, *more)
        task = fairseq.tasks.setup_task(cfg.task)
        assert task.max_positions()[1] == 1024  # of a model that is not known yet
        model = task.build_model(cfg.model)
        found = resolve_max_positions(task.max_positions(), model.max_positions())
        assert found == limits
    # One line where a side is too long.
    words = (*options, "--criterion", "cross_entropy", "--max-source-positions", "50")
    line = error_line(train_llm(llm_data, tmp_path / "save", *words, check=False))
    assert "50" in line


def test_batches_are_cut_by_prompt_and_translation_together(llm_data: Path, tmp_path: Path) -> None:
    import fairseq.tasks

    from sekd_fairseq.checkpoints import language_model_config
    from sekd_fairseq.splits import token_batches

    config = tmp_path / "config.json"
    config.write_text(json.dumps(FAMILIES["llama"]))
    cfg = language_model_config(str(llm_data), "--hf-config", str(config))
    task = fairseq.tasks.setup_task(cfg.task)
    model = task.build_model(cfg.model)
    task.load_dataset("train")
    dataset = task.dataset("train")
    iterator = task.get_batch_iterator(dataset, max_tokens=600, seed=3)
    for batches in (iterator.frozen_batches, token_batches(dataset, range(len(dataset)), 600)):
        assert sorted(i for batch in batches for i in batch) == list(range(len(dataset)))
        computed = padding = 0
        for indices in batches:
            batch = dataset.collater([dataset[i] for i in indices])
            read: list[tuple[int, ...]] = []
            embedding = model.decoder.model.get_input_embeddings()
            hook = embedding.register_forward_hook(
                lambda _, inputs, __, read=read: read.append(tuple(inputs[0].shape))
            )
            model(**batch["net_input"])
            hook.remove()
            # By hand: each row is a prompt without its end and a translation without its end.
            source, target = dataset.sizes[indices].T
            rows = source - 1 + target - 1
            assert read == [(len(indices), rows.max())] and rows.max() * len(indices) <= 600
            assert batch["net_input"]["longest"] == rows.max()
            assert batch["positions"] == (rows.max() * len(rows), (rows.max() - rows).sum())
            computed, padding = computed + batch["positions"][0], padding + batch["positions"][1]
        assert 0 < padding / computed < 0.1
    # A model that is no language model counts the longer side, as fairseq does.
    plain = fairseq.tasks.setup_task(cfg.task)
    plain.load_dataset("train")
    indices = np.arange(len(dataset))
    assert (plain.dataset("train").num_tokens_vec(indices) == dataset.sizes.max(axis=1)).all()
    assert "longest" not in plain.dataset("train").collater([dataset[0]])["net_input"]


def test_a_sentence_longer_than_a_batch_is_named(
    llm_data: Path, data: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(FAMILIES["llama"]))
    sides = [MMapIndexedDataset(str(llm_data / f"train.en-de.{side}")) for side in ("en", "de")]
    sizes = np.array([[len(side[i]) for side in sides] for i in range(len(sides[0]))])
    limit = int(sizes.sum(axis=1).max()) - 3  # one less than prompt and translation without ends
    assert sizes.max() <= limit
    ce = ("--criterion", "cross_entropy")
    options = (*ce, "--hf-config", config, "--max-update", "1", "--max-tokens")
    # fairseq leaves out of training what is too long.
    out = train_llm(llm_data, tmp_path / "save", *options, limit, "--disable-validation")
    assert f"1 of {len(sizes)} sentences are left out: longer than a batch" in out
    out = train_llm(llm_data, tmp_path / "none", *options, "9", check=False)
    assert f"all {len(sizes)} sentences are longer than" in error_line(out)
    few = ("--max-tokens-valid", "70")
    line = error_line(train_llm(llm_data, tmp_path / "valid", *options, "300", *few, check=False))
    assert "--max-tokens is 70" in line and "prompt and translation together" in line
    skip = "--skip-invalid-size-inputs-valid-test"
    out = train_llm(llm_data, tmp_path / "skip", *options, "300", *few, skip)
    assert "of 9 sentences are left out" in out
    # Of a model with an encoder too.
    few = ("--max-tokens-valid", "5", "--max-update", "1")
    assert "--max-tokens is 5" in error_line(
        train(data, tmp_path / "plain", *ce, *few, check=False)
    )


def test_a_cache_skips_what_the_teacher_cannot_read(llm_data: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**FAMILIES["llama"], "max_position_embeddings": 72}))
    options = ("--hf-config", config, "--criterion", "cross_entropy", "--max-update", "1")
    train_llm(llm_data, tmp_path / "save", *options, "--disable-validation")
    command(
        "sekd_fairseq.build_cache", llm_data, "--path", tmp_path / "save" / "checkpoint_last.pt",
        "--output", tmp_path / "cache", "--subset", "train", "--cpu", "--max-tokens", "80",
        "--skip-too-long", "--allow-implausible",
    )  # fmt: skip
    cache = TeacherCache.open(tmp_path / "cache" / "train")
    assert 0 < cache.manifest.quality["one_hot"] < 1 and cache.tail_law().min() > 0


def test_training_logs_the_share_of_padding(llm_data: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(FAMILIES["llama"]))
    out = train_llm(
        llm_data, tmp_path / "save", "--criterion", "cross_entropy", "--hf-config", config,
        "--disable-validation",
    )  # fmt: skip
    records = [json.loads(line[line.index("{") :]) for line in out.splitlines() if '"ups"' in line]
    shares = [float(record["padding"]) for record in records]
    assert len(shares) == 3 and all(0 <= share < 0.1 for share in shares)


def test_a_beam_reads_its_prompt_once_and_what_all_begin_with_once_at_all(
    llm_data: Path, tmp_path: Path
) -> None:
    import fairseq.tasks
    from fairseq.sequence_generator import SequenceGenerator

    from sekd_fairseq.checkpoints import language_model_config

    config = tmp_path / "config.json"
    config.write_text(json.dumps({**FAMILIES["mistral"], "sliding_window": 9}))
    cfg = language_model_config(str(llm_data), "--hf-config", str(config))
    task = fairseq.tasks.setup_task(cfg.task)
    torch.manual_seed(1)
    model = task.build_model(cfg.model).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    task.load_dataset("train")
    dataset = task.dataset("train")
    batch = dataset.collater([dataset[i] for i in (0, 9, 17, 20)])
    widths = batch["net_input"]["src_lengths"] - 1
    assert len(set(widths.tolist())) > 1
    read: list[tuple[int, ...]] = []
    embedding = model.decoder.model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, inputs, __: read.append(tuple(inputs[0].shape)))
    found = []
    for shared in (model.decoder.shared_prefix, 10**6):
        model.decoder.shared_prefix, model.decoder._prefix = shared, None
        generator = SequenceGenerator([model], task.target_dictionary, beam_size=3, max_len_b=9)
        for known in (True, False):  # of another dataset, as that of fairseq-interactive
            net_input = {k: v for k, v in batch["net_input"].items() if known or k != "beginning"}
            read.clear()
            found.append(generator.generate([model], {**batch, "net_input": net_input}))
            prefix = len(batch["net_input"]["beginning"]) if shared < 10**6 else 0
            first = [(1, prefix)] if prefix and known else []
            width = batch["net_input"]["src_tokens"].size(1) - prefix
            assert read[: len(first) + 2] == [*first, (4, width), (4 * 3, 1)]
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            for a, b in zip(one, two, strict=True):
                assert a["tokens"].tolist() == b["tokens"].tolist()
                torch.testing.assert_close(
                    a["positional_scores"], b["positional_scores"], atol=1e-4, rtol=1e-4
                )
    # And that is what the model says of each translation in one pass.
    for row, sentence in enumerate(batch["id"].tolist()):
        item = dataset[sentence]
        for hypothesis in found[0][row]:
            target = hypothesis["tokens"]
            tokens = torch.cat([item["source"][:-1], target[:-1]]).unsqueeze(0)
            with torch.no_grad():
                logits = model.decoder.lm(input_ids=tokens).logits[0, len(item["source"]) - 2 :]
            expected = logits.log_softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(
                hypothesis["positional_scores"], expected, atol=1e-3, rtol=1e-3
            )
