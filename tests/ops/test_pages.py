"""Weights in huge pages: where they lie, and that nothing else changes."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blackmamba.ops.native.pages import HUGE_PAGE, _whole_pages, want_huge_pages

linux = pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux only")


def huge_bytes(tensor: Tensor) -> int:
    """How much of the mapping that holds the tensor is in huge pages."""
    inside, found = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.split()[0]
        if "-" in name and not name.endswith(":"):
            begin, end = (int(part, 16) for part in name.split("-"))
            inside = begin < tensor.data_ptr() + tensor.nbytes and tensor.data_ptr() < end
        elif inside and name == "AnonHugePages:":
            found += int(line.split()[1]) * 1024
    return found


@linux
def test_a_tensor_written_later_lies_in_huge_pages():
    weights = torch.empty(20 * HUGE_PAGE, dtype=torch.int32)  # so large, it is not in the heap
    address = weights.data_ptr()
    want_huge_pages([weights])
    weights.fill_(3)
    assert weights.data_ptr() == address
    want_huge_pages([weights])  # no harm afterwards
    assert int(weights.sum()) == 3 * weights.numel()
    if huge_bytes(weights) == 0:
        pytest.skip("this system gives no huge pages")
    assert huge_bytes(weights) >= weights.nbytes // 2


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
