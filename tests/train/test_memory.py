"""Freed memory stays with the process: seen in the page faults of a loop."""

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import resource, sys
import torch
from blackmamba.train.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory(torch.device("cpu"))
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.ones(1 << 24)
before = faults()
for _ in range(5):
    torch.ones(1 << 24)  # 64 MiB, 16,384 pages
print(faults() - before)
maps = open("/proc/self/smaps").read().split("VmFlags:")
print(any("[heap]" in m and " hg" in n.splitlines()[0] for m, n in zip(maps, maps[1:])))
"""
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_the_same_memory_is_used_again():
    def run(how: str) -> tuple[int, bool]:
        done = subprocess.run(
            [sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True
        )
        faults, huge = done.stdout.split()
        return int(faults), huge == "True"

    kept, left = run("keep"), run("leave")
    assert kept[0] < 20_000 < left[0]
    assert kept[1] == THP.exists()  # where the kernel knows huge pages, the heap asks for them
    assert not left[1]
