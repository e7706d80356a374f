"""Meta's loop: the rows of a batch stand at one column, and every step calls `model.forward(tokens, start_pos)`.

It serves models with replaced, patched or hooked parts, which run only in this way. As in Meta's release, prompts
longer than the shortest are read a token at a time beside the answers of the others, and rows that have ended are
stepped to the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..runtime import to_device
from .calls import Call
from .choosing import Chooser
from .engine import Engine
from .rows import Row


@torch.inference_mode()
def steps(call: Call, engine: Engine, chooser: Chooser) -> Iterator[None]:
    """Run the call's requests, max_batch_size of them at a time, and tell it what they decide, step by step."""
    size, scaling = engine.model.params.max_batch_size, engine.model.params.rope_scaling
    if scaling is not None and any(scaling.one_pass(len(request.prompt)) for request in call.requests):
        size = 1  # each prompt is to be read whole, in a pass of its own length
    for first in range(0, len(call.requests), size):
        engine.refresh()
        engine.take(call)
        lanes, limit = range(min(size, len(call.requests) - first)), engine.model.params.max_seq_len
        rows = [Row(call, first + lane, limit, lane=lane) for lane in lanes]
        call.admitted += len(rows)
        for row in rows:
            chooser.admit(row)
        yield from _together(call, rows, engine, chooser)


def _together(call: Call, rows: list[Row], engine: Engine, chooser: Chooser) -> Iterator[None]:
    device = engine.device
    prompts = [row.request.prompt for row in rows]
    longest = max(map(len, prompts))
    tokens = to_device([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device)
    start, end = 0, min(map(len, prompts))
    while True:
        call.before_step()
        logits = engine.forward(tokens[:, start:end], start)  # (B, S, V)
        for i, row in enumerate(rows):
            if row.request.scored and row.reading:
                first, ids = row.request.targets(start, end)
                after = logits[i, first - start :][: len(ids)]
                row.scores.append(engine.scores(after, to_device(ids, device), row.request.alternatives))
        # Ended rows draw too: draws must not depend on them.
        forced = [chooser.forced(row) for row in rows]
        chosen = chooser.choose(
            logits[:, -1], [chooser.forced_places(*each)[0] for each in zip(rows, forced)] if any(forced) else rows
        )
        deciding = [i for i, row in enumerate(rows) if end >= len(prompts[i]) and row.index not in call.over]
        some = [rows[i] for i in deciding]
        for row in some:
            row.reading = False
            if row.scores and not row.take_scores(*(torch.cat(parts).tolist() for parts in zip(*row.scores))):
                raise engine.not_finite(row.index)
        if some:
            places = to_device(deciding, device)
            chooser.count(chosen[places], some)
            decisions, _ = chooser.read(logits[places, -1], chosen[places], some)
            for row, decision in zip(some, decisions):
                if decision.token < 0 and row.room > 0:
                    raise chooser.error(row, decision.token)
                step = row.step(decision)
                call.tell(row.generated, step)
                row.accept(step)
            yield
        if all(row.index in call.over for row in rows):
            return
        if end == tokens.shape[1]:
            tokens = torch.cat((tokens, tokens.new_zeros(len(rows), 1)), 1)
        placed = [prompts[i][end] if end < len(prompts[i]) else (row.ids[end] if end < len(row.ids) else 0)
                  for i, row in enumerate(rows)]  # fmt: skip
        tokens[:, end] = to_device(placed, device)
        start, end = end, end + 1
