"""Kernels in Triton, for NVIDIA and AMD GPUs: whether they can run, and what they share.

An operation keeps them in kernels.py (the scan: backward_kernels.py too), which alone imports
triton, and only when it is first run; gpu.py beside it is what Python and autograd see. cuda.py
here compiles the few kernels that are in CUDA C++; each has a counterpart in Triton. Under
TRITON_INTERPRET=1 they run on the CPU too, slowly, step by step, for tests.
"""

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels take; all of them sum in float32."""


def missing() -> str | None:
    """Why Triton kernels cannot run on this machine; None if they can."""
    if not _INSTALLED:
        return "triton is not installed; pip install triton"
    if not (interpreted() or torch.cuda.is_available()):
        return "this machine has no CUDA or ROCm device"
    return None


def interpreted() -> bool:
    """Whether kernels run step by step on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unfit(*tensors: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors; None if they can. Absent ones always fit."""
    if (reason := missing()) is not None:
        return reason
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cuda" and not interpreted():
            return f"it runs on a GPU, the input is on {tensor.device}"
        if tensor.dtype not in DTYPES:
            return f"it takes float32, bfloat16 and float16, the input is {tensor.dtype}"
    return None


def on_gpu(*tensors: Tensor | None) -> bool:
    """Whether the tensors, of which there is one, are on a GPU."""
    return any(tensor is not None and tensor.device.type == "cuda" for tensor in tensors)


def can_overlap() -> bool:
    """Whether a kernel may start before the one ahead of it ends: NVIDIA's, from Hopper on."""
    return (
        not interpreted()
        and torch.version.hip is None
        and torch.cuda.get_device_capability() >= (9, 0)
    )


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's GPU; of an H100, for the interpreter."""
    if tensor.device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Start a Triton kernel; `kernel[grid](...)`, whose constants no type describes."""
    kernel[grid](*args, **options)


_INSTALLED = importlib.util.find_spec("triton") is not None  # now: torch.compile cannot trace it
