"""Time and memory of the criterions beside fairseq's own and beside dense distillation.

    python scripts/bench_criterion.py

Two parts. ``criterion``: forward and backward of the criterion alone, logits given. ``model``:
output projection, criterion and both their backward passes, which is where the chunked path lives.
All contenders of a setting run in turn in this one process. Writes results/bench_criterion.csv,
.json and .png. Uses the GPU (bfloat16) if there is one. Losses of TRL and torchtune are measured
too where these are installed (pip install trl torchtune).
"""

import argparse
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from benchmarking import RESULTS, Target, Timing, peak_bytes, time_in_turn, write_results
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.models.transformer import TransformerDecoderBase
from torch import Tensor, nn

import sekd_fairseq.tasks  # noqa: F401 (registers)
from analysis.terminal import progress
from sekd_fairseq.criterions.self_evolution_kd import (
    SelfEvolutionKDConfig,
    SelfEvolutionKDCriterion,
)
from sekd_fairseq.data import teacher_rows

VOCABULARIES = (8192, 32768, 131072)
TOKENS = (512, 2048, 8192)
SUPPORTS = (8, 16, 64)
WIDTH = 512
CHUNK = 256
#: Full-width losses are measured up to so many logits on a CPU: beyond, one call takes half a minute.
FULL_WIDTH_LOGITS = 2**26
PAD = 1


class Decoder(nn.Module):
    """The end of a decoder: features in, logits or the features themselves out."""

    output_layer = TransformerDecoderBase.output_layer
    adaptive_softmax = None

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.output_projection = nn.Linear(weight.size(1), weight.size(0), bias=False)
        self.output_projection.weight = nn.Parameter(weight)

    def forward(self, features: Tensor, features_only: bool = False) -> tuple[Tensor, None]:
        return (features if features_only else self.output_projection(features)), None


class Model(nn.Module):
    """A model whose output is ``values``: logits as they are, or features to be projected."""

    def __init__(self, values: Tensor, weight: Tensor | None = None) -> None:
        super().__init__()
        self.values = nn.Parameter(values)
        self.decoder = Decoder(weight) if weight is not None else SimpleNamespace()

    def forward(self, **options: Any) -> tuple[Tensor, None]:
        if isinstance(self.decoder, Decoder):
            return self.decoder(self.values, **options)  # type: ignore[no-any-return]
        return self.values, None

    def get_normalized_probs(self, output: Any, log_probs: bool, sample: Any = None) -> Tensor:
        return torch.log_softmax(output[0], dim=-1, dtype=torch.float32)

    def get_targets(self, sample: Any, output: Any) -> Tensor:
        target: Tensor = sample["target"]
        return target


def task(vocabulary: int) -> Any:
    """What the criterions ask of a task."""
    dictionary = type("Dictionary", (), {"pad": lambda self: PAD, "__len__": lambda _: vocabulary})
    config = SimpleNamespace(teacher_cache="here", stored_difficulty=None)
    return SimpleNamespace(
        target_dictionary=dictionary(),
        cfg=config,
        teacher_temperature=1.0,
        teacher_rows=lambda sample: teacher_rows(sample["teacher"]),
    )


def teacher_entry(teacher: Tensor, target: Tensor, k: int) -> dict[str, Tensor]:
    """A batch's teacher, as the loader makes it from a cache of ``k`` best tokens."""
    log_p = torch.log_softmax(teacher.float(), dim=-1)
    gold = log_p.gather(1, target.unsqueeze(1))
    best = log_p.scatter(1, target.unsqueeze(1), -torch.inf).topk(k - 1, dim=1)
    ids = torch.cat([target.unsqueeze(1), best.indices], dim=1)
    values = torch.cat([gold, best.values], dim=1)
    outside = (1 - values.double().exp().sum(dim=1)).clamp_min(0)
    return {
        "ids": ids,
        "size": torch.full_like(target, k),
        "log_p": values.half(),
        "gold_log_p": gold.squeeze(1).double(),
        "outside_mass": outside,
    }


