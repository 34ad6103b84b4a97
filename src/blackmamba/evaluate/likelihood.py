"""How likely a model finds given token ids: answers to questions, whole documents.

A context is read once, however many continuations it has: its memory, of fixed size for Mamba
layers, is copied for each of them. So a question with four answers costs its context once, where a
model that remembers by keys and values is usually asked four times.

Letters: b rows, l tokens, v vocabulary.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from blackmamba.errors import InputError
from blackmamba.generate import read_prompts
from blackmamba.model import BlackMamba, State

Ids = Sequence[int]
T = TypeVar("T")

_LOGITS_AT_ONCE = 2**26
"""Numbers of logits that are held at once: 256 MB in float32."""
_PIECE = 512  # tokens of a document that are read at once; the memory is carried on
_IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Of one continuation after its context."""

    nats: float
    """log p of all its tokens together, by the inference routing."""
    is_greedy: bool
    """Whether each of its tokens was the most likely one."""


@torch.inference_mode()
def continuation_likelihoods(
    model: BlackMamba,
    pairs: Sequence[tuple[Ids, Ids]],
    *,
    batch_tokens: int = 4096,
    max_rows: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> list[Likelihood]:
    """Score each continuation after its context. Equal contexts are read once.

    Args:
        model: in evaluation mode.
        pairs: (context, continuation), token ids, neither empty.
        batch_tokens: contexts are read together while they have, padded, no more tokens than this.
        max_rows: no more rows than this are read together; 0: no limit.
        on_progress: called with the number of pairs that were just scored.
    Returns:
        One for each pair, in their order.
    Raises:
        InputError: a context or continuation is empty, or an id is out of range.
    """
    _check(batch_tokens, max_rows)
    for i, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            what = "continuation" if context else "context"
            raise InputError(f"pairs[{i}]: its {what} is empty; it needs at least one token")
    asked: dict[tuple[int, ...], list[int]] = {}
    for i, (context, _) in enumerate(pairs):
        asked.setdefault(tuple(context), []).append(i)
    found: list[Likelihood | None] = [None] * len(pairs)
    contexts = sorted(asked, key=len, reverse=True)
    for batch in _batches(contexts, len, batch_tokens, max_rows):
        logits, state = read_prompts(model, [list(context) for context in batch])
        numbers = [i for context in batch for i in asked[context]]
        rows = [row for row, context in enumerate(batch) for _ in asked[context]]
        continuations = [list(pairs[i][1]) for i in numbers]
        scores = _after(model, logits, state, rows, continuations, max_rows)
        for i, score in zip(numbers, scores, strict=True):
            found[i] = score
        if on_progress is not None:
            on_progress(len(numbers))
    return [score for score in found if score is not None]


@torch.inference_mode()
def document_likelihoods(
    model: BlackMamba,
    documents: Sequence[Ids],
    start_id: int,
    *,
    batch_tokens: int = 4096,
    max_rows: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> list[float]:
    """log p, in nats, of each whole document, every token predicted from all before it.

    The memory is carried through a document of any length: there is no window.

    Args:
        model: in evaluation mode.
        documents: token ids; an empty one gives 0.
        start_id: what a document's first token is predicted from, usually end of text.
        batch_tokens, max_rows, on_progress: as in `continuation_likelihoods`.
    Raises:
        InputError: an id is out of range.
    """
    _check(batch_tokens, max_rows)
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]), reverse=True)
    nats = [0.0] * len(documents)
    for batch in _batches(order, lambda i: min(len(documents[i]), _PIECE), batch_tokens, max_rows):
        rows = [i for i in batch if len(documents[i])]
        state: State | None = None
        for start in range(0, len(documents[rows[0]]) if rows else 0, _PIECE):
            left = [i for i in rows if len(documents[i]) > start]  # rows are longest first
            if state is not None and len(left) < len(rows):
                state = state.select(range(len(left)))
            rows = left
            targets = [list(documents[i][start : start + _PIECE]) for i in rows]
            before = [documents[i][start - 1] if start else start_id for i in rows]
            inputs = [[first, *ids[:-1]] for first, ids in zip(before, targets, strict=True)]
            scores, state = _score(model, inputs, targets, state)
            for i, score in zip(rows, scores, strict=True):
                nats[i] += score.nats
        if on_progress is not None:
            on_progress(len(batch))
    return nats


