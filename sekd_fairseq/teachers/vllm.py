"""The teacher as vLLM runs it: a Hugging Face model of many billions of parameters."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from analysis.runs.files import hash_file
from sekd_fairseq.errors import UserError
from sekd_fairseq.teachers.best_tokens import BestTokensEngine


def take_own_gpu() -> None:
    """Leave a process of torchrun one GPU to see, its own: vLLM takes the first that it sees."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None:
        return
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [rank] if seen is None else seen.split(",")[int(rank) :][:1]
    if gpus in ([], [""]):
        raise UserError(
            f"--engine vllm: expected a GPU for each process of torchrun, found CUDA_VISIBLE_DEVICES={seen} "
            f"for process {rank}; start fewer (--nproc_per_node)"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[0]


class VLLMEngine(BestTokensEngine):
    """A Hugging Face model that vLLM runs in this process, in ``dtype``, or as vLLM does with its own."""

    batch_tokens = 2**18  # vLLM schedules within a batch itself

    def __init__(self, folder: str, data: str, dtype: torch.dtype | None, best: int) -> None:
        take_own_gpu()
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
