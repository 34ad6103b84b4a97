"""Token ids in, token ids out: read the prompts at once, then go on one token a step.

This file knows no text. A row's ids do not depend on the other rows of its batch, except that a
matrix product may round differently when its number of rows changes.

Letters: b batch, v vocabulary.
"""

import contextlib
import operator
from collections.abc import Generator, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from blackmamba.errors import InputError
from blackmamba.generate.captured import CapturedDecoder, cannot_capture
from blackmamba.generate.decoder import Decoder, cannot_decode
from blackmamba.generate.prefill import read_piece
from blackmamba.generate.sampling import (
    RowUniforms,
    SamplingConfig,
    refuse_unusable,
    sample,
    usable_rows,
)
from blackmamba.model import BlackMamba, State

# How much of the prompts is read at once: enough to keep a device busy, and a bound on memory.
_PREFILL_TOKENS = 4096
_PREFILL_TOKENS_ON_GPU = 16_384
_PREFILL_TOKENS_PER_ROW = 64


def generate(
    model: BlackMamba,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop_ids: Iterable[int] = (),
) -> list[list[int]]:
    """Continue each prompt. Equal arguments give equal ids.

    Args:
        model: used in evaluation mode; one in training mode is put back after every step.
        prompts: the rows, each at least one token id; lengths may differ.
        max_new_tokens: most new ids a row.
        temperature, top_k, top_p, min_p, repetition_penalty, seed: see `SamplingConfig`.
        stop_ids: a row ends when one of these would come; it is not part of the result.
    Returns:
        The new ids of each prompt.
    Raises:
        ConfigError: a sampling argument is out of its range.
        InputError: prompts, max_new_tokens or stop_ids are wrong, or the model's logits are NaN.
    """
    pairs = stream(
        model, prompts, max_new_tokens, temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed, stop_ids=stop_ids,
    )  # fmt: skip
    new_ids: list[list[int]] = [[] for _ in prompts]
    for row, token_id in pairs:
        new_ids[row].append(token_id)
    return new_ids


