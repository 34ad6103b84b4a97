"""Mixtures: the shares that were asked for, every token once an epoch, the same for any ranks."""

import collections
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from blackmamba.config import from_mapping, to_mapping
from blackmamba.data import (
    Batch,
    DataConfig,
    MixtureData,
    MixtureSampler,
    Packing,
    ShardConfig,
    SourceConfig,
    Tokenizer,
    TokenLog,
    Window,
    prepare,
    prepare_shards,
    read_token_log,
)
from blackmamba.data import schedule as schedule_module
from blackmamba.data.schedule import Schedule
from blackmamba.data.shuffle import Shuffle
from blackmamba.errors import ConfigError, DataError, InputError

# ---- the order of one source ----------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 100, 1023, 4097])
def test_a_shuffle_is_a_permutation(n: int):
    shuffle = Shuffle(n, 3, 1)
    order = [shuffle[i] for i in range(n)]
    assert sorted(order) == list(range(n))
    if n > 16:
        assert order != sorted(order)
        assert [Shuffle(n, 3, 2)[i] for i in range(n)] != order
        assert [Shuffle(n, 3, 1)[i] for i in range(n)] == order


def test_a_shuffle_leaves_no_pattern():
    n = 10_000
    shuffle = Shuffle(n, 0)
    order = np.array([shuffle[i] for i in range(n)])
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    # Of the first half, a half is below the middle: 2,500 more or less 25 (its deviation).
    assert abs((order[: n // 2] < n // 2).sum() - n // 4) < 125
    assert len(np.unique(np.diff(order) % n)) > 0.6 * n  # 63 % where nothing is alike
    late = Shuffle(10**15, 1)
    assert len({late[i] for i in range(10**15 - 1000, 10**15)}) == 1000


# ---- which source ---------------------------------------------------------------------------


@pytest.fixture
def short_rounds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(schedule_module, "ROUND", 20)


def test_shares_hold_over_any_stretch():
    weights = [5.0, 3.0, 1.0, 1.0]
    schedule = Schedule(weights, [None] * 4, seed=0)
    sources = [schedule.source_of(row) for row in range(40_000)]
    for source, weight in enumerate(weights):
        numbers = [number for s, number in sources if s == source]
        assert numbers == list(range(len(numbers))), "a row of the source is skipped or repeated"
        counts = np.cumsum([s == source for s, _ in sources])
        exact = weight / 10 * np.arange(1, 40_001)
        assert np.abs(counts - exact).max() <= 2.5
    for n in (0, 1, 7, 32_768, 32_769, 40_000):
        expected = collections.Counter(s for s, _ in sources[:n])
        assert schedule.rows_of(n) == [expected[i] for i in range(4)]
    other = Schedule(weights, [None] * 4, seed=1)
    assert [other.source_of(row) for row in range(1000)] != sources[:1000]
    assert [schedule.source_of(row) for row in (39_999, 0, 32_768)] == [
        sources[row] for row in (39_999, 0, 32_768)
    ]


@pytest.mark.parametrize("limits", [[7, 90, None], [3, 3, 3], [1, 200, 55], [40, 20, None]])
def test_limits_are_reached_and_never_passed(short_rounds: None, limits: list[int | None]):
    weights = [2.0, 1.0, 1.0]
    schedule = Schedule(weights, limits, seed=0)
    n_rows = schedule.n_rows
    assert n_rows == (None if None in limits else sum(limits))  # pyright: ignore
    sources = [schedule.source_of(row) for row in range(n_rows or 500)]
    for source, limit in enumerate(limits):
        numbers = [number for s, number in sources if s == source]
        assert numbers == list(range(len(numbers)))
        assert limit is None or len(numbers) == limit
    for n in range(0, len(sources) + 1, 7):
        expected = collections.Counter(s for s, _ in sources[:n])
        assert schedule.rows_of(n) == [expected[i] for i in range(3)]
    if n_rows is not None:
        with pytest.raises(DataError, match=f"max_epochs after {n_rows:,} rows"):
            schedule.source_of(n_rows)


def test_a_weight_too_small_to_be_drawn():
    with pytest.raises(ConfigError, match=r"weight 1e-09: under 1 in 32,768"):
        Schedule([1.0, 1e-9], [None, None], seed=0)


# ---- rows -----------------------------------------------------------------------------------


def configs(*weights: float, **limits: float) -> list[SourceConfig]:
    return [
        SourceConfig(name=name, path="x", weight=weight, max_epochs=limits.get(name, 0.0))
        for name, weight in zip("abc", weights, strict=False)
    ]


def numbered(*lengths: int) -> list[tuple[str, np.ndarray]]:
    """Sources whose tokens are their places, 10,000 apart."""
    return [
        (name, np.arange(n, dtype="<u4") + 10_000 * i)
        for i, (name, n) in enumerate(zip("abc", lengths, strict=False))
    ]


def test_every_token_once_an_epoch():
    sources, seq_len, batch_size = numbered(101, 333), 8, 3
    sampler = MixtureSampler(sources, configs(1, 3), seq_len, batch_size, seed=5)
    seen: dict[str, list[int]] = {"a": [], "b": []}
    rows: dict[str, list[int]] = {"a": [], "b": []}
    for step in range(100):
        batch = sampler.batch(step)
        assert torch.equal(batch.labels[:, :-1], batch.input_ids[:, 1:])
        for row, window in zip(batch.input_ids.tolist(), sampler.windows(step), strict=True):
            offset = 0 if window.source == "a" else 10_000
            n = dict(zip("ab", (101, 333), strict=True))[window.source]
            assert row == [offset + (window.start + i) % n for i in range(seq_len)]
            assert window.epoch == len(rows[window.source]) // (n // seq_len)
            rows[window.source].append(window.start)
            seen[window.source].extend(row)
    assert (len(rows["a"]), len(rows["b"])) == (75, 225)
    for name, n in (("a", 101), ("b", 333)):
        size = n // seq_len * seq_len
        for epoch in range(len(seen[name]) // size):
            inside = seen[name][epoch * size : (epoch + 1) * size]
            assert len(set(inside)) == size, "a token came twice in an epoch"
    usage = sampler.usage(100)
    assert usage["a"].tokens == 75 * 8
    assert usage["a"].weight == 0.25
    assert usage["b"].epochs == 225 / (333 // 8)
    assert sampler.usage(0)["a"].tokens == 0


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_and_batch_sizes_change_nothing(world_size: int):
    sources = numbered(500, 900, 70)
    packing = Packing(kind="masked", eot_id=10_003)
    sampler = MixtureSampler(sources, configs(1, 1, 1), 8, 8, 0, packing)
    ones = MixtureSampler(sources, configs(1, 1, 1), 8, 1, 0, packing)
    for step in (0, 3, 30):
        whole = sampler.batch(step)
        parts = [sampler.batch(step, rank, world_size) for rank in range(world_size)]
        rows = [ones.batch(step * 8 + row) for row in range(8)]
        for many in (parts, rows):
            joined = Batch(*(torch.cat(tensors) for tensors in zip(*many, strict=True)))
            assert all(torch.equal(a, b) for a, b in zip(whole, joined, strict=True))  # pyright: ignore
        windows = [w for r in range(world_size) for w in sampler.windows(step, r, world_size)]
        assert windows == sampler.windows(step)


def test_max_epochs():
    sampler = MixtureSampler(numbered(80, 800), configs(1, 1, a=2.0), 8, 4, seed=0)
    windows = [w for step in range(50) for w in sampler.windows(step)]
    assert sum(w.source == "a" for w in windows) == 20
    assert max(w.epoch for w in windows if w.source == "a") == 1
    with pytest.raises(ConfigError, match="source a: max_epochs allows not a single row"):
        MixtureSampler(numbered(80, 800), configs(1, 1, a=0.01), 8, 4, seed=0)


def test_wrong_arguments():
    with pytest.raises(DataError, match="source b: 8 training tokens, but seq_len=8 needs 9"):
        MixtureSampler(numbered(80, 8), configs(1, 1), 8, 4, seed=0)
    with pytest.raises(ConfigError, match="batch_size=0"):
        MixtureSampler(numbered(80), configs(1), 8, 0, seed=0)
    with pytest.raises(ConfigError, match="seed=-1"):
        MixtureSampler(numbered(80), configs(1), 8, 4, seed=-1)
    with pytest.raises(InputError, match="step=-1"):
        MixtureSampler(numbered(80), configs(1), 8, 4, seed=0).batch(-1)


# ---- opened ---------------------------------------------------------------------------------


def write(path: Path, word: str, n: int = 60) -> str:
    path.mkdir()
    for i in range(n):
        (path / f"{i:02}.txt").write_text(f"{word} {i} and {word} again. " * 20)
    return str(path)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """A text, and two prepared folders with one tokenizer: of shards, and of a run."""
    texts = {name: write(tmp_path / name, name) for name in ("cats", "dogs", "birds")}
    tokenizer = str(tmp_path / "tokenizer.json")
    Tokenizer.train(["cats dogs birds and again."] * 3, 280).save(tokenizer)
    prepare_shards(
        ShardConfig(text=(texts["cats"],), tokenizer=tokenizer, validation_fraction=0.2),
        tmp_path / "prepared-cats",
    )
    config = DataConfig(text=(texts["dogs"],), tokenizer=tokenizer, validation_fraction=0.2)
    prepare(config, tmp_path / "prepared-dogs")
    return {"cats": str(tmp_path / "prepared-cats"), "dogs": str(tmp_path / "prepared-dogs"),
            "birds": texts["birds"], "tokenizer": tokenizer}  # fmt: skip


def mixture(folders: dict[str, str], **changes: object) -> DataConfig:
    sources = [
        {"name": "cats", "path": folders["cats"], "weight": 2},
        {"name": "dogs", "path": folders["dogs"], "weight": 1, "max_epochs": 9},
        {"name": "birds", "text": [folders["birds"]], "weight": 1},
    ]
    return from_mapping(DataConfig, {"sources": sources, "validation_fraction": 0.2, **changes})


def test_sources_of_every_kind(folders: dict[str, str], tmp_path: Path):
    config = mixture(folders)
    assert from_mapping(DataConfig, to_mapping(config)) == config
    data = MixtureData(config, tmp_path / "run")
    sampler = data.sampler(16, 4, 0, "documents")
    for step in range(20):
        batch = sampler.batch(step)
        assert batch.seq_idx is not None
        assert (batch.seq_idx[:, 0] == 0).all()
        for ids, window in zip(batch.input_ids.tolist(), sampler.windows(step), strict=True):
            assert set("cdb") & set(data.tokenizer.decode(ids)) >= {window.source[0]}
    text = data.tokenizer.decode(data.validation.tokens[:].tolist())
    assert {"cats", "dogs", "birds"} <= set(text.split())
    assert data.validation.n_documents == text.count("<|endoftext|>")
    assert data.fingerprint == MixtureData(config, tmp_path / "run").fingerprint
    assert data.validation_text is None


def test_a_tokenizer_that_does_not_fit(folders: dict[str, str], tmp_path: Path):
    other = DataConfig(text=(folders["birds"],), vocab_size=270, validation_fraction=0.2)
    prepare(other, tmp_path / "prepared-birds")
    config = mixture(folders)
    birds = SourceConfig(name="birds", path=str(tmp_path / "prepared-birds"), weight=1.0)
    changed = dataclasses.replace(config, sources=(*config.sources[:2], birds))
    with pytest.raises(DataError, match=r"birds: its tokens are of another tokenizer \(270 tokens"):
        MixtureData(changed, tmp_path / "run")
    Tokenizer.train(["x"], 257).save(tmp_path / "small.json")
    changed = dataclasses.replace(config, tokenizer=str(tmp_path / "small.json"))
    with pytest.raises(DataError, match="cats: its tokens are of another tokenizer"):
        MixtureData(changed, tmp_path / "run")


def test_a_missing_source(folders: dict[str, str], tmp_path: Path):
    (Path(folders["cats"]) / "train-000000.bin").unlink()
    with pytest.raises(DataError, match=r"train-000000.bin: missing shard"):
        MixtureData(mixture(folders), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": [{"name": "a", "path": "x"}, {"name": "b", "path": "y", "weight": 1}]},
         "sources without a weight: a; say which share"),
        ({"sources": [{"name": "a", "path": "x", "text": ["y"]}]}, "either a path or a text"),
        ({"sources": [{"name": "a"}]}, "either a path or a text"),
        ({"sources": [{"name": "a/b", "path": "x"}]}, "source name 'a/b'"),
        ({"sources": [{"name": "a", "path": "x", "weight": -1}]}, "weight=-1"),
        ({"sources": [{"name": "a", "path": "x", "weight": "inf"}]}, "weight=inf"),
        ({"sources": [{"name": "a", "path": "x", "weight": 1}] * 2}, "'a': given more than once"),
        ({"sources": [{"name": "a", "text": ["x"], "weight": 1}]}, "needs a given tokenizer"),
        ({"sources": [{"name": "a", "path": "x", "weight": 1}], "text": ["y"]}, "both text and"),
        ({"sources": [{"name": "a", "path": "x", "wieght": 1}]}, "did you mean 'weight'"),
        ({"text": ["x"], "packing": "tight"}, "packing='tight'"),
        ({}, "must be a list of files"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_settings(change: dict[str, object], message: str):
    with pytest.raises(ConfigError) as caught:
        from_mapping(DataConfig, change)
    assert message in str(caught.value)


# ---- the token log --------------------------------------------------------------------------


def test_token_log(tmp_path: Path):
    windows = [[Window("a", 0, 8 * step), Window("b", 1, 5)] for step in range(4)]
    with TokenLog(tmp_path, rank=1) as log:
        for step in (0, 1, 2):
            log.write(step, windows[step])
    path = tmp_path / "tokens-1.jsonl"
    path.write_bytes(path.read_bytes()[:-5])  # killed in the middle of a line
    with TokenLog(tmp_path, rank=1) as log:
        for step in (1, 2, 3):
            log.write(step, windows[step])
    assert read_token_log(path) == dict(enumerate(windows))
    with TokenLog(tmp_path, rank=1) as log:
        log.write(2, windows[0])
    with pytest.raises(DataError, match="step 2 read two different batches"):
        read_token_log(path)
    with pytest.raises(DataError, match="cannot be written"):
        TokenLog(tmp_path / "none")
