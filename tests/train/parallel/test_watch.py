"""The watch names the rank that the others wait for."""

import queue
import threading
from collections.abc import Mapping

import pytest
import torch.distributed as dist

from blackmamba.train.parallel import watch as module
from blackmamba.train.parallel.watch import Watch, judged

_PATIENCE_S = 60.0  # of a test that fails


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({0: "1 2 x", 1: "1 2 x"}, {0: "4 2 in step 7", 1: "2 2 in step 7"},
         "all ranks are alive, and all: in step 7"),
        ({0: "1 2 x", 1: "1 2 x", 2: "9 2 x"}, {0: "4 2 x", 1: "2 2 x", 2: "9 2 x"},
         "rank 2 is dead or stopped (this is rank 0, in step 7)"),
        ({0: "1 2 x"}, {0: "4 2 x"}, "rank 1 is dead or stopped (this is rank 0, in step 7)"),
        ({0: "1 2 x", 1: "1 1 y"}, {0: "4 2 x", 1: "2 1 reads a batch"},
         "rank 1 is behind the others (rank 1: reads a batch; rank 0: in step 7)"),
        ({0: "1 1 x", 1: "1 3 y", 2: "1 2 y"}, {0: "4 1 in step 7", 1: "2 3 y", 2: "2 2 z"},
         "ranks 0, 2 are behind the others (rank 0: in step 7, rank 2: z; rank 0: in step 7)"),
    ],
    ids=("alike", "silent", "absent", "behind", "two behind"),
)  # fmt: skip
def test_who_is_waited_for(before: Mapping[int, str], after: Mapping[int, str], message: str):
    size = 1 + max(max(after), 1)
    assert judged(before, after, 0, size, "in step 7") == message


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    monkeypatch.setattr(module, "_BEAT_S", 0.01)
    return dist.HashStore()


class Rank(Watch):
    """Says when it has told the store something for the third time."""

    def __init__(self, store: dist.Store, rank: int, size: int):
        self.beats, self.has_beaten = 0, threading.Event()
        super().__init__(store, rank, size, timeout_s=100)

    def _tell(self, beat: float) -> None:
        super()._tell(beat)
        self.beats += 1
        if self.beats >= 3:
            self.has_beaten.set()


def test_a_rank_that_was_closed_is_named(store: dist.Store):
    ranks = [Rank(store, rank, 2) for rank in range(2)]
    try:
        ranks[0].at("in step 7")
        assert all(rank.has_beaten.wait(_PATIENCE_S) for rank in ranks)
        ranks[1].close()  # as if it were killed
        assert ranks[0].missing() == "rank 1 is dead or stopped (this is rank 0, in step 7)"
    finally:
        for rank in ranks:
            rank.close()


def test_a_rank_that_gets_no_further_ends_the_run(store: dist.Store):
    told: queue.Queue[str] = queue.Queue()
    ranks = [Watch(store, rank, 2, timeout_s=0.1, end=told.put) for rank in range(2)]
    try:
        ranks[0].at("reads the batch of step 3")
        found = told.get(timeout=_PATIENCE_S)
        assert found.startswith("rank 0 got no further for 0.1 s (parallel.timeout_s): rank")
        ranks[1].at("reads the batch of step 3")
        found = told.get(timeout=_PATIENCE_S)
        assert found.startswith("rank 1 got no further for 0.1 s (parallel.timeout_s): ")
    finally:
        for watch in ranks:
            watch.close()
