"""The program, while the package is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

INTERRUPTED = """
import os, signal, sys

class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
            print("imported", flush=True)

sys.meta_path.insert(0, Finder())
{before}
"""
INSTALLED = ["-c", "from blackmamba_program import main; main()"]


@pytest.mark.parametrize(
    ("before", "status", "shown"),
    [
        ("", 130, ""),
        ("signal.signal(signal.SIGINT, signal.SIG_IGN)", 0, "imported\nblackmamba"),
    ],
    ids=["usual", "ignored"],
)
@pytest.mark.parametrize("words", [INSTALLED, ["-m", "blackmamba"]], ids=["installed", "module"])
def test_an_interrupt_of_the_import_ends_quietly(
    words: list[str], before: str, status: int, shown: str, tmp_path: Path
):
    done = start(words, before, tmp_path)
    assert (done.returncode, done.stderr) == (status, "")
    assert done.stdout.startswith(shown)
    assert bool(done.stdout) == bool(shown)


def test_a_script_is_interrupted_as_python_does(tmp_path: Path):
    code = """
try:
    import blackmamba
except KeyboardInterrupt:
    print("caught")
"""
    assert start(["-c", code], "", tmp_path).stdout == "caught\n"


def start(words: list[str], before: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run Python with an interrupt as soon as torch is imported."""
    (folder / "sitecustomize.py").write_text(INTERRUPTED.format(before=before))
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *words, "--version"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
