"""Any text comes back exactly, special tokens never come out of text, foreign tokenizers work."""

import errno
import json
import json.decoder
import json.encoder
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from blackmamba.data import Tokenizer
from blackmamba.errors import ConfigError, DataError, InputError

TEXTS = [Path(module.__file__).read_text() for module in (json.decoder, json.encoder)]
TRAINED = Tokenizer.train(TEXTS, 400)
GPT_NEOX = Path(__file__).parents[3] / "shared" / "data" / "gpt-neox-20b-tokenizer.json"
ODD = ["", " ", "\n", "\r\n", "\x00", "a\u0301", "漢字かな", "😀👨‍👩‍👧", "\u202eabc",
       "ﬁ  \t x\u00a0y",
       "<|endoftext|>", "x<|endoftext|>y", "1234567", "don't", "a" * 300, " " * 300,
       "\ufeff", "\ufffd", "\U0010ffff"]  # fmt: skip


def word_level(*words: str) -> tokenizers.Tokenizer:
    """A foreign tokenizer of a few whole words."""
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


# ---- trained --------------------------------------------------------------------------------


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back_exactly(text: str):
    assert TRAINED.decode(TRAINED.encode(text)) == text


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_odd_text_comes_back_exactly(text: str):
    assert TRAINED.decode(TRAINED.encode(text)) == text


def test_trained_tokenizer_has_end_of_text_at_0_and_every_byte():
    assert (TRAINED.n_tokens, TRAINED.eot_id) == (400, 0)
    assert TRAINED.decode([0]) == "<|endoftext|>"
    smallest = Tokenizer.train(TEXTS, 257)
    assert smallest.n_tokens == 257
    assert len(smallest.encode("漢a")) == len("漢a".encode())


def test_learns_the_text():
    text = "".join(TEXTS)
    assert len(TRAINED.encode(text)) < len(text) / 2


def test_training_twice_gives_the_same():
    again = Tokenizer.train(iter(TEXTS), 400)
    assert again.to_json() == TRAINED.to_json()
    assert again.fingerprint == TRAINED.fingerprint != Tokenizer.train(TEXTS, 399).fingerprint


def test_text_with_few_words_gives_fewer_tokens():
    few = Tokenizer.train(["ab ab"], 1000)
    assert 257 < few.n_tokens < 270
    assert max(few.backend.get_vocab().values()) == few.n_tokens - 1


@pytest.mark.parametrize("vocab_size", [256, 0, -1])
def test_too_few_tokens_to_train(vocab_size: int):
    with pytest.raises(ConfigError, match=f"vocab_size={vocab_size}: at least 257"):
        Tokenizer.train(TEXTS, vocab_size)


def test_what_a_token_holds_is_bounded():
    # Else learning takes minutes on a long run of one character.
    tokenizer = Tokenizer.train([c * 300_000 for c in "a =\n"], 300)
    assert max(len(token) for token in tokenizer.backend.get_vocab()) == 128


def test_error_in_the_documents_reaches_the_caller():
    def documents():
        yield "text"
        raise DataError("broken")

    with pytest.raises(DataError, match="broken"):
        Tokenizer.train(documents(), 300)


# ---- special tokens -------------------------------------------------------------------------


def test_special_tokens_in_text_are_text():
    for tokenizer in (TRAINED, Tokenizer(tokenizers.Tokenizer.from_str(TRAINED.to_json()))):
        ids = tokenizer.encode("a<|endoftext|>b")
        assert tokenizer.eot_id not in ids
        assert tokenizer.encode_batch(["a<|endoftext|>b", ""]) == [ids, []]


