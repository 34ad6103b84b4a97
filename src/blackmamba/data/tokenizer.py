"""Text to token ids and back: a byte-level BPE trained here, or any tokenizer.json."""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from blackmamba.data.chat import ChatTemplate
from blackmamba.data.text import sections
from blackmamba.errors import ConfigError, DataError, InputError
from blackmamba.files import write_text

END_OF_TEXT = "<|endoftext|>"
_END_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")
_FILE = "tokenizer.json"
_PIECE_CHARACTERS = 2**16  # learnt from at once; the library holds 256 such pieces in memory
MIN_VOCAB_SIZE = 257
"""Tokens of a trained tokenizer that has learnt no merge: end of text and the 256 bytes."""

# What a token may hold at most: a word with the one space or sign before it, three digits, a run of
# signs with the line ends after it, line ends with the space before them, or other space. No run is
# endless, because learning takes time in the square of the longest.
WORDS = "|".join((
    r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]{1,64}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{M}\p{N}]{1,64}[\r\n]{0,64}",
    r"\s{0,64}[\r\n]{1,64}",
    r"\s{1,64}(?!\S)",
    r"\s{1,64}",
))  # fmt: skip


def word_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Cuts text into `WORDS` and writes each byte as a letter."""
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip


class Tokenizer:
    """A thin shell around `tokenizers.Tokenizer` that has exactly what this package needs.

    It knows one special id, end of text, and never makes it out of text: "<|endoftext|>" in a
    document or prompt is encoded as the characters that it is. Nothing is added, cut off or padded.

    Args:
        backend: is taken over; its truncation, padding and parsing of special tokens are off then.
        name: what messages call it.
    Raises:
        DataError: it has none of the known end-of-text tokens.
    """

    def __init__(self, backend: tokenizers.Tokenizer, name: str = "tokenizer"):
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        vocabulary = backend.get_vocab(with_added_tokens=True)
        ends = [vocabulary[token] for token in _END_NAMES if token in vocabulary]
        if not ends:
            raise DataError(f"{name}: no end-of-text token; known are {', '.join(_END_NAMES)}")
        self.backend = backend
        self.eot_id: int = ends[0]
        self.n_tokens: int = max(vocabulary.values()) + 1
        """Ids are 0 .. n_tokens - 1."""
        self.chat: ChatTemplate | None = None
        """How its model was taught to read conversations, if it was: chat.json beside it."""

    @classmethod
    def load(cls, source: str | Path) -> "Tokenizer":
        """Read a tokenizer.json, a folder with one, or a name on the hub, whichever `source` is.

        Raises:
            DataError: there is none, or it is damaged.
        """
        path = Path(source)
        if path.is_dir():
            return cls.from_file(path / _FILE)
        if path.exists() or path.suffix == ".json" or len(path.parts) > 2 or path.is_absolute():
            return cls.from_file(path)
        return cls.from_hub(str(source))

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Read a tokenizer.json.

        Raises:
            DataError: it is missing, damaged, or has no known end-of-text token.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"{path}: no readable tokenizer file ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: damaged tokenizer, not UTF-8 at {error.start}") from None
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing more special
            raise DataError(f"{path}: damaged tokenizer ({error})") from None
        found = cls(backend, str(path))
        found.chat = ChatTemplate.beside(Path(path))
        return found

    @classmethod
    def from_hub(cls, name: str) -> "Tokenizer":
        """Read the tokenizer.json of a model on the Hugging Face hub, or in its local cache.

        Raises:
            DataError: it cannot be had.
        """
        try:
            from huggingface_hub import hf_hub_download
        except ModuleNotFoundError:
            raise DataError(
                f"tokenizer {name!r}: no such file, and the hub needs huggingface_hub; "
                "pip install 'blackmamba[hub]'"
            ) from None
        try:
            path = hf_hub_download(name, _FILE)
        except (OSError, ValueError) as error:  # no network, no such model, no valid name
            reason = " ".join(str(error).split())
            raise DataError(
                f"tokenizer {name!r}: no such file or folder, and not to be had from the hub "
                f"({reason})"
            ) from None
        return cls.from_file(path)

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn a byte-level BPE; any text comes back from it exactly. Equal texts, equal result.

        Args:
            documents: read once, as a stream.
            vocab_size: at least 257. Text with too few different words gives fewer tokens.
        Raises:
            ConfigError: vocab_size is too small.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise ConfigError(
                f"vocab_size={vocab_size}: at least {MIN_VOCAB_SIZE} (end of text, 256 bytes)"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = word_pre_tokenizer()
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        pieces = (piece for text in documents for piece in sections(text, _PIECE_CHARACTERS))
        backend.train_from_iterator(pieces, trainer)
        return cls(backend)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, and nothing else.

        Raises:
            InputError: `text` is no Unicode text (half a surrogate pair).
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Like `encode` for many, on all cores."""
        try:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            raise InputError("a text to encode is no valid Unicode string") from None
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, with end of text as its name; bytes that are no UTF-8 are U+FFFD.

        Raises:
            InputError: an id is not 0 .. n_tokens - 1.
        """
        ids = list(ids)
        wrong = [i for i in ids if not 0 <= i < self.n_tokens]
        if wrong:
            raise InputError(f"token id {wrong[0]}: must be 0 .. {self.n_tokens - 1}")
        return self.backend.decode(ids, skip_special_tokens=False)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for tokenizers that do the same: SHA-256 of `to_json`."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The content of its tokenizer.json."""
        return self.backend.to_str()

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json, whole or not at all.

        Raises:
            DataError: it cannot be written.
        """
        try:
            write_text(Path(path), self.to_json())
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror})") from None
