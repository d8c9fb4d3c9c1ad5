"""What becomes of damaged files: results/robustness.csv and .json.

    python scripts/benchmarks/robustness.py [--files 100000]

Of every kind of file that the project writes and reads again, damages copies in every way that disks and
careless tools do, reads each as the commands do, in a child process, and counts what came of it:

refused     an error of one line that names the file
unchanged   read, and what was read is what had been written
changed     read, and it is something else: as whole though changed
other       any other exception, which a user would see as a traceback
killed      the process died
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from benchmarking import Target, write_results

from analysis.runs.errors import UserError
from analysis.runs.files import sealed_json
from analysis.runs.run_record import LINES, read_run, read_scores, write_scores
from analysis.runs.simulated import write_run_directory
from analysis.runs.texts import read_texts, write_texts
from analysis.runs.token_records import COLUMNS, read_columns, read_pieces, read_token_set
from sekd_fairseq.llm.prompts import PromptSettings
from sekd_fairseq.llm.vocabulary import FILE, Vocabulary
from sekd_fairseq.teacher_cache import TeacherCache, hash_symbols, write_shard
from sekd_fairseq.teacher_cache.finish import finish_cache
from sekd_fairseq.teacher_cache.format import MANIFEST, payload_dtypes
from sekd_fairseq.teachers.caching import SETTINGS, read_settings

OUTCOMES = ("refused", "unchanged", "changed", "other", "killed")
SYMBOLS = [f"symbol{i}" for i in range(20)]
#: Seconds that reading one damaged file may take.
PATIENCE = 20


class Kind(NamedTuple):
    """A kind of file: where one is, and everything that is read from it."""

    name: str
    path: Path
    read: Callable[[], Any]


def make_cache(folder: Path, sentences: int = 7) -> None:
    """A small teacher cache of two shards."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    rows = []
    for _ in range(sentences):
        tokens, support = int(rng.integers(1, 6)), 3
        p = rng.dirichlet(np.ones(support + 1), tokens)
        columns = {
            "support_size": np.full(tokens, support),
            "gold_logprob": np.log(p[:, 0]),
            "outside_mass": p[:, support],
            "entropy": np.ones(tokens),
            "token_id": np.tile([4, 5, 6], tokens),
            "logprob": np.log(p[:, :support]).ravel(),
        }
        rows.append(columns)
    hashes = np.arange(sentences, dtype=np.uint64)
    dtypes = payload_dtypes(len(SYMBOLS))
    for index in range(2):
        part = slice(index * 4, (index + 1) * 4)
        write_shard(folder, index, rows[part], hashes[part], dtypes)
    settings: dict[str, Any] = {
        "split": folder.name,
        "vocab_size": len(SYMBOLS),
        "dictionary_hash": hash_symbols(SYMBOLS),
        "dataset_hash": "d" * 64,
        "sentences": sentences,
        "shard_sentences": 4,
        "temperature": 1.0,
        "truncation": {"rule": "top_k", "k": support},
        "teacher": {"files": ["teacher.pt"], "arch": "transformer"},
    }
    finish_cache(folder, settings, dtypes, {}, allow_implausible=True)
    (folder / SETTINGS).write_bytes(sealed_json(settings))


def read_cache(folder: Path) -> list[Any]:
    """The manifest and every value of a cache."""
    cache = TeacherCache.open(folder)
    rows = [[np.asarray(value).tobytes() for value in row] for row in cache]
    return [cache.manifest, rows, cache.target_hashes().tobytes()]


def make_run(root: Path) -> Path:
    """A run with token records, translations, and their scores."""
    run = write_run_directory(root, "run", "word_kd", sentences=8)
    texts = read_texts(run, "test")
    assert texts is not None
    scores = {"sentences": 8, "bleu": {"score": 31.4159, "signature": "tok:13a"}}
    write_scores(run, "test", scores | {LINES: write_texts(run, "test", texts)})
    return run


def read_records(path: Path) -> list[Any]:
    """Everything that the analysis reads of token records."""
    tokens = read_token_set(path)
    numbers = [name for name, column in COLUMNS.items() if column.kind != "text"]
    texts = [name for name, column in COLUMNS.items() if column.kind == "text"]
    found: list[Any] = [tokens.digest, tokens.teacher, tokens.sealed]
    found += [values.tobytes() for values in read_columns(path, numbers).values()]
    for name in texts:
        pieces, index = read_pieces(path, name)
        found.append([pieces[i] for i in index])
    return found