def test_nothing_is_added_cut_off_or_padded():
    backend = word_level("<unk>", "</s>", "one", "two")
    backend.add_special_tokens(["</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    backend.enable_truncation(2)
    backend.enable_padding(length=8, pad_id=0)
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode("one two one") == [2, 3, 2]
    assert Tokenizer(tokenizers.Tokenizer.from_str(tokenizer.to_json())).encode("two") == [3]


@pytest.mark.parametrize(
    ("words", "eot_id"),
    [
        (("<unk>", "</s>", "<|endoftext|>"), 2),
        (("<unk>", "<eos>", "</s>"), 2),
        (("<unk>", "<eos>", "<|end_of_text|>"), 2),
        (("<unk>", "<eos>"), 1),
    ],
)
def test_end_of_text_of_foreign_tokenizers(words: tuple[str, ...], eot_id: int):
    assert Tokenizer(word_level(*words)).eot_id == eot_id


def test_no_end_of_text(tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    word_level("<unk>", "one").save(str(path))
    with pytest.raises(DataError, match="no end-of-text token") as caught:
        Tokenizer.from_file(path)
    assert str(path) in str(caught.value)


def test_gpt_neox():
    if not GPT_NEOX.exists():
        pytest.skip("GPT-NeoX's tokenizer is not beside this checkout")
    tokenizer = Tokenizer.load(GPT_NEOX)
    assert (tokenizer.n_tokens, tokenizer.eot_id) == (50_277, 0)
    assert tokenizer.encode("Hello world") == [12092, 1533]
    assert tokenizer.decode([50_276, 0]) == "  <|endoftext|>"
    for text in ("x<|endoftext|>y<|padding|>", "def f():\n        return 1\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert not {0, 1} & set(tokenizer.encode(text))
    with pytest.raises(InputError, match=r"50277: must be 0 .. 50276"):
        tokenizer.decode([50_277])


# ---- wrong input ----------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-1, 400, 2**40])
def test_decode_names_a_wrong_id(wrong: int):
    with pytest.raises(InputError, match=rf"token id {wrong}: must be 0 .. 399"):
        TRAINED.decode([5, wrong, 6])


def test_bytes_that_are_no_character_are_replaced():
    first, second = TRAINED.encode("é")
    assert TRAINED.decode([first]) == "\ufffd"
    assert TRAINED.decode([]) == ""
    assert TRAINED.decode([first, second]) == "é"


def test_half_a_surrogate_pair():
    with pytest.raises(InputError, match="no valid Unicode"):
        TRAINED.encode("a\ud800")


# ---- files ----------------------------------------------------------------------------------


def test_load_takes_a_file_or_its_folder(tmp_path: Path):
    path = tmp_path / "deep" / "tokenizer.json"
    TRAINED.save(path)
    for source in (path, str(path), path.parent):
        assert Tokenizer.load(source).fingerprint == TRAINED.fingerprint


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{}", b"[]", b"\xff\xfe", TRAINED.to_json().encode()[:1000]],
    ids=["empty", "brace", "object", "list", "utf16", "truncated"],
)
def test_damaged_file(tmp_path: Path, content: bytes):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged tokenizer") as caught:
        Tokenizer.load(tmp_path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path: Path):
    for source in (tmp_path / "none.json", tmp_path, tmp_path / "none", "none.json", "a/b/c"):
        with pytest.raises(DataError, match="no readable tokenizer file"):
            Tokenizer.load(source)


def test_save_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DataError, match="No space left on device"):
        TRAINED.save(tmp_path / "tokenizer.json")
    assert os.listdir(tmp_path) == []


# ---- hub ------------------------------------------------------------------------------------


def test_hub_name_without_the_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DataError, match=r"pip install 'blackmamba\[hub\]'"):
        Tokenizer.load("some/model")


def test_hub_name_from_the_local_cache(tmp_path: Path):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    repository = tmp_path / "hub" / "models--some--model"
    TRAINED.save(repository / "snapshots" / "0123abc" / "tokenizer.json")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    code = (
        "import json\n"
        "from blackmamba.data import Tokenizer\n"
        "from blackmamba.errors import DataError\n"
        "found = [Tokenizer.load('some/model').fingerprint]\n"
        "for name in ('some/other', 'no valid name'):\n"
        "    try: Tokenizer.load(name)\n"
        "    except DataError as error: found.append(str(error))\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"),
             "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    fingerprint, *errors = json.loads(done.stdout)
    assert fingerprint == TRAINED.fingerprint
    for name, error in zip(("some/other", "no valid name"), errors, strict=True):
        assert error.startswith(f"tokenizer '{name}': no such file or folder, and not to be had")
        assert "\n" not in error
