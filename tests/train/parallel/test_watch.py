"""The watch names the rank that the others wait for."""

import queue

import pytest
import torch.distributed as dist

from blackmamba.train.parallel import watch as module
from blackmamba.train.parallel.watch import Watch


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    monkeypatch.setattr(module, "_BEAT_S", 0.05)
    return dist.HashStore()


def test_a_silent_rank_is_named(store: dist.Store):
    ranks = [Watch(store, rank, 3, timeout_s=100) for rank in range(3)]
    for rank in ranks:
        rank.at("in step 7")
    assert ranks[0].missing() == "all ranks are alive, and all: in step 7"
    ranks[2].close()  # as if it were killed
    assert ranks[0].missing() == "rank 2 is dead or stopped (this is rank 0, in step 7)"
    for rank in ranks[:2]:
        rank.close()


def test_a_rank_that_never_came_is_named(store: dist.Store):
    watch = Watch(store, 0, 2, timeout_s=100)
    assert watch.missing() == "rank 1 is dead or stopped (this is rank 0, begins)"
    watch.close()


def test_a_rank_that_is_behind_ends_the_run(store: dist.Store):
    told: queue.Queue[str] = queue.Queue()
    ranks = [Watch(store, rank, 2, timeout_s=0.5, end=told.put) for rank in range(2)]
    ranks[0].at("reads the batch of step 3")
    ranks[0].at("in step 3")
    ranks[1].at("reads the batch of step 3")  # and reads, and reads
    found = {told.get(timeout=30), told.get(timeout=30)}
    for rank in (0, 1):
        assert any(
            text.startswith(f"rank {rank} got no further for 0.5 s (parallel.timeout_s): "
                            "rank 1 is behind the others (rank 1: reads the batch of step 3")
            for text in found
        )  # fmt: skip
    for watch in ranks:
        watch.close()
