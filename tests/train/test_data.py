"""Runs over mixtures and packed documents: what they read, resume and report."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from blackmamba.config import from_mapping
from blackmamba.data import DataConfig, ShardConfig, Window, prepare_shards, read_token_log
from blackmamba.errors import ConfigError
from blackmamba.train import RunConfig, load_recipe, run


@pytest.fixture
def mixed(small: Callable[..., RunConfig], text: Path, tmp_path: Path) -> RunConfig:
    """A run over two sources, packed, with a token log."""
    settings = ShardConfig(text=(str(text),), vocab_size=300, validation_fraction=0.2)
    prepare_shards(settings, tmp_path / "prepared")
    sources = [
        {"name": "shards", "path": str(tmp_path / "prepared"), "weight": 3},
        {"name": "text", "text": [str(text)], "weight": 1, "max_epochs": 1},
    ]
    data = from_mapping(
        DataConfig,
        {"sources": sources, "packing": "documents", "token_log": True, "validation_fraction": 0.1},
    )
    return dataclasses.replace(small(), data=data)


def rows_of(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_mixture_is_trained_on_resumed_and_reported(mixed: RunConfig, tmp_path: Path):
    whole = run(mixed, tmp_path / "whole")
    steps = dataclasses.replace(mixed, train=dataclasses.replace(mixed.train, steps=5))
    run(steps, tmp_path / "parts")
    assert set(read_token_log(tmp_path / "parts" / "tokens-0.jsonl")) == set(range(5))
    run(mixed, tmp_path / "parts", resume=True)
    logs = [read_token_log(tmp_path / name / "tokens-0.jsonl") for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    windows: list[Window] = [w for step in range(12) for w in logs[0][step]]
    assert len(set(windows)) == len(windows) == 48
    assert sum(w.source == "shards" for w in windows) == 36
    assert whole.sources["shards"].weight == 0.75
    assert whole.sources["text"].tokens == 12 * 16
    assert "source shards: 75.00 % of the tokens (576)" in whole.report()
    logged = [row["sources"] for row in rows_of(tmp_path / "whole") if "sources" in row]
    assert len(logged) == 3
    assert logged[-1]["shards"]["tokens"] == 576  # pyright: ignore
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["sources"]["text"]["weight"] == 0.25
    assert summary["xz_bits_per_byte"] is None


def test_packing_changes_what_is_learnt(small: Callable[..., RunConfig], tmp_path: Path):
    losses: dict[str, list[object]] = {}
    for packing in ("stream", "documents", "masked"):
        config = small(seq_len=200, steps=4)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, packing=packing))
        run(config, tmp_path / packing)
        losses[packing] = [row["loss"] for row in rows_of(tmp_path / packing)]
    assert len({tuple(map(str, values)) for values in losses.values()}) == 3
    data = dataclasses.replace(small().data, packing="masked")
    with pytest.raises(ConfigError, match="packing"):
        run(dataclasses.replace(small(), data=data), tmp_path / "stream", resume=True)


def test_conversations_are_no_mixture(small: Callable[..., RunConfig]):
    config = small(chat=True)
    for change in ({"packing": "masked"}, {"token_log": True}):
        data = dataclasses.replace(config.data, **change)  # pyright: ignore
        with pytest.raises(ConfigError, match=r"train.chat=true: conversations have a packing"):
            dataclasses.replace(config, data=data)


def test_the_papers_mixture_wants_weights(tmp_path: Path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "model: {preset: tiny}\ndata: {mixture: paper}\n"
        "train: {steps: 1, batch_size: 1, seq_len: 8, lr: 1e-3}\n"
    )
    with pytest.raises(ConfigError, match="without a weight: pile, slimpajama, starcoder, pes2o, "):
        load_recipe(recipe)
    names = ("pile", "slimpajama", "starcoder", "pes2o", "proofpile")
    given = [f"data.sources.{name}.weight={i + 1}" for i, name in enumerate(names)]
    config = load_recipe(recipe, [*given, "data.sources.pile.path=here", "data.packing=documents"])
    assert [(s.name, s.weight) for s in config.data.sources] == list(
        zip(names, range(1, 6), strict=True)
    )
    assert config.data.sources[0].path == "here"
    for wrong, message in (
        ("data.sources.plie.weight=1", "no 'plie'; did you mean 'pile'"),
        ("data.sources.weight=1", "data.sources is no mapping"),
        ("data.mixture=papr", "did you mean 'paper'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_recipe(recipe, [*given, wrong])
    own = tmp_path / "own.yaml"
    own.write_text("sources: [{name: a, path: b, weight: 1}]\n")
    assert load_recipe(recipe, [f"data.mixture={own}"]).data.sources[0].name == "a"
    both = tmp_path / "both.yaml"
    both.write_text(recipe.read_text().replace("paper}", "paper, sources: []}"))
    with pytest.raises(ConfigError, match="both mixture and sources"):
        load_recipe(both)
    own.write_text("source: []\n")
    with pytest.raises(ConfigError, match="the key sources alone"):
        load_recipe(recipe, [f"data.mixture={own}"])
