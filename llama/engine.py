"""One step of the model over its cache: prompts in, or one token of every row. Row i of a batch owns row i of the cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from .model import Transformer

LOGITS_BYTES = 64 * 2**20  # the most that a piece of prompt logits may take


@contextmanager
def without_onednn() -> Iterator[None]:
    """For one row in bfloat16 on a CPU: oneDNN reads the weights at two thirds of the speed of torch's own product."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # as torch.backends.mkldnn.flags does, which warns about TF32
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


class Engine:
    """Steps a `Transformer`. Knows ids only."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        """Every row's whole prompt in one pass. -> hidden states (B, longest prompt, dim).

        Shorter rows are filled up on the right. Nothing sees those columns: rows are causal here, and later each is
        overwritten by the token that comes to stand there before it is looked at.
        """
        longest = max(map(len, prompts))
        tokens = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=self.device)
        return self.model.hidden_states(tokens, 0)

    def decode(self, tokens: torch.Tensor, positions: list[int]) -> torch.Tensor:
        """One token of every row, (B,), at its own position. -> hidden states (B, 1, dim)."""
        same = positions[0] if len(set(positions)) == 1 else None
        start_pos = torch.tensor(positions, device=self.device) if same is None else same
        with self._fast_products(len(positions)):
            return self.model.hidden_states(tokens[:, None], start_pos, span=max(positions) + 1)

    def _fast_products(self, rows: int) -> AbstractContextManager[None]:
        weight = self.model.norm.weight
        one_row = rows == 1 and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
        return without_onednn() if one_row else nullcontext()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, dim) -> float32 (B, vocab_size)"""
        with self._fast_products(len(hidden)):
            return self.model.output(hidden).float()

    def last_logits(self, hidden: torch.Tensor, prompts: list[list[int]]) -> torch.Tensor:
        """The logits after each prompt's last token, from `prefill`'s hidden states: float32 (B, vocab_size)."""
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        return self.logits(hidden[torch.arange(len(prompts), device=self.device), last])

    def prompt_logprobs(self, hidden: torch.Tensor, prompts: list[list[int]]) -> list[list[float]]:
        """ln p of each prompt token after those before it, in `prefill`'s hidden states; 0.0 for a row's first token.

        The head runs over a few columns at a time: all logits of a long prompt would outweigh the model.
        """
        rows = []
        for h, prompt in zip(hidden, prompts):
            targets = torch.tensor(prompt[1:], device=self.device)
            step = max(1, LOGITS_BYTES // (4 * self.model.vocab_size))
            row = [0.0]
            for i in range(0, len(targets), step):
                chosen = targets[i : i + step]
                row += token_logprobs(self.logits(h[i : i + len(chosen)]), chosen).tolist()
            rows.append(row)
        return rows


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """ln p of tokens (N,) under float32 logits (N, vocab_size), before any temperature or top-p. -> (N,)"""
    return torch.log_softmax(logits, dim=-1).gather(-1, tokens[:, None]).squeeze(-1)
