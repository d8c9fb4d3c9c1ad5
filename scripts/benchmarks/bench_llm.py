"""Tokens a second of language models: fairseq-train with this plugin beside bare training loops.

    python scripts/benchmarks/bench_llm.py --minutes 3

The same model, batches and optimiser everywhere, in turn, in one process; bfloat16 on a GPU:

- transformers: the usual loop, padding masked, labels of -100 on prompts, transformers' own loss;
- transformers, lean: it keeps the logits of translations only, as the plugin does;
- fairseq-train --arch hf_causal_lm, with cross entropy, and with SE-KD from a cache.

Two epochs, of which the second is measured: a GPU that meets a shape for the first time chooses and
builds kernels for it, which the first of the loops would pay for the others. The bare loops have
nothing to wait for: batches lie in memory, weights are bfloat16 without a copy in float32 (which
fairseq keeps), AdamW is fused. Counted are positions that are not padding. Then, one run each: the
projection in chunks, gradient checkpointing, adapters. Prompts (60 tokens in the mean) and
translations (25) are made up. Writes bench_llm_gpu.csv and .json.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fairseq.tasks
import torch
import transformers
from benchmarking import RESULTS, Deadline, Target, keep_below, write_results
from synthetic_training import free_memory, make_cache, make_teacher, train, write_data
from torch import Tensor, nn

from sekd_fairseq.checkpoints import language_model_config
from sekd_fairseq.devices import to_device

GPU_MEMORY = 70  # GiB that a GPU has surely
PAD = 1
#: SmolLM2-135M's: 30 layers of 576, 49,152 pieces.
CONFIG = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048,
    "tie_word_embeddings": True, "vocab_size": 49152,
}  # fmt: skip
TINY = {
    **CONFIG, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 512,
}  # fmt: skip


class Size(NamedTuple):
    """What is trained."""

    sentences: int
    batch_tokens: int
    workers: int
    interval: int  # updates from one log to the next


GPU = Size(8000, 16384, 4, 10)
SMALLEST = Size(200, 1000, 0, 3)
PLAIN, LEAN = "transformers", "transformers, lean"
OURS, SEKD = "fairseq-train, cross entropy", "fairseq-train, SE-KD, cached"
CACHED = ["--criterion", "self_evolution_kd", "--teacher-cache", "CACHE"]
FAIRSEQ = {OURS: ["--criterion", "cross_entropy"], SEKD: CACHED}
#: Measured once each, after the others.
EXTRAS = {
    f"{SEKD}, chunked": [*CACHED, "--sekd-chunk-tokens", "auto"],
    f"{SEKD}, gradient checkpointing": [*CACHED, "--hf-gradient-checkpointing"],
    f"{SEKD}, adapters of rank 16": [*CACHED, "--lora-r", "16"],
}


class Measured(NamedTuple):
    """One run: tokens a second that are not padding, peak memory on a GPU, share of padding."""

    tokens_a_second: float
    peak_gib: float | None
    padding: float


class Batches:
    """The batches of both epochs of a training, in its order, as rows for a bare loop."""

    def __init__(self, data: Path, folder: Path, size: Size) -> None:
        cfg = language_model_config(str(data), "--hf-model", str(folder))
        task = fairseq.tasks.setup_task(cfg.task)
        task.build_model(cfg.model)  # tells the task that data are for a language model
        task.load_dataset("train")
        iterator = task.get_batch_iterator(
            task.dataset("train"),
            max_tokens=size.batch_tokens,
            required_batch_size_multiple=8,  # fairseq-train's default
            seed=1,
        )
        self.first, self.second = (
            [
                self._rows(batch["net_input"], batch["target"])
                for batch in iterator.next_epoch_itr(shuffle=True)
            ]
            for _ in range(2)
        )
        # fairseq logs by the number of all updates, those of the first epoch too.
        begun = len(self.first)
        logs = [
            done for done in range(1, len(self.second) + 1) if (begun + done) % size.interval == 0
        ]
        if len(logs) < 2:
            raise SystemExit(f"error: expected two logs an epoch, found {len(self.second)} batches")
        #: Of the second epoch, what is timed: from its first log to its last.
        self.timed = self.second[logs[0] : logs[-1]]

    @staticmethod
    def _rows(net_input: dict[str, Any], target: Tensor) -> dict[str, Tensor]:
        """Prompt and translation one after the other, padded on the right; labels are the next
        token where that is of the translation."""
        prompts, rows, labels = net_input["src_tokens"], [], []
        for prompt, translation in zip(prompts, target, strict=True):
            prompt = prompt[prompt.ne(PAD)][:-1]  # without its end
            translation = translation[translation.ne(PAD)]
            rows.append(torch.cat([prompt, translation[:-1]]))
            labels.append(torch.cat([torch.full((len(prompt) - 1,), -100), translation]))
        pad = nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
        tokens = pad(rows, batch_first=True, padding_value=PAD)
        return {
            "input_ids": tokens,
            "attention_mask": mask,
            "labels": pad(labels, batch_first=True, padding_value=-100),
        }

    def tokens(self) -> int:
        """Positions that are not padding, of all that is timed."""
        return sum(int(rows["attention_mask"].sum()) for rows in self.timed)

    def translated(self) -> int:
        """Tokens of translations, of all that is timed."""
        return sum(int(rows["labels"].ne(-100).sum()) for rows in self.timed)

    def padding(self) -> float:
        """Share of positions that are padding."""
        return 1 - self.tokens() / sum(rows["attention_mask"].numel() for rows in self.timed)


def whole_loss(model: Any, rows: dict[str, Tensor]) -> Tensor:
    """transformers' own loss; it shifts labels itself."""
    shifted = nn.functional.pad(rows["labels"], (1, 0), value=-100)[:, :-1]
    last = rows["labels"].gather(1, rows["attention_mask"].sum(dim=1, keepdim=True) - 1)
    # The row ends before the translation's last token, so one column more holds it.
    inputs = nn.functional.pad(rows["input_ids"], (0, 1), value=PAD)
    mask = nn.functional.pad(rows["attention_mask"], (0, 1))
    labels = nn.functional.pad(shifted, (0, 1), value=-100)
    labels.scatter_(1, rows["attention_mask"].sum(dim=1, keepdim=True), last)
    return model(input_ids=inputs, attention_mask=mask, labels=labels, use_cache=False).loss


