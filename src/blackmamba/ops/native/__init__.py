"""The native extension: kernels in C++ for the CPU, built from the cpu.cpp files of the operations.

It is optional. Where it was not built, everything still runs, in plain PyTorch.
"""

import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from blackmamba.errors import BackendError

_NAME = "blackmamba._native"
DTYPES = (torch.float32, torch.bfloat16)
"""What the kernels take; all of them compute in float32."""


def extension() -> ModuleType:
    """The extension module.

    Raises:
        BackendError: it was not built, or cannot be loaded.
    """
    if _MODULE is None:
        raise BackendError(f"backend='native': {_REASON}")
    return _MODULE


def missing() -> str | None:
    """Why there is no extension; None if there is one."""
    return _REASON


def unfit(*tensors: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors; None if they can. Absent ones always fit."""
    if (reason := missing()) is not None:
        return reason
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"it runs on the CPU, the input is on {tensor.device}"
        if tensor.dtype not in DTYPES:
            return f"it takes float32 and bfloat16, the input is {tensor.dtype}"
    return None


def rows(tensor: Tensor) -> Tensor:
    """(..., w) as (t, w) with the last dimension contiguous; copied only where strides forbid."""
    flat = tensor.flatten(0, -2) if tensor.dim() != 1 else tensor[None]
    return flat if flat.stride(1) == 1 or flat.shape[1] < 2 else flat.contiguous()


def keep_memory() -> bool:
    """Let this process keep the memory that its tensors leave, for the next ones.

    The C library gives large pieces back to the system, which fills each with zeros, page by page,
    before it is used again: a third of the time of a training step on a CPU. It is for programs
    that train; whoever calls a model from a larger program may not want it.

    Returns:
        Whether it had an effect: there is an extension, and the C library is glibc.
    """
    return _MODULE is not None and _MODULE.keep_memory()


def describe() -> str:
    """One line for `blackmamba doctor`."""
    if _MODULE is None:
        return f"none: {_REASON}"
    return f"{_MODULE.target()} kernels on {_MODULE.threading()}"


def _load() -> tuple[ModuleType | None, str | None]:
    if importlib.util.find_spec(_NAME) is None:
        return None, (
            "the native extension was not built; install a C++ compiler (GCC 11 or Clang 14, or "
            "newer) and reinstall blackmamba"
        )
    try:
        return importlib.import_module(_NAME), None
    except ImportError as error:
        return None, f"the native extension cannot be loaded ({error}); reinstall blackmamba"


_MODULE, _REASON = _load()  # not on first use: torch.compile could not trace that
