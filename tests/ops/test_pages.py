"""Weights in huge pages: where they lie, and that nothing else changes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from blackmamba.ops.native.pages import HUGE_PAGE, _whole_pages, want_huge_pages

linux = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no huge pages"
)


def asked_bytes(tensor: Tensor) -> int:
    """How much of the tensor lies in mappings for which huge pages were asked."""
    first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    inside, found = 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.split()[0]
        if "-" in name and not name.endswith(":"):
            begin, end = (int(part, 16) for part in name.split("-"))
            inside = max(0, min(end, last) - max(begin, first))
        elif name == "VmFlags:" and "hg" in line.split():
            found += inside
    return found


@linux
def test_huge_pages_are_asked_for_a_tensor_that_is_written_later():
    weights = torch.empty(20 * HUGE_PAGE, dtype=torch.int32)  # so large, it is not in the heap
    address = weights.data_ptr()
    want_huge_pages([weights])
    weights.fill_(3)
    assert weights.data_ptr() == address
    want_huge_pages([weights])  # no harm afterwards
    assert int(weights.sum()) == 3 * weights.numel()
    # How many it gets is the system's to say: it may have few left that lie together.
    assert asked_bytes(weights) > weights.nbytes - 2 * HUGE_PAGE


def test_only_whole_pages_and_neighbours_together():
    memory = torch.empty(3 * HUGE_PAGE, dtype=torch.uint8)
    first = -memory.data_ptr() % HUGE_PAGE
    begin = memory.data_ptr() + first
    page = memory[first : first + HUGE_PAGE]
    assert _whole_pages([page]) == [(begin, begin + HUGE_PAGE)]
    assert _whole_pages([page[:-1]]) == []
    assert _whole_pages([page[HUGE_PAGE // 2 + 99 :], page[: HUGE_PAGE // 2]]) == [
        (begin, begin + HUGE_PAGE)
    ]
    assert _whole_pages([page[HUGE_PAGE // 2 + 9999 :], page[: HUGE_PAGE // 2]]) == []
    assert _whole_pages([torch.empty(9, device="meta"), memory[:0]]) == []
