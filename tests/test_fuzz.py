"""Whatever a file holds, the answer is an error that names it or a right result."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis.runs.files import sealed_json
from analysis.runs.run_record import read_run
from analysis.runs.simulated import write_run_directory
from analysis.runs.texts import read_texts
from sekd_fairseq.errors import CacheError, UserError
from sekd_fairseq.llm.prompts import Template
from sekd_fairseq.llm.vocabulary import symbol_of
from sekd_fairseq.teacher_cache import TeacherCache
from sekd_fairseq.teacher_cache.format import MANIFEST

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "benchmarks"))
from robustness import Kind, make_cache, make_kinds, search

from sekd_fairseq.parallel_text import read_aligned, read_pairs

quick = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
#: Text with everything that breaks readers: line and paragraph separators, directions, NUL, marks.
ODD = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("\0\r\ufeff\u2028\u2029\x85\x1c\u202e\u200b{}%\\"),
    ),
    max_size=30,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small cache of two shards."""
    folder = tmp_path_factory.mktemp("fuzz") / "train"
    make_cache(folder)
    return folder


def test_damaged_files(tmp_path: Path) -> None:
    """A sample; scripts/benchmarks/robustness.py damages many more."""
    for kind in make_kinds(tmp_path):
        counts = search(kind, 150, seed=15)
        found = {result for _, result in counts}
        assert found <= {"refused", "unchanged"}, (kind.name, counts)
        assert sum(counts[how, "refused"] for how, _ in counts) > 0, kind.name


def test_what_kills_a_reader_is_counted_and_the_search_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(50))

    def read() -> int:
        damaged = sum(path.read_bytes())
        if damaged % 7 == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if damaged % 7 == 2:
            raise KeyError
        return damaged % 7 == 3

    counts = search(Kind("test", path, read), 120, seed=1)
    assert counts.total() == 120
    assert {result for _, result in counts} == {"killed", "other", "changed", "unchanged"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@given(data=st.data())
@quick
def test_manifests_that_somebody_wrote(cache: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Wrong content under a right checksum: no traceback, and no file outside of the directory."""
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(cache, copy)
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest.pop("checksum")
    key = data.draw(st.sampled_from(sorted(manifest)))
    if key == "shards" and data.draw(st.booleans()):
        inner = data.draw(st.sampled_from(sorted(manifest["shards"][0])))
        manifest["shards"][0][inner] = data.draw(
            st.sampled_from(["../train/shard-00000.arrow", "/etc/passwd", "."]) | json_values
        )
    else:
        manifest[key] = data.draw(json_values)
    (copy / MANIFEST).write_bytes(sealed_json(manifest))
    try:
        opened = TeacherCache.open(copy)
        list(opened)
    except CacheError as error:
        assert str(copy) in str(error)
    else:
        assert all(Path(shard.file).name == shard.file for shard in opened.manifest.shards)


@given(value=json_values | st.dictionaries(
    st.sampled_from(["format_version", "method", "seed", "direction", "updates", "hyperparameters",
                     "parameters"]), json_values | st.sampled_from(["en-de", 1])))  # fmt: skip
@quick
def test_run_records(tmp_path: Path, value: Any) -> None:
    (tmp_path / "run.json").write_text(json.dumps(value))
    try:
        run = read_run(tmp_path, "x")
    except UserError as error:
        assert "run.json" in str(error)
    else:
        assert "-" in run.direction and isinstance(run.seed, int)


@given(text=ODD, source=ODD)
@quick
def test_prompt_templates(text: str, source: str) -> None:
    for template in (text, f"{text}{{src}}", f"{{src}}{text}"):
        try:
            prompt = Template(template, "de", "en").fill(source)
        except UserError as error:
            assert str(error).startswith("prompt template")
        else:
            assert source in prompt


@given(token=st.integers(0, 10**6), piece=ODD)
@quick
def test_symbols_of_tokens(token: int, piece: str) -> None:
    symbol = symbol_of(token, piece)
    assert symbol.startswith(f"{token}:")
    assert symbol.split() == [symbol] and symbol.isprintable()


@given(
    lines=st.lists(ODD.map(lambda text: text.replace("\n", "")), max_size=6),
    other=st.lists(st.binary(max_size=12), max_size=6),
)
@quick
def test_odd_parallel_text(tmp_path: Path, lines: list[str], other: list[bytes]) -> None:
    source, target = tmp_path / "a.de", tmp_path / "a.en"
    source.write_bytes("".join(f"{line}\n" for line in lines).encode())
    target.write_bytes(b"\n".join(other))
    try:
        left, right = read_aligned(source, target)
        pairs, dropped = read_pairs(source, target)
    except UserError as error:
        assert str(source) in str(error) or str(target) in str(error)
    else:
        assert left == lines and len(right) == len(lines) == len(pairs) + dropped
        assert all(side == " ".join(side.split()) and side for pair in pairs for side in pair)


@given(hypotheses=st.binary(max_size=40), references=st.binary(max_size=40))
@quick
def test_odd_translations(tmp_path: Path, hypotheses: bytes, references: bytes) -> None:
    if not (tmp_path / "run").exists():
        write_run_directory(tmp_path, "run", "word_kd", sentences=3)
    run = tmp_path / "run"
    (run / "hyps" / "test.txt").write_bytes(hypotheses)
    (run / "hyps" / "test.ref.txt").write_bytes(references)
    (run / "hyps" / "test.src.txt").unlink(missing_ok=True)
    try:
        texts = read_texts(run, "test")
    except UserError as error:
        assert str(run) in str(error)
    else:
        assert texts is not None and len(texts.hypotheses) == len(texts.references)
