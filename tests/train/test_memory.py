"""Freed memory stays with the process: seen in the page faults of a loop."""

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import resource
import torch
from blackmamba.train.memory import keep_freed_memory
def look():
    for _ in range(3):
        torch.ones(1 << 24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(1 << 24)  # 64 MiB, 16,384 pages
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    maps = open("/proc/self/smaps").read().split("VmFlags:")
    print(any("[heap]" in m and " hg" in n.splitlines()[0] for m, n in zip(maps, maps[1:])))
look()
keep_freed_memory(torch.device("cpu"))
look()
"""
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_the_same_memory_is_used_again():
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    left, left_huge, kept, kept_huge = done.stdout.split()
    assert int(kept) < 20_000
    if not (THP.exists() and "[always]" in THP.read_text()):  # there, few faults are all it takes
        assert int(left) > 20_000
    assert left_huge == "False"
    # where the kernel knows huge pages, the heap asks for them
    assert kept_huge == str(THP.exists())
