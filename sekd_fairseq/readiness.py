"""What can be known before a training: whether a student, its data and a teacher's cache fit.

``inspect_cache CACHE --student MODEL --data DATA`` prints one line per check, ``ok`` or ``FIX`` with
what fixes it.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from fairseq import tasks, utils
from torch.nn import functional

from sekd_fairseq.checkpoints import language_model_config, load_models
from sekd_fairseq.datasets import target_hashes
from sekd_fairseq.devices import to_device
from sekd_fairseq.errors import CacheError, UserError
from sekd_fairseq.llm.tokenizer import SENTENCEPIECE, load_tokenizer
from sekd_fairseq.llm.vocabulary import FILE, TOKENIZER, Vocabulary
from sekd_fairseq.logits import flat_logits
from sekd_fairseq.splits import load_split, token_batches
from sekd_fairseq.teacher_cache import TeacherCache

#: Sentences of the cache that are looked at.
SENTENCES = 500
#: Bytes of training that a float32 parameter takes: itself, its gradient, Adam's two means.
BYTES_OF_A_PARAMETER = 16
#: With ``--bf16``, which keeps it and its gradient in half precision too.
BYTES_WITH_BF16 = 20
#: A teacher that gives the end of a translation less than this does not end there.
LEAST_END = 0.01


class Check(NamedTuple):
    """One line of the report.

    Attributes
    ----------
    name
        What was looked at.
    good
        Whether it is as it should be.
    found
        What was found, and if that is not good what fixes it.
    """

    name: str
    good: bool
    found: str

    def __str__(self) -> str:
        return f"  {'ok' if self.good else 'FIX':13} {self.name}: {self.found}"


class Student(NamedTuple):
    """A loaded student, its task and the data's directory."""

    path: str
    model: Any
    task: Any
    data: str


def load_student(path: str, data: str) -> Student:
    """A checkpoint, or the folder of a language model, on the CPU; ``UserError`` where it does not fit the
    data."""
    if Path(path).is_dir():
        cfg = language_model_config(data, "--hf-model", path)
        task = tasks.setup_task(cfg.task)
        return Student(path, task.build_model(cfg.model), task, data)
    (model,), _, task = load_models([path], data, torch.device("cpu"))
    return Student(path, model, task, data)


def checks(
    cache: TeacherCache, path: str, data: str, device: torch.device, max_tokens: int
) -> Iterator[Check]:
    """Look at a student beside the cache of one split, the cheap things first.

    A student that cannot be loaded, or another dictionary or split, ends the list: nothing else could
    be said of it.
    """
    try:
        student = load_student(path, data)
        cache.check_dictionary(student.task.target_dictionary.symbols)
    except UserError as error:
        yield Check("vocabulary", False, str(error))
        return
    symbols = len(student.task.target_dictionary)
    yield Check("vocabulary", True, f"{symbols:,} symbols of student, data and cache")
    try:
        dataset = load_split(student.task, cache.manifest.split, data)
        pad = student.task.target_dictionary.pad()
        cache.check_targets(target_hashes(dataset.tgt, pad), f"{cache.manifest.split} ({data})")
    except CacheError as error:
        yield Check("sentences", False, str(error))
        return
    yield Check("sentences", True, f"the {len(cache):,} that the cache was built from, in order")
    seen = look_at(cache)
    yield end_of_translations(cache, student, seen)
    yield template(student)
    yield shift(seen)
    yield ranks_first(cache, seen)
    yield cost(cache, student, dataset, device, max_tokens)


class Seen(NamedTuple):
    """Some sentences of a cache, token after token.

    Attributes
    ----------
    reference, best : (n,) int64
        The reference, and the teacher's most probable token.
    end : (n,) bool
        Whether the token is the last of its sentence.
    gold : (n,) float64
        The teacher's log-probability of the reference.
    """

    reference: Any
    best: Any
    end: Any
    gold: Any


def look_at(cache: TeacherCache) -> Seen:
    """Up to :data:`SENTENCES` sentences, evenly spaced."""
    chosen = np.unique(np.linspace(0, len(cache) - 1, min(SENTENCES, len(cache))).astype(int))
    columns: list[list[Any]] = [[], [], [], []]
    for sentence in chosen:
        row = cache[int(sentence)]
        first, values = row.first, row.log_p
        best = [
            row.token_id[start + values[start : start + size].argmax()]
            for start, size in zip(first, row.support_size, strict=True)
        ]
        columns[0].append(row.token_id[first].astype(np.int64))
        columns[1].append(np.array(best, np.int64))
        columns[2].append(np.arange(len(first)) == len(first) - 1)
        columns[3].append(row.gold_logprob.astype(np.float64))
    return Seen(*(np.concatenate(column) for column in columns))


def end_of_translations(cache: TeacherCache, student: Student, seen: Seen) -> Check:
    """Whether sentences end with the student's end, and the teacher ends there too."""
    eos = student.task.target_dictionary.eos()
    others = int((seen.reference[seen.end] != eos).sum())
    if others:
        return Check(
            "end", False, f"{others} of {seen.end.sum()} sentences do not end with </s>; binarise the "
            "data again with fairseq-preprocess or python -m sekd_fairseq.prepare_llm_data",
        )  # fmt: skip
    usual = float(np.exp(seen.gold[seen.end].mean()))
    if usual < LEAST_END and cache.manifest.temperature == 1.0:
        return Check(
            "end", False, f"the teacher gives the end of translations {usual:.2g} on (geometric) average: "
            "it ends them with another token; make the data with the one that its prompts end with "
            "(python -m sekd_fairseq.prepare_llm_data --end) and build the cache again",
        )  # fmt: skip
    return Check("end", True, f"</s>, which the teacher gives {usual:.2g} on (geometric) average")


