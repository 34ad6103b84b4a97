"""Streams of text: whole characters, stop strings across tokens, pieces that add up."""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor, nn

from blackmamba.config import ModelConfig
from blackmamba.data.tokenizer import Tokenizer
from blackmamba.errors import ConfigError, InputError
from blackmamba.generate import generate, generate_text
from blackmamba.generate.text import CutAtStop, WholeCharacters
from blackmamba.model import BlackMamba, MambaState, State

EOT = 0
PROMPT = 1
REPLACEMENT = "\ufffd"
NEOX = Path(__file__).parents[3] / "shared/data/gpt-neox-20b-tokenizer.json"


class Chunks:
    """A tokenizer whose tokens are any pieces of bytes, as byte-level BPE could have learned."""

    def __init__(self, chunks: Sequence[bytes]):
        self.tokens = [b"", b"prompt ", *chunks]  # EOT, PROMPT, then the chunks in order
        self.n_tokens = len(self.tokens)
        self.eot_id = EOT

    @property
    def script(self) -> list[int]:
        return list(range(2, self.n_tokens))

    def encode(self, text: str) -> list[int]:
        return [PROMPT] if text else []

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.tokens[i] for i in ids).decode("utf-8", errors="replace")


class Scripted(nn.Module):
    """A model that says what it is told: row i gives scripts[i], then end-of-text for ever."""

    def __init__(self, scripts: Sequence[Sequence[int]], vocab_size: int):
        super().__init__()
        self.config = ModelConfig(layers=("mamba",), d_model=1, vocab_size=vocab_size)
        self.weight = nn.Parameter(torch.zeros(1))
        self.scripts = scripts
        self.n_steps = [0] * len(scripts)

    def prefill(self, input_ids: Tensor, state: None, **_: object) -> tuple[Tensor, State]:
        rows = torch.arange(len(input_ids))
        return self._say(torch.stack([rows, torch.zeros_like(rows)], -1))

    def step(self, _: Tensor, state: State) -> tuple[Tensor, State]:
        layer = state.layers[0]
        assert isinstance(layer, MambaState)
        return self._say(layer.ssm[:, 0] + torch.tensor([0, 1]))

    def _say(self, memory: Tensor) -> tuple[Tensor, State]:
        logits = torch.zeros(len(memory), self.config.vocab_size)
        for i, (row, position) in enumerate(memory.tolist()):
            script = self.scripts[row]
            logits[i, script[position] if position < len(script) else EOT] = 1.0
            self.n_steps[row] += 1
        return logits, State(len(memory), (MambaState(memory[:, None], memory[:, None]),))


def run(
    tokenizer: Chunks,
    scripts: Sequence[Sequence[int]],
    stop: Sequence[str] = (),
    max_new_tokens: int = 1000,
) -> tuple[list[str], list[list[str]], list[int]]:
    """The texts, the pieces of each row and the ids that each row took."""
    model = Scripted(scripts, tokenizer.n_tokens)
    pieces: list[list[str]] = [[] for _ in scripts]
    texts = generate_text(
        model,  # pyright: ignore[reportArgumentType]
        tokenizer,
        ["prompt "] * len(scripts),
        max_new_tokens,
        stop=stop,
        on_text=lambda row, piece: pieces[row].append(piece),
    )
    return texts, pieces, model.n_steps


