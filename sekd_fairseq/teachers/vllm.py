"""The teacher as vLLM runs it: a Hugging Face model of many billions of parameters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq import tasks

from analysis.runs.files import hash_file
from sekd_fairseq.checkpoints import language_model_config
from sekd_fairseq.errors import UserError
from sekd_fairseq.llm.vocabulary import NEW_ROW, Vocabulary
from sekd_fairseq.models.hf_causal_lm import prompt_mask
from sekd_fairseq.teacher_cache.writer import SentenceRows
from sekd_fairseq.teachers.truncation import Truncation, keep_best


class VLLMEngine:
    """A Hugging Face model that vLLM runs, for teachers of many billions of parameters.

    vLLM tells the best tokens of each position (``prompt_logprobs``) and no more: the entropy takes
    the rest as one event, a lower bound, and tokens outside the dictionary belong to the outside
    mass.
    """

    batch_tokens = 2**18  # vLLM schedules within a batch itself
    outside = None

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
                f"found a tokenizer without an end ({data}); give python -m sekd_fairseq.prepare_llm_data --end"
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
