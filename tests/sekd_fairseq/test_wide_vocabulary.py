"""Models of a wide vocabulary: the same numbers without the logits of a whole batch."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.distributed import ModuleProxyWrapper
from omegaconf import OmegaConf
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from sekd_fairseq.criterions import projection
from sekd_fairseq.criterions.cached_kd import CachedKDConfig, CachedKDCriterion
from sekd_fairseq.criterions.cross_entropy import LanguageModelLabelSmoothedCrossEntropy
from sekd_fairseq.criterions.projection import saves_memory
from sekd_fairseq.errors import UserError
from sekd_fairseq.losses import TeacherTokens, chunked
from sekd_fairseq.losses.support import reference_first
from sekd_fairseq.teachers.online import OnlineTeacher

from .language_models import COMMON, FAMILIES

PAD = 1
SMALL_BERT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
FAMILY = {
    "llama-tied": FAMILIES["llama-tied"],
    # A cap on the logits, and factors of them.
    "gemma2": {**COMMON, "model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 0.5},
    "cohere": {**COMMON, "model_type": "cohere", "logit_scale": 0.25},
    "granite": {**COMMON, "model_type": "granite", "logits_scaling": 4.0},
    # A layer before the projection: nothing can be applied in chunks.
    "bert": {"model_type": "bert", "is_decoder": True, "num_attention_heads": 4, **SMALL_BERT},
}


def config(name: str, **options: Any) -> Any:
    return OmegaConf.create({"_name": name, "sentence_avg": False, **options})


CONFIGS = {
    "plain": config("cross_entropy"),
    "by sentence": config("cross_entropy", sentence_avg=True),
    "smoothed": config("label_smoothed_cross_entropy", label_smoothing=0.1),
    "no smoothing": config("label_smoothed_cross_entropy", label_smoothing=0.0),
    "accuracy": config(
        "label_smoothed_cross_entropy", label_smoothing=0.1, report_accuracy=True,
        ignore_prefix_size=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "chunks"),
    [
        ("llama-tied", False),
        ("llama-tied", True),
        ("gemma2", True),
        ("cohere", True),
        ("granite", True),
        ("bert", True),
    ],
)
def test_language_models_have_the_same_loss_gradient_and_log(
    llm_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, chunks: bool
) -> None:
    import fairseq.tasks

    from sekd_fairseq.checkpoints import language_model_config

    path = tmp_path / "config.json"
    path.write_text(json.dumps(FAMILY[family]))
    cfg = language_model_config(str(llm_data), "--hf-config", str(path))
    task = fairseq.tasks.setup_task(cfg.task)
    stock = {name: task.build_criterion(one) for name, one in CONFIGS.items()}
    torch.manual_seed(1)
    model = task.build_model(cfg.model)
    assert (model.decoder.output_projection is None) == (family == "bert")
    sizes: list[int] = []
    if chunks:
        monkeypatch.setattr(chunked, "CHUNK_BYTES", 0)
        per_chunk = chunked.tokens_per_chunk

        def counted(tokens: int, weight: Tensor) -> int:
            sizes.append(per_chunk(tokens, weight))
            return sizes[-1]

        monkeypatch.setattr(chunked, "tokens_per_chunk", counted)
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    batch = dataset.collater([dataset[i] for i in range(9)])
    assert batch["target"].eq(PAD).any()
    for name, expected in stock.items():
        assert type(expected) in (CrossEntropyCriterion, LabelSmoothedCrossEntropyCriterion)
        criterion = task.build_criterion(CONFIGS[name])
        assert type(criterion).__module__ == "sekd_fairseq.criterions.cross_entropy"
        assert isinstance(criterion, type(expected))
        found = []
        for one in (expected, criterion):
            model.zero_grad()
            loss, size, log = one(model, batch)
            (-2.5 * loss).backward()  # a non-unit upstream gradient
            gradients = {name: weight.grad for name, weight in model.named_parameters()}
            found.append((loss, size, {k: torch.as_tensor(v) for k, v in log.items()}, gradients))
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    taken = chunks and family != "bert"
    assert len(sizes) == (4 if taken else 0) and max(sizes, default=0) < batch["ntokens"] / 4


class Features(nn.Module):
    """A decoder of an embedding and an output projection, in bfloat16."""

    plain_projection = True

    def __init__(self, symbols: int, width: int, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.output_projection = nn.Linear(width, symbols, bias=False)
        if tied:
            self.output_projection.weight = self.embedding.weight
        self.bfloat16()

    @property
    def decoder(self) -> "Features":
        return self

    def forward(self, tokens: Tensor, features_only: bool = False) -> tuple[Tensor, None]:
        features = self.embedding(tokens)
        return (features if features_only else self.output_projection(features)), None

    def get_normalized_probs(self, output: Any, log_probs: bool) -> Tensor:
        return output[0].log_softmax(dim=-1, dtype=torch.float32)

    def get_targets(self, sample: dict[str, Any], output: Any) -> Tensor:
        found: Tensor = sample["target"]
        return found


def peak_bytes(function: Any) -> int:
    """The most that torch held at once during a call, above what it held before."""
    gc.collect()  # what is freed within the call counts below what was held before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("chunks", [False, True])
def test_a_wide_vocabulary_takes_the_logits_at_most(
    monkeypatch: pytest.MonkeyPatch, chunks: bool
) -> None:
    symbols, tokens, width = 65_536, 128, 8
    task = SimpleNamespace(
        target_dictionary=type("D", (), {"pad": lambda _: PAD, "__len__": lambda _: symbols})()
    )
    model = Features(symbols, width)
    target = torch.randint(2, symbols, (4, tokens // 4))
    sample = {"net_input": {"tokens": target}, "target": target, "ntokens": tokens}
    logits = 2 * tokens * symbols
    if chunks:
        monkeypatch.setattr(chunked, "CHUNK_BYTES", logits // 16)
    peaks = []
    for kind in (LabelSmoothedCrossEntropyCriterion, LanguageModelLabelSmoothedCrossEntropy):
        criterion = kind(task, False, 0.1)

        def step(criterion: Any = criterion) -> None:
            model.zero_grad()
            criterion(model, sample)[0].backward()

        step()
        peaks.append(peak_bytes(step) / logits)
    # Logits, whose place the gradient takes, or those of a chunk; the rest are a block of rows and the
    # weights' gradient.
    assert peaks[0] > 6 and peaks[1] < (0.5 if chunks else 1.5), peaks


def test_chunks_are_taken_where_they_save_memory() -> None:
    # A view of one number: as large a weight as that of a real model.
    weight = torch.zeros(1, 1, dtype=torch.bfloat16).expand(128_000, 4096).requires_grad_()
    # The weight's gradient is added up in single precision, as large as 8,192 tokens' logits, and a chunk
    # has 2,048.
    assert [saves_memory(weight, n) for n in (100, 10_240, 10_241)] == [False, False, True]
    with torch.no_grad():  # 1,048 tokens
        assert [saves_memory(weight, n) for n in (1000, 1049)] == [False, True]
    frozen = weight.detach()  # of adapters
    assert [saves_memory(frozen, n) for n in (1000, 1049)] == [False, True]
    single = torch.zeros(1, 1).expand(128_000, 4096).requires_grad_()
    assert saves_memory(single, 6000)
    with torch.autocast("cpu", torch.bfloat16):  # logits in half precision
        assert not saves_memory(single, 6000) and saves_memory(single, 10_241)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["cached_kd", "cross_entropy"])
def test_a_search_for_unused_weights_must_find_the_projection(
    alone: None, monkeypatch: pytest.MonkeyPatch, name: str, tied: bool
) -> None:
    """``--find-unused-parameters``: torch follows the features, which an untied projection has not made;
    with chunks the second update failed."""
    symbols, tokens = 64, 128
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 0)
    task = SimpleNamespace(
        target_dictionary=type("D", (), {"pad": lambda _: PAD, "__len__": lambda _: symbols})(),
        cfg=SimpleNamespace(teacher_cache=None, teacher_path="here", stored_difficulty=None),
    )
    target = torch.randint(2, symbols, (4, tokens // 4))
    sample = {"net_input": {"tokens": target}, "target": target, "ntokens": tokens}
    whole = TeacherTokens.from_dense(torch.randn(tokens, symbols).log_softmax(-1), target.view(-1))
    task.teacher_at = lambda sample, positions: whole

    def criterion(chunk: str) -> Any:
        if name == "cross_entropy":
            return LanguageModelLabelSmoothedCrossEntropy(task, False, 0.1)
        config = CachedKDConfig(sentence_avg=False, sekd_chunk_tokens=chunk)
        config._name = name
        return CachedKDCriterion(config, task)

    calls = []
    loss = chunked.chunked_loss
    monkeypatch.setattr(
        projection, "chunked_loss", lambda *given: calls.append(given) or loss(*given)
    )
    model = Features(symbols, 4, tied).float()
    gradients = []
    for wrapped in (model, ModuleProxyWrapper(DDP(model, find_unused_parameters=True))):
        for _ in range(2):
            model.zero_grad()
            criterion("auto")(wrapped, sample)[0].backward()
        gradients.append([weight.grad for weight in model.parameters()])
    torch.testing.assert_close(*gradients)
    assert len(calls) == (4 if tied else 2)
    if name == "cached_kd" and not tied:
        with pytest.raises(UserError, match="--find-unused-parameters"):
            criterion("16")(wrapped, sample)
        with torch.no_grad():
            criterion("16")(wrapped, sample)


@pytest.mark.parametrize("chunks", [False, True])
def test_a_teacher_beside_the_student_gives_its_logits_as_they_are_needed(
    monkeypatch: pytest.MonkeyPatch, chunks: bool
) -> None:
    symbols, tokens, width = 65_536, 128, 8
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 2 * symbols * tokens // 16)
    student, teacher = (Features(symbols, width) for _ in range(2))
    online = object.__new__(OnlineTeacher)
    online.models = [teacher.requires_grad_(False)]
    task = SimpleNamespace(
        target_dictionary=type("D", (), {"pad": lambda _: PAD, "__len__": lambda _: symbols})(),
        cfg=SimpleNamespace(teacher_cache=None, teacher_path="here", stored_difficulty=None),
        teacher_at=online.at,
    )
    target = torch.randint(2, symbols, (4, tokens // 2))
    target[:, tokens // 4 :] = PAD  # half of all positions
    sample = {"net_input": {"tokens": target}, "target": target, "ntokens": tokens}
    config = CachedKDConfig(sentence_avg=False, sekd_chunk_tokens="auto" if chunks else "0")
    config._name = "cached_kd"
    criterion = CachedKDCriterion(config, task)

    def step() -> None:
        student.zero_grad()
        criterion(student, sample)[0].backward()

    step()
    peak = peak_bytes(step) / (2 * tokens * symbols)
    # In units of the logits at target tokens: the student's at all positions (2) and their gradient (2),
    # the teacher's (1); the rest are blocks of eight rows in single precision.
    assert peak < (2.5 if chunks else 6.8), peak
    # As all at once: the mean over an ensemble too.
    monkeypatch.setattr(online, "models", [teacher, student])
    positions = target.view(-1).ne(PAD).nonzero().squeeze(1)
    found = online.at(sample, positions)[5:9].tokens(slice(None))
    both = torch.stack(
        [model(target)[0].view(-1, symbols)[positions[5:9]] for model in (teacher, student)]
    )
    expected = both.float().softmax(-1).mean(0).log()
    at = target.view(-1)[positions[5:9]]
    torch.testing.assert_close(found.log_p, reference_first(expected, at), rtol=1e-3, atol=1e-3)
