"""Folders of shards: the same whoever makes them, whatever stops them, and damage is told."""

import dataclasses
import errno
import hashlib
import json
import multiprocessing
import operator
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from lone import error_on_full_disk
from many_ranks import alone

from blackmamba.config import to_mapping
from blackmamba.data import (
    ShardConfig,
    ShardedData,
    Tokenizer,
    join_parts,
    open_prepared,
    prepare_shards,
)
from blackmamba.data import build as build_module
from blackmamba.data import shards as shards_module
from blackmamba.data.shards import ShardIndex, ShardWriter, is_sharded, verify
from blackmamba.data.workers import in_order
from blackmamba.errors import ConfigError, DataError

KILLED = """
import os, signal
from blackmamba.cli.main import entry_point
from blackmamba.data import build
from blackmamba.data.shards import ShardWriter

build._BLOCK_CHARACTERS = 8_000
add = ShardWriter.add

def dies(self, ids, counts):
    add(self, ids, counts)
    if self.path.name == "train-000002.bin":
        os.kill(os.getpid(), signal.SIGKILL)

ShardWriter.add = dies
entry_point()
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 documents of very different lengths in 6 files."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(6):
        rows = (
            {"text": f"{number} {i}: " + f"word{i % 7} and {i * number} more; ä. " * (i % 40 + 1)}
            for i in range(100)
        )
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def config(text: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardConfig:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    Tokenizer.train((text / "0.jsonl").read_text().splitlines(), 300).save(path)
    return ShardConfig(
        text=(str(text),), tokenizer=str(path), validation_fraction=0.1, shard_mb=0.06
    )


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build_module, "_BLOCK_CHARACTERS", 8_000)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*") if path.is_file() and path.name != ".lock"
    }  # fmt: skip


def documents_of(data: ShardedData, split: str) -> list[str]:
    tokens = getattr(data, split).tokens[:]
    starts = np.flatnonzero(tokens == data.tokenizer.eot_id)
    assert starts[0] == 0
    return [data.tokenizer.decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]


def texts_of(folder: Path) -> list[str]:
    lines = (line for path in sorted(folder.iterdir()) for line in path.read_text().splitlines())
    return [json.loads(line)["text"] for line in lines]


def test_what_is_in_a_folder(config: ShardConfig, text: Path, tmp_path: Path):
    index = prepare_shards(config, tmp_path / "out")
    data = open_prepared(tmp_path / "out")
    assert isinstance(data, ShardedData)
    assert data.index == index == ShardIndex.read(tmp_path / "out" / "index.json")
    train, validation = documents_of(data, "train"), documents_of(data, "validation")
    expected = texts_of(text)
    assert sorted(train + validation) == sorted(expected)
    assert train == [d for d in expected if d in set(train)]
    assert 0.05 < len(validation) / len(expected) < 0.15
    assert len(index.train) > 3
    for split, documents in ((data.train, train), (data.validation, validation)):
        assert split.n_documents == len(documents)
        assert split.n_bytes == len("".join(documents).encode())
        assert split.n_tokens == len(split.tokens)
    for shard in index.train:
        assert (tmp_path / "out" / shard.file).stat().st_size < 60_000 + 25_000
    assert verify(tmp_path / "out") == []
    before = contents(tmp_path / "out")
    assert prepare_shards(config, tmp_path / "out") == index
    assert contents(tmp_path / "out") == before


def test_ids_can_be_read_anywhere(config: ShardConfig, tmp_path: Path):
    prepare_shards(config, tmp_path)
    tokens = ShardedData(tmp_path).train.tokens
    index = ShardIndex.read(tmp_path / "index.json")
    whole = np.concatenate([
        np.fromfile(tmp_path / s.file, "<u2", s.counts.n_tokens) for s in index.train
    ])  # fmt: skip
    assert np.array_equal(tokens[:], whole)
    border = index.train[0].counts.n_tokens
    places = np.random.default_rng(0).integers(0, len(whole), (200, 2))
    for start, stop in [*places, (0, 0), (border - 1, border + 1), (border, border + 5),
                        (5, border + index.train[1].counts.n_tokens + 5)]:  # fmt: skip
        assert np.array_equal(ShardedData(tmp_path).train.tokens[start:stop], whole[start:stop])
    assert len(tokens[len(whole) : len(whole) + 9]) == 0


def test_any_number_of_workers_gives_the_same(config: ShardConfig, whole: Path, tmp_path: Path):
    prepare_shards(config, tmp_path, n_workers=2)
    assert contents(tmp_path) == contents(whole)


# ---- stopped --------------------------------------------------------------------------------


def stop_at(monkeypatch: pytest.MonkeyPatch, n: int, error: BaseException) -> None:
    """Let the n-th write of ids, end of a shard or write of an index fail."""
    count = iter(range(10**9))
    for owner, name in ((ShardWriter, "add"), (ShardWriter, "finish"), (ShardIndex, "write")):
        original = getattr(owner, name)

        def failing(*args: object, original: object = original) -> object:
            if next(count) == n:
                raise error
            return original(*args)  # pyright: ignore

        monkeypatch.setattr(owner, name, failing)


@pytest.fixture(scope="module")
def whole(config: ShardConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run makes."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, "_BLOCK_CHARACTERS", 8_000)
        assert len(prepare_shards(config, folder).train) > 3
    return folder


@pytest.mark.parametrize("n", [0, 1, 2, 12, 13, 14, 15, 16, 17, 30])
@pytest.mark.parametrize("how", ["interrupt", "full disk", "kill"])
def test_stopped_anywhere_it_goes_on(
    config: ShardConfig,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    n: int,
    how: str,
):
    with monkeypatch.context() as patch:
        if how == "full disk":
            stop_at(patch, n, OSError(errno.ENOSPC, "No space left on device"))
            with pytest.raises(DataError, match=r"cannot be written \(No space left .* kept"):
                prepare_shards(config, tmp_path / "out")
            assert not list((tmp_path / "out").glob(".*.tmp"))
        else:
            stop_at(patch, n, KeyboardInterrupt())
            if how == "kill":  # nothing is tidied up
                patch.setattr(ShardWriter, "abandon", lambda self: self._file.close())
            with pytest.raises(KeyboardInterrupt):
                prepare_shards(config, tmp_path / "out")
    if (tmp_path / "out" / "index.json").exists():
        with pytest.raises(DataError, match="not finished; run the same"):
            ShardedData(tmp_path / "out")
    prepare_shards(config, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


def test_sigkill(config: ShardConfig, whole: Path, text: Path, tmp_path: Path):
    """Of the process of a command, while it writes its third shard."""
    out = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, "data", "prepare", "--text", str(text), "--out"]
    options = {"tokenizer": config.tokenizer, "shard-mb": 0.06, "workers": 2,
               "validation-fraction": 0.1}  # fmt: skip
    command += [str(out), *(str(x) for key, value in options.items() for x in (f"--{key}", value))]
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGKILL
    assert sorted(p.name for p in out.glob("train-*")) == ["train-000000.bin", "train-000001.bin"]
    assert not ShardIndex.read(out / "index.json").finished
    prepare_shards(config, out)
    assert contents(out) == contents(whole)


def test_a_worker_that_dies_is_told():
    with (
        in_order(os._exit, (3,), 2) as map_,  # pyright: ignore
        pytest.raises(DataError, match=r"a worker process ended \(status 3;.*go on"),
    ):
        list(map_(range(9)))


def test_workers_are_forked_from_one_server_as_they_are_needed():
    before = len(multiprocessing.active_children())
    with in_order(operator.methodcaller, ("__call__",), 5) as map_:  # pyright: ignore
        workers = list(map_([os.getpid, os.getpid]))
        assert len({os.getpid(), *workers}) == 3
        assert len(multiprocessing.active_children()) == before + 2
        (server,) = set(map_([os.getppid] * 7))
        assert len(multiprocessing.active_children()) == before + 5
    assert server not in (os.getpid(), *workers)
    assert len(multiprocessing.active_children()) == before


def test_two_at_once(config: ShardConfig, tmp_path: Path):
    with build_module._locked(tmp_path), pytest.raises(DataError, match="another process"):
        prepare_shards(config, tmp_path)
    assert prepare_shards(config, tmp_path).finished


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on file size is Linux's here")
def test_a_real_limit_on_file_size(config: ShardConfig, tmp_path: Path):
    said = alone(error_on_full_disk, 50_000, partial(prepare_shards, config, tmp_path / "out"))
    assert "cannot be written (File too large); whole shards are kept" in said
    assert "\n" not in said


# ---- damaged --------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


def test_a_flipped_byte_is_found_when_it_is_read(
    config: ShardConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shards_module, "BLOCK_BYTES", 4096)
    index = prepare_shards(config, tmp_path)
    shard = tmp_path / index.train[1].file
    before = index.train[0].counts.n_tokens
    for at in (0, 4095, 4096, index.train[1].counts.n_tokens * 2 - 1):
        flip(shard, at)
        data = ShardedData(tmp_path)  # opening reads no ids
        assert len(data.train.tokens[:before]) == before
        place = before + at // 2
        with pytest.raises(DataError, match=rf"{shard.name}: wrong checksum of the block at byte"):
            data.train.tokens[place : place + 1]
        (problem,) = verify(tmp_path)
        assert f"{shard.name}: its SHA-256 is not the index's" in problem
        flip(shard, at)
    flip(shard, shard.stat().st_size - 1)  # a checksum itself
    (problem,) = verify(tmp_path)
    flip(shard, shard.stat().st_size - 1)
    assert verify(tmp_path) == []


def test_missing_short_and_mismatched(config: ShardConfig, tmp_path: Path):
    index = prepare_shards(config, tmp_path)
    shard = tmp_path / index.validation[0].file
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=rf"{shard.name}: {len(whole) - 1} bytes instead of"):
        ShardedData(tmp_path)
    shard.unlink()
    with pytest.raises(DataError, match=f"{shard.name}: missing shard"):
        ShardedData(tmp_path)
    assert len(verify(tmp_path)) == 1
    shard.write_bytes(whole)
    tokenizer = (tmp_path / "tokenizer.json").read_text()
    Tokenizer.train(["other words"], 270).save(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="not the tokenizer that the tokens are of"):
        ShardedData(tmp_path)
    with pytest.raises(DataError, match="not the tokenizer that the tokens are of"):
        verify(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(DataError, match="damaged index"):
        verify(tmp_path)
    assert not is_sharded(tmp_path)


def test_other_settings_text_or_files_are_never_mixed(
    config: ShardConfig, text: Path, tmp_path: Path
):
    prepare_shards(config, tmp_path / "out")
    for change in ({"split_seed": 1}, {"shard_mb": 1.0}, {"text": (f"{text}/0.jsonl",)}):
        with pytest.raises(DataError, match="begun with other settings or text"):
            prepare_shards(dataclasses.replace(config, **change), tmp_path / "out")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"has other files, such as thesis\.tex"):
        prepare_shards(config, tmp_path / "thesis")


def test_the_same_text_by_another_path_goes_on(
    config: ShardConfig, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        stop_at(patch, 30, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prepare_shards(config, tmp_path / "out")
    begun = ShardIndex.read(tmp_path / "out" / "index.json")
    assert begun.train
    monkeypatch.chdir(text.parent)
    tokenizer = os.path.relpath(config.tokenizer)
    nearer = dataclasses.replace(config, text=(f"./{text.name}",), tokenizer=tokenizer)
    done = prepare_shards(nearer, tmp_path / "out")
    assert done.train[: len(begun.train)] == begun.train
    assert prepare_shards(config, tmp_path / "out") == done


def test_a_folder_of_the_first_fingerprint_is_known(
    config: ShardConfig, text: Path, tmp_path: Path
):
    index = prepare_shards(config, tmp_path)
    states = [
        [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(text.iterdir())
    ]
    content = [index.format, to_mapping(config), states, index.tokenizer]
    first = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    old = dataclasses.replace(index, fingerprint=first)
    old.write(tmp_path / "index.json")
    assert prepare_shards(config, tmp_path) == old


# ---- many machines --------------------------------------------------------------------------


def test_parts_make_a_whole(config: ShardConfig, text: Path, tmp_path: Path):
    for part in (2, 0, 1):
        if part != 2:
            with pytest.raises(DataError, match=r"parts .* of 3|no parts"):
                join_parts(tmp_path if part == 0 else tmp_path / "nothing")
        prepare_shards(dataclasses.replace(config, part=part, n_parts=3), tmp_path)
    joined = join_parts(tmp_path)
    data = open_prepared(tmp_path)
    assert isinstance(data, ShardedData)
    assert sorted(documents_of(data, "train") + documents_of(data, "validation")) == sorted(
        texts_of(text)
    )
    prepare_shards(config, tmp_path / "whole")
    whole = ShardedData(tmp_path / "whole")
    assert sorted(documents_of(data, "validation")) == sorted(documents_of(whole, "validation"))
    assert verify(tmp_path) == []
    assert join_parts(tmp_path) == joined
    with pytest.raises(DataError, match="6 files are too few"):
        prepare_shards(dataclasses.replace(config, part=8, n_parts=9), tmp_path / "few")


def test_parts_of_different_makes_are_not_joined(config: ShardConfig, tmp_path: Path):
    for part in (0, 1):
        changed = dataclasses.replace(config, part=part, n_parts=2, split_seed=part)
        prepare_shards(changed, tmp_path)
    with pytest.raises(DataError, match="part-00001-of-00002: made with another split_seed"):
        join_parts(tmp_path)


# ---- settings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": ()}, "text=()"),
        ({"field": ""}, "field"),
        ({"tokenizer": "train", "vocab_size": 256}, "vocab_size=256"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0"),
        ({"shard_mb": 0.0}, "shard_mb=0.0"),
        ({"split_seed": -1}, "split_seed=-1"),
        ({"part": 4, "n_parts": 4}, "part 4 of 4"),
        ({"tokenizer": "train", "n_parts": 2}, "give all the same one"),
    ],
    ids=str,
)
def test_wrong_settings(config: ShardConfig, change: dict[str, object], message: str):
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(config, **change)
    assert message in str(caught.value)
    with pytest.raises(ConfigError, match="n_workers=0"):
        prepare_shards(config, "nowhere", n_workers=0)


def test_a_tokenizer_is_trained_on_a_sample_without_what_is_held_out(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    learnt: list[str] = []
    train = Tokenizer.train

    def watched(documents: Iterable[str], vocab_size: int) -> Tokenizer:
        learnt.extend(documents)
        return train(learnt, vocab_size)

    monkeypatch.setattr(Tokenizer, "train", watched)
    settings = ShardConfig(text=(str(text),), vocab_size=300, validation_fraction=0.2)
    prepare_shards(settings, tmp_path / "all")
    data = ShardedData(tmp_path / "all")
    assert data.tokenizer.n_tokens == 300
    assert sorted(learnt) == sorted(documents_of(data, "train"))
    everything = len("".join(learnt))
    learnt.clear()
    prepare_shards(dataclasses.replace(settings, sample_mb=0.02), tmp_path / "some")
    assert 0 < len("".join(learnt)) < everything / 2


def test_nothing_held_out_is_a_warning(
    text: Path, config: ShardConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    few = dataclasses.replace(config, text=(f"{text}/0.jsonl",), validation_fraction=1e-9)
    prepare_shards(few, tmp_path / "few")
    assert "no document was held out" in caplog.text
    assert len(ShardedData(tmp_path / "few").validation.tokens) == 0
