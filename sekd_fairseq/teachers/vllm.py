"""The teacher as vLLM runs it: a Hugging Face model of many billions of parameters."""

from collections.abc import Sequence
from pathlib import Path

import torch

from analysis.runs.files import hash_file
from sekd_fairseq.errors import UserError
from sekd_fairseq.teachers.best_tokens import BestTokensEngine


class VLLMEngine(BestTokensEngine):
    """A Hugging Face model that vLLM runs in this process, in ``dtype``, or as vLLM does with its own."""

    batch_tokens = 2**18  # vLLM schedules within a batch itself

    def __init__(self, folder: str, data: str, dtype: torch.dtype | None, best: int) -> None:
        try:
            import vllm
        except ImportError as error:
            raise UserError(
                f"--engine vllm: expected vLLM, found none that imports ({error}); pip install vllm"
            ) from error
        super().__init__(data, "vllm")
        name = "auto" if dtype is None else str(dtype).removeprefix("torch.")
        self._llm = vllm.LLM(model=folder, dtype=name, max_logprobs=best)
        self._ask = vllm.SamplingParams(max_tokens=1, prompt_logprobs=best, detokenize=False)
        weights = sorted(Path(folder).glob("*.safetensors"))
        self.identity = {
            "files": [f"{Path(folder).name}/{path.name}" for path in weights],
            "sha256": [hash_file(path) for path in weights],
            "arch": "vllm",
            "dtype": name,
        }

    def written(self) -> None:
        """Nothing is kept until then."""

    def positions(self) -> float:
        """Tokens that the model reads, prompt and translation together."""
        return int(self._llm.llm_engine.model_config.max_model_len)

    def best(self, texts: Sequence[tuple[list[int], int]]) -> list[Sequence[dict[int, float]]]:
        """Known log-probabilities by token at the last positions of some texts."""
        prompts = [{"prompt_token_ids": tokens} for tokens, _ in texts]
        outputs = self._llm.generate(prompts, self._ask, use_tqdm=False)
        return [
            [
                {token: entry.logprob for token, entry in known.items()}
                for known in output.prompt_logprobs[-wanted:]
            ]
            for output, (_, wanted) in zip(outputs, texts, strict=True)
        ]
