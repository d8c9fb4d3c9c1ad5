"""Runs and records: found, checked, refused in one line that names the place."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import WriteRun

from analysis.chapters.examples import BYTES, _texts
from analysis.chapters.sentences import sentence_table
from analysis.chapters.transfer import transfer_tables
from analysis.report.content import scope_blocks
from analysis.runs.errors import RecordError, UserError
from analysis.runs.files import hash_lines, read_json, sealed_json
from analysis.runs.run_record import LINES, discover
from analysis.runs.simulated import (
    make_corpus,
    record_columns,
    student,
    write_columns,
    write_run_directory,
)
from analysis.runs.texts import read_lines
from analysis.runs.token_records import (
    COLUMNS,
    iterate_columns,
    read_columns,
    read_pieces,
    read_token_set,
    without_ids,
    write_records,
)
from analysis.sums.buckets import by_piece
from analysis.sums.direction import Options, ScoredRun
from analysis.sums.loading import load
from analysis.sums.pairing import partner


def load_study(
    root: Path, reference: str = "finetune"
) -> tuple[dict[str, ScoredRun], dict[str, str]]:
    """The runs of a root and why others are left out, by label."""
    directions, left_out = load(root, Options(references=(reference,), resamples=100))
    runs = {run.label: run for direction in directions for run in direction.runs}
    return runs, {item.label: item.reason for item in left_out}


def columns() -> dict[str, np.ndarray]:
    corpus = make_corpus(20, 0)
    return record_columns(corpus, student(corpus, 1.0, 0.1, 3))


def test_columns_come_back_as_written_over_block_borders(tmp_path: Path) -> None:
    path = tmp_path / "tokens/test/5.parquet"
    written = columns()
    write_columns(path, written)
    parts = list(iterate_columns(path, ["kl", "q_top1"], rows=50))
    assert len(parts) > 2
    read = np.concatenate([part["kl"] for part in parts])
    np.testing.assert_array_equal(read, written["kl"].astype(np.float32))
    np.testing.assert_array_equal(read_columns(path, ["q_top1"])["q_top1"], written["q_top1"])
    pieces, index = read_pieces(path, "p_top1_piece")
    assert index.shape == written["p_top1"].shape
    assert pieces[index[0]] == pieces[int(written["p_top1"][0])]


def test_pieces_of_a_language_model_are_read_without_ids(tmp_path: Path) -> None:
    """Its dictionary has ID:PIECE, and so have the records of earlier versions."""
    pieces = ["Ġa", "Ġhouse", "s", ":", "1:", "Ġtwo", "|", "Ġx", "ed", "Ġred", "Ġsea"]
    symbols = [*(f"{number}:{piece}" for number, piece in enumerate(pieces)), "</s>"]
    path = tmp_path / "tokens/test/5.parquet"
    written = columns()
    write_records(path, written, symbols, teacher="cache-1", checkpoint="0")
    column = pq.read_table(path)["piece"].to_pylist()
    assert column == [[*pieces, "</s>"][token] for token in written["token"]]
    table = pq.read_table(path).drop_columns("piece")
    old = pa.array([symbols[token] for token in written["token"]])
    place = list(COLUMNS).index("piece")
    metadata = {**table.schema.metadata, b"sekd.format_version": b"1"}
    del metadata[b"sekd.seal"]
    table = table.add_column(place, "piece", old).replace_schema_metadata(metadata)
    pq.write_table(table, path)
    found, index = read_pieces(path, "piece")
    assert [found[i] for i in index] == column
    assert set(by_piece(found, index, read_token_set(path)).codes) == {0, 1, 2}
    assert without_ids(["7:", "7:7:a"]) == ["", "7:a"]
    # Words with a colon are no such symbols.
    for words in (["10:30", "uhr", "</s>"], ["a:b", "</s>"], ["</s>"]):
        assert without_ids(words) == words


def test_examples_show_the_text_of_bytes() -> None:
    """Of a byte-level vocabulary; what is no character by itself cannot be shown."""
    gpt2 = pytest.importorskip("transformers.models.gpt2.tokenization_gpt2")
    assert gpt2.bytes_to_unicode() == {byte: character for character, byte in BYTES.items()}
    shown = _texts(["ĠfÃ¼r", "Ã", "<|im_end|>"], np.array([0, 1, 2, 0]))
    assert shown.tolist() == [" für", "\ufffd", "<|im_end|>", " für"]
    assert _texts(["▁für", "Ã"], np.array([0, 1])).tolist() == [" für", "Ã"]


def test_token_set_names_sentences_with_gaps(tmp_path: Path) -> None:
    written = columns()
    kept = written["sentence"] != 3
    path = tmp_path / "tokens/test/5.parquet"
    write_columns(path, {name: values[kept] for name, values in written.items()})
    tokens = read_token_set(path)
    assert tokens.sentences.tolist() == [0, 1, 2, *range(4, 20)]
    np.testing.assert_array_equal(tokens.sentences[tokens.sentence], written["sentence"][kept])
    assert tokens.teacher == "cache-1"


def test_identity_of_the_parts_is_checked_and_the_sentence_named(tmp_path: Path) -> None:
    path = tmp_path / "tokens/test/5.parquet"
    written = columns()
    row = int(np.argmax((written["sentence"] == 7) & (written["position"] == 2)))
    written["kl_nontarget"][row] += 0.01
    write_columns(path, written)
    names = ["kl", "kl_target", "kl_nontarget"]
    with pytest.raises(RecordError, match=r"sentence 7, position 2: expected kl = kl_target"):
        read_columns(path, names)
    written["kl_nontarget"][row] -= 0.01 - 1e-6  # float32 rounding passes
    write_columns(path, written)
    assert len(read_columns(path, names)["kl"]) == len(written["kl"])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q_gold", np.nan, "a finite q_gold"),
        ("p_max", 1.2, r"p_max in \[0, 1\]"),
        ("p_gold", -0.1, r"p_gold in \[0, 1\]"),
        ("kl", -0.2, "kl >= 0"),
    ],
)
def test_impossible_values_are_refused(
    tmp_path: Path, name: str, value: float, message: str
) -> None:
    path = tmp_path / "tokens/test/5.parquet"
    written = columns()
    written[name][30] = value
    write_columns(path, written)
    with pytest.raises(RecordError, match=f"sentence {written['sentence'][30]}, .*{message}"):
        read_columns(path, [name])


def test_unsorted_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens/test/5.parquet"
    written = columns()
    order = np.arange(len(written["kl"]))
    order[[4, 5]] = [5, 4]
    write_columns(path, {name: values[order] for name, values in written.items()})
    with pytest.raises(RecordError, match="sorted by sentence and position"):
        read_token_set(path)


def test_footer_must_fit_the_path(tmp_path: Path) -> None:
    path = tmp_path / "tokens/test/5.parquet"
    write_columns(path, columns())
    moved = path.with_name("6.parquet")
    path.rename(moved)
    with pytest.raises(RecordError, match=r"expected sekd.step '6' in the footer, found '5'"):
        read_columns(moved, ["kl"])


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens/test/5.parquet"
    write_columns(path, columns())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RecordError, match="does not match its checksum"):
        read_token_set(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 9}, "expected format_version 2 with a checksum, found 9"),
        ({"seed": "1"}, "expected `int`, found `str` - at `$.seed`"),
        ({"method": None}, "expected `str`, found `null` - at `$.method`"),
        ({"direction": "ende"}, "expected a direction like 'en-de'"),
    ],
)
def test_bad_run_json_is_named_and_left_out(
    demo: Path, change: dict[str, object], message: str
) -> None:
    path = demo / "word_kd/run.json"
    path.write_bytes(sealed_json(read_json(path)[0] | change))
    _, left_out = discover(demo)
    assert [item.label for item in left_out] == ["word_kd"]
    assert message in left_out[0].reason and str(path) in left_out[0].reason


def test_links_are_followed_or_named(demo: Path, tmp_path: Path, write_run: WriteRun) -> None:
    elsewhere = write_run(tmp_path / "elsewhere", "word_kd", "word_kd", seed=2)
    (demo / "linked").symlink_to(elsewhere)
    (demo / "twice").symlink_to(demo / "word_kd")
    (demo / "round").symlink_to(demo)
    (demo / "gone").symlink_to(tmp_path / "gone")
    runs, left_out = discover(demo)
    assert [run.label for run in runs] == ["finetune", "linked", "se_kd", "teacher", "word_kd"]
    reasons = {item.label: item.reason for item in left_out}
    assert reasons.pop("twice") == "a link to the same directory as word_kd"
    assert "a link to the same directory as" in reasons.pop("round")
    assert "which is not there" in reasons.pop("gone")
    assert not reasons


def test_the_trainings_of_a_run_in_rounds_are_no_runs(demo: Path, write_run: WriteRun) -> None:
    write_run(demo, "rounds", "rounds_student")  # a name as good as any
    for number in ("1", "2"):
        (demo / "rounds/rounds" / number / "checkpoints").mkdir(parents=True)
        (demo / "rounds/rounds" / number / "cache").symlink_to(demo / "word_kd")
    (demo / "begun/rounds/1/checkpoints").mkdir(parents=True)
    (demo / "begun/train.jsonl").write_text("{}\n")
    runs, left_out = discover(demo)
    assert [run.label for run in runs] == ["finetune", "rounds", "se_kd", "teacher", "word_kd"]
    assert [item.label for item in left_out] == ["begun"]


def test_unfinished_and_broken_runs_are_left_out_and_the_rest_stays(
    demo: Path, write_run: WriteRun
) -> None:
    (demo / "training").mkdir()
    (demo / "training/train.jsonl").write_text("{}\n")
    write_run(demo, "unscored", "word_kd", wrong=None, seed=2)
    (demo / "unscored/tokens/test/100.parquet").unlink()
    write_run(demo, "other_test_set", "word_kd", seed=3, corpus_seed=5)
    write_run(demo, "other_teacher", "word_kd", seed=4, cache="cache-2")
    (write_run(demo, "short", "word_kd", seed=5) / "hyps/test.txt").write_text("one\n")
    runs, reasons = load_study(demo)
    assert "no run.json" in reasons.pop("training")
    assert "no token records or translations" in reasons.pop("unscored")
    assert "another test set" in reasons.pop("other_test_set")
    assert "another teacher cache" in reasons.pop("other_teacher")
    assert "expected 1 lines" in reasons.pop("short")
    assert not reasons
    assert sorted(runs) == ["finetune", "se_kd", "teacher", "word_kd"]


def test_nested_roots_and_variants(tmp_path: Path, write_run: WriteRun) -> None:
    for gamma in (0.5, 1.0):
        write_run(
            tmp_path / "sweep",
            f"g{gamma}",
            "se_kd_student",
            hyperparameters={"gamma": gamma, "lr": 1},
        )
    write_run(tmp_path, "finetune", "finetune", hyperparameters={"lr": 1})
    write_run(tmp_path, "copy", "finetune", hyperparameters={"lr": 1})
    runs, _ = load_study(tmp_path)
    assert {label: str(run.method) for label, run in runs.items()} == {
        "copy": "finetune",
        "finetune": "finetune [finetune]",
        "sweep/g0.5": "se_kd_student (gamma=0.5)",
        "sweep/g1.0": "se_kd_student (gamma=1.0)",
    }


def test_the_usual_variant_keeps_the_name_and_is_the_baseline(
    tmp_path: Path, write_run: WriteRun
) -> None:
    """What most runs of all methods have is usual, also where a method has each value once."""
    for alpha in (0.3, 0.7, 0.9):
        write_run(tmp_path, f"word_kd_{alpha}", "word_kd", hyperparameters={"alpha": alpha})
    for lam in (0.1, 0.5, 0.9):
        write_run(
            tmp_path, f"se_{lam}", "se_kd_student", hyperparameters={"alpha": 0.7, "lambda": lam}
        )
    write_run(tmp_path, "target", "se_kd_target", hyperparameters={"alpha": 0.7, "lambda": 0.5})
    found, _ = load_study(tmp_path, "word_kd")
    runs = list(found.values())
    names = {run.label: str(run.method) for run in runs}
    assert names == {
        "word_kd_0.3": "word_kd (alpha=0.3)",
        "word_kd_0.7": "word_kd",
        "word_kd_0.9": "word_kd (alpha=0.9)",
        "se_0.1": "se_kd_student (lambda=0.1)",
        "se_0.5": "se_kd_student",
        "se_0.9": "se_kd_student (lambda=0.9)",
        "target": "se_kd_target",
    }
    for run in runs:
        other = partner(run, runs, "word_kd")
        assert other is not None and other.label == "word_kd_0.7"


def test_runs_without_translations_or_with_wrong_values_leave_the_others_compared(
    tmp_path: Path, write_run: WriteRun
) -> None:
    """With one run fewer its neighbours are compared with each other."""
    for seed in (1, 2, 3):
        for method in ("finetune", "word_kd", "se_kd_blend"):
            write_run(tmp_path, f"{method}{seed}", method, seed=seed, sentences=30)
    shutil.rmtree(tmp_path / "word_kd2/hyps")
    options = Options(resamples=100)
    directions, left_out = load(tmp_path, options)
    assert not left_out
    assert set(sentence_table(directions, options)["seeds"]) == {2}
    corpus = make_corpus(30, 0)
    wrong = record_columns(corpus, student(corpus, 0.8, 0.1, 5))
    wrong["q_gold"][3] = np.nan
    write_columns(tmp_path / "word_kd2/tokens/test/100.parquet", wrong)
    directions, left_out = load(tmp_path, options)
    assert [item.label for item in left_out] == ["word_kd2"] and "q_gold" in left_out[0].reason
    gains = transfer_tables(directions, options)[1]
    compared = set(gains.loc[gains["baseline"] == "word_kd", "run"])
    assert compared == {"finetune1", "finetune3", "se_kd_blend1", "se_kd_blend3"}


def test_documents_of_another_test_set_are_refused(tmp_path: Path, write_run: WriteRun) -> None:
    for place, (direction, sentences) in enumerate((("en-de", 30), ("de-en", 20))):
        root = tmp_path / direction
        write_run(
            root, "finetune", "finetune", direction=direction, sentences=sentences, corpus_seed=place
        )  # fmt: skip
    documents = tuple(f"{line // 5}" for line in range(30))
    options = Options(resamples=100, documents=documents)
    (found,), _ = load(tmp_path / "en-de", options)
    assert found.resamples is not None and found.resamples.units == 6
    with pytest.raises(UserError, match="each sentence of 'test' of de-en, 20, found 30; judge"):
        load(tmp_path, options)
    shutil.rmtree(tmp_path / "de-en/finetune/hyps")
    load(tmp_path, options)  # the records do not say how long the test set is
    with pytest.raises(UserError, match="of en-de, 30, found 10; judge"):
        load(tmp_path / "en-de", Options(resamples=100, documents=documents[:10]))
    with pytest.raises(UserError, match="of de-en, at least 20, found 10; judge"):
        load(tmp_path / "de-en", Options(resamples=100, documents=documents[:10]))


def test_seeds_with_other_settings_are_told(
    tmp_path: Path, write_run: WriteRun, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, gamma in ((1, 0.5), (2, 0.9), (3, 0.9)):
        settings = {"criterion": {"gamma": gamma}} | ({} if seed < 3 else {"warm_start": True})
        write_run(tmp_path, f"se{seed}", "se_kd_blend", seed=seed, hyperparameters=settings)
        write_run(tmp_path, f"finetune{seed}", "finetune", seed=seed)
    directions, _ = load(tmp_path, Options(resamples=100))
    assert {str(run.method) for run in directions[0].runs} == {"finetune", "se_kd_blend"}
    told = (
        "en-de: the runs of SE-KD (blend) differ in more than the seed and count as one method (gamma "
        "0.5, 0.9; warm_start none, True)"
    )
    assert capsys.readouterr().err.count(f"warning: {told}; train the seeds alike") == 1
    (scope,) = scope_blocks(directions, [], Options())
    assert isinstance(scope, str) and scope.splitlines()[1:] == [f"- {told}"]


def test_empty_root_and_root_without_records(tmp_path: Path, write_run: WriteRun) -> None:
    with pytest.raises(UserError, match="expected run directories"):
        load_study(tmp_path)
    run = write_run(tmp_path, "teacher", "teacher")
    assert list(load_study(tmp_path)[0]) == ["teacher"]  # translations alone can be compared
    for path in (run / "hyps").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="expected at least one run with token records"):
        load_study(tmp_path)
    with pytest.raises(UserError, match="expected a directory of runs"):
        load_study(tmp_path / "nowhere")


def test_simulated_runs_of_two_methods_are_two_runs(tmp_path: Path) -> None:
    """One seed for all once made every simulated null true to the last digit, and its test idle."""
    columns = []
    for method in ("word_kd", "se_kd_student"):
        run = write_run_directory(tmp_path, f"{method}1-0", method, noise=0.8, own=0.3)
        path = run / "tokens" / "test" / "100.parquet"
        columns.append(read_columns(path, ["kl", "q_gold"]))
    assert (columns[0]["kl"] != columns[1]["kl"]).mean() > 0.99
    assert (columns[0]["q_gold"] != columns[1]["q_gold"]).mean() > 0.99


def damaged(whole: bytes, rng: np.random.Generator) -> bytes:
    raw = bytearray(whole)
    for _ in range(rng.integers(1, 4)):
        raw[rng.integers(len(raw))] = rng.integers(256)
    return bytes(raw)


def test_damaged_records_are_refused_or_read_as_they_were(tmp_path: Path) -> None:
    """Without a checksum of the whole file, one in seven was read with other numbers."""
    path = tmp_path / "tokens/test/5.parquet"
    write_columns(path, columns())
    whole, known = path.read_bytes(), read_columns(path, ["kl", "q_gold"])
    rng = np.random.default_rng(31)
    refused = 0
    for _ in range(200):
        path.write_bytes(damaged(whole, rng))
        try:
            read_token_set(path)
            read = read_columns(path, ["kl", "q_gold"])
        except RecordError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert all((read[name] == known[name]).all() for name in known)
    assert refused > 190


def test_files_without_a_checksum_are_read_and_told_once(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an earlier version wrote them, and other systems do."""
    load_study(demo)
    for path in demo.rglob("*.parquet"):
        table = pq.read_table(path)
        metadata = {**table.schema.metadata, b"sekd.format_version": b"1"}
        del metadata[b"sekd.seal"]
        pq.write_table(table.replace_schema_metadata(metadata), path)
        assert not read_token_set(path).sealed
    for path in demo.rglob("run.json"):
        content, _ = read_json(path)
        path.write_text(json.dumps(content | {"format_version": 1}))
    capsys.readouterr()
    runs, left_out = load_study(demo)
    assert not left_out and len(runs) == 4
    told = capsys.readouterr().err
    assert told.count("without a checksum") == 1 and "4 of 4 runs, finetune the first" in told
    # A file of this version has one: it is not taken for an older one where its checksum is lost.
    path = demo / "word_kd/run.json"
    path.write_text(json.dumps(content | {"format_version": 2}))
    assert "expected format_version 1 without a checksum" in load_study(demo)[1]["word_kd"]


def test_translations_are_held_against_the_checksums_of_their_scores(demo: Path) -> None:
    run = demo / "se_kd"
    checksums = {path.name: hash_lines(read_lines(path)) for path in (run / "hyps").iterdir()}
    (run / "scores.json").write_bytes(sealed_json({"test": {LINES: checksums}}))
    translations = load_study(demo)[0]["se_kd"].translations
    assert translations is not None and translations.texts.sealed
    for name in ("test.txt", "test.ref.txt", "test.src.txt"):
        path = run / "hyps" / name
        whole = path.read_text()
        path.write_text(whole.replace(".", "!", 1))
        (reason,) = load_study(demo)[1].values()
        assert f"{name}: the lines do not match their checksum" in reason
        path.write_text(whole.replace("\n", "\r\n"))  # the same lines
        assert not load_study(demo)[1]
    path = run / "scores.json"
    path.write_text(path.read_text().replace("test.ref", "test.rex"))
    assert "scores.json: content does not match" in load_study(demo)[1]["se_kd"]
