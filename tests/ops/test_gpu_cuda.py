"""Machine code of the CUDA C++ kernels is compiled once and kept on disk."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from blackmamba.ops.gpu import cuda


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The options that were compiled with; the compiler gives its input back."""
    seen: list[str] = []

    def compiler(name: str, text: bytes, options: Sequence[str]) -> bytes:
        seen.append(" ".join(options))
        return name.encode() + text

    monkeypatch.setattr(cuda, "_compiled", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return seen


def binary(*sources: Path, value: int = 1, architecture: str = "sm_90") -> bytes:
    """As a process that has compiled nothing yet."""
    cuda._compile.cache_clear()
    return cuda._compile(sources, (("NAME", value),), architecture)


def test_compiled_once_for_each_text_and_option(compiled: list[str], tmp_path: Path):
    shared, source = tmp_path / "shared.cu", tmp_path / "a.cu"
    shared.write_text("zero\n")
    source.write_text("one")
    both = b'a.cu#line 1 "shared.cu"\nzero\n#line 1 "a.cu"\none'
    assert binary(shared, source) == binary(shared, source) == both
    assert compiled == ["--gpu-architecture=sm_90 --std=c++17 -DNAME=1"]
    binary(shared, source, value=2)
    binary(shared, source, architecture="sm_100")
    source.write_text("two")
    assert binary(shared, source).endswith(b'zero\n#line 1 "a.cu"\ntwo')
    shared.write_text("another\n")
    assert b"another" in binary(shared, source)
    assert len(compiled) == len(list(cuda.kept_kernels().iterdir())) == 5


def test_a_folder_that_cannot_be_written_only_costs_time(compiled: list[str], tmp_path: Path):
    source = tmp_path / "a.cu"
    source.write_text("one")
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert binary(source) == binary(source) == b'a.cu#line 1 "a.cu"\none'
    assert len(compiled) == 2