def dense_self_evolution(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """SE-KD on all of the vocabulary, written the usual way; plus cross entropy."""
    log_p = torch.log_softmax(teacher.float(), dim=-1)
    p = log_p.exp()
    log_q = torch.log_softmax(student.float(), dim=-1)
    with torch.no_grad():
        difficulty = (p * (log_p - log_q)).sum(dim=-1, keepdim=True)
        ratio = 0.5 * (difficulty - difficulty.median()).clamp(0, 1)
    prior = (0.5 * p).scatter_add(1, target.unsqueeze(1), torch.full_like(p[:, :1], 0.5))
    mixed = (1 - ratio) * log_q.exp() + ratio * prior
    divergence = (p * (log_p - mixed.log())).sum()
    return 0.7 * divergence + 0.3 * nn.functional.nll_loss(log_q, target, reduction="sum")


def first_of(*places: str) -> Any:
    """The first ``module:name.name`` that can be imported, or None."""
    for place in places:
        module, _, names = place.partition(":")
        try:
            found = importlib.import_module(module)
            for name in names.split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError, RuntimeError):
            continue
        return found
    return None


def other_losses() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Losses of installed toolkits, each ``f(student, teacher, target)``."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
    name = "GKDTrainer.generalized_jsd_loss"
    jsd = first_of(f"trl.experimental.gkd:{name}", f"trl:{name}")
    if jsd is not None:
        found["trl generalised JSD"] = lambda s, t, y: jsd(
            s.unsqueeze(0), t.unsqueeze(0), labels=y.unsqueeze(0), beta=0.5
        )
    loss = first_of(
        "torchtune.modules.loss:ForwardKLLoss", "torchtune.modules.loss.kd_losses:ForwardKLLoss"
    )
    if loss is not None:
        found["torchtune forward KL"] = loss()
    return found


def criterion_step(criterion: Any, model: Model, sample: dict[str, Any]) -> Callable[[], None]:
    """Forward and backward of a criterion."""

    def step() -> None:
        criterion(model, sample)[0].backward()
        model.zero_grad(set_to_none=True)  # at the end: what is freed first would hide a peak

    return step


def dense_step(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], model: Model, teacher: Tensor, target: Tensor
) -> Callable[[], None]:
    """Forward and backward of a loss on logits."""

    def step() -> None:
        loss(model()[0], teacher, target).backward()
        model.zero_grad(set_to_none=True)

    return step


def ours(vocabulary: int, chunk: int = 0) -> SelfEvolutionKDCriterion:
    """SE-KD with its defaults, in ``student`` mode."""
    config = SelfEvolutionKDConfig(
        integration="student", sekd_chunk_tokens=chunk, sentence_avg=False
    )
    config._name = "self_evolution_kd"
    return SelfEvolutionKDCriterion(config, task(vocabulary))


