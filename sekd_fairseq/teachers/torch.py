"""The teacher as torch runs it: fairseq checkpoints, one or an ensemble."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.runs.files import hash_file
from sekd_fairseq.checkpoints import load_models, position_limits
from sekd_fairseq.devices import to_device
from sekd_fairseq.logits import token_logits
from sekd_fairseq.teacher_cache.format import ENTRY_COLUMNS
from sekd_fairseq.teacher_cache.writer import SentenceColumns
from sekd_fairseq.teachers.truncation import Truncation, outside_mass, truncate, uniforms


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
        self.models, config, self.task = load_models(paths, data, device, hf_model, dtype)
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
    ) -> dict[int, SentenceColumns]:
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
            rows[sentence] = {
                name: values[entries if name in ENTRY_COLUMNS else tokens]
                for name, values in columns.items()
            }
        return rows

    def written(self) -> None:
        """Nothing is kept until then."""

    def outside(
        self, sample: dict[str, Any], truncation: Truncation, temperature: float
    ) -> NDArray[np.float32]:
        """What each token of the vocabulary has outside the supports, summed over a batch, (V,)."""
        dictionary = self.task.target_dictionary
        total = torch.zeros(len(dictionary), device=self.device)
        moved = to_device(sample, self.device)
        pad, symbols = dictionary.pad(), len(dictionary)
        for target, z in token_logits(self.models, moved, pad, temperature, symbols):
            total += outside_mass(z, target, truncation)
        found: NDArray[np.float32] = total.cpu().numpy()
        return found
