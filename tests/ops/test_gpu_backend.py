"""When "triton" runs, on machines with and without a GPU."""

import pytest
import torch

from blackmamba.errors import BackendError
from blackmamba.ops import gpu
from blackmamba.ops.backend import Implementations


def implementations() -> Implementations:
    return Implementations(
        "gpu_backend_test", {"triton": lambda: "triton", "reference": lambda: "reference"}
    )


def test_auto_never_interprets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu, "_INSTALLED", True)
    assert implementations().pick("auto", torch.ones(1))() == "reference"
    assert implementations().pick("triton", torch.ones(1))() == "triton"


def test_reasons(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(gpu, "_INSTALLED", False)
    with pytest.raises(BackendError, match="pip install triton"):
        implementations().pick("triton", torch.ones(1))
    monkeypatch.setattr(gpu, "_INSTALLED", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="no CUDA or ROCm device"):
        implementations().pick("triton", torch.ones(1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(BackendError, match="the input is on cpu"):
        implementations().pick("triton", torch.ones(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match="float64"):
        implementations().pick("triton", torch.ones(1, dtype=torch.float64))