def stream(
    model: BlackMamba,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop_ids: Iterable[int] = (),
) -> Iterator[tuple[int, int]]:
    """`generate`, giving (row, id) as soon as it is known.

    Arguments are checked at the call, the model runs when the first pair is asked for. Rows come
    in turn: one id of each row that still goes on, then the next of each.
    """
    config = SamplingConfig(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    return _pairs(Batch(model, prompts, max_new_tokens, config, stop_ids))


def _pairs(batch: "Batch") -> Iterator[tuple[int, int]]:
    while batch.rows:
        yield from batch.advance()


class Batch:
    """Prompts that are being continued together, one new id a row each time.

    Args:
        model, prompts, max_new_tokens, stop_ids: as for `generate`.
        config: how ids are chosen.
        n_tokens: only ids below it are chosen, if that is fewer than the model has tokens.

    Attributes:
        rows: the rows still going on, in rising order; numbers are positions in `prompts`.
    """

    def __init__(
        self,
        model: BlackMamba,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        config: SamplingConfig,
        stop_ids: Iterable[int] = (),
        n_tokens: int | None = None,
    ):
        vocab_size = model.config.vocab_size
        self._prompts = _checked_prompts(prompts, vocab_size)
        self._stop_ids = frozenset(_checked_ids("stop_ids", stop_ids, vocab_size))
        self._n_left = _checked_count("max_new_tokens", max_new_tokens)
        self._n_tokens = min(n_tokens or vocab_size, model.config.n_tokens)
        self._model = model
        self._config = config
        self._uniforms = RowUniforms(config.seed, len(self._prompts))
        self.rows: list[int] = list(range(len(self._prompts))) if self._n_left else []
        # What the last step left, a row of each tensor for every entry of `_held`.
        self._held: list[int] = self.rows
        self._state: State | Decoder | CapturedDecoder | None = None
        self._last_ids = torch.empty(0, dtype=torch.int64)
        self._ahead: Tensor | None = None  # logits of the step after, if it was begun already
        self._seen: Tensor | None = None

    def advance(self) -> list[tuple[int, int]]:
        """The next (row, id) of every row; rows that end here leave `rows`."""
        if not self.rows:
            return []
        with _evaluating(self._model):
            logits = self._next_logits()
            if isinstance(self._state, CapturedDecoder):
                numbers = self._choose_and_go_on(logits, self._state)
            else:
                self._last_ids = self._sample(logits)
                numbers = self._last_ids.tolist()
        self._held = self.rows
        self._n_left -= 1
        pairs = [
            (row, token_id)
            for row, token_id in zip(self.rows, numbers, strict=True)
            if token_id not in self._stop_ids
        ]
        self.rows = [row for row, _ in pairs] if self._n_left else []
        return pairs

    def drop(self, row: int) -> None:
        """End a row, for a reason that its ids alone do not tell."""
        self.rows = [r for r in self.rows if r != row]

    def _next_logits(self) -> Tensor:
        """Logits (b, v) after the last token of each row in `rows`."""
        if self._state is None:
            logits, state = read_prompts(self._model, [self._prompts[row] for row in self.rows])
            self._state = _in_place(self._model, state)
            return logits
        self._forget_ended()
        if self._ahead is not None:
            return self._ahead
        if isinstance(self._state, Decoder | CapturedDecoder):
            return self._state.step(self._last_ids)
        logits, self._state = self._model.step(self._last_ids, self._state)
        return logits

    def _forget_ended(self) -> None:
        if self._held == self.rows or self._state is None:
            return
        rows = set(self.rows)
        kept = [i for i, row in enumerate(self._held) if row in rows]
        self._state = self._state.select(kept)
        self._last_ids = self._last_ids[kept]
        self._ahead = None if self._ahead is None else self._ahead[kept]
        self._seen = None if self._seen is None else self._seen[kept]
        self._held = self.rows

    def _choose_and_go_on(self, logits: Tensor, decoder: CapturedDecoder) -> list[int]:
        """The next ids. The device begins the step that reads them before the host knows them."""
        after_step = self._ahead is not None and self._ahead.data_ptr() == decoder.logits.data_ptr()
        config, n_tokens = self._config, self._n_tokens
        if (
            after_step
            and (config.temperature, config.repetition_penalty) == (0, 1)
            and n_tokens == self._model.config.n_tokens
        ):
            found, next_ids = decoder.greedy(), None
        else:
            self._last_ids = next_ids = self._sample(logits, check=False)
            found = torch.stack((next_ids, usable_rows(logits, n_tokens).to(torch.int64)))
        read = _Reading(found)
        self._ahead = decoder.step(next_ids) if self._n_left > 1 else None
        ids, usable = read.result()
        refuse_unusable(usable.bool())
        if next_ids is None:
            self._last_ids = ids
        return ids.tolist()

    def _sample(self, logits: Tensor, check: bool = True) -> Tensor:
        uniforms = None
        if self._config.temperature > 0:
            uniforms = self._uniforms.next(self.rows).to(logits.device)
        if self._config.repetition_penalty != 1:
            self._seen = self._all_seen(logits)
        return sample(
            logits, self._config,
            n_tokens=self._n_tokens, seen=self._seen, uniforms=uniforms, check=check,
        )  # fmt: skip

    def _all_seen(self, like: Tensor) -> Tensor:
        """(b, v) bool: the ids of each row's prompt and output so far."""
        if self._seen is not None:
            return self._seen.scatter(1, self._last_ids[:, None], True)
        seen = torch.zeros_like(like, dtype=torch.bool)
        for i, row in enumerate(self.rows):
            seen[i, self._prompts[row]] = True
        return seen


class _Reading:
    """A copy of a tensor for the host, which waits for the copy alone, not for what comes after."""

    def __init__(self, tensor: Tensor):
        if tensor.device.type != "cuda":
            self._copy, self._done = tensor.clone(), None
            return
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._copy.copy_(tensor, non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record()

    def result(self) -> Tensor:
        if self._done is not None:
            self._done.synchronize()
        return self._copy


def read_prompts(model: BlackMamba, prompts: list[list[int]]) -> tuple[Tensor, State]:
    """Read the prompts, right-padded and piece by piece.

    Rows whose prompt has ended wait outside until the longest is read.

    Args:
        model: in evaluation mode; gradients are off.
        prompts: each at least one token id within the vocabulary.
    Returns:
        Logits (b, v) after each prompt's last token, and the memory of all rows.
    """
    device = next(model.parameters()).device
    at_once = _PREFILL_TOKENS_ON_GPU if device.type == "cuda" else _PREFILL_TOKENS
    rows, start, state = list(range(len(prompts))), 0, None
    read: list[int] = []
    read_logits: list[Tensor] = []
    read_states: list[State] = []
    while rows:
        stop = start + max(at_once // len(rows), _PREFILL_TOKENS_PER_ROW)
        pieces = [torch.from_numpy(np.array(prompts[row][start:stop])) for row in rows]
        lengths = torch.tensor([len(piece) for piece in pieces])
        logits, state = read_piece(
            model,
            pad_sequence(pieces, batch_first=True),
            state,
            None if (lengths == lengths[0]).all() else lengths,
        )
        ends = [i for i, row in enumerate(rows) if len(prompts[row]) <= stop]
        goes_on = [i for i, row in enumerate(rows) if len(prompts[row]) > stop]
        if len(ends) == len(prompts):
            return logits, state
        read += [rows[i] for i in ends]
        read_logits.append(logits[ends])
        read_states.append(state.select(ends))
        rows, start, state = [rows[i] for i in goes_on], stop, state.select(goes_on)
    order = torch.tensor(read).argsort()
    return torch.cat(read_logits)[order.to(device)], State.cat(read_states).select(order)


def _in_place(model: BlackMamba, state: State) -> State | Decoder | CapturedDecoder:
    """The fastest way to go on from a state: over memory of its own, where the model allows."""
    if next(model.parameters()).device.type == "cuda":
        captured = cannot_capture(model, state.batch_size) is None
        return CapturedDecoder(model, state) if captured else state
    return Decoder(model, state) if cannot_decode(model) is None else state


@contextlib.contextmanager
def _evaluating(model: BlackMamba) -> Generator[None]:
    """Evaluation mode and no gradients inside; the mode of every module is put back after.

    Around each step, not around the whole generation: between two ids the caller has the model as
    it was, also when it never asks for the rest.
    """
    training = [module for module in model.modules() if module.training] if model.training else []
    for module in training:
        module.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


# ---- checks ---------------------------------------------------------------------------------


def _checked_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> list[list[int]]:
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise InputError(f"prompts={prompts!r}: must be a list of lists of token ids")
    checked = [_checked_ids(f"prompts[{i}]", ids, vocab_size) for i, ids in enumerate(prompts)]
    if not checked:
        raise InputError("prompts is empty: must hold at least one prompt")
    for i, ids in enumerate(checked):
        if not ids:
            raise InputError(f"prompts[{i}] is empty: a prompt needs at least one token id")
    return checked


def _checked_ids(name: str, ids: Iterable[int], vocab_size: int) -> list[int]:
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise InputError(f"{name}={ids!r}: must be a list of token ids")
    if isinstance(ids, list) and set(map(type, ids)) == {int}:
        usual: list[int] = ids
        if min(usual) >= 0 and max(usual) < vocab_size:
            return usual.copy()
    checked: list[int] = []
    for i, token_id in enumerate(ids):
        number = _whole(token_id)
        if number is None or not 0 <= number < vocab_size:
            raise InputError(
                f"{name} holds {token_id!r} at {i}: must be a token id 0 .. {vocab_size - 1}"
            )
        checked.append(number)
    return checked


def _checked_count(name: str, value: int) -> int:
    number = _whole(value)
    if number is None or number < 0:
        raise InputError(f"{name}={value!r}: must be a whole number of at least 0")
    return number


def _whole(value: object) -> int | None:
    """`value` as an int if it is a whole number of any library; truth values are none."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # pyright: ignore[reportArgumentType] # that is the question
    except TypeError:
        return None