def fits(vocabulary: int, tokens: int, copies: int) -> bool:
    """Whether this machine's memory holds so many copies of the logits in float32."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return copies * tokens * vocabulary * 4 < 0.8 * memory


def settings(quick: bool, device: torch.device) -> Iterator[tuple[str, int, int]]:
    """Part, vocabulary and tokens of each measurement that this machine has the memory for."""
    for part in ("criterion", "model"):
        for vocabulary in VOCABULARIES:
            for tokens in TOKENS:
                wanted = not quick or (vocabulary, tokens) in ((32768, 2048), (131072, 2048))
                if wanted and (device.type != "cpu" or fits(vocabulary, tokens, copies=6)):
                    yield part, vocabulary, tokens


def contenders(
    part: str, vocabulary: int, tokens: int, device: torch.device
) -> dict[str, Callable[[], None]]:
    """Name and step of everything that is compared in a setting."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    target = torch.randint(4, vocabulary, (tokens,), generator=generator, device=device)
    teacher = random(tokens, vocabulary) * 3
    sample: dict[str, Any] = {"target": target.view(1, -1), "ntokens": tokens, "net_input": {}}
    entries = {k: teacher_entry(teacher, target, k) for k in SUPPORTS}
    if part == "criterion":
        model = Model(random(1, tokens, vocabulary) * 3)
    else:
        model = Model(random(1, tokens, WIDTH), random(vocabulary, WIDTH) * WIDTH**-0.5 * 3)
    stock = LabelSmoothedCrossEntropyCriterion(task(vocabulary), False, 0.1)
    found = {"stock": criterion_step(stock, model, sample)}
    for k in SUPPORTS if part == "criterion" else SUPPORTS[-1:]:
        found[f"cached k={k}"] = criterion_step(
            ours(vocabulary), model, {**sample, "teacher": entries[k]}
        )
    if part == "model":
        found[f"chunked k={SUPPORTS[-1]}"] = criterion_step(
            ours(vocabulary, CHUNK), model, {**sample, "teacher": entries[SUPPORTS[-1]]}
        )
        return found
    if device.type == "cpu" and tokens * vocabulary > FULL_WIDTH_LOGITS:
        return found

    def flat(loss: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda student, *others: loss(student.view(-1, vocabulary), *others)

    found["dense"] = dense_step(flat(dense_self_evolution), model, teacher, target)
    for name, loss in other_losses().items():
        found[name] = dense_step(flat(loss), model, teacher, target)
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Ratios to the stock criterion, time and memory, by contender."""
    chosen = {
        (row["part"], row["contender"], row["vocabulary"]): row
        for row in rows
        if row["tokens"] == 2048 and row["contender"] != "stock"
    }
    names = list(dict.fromkeys(key[:2] for key in chosen))
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    colours = plt.get_cmap("viridis")([0.15, 0.5, 0.85])
    for axis, key in zip(axes, ("time_ratio", "memory_ratio"), strict=True):
        for offset, vocabulary in enumerate(VOCABULARIES):
            bars = {
                place + 0.25 * (offset - 1): chosen[(*name, vocabulary)][key]
                for place, name in enumerate(names)
                if (*name, vocabulary) in chosen
            }
            axis.barh(
                list(bars),
                list(bars.values()),
                0.25,
                color=colours[offset],
                label=f"V = {vocabulary // 1024}k",
            )
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_xlabel(f"{key.split('_')[0]} / stock criterion")
    axes[0].set_yticks(range(len(names)), [f"{name} ({part})" for part, name in names])
    axes[0].invert_yaxis()
    axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--quick", action="store_true", help="only the settings with a target")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    rows: list[dict[str, Any]] = []
    for part, vocabulary, tokens in progress(
        list(settings(args.quick, device)), desc="bench_criterion"
    ):
        steps = contenders(part, vocabulary, tokens, device)
        times: dict[str, Timing] = time_in_turn(steps, device)
        memory = {name: peak_bytes(step, device) for name, step in steps.items()}
        for name, timing in times.items():
            rows.append(
                {
                    "part": part,
                    "vocabulary": vocabulary,
                    "tokens": tokens,
                    "contender": name,
                    "seconds": round(timing.median, 6),
                    "seconds_low": round(timing.low, 6),
                    "seconds_high": round(timing.high, 6),
                    "rounds": timing.rounds,
                    "peak_mib": round(memory[name] / 2**20, 2),
                    "time_ratio": round(timing.median / times["stock"].median, 4),
                    "memory_ratio": round(memory[name] / memory["stock"], 4),
                }
            )

    def ratio(part: str, vocabulary: int, name: str, key: str, base: str = "stock") -> float:
        values = {
            row["contender"]: row[key]
            for row in rows
            if (row["part"], row["vocabulary"], row["tokens"]) == (part, vocabulary, 2048)
        }
        return float(values[name] / values[base])

    where = "V=32768, 2048 tokens, k=64"
    large = "V=131072, 2048 tokens, k=64"
    targets = [
        Target(
            f"time / stock criterion, {where}",
            ratio("criterion", 32768, "cached k=64", "seconds"),
            1.10,
        ),
        Target(
            f"peak memory / stock criterion, {where}",
            ratio("criterion", 32768, "cached k=64", "peak_mib"),
            1.05,
        ),
        Target(
            f"time / dense online KD without its teacher's forward, {where}",
            ratio("criterion", 32768, "cached k=64", "seconds", "dense"),
            0.5,
        ),
        Target(
            f"chunked: peak memory above the model / stock, {large}",
            ratio("model", 131072, "chunked k=64", "peak_mib"),
            0.35,
        ),
        Target(
            f"chunked: time / stock, {large}",
            ratio("model", 131072, "chunked k=64", "seconds"),
            1.15,
        ),
    ]
    write_results("bench_criterion", rows, targets, device, args.output)
    draw(rows, args.output / "bench_criterion.png")


if __name__ == "__main__":
    main()
