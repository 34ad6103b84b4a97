"""Text in, text out: a tokenizer around the engine, stop strings, whole characters only."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from blackmamba.errors import InputError
from blackmamba.generate.engine import Batch
from blackmamba.generate.sampling import SamplingConfig
from blackmamba.model import BlackMamba


class TextTokenizer(Protocol):
    """What is needed of a tokenizer; `blackmamba.data.Tokenizer` is one.

    Ids 0 .. n_tokens - 1 have a token; eot_id ends a text. `decode` gives U+FFFD for bytes that are
    not UTF-8, as `bytes.decode(errors="replace")` does.
    """

    @property
    def n_tokens(self) -> int: ...
    @property
    def eot_id(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


def generate_text(
    model: BlackMamba,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    stop_at_eot: bool = True,
    on_text: Callable[[int, str], None] | None = None,
) -> list[str]:
    """Continue each text. Equal arguments give equal texts.

    Args:
        model: used in evaluation mode; one in training mode is put back after every step.
        tokenizer: the one that the model was trained with.
        prompts: texts of at least one token each; nothing is put before them.
        max_new_tokens: most new tokens a prompt.
        temperature, top_k, top_p, min_p, repetition_penalty, seed: see `SamplingConfig`.
        stop: a text ends before the first of these strings to be complete, wherever the borders of
            its tokens are.
        stop_at_eot: whether a text ends at the tokenizer's end-of-text token.
        on_text: called with (row, piece) whenever more of a row's text is certain: pieces are whole
            characters, not empty, and hold back what may turn out to begin a stop string. Joined
            they are the row's returned text.
    Returns:
        The new text of each prompt. Bytes that are no character, also those of a last character
        that max_new_tokens cut off, are U+FFFD each time.
    Raises:
        ConfigError: a sampling argument is out of its range.
        InputError: prompts, max_new_tokens or stop are wrong, the tokenizer has more tokens than
            the model, or the model's logits are NaN.
    """
    config = SamplingConfig(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    prompt_ids = _encoded(model, tokenizer, prompts)
    return continue_ids(
        model, tokenizer, prompt_ids, max_new_tokens, config,
        stop=stop, stop_at_eot=stop_at_eot, on_text=on_text,
    )  # fmt: skip


def continue_ids(
    model: BlackMamba,
    tokenizer: TextTokenizer,
    prompt_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    config: SamplingConfig,
    *,
    stop: Sequence[str] = (),
    stop_at_eot: bool = True,
    on_text: Callable[[int, str], None] | None = None,
) -> list[str]:
    """`generate_text` of prompts that are ids already, such as a conversation."""
    stop = _checked_stop(stop)
    batch = Batch(
        model,
        prompt_ids,
        max_new_tokens,
        config,
        stop_ids=[tokenizer.eot_id] if stop_at_eot else [],
        n_tokens=tokenizer.n_tokens,
    )
    streams = [_RowText(tokenizer, ids, stop) for ids in prompt_ids]
    texts: list[list[str]] = [[] for _ in prompt_ids]

    def give(row: int, piece: str) -> None:
        if piece:
            texts[row].append(piece)
            if on_text is not None:
                on_text(row, piece)

    while batch.rows:
        before = batch.rows
        for row, token_id in batch.advance():
            give(row, streams[row].push(token_id))
            if streams[row].stopped:
                batch.drop(row)
        for row in sorted(set(before).difference(batch.rows)):
            give(row, streams[row].finish())
    return ["".join(pieces) for pieces in texts]


class _RowText:
    """One row's ids on their way to certain text: whole characters, then stop strings."""

    def __init__(self, tokenizer: TextTokenizer, prompt_ids: Sequence[int], stop: Sequence[str]):
        self._characters = WholeCharacters(tokenizer, prompt_ids)
        self._cut = CutAtStop(stop)

    @property
    def stopped(self) -> bool:
        return self._cut.stopped

    def push(self, token_id: int) -> str:
        return self._cut.push(self._characters.push(token_id))

    def finish(self) -> str:
        return self._cut.push(self._characters.finish()) + self._cut.finish()


class WholeCharacters:
    """Turns a row's ids into text one at a time, never giving part of a character.

    The pieces joined are the text that the tokenizer gives for all new ids after the prompt. For a
    byte-level tokenizer that is `decode(new ids)` exactly, whatever the ids. Only the last few ids
    are decoded anew each time. (`tokenizers.decoders.DecodeStream` is no substitute: it has no way
    to give what it still holds back when the ids end.)

    Args:
        tokenizer: gives ids their text.
        before: ids that the row follows on; they decide about a space at the seam for tokenizers
            that drop the first space of a text.
    """

    _CONTEXT = 8  # ids kept to decode the next ones with
    _UNSURE = 3  # most bytes of a character that lacks its last: so many U+FFFD may yet change

    def __init__(self, tokenizer: TextTokenizer, before: Sequence[int]):
        self._decode = tokenizer.decode
        self._ids = list(before[-self._CONTEXT :])
        self._n_given = len(self._decode(self._ids))

    def push(self, token_id: int) -> str:
        """The text that became certain with this id."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        n_unsure = min(len(text) - len(text.rstrip("\ufffd")), self._UNSURE)
        piece = text[self._n_given : len(text) - n_unsure]
        self._n_given += len(piece)
        if n_unsure == 0 and len(self._ids) > 2 * self._CONTEXT:
            # A character ends here, so nothing that comes can change what these ids mean.
            self._ids = self._ids[-self._CONTEXT :]
            self._n_given = len(self._decode(self._ids))
        return piece

    def finish(self) -> str:
        """The text of what was held back, where no more ids come."""
        return self._decode(self._ids)[self._n_given :]


class CutAtStop:
    """Passes text through up to the first stop string to be complete.

    Of several that end at the same place the longest counts. The result does not depend on how the
    text is split into pieces.
    """

    def __init__(self, stop: Sequence[str]):
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Text that is certain; nothing more once `stopped`."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(start + len(s), start) for s in self._stop if (start := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        n_held = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]

    def finish(self) -> str:
        """What is still held back, where no more text comes."""
        return self._held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins, less than all of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


# ---- checks ---------------------------------------------------------------------------------


def _checked_stop(stop: Sequence[str]) -> list[str]:
    if isinstance(stop, str) or not isinstance(stop, Iterable):
        raise InputError(f"stop={stop!r}: must be a list of strings")
    for i, s in enumerate(stop):
        if not isinstance(s, str) or not s:
            raise InputError(f"stop[{i}]={s!r}: must be a string that is not empty")
    return list(stop)


def _encoded(
    model: BlackMamba, tokenizer: TextTokenizer, prompts: Sequence[str]
) -> list[list[int]]:
    if tokenizer.n_tokens > model.config.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.n_tokens} tokens, the model's vocabulary "
            f"{model.config.vocab_size}: use the tokenizer that the model was trained with"
        )
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise InputError(f"prompts={prompts!r}: must be a list of texts")
    return [_encoded_prompt(tokenizer, f"prompts[{i}]", text) for i, text in enumerate(prompts)]


def _encoded_prompt(tokenizer: TextTokenizer, name: str, text: str) -> list[int]:
    if not isinstance(text, str):
        raise InputError(f"{name}={text!r}: must be a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name}={text!r}: is not valid Unicode text ({error.reason})") from None
    ids = tokenizer.encode(text)
    if not ids:
        raise InputError(f"{name}={text!r}: a prompt needs at least one token; give it some text")
    return ids
