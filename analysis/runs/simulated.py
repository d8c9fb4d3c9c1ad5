"""Simulated runs, for tests and benchmarks of the analysis: a teacher and students over a small vocabulary, with real distributions behind
every column, so that the records keep their identities."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.runs.run_record import RunRecord, write_run
from analysis.runs.texts import Texts, write_texts
from analysis.runs.token_records import write_records

VOCABULARY = 12
PIECES = [
    "▁a",
    "▁house",
    "s",
    "ing",
    "▁<b>bold</b>",
    "▁two",
    "|",
    "▁x",
    "ed",
    "▁red",
    "▁sea",
    "</s>",
]
EOS = VOCABULARY - 1


@dataclass(frozen=True)
class Corpus:
    """Test set and teacher of a direction: ``log_p`` is (N, V), the rest (N,)."""

    sentence: NDArray[Any]
    position: NDArray[Any]
    token: NDArray[Any]
    log_p: NDArray[Any]
    common: NDArray[Any]  # (N, V) the part of the students' error that all of them share


def make_corpus(sentences: int, seed: int) -> Corpus:
    """A test set with its teacher."""
    rng = np.random.default_rng([7, seed])
    lengths = rng.integers(3, 12, sentences)
    sentence = np.repeat(np.arange(sentences), lengths)
    position = np.concatenate([np.arange(length) for length in lengths])
    token = rng.integers(0, EOS, len(sentence))
    token[np.cumsum(lengths) - 1] = EOS
    logits = rng.normal(0, 1.5, (len(token), VOCABULARY))
    logits[np.arange(len(token)), token] += 3
    common = rng.normal(0, 1, logits.shape) * rng.exponential(1, len(token))[:, None]
    return Corpus(sentence, position, token, log_softmax(logits), common)


def log_softmax(logits: NDArray[Any]) -> NDArray[Any]:
    """Log-probabilities of (N, V) logits."""
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def student(
    corpus: Corpus,
    noise: float,
    own: float,
    seed: int,
    habit: float = 0.0,
    method: str = "",
    same_seed: float = 0.0,
    training_seed: int = 0,
) -> NDArray[Any]:
    """A student's log-probabilities: the teacher's, off by an error that all students share, one that
    the students of a method share (``habit``), one that those of a training seed share
    (``same_seed``), and one of its own."""
    rng = np.random.default_rng([11, seed])
    error = noise * corpus.common + own * rng.normal(0, 1, corpus.log_p.shape)
    if habit:
        ours = np.random.default_rng([13, zlib.crc32(method.encode()), *corpus.token[:8].tolist()])
        error += habit * ours.normal(0, 1, corpus.log_p.shape)
    if same_seed:
        theirs = np.random.default_rng([23, training_seed, *corpus.token[:8].tolist()])
        error += same_seed * theirs.normal(0, 1, corpus.log_p.shape)
    return log_softmax(corpus.log_p + error)


def record_columns(corpus: Corpus, log_q: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Token records (no pieces), computed in float64 from full distributions."""
    rows = np.arange(len(corpus.token))
    p, q = np.exp(corpus.log_p), np.exp(log_q)
    p_gold, q_gold = p[rows, corpus.token], q[rows, corpus.token]
    kl = (p * (corpus.log_p - log_q)).sum(axis=1)
    target = p_gold * np.log(p_gold / q_gold) + (1 - p_gold) * np.log((1 - p_gold) / (1 - q_gold))
    best_p, best_q = (np.argsort(-side, axis=1)[:, :5] for side in (p, q))
    return {
        "sentence": corpus.sentence,
        "position": corpus.position,
        "token": corpus.token,
        "frequency": 10 ** (corpus.token % 5) - 1,
        "p_gold": p_gold,
        "q_gold": q_gold,
        "kl": kl,
        "kl_target": target,
        "kl_nontarget": kl - target,
        "p_entropy": -(p * corpus.log_p).sum(axis=1),
        "q_entropy": -(q * log_q).sum(axis=1),
        "p_top1": best_p[:, 0],
        "q_top1": best_q[:, 0],
        "p_max": p.max(axis=1),
        "q_max": q.max(axis=1),
        "p_of_q_top1": p[rows, best_q[:, 0]],
        "overlap_top5": (best_p[:, :, None] == best_q[:, None, :]).any(axis=2).sum(axis=1),
    }


