"""The plan's traffic is what collectives of real processes are given."""

from typing import Any

import pytest
from many_ranks import on_ranks
from traffic_ranks import sent_in_all

from blackmamba.analyse.machines import H100
from blackmamba.analyse.scaling import Grid, Traffic, plan
from blackmamba.config import ModelConfig
from blackmamba.train import TrainConfig
from blackmamba.train.parallel.config import ParallelConfig
from blackmamba.train.parallel.mesh import degrees

RANKS = 4
CONFIG = ModelConfig(  # all of it divides by 4: FSDP sends padding, too
    layers=("mamba", "moe", "mamba+moe"), d_model=32, vocab_size=64, d_state=5, n_experts=4,
    d_expert=16, router="softmax",
)  # fmt: skip
CASES: dict[str, tuple[dict[str, Any], int]] = {  # and micro-batches
    "replicated": ({}, 1),
    "sharded": ({"shard": "full"}, 2),
    "hybrid": ({"shard": "hybrid", "shard_degree": 2}, 1),
    "experts": ({"shard": "full", "expert": 2}, 1),
    "rows": ({"shard": "full", "sequence": 2}, 1),
}
Counted = tuple[dict[str, int], dict[str, int]]
ROWS, LENGTH = 2, 12
TAILS = 2 * 2 * ROWS * CONFIG.d_inner * 3 * 4
"""Bytes of a rank between two others: of two layers, forward and backward, in float32."""


@pytest.fixture(scope="module")
def counted() -> dict[str, list[Counted]]:
    cases = [(CONFIG, parallel, ROWS, LENGTH, acc) for parallel, acc in CASES.values()]
    by_rank = on_ranks(RANKS, sent_in_all, cases)
    return {name: [found[i] for found in by_rank] for i, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_collectives_are_given_what_is_planned(counted: dict[str, list[Counted]], name: str):
    parallel, accumulate = CASES[name]
    settings = ParallelConfig(**parallel)
    grid = Grid(
        gpus=RANKS, node_gpus=RANKS, shards=degrees(settings, RANKS, RANKS)[1],
        experts=settings.expert, sequence=settings.sequence,
    )  # fmt: skip
    readers = RANKS // settings.sequence
    train = TrainConfig(
        steps=1, batch_size=ROWS * readers, accumulate=accumulate, lr=1e-3,
        seq_len=LENGTH * settings.sequence,
    )  # fmt: skip
    planned: dict[str, float] = {}
    for traffic in plan(CONFIG, train, grid, H100).traffic:
        kind, given = given_to(traffic)
        planned[kind] = planned.get(kind, 0) + given
    # The mean over ranks: how many tokens come to one's experts is chance.
    sent = [bytes_ for bytes_, _ in counted[name]]
    found = {kind: sum(one[kind] for one in sent) / RANKS for kind in sent[0]}
    if settings.sequence > 1:  # of two ranks one sends tails forward and one backward
        planned["send"] = TAILS / 2
    assert {kind: given for kind, given in found.items() if given} == pytest.approx(planned)


def test_a_pair_of_layers_is_gathered_at_once(counted: dict[str, list[Counted]]):
    """Two groups of layers, `mamba` with `moe` and the parallel one; embedding and head."""
    for _, calls in counted["sharded"]:  # two micro-batches
        assert calls["allgather_base"] == 2 * (2 + 2 + 1)
        assert calls["reduce_scatter_base"] == 2 + 1
    for _, calls in counted["experts"]:  # each layer's experts are a group of their own
        assert calls["reduce_scatter_base"] == 2 + 2 + 1


def given_to(traffic: Traffic) -> tuple[str, float]:
    """The collective, and what one rank gives to it that sends so many bytes."""
    n, sent = traffic.group, traffic.sent_bytes
    if traffic.what.startswith("gather"):
        return "allgather_base", sent / (n - 1)
    if traffic.what.startswith("reduce"):
        return "reduce_scatter_base", sent * n / (n - 1)
    if traffic.what.startswith("sum"):
        return "allreduce", sent * n / (n - 1) / 2
    if traffic.what == "tokens to experts":
        return "alltoall_base", sent * n / (n - 1)
    assert traffic.what == "states of rows"
    return "allgather", (sent - TAILS) / (n - 1)
