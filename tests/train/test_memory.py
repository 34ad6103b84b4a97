"""Freed memory stays with the process: seen in the page faults of a loop."""

import subprocess
import sys

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
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_the_same_memory_is_used_again():
    def faults(how: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert faults("keep") < 20_000 < faults("leave")
