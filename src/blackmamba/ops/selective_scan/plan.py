"""How a pass of the scan on a GPU is cut into programs: by a formula that measuring gave.

Letters: b batch, l sequence, d d_inner.
"""

import dataclasses
import math
from collections.abc import Generator

SPAN = 16
"""Tokens between the states that the forward pass keeps for the backward pass: rounded to bfloat16
where the inputs are, for they take more memory than any other tensor of the layer but one."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a pass is cut into programs."""

    block: int
    """Channels of a program."""
    warps: int
    resident: int
    """Warps that a multiprocessor holds at once."""
    n_chunks: int
    """At most."""
    split: bool = False
    """Whether a program may do a part of a row, another the rest."""
    units: bool = False
    """Whether it sums over states by matrix units: scan_forward_units.cu."""


@dataclasses.dataclass(frozen=True)
class Plan(Cut):
    """The same for rows of one length, of exactly n_chunks chunks."""

    chunk: int = dataclasses.field(kw_only=True)
    """Tokens of a chunk, a multiple of SPAN."""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What was chosen by measuring on an H100."""

    block: int
    """Channels of a program."""
    numbers: int
    """Of [channels, states], how many a thread holds."""
    resident: int
    """Warps that a multiprocessor holds at once."""
    extra: float
    """What the pass over the chunks that finds what they leave behind costs, as a share of the main
    pass."""
    registers: int | None = None
    """The most that a thread may use."""
    slower: float = 1.0
    """Times what `plan` expects, for what it leaves out: registers that do not suffice, say."""
    cutting: float = 1.0
    """The same where rows are cut into chunks."""
    split: bool = False
    """Whether programs share rows out evenly among as many as run at once."""
    units: bool = False
    """As of `Cut`; warps are those that scan. Rows are never cut into chunks."""


FORWARD = Tuning(block=16, numbers=4, resident=32, extra=0.65)
BACKWARD = Tuning(block=16, numbers=4, resident=16, extra=0.22, registers=128)
CUDA_FORWARD = (
    Tuning(block=128, numbers=4, resident=16, extra=0.6, cutting=1.4, slower=0.883, split=True),
    Tuning(block=144, numbers=4, resident=18, extra=0.6, cutting=1.4, slower=0.955, split=True),
    Tuning(block=192, numbers=4, resident=24, extra=0.6, cutting=1.4, slower=0.93, split=True),
    Tuning(block=96, numbers=4, resident=24, extra=0.6, cutting=1.4, slower=0.93, split=True),
    Tuning(block=48, numbers=4, resident=18, extra=0.6, cutting=1.4, split=True),
    Tuning(block=32, numbers=4, resident=24, extra=0.6, cutting=1.4, slower=0.95, split=True),
    Tuning(block=64, numbers=4, resident=24, extra=0.6, cutting=1.4, slower=1.02, split=True),
)
CUDA_BACKWARD = (
    Tuning(block=64, numbers=4, resident=16, extra=0.22, split=True),
    Tuning(block=128, numbers=4, resident=16, extra=0.22, slower=0.96, split=True),
    Tuning(block=32, numbers=4, resident=12, extra=0.22, split=True),
)
"""In CUDA C++: sizes of which one or another fills a GPU evenly; the first of equals."""
CUDA_FORWARD_UNITS = (
    Tuning(block=16, numbers=2, resident=4, extra=0, slower=0.31, split=True, units=True),
)
"""Besides, for bfloat16 on NVIDIA's Hopper."""
CUDA_OTHERS = tuple(
    Tuning(block=block, numbers=4, resident=resident, extra=0.4)
    for block in (16, 32, 48, 64, 80)  # the backward pass takes warps by twos
    for resident in (16, 18, 20, 24)
    if resident >= block // 8
)
OTHERS = tuple(
    Tuning(block=block, numbers=numbers, resident=16, extra=0.4)
    for block in (8, 16, 32)
    for numbers in (2, 4, 8)
)
"""What `blackmamba tune` tries besides, in CUDA C++ and in Triton."""
_CHUNKS_TO_TRY = (1, 2, 3, 4, 5, 6, 8, 11, 12, 16, 22, 24, 32, 44, 64)
_REGISTERS = 65_536  # of a block
_TRIED_TIME = 1.4  # of the least that is expected: what may yet be the fastest


def plan(b: int, l: int, d: int, n_padded: int, processors: int, *tunings: Tuning) -> Plan:
    """The tuning and number of chunks that are expected to take the least time."""
    best: tuple[float, Cut] | None = None
    for time, cut in _expected(b, l, d, n_padded, processors, tunings):
        if best is None or time < best[0] * 0.98:
            best = time, cut
    assert best is not None
    return planned(best[1], l)


def cuts(b: int, l: int, d: int, n_padded: int, processors: int, *tunings: Tuning) -> list[Cut]:
    """What is not expected to be much slower than the best."""
    expected = list(_expected(b, l, d, n_padded, processors, tunings))
    most = _TRIED_TIME * min(time for time, _ in expected)
    return [cut for time, cut in expected if time <= most and cut.n_chunks in _CHUNKS_TO_TRY]


def planned(cut: Cut, l: int) -> Plan:
    """For rows of this length."""
    if isinstance(cut, Plan):
        return cut
    spans = max(1, math.ceil(l / SPAN))
    chunk = math.ceil(spans / min(spans, cut.n_chunks)) * SPAN
    n_chunks = max(1, math.ceil(l / chunk))
    return Plan(cut.block, cut.warps, cut.resident, n_chunks, cut.split, cut.units, chunk=chunk)


def _expected(
    b: int, l: int, d: int, n_padded: int, processors: int, tunings: tuple[Tuning, ...]
) -> Generator[tuple[float, Cut]]:
    """Every way to cut the pass and the time that it should take, in no unit.

    A multiprocessor takes longer the more warps it holds, but not in proportion: 20 take 20, 4 take
    8.4. What it cannot hold at once it runs after.
    """
    spans = max(1, math.ceil(l / SPAN))
    for each in tunings:
        most_warps = 32 if each.registers is None else _REGISTERS // (32 * each.registers)
        block = max(1, min(each.block, 32 * most_warps * each.numbers // n_padded))
        warps = max(1, min(most_warps, block * n_padded // (32 * each.numbers)))
        resident = max(1, each.resident // warps)
        most_chunks = 1 if each.units else min(64, max(1, spans // 4))
        for candidate in range(1, most_chunks + 1):
            programs = b * math.ceil(d / block) * candidate
            whole, rest = divmod(math.ceil(programs / processors), resident)
            time = whole * (5.5 + 0.725 * resident * warps)
            time += (5.5 + 0.725 * rest * warps) if rest else 0.0
            if each.split and candidate == 1 and programs > processors * resident:
                time = programs / (processors * resident) * (5.5 + 0.725 * resident * warps)
            time *= (1 + each.extra * (candidate - 1) / candidate) * each.slower / candidate
            if candidate > 1:
                time *= each.cutting
            yield time, Cut(block, warps, each.resident, candidate, each.split, each.units)
