"""Time and memory of the criterions beside fairseq's own and beside dense distillation.

    python scripts/benchmarks/bench_criterion.py

Two parts. ``criterion``: forward and backward of the criterion alone, logits given. ``model``:
output projection, criterion and both their backward passes, which is where the chunked path lives.
All contenders of a setting run in turn in this one process. Writes results/bench_criterion.csv,
.json and .png. Losses of TRL, torchtune and Liger Kernel are measured too where these are
installed.

With a GPU, in bfloat16, it measures larger settings, the most important first, beside the floor of
a loss with a projection (its three matrix products alone), and writes bench_criterion_gpu.csv and
.json after each. The logits of every such setting are larger than the caches of an H100 (50 MB),
so no call finds its input there.

One file of more than 400 lines: contenders, settings and drawing are read together to see what is compared.
"""

import argparse
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from benchmarking import (
    RESULTS,
    Deadline,
    Target,
    Timing,
    keep_below,
    peak_bytes,
    time_in_turn,
    write_results,
)
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.models.transformer import TransformerDecoderBase
from torch import Tensor, nn

import sekd_fairseq.tasks  # noqa: F401 (registers)
from analysis.terminal import progress
from sekd_fairseq.criterions.self_evolution_kd import (
    SelfEvolutionKDConfig,
    SelfEvolutionKDCriterion,
)
from sekd_fairseq.datasets import teacher_tokens

VOCABULARIES = (8192, 32768, 131072)
TOKENS = (512, 2048, 8192)
SUPPORTS = (8, 16, 64)
WIDTH = 512
CHUNK = "256"
#: Full-width losses are measured up to so many logits on a CPU: beyond, one call takes half a minute.
FULL_WIDTH_LOGITS = 2**26
PAD = 1
GPU_SUPPORT = 32
#: A GPU has more memory than this, in GiB: the rest is left to its driver and to others.
GPU_MEMORY = 70


class Setting(NamedTuple):
    """What is measured: the criterion alone (width 0), or with a projection from ``width``."""

    part: str
    vocabulary: int
    tokens: int
    width: int = 0


#: The most important first: they are measured while time lasts.
GPU_SETTINGS = (
    Setting("model", 131072, 8192, 2048),
    Setting("criterion", 131072, 8192),
    Setting("criterion", 32768, 2048),
    Setting("criterion", 32768, 8192),
    Setting("criterion", 131072, 2048),
    Setting("model", 32768, 8192, 1024),
    Setting("model", 131072, 4096, 1024),
    Setting("model", 262144, 4096, 640),
    Setting("model", 32768, 2048, 512),
)
SMALLEST = (Setting("model", 512, 64, 16), Setting("criterion", 512, 64))


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
        teacher_at=lambda sample, positions: teacher_tokens(sample["teacher"]),
    )


