"""Says which rank the others wait for: one that is dead, that is stopped, or that is behind.

Every rank tells the store, once a second and from a thread of its own, that it lives and how far it
is. A rank that gets no further for too long, or loses contact, compares what all have told.
"""

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping

import torch.distributed as dist

_BEAT_S = 1.0
_STATUS = 3  # of a process that ends because another rank did not arrive
_logger = logging.getLogger(__name__)


class Watch:
    """Of one rank.

    Args:
        store: a connection that nothing else uses, as a wait on it holds it.
        rank, size: of this process.
        timeout_s: so long may a rank be at one place, from the first that it says.
        end: called, if that is over, with what is wrong; the process ends with it.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        timeout_s: float,
        end: Callable[[str], None] | None = None,
    ):
        self._store, self._rank, self._size, self._timeout_s = store, rank, size, timeout_s
        self._end = end or _leave
        self._place, self._moves, self._since = "begins", 0, math.inf  # preparing data may last
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._tell(0)
        self._thread.start()

    def at(self, place: str) -> None:
        """This rank has come so far; all ranks come by the same places."""
        self._place, self._moves, self._since = place, self._moves + 1, time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self._closing.set()
        self._thread.join()

    def missing(self) -> str:
        """Who is dead or behind, in words for people. Takes some seconds."""
        before = self._told()
        for _ in range(3):
            time.sleep(_BEAT_S)
            self._tell(time.monotonic())  # the thread that does it may be the one that asks
        return judged(before, self._told(), self._rank, self._size, self._place)

    def _watch(self) -> None:
        beat = 0
        while not self._closing.wait(_BEAT_S):
            beat += 1
            try:
                self._tell(beat)
                if time.monotonic() - self._since <= self._timeout_s:
                    continue
                found = self.missing()
            except RuntimeError as error:  # torchrun, which holds the store, is gone
                _logger.debug("no store: %s", error)
                return
            self._end(
                f"rank {self._rank} got no further for {self._timeout_s:g} s "
                f"(parallel.timeout_s): {found}"
            )
            return

    def _tell(self, beat: float) -> None:
        self._store.set(f"beat/{self._rank}", f"{beat} {self._moves} {self._place}")

    def _told(self) -> dict[int, str]:
        keys = {rank: f"beat/{rank}" for rank in range(self._size)}
        known = {rank: key for rank, key in keys.items() if self._store.check([key])}
        return {rank: self._store.get(key).decode() for rank, key in known.items()}


def judged(
    before: Mapping[int, str], after: Mapping[int, str], rank: int, size: int, own: str
) -> str:
    """Who is dead or behind, in words for people.

    Args:
        before, after: what the ranks have told, "<beat> <moves> <place>", some beats apart.
        rank, size: of this process.
        own: its place.
    """
    silent = [r for r in after if r != rank and before.get(r) == after[r]]
    silent += [r for r in range(size) if r not in after]
    if silent:
        return f"{_ranks(silent)} dead or stopped (this is rank {rank}, {own})"
    moves = {r: int(told.split(" ", 2)[1]) for r, told in after.items()}
    behind = [r for r, count in moves.items() if count < max(moves.values())]
    if behind:
        places = ", ".join(f"rank {r}: {after[r].split(' ', 2)[2]}" for r in behind)
        return f"{_ranks(behind)} behind the others ({places}; rank {rank}: {own})"
    return f"all ranks are alive, and all: {own}"


def _leave(what: str) -> None:
    """End the process, which may be stuck where no exception can reach it."""
    sys.stderr.write(f"blackmamba: error: {what}\n")
    sys.stderr.flush()
    os._exit(_STATUS)


def _ranks(ranks: list[int]) -> str:
    names = ", ".join(map(str, ranks))
    return f"rank {names} is" if len(ranks) == 1 else f"ranks {names} are"
