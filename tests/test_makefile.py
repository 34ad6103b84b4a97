"""What make does after a change to a kernel, with programs that only write down their names."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parent.parent / "Makefile"
pytestmark = pytest.mark.skipif(
    shutil.which("make") is None or not MAKEFILE.exists(), reason="make or the Makefile is not here"
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout that has just been installed."""
    shutil.copy(MAKEFILE, tmp_path)
    kernel = tmp_path / "src" / "blackmamba" / "ops" / "linear" / "cpu.cpp"
    kernel.parent.mkdir(parents=True)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "cmake"):
        (programs / name).write_text('#!/bin/sh\necho "${0##*/} $*" >> log\necho installed.so\n')
        (programs / name).chmod(0o755)
    (tmp_path / "build" / "native").mkdir(parents=True)
    (tmp_path / "build" / "native" / "_native.x.so").write_text("")
    for path in (kernel, *(tmp_path / f for f in ("pyproject.toml", "constraints.txt"))):
        path.write_text("")
        age(path, 100)
    (tmp_path / "CMakeLists.txt").write_text("")
    assert run(tmp_path, "install").count("pip install") == 2
    assert run(tmp_path, "install") == ""
    return tmp_path


def age(path: Path, seconds: float) -> None:
    """Let a file be older than it is; below 0: newer."""
    now = path.stat().st_mtime
    os.utime(path, (now - seconds, now - seconds))


def run(tree: Path, target: str) -> str:
    """The programs that a target calls."""
    log = tree / "log"
    log.unlink(missing_ok=True)
    command = ["make", target, "PYTHON=true", "VENV=.venv"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    subprocess.run(command, cwd=tree, env=clean, capture_output=True, check=True)
    return log.read_text() if log.exists() else ""


def change(tree: Path) -> None:
    """A kernel is edited, a while after the installation."""
    for i, name in enumerate((".installed", ".packages", ".extension", ".made")):
        age(tree / ".venv" / name, 10 + i)
    for name in ("CMakeLists.txt", "pyproject.toml", "constraints.txt"):
        age(tree / name, 1000)
    (tree / "src" / "blackmamba" / "ops" / "linear" / "cpu.cpp").write_text("// another\n")


def test_native_rebuilds_and_installs_nothing(tree: Path):
    change(tree)
    called = run(tree, "native")
    assert "cmake --build" in called
    assert "pip" not in called
    assert (tree / "installed.so").exists()
    assert "pip" not in run(tree, "test")


def test_tests_are_of_the_kernels_as_they_are(tree: Path):
    assert "pip" not in run(tree, "test")
    change(tree)
    called = run(tree, "test").splitlines()
    assert [("pip install" in line, "--no-deps" in line) for line in called] == [
        (True, True),
        (False, False),
    ]
    assert "pytest" in called[1]
    assert "pip" not in run(tree, "test")
    (tree / "pyproject.toml").touch()
    assert "requirements.txt" in run(tree, "test")
