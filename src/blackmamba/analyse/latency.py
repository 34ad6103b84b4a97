"""Time to read a prompt and time for each token after it, by length of context."""

import dataclasses
import random
import statistics
import time
from collections.abc import Iterable, Mapping

import torch

from blackmamba.generate import stream
from blackmamba.model import BlackMamba
from blackmamba.model.size import state_bytes


@dataclasses.dataclass(frozen=True)
class Latency:
    """One network at one length of context."""

    name: str
    context: int
    """Tokens of the prompt."""
    batch_size: int
    prompt_s: float
    """To read it, the first new token included."""
    token_ms: float
    """Each token after that, for the whole batch; the median."""
    state_bytes: int
    """What the network remembers of one sequence by then."""


def latencies(
    models: Mapping[str, BlackMamba],
    contexts: Iterable[int],
    *,
    batch_size: int = 1,
    new_tokens: int = 16,
    repeats: int = 3,
) -> list[Latency]:
    """Generate greedily after random prompts, by the engine that `generate` uses.

    Args:
        models: by name, in evaluation mode.
        contexts: lengths of prompts.
        batch_size: sequences at once.
        new_tokens: after each prompt, at least 3; the first two are not timed as steps.
        repeats: of each; medians are kept.
    """
    found: list[Latency] = []
    for name, model in models.items():
        config = model.config
        bytes_each = 4 if model.compute_dtype == torch.float32 else 2
        for context in contexts:
            prompts, steps = [], []
            for repeat in range(repeats):
                rng = random.Random(repeat)
                ids = [
                    [rng.randrange(config.n_tokens) for _ in range(context)]
                    for _ in range(batch_size)
                ]
                times = _times(model, ids, new_tokens)
                prompts.append(times[0])
                steps.append(statistics.median(times[2:]))
            found.append(
                Latency(
                    name=name,
                    context=context,
                    batch_size=batch_size,
                    prompt_s=statistics.median(prompts),
                    token_ms=1000 * statistics.median(steps),
                    state_bytes=state_bytes(config, context, bytes_each),
                )
            )
    return found


def _times(model: BlackMamba, prompts: list[list[int]], new_tokens: int) -> list[float]:
    """Seconds until each new token of all rows was there."""
    times: list[float] = []
    since = time.perf_counter()
    for given, _ in enumerate(stream(model, prompts, max_new_tokens=new_tokens), 1):
        if given % len(prompts) == 0:
            now = time.perf_counter()
            times.append(now - since)
            since = now
    return times
