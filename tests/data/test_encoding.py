"""The fast way through a tokenizer gives exactly the library's ids."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers

from blackmamba.data import Tokenizer, iter_documents
from blackmamba.data import encoding as encoding_module
from blackmamba.data.encoding import BlockEncoder, Encoder

TEXTS = [
    "Hello, world! It's 12345 o'clock.\n\n  Go on\t(now).  \r\n\r\n   end   ",
    "Grüße — naïve café, 漢字 and 한국어\nplain ascii line\n  indented é\n\n\nlast\u0085\u00a0x",
    "x = {'a': [1, 22, 333]}  # " + "-" * 200 + "\n" * 150 + "if a:\n\treturn" + " " * 200,
    "a\x1cb\x1d \x1e\n\x0b\x0c\x00 <|endoftext|> ab<|endoftext|>\n<|endoftext|>",
    "z" * 500 + "9" * 10 + "Ünder" + "é" * 70 + "\n.",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(itertools.islice(iter_documents(["corpus:python-stdlib"]), 3), 600)


def ids(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    return [np.frombuffer(found, "<u2").tolist() for found in encoder.encode(texts)]


def is_fast(encoder: Encoder) -> bool:
    return encoder._words is not None


def test_awkward_texts(tokenizer: Tokenizer):
    encoder = Encoder(tokenizer)
    assert is_fast(encoder)
    for _ in range(2):  # words unknown, then known
        assert ids(encoder, TEXTS) == tokenizer.encode_batch(TEXTS)


def test_every_pair_and_triple_of_ascii_kinds(tokenizer: Tokenizer):
    encoder = Encoder(tokenizer)
    characters = [chr(i) for i in range(128)]
    pairs = ["".join(pair) for pair in itertools.product(characters, repeat=2)]
    kinds = ["a", "Z", "7", " ", "\n", "\r", "\t", "\x0b", "\x1c", "'", "_", "."]
    fives = ["".join(five) for five in itertools.product(kinds, repeat=4)]
    for texts in (pairs, fives):
        assert ids(encoder, texts) == tokenizer.encode_batch(texts)


@given(st.lists(st.text(alphabet="aB7 \n\r\t.'é漢\u0301\u00a0\u2028½²", max_size=60), max_size=5))
@settings(max_examples=150, deadline=None)
def test_any_text(tokenizer: Tokenizer, texts: list[str]):
    assert ids(Encoder(tokenizer), texts) == tokenizer.encode_batch(texts)


def test_few_words_in_memory(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encoding_module, "_MAX_WORDS", 5)
    encoder = Encoder(tokenizer)
    for text in TEXTS * 2:
        assert ids(encoder, [text]) == [tokenizer.encode(text)]


def test_other_tokenizers_go_through_the_library(tokenizer: Tokenizer):
    def changed(**parts: object) -> Tokenizer:
        backend = Tokenizer.train(TEXTS, 300).backend
        for name, part in parts.items():
            setattr(backend, name, part)
        return Tokenizer(backend)

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    others = [changed(normalizer=normalizers.NFC()), changed(pre_tokenizer=byte_level)]
    added = Tokenizer.train(TEXTS, 300).backend
    added.add_tokens([AddedToken("return", special=False)])
    others.append(Tokenizer(added))
    for other in others:
        encoder = Encoder(other)
        assert not is_fast(encoder)
        assert ids(encoder, TEXTS) == other.encode_batch(TEXTS)


def test_a_block_is_split_and_counted(tokenizer: Tokenizer):
    texts = [f"{text} {i}" for i in range(8) for text in TEXTS]
    whole, nothing = BlockEncoder(tokenizer, 0, b"0")(texts)
    assert nothing[1].n_documents == nothing[1].n_tokens == 0
    train, validation = BlockEncoder(tokenizer, 2**63, b"0")(texts)
    assert 0 < validation[1].n_documents < len(texts)
    for name in ("n_tokens", "n_bytes", "n_documents"):
        parts = getattr(train[1], name) + getattr(validation[1], name)
        assert parts == getattr(whole[1], name)
    numbers = np.frombuffer(whole[0], "<u2")
    assert (len(numbers), numbers.max()) == (whole[1].n_tokens, whole[1].max_id)
    assert whole[1].n_bytes == sum(len(text.encode()) for text in texts)
    assert np.count_nonzero(numbers == tokenizer.eot_id) == len(texts)
