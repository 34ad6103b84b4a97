"""The installed program, before the package is imported."""

import subprocess
import sys

import pytest

INTERRUPTED = """
import os, signal, sys

class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
            print("imported")

sys.meta_path.insert(0, Finder())
sys.argv = ["blackmamba", "--version"]
{before}
from blackmamba_program import main
main()
"""


@pytest.mark.parametrize(
    ("before", "status", "shown"),
    [
        ("", 130, ""),
        ("signal.signal(signal.SIGINT, signal.SIG_IGN)", 0, "imported\nblackmamba"),
    ],
    ids=["usual", "ignored"],
)
def test_an_interrupt_of_the_import_ends_quietly(before: str, status: int, shown: str):
    code = INTERRUPTED.format(before=before)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (status, "")
    assert done.stdout.startswith(shown)
    assert bool(done.stdout) == bool(shown)
