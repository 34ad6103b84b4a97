"""A run on several ranks is the run of one process: the same losses and the same model."""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from many_ranks import on_ranks
from ranks_train import train_all

import blackmamba
from blackmamba.config import ModelConfig
from blackmamba.train import RunConfig, run
from blackmamba.train.metrics import read_metrics
from blackmamba.train.parallel.config import ParallelConfig

Small = Callable[..., RunConfig]

STEPS = 20
# Widths that 2 and 4 ranks cannot divide evenly, and a parallel layer.
MODEL = ModelConfig(
    layers=("mamba", "moe", "mamba+moe:8"),
    d_model=24,
    vocab_size=301,
    d_state=4,
    n_experts=4,
    d_expert=14,
    linear_bias=True,
)


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl")]


def on(config: RunConfig, ranks: int, **parallel: Any) -> RunConfig:
    """The same run for so many ranks: as many micro-batches in all, each balanced alone."""
    train = dataclasses.replace(config.train, accumulate=config.train.accumulate // ranks)
    return dataclasses.replace(config, train=train, parallel=ParallelConfig(**parallel))


def assert_same_run(out: Path, reference: Path, steps: int = STEPS) -> None:
    assert len(losses(out)) == steps
    # float32: sums over ranks are in another order. 20 steps apart, measured 2e-6 at most
    assert losses(out) == pytest.approx(losses(reference), abs=1e-5), out.name
    mine, theirs = (blackmamba.load(path) for path in (out, reference))
    for (name, one), (_, other) in zip(
        mine.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert one.shape == other.shape, name
        assert (one - other).abs().max() < 1e-3, name


@pytest.fixture
def config(small: Small) -> RunConfig:
    return small(
        MODEL, steps=STEPS, batch_size=8, accumulate=4, evaluate_every=10, checkpoint_every=10
    )


ROUTERS: Mapping[str, dict[str, Any]] = {
    "sinkhorn": {},
    "softmax": {
        "router": "softmax", "experts_per_token": 2, "balance_loss": 0.02, "router_z_loss": 1e-3,
        "d_shared_expert": 10,
    },
    "sigmoid": {
        "router": "sigmoid", "experts_per_token": 2, "normalize_gates": True,
        "selection_bias": True, "selection_bias_rate": 0.01,
    },
}  # fmt: skip
# Balanced over all tokens of a step: the run of one process has them in one micro-batch.
GLOBAL: Mapping[str, dict[str, Any]] = {
    "sinkhorn-global": {"sinkhorn_scope": "global"},
    "softmax-global": {"router": "softmax", "balance_loss": 0.02, "balance_scope": "global"},
}
TWO: Mapping[str, dict[str, Any]] = {
    "replicated": {},
    "sharded": {"shard": "full"},
    "experts": {"expert": 2},
    "sharded-experts": {"shard": "full", "expert": 2},
}
FOUR: Mapping[str, dict[str, Any]] = {
    "hybrid": {"shard": "hybrid", "shard_degree": 2},
    "hybrid-experts": {"shard": "hybrid", "shard_degree": 2, "expert": 2},
    "experts": {"expert": 2},
    "sharded-experts": {"shard": "full", "expert": 2},
}


def with_model(config: RunConfig, accumulate: int, **model: Any) -> RunConfig:
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **model),
        train=dataclasses.replace(config.train, accumulate=accumulate, evaluate_every=0),
    )


def test_two_ranks_are_one_process(config: RunConfig, tmp_path: Path):
    routers = {name: with_model(config, 4, **model) for name, model in ROUTERS.items()}
    routers |= {name: with_model(config, 1, **model) for name, model in GLOBAL.items()}
    runs: list[tuple[RunConfig, Path, bool]] = []
    for router, alone in routers.items():
        if runs:  # the tokens are the same
            shutil.copytree(tmp_path / "sinkhorn" / "data", tmp_path / router / "data")
        run(alone, tmp_path / router)
        kinds = TWO if router in ROUTERS else {"sharded-experts": TWO["sharded-experts"]}
        for kind, parallel in kinds.items():
            accumulate = max(1, alone.train.accumulate // 2)
            train = dataclasses.replace(alone.train, accumulate=accumulate)
            spread = dataclasses.replace(alone, train=train, parallel=ParallelConfig(**parallel))
            out = tmp_path / f"{router}.{kind}"
            shutil.copytree(tmp_path / router / "data", out / "data")
            runs.append((spread, out, False))
    on_ranks(2, train_all, runs)
    for _, out, _ in runs:
        assert_same_run(out, tmp_path / out.name.split(".")[0])


def test_four_ranks_are_one_process(config: RunConfig, tmp_path: Path):
    run(config, tmp_path / "alone")
    for name in FOUR:
        shutil.copytree(tmp_path / "alone/data", tmp_path / name / "data")
    runs = [(on(config, 4, **kind), tmp_path / name, False) for name, kind in FOUR.items()]
    on_ranks(4, train_all, runs)
    for _, out, _ in runs:
        assert_same_run(out, tmp_path / "alone")


PIECES: Mapping[str, dict[str, Any]] = {
    "pieces": {"sequence": 4},
    "sharded": {"sequence": 2, "shard": "full"},
    "experts": {"sequence": 2, "shard": "hybrid", "shard_degree": 2, "expert": 2},
}


def test_rows_cut_over_ranks_are_one_process(config: RunConfig, tmp_path: Path):
    # A router without a balance, which would be that of other tokens.
    alone = with_model(config, 4, router="softmax")
    alone = dataclasses.replace(alone, train=dataclasses.replace(alone.train, steps=8))
    run(alone, tmp_path / "alone")
    runs: list[tuple[RunConfig, Path, bool]] = []
    for name, parallel in PIECES.items():
        readers = 4 // parallel["sequence"]
        train = dataclasses.replace(alone.train, accumulate=4 // readers)
        cut = dataclasses.replace(alone, train=train, parallel=ParallelConfig(**parallel))
        shutil.copytree(tmp_path / "alone/data", tmp_path / name / "data")
        runs.append((cut, tmp_path / name, False))
    on_ranks(4, train_all, runs)
    for _, out, _ in runs:
        assert_same_run(out, tmp_path / "alone", steps=8)
