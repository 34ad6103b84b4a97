"""The native extension: kernels in C++ for the CPU, built from the cpu.cpp files of the operations.

It is optional. Where it was not built, everything still runs, in plain PyTorch.
"""

import hashlib
import importlib
import importlib.util
import logging
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from blackmamba.errors import BackendError

_LOG = logging.getLogger(__name__)
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
        module = importlib.import_module(_NAME)
    except ImportError as error:
        return None, f"the native extension cannot be loaded ({error}); reinstall blackmamba"
    if _interface() not in (None, getattr(module, "interface", "unknown")):
        reason = (
            f"the native extension {module.__file__} was built from other sources than those "
            "beside this package, so it may lack what is asked of it; rebuild it with "
            "`make native`, or reinstall blackmamba"
        )
        _LOG.warning(
            "%s; until then everything runs in plain PyTorch, several times slower", reason
        )
        return None, reason
    return module, None


def _interface() -> str | None:
    """What an extension built from the sources here has as `interface`, see CMakeLists.txt; None
    where they are not: an installed package came with its extension."""
    folder = Path(__file__).parents[1]
    bindings = sorted(folder.glob("*/bind.cpp"))
    if not bindings:
        return None
    sources = [*bindings, folder / "native" / "module.cpp"]
    digests = [hashlib.sha256(source.read_bytes()).hexdigest() for source in sources]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


_MODULE, _REASON = _load()  # not on first use: torch.compile could not trace that