def cut(text: str, stop: Sequence[str]) -> str:
    """What stop strings mean: read until one is complete, then take it away."""
    for end in range(len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


@st.composite
def chunked(draw: st.DrawFn, source: st.SearchStrategy[bytes]) -> list[bytes]:
    data = draw(source)
    borders = draw(st.sets(st.integers(1, max(1, len(data) - 1)), max_size=30))
    ends = [0, *sorted(b for b in borders if b < len(data)), len(data)]
    return [data[a:b] for a, b in pairwise(ends) if b > a]


# Characters of one to four bytes, marks that combine, U+FFFD itself.
TEXT = st.text(
    st.one_of(st.sampled_from("ab \né€\U0001f600\u0301\ufffd"), st.characters(codec="utf-8"))
)
VALID = chunked(TEXT.map(str.encode))
ANY_BYTES = chunked(st.lists(st.one_of(TEXT.map(str.encode), st.binary(max_size=3))).map(b"".join))


# ---- whole characters -------------------------------------------------------------------------


@given(st.lists(st.one_of(VALID, ANY_BYTES), min_size=1, max_size=3))
def test_pieces_add_up_to_the_text_of_all_ids(rows: list[list[bytes]]):
    tokenizer = Chunks([chunk for row in rows for chunk in row])
    first, scripts = 2, []
    for row in rows:
        scripts.append(list(range(first, first + len(row))))
        first += len(row)
    texts, pieces, _ = run(tokenizer, scripts)
    assert texts == [tokenizer.decode(script) for script in scripts]
    assert ["".join(p) for p in pieces] == texts
    assert all(piece for row in pieces for piece in row)


@given(VALID)
def test_a_character_comes_when_its_last_byte_does_and_never_before(chunks: list[bytes]):
    tokenizer = Chunks(chunks)
    characters, given_text, data = WholeCharacters(tokenizer, [PROMPT]), "", b""
    for token_id in tokenizer.script:
        given_text += characters.push(token_id)
        data += tokenizer.tokens[token_id]
        certain = data.decode("utf-8", errors="ignore")
        if not certain.endswith(REPLACEMENT):  # looks like half a character until more comes
            assert given_text == certain
    assert given_text + characters.finish() == data.decode()


def test_a_character_of_four_tokens_comes_whole():
    tokenizer = Chunks([bytes([b]) for b in "a😀b".encode()])
    _, pieces, _ = run(tokenizer, [tokenizer.script])
    assert pieces == [["a", "😀", "b"]]


def test_what_the_limit_cuts_off_is_one_replacement_character():
    tokenizer = Chunks([bytes([b]) for b in "a😀b".encode()])
    texts, pieces, n_steps = run(tokenizer, [tokenizer.script], max_new_tokens=3)
    assert texts == ["a" + REPLACEMENT]
    assert pieces == [["a", REPLACEMENT]]
    assert n_steps == [3]


def test_bytes_that_are_never_text_do_not_hold_back_the_stream():
    tokenizer = Chunks([b"\x80"] * 40)
    characters = WholeCharacters(tokenizer, [PROMPT])
    n_given = [len(characters.push(token_id)) for token_id in tokenizer.script]
    assert n_given == [0] * 3 + [1] * 37
    assert characters.finish() == REPLACEMENT * 3


def test_long_texts_decode_a_few_ids_at_a_time():
    class Counting(Chunks):
        longest = 0

        def decode(self, ids: Sequence[int]) -> str:
            self.longest = max(self.longest, len(ids))
            return super().decode(ids)

    tokenizer = Counting([c.encode() for c in "wörd " * 200])
    characters = WholeCharacters(tokenizer, [PROMPT] * 500)
    assert "".join(map(characters.push, tokenizer.script)) == "wörd " * 200
    assert tokenizer.longest < 20


# ---- stop strings -----------------------------------------------------------------------------


@given(st.data())
def test_stop_strings_cut_wherever_tokens_and_pieces_begin(data: st.DataObject):
    chunks = data.draw(st.one_of(VALID, ANY_BYTES))
    tokenizer = Chunks(chunks)
    text = tokenizer.decode(tokenizer.script)
    spans = st.tuples(st.integers(0, len(text)), st.integers(1, 6))
    inside = spans.map(lambda span: text[span[0] : span[0] + span[1]])
    stop = data.draw(st.lists(st.one_of(inside, st.text("ab \n", max_size=4)).filter(bool)))
    texts, pieces, _ = run(tokenizer, [tokenizer.script], stop)
    assert texts == [cut(text, stop)]
    assert "".join(pieces[0]) == texts[0]


@given(st.lists(st.text("ab", max_size=4)), st.lists(st.text("ab", min_size=1, max_size=5)))
@example(["a", "a", "a", "b", "a"], ["aab"])  # the longest beginning is held, not the shortest
@example(["xabcd"], ["abcd", "bc"])  # the first to be complete counts, in one piece
@example(["x", "a", "b", "c", "d"], ["abcd", "bc"])  # and in many
@example(["xab", "c"], ["bc", "abc"])  # of two at one place the longest
def test_cut_at_stop_is_its_definition(pieces: list[str], stop: list[str]):
    text, out = CutAtStop(stop), ""
    for i, piece in enumerate(pieces):
        out += text.push(piece)
        so_far = "".join(pieces[: i + 1])
        assert text.stopped == any(s in so_far for s in stop)
        if not text.stopped:  # held back is what could begin a stop string, and no more
            held = so_far[len(out) :]
            assert out + held == so_far
            begins = [n for s in stop for n in range(len(s)) if so_far.endswith(s[:n])]
            assert len(held) == max(begins, default=0)
    assert out + text.finish() == cut("".join(pieces), stop)


def test_a_row_ends_at_its_stop_string_and_the_others_go_on():
    tokenizer = Chunks([b"one", b" E", b"N", b"D!", b" more", b"\xe2\x82", b"\xac"])
    one, e, n, d, more, euro, sign = tokenizer.script
    scripts = [[one, e, n, d, more], [one, more, euro, sign, more], [e, n, n, e, n]]
    texts, pieces, n_steps = run(tokenizer, scripts, stop=["END", "€"])
    assert texts == ["one ", "one more", " ENN EN"]
    assert pieces == [["one", " "], ["one", " more"], [" ", "ENN", " ", "EN"]]
    assert n_steps == [4, 4, 6]  # not one step after the stop; the last row runs into end-of-text


def test_end_of_text_ends_a_row_unless_told_otherwise():
    tokenizer = Chunks([b"a", b"b"])
    tokenizer.tokens[EOT] = b"<end>"
    script = [2, EOT, 3]
    assert run(tokenizer, [script])[0] == ["a"]
    model = Scripted([script], tokenizer.n_tokens)
    texts = generate_text(model, tokenizer, ["x"], 3, stop_at_eot=False)  # pyright: ignore
    assert texts == ["a<end>b"]


def test_ids_that_the_tokenizer_lacks_are_never_chosen():
    tokenizer = Chunks([b"a"])
    model = Scripted([[5, 5, 2, 7]], vocab_size=9)  # without 5 all are equal: id 0 ends the row
    assert generate_text(model, tokenizer, ["x"], 4) == [""]  # pyright: ignore
    texts = generate_text(model, tokenizer, ["x"], 4, 9.0, stop_at_eot=False)  # pyright: ignore
    assert set(texts[0]) <= set("a prompt")


def test_no_new_tokens_is_no_text():
    tokenizer = Chunks([b"a"])
    assert run(tokenizer, [[2], [2]], max_new_tokens=0) == (["", ""], [[], []], [0, 0])


# ---- real tokenizers --------------------------------------------------------------------------


def trained() -> Tokenizer:
    return Tokenizer.train(["naïve €uro 😀 and the the then", "日本語 text"] * 3, vocab_size=400)


def neox() -> Tokenizer:
    if not NEOX.exists():
        pytest.skip("the GPT-NeoX tokenizer file is not there")
    return Tokenizer.from_file(NEOX)


@pytest.mark.parametrize("make", [trained, neox])
def test_pieces_add_up_for_byte_level_tokenizers_whatever_the_ids(make: Callable[[], Tokenizer]):
    tokenizer, rng = make(), random.Random(0)
    rows = [tokenizer.encode("naïve 日本語 😀😀 text\n\n    indented, thé€n\u0301")]
    assert tokenizer.decode(rows[0]).startswith("naïve 日本語 😀😀 text\n\n    indented, th")
    rows += [[rng.randrange(tokenizer.n_tokens) for _ in range(60)] for _ in range(100)]
    rows += [[rng.randrange(1, 256) for _ in range(60)] for _ in range(100)]  # single bytes
    for ids in rows:
        characters = WholeCharacters(tokenizer, tokenizer.encode("prompt \ufffd"))
        pieces = [characters.push(token_id) for token_id in ids]
        assert "".join(pieces) + characters.finish() == tokenizer.decode(ids)


def test_a_space_at_the_seam_stays_where_the_tokenizer_drops_the_first_of_a_text():
    words = {"<|endoftext|>": EOT, "▁the": 1, "▁cat": 2}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(backend)
    assert tokenizer.decode([2]) == "cat"
    model = Scripted([[2] * 30], tokenizer.n_tokens)
    assert generate_text(model, tokenizer, ["the"], 30) == [" cat" * 30]  # pyright: ignore


def test_texts_are_those_of_the_ids():
    tokenizer = trained()
    torch.manual_seed(0)
    layers, v = ("mamba", "moe"), tokenizer.n_tokens + 3
    config = ModelConfig(layers=layers, d_model=16, d_expert=8, vocab_size=v, unused_vocab=3)
    model = BlackMamba(config)
    prompts = ["the", "日本語 and more", "naïve 😀"]
    sampling = {"temperature": 1.5, "top_k": 250, "repetition_penalty": 1.1, "seed": 4}
    ids = generate(model, list(map(tokenizer.encode, prompts)), 40, **sampling)
    ids = [row[: row.index(EOT)] if EOT in row else row for row in ids]
    texts = generate_text(model, tokenizer, prompts, 40, **sampling)
    assert texts == [tokenizer.decode(row) for row in ids]
    assert any(REPLACEMENT in text for text in texts)  # untrained, it says bytes that are no text


# ---- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": "text"}, "prompts='text': must be a list of texts"),
        ({"prompts": None}, "prompts=None: must be a list of texts"),
        ({"prompts": ["x", ""]}, r"prompts\[1\]='': a prompt needs at least one token"),
        ({"prompts": ["x", 7]}, r"prompts\[1\]=7: must be a text"),
        ({"prompts": ["x\udcff"]}, r"prompts\[0\]='x\\udcff': is not valid Unicode text"),
        ({"stop": "END"}, "stop='END': must be a list of strings"),
        ({"stop": None}, "stop=None: must be a list of strings"),
        ({"stop": ["END", ""]}, r"stop\[1\]='': must be a string that is not empty"),
        ({"stop": [b"END"]}, r"stop\[0\]=b'END'"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"tokenizer": Chunks([b"a"] * 4)}, "the tokenizer has 6 tokens, the model's vocabulary 3"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, object], message: str):
    tokenizer = Chunks([b"a"])
    good = {"model": Scripted([[2]], 3), "tokenizer": tokenizer, "prompts": ["x"]}
    with pytest.raises(InputError, match=message):
        generate_text(**(good | arguments))  # pyright: ignore[reportArgumentType]


def test_bad_sampling_is_named():
    tokenizer = Chunks([b"a"])
    with pytest.raises(ConfigError, match="temperature=-1"):
        generate_text(Scripted([[2]], 3), tokenizer, ["x"], temperature=-1)  # pyright: ignore
