"""What runs a teacher for ``build_cache``: torch with fairseq's checkpoints, or vLLM."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from fairseq import tasks
from numpy.typing import NDArray

from sekd_fairseq.errors import UserError
from sekd_fairseq.inference import (
    language_model_config,
    load_models,
    position_limits,
    to_device,
    token_logits,
)
from sekd_fairseq.llm.vocabulary import NEW_ROW, Vocabulary
from sekd_fairseq.models.hf_causal_lm import prompt_mask
from sekd_fairseq.teacher_cache.format import ENTRY_COLUMNS, hash_file
from sekd_fairseq.teacher_cache.writer import SentenceRows
from sekd_fairseq.truncation import Truncation, truncate, uniforms


class Engine(Protocol):
    """A loaded teacher.

    Attributes
    ----------
    task
        Loads datasets, has the dictionaries.
    identity
        What the manifest says of the teacher.
    batch_tokens
        Padded tokens a batch that suit it.
    """

    task: Any
    identity: dict[str, Any]
    batch_tokens: int

    def limits(self) -> list[tuple[float, ...]]:
        """The longest source, target, and both together that it reads, of each model."""

    def sentences(
        self, sample: dict[str, Any], truncation: Truncation, temperature: float
    ) -> dict[int, SentenceRows]:
        """Truncated distributions of a batch, by sentence id."""


class TorchEngine:
    """fairseq checkpoints, one or an ensemble."""

    batch_tokens = 4096

    def __init__(
        self,
        paths: Sequence[str],
        data: str,
        device: torch.device,
        dtype: torch.dtype,
        hf_model: str | None = None,
    ) -> None:
        self.device = device
        self.models, config, self.task = load_models(paths, data, device, hf_model)
        for model in self.models:
            model.to(dtype)
        self.identity = {
            "files": [Path(path).name for path in paths],
            "sha256": [hash_file(Path(path)) for path in paths],
            "arch": config.model._name,
            "parameters": [sum(p.numel() for p in model.parameters()) for model in self.models],
            "dtype": str(dtype).removeprefix("torch."),
        }

    def limits(self) -> list[tuple[float, ...]]:
        """The longest source, target, and both together that it reads, of each model."""
        return position_limits(self.models)

    def sentences(
        self, sample: dict[str, Any], truncation: Truncation, temperature: float
    ) -> dict[int, SentenceRows]:
        """Truncated distributions of a batch, by sentence id."""
        pad = self.task.target_dictionary.pad()
        lengths = sample["target"].ne(pad).sum(dim=1).tolist()
        sentences = sample["id"].tolist()
        uniform = None
        if truncation.samples:
            uniform = uniforms(truncation.seed, sentences, lengths, truncation.samples)
        parts: dict[str, list[NDArray[Any]]] = {}
        done = 0
        for target, z in token_logits(
            self.models,
            to_device(sample, self.device),
            pad,
            temperature,
            len(self.task.target_dictionary),
        ):
            draws = None if uniform is None else uniform[done : done + len(target)]
            done += len(target)
            for name, values in truncate(z, target, truncation, draws).items():
                parts.setdefault(name, []).append(values)
        columns = {name: np.concatenate(values) for name, values in parts.items()}
        ends = np.cumsum(lengths)
        entry_ends = np.concatenate([[0], np.cumsum(columns["support_size"])])
        rows = {}
        for sentence, start, end in zip(sentences, ends - lengths, ends, strict=True):
            tokens, entries = slice(start, end), slice(entry_ends[start], entry_ends[end])
            rows[sentence] = SentenceRows(
                {
                    name: values[entries if name in ENTRY_COLUMNS else tokens]
                    for name, values in columns.items()
                }
            )
        return rows


class VLLMEngine:
    """A Hugging Face model that vLLM runs, for teachers of many billions of parameters.

    vLLM tells the best tokens of each position (``prompt_logprobs``) and no more: the entropy takes
    the rest as one event, a lower bound, and tokens outside the dictionary belong to the outside
    mass.
    """

    batch_tokens = 2**18  # vLLM schedules within a batch itself

    def __init__(self, folder: str, data: str, dtype: torch.dtype, best: int) -> None:
        try:
            import vllm
        except ImportError as error:
            raise UserError(
                f"--engine vllm: expected vLLM, found none that imports ({error}); pip install vllm"
            ) from error
        self.task = tasks.setup_task(language_model_config(data).task)
        symbols = self.task.target_dictionary.symbols
        self.rows = Vocabulary.load(Path(data.split(":")[0]), symbols).rows
        self._symbol = {row: i for i, row in enumerate(self.rows) if row != NEW_ROW}
        if self.rows[self.task.target_dictionary.eos()] == NEW_ROW:
            raise UserError(
                f"--engine vllm: expected data whose translations end with a token of the model, "
                f"found a tokenizer without an end ({data}); give prepare_llm_data.py --end"
            )
        name = str(dtype).removeprefix("torch.")
        self._llm = vllm.LLM(model=folder, dtype=name, max_logprobs=best)
        self._ask = vllm.SamplingParams(max_tokens=1, prompt_logprobs=best, detokenize=False)
        weights = sorted(Path(folder).glob("*.safetensors"))
        self.identity = {
            "files": [f"{Path(folder).name}/{path.name}" for path in weights],
            "sha256": [hash_file(path) for path in weights],
            "arch": "vllm",
            "dtype": name,
        }

    def limits(self) -> list[tuple[float, ...]]:
        """The longest source, target, and both together that it reads."""
        # Both together without the end of the source, and vLLM generates one token after them.
        positions = int(self._llm.llm_engine.model_config.max_model_len)
        return [(positions, positions, positions)]

    def sentences(
        self, sample: dict[str, Any], truncation: Truncation, temperature: float
    ) -> dict[int, SentenceRows]:
        """Truncated distributions of a batch, by sentence id."""
        pad, eos = self.task.target_dictionary.pad(), self.task.target_dictionary.eos()
        targets = [row[row.ne(pad)].tolist() for row in sample["target"]]
        sources = sample["net_input"]["src_tokens"]
        masks = prompt_mask(sources, pad, eos)
        prompts = []
        for source, mask, target in zip(sources, masks, targets, strict=True):
            read = source[mask].tolist() + target
            prompts.append({"prompt_token_ids": [self.rows[symbol] for symbol in read]})
        outputs = self._llm.generate(prompts, self._ask, use_tqdm=False)
        return {
            sentence: self._rows(output.prompt_logprobs[-len(target) :], target, truncation)
            for sentence, output, target in zip(
                sample["id"].tolist(), outputs, targets, strict=True
            )
        }

    def _rows(
        self, found: Sequence[dict[int, Any]], target: list[int], truncation: Truncation
    ) -> SentenceRows:
        """The columns of one sentence from what vLLM says of its target tokens."""
        columns: dict[str, list[Any]] = {}
        for known, gold in zip(found, target, strict=True):
            log_p = {
                self._symbol[row]: entry.logprob
                for row, entry in known.items()
                if row in self._symbol
            }
            ids = keep_best(log_p, gold, truncation)
            logprob = np.array([log_p[i] for i in ids])
            every = np.array([log_p[i] for i in log_p])
            rest = max(0.0, 1.0 - np.exp(every).sum())
            entropy = -(np.exp(every) * every).sum() - (rest * np.log(rest) if rest else 0.0)
            for name, value in (
                ("support_size", [len(ids)]),
                ("gold_logprob", logprob[:1]),
                ("outside_mass", [max(0.0, 1.0 - np.exp(logprob).sum())]),
                ("entropy", [max(0.0, entropy)]),
                ("token_id", ids),
                ("logprob", logprob),
            ):
                columns.setdefault(name, []).append(value)
        return SentenceRows({name: np.concatenate(values) for name, values in columns.items()})


def keep_best(log_p: dict[int, float], gold: int, truncation: Truncation) -> list[int]:
    """The reference first, then the best others that a truncation keeps of some known tokens."""
    order = sorted(log_p, key=lambda token: -log_p[token])
    if truncation.rule == "top_k":
        return [gold, *[token for token in order if token != gold][: truncation.k - 1]]
    mass = np.cumsum([np.exp(log_p[token]) for token in order])
    before = np.concatenate([[0.0], mass[:-1]])
    best = order[: max(truncation.floor, min(truncation.k, int((before < truncation.p).sum())))]
    return [gold, *[token for token in best if token != gold]]