def teacher_entry(teacher: Tensor, target: Tensor, k: int) -> dict[str, Any]:
    """A batch's teacher, as the loader makes it from a cache of ``k`` best tokens."""
    step = max(1, 2**28 // teacher.size(1))  # all tokens at once in float32 may not fit
    parts = [
        teacher_part(*part, k) for part in zip(teacher.split(step), target.split(step), strict=True)
    ]
    entry = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    return {**entry, "temperature": 1.0}


def teacher_part(teacher: Tensor, target: Tensor, k: int) -> dict[str, Tensor]:
    """:func:`teacher_entry` of some tokens."""
    log_p = torch.log_softmax(teacher, dim=-1, dtype=torch.float32)
    gold = log_p.gather(1, target.unsqueeze(1))
    best = log_p.scatter_(1, target.unsqueeze(1), -torch.inf).topk(k - 1, dim=1)
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
    liger = first_of("liger_kernel.transformers:LigerJSD")
    if liger is not None:
        found["liger JSD"] = lambda s, t, _: liger(beta=0.5)(
            s.log_softmax(-1, torch.float32), t.log_softmax(-1, torch.float32)
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


def ours(vocabulary: int, chunk: str = "0", **options: Any) -> SelfEvolutionKDCriterion:
    """SE-KD with its defaults but for ``options``."""
    config = SelfEvolutionKDConfig(sentence_avg=False, sekd_chunk_tokens=chunk, **options)
    config._name = "self_evolution_kd"
    return SelfEvolutionKDCriterion(config, task(vocabulary))


def fits(vocabulary: int, tokens: int, copies: int) -> bool:
    """Whether this machine's memory holds so many copies of the logits in float32."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return copies * tokens * vocabulary * 4 < 0.8 * memory


def cpu_settings(quick: bool) -> Iterator[Setting]:
    """Each measurement that this machine has the memory for."""
    for part in ("criterion", "model"):
        for vocabulary in VOCABULARIES:
            for tokens in TOKENS:
                wanted = not quick or (vocabulary, tokens) in ((32768, 2048), (131072, 2048))
                if wanted and fits(vocabulary, tokens, copies=6):
                    yield Setting(part, vocabulary, tokens, WIDTH if part == "model" else 0)


class Inputs:
    """Random inputs of a setting: the model, a teacher's logits, the batch."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        _, vocabulary, tokens, width = setting
        generator = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

        self.target = torch.randint(4, vocabulary, (tokens,), generator=generator, device=device)
        self.teacher = random(tokens, vocabulary).mul_(3)
        self.sample: dict[str, Any] = {
            "target": self.target.view(1, -1),
            "ntokens": tokens,
            "net_input": {},
        }
        if width:
            weight = random(vocabulary, width).mul_(3 * width**-0.5)
            self.model = Model(random(1, tokens, width), weight)
        else:
            self.model = Model(random(1, tokens, vocabulary).mul_(3))

    def with_teacher(self, k: int) -> dict[str, Any]:
        """The batch with a cached teacher."""
        return {
            **self.sample,
            "teacher": teacher_entry(self.teacher, self.target, k),
            "target_positions": torch.arange(len(self.target), device=self.target.device),
        }

    def dense_step(self, loss: Callable[..., Tensor]) -> Callable[[], None]:
        """A step of a loss on logits (N, V), teacher's logits and targets."""
        vocabulary = self.teacher.size(1)

        def flat(student: Tensor, *others: Tensor) -> Tensor:
            return loss(student.view(-1, vocabulary), *others)

        return dense_step(flat, self.model, self.teacher, self.target)


def cpu_contenders(setting: Setting) -> dict[str, Callable[[], None]]:
    """Name and step of everything that is compared in a setting on a CPU."""
    part, vocabulary, tokens, _ = setting
    inputs = Inputs(setting, torch.device("cpu"))
    stock = LabelSmoothedCrossEntropyCriterion(task(vocabulary), False, 0.1)
    found = {"stock": criterion_step(stock, inputs.model, inputs.sample)}
    for k in SUPPORTS if part == "criterion" else SUPPORTS[-1:]:
        criterion = ours(vocabulary, integration="student")
        found[f"cached k={k}"] = criterion_step(criterion, inputs.model, inputs.with_teacher(k))
    if part == "model":
        k = SUPPORTS[-1]
        criterion = ours(vocabulary, CHUNK, integration="student")
        found[f"chunked k={k}"] = criterion_step(criterion, inputs.model, inputs.with_teacher(k))
    elif tokens * vocabulary <= FULL_WIDTH_LOGITS:
        found["dense"] = inputs.dense_step(dense_self_evolution)
        for name, loss in other_losses().items():
            found[name] = inputs.dense_step(loss)
    return found


def gpu_contenders(setting: Setting, device: torch.device) -> dict[str, Callable[[], None]]:
    """Name and step of everything that is compared in a setting on a GPU."""
    vocabulary = setting.vocabulary
    inputs = Inputs(setting, device)
    cached = inputs.with_teacher(GPU_SUPPORT)
    stock = LabelSmoothedCrossEntropyCriterion(task(vocabulary), False, 0.1)
    found = {
        "stock": criterion_step(stock, inputs.model, inputs.sample),
        "torch": inputs.dense_step(
            lambda student, _, target: nn.functional.cross_entropy(
                student, target, reduction="sum", label_smoothing=0.1
            )
        ),
        "cached": criterion_step(ours(vocabulary), inputs.model, cached),
        "cached, student": criterion_step(
            ours(vocabulary, integration="student"), inputs.model, cached
        ),
    }
    if setting.width:
        for chunk in ("1024", "auto"):
            criterion = ours(vocabulary, chunk)
            found[f"chunked, {chunk}"] = criterion_step(criterion, inputs.model, cached)
        found["floor"] = matrix_products(inputs)
        liger = first_of("liger_kernel.transformers:LigerFusedLinearCrossEntropyLoss")
        if liger is not None and device.type == "cuda":
            found["liger"] = liger_step(liger(reduction="sum", label_smoothing=0.1), inputs)
    found["dense"] = inputs.dense_step(dense_self_evolution)
    if not setting.width and device.type == "cuda":
        for name, loss in other_losses().items():
            found[name] = inputs.dense_step(loss)
    return found


def matrix_products(inputs: Inputs) -> Callable[[], None]:
    """What no loss with a projection can do without: features to logits, and both gradients."""
    features = inputs.model.values.detach()[0]
    weight = inputs.model.decoder.output_projection.weight.detach()
    gradient = torch.randn_like(features @ weight.t())

    def step() -> None:
        features @ weight.t()
        gradient @ weight
        gradient.t() @ features

    return step


def liger_step(loss: Any, inputs: Inputs) -> Callable[[], None]:
    """Forward and backward of Liger Kernel's cross entropy, which projects in chunks."""
    model = inputs.model

    def step() -> None:
        weight = model.decoder.output_projection.weight
        loss(weight, model.values[0], inputs.target).backward()
        model.zero_grad(set_to_none=True)

    return step


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


def measure(
    setting: Setting, steps: dict[str, Callable[[], None]], device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """A setting's rows of the table, one a contender."""
    drop_what_fails(steps)
    rounds = (3, 20) if device.type == "cuda" else (5, 20)
    times: dict[str, Timing] = time_in_turn(steps, device, rounds, seconds)
    memory = {name: peak_bytes(step, device) for name, step in steps.items()}
    return [
        {
            **setting._asdict(),
            "contender": name,
            "seconds": round(timing.median, 6),
            "seconds_low": round(timing.low, 6),
            "seconds_high": round(timing.high, 6),
            "rounds": timing.rounds,
            "peak_mib": round(memory[name] / 2**20, 2),
            "time_ratio": round(timing.median / times["stock"].median, 4),
            "memory_ratio": round(memory[name] / memory["stock"], 4),
        }
        for name, timing in times.items()
    ]


def drop_what_fails(steps: dict[str, Callable[[], None]]) -> None:
    """Call each step once, and forget those that this machine cannot run: one that a GPU has not the
    memory for, another project's that does not know this version of something."""
    for name, step in list(steps.items()):
        try:
            step()
        except Exception as error:
            print(f"  {name}: not measured ({type(error).__name__}: {str(error)[:80]!r})")
            del steps[name]
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


class Figures:
    """Looks up and divides the figures of a table."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = {
            (Setting(*(row[name] for name in Setting._fields)), row["contender"]): row
            for row in rows
        }

    def ratio(self, setting: Setting, name: str, key: str, base: str = "stock") -> float | None:
        """A contender's figure over another's; None where one was not measured."""
        found, beside = self.rows.get((setting, name)), self.rows.get((setting, base))
        return float(found[key] / beside[key]) if found and beside else None


def cpu_targets(figures: Figures) -> list[Target]:
    """Limits of two settings on a CPU."""
    alone, large = Setting("criterion", 32768, 2048), Setting("model", 131072, 2048, WIDTH)
    where, beside = "V=32768, 2048 tokens, k=64", "V=131072, 2048 tokens, k=64"
    return [
        Target(
            f"time / stock criterion, {where}", figures.ratio(alone, "cached k=64", "seconds"), 1.10
        ),
        Target(
            f"peak memory / stock criterion, {where}",
            figures.ratio(alone, "cached k=64", "peak_mib"),
            1.05,
        ),
        Target(
            f"time / dense online KD without its teacher's forward, {where}",
            figures.ratio(alone, "cached k=64", "seconds", "dense"),
            0.5,
        ),
        Target(
            f"chunked: peak memory above the model / stock, {beside}",
            figures.ratio(large, "chunked k=64", "peak_mib"),
            0.35,
        ),
        Target(
            f"chunked: time / stock, {beside}",
            figures.ratio(large, "chunked k=64", "seconds"),
            1.15,
        ),
    ]


def gpu_targets(figures: Figures, settings: Sequence[Setting]) -> list[Target]:
    """Limits on a GPU: of the criterion alone everywhere, with projection in the first setting."""
    targets = []
    for setting in sorted(one for one in settings if one.part == "criterion"):
        where = f"V={setting.vocabulary}, {setting.tokens} tokens"
        targets += [
            Target(f"time / stock, {where}", figures.ratio(setting, "cached", "seconds"), 0.8),
            Target(
                f"peak memory / stock, {where}", figures.ratio(setting, "cached", "peak_mib"), 0.5
            ),
        ]
    first = next(one for one in settings if one.part == "model")
    where = f"with projection, V={first.vocabulary}, D={first.width}, {first.tokens} tokens"
    chunked = "chunked, auto"
    for text, contender, key, base, limit in (
        ("time / stock", "cached", "seconds", "stock", 0.7),
        ("time / three matrix products", "cached", "seconds", "floor", 1.3),
        ("chunked: time / stock", chunked, "seconds", "stock", 1.0),
        ("chunked: peak memory / stock", chunked, "peak_mib", "stock", 0.2),
        ("chunked: time / Liger's fused linear cross entropy", chunked, "seconds", "liger", 1.0),
    ):
        targets.append(
            Target(f"{text}, {where}", figures.ratio(first, contender, key, base), limit)
        )
    return targets


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--quick", action="store_true", help="CPU: only the settings with a target")
    parser.add_argument(
        "--smallest",
        action="store_true",
        help="what is measured on a GPU, at a size for any machine",
    )
    parser.add_argument("--minutes", type=float, help="end after about so long")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    on_gpu = device.type == "cuda" or args.smallest
    settings = list(cpu_settings(args.quick))
    if on_gpu:
        settings = list(SMALLEST if args.smallest else GPU_SETTINGS)
        keep_below(GPU_MEMORY, device)
    name = "bench_criterion_gpu" if on_gpu else "bench_criterion"
    deadline = Deadline(args.minutes)
    rows: list[dict[str, Any]] = []
    targets: list[Target] = []
    for number, setting in enumerate(progress(settings, desc=name)):
        if deadline.passed():
            print(f"time is over after {number} of {len(settings)} settings")
            break
        steps = gpu_contenders(setting, device) if on_gpu else cpu_contenders(setting)
        rows += measure(setting, steps, device, deadline.share(len(settings) - number, 10.0))
        del steps
        if on_gpu:
            targets = gpu_targets(Figures(rows), settings)
            write_results(name, rows, targets, device, args.output, quiet=True)
    if not on_gpu:
        targets = cpu_targets(Figures(rows))
    write_results(name, rows, targets, device, args.output)
    if not on_gpu:
        draw(rows, args.output / "bench_criterion.png")


if __name__ == "__main__":
    main()
