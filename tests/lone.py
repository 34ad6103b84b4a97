"""What tests let a process of its own do: its memory is measured, or limited, or it may end."""

import os
import resource
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import blackmamba
from blackmamba.checkpoint.tensors import open_tensors
from blackmamba.errors import BlackMambaError, CheckpointError


def peak_of_loading(first: Path, folder: Path, options: Mapping[str, Any]) -> float:
    """The most memory that loading the second takes, as a multiple of what it holds then."""
    blackmamba.load(first)  # everything is imported and warm
    Path("/proc/self/clear_refs").write_text("5")  # begin a new peak
    before = _status("VmRSS")
    model = blackmamba.load(folder, **options)
    size = sum(t.nbytes for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    return (_status("VmHWM") - before) / size


def _status(key: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def error_on_full_disk(n_bytes: int, function: Callable[[], object]) -> str:
    """A limit on the size of a file fails a write as a full disk does; what is said of it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
    try:
        function()
    except BlackMambaError as error:
        return str(error)
    return ""


def sum_of_copied(folder: Path, name: str, shape: tuple[int, ...]) -> float:
    """Of a stored tensor."""
    into = torch.zeros(shape)
    open_tensors(folder).copy(name, into)
    return float(into.sum())


def load_from_cache(home: Path, known: str, unknown: str) -> tuple[int, str]:
    """Models by hub names with the network off: the width of one and what is said of the other."""
    os.environ |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    width = blackmamba.load(known).config.d_model
    try:
        blackmamba.load(unknown)
    except CheckpointError as error:
        return width, str(error)
    return width, ""