def template(student: Student) -> Check:
    """Whether a language model reads the data's prompts as they were made for it."""
    folder = Path(utils.split_paths(student.data)[0])
    if not (folder / FILE).is_file():
        return Check("template", True, "none, the student is no language model")
    prompt = Vocabulary.load(folder, student.task.target_dictionary.symbols).prompt
    if prompt is None:
        return Check("template", True, "none in the data")
    kind = "a chat template" if prompt.chat else "plain text"
    shots = f", {len(prompt.shots)} examples" if prompt.shots else ""
    if has_tokenizer(Path(student.path)):
        own, theirs = load_tokenizer(student.path), load_tokenizer(str(folder / TOKENIZER))
        if own.pieces != theirs.pieces:
            return Check(
                "template", False, f"{student.path} has another tokenizer ({len(own.pieces):,} pieces) than "
                f"the data ({len(theirs.pieces):,}); make the data with this model's (python -m "
                "sekd_fairseq.prepare_llm_data --tokenizer), and carry the cache over with python -m "
                "sekd_fairseq.align_cache",
            )  # fmt: skip
        if prompt.chat:
            turns = [{"role": "user", "content": "a"}]
            if own.chat(turns) != theirs.chat(turns):
                return Check(
                    "template", False, f"the chat template of {student.path} is not that of the data; make "
                    "the data again with this model's tokenizer",
                )  # fmt: skip
    return Check("template", True, f"{kind}{shots}, as in the data")


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder has a tokenizer beside it."""
    return (folder / SENTENCEPIECE).is_file() or any(folder.glob("tokenizer*"))


def shift(seen: Seen) -> Check:
    """Whether the teacher's best tokens are the references of their own places."""
    inside = ~seen.end[:-1]  # pairs of tokens within a sentence
    here = float((seen.best == seen.reference).mean())
    after = float((seen.best[:-1] == seen.reference[1:])[inside].mean()) if inside.any() else 0.0
    before = float((seen.best[1:] == seen.reference[:-1])[inside].mean()) if inside.any() else 0.0
    shares = f"{here:.1%} of best tokens are the reference, {before:.1%} the one before, {after:.1%} after"
    if max(before, after) <= 2 * here:  # a weak teacher's best tokens are now and then near
        return Check("shift", True, shares)
    return Check(
        "shift", False, f"{shares}: the teacher is off by a token; build the cache again with python -m "
        "sekd_fairseq.build_cache, from the checkpoint itself",
    )  # fmt: skip


def ranks_first(cache: TeacherCache, seen: Seen) -> Check:
    """Whether the teacher knows more than which token is the most frequent."""
    share = cache.manifest.quality["accuracy"]
    counts = np.bincount(seen.reference)
    frequent = float(counts.max() / counts.sum())
    found = f"{share:.1%} of references (the most frequent token alone: {frequent:.1%})"
    if share > frequent:
        return Check("ranks first", True, found)
    return Check(
        "ranks first", False, f"{found}; expected a teacher trained for this direction and these data: "
        "check --path of build_cache",
    )  # fmt: skip


def cost(
    cache: TeacherCache, student: Student, dataset: Any, device: torch.device, max_tokens: int
) -> Check:
    """Memory and time of training on this split, from some batches; no check, so always good."""
    where = "this CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    trained = sum(p.numel() for p in student.model.parameters() if p.requires_grad)
    symbols = len(student.task.target_dictionary)
    batch_bytes = 2 * 4 * symbols * max_tokens  # logits and their gradient
    needed = (
        f"about {trained * BYTES_OF_A_PARAMETER / 2**30:.2f} GiB for {trained:,} parameters with Adam "
        f"({trained * BYTES_WITH_BF16 / 2**30:.2f} with --bf16) and {batch_bytes / 2**30:.2f} GiB for the "
        f"logits of {max_tokens:,} tokens"
    )
    try:
        speed = trial(student, dataset, device, max_tokens)
    except torch.OutOfMemoryError:
        return Check(
            "cost", True, f"{needed}; a trial in float32 does not fit {where}: --hf-gradient-checkpointing, "
            "--sekd-chunk-tokens or a lower --max-tokens take less for a batch, --lora-r less for parameters, "
            "--bf16 half for activations, --shard-weights a part on each of several GPUs",
        )  # fmt: skip
    epoch = cache.manifest.tokens / max(speed, 1e-9)
    peak = ""
    if device.type == "cuda":
        peak = f", {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB at most in a trial without Adam"
    return Check(
        "cost", True, f"{needed}{peak}; about {epoch / 60:.1f} minutes per epoch on {where} "
        f"({speed:,.0f} tokens per second)",
    )  # fmt: skip


def trial(student: Student, dataset: Any, device: torch.device, max_tokens: int) -> float:
    """Target tokens per second, forward and backward, of some batches."""
    order = np.random.default_rng(1).permutation(len(dataset))[:200]
    batches = token_batches(dataset, order, max_tokens)[-3:]
    student.model.to(device).train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    tokens = 0
    start = time.perf_counter()
    for place, batch in enumerate(batches):
        if place == 1 or len(batches) == 1:  # the first warms up
            tokens, start = 0, time.perf_counter()
        sample = to_device(dataset.collater([dataset[i] for i in batch]), device)
        logits = flat_logits(student.model(**sample["net_input"])[0], sample["target"])
        pad = student.task.target_dictionary.pad()
        loss = functional.cross_entropy(logits.float(), sample["target"].view(-1), ignore_index=pad)
        torch.autograd.backward(loss)
        student.model.zero_grad()
        tokens += int(sample["ntokens"])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return tokens / (time.perf_counter() - start)