def _after(
    model: BlackMamba,
    logits: Tensor,
    state: State,
    rows: list[int],
    continuations: list[list[int]],
    max_rows: int,
) -> list[Likelihood]:
    """Continuations, each after the row of the state that it names."""
    firsts = torch.tensor([ids[0] for ids in continuations], device=logits.device)
    seen = logits.float()
    log_p = seen.log_softmax(-1)[torch.tensor(rows, device=seen.device), firsts].tolist()
    best = seen.argmax(-1).tolist()
    scores = [
        Likelihood(p, best[row] == ids[0])
        for p, row, ids in zip(log_p, rows, continuations, strict=True)
    ]
    longer = [i for i, ids in enumerate(continuations) if len(ids) > 1]
    longer.sort(key=lambda i: len(continuations[i]), reverse=True)
    at_once = max(1, _LOGITS_AT_ONCE // logits.shape[-1])
    for batch in _batches(longer, lambda i: len(continuations[i]) - 1, at_once, max_rows):
        inputs = [continuations[i][:-1] for i in batch]
        targets = [continuations[i][1:] for i in batch]
        rest, _ = _score(model, inputs, targets, state.select([rows[i] for i in batch]))
        for i, score in zip(batch, rest, strict=True):
            first = scores[i]
            scores[i] = Likelihood(first.nats + score.nats, first.is_greedy and score.is_greedy)
    return scores


def _score(
    model: BlackMamba, inputs: list[list[int]], targets: list[list[int]], state: State | None
) -> tuple[list[Likelihood], State]:
    """Targets that follow inputs of the same lengths, read in pieces of few logits."""
    device = model.embedding.weight.device
    lengths = torch.tensor([len(ids) for ids in inputs])
    inputs_bl = pad_sequence([torch.tensor(ids) for ids in inputs], batch_first=True)
    targets_bl = pad_sequence(
        [torch.tensor(ids) for ids in targets], batch_first=True, padding_value=_IGNORED
    )
    b, longest = inputs_bl.shape
    nats = torch.zeros(b, dtype=torch.float64, device=device)
    is_greedy = torch.ones(b, dtype=torch.bool, device=device)
    piece = max(1, _LOGITS_AT_ONCE // (b * model.config.vocab_size))
    for start in range(0, longest, piece):
        part = slice(start, min(start + piece, longest))
        wanted = targets_bl[:, part].to(device)
        left = (lengths - start).clamp(0, part.stop - start)
        logits, state = model.prefill(
            inputs_bl[:, part].to(device),
            state,
            lengths=None if bool((left == wanted.shape[1]).all()) else left.to(device),
        )
        losses = F.cross_entropy(
            logits.float().flatten(0, 1),
            wanted.flatten(),
            ignore_index=_IGNORED,
            reduction="none",
        )
        nats -= losses.view(wanted.shape).double().sum(1)
        is_greedy &= ((logits.argmax(-1) == wanted) | (wanted == _IGNORED)).all(1)
    assert state is not None
    scores = zip(nats.tolist(), is_greedy.tolist(), strict=True)
    return [Likelihood(*score) for score in scores], state


def _batches(
    items: Sequence[T], size: Callable[[T], int], most: int, max_rows: int
) -> Iterator[list[T]]:
    """Items, largest first, in groups of at most `most` tokens when padded to their first."""
    batch: list[T] = []
    for item in items:
        is_full = batch and (len(batch) + 1) * size(batch[0]) > most
        if is_full or (max_rows and len(batch) == max_rows):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _check(batch_tokens: int, max_rows: int) -> None:
    if batch_tokens < 1:
        raise InputError(f"batch_tokens={batch_tokens}: must be at least 1")
    if max_rows < 0:
        raise InputError(f"max_rows={max_rows}: must be at least 0")
