"""Which source of a mixture each row of training comes from."""

import bisect
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from blackmamba.errors import ConfigError, DataError

ROUND = 2**15
"""Rows in which each source has exactly its share, rounded to whole rows."""

_Order = tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]


@dataclasses.dataclass(frozen=True)
class _Segment:
    """Rounds with the same shares."""

    first_row: int
    counts: tuple[int, ...]
    """Rows of each source in a round."""
    before: tuple[int, ...]
    """Rows of each source before the segment."""

    @property
    def size(self) -> int:
        return sum(self.counts)


class Schedule:
    """Row number to source, by weights; a pure function of the seed.

    Rows come in rounds. In each, every source has its number of rows, spread evenly with a random
    place in each stretch, so that the shares hold over short runs too. A source that has reached
    its limit leaves, and the others share the rows by their weights from there on.

    Args:
        weights: of each source, in any unit.
        limits: most rows of each; None: no limit.
        seed: of the order inside of rounds.
    Raises:
        ConfigError: a weight is too small to be drawn.
    """

    def __init__(self, weights: Sequence[float], limits: Sequence[int | None], seed: int):
        self._seed = seed
        self._segments: list[_Segment] = []
        self.n_rows: int | None = None
        """All that there are; None: no end."""
        ends = [math.inf if limit is None else limit for limit in limits]
        used = [0] * len(ends)
        active = list(range(len(ends)))
        row = 0
        while active:
            shares = _rounded([w if i in active else 0.0 for i, w in enumerate(weights)])
            lost = [i for i in active if not shares[i]]
            if lost:
                raise ConfigError(
                    f"weight {weights[lost[0]]:g}: under 1 in {ROUND:,} of the rows; leave it out"
                )
            rounds_left = {i: (ends[i] - used[i]) / shares[i] for i in active}
            first = min(active, key=rounds_left.__getitem__)  # to reach its limit
            if rounds_left[first] == math.inf:
                self._segments.append(_Segment(row, shares, tuple(used)))
                return
            n_rounds = int(ends[first] - used[first]) // shares[first]
            last = [0] * len(ends)  # the rows of a shorter round that brings it to its limit
            for i in active:
                rest = ends[i] - used[i] - n_rounds * shares[i]
                part = shares[i] * (rounds_left[first] - n_rounds)
                last[i] = int(rest if i == first else min(rest, part))
            for counts, rounds in ((shares, n_rounds), (tuple(last), 1)):
                if rounds and any(counts):
                    self._segments.append(_Segment(row, counts, tuple(used)))
                    row += rounds * sum(counts)
                    used = [u + rounds * c for u, c in zip(used, counts, strict=True)]
            active = [i for i in active if used[i] < ends[i]]
        self.n_rows = row

    def source_of(self, row: int) -> tuple[int, int]:
        """The source of a row, and how many rows of that source came before it.

        Raises:
            DataError: all sources are at their limits before it.
        """
        segment, number, place = self._find(row)
        sources, ranks = self._order(segment, number)
        part, source = self._segments[segment], int(sources[place])
        return source, part.before[source] + number * part.counts[source] + int(ranks[place])

    def rows_of(self, n_rows: int) -> list[int]:
        """How many of the first `n_rows` rows come from each source."""
        if n_rows == 0:
            return [0] * len(self._segments[0].counts)
        segment, number, place = self._find(n_rows - 1)
        part = self._segments[segment]
        inside = np.bincount(
            self._order(segment, number)[0][: place + 1], minlength=len(part.counts)
        )
        return [
            before + number * count + int(here)
            for before, count, here in zip(part.before, part.counts, inside, strict=True)
        ]

    def _find(self, row: int) -> tuple[int, int, int]:
        """Segment, round in it, place in that."""
        if self.n_rows is not None and row >= self.n_rows:
            raise DataError(
                f"every source of the mixture has reached its max_epochs after {self.n_rows:,} "
                "rows; raise one, or train for fewer steps"
            )
        segment = bisect.bisect_right(self._segments, row, key=lambda s: s.first_row) - 1
        part = self._segments[segment]
        return segment, *divmod(row - part.first_row, part.size)

    @functools.cached_property
    def _order(self) -> "functools._lru_cache_wrapper[_Order]":  # a step may touch two rounds
        return functools.lru_cache(maxsize=2)(self._new_order)

    def _new_order(self, segment: int, number: int) -> _Order:
        """A round's sources by place, and how many of the same come before each in it."""
        counts = self._segments[segment].counts
        random = np.random.Generator(np.random.Philox([self._seed, segment, number]))
        times = [(np.arange(n) + random.random(n)) / n for n in counts if n]
        owners = np.repeat(np.arange(len(counts)), counts)
        sources = owners[np.argsort(np.concatenate(times), kind="stable")]
        ranks = np.empty_like(sources)
        for source, count in enumerate(counts):
            ranks[sources == source] = np.arange(count)
        return sources, ranks


def _rounded(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in proportion to the weights whose sum is ROUND, by largest remainder."""
    exact = [ROUND * weight / sum(weights) for weight in weights]
    counts = [int(x) for x in exact]
    order = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: ROUND - sum(counts)]:
        counts[i] += 1
    return tuple(counts)
