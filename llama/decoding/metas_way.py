"""Meta's loop: the rows of a batch stand at one column, and every step calls `model.forward(tokens, start_pos)`.

It serves models with replaced, patched or hooked parts, which run only in this way. As in Meta's release, prompts longer than
the shortest are read a token at a time beside the answers of the others, and rows that have ended are stepped to the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ..runtime import to_device
from .batching import Batch, Request, Step
from .engine import prompt_logprobs


def steps(batch: Batch) -> Iterator[list[Step]]:
    """The steps of the batch's requests, max_batch_size of them at a time."""
    size = batch.engine.model.params.max_batch_size
    requests = list(enumerate(batch.requests))
    for first in range(0, len(requests), size):
        yield from _together(batch, requests[first : first + size])


def _together(batch: Batch, requests: list[tuple[int, Request]]) -> Iterator[list[Step]]:
    engine, device = batch.engine, batch.engine.device
    rows = [batch.admit(index, request, lane) for lane, (index, request) in enumerate(requests)]
    prompts = [row.request.prompt for row in rows]
    longest = max(map(len, prompts))
    tokens = to_device([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device)
    scores: list[list[torch.Tensor]] = [[] for _ in rows]
    start, end = 0, min(map(len, prompts))
    while True:
        batch.before_step()
        logits = engine.forward(tokens[:, start:end], start)  # (B, S, V)
        if batch.score_prompts:
            for row, prompt in enumerate(prompts):
                targets = tokens[row, start + 1 : min(end + 1, len(prompt))]
                scores[row].append(prompt_logprobs(logits[row, : len(targets)], targets))
        batch.rows = rows
        chosen = batch.choose(logits[:, -1])  # every row takes part: draws must not depend on which rows have ended
        deciding = [i for i, row in enumerate(rows) if end >= len(prompts[i]) and row.index not in batch.cancelled]
        for i in deciding:
            if rows[i].fresh:
                rows[i].fresh = False
                if batch.score_prompts:
                    rows[i].prompt_logprobs = [0.0, *(x for part in scores[i] for x in part.tolist())]
                    if any(map(math.isnan, rows[i].prompt_logprobs or [])):
                        raise engine.not_finite(rows[i].index)
        batch.rows = [rows[i] for i in deciding]
        if deciding:
            places = to_device(deciding, device)
            yield batch.report(batch.decisions(logits[places, -1], chosen[places]))
        if all(row.index in batch.cancelled for row in rows):
            return
        if end == tokens.shape[1]:
            tokens = torch.cat((tokens, tokens.new_zeros(len(rows), 1)), 1)
        placed = [prompts[i][end] if end < len(prompts[i]) else (row.ids[end] if end < row.length else 0)
                  for i, row in enumerate(rows)]  # fmt: skip
        tokens[:, end] = to_device(placed, device)
        batch.mark_seen(tokens[:, end])
        start, end = end, end + 1