def lean_loss(model: Any, rows: dict[str, Tensor]) -> Tensor:
    """Logits of translations only."""
    hidden = model.model(
        input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False
    ).last_hidden_state
    places = rows["places"]
    logits = model.lm_head(hidden.flatten(0, 1).index_select(0, places))
    return nn.functional.cross_entropy(logits.float(), rows["labels"].view(-1)[places])


def bare_loop(
    folder: Path, batches: Batches, loss_of: Callable[..., Tensor], device: torch.device
) -> Measured:
    """Train with nothing around the model."""
    free_memory()
    held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa"
    )
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def prepared(epoch: list[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        for rows in epoch:
            places = rows["labels"].view(-1).ne(-100).nonzero().squeeze(1)
            ready = {**rows, "places": places}
            if device.type == "cuda":
                ready = {key: value.pin_memory() for key, value in ready.items()}
            yield ready

    def train_on(epoch: list[dict[str, Tensor]]) -> float:
        start = now(device)
        for rows in epoch:
            loss_of(model, to_device(rows, device)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return now(device) - start

    train_on(list(prepared(batches.first)))
    seconds = train_on(list(prepared(batches.timed)))
    peak = (torch.cuda.max_memory_allocated() - held) / 2**30 if device.type == "cuda" else None
    return Measured(batches.tokens() / seconds, peak, batches.padding())


def now(device: torch.device) -> float:
    """The time when a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def with_fairseq(
    data: Path, folder: Path, batches: Batches, size: Size, options: Sequence[str]
) -> Measured:
    """Train with the plugin; the batches are the same, in the same order."""
    words = ["--arch", "hf_causal_lm", "--hf-model", str(folder), "--max-tokens"]
    words += [str(size.batch_tokens), "--num-workers", str(size.workers), *options]
    run = train(data, words, size.interval)
    found, expected = run.mean("wpb"), batches.translated() / len(batches.timed)
    if abs(found / expected - 1) > 0.001:
        raise SystemExit(f"error: expected {expected} translated tokens a batch, found {found}")
    tokens = batches.tokens() / len(batches.timed)
    return Measured(run.updates_a_second * tokens, run.peak_gib, run.mean("padding"))


def save_model(source: Path | None, target: Path, smallest: bool) -> tuple[Path, int]:
    """The folder of the model, random unless ``source`` names one, and its vocabulary's size."""
    if source is not None:
        return source, int(json.loads((source / "config.json").read_text())["vocab_size"])
    config = transformers.AutoConfig.for_model(**(TINY if smallest else CONFIG))
    torch.manual_seed(1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(target)
    return target, config.vocab_size


def write(
    found: dict[str, list[Measured]], device: torch.device, output: Path, quiet: bool
) -> None:
    """The table and the targets of what is measured so far."""
    speeds = {
        name: statistics.median(run.tokens_a_second for run in runs) for name, runs in found.items()
    }
    bare = max((speeds[name] for name in (PLAIN, LEAN) if name in speeds), default=None)
    rows = []
    for name, runs in found.items():
        row = {
            "loop": name,
            "tokens_a_second": round(speeds[name]),
            "ratio": round(speeds[name] / bare, 4) if bare else "",
            "padding": round(runs[-1].padding, 4),
            "rounds": len(runs),
        }
        if runs[0].peak_gib is not None:
            row["peak_gib"] = round(max(run.peak_gib or 0.0 for run in runs), 3)
        rows.append(row)
    targets = [
        Target(
            f"{name}: tokens a second / the faster bare loop",
            speeds[name] / bare if bare and name in speeds else None,
            0.95,
            at_least=True,
        )
        for name in FAIRSEQ
    ]
    shares = [run.padding for name in FAIRSEQ for run in found.get(name, [])]
    targets.append(Target("share of positions that are padding", max(shares, default=None), 0.1))
    write_results("bench_llm_gpu", rows, targets, device, output, quiet)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--hf-model", type=Path, metavar="FOLDER", help="a model (default: SmolLM2-135M's shape)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of the loops (%(default)s)")
    parser.add_argument("--smallest", action="store_true", help="a tiny model, for any machine")
    parser.add_argument("--minutes", type=float, help="end after about so long")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args()
    deadline = Deadline(args.minutes)
    logging.getLogger().setLevel(logging.WARNING)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.smallest:
        parser.error("expected a GPU, found none; --smallest runs anywhere")
    keep_below(GPU_MEMORY, device)
    size = SMALLEST if args.smallest else GPU
    rounds = 1 if args.smallest else args.rounds
    found: dict[str, list[Measured]] = {}
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        folder, vocabulary = save_model(args.hf_model, temporary / "model", args.smallest)
        data, cache = temporary / "data", temporary / "cache"
        write_data(data, vocabulary, size.sentences, source=60, target=25)
        batches = Batches(data, folder, size)
        words = ["--arch", "hf_causal_lm", "--hf-model", str(folder), "--max-tokens", "4096"]
        teacher = make_teacher(data, temporary / "teacher", words)
        make_cache(data, teacher, cache)
        paths = {"CACHE": str(cache)}

        def ours(words: list[str]) -> Callable[[], Measured]:
            options = [paths.get(word, word) for word in words]
            return lambda: with_fairseq(data, folder, batches, size, options)

        runs: dict[str, Callable[[], Measured]] = {
            LEAN: lambda: bare_loop(folder, batches, lean_loss, device),
            **{method: ours(words) for method, words in FAIRSEQ.items()},
            PLAIN: lambda: bare_loop(folder, batches, whole_loss, device),
        }
        extras = {method: ours(words) for method, words in EXTRAS.items()}
        taken = 0.0
        for method, run in [*runs.items(), *extras.items(), *(rounds - 1) * [*runs.items()]]:
            if found and deadline.passed(taken):
                break
            start = time.monotonic()
            try:
                found.setdefault(method, []).append(run())
            except (SystemExit, ImportError, torch.OutOfMemoryError) as error:
                print(f"  {method}: not measured ({str(error)[:80]})")
                if not found[method]:
                    del found[method]
                continue
            taken = time.monotonic() - start
            write(found, device, args.output, quiet=True)
    write(found, device, args.output, quiet=False)


if __name__ == "__main__":
    main()
