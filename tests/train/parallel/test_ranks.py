"""A run on several ranks is the run of one process: the same losses and the same model."""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from many_ranks import on_ranks
from ranks_train import outlive, spiking, train_all, train_badly, train_spiky

import blackmamba
from blackmamba.config import ModelConfig
from blackmamba.model import BlackMamba
from blackmamba.train import RunConfig, run
from blackmamba.train.metrics import read_metrics
from blackmamba.train.parallel.config import ParallelConfig

Small = Callable[..., RunConfig]
pytestmark = pytest.mark.usefixtures("draw_nothing")

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
    assert_same_weights(*(blackmamba.load(path) for path in (out, reference)))


def assert_same_weights(mine: BlackMamba, theirs: BlackMamba) -> None:
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
    # Muon needs whole matrices; in bfloat16 it would make much of the last bits of a gradient.
    muon = dataclasses.replace(config.train, optimizer="muon", muon_dtype="float32")
    routers["muon"] = dataclasses.replace(config, train=muon)
    runs: list[tuple[RunConfig, Path, bool]] = []
    for router, alone in routers.items():
        if runs:  # the tokens are the same
            shutil.copytree(tmp_path / "sinkhorn" / "data", tmp_path / router / "data")
        run(alone, tmp_path / router)
        kinds = dict(TWO) if router in ROUTERS else {"sharded-experts": TWO["sharded-experts"]}
        if router != "sinkhorn":
            kinds.pop("replicated", None)
        for kind, parallel in kinds.items():
            accumulate = max(1, alone.train.accumulate // 2)
            train = dataclasses.replace(alone.train, accumulate=accumulate)
            spread = dataclasses.replace(alone, train=train, parallel=ParallelConfig(**parallel))
            out = tmp_path / f"{router}.{kind}"
            shutil.copytree(tmp_path / router / "data", out / "data")
            runs.append((spread, out, False))
    masters = with_model(config, 4, router="softmax")
    narrow = {"steps": 5, "dtype": "bfloat16", "weights": "master", "checkpoint_every": 3}
    masters = dataclasses.replace(masters, train=dataclasses.replace(masters.train, **narrow))
    run(masters, tmp_path / "masters")
    shutil.copytree(tmp_path / "masters/data", tmp_path / "spread-masters/data")
    out = tmp_path / "spread-masters"
    on_ranks(2, train_all, [*runs, (on(masters, 2, **TWO["experts"]), out, False)])
    for _, out, _ in runs:
        assert_same_run(out, tmp_path / out.name.split(".")[0])
    # bfloat16: measured 1.5e-4 apart
    assert losses(tmp_path / "spread-masters") == pytest.approx(
        losses(tmp_path / "masters"), abs=2e-3
    )


def test_four_ranks_are_one_process(config: RunConfig, tmp_path: Path):
    """With a shared expert, which lies as no other does where experts are cut twice over."""
    model = dataclasses.replace(config.model, d_shared_expert=10)
    config = dataclasses.replace(config, model=model)
    run(config, tmp_path / "alone")
    for name in FOUR:
        shutil.copytree(tmp_path / "alone/data", tmp_path / name / "data")
    runs = [(on(config, 4, **kind), tmp_path / name, False) for name, kind in FOUR.items()]
    for place in (0, -1):
        spread, *others = runs[place]
        again = dataclasses.replace(spread.train, recompute="layers")
        runs[place] = (dataclasses.replace(spread, train=again), *others)
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


# ---- checkpoints ---------------------------------------------------------------------------

BOTH = {"shard": "full", "expert": 2}
HALF = f"step-{STEPS // 2:08d}"


def without_the_end(out: Path, copy: Path) -> Path:
    """The run as it was after its first checkpoint, in another folder."""
    shutil.copytree(out, copy)
    shutil.rmtree(copy / "checkpoints" / f"step-{STEPS:08d}")
    shutil.rmtree(copy / "model")
    return copy


def test_two_ranks_are_resumed_by_one_and_by_four(config: RunConfig, tmp_path: Path):
    two = tmp_path / "two"
    train = dataclasses.replace(config.train, ema_decay=0.9, checkpoint_async=True)
    alone = dataclasses.replace(config, train=train)
    run(alone, tmp_path / "alone")
    shutil.copytree(tmp_path / "alone/data", two / "data")
    # Two ranks go on with what one process has begun, too.
    begun = without_the_end(tmp_path / "alone", tmp_path / "begun")
    on_ranks(
        2, train_all, [(on(alone, 2, **BOTH), two, False), (on(alone, 2, **BOTH), begun, True)]
    )
    assert sorted(p.name for p in (two / "checkpoints" / HALF).glob("shard-*"))[1:]

    one, four = (without_the_end(two, tmp_path / name) for name in ("one", "four"))
    run(alone, one, resume=True)
    kind = {"shard": "hybrid", "shard_degree": 2, "expert": 2}
    on_ranks(4, train_all, [(on(alone, 4, **kind), four, True)])
    for out in (begun, two, one, four):
        assert_same_run(out, tmp_path / "alone")
        average, expected = (blackmamba.load(o / "model_ema") for o in (out, tmp_path / "alone"))
        assert_same_weights(average, expected)


def test_ranks_go_back_together(config: RunConfig, tmp_path: Path):
    """From outliers in steps 5 and 9, each just after a checkpoint that is written beside."""
    train = dataclasses.replace(
        config.train, steps=10, spikes="rollback", spike_window=3, checkpoint_every=4,
        evaluate_every=5, keep_best=True, checkpoint_async=True, ema_decay=0.9,
    )  # fmt: skip
    alone = dataclasses.replace(config, train=train)
    with spiking({4, 9}) as read:
        result = run(alone, tmp_path / "alone")
    assert (result.rollbacks, read) == (2, list(range(12)))
    shutil.copytree(tmp_path / "alone/data", tmp_path / "two/data")
    on_ranks(2, train_spiky, {4, 9}, [(on(alone, 2, **BOTH), tmp_path / "two", False)])
    assert_same_run(tmp_path / "two", tmp_path / "alone", steps=10)
    rows = read_metrics(tmp_path / "two/metrics.jsonl")
    assert {row["step"]: row["rolled_back"] for row in rows if "rolled_back" in row} == {
        5: {"from_step": 5, "skipped_batches": 1},
        9: {"from_step": 9, "skipped_batches": 1},
    }


def test_a_rank_that_is_killed_is_named_and_costs_steps_alone(config: RunConfig, tmp_path: Path):
    train = dataclasses.replace(config.train, steps=8, checkpoint_every=4, evaluate_every=0)
    alone = dataclasses.replace(config, train=train)
    out = tmp_path / "killed"
    told, _ = on_ranks(2, outlive, on(alone, 2, **BOTH), out, ("SIGKILL", 1, 6), may_die={1})
    name, message = told
    assert name == "TrainingError"
    assert message.startswith("rank 0 lost contact: rank 1 is dead or stopped (this is rank 0, in ")
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000004"]
    run(alone, out, resume=True)
    run(alone, tmp_path / "alone")
    assert_same_run(out, tmp_path / "alone", steps=8)


def test_whatever_goes_wrong_is_said_once_and_loses_nothing(config: RunConfig, tmp_path: Path):
    sharded = on(config, 2, **BOTH)
    damaged = tmp_path / "damaged"
    short = dataclasses.replace(config.train, checkpoint_every=4, accumulate=2)
    often = dataclasses.replace(sharded, train=short)
    on_ranks(2, train_badly, [(often, damaged, False, ("SIGTERM", 1, 10))])
    assert len(losses(damaged)) == 10
    assert sorted(p.name for p in (damaged / "checkpoints").iterdir()) == [
        "step-00000008", "step-00000010",
    ]  # fmt: skip
    # Written beside the training, the same disk is as full.
    beside = dataclasses.replace(
        often, train=dataclasses.replace(often.train, checkpoint_async=True)
    )
    shutil.copytree(damaged, tmp_path / "beside")
    kinds = {"flipped": 1, "missing": 2, "truncated": 3}
    runs: list[tuple[RunConfig, Path, bool, Any]] = []
    for kind, place in kinds.items():
        out = tmp_path / kind
        shutil.copytree(damaged, out)
        files = sorted(p for p in (out / "checkpoints/step-00000010").iterdir())
        file = next(p for p in files if p.name.startswith(f"shard-0000{1 + place % 2}"))
        content = file.read_bytes()
        middle = len(content) // 2
        file.unlink()
        if kind == "flipped":
            file.write_bytes(
                content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
            )
        elif kind == "truncated":
            file.write_bytes(content[:middle])
        runs.append((often, out, True, None))
    uneven = dataclasses.replace(sharded, train=dataclasses.replace(sharded.train, batch_size=6))
    too_many = dataclasses.replace(sharded, parallel=ParallelConfig(expert=3))
    offloaded = dataclasses.replace(
        sharded, parallel=ParallelConfig(shard="full", cpu_offload=True)
    )
    runs += [
        (uneven, tmp_path / "uneven", False, None),
        (too_many, tmp_path / "too-many", False, None),
        (often, damaged, True, ("full disk", 1, 11)),
        (often, damaged, True, None),
        (offloaded, tmp_path / "offloaded", False, None),
        (beside, tmp_path / "beside", True, ("full disk", 1, 11)),
        (beside, tmp_path / "beside", True, None),
    ]
    first, second = on_ranks(2, train_badly, runs)
    for number, kind in enumerate(kinds):
        ends = {first[number][0], second[number][0]}
        assert ends == {"CheckpointError", "PeerError"}, kind
        said = next(e[1] for e in (first[number], second[number]) if e[0] == "CheckpointError")
        assert "step-00000010/shard-0000" in said
        assert "remove its folder to resume from the one before" in said
        assert "\n" not in said
    assert first[3][1] == (
        "train.batch_size=6: must be a multiple of 4, for 2 ranks of 2 micro-batches"
    )
    assert first[4][1] == "parallel.expert=3: must divide the 2 ranks"
    assert second[3][0] == second[4][0] == "PeerError"
    assert [end[0] for end in (first[5], second[5])] == ["CheckpointError", "PeerError"]
    assert "older ones are as they were" in first[5][1]
    assert (first[6], second[6]) == (("", ""), ("", ""))
    assert first[7][1].startswith("parallel.cpu_offload=true: train.device is the CPU")
    assert [end[0] for end in (first[8], second[8])] == ["CheckpointError", "PeerError"]
    assert "step-00000012: the checkpoint cannot be written (rank 1: " in first[8][1]
    assert (first[9], second[9]) == (("", ""), ("", ""))
    run(config, tmp_path / "alone")
    assert_same_run(damaged, tmp_path / "alone")
    assert_same_run(tmp_path / "beside", tmp_path / "alone")