def make_kinds(folder: Path) -> list[Kind]:
    """One whole file of every kind, with its reader."""
    cache, data = folder / "cache" / "train", folder / "data"
    make_cache(cache)
    run = make_run(folder)
    data.mkdir()
    prompt = PromptSettings("en", "de")
    Vocabulary(list(range(20)), "tokenizer", prompt, hash_symbols(SYMBOLS)).save(data)
    records = run / "tokens" / "test" / "100.parquet"
    texts = [
        Kind(f"translations, {name}", run / "hyps" / name, lambda: read_texts(run, "test"))
        for name in ("test.txt", "test.ref.txt", "test.src.txt")
    ]
    return [
        Kind("teacher cache, shard", cache / "shard-00000.arrow", lambda: read_cache(cache)),
        Kind("teacher cache, manifest.json", cache / MANIFEST, lambda: read_cache(cache)),
        Kind("unfinished cache, build.json", cache / SETTINGS, lambda: read_settings(cache)),
        Kind("token records", records, lambda: read_records(records)),
        Kind("run.json", run / "run.json", lambda: read_run(run, "run")),
        Kind("scores.json", run / "scores.json", lambda: (read_scores(run), read_texts(run, "test"))),
        *texts,
        Kind("llm.json", data / FILE, lambda: Vocabulary.load(data, SYMBOLS)),
    ]  # fmt: skip


def damage(whole: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """One to three random bytes, or now and then another kind of accident."""
    raw = bytearray(whole)
    place, length = int(rng.integers(len(raw))), int(rng.integers(1, 65))
    how = rng.choice(["bytes", "cut", "inserted", "lost", "zeros", "bit"], p=[0.6] + [0.08] * 5)
    if how == "bytes":
        for _ in range(rng.integers(1, 4)):
            raw[rng.integers(len(raw))] = rng.integers(256)
    elif how == "cut":
        del raw[place:]
    elif how == "inserted":
        raw[place:place] = rng.bytes(length)
    elif how == "lost":
        del raw[place : place + length]
    elif how == "zeros":
        end = min(place + length, len(raw))
        raw[place:end] = bytes(end - place)
    else:
        raw[place] ^= 1 << int(rng.integers(8))
    return str(how), bytes(raw)


def outcome(kind: Kind, known: Any) -> str:
    """What came of reading a file; ``known`` is what a whole one holds."""
    try:
        found = kind.read()
    except UserError as error:
        # A line that names no file does not help.
        return (
            "refused" if "\n" not in str(error) and kind.path.parts[-2] in str(error) else "other"
        )
    except Exception as error:
        print(f"{kind.name}: {type(error).__name__}: {error}", file=sys.stderr)
        return "other"
    return "unchanged" if found == known else "changed"


def search(kind: Kind, count: int, seed: int) -> Counter[tuple[str, str]]:
    """Damage a file ``count`` times and read it in children, each of which goes on until it dies;
    returns how often each kind of damage had each outcome."""
    whole, known = kind.path.read_bytes(), kind.read()
    counts: Counter[tuple[str, str]] = Counter()
    done = 0
    while done < count:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(reader)
                for number in range(done, count):
                    how, raw = damage(whole, np.random.default_rng([seed, number]))
                    kind.path.write_bytes(raw)
                    os.write(writer, f"{how} ".encode())
                    signal.alarm(PATIENCE)
                    os.write(writer, f"{outcome(kind, known)}\n".encode())
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as stream:
            lines = [line.split() for line in stream.read().splitlines()]
        os.waitpid(child, 0)
        for words in lines:
            how, result = words if len(words) == 2 else (words[0], "killed")
            counts[how, result] += 1
            if result == "killed":
                print(f"{kind.name}: killed by file {done + len(lines) - 1}, seed {seed}")
        done += len(lines)
    kind.path.write_bytes(whole)
    assert kind.read() == known
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=100_000, help="damaged files in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="folder of the results (default: results)")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        kinds = make_kinds(Path(folder))
        each = -(-args.files // len(kinds))
        for kind in kinds:
            start = time.monotonic()
            counts = search(kind, each, args.seed)
            print(f"{kind.name}: {each} files, {time.monotonic() - start:.0f} s", flush=True)
            for how in sorted({how for how, _ in counts}):
                found = {result: counts[how, result] for result in OUTCOMES}
                rows.append(
                    {"file": kind.name, "damage": how, "files": sum(found.values()), **found}
                )
                total.update(found)
    targets = [
        Target("damaged files", sum(total.values()), args.files, at_least=True),
        Target("killed", total["killed"], 0),
        Target("read as whole though changed", total["changed"], 0),
        Target("any other exception", total["other"], 0),
    ]
    options = {"folder": args.output} if args.output else {}
    write_results("robustness", rows, targets, torch.device("cpu"), **options)
    sys.exit(not all(target.met() for target in targets))


if __name__ == "__main__":
    main()
