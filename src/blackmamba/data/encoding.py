"""Blocks of documents to ids, as a worker process makes them: the bound of preparing text.

A tokenizer trained here cuts text into words by one pattern and encodes each word alone. Words come
back again and again, so their ids are kept; ASCII text is cut by Python's own regular expressions,
several times as fast as by the library's. The ids are exactly the library's, which does the rest.
"""

import json
import re
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models

from blackmamba.data.holdout import document_hash
from blackmamba.data.tokenizer import WORDS, Tokenizer, word_pre_tokenizer
from blackmamba.data.tokens import Counts, dtype_for

_MAX_WORDS = 2**18  # kept at once, some 50 MB
_ASCII_WORDS = re.compile(
    WORDS.replace(r"\p{L}\p{M}", "a-zA-Z").replace(r"|\p{N}", "|[0-9]").replace(r"\p{N}", "0-9"),
    re.ASCII,
)
# No word goes on after a line end with a visible character, so text may be cut in between.
_CUT = re.compile(r"(?<=\n)(?=[!-~])")


class Encoder:
    """Encodes documents with one tokenizer; keeps what it has learnt of words."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._dtype = np.dtype(dtype_for(tokenizer.n_tokens)).newbyteorder("<")
        self._words = _Words(tokenizer, self._dtype) if _cuts_like_ours(tokenizer) else None

    def encode(self, texts: list[str]) -> list[bytes]:
        """The ids of each text as `dtype_for` little-endian numbers."""
        words = self._words
        if words is None:
            return self._by_library(texts)
        pieces = [[text] if text.isascii() else _CUT.split(text) for text in texts]
        others = [p for document in pieces for p in document if not p.isascii()]
        encoded = iter(self._by_library(others))
        if len(words) > _MAX_WORDS:
            words.clear()
        return [
            b"".join(
                b"".join(map(words.__getitem__, _ASCII_WORDS.findall(piece)))
                if piece.isascii()
                else next(encoded)
                for piece in document
            )
            for document in pieces
        ]

    def _by_library(self, texts: list[str]) -> list[bytes]:
        return [np.array(ids, self._dtype).tobytes() for ids in self._tokenizer.encode_batch(texts)]


class _Words(dict[str, bytes]):
    """The ids of words, found out when they are first asked for."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype[Any]):
        super().__init__()
        self._model = tokenizer.backend.model
        self._dtype = dtype

    def __missing__(self, word: str) -> bytes:
        letters = word.encode().decode("latin-1").translate(_BYTE_LETTERS)
        ids = [token.id for token in self._model.tokenize(letters)]
        self[word] = found = np.array(ids, self._dtype).tobytes()
        return found


class BlockEncoder:
    """Splits a block of documents in what is trained on and what is held out, and encodes both.

    Args:
        tokenizer: of all.
        limit: documents with a lower hash are held out.
        key: of the hash.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int, key: bytes):
        self._encoder = Encoder(tokenizer)
        self._limit, self._key = limit, key
        self._dtype = np.dtype(dtype_for(tokenizer.n_tokens)).newbyteorder("<")
        self._eot = np.array([tokenizer.eot_id], self._dtype).tobytes()

    def __call__(self, texts: list[str]) -> tuple["Encoded", "Encoded"]:
        """Training part and held-out part, each with its documents in order."""
        contents = [text.encode() for text in texts]
        held_out = [document_hash(content, self._key) < self._limit for content in contents]
        parts: tuple[list[bytes], list[bytes]] = ([], [])
        n_bytes, n_documents = [0, 0], [0, 0]
        for ids, content, side in zip(self._encoder.encode(texts), contents, held_out, strict=True):
            parts[side].extend((self._eot, ids))
            n_bytes[side] += len(content)
            n_documents[side] += 1
        train, validation = (
            self._part(b"".join(parts[side]), n_bytes[side], n_documents[side]) for side in (0, 1)
        )
        return train, validation

    def _part(self, ids: bytes, n_bytes: int, n_documents: int) -> "Encoded":
        numbers = np.frombuffer(ids, self._dtype)
        return ids, Counts(
            n_tokens=len(numbers),
            n_bytes=n_bytes,
            n_documents=n_documents,
            max_id=int(numbers.max()) if len(numbers) else 0,
        )


Encoded = tuple[bytes, Counts]
"""Ids, each document's after an end of text, and what they are."""


def _cuts_like_ours(tokenizer: Tokenizer) -> bool:
    """Whether text goes to the model by the words of `WORDS` and nothing is done to it before."""
    like_ours = tokenizers.Tokenizer(models.BPE())
    like_ours.pre_tokenizer = word_pre_tokenizer()
    content: dict[str, Any] = json.loads(tokenizer.to_json())
    return (
        content["normalizer"] is None
        and content["pre_tokenizer"] == json.loads(like_ours.to_str())["pre_tokenizer"]
        and content["model"]["type"] == "BPE"
        and not content["model"].get("dropout")
        and all(token["special"] for token in content["added_tokens"])
    )


def _byte_letters() -> dict[int, int]:
    """The letter that a byte-level tokenizer writes for each byte.

    Source: Radford et al. 2019 (GPT-2): bytes that print stand for themselves, the others, in
    order, for the letters from U+0100 on.
    """
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printing)
    return {byte: byte for byte in printing} | {b: 256 + i for i, b in enumerate(others)}


_BYTE_LETTERS = _byte_letters()