def write_columns(
    path: Path, columns: Mapping[str, NDArray[Any]], cache: str = "cache-1", rows: int = 97
) -> None:
    """Write simulated token records, ``rows`` a row group."""
    write_records(path, columns, PIECES, teacher=cache, checkpoint="0" * 64, rows=rows)


def make_texts(sentences: int, seed: int, run_seed: int, wrong: float) -> Texts:
    """References, sources, and translations with a share of wrong words."""
    words = [
        "the",
        "a",
        "red",
        "blue",
        "house",
        "sea",
        "ship",
        "goes",
        "comes",
        "sleeps",
        "<i>now</i>",
        "&",
        "very",
        "old",
        "new",
        "small",
    ]
    rng = np.random.default_rng([13, seed])
    references = [" ".join(rng.choice(words, rng.integers(4, 12))) + "." for _ in range(sentences)]
    shared = np.random.default_rng([17, seed])
    own = np.random.default_rng([19, run_seed])
    hypotheses = []
    for line in references:
        luck = shared.exponential(1)
        kept = [
            own.choice(words) if own.random() < wrong * luck else word for word in line[:-1].split()
        ]
        hypotheses.append(" ".join(kept) + ".")
    return Texts(hypotheses, references, [line.upper() for line in references])


def write_run_record(
    path: Path, method: str, seed: int, direction: str, updates: int, cache: str, **content: Any
) -> None:
    """Make a run directory with its ``run.json``; ``content`` adds to it or replaces."""
    path.mkdir(parents=True)
    record: dict[str, Any] = {
        "name": path.name,
        "method": method,
        "seed": seed,
        "direction": direction,
        "updates": updates,
        "data": {"fingerprint": "data-1"},
        "teacher_cache": None if method == "teacher" else {"fingerprint": cache, "teacher": "t"},
        "parameters": 1000,
        **content,
    }
    write_run(path, RunRecord(**record))


def write_run_directory(
    root: Path,
    name: str,
    method: str,
    *,
    seed: int = 1,
    direction: str = "en-de",
    sentences: int = 60,
    noise: dict[int, float] | float = 1.0,
    own: float = 0.1,
    habit: float = 0.0,
    same_seed: float = 0.0,
    wrong: float | None = 0.2,
    subset: str = "test",
    cache: str = "cache-1",
    corpus_seed: int = 0,
    **content: Any,
) -> Path:
    """Write a run; ``noise`` is the shared error at the last step, or at each step; ``wrong`` the
    share of wrong words in its translations (None: no translations)."""
    path = root / name
    steps = noise if isinstance(noise, dict) else {100: noise}
    run_seed = zlib.crc32(f"{name}{seed}".encode())  # another one for every run
    write_run_record(path, method, seed, direction, max(steps), cache, **content)
    if method != "teacher":
        corpus = make_corpus(sentences, corpus_seed)
        for step, size in steps.items():
            log_q = student(corpus, size, own, run_seed, habit, method, same_seed, seed)
            columns = record_columns(corpus, log_q)
            write_columns(path / "tokens" / subset / f"{step}.parquet", columns, cache)
    if wrong is not None:
        write_texts(path, subset, make_texts(sentences, corpus_seed, run_seed, wrong))
    return path


def write_study(
    root: Path,
    seeds: int = 3,
    sentences: int = 150,
    better: float = 0.5,
    directions: tuple[str, ...] = ("en-de",),
    method: str = "se_kd_student",
    same_seed: float = 0.0,
    corpus: int = 0,
    texts: bool = True,
) -> Path:
    """Fine-tuning, word-level KD and a SE-KD method, some seeds each, in some directions; the SE-KD
    student's error is ``better`` where word-level KD's is 0.8, at the end and on the way there."""
    for number, direction in enumerate(directions):
        for seed in range(1, seeds + 1):
            common: dict[str, Any] = {
                "seed": seed,
                "direction": direction,
                "sentences": sentences,
                "corpus_seed": corpus + number,
                "own": 0.2,
                "same_seed": same_seed,
            }
            place = root / direction
            for name, kind, last, wrong in (
                ("finetune", "finetune", 1.0, 0.3),
                ("word_kd", "word_kd", 0.8, 0.25),
                ("treatment", method, better, 0.25 * better / 0.8),
            ):
                noise = {50: 2.0, 75: last * 1.4, 100: last}
                share = wrong if texts else None
                write_run_directory(
                    place, f"{name}{seed}", kind, noise=noise, wrong=share, **common
                )
    return root
