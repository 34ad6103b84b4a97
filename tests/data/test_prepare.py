"""Prepared folders: what is in them, when they are made anew, and that no half is left behind."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from lone import error_on_full_disk
from many_ranks import alone

from blackmamba.config import from_mapping, to_mapping
from blackmamba.data import DataConfig, PreparedData, Tokenizer, prepare
from blackmamba.data.tokens import FORMAT, TokenWriter, dtype_for
from blackmamba.errors import ConfigError, DataError

N_DOCUMENTS = 200
DOCUMENTS = [
    f"Document {i} says {i * i}; it ends here, and so it is.\n" for i in range(N_DOCUMENTS)
]


def write_documents(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "text.jsonl", DOCUMENTS)


def config(*text: Path, vocab_size: int = 300, **changes: object) -> DataConfig:
    return from_mapping(
        DataConfig, {"text": [str(t) for t in text], "vocab_size": vocab_size, **changes}
    )


def documents_of(data: PreparedData, split: str) -> list[str]:
    """The documents of a token file, by taking it apart at the end-of-text ids."""
    tokens = getattr(data, split).tokens
    starts = np.flatnonzero(tokens == data.tokenizer.eot_id)
    assert starts[0] == 0, "a token file begins with end of text"
    return [data.tokenizer.decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- what is in a folder --------------------------------------------------------------------


def test_every_document_is_in_one_split_in_order(text: Path, tmp_path: Path):
    data = prepare(config(text, validation_fraction=0.2), tmp_path / "data")
    train, validation = documents_of(data, "train"), documents_of(data, "validation")
    assert sorted(train + validation) == sorted(DOCUMENTS)
    assert train == [d for d in DOCUMENTS if d in set(train)]
    assert validation == [d for d in DOCUMENTS if d in set(validation)]
    assert 0.1 < len(validation) / N_DOCUMENTS < 0.3
    assert data.validation_text.read_text() == "\n".join(validation)


def test_index_counts_what_is_there(text: Path, tmp_path: Path):
    data = prepare(config(text), tmp_path / "data")
    assert sorted(os.listdir(tmp_path / "data")) == [
        "index.json", "tokenizer.json", "train.bin", "validation.bin", "validation.txt",
    ]  # fmt: skip
    index = json.loads((tmp_path / "data" / "index.json").read_text())
    assert index == to_mapping(data.index)
    assert (index["format"], index["dtype"], index["vocab_size"]) == (1, "uint16", 300)
    assert index["tokenizer"] == data.tokenizer.fingerprint
    for split in ("train", "validation"):
        file, documents = getattr(data, split), documents_of(data, split)
        raw = np.fromfile(tmp_path / "data" / f"{split}.bin", "<u2")
        assert np.array_equal(file.tokens, raw)
        assert isinstance(file.tokens, np.memmap)
        assert file.n_tokens == index[split]["n_tokens"] == len(raw)
        assert file.n_documents == index[split]["n_documents"] == len(documents)
        assert file.n_bytes == index[split]["n_bytes"] == len("".join(documents).encode())
        assert index[split]["max_id"] == raw.max() < 300


def test_tokens_of_many_batches_are_those_of_one(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    prepare(config(text), tmp_path / "one")
    monkeypatch.setattr("blackmamba.data.tokens._BATCH_CHARACTERS", 100)
    prepare(config(text), tmp_path / "many")
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_ids_are_as_small_as_the_vocabulary_allows(vocab_size: int, dtype: str):
    assert dtype_for(vocab_size) == dtype


def test_a_large_vocabulary_has_four_byte_ids(text: Path, tmp_path: Path):
    backend = Tokenizer.train(DOCUMENTS, 300).backend
    backend.add_tokens([f"extra{i}" for i in range(70_000)])
    Tokenizer(backend).save(tmp_path / "large.json")
    documents = [*DOCUMENTS, *(f"extra69999 {i}" for i in range(50))]
    write_documents(text, documents)
    data = prepare(config(text, tokenizer=str(tmp_path / "large.json")), tmp_path / "data")
    assert data.index.dtype == "uint32"
    assert data.train.tokens.max() == 70_299
    assert sorted(documents_of(data, "train") + documents_of(data, "validation")) == sorted(
        documents
    )


def test_end_of_text_in_the_text_starts_no_document(tmp_path: Path):
    documents = [f"{i} before<|endoftext|>after" for i in range(30)]
    text = write_documents(tmp_path / "text.jsonl", documents)
    data = prepare(config(text), tmp_path / "data")
    assert sorted(documents_of(data, "train") + documents_of(data, "validation")) == sorted(
        documents
    )


# ---- the held-out split ---------------------------------------------------------------------


def held_out(tmp_path: Path, documents: list[str], **changes: object) -> set[str]:
    text = write_documents(tmp_path / "some.jsonl", documents)
    return set(documents_of(prepare(config(text, **changes), tmp_path / "some"), "validation"))


def test_a_document_keeps_its_side(tmp_path: Path):
    before = held_out(tmp_path, DOCUMENTS)
    assert held_out(tmp_path, DOCUMENTS[::-1]) == before
    more = [f"another {i}" for i in range(300)]
    assert held_out(tmp_path, more + DOCUMENTS) & set(DOCUMENTS) == before
    assert held_out(tmp_path, DOCUMENTS[:150]) == before & set(DOCUMENTS[:150])
    assert held_out(tmp_path, DOCUMENTS, validation_fraction=0.3) > before
    assert held_out(tmp_path, DOCUMENTS, split_seed=1) != before


def test_copies_are_on_one_side(tmp_path: Path):
    text = write_documents(tmp_path / "text.jsonl", DOCUMENTS * 3)
    data = prepare(config(text, validation_fraction=0.3), tmp_path / "data")
    train, validation = (set(documents_of(data, s)) for s in ("train", "validation"))
    assert not train & validation
    assert train | validation == set(DOCUMENTS)


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.5, 0.999])
@pytest.mark.parametrize("n_documents", [2, 3, 25])
def test_no_side_is_empty(tmp_path: Path, n_documents: int, fraction: float):
    text = write_documents(tmp_path / "text.jsonl", DOCUMENTS[:n_documents])
    data = prepare(config(text, validation_fraction=fraction), tmp_path / "data")
    assert data.train.n_documents >= 1
    assert data.validation.n_documents >= 1
    assert data.train.n_documents + data.validation.n_documents == n_documents


@pytest.mark.parametrize("n_books", [1, 3])
def test_few_long_files_are_split_by_sections(tmp_path: Path, n_books: int):
    books = [
        "".join(f"Paragraph {i} of book {n}.\nIt has two lines.\n\n" for i in range(4_000))
        for n in range(n_books)
    ]
    paths = [tmp_path / f"book{n}.txt" for n in range(n_books)]
    for path, book in zip(paths, books, strict=True):
        path.write_text(book)
    data = prepare(config(*paths), tmp_path / "data")
    train, validation = documents_of(data, "train"), documents_of(data, "validation")
    n_bytes = sum(map(len, books))
    assert data.train.n_bytes + data.validation.n_bytes == n_bytes
    assert 0.01 < data.validation.n_bytes / n_bytes < 0.15
    for section in train + validation:
        assert section.startswith("Paragraph")
        assert any(
            section in book and (4096 < len(section) <= 8192 or book.endswith(section))
            for book in books
        )


def test_copies_of_one_long_file_are_split_by_sections(tmp_path: Path):
    text = "".join(f"Line {i}.\n" for i in range(3000))
    path = write_documents(tmp_path / "text.jsonl", [text] * 25)
    data = prepare(config(path), tmp_path / "data")
    train, validation = (set(documents_of(data, s)) for s in ("train", "validation"))
    assert not train & validation


@pytest.mark.parametrize("documents", [["short"], ["the same"] * 50])
def test_too_little_text_to_hold_some_out(tmp_path: Path, documents: list[str]):
    text = write_documents(tmp_path / "text.jsonl", documents)
    with pytest.raises(DataError, match="too little to hold some out") as caught:
        prepare(config(text), tmp_path / "data")
    assert str(text) in str(caught.value)


def test_the_tokenizer_is_trained_on_the_training_text_only(tmp_path: Path):
    held = held_out(tmp_path, DOCUMENTS, validation_fraction=0.2)
    text = write_documents(tmp_path / "text.jsonl", DOCUMENTS)
    data = prepare(config(text, validation_fraction=0.2), tmp_path / "data")
    expected = Tokenizer.train((d for d in DOCUMENTS if d not in held), 300)
    assert data.tokenizer.fingerprint == expected.fingerprint
    assert data.tokenizer.fingerprint != Tokenizer.train(DOCUMENTS, 300).fingerprint


# ---- made once ------------------------------------------------------------------------------


def test_same_settings_and_text_are_not_prepared_again(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = prepare(config(text), tmp_path / "data")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "data").iterdir()}

    def fail(*_: object) -> None:
        raise AssertionError("prepared again")

    monkeypatch.setattr(Tokenizer, "train", fail)
    again = prepare(config(text), tmp_path / "data")
    assert again.index == first.index
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "data").iterdir()} == before


def test_a_path_may_be_spelled_in_several_ways(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Tokenizer.train(DOCUMENTS, 300).save(tmp_path / "tokenizer.json")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.jsonl").symlink_to(text)
    (tmp_path / "rows").symlink_to(text)  # the same file, but whole
    spelled = (text, Path("text.jsonl"), Path(f"../{tmp_path.name}/text.jsonl"), Path("link.jsonl"))
    for name, tokenizer in (("own", "train"), ("given", str(tmp_path / "tokenizer.json"))):
        indices = [
            prepare(config(path, tokenizer=spelling), tmp_path / f"{name}-{path.name}").index
            for path in spelled
            for spelling in {tokenizer, tokenizer.removeprefix(f"{tmp_path}/")}
        ]
        assert all(index == indices[0] for index in indices)
        other = prepare(config(Path("rows"), tokenizer=tokenizer), tmp_path / f"{name}-rows")
        assert other.fingerprint != indices[0].fingerprint


def test_text_of_the_first_fingerprint_is_not_prepared_again(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = config(text)
    prepare(settings, tmp_path / "data")
    mapping, status = to_mapping(settings), text.stat()
    for name in ("field", "sources", "packing", "token_log"):
        del mapping[name]
    state = [str(text.resolve()), status.st_size, status.st_mtime_ns]
    first = hashlib.sha256(json.dumps([FORMAT, mapping, [state], ""]).encode()).hexdigest()
    index = json.loads((tmp_path / "data" / "index.json").read_text())
    (tmp_path / "data" / "index.json").write_text(json.dumps(index | {"fingerprint": first}))
    monkeypatch.setattr(Tokenizer, "train", None)
    assert prepare(settings, tmp_path / "data").fingerprint == first


def test_same_text_gives_the_same_files(text: Path, tmp_path: Path):
    for name in ("one", "two"):
        prepare(config(text), tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize(
    "change",
    [{"vocab_size": 310}, {"validation_fraction": 0.1}, {"split_seed": 1}],
    ids=str,
)
def test_other_settings_are_prepared_again(text: Path, tmp_path: Path, change: dict[str, object]):
    before = prepare(config(text), tmp_path / "data").index
    after = prepare(config(text, **change), tmp_path / "data").index
    assert after.fingerprint != before.fingerprint
    assert after.train != before.train


def test_changed_text_is_prepared_again(text: Path, tmp_path: Path):
    assert prepare(config(text), tmp_path / "data").index.vocab_size == 300
    write_documents(text, [*DOCUMENTS, "one more\n"])
    data = prepare(config(text), tmp_path / "data")
    assert data.train.n_documents + data.validation.n_documents == N_DOCUMENTS + 1
    os.utime(text, ns=(0, 0))  # as long as before, but written at another time
    assert prepare(config(text), tmp_path / "data").index.fingerprint != data.index.fingerprint


def test_changed_tokenizer_is_prepared_again(text: Path, tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    for vocab_size in (300, 310):
        Tokenizer.train(DOCUMENTS, vocab_size).save(path)
        data = prepare(config(text, tokenizer=str(path)), tmp_path / "data")
        assert data.index.vocab_size == vocab_size
    assert sorted(os.listdir(tmp_path)) == ["data", "text.jsonl", "tokenizer.json"]


def test_a_smaller_vocabulary_than_asked_for_is_told(
    text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    data = prepare(config(text, vocab_size=5000), tmp_path / "data")
    assert data.tokenizer.n_tokens < 5000
    assert f"only {data.tokenizer.n_tokens} of 5000 tokens" in caplog.text


# ---- damage ---------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def edit_index(folder: Path, **changes: object) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE = {
    "token file cut off": (lambda f: truncate(f / "train.bin"), "train.bin: .* damaged"),
    "token file missing": (lambda f: (f / "validation.bin").unlink(), "no readable token file"),
    "token file empty": (lambda f: (f / "validation.bin").write_bytes(b""), "damaged"),
    "index missing": (lambda f: (f / "index.json").unlink(), "no readable index"),
    "index cut off": (lambda f: truncate(f / "index.json"), "damaged index"),
    "index not UTF-8": (lambda f: (f / "index.json").write_bytes(b"\xff"), "damaged index"),
    "index no object": (lambda f: (f / "index.json").write_text("[]"), "damaged index"),
    "index of another format": (lambda f: edit_index(f, format=2), "format 2, not 1"),
    "index with a wrong type": (lambda f: edit_index(f, dtype="float"), "damaged index"),
    "index lacks a key": (lambda f: (f / "index.json").write_text('{"format": 1}'), "missing"),
    "tokenizer missing": (lambda f: (f / "tokenizer.json").unlink(), "no readable tokenizer"),
    "tokenizer cut off": (lambda f: truncate(f / "tokenizer.json"), "damaged tokenizer"),
    "another tokenizer": (
        lambda f: Tokenizer.train(DOCUMENTS, 310).save(f / "tokenizer.json"),
        "not the tokenizer that the tokens are of",
    ),
    "ids beyond the vocabulary": (
        lambda f: edit_index(
            f, train={**json.loads((f / "index.json").read_text())["train"], "max_id": 300}
        ),
        "ids up to 300, but its tokenizer has 300 tokens",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_on_opening_and_repaired_by_preparing(
    text: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
):
    damage, message = DAMAGE[name]
    folder = tmp_path / "data"
    prepare(config(text), folder)
    before = contents(folder)
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        PreparedData.open(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    prepare(config(text), folder)
    assert contents(folder) == before
    assert "preparing the text again" in caplog.text


def test_opening_needs_no_text(text: Path, tmp_path: Path):
    before = prepare(config(text), tmp_path / "data").index
    text.unlink()
    assert PreparedData.open(str(tmp_path / "data")).index == before


def test_opening_what_is_not_there(tmp_path: Path):
    with pytest.raises(DataError, match="no readable index"):
        PreparedData.open(tmp_path / "none")


def test_other_peoples_files_are_never_replaced(text: Path, tmp_path: Path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"has other files, such as thesis\.tex"):
        prepare(config(text), folder)
    with pytest.raises(DataError, match="not a folder"):
        prepare(config(text), folder / "thesis.tex")
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_is_taken(text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "data").mkdir()
    assert prepare(config(text), tmp_path / "data").train.n_documents > 0
    assert not caplog.records


# ---- interrupted ----------------------------------------------------------------------------


def fail_after(monkeypatch: pytest.MonkeyPatch, n: int, error: BaseException) -> None:
    """Let the writing of documents fail after n of them."""
    add, count = TokenWriter.add, iter(range(10**9))

    def failing(self: TokenWriter, document: str) -> None:
        if next(count) == n:
            raise error
        add(self, document)

    monkeypatch.setattr(TokenWriter, "add", failing)


@pytest.mark.parametrize("older", [False, True], ids=["first", "again"])
def test_full_disk(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool):
    folder = tmp_path / "data"
    if older:
        prepare(config(text), folder)
    before = contents(folder) if older else None
    fail_after(monkeypatch, 100, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(DataError, match=r"data: cannot be written \(No space left on device\)"):
        prepare(config(text, split_seed=1), folder)
    assert sorted(os.listdir(tmp_path)) == (["data"] if older else []) + ["text.jsonl"]
    if before is not None:
        assert contents(folder) == before


def test_interrupt_leaves_nothing(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fail_after(monkeypatch, 100, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        prepare(config(text), tmp_path / "data")
    assert os.listdir(tmp_path) == ["text.jsonl"]


def test_killed_half_way_leaves_nothing_under_the_final_name(text: Path, tmp_path: Path):
    code = (
        "import os, signal, sys\n"
        "from blackmamba.data import DataConfig, prepare\n"
        "from blackmamba.data.tokens import Index\n"
        "Index.write = lambda self, path: os.kill(os.getpid(), signal.SIGKILL)\n"
        "prepare(DataConfig(text=(sys.argv[1],), vocab_size=300), sys.argv[2])\n"
    )
    folder = tmp_path / "data"
    done = subprocess.run([sys.executable, "-c", code, str(text), str(folder)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not folder.exists()
    assert prepare(config(text), folder).train.n_documents > 0


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on file size is Linux's here")
def test_a_real_limit_on_file_size(text: Path, tmp_path: Path):
    folder = tmp_path / "data"
    said = alone(error_on_full_disk, 4000, partial(prepare, config(text), folder))
    assert said == f"{folder}: cannot be written (File too large)"
    assert os.listdir(tmp_path) == ["text.jsonl"]


def test_text_that_vanishes(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from blackmamba.data import prepare as module_function

    original = module_function.__globals__["find_sources"]

    def find_and_remove(*arguments: object) -> object:
        found = original(*arguments)
        text.unlink()
        return found

    monkeypatch.setitem(module_function.__globals__, "find_sources", find_and_remove)
    with pytest.raises(DataError, match=r"text.jsonl: cannot be read"):
        prepare(config(text), tmp_path / "data")
    assert os.listdir(tmp_path) == []


# ---- settings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": ()}, "text=()"),
        ({"text": ("a", "")}, "text=('a', '')"),
        ({"text": "a.txt"}, "text='a.txt': must be a list"),
        ({"tokenizer": ""}, "tokenizer"),
        ({"vocab_size": 256}, "vocab_size=256: must be at least 257"),
        ({"validation_fraction": 0.0}, "validation_fraction=0.0"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0"),
        ({"validation_fraction": float("nan")}, "validation_fraction=nan"),
        ({"split_seed": -1}, "split_seed=-1"),
    ],
    ids=str,
)
def test_wrong_settings(change: dict[str, object], message: str):
    with pytest.raises(ConfigError) as caught:
        DataConfig(**{"text": ("a.txt",), **change})
    assert message in str(caught.value)


def test_settings_survive_plain_data():
    settings = DataConfig(text=("a", "corpus:bible"), tokenizer="some/model", split_seed=3)
    assert from_mapping(DataConfig, json.loads(json.dumps(to_mapping(settings)))) == settings
    assert DataConfig(text=("a",), tokenizer="x.json", vocab_size=1).vocab_size == 1
