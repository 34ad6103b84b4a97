"""Root-mean-square norm, alone and of a sum."""

import torch
from torch import Tensor

from blackmamba.errors import InputError
from blackmamba.ops.backend import Backend, Implementations
from blackmamba.ops.checks import check_floating, check_shapes
from blackmamba.ops.rms_norm.gpu import add_rms_norm_triton, rms_norm_triton
from blackmamba.ops.rms_norm.native import add_rms_norm_native, rms_norm_native
from blackmamba.ops.rms_norm.reference import add_rms_norm_reference, rms_norm_reference

_IMPLEMENTATIONS = Implementations(
    "rms_norm",
    {"triton": rms_norm_triton, "native": rms_norm_native, "reference": rms_norm_reference},
)
_ADD_IMPLEMENTATIONS = Implementations(
    "add_rms_norm",
    {
        "triton": add_rms_norm_triton,
        "native": add_rms_norm_native,
        "reference": add_rms_norm_reference,
    },
)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

    Args:
        x: (..., m), any floating-point dtype.
        weight: (m,).
        eps: added to the mean square.
        out_dtype: of the result, any floating-point dtype; None: x's.
        backend: see ops/backend.py.
    Returns:
        (..., m) in out_dtype; computed in float32 or wider.
    Raises:
        InputError: a shape or dtype is wrong.
        BackendError: `backend` cannot run.
    Source:
        Zhang and Sennrich 2019 (arXiv 1910.07467), eq. 4, with eps inside the root.
    """
    dtype, like = _checked("rms_norm", x, weight, None, out_dtype)
    return _IMPLEMENTATIONS.pick(backend, x, weight, like)(x, weight, eps, dtype)


def add_rms_norm(
    x: Tensor,
    update: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """x + update, and `rms_norm` of it: what stands between two layers of a residual stream.

    Args:
        x: (..., m), any floating-point dtype.
        update: as x, in any floating-point dtype.
        weight, eps, out_dtype, backend: see `rms_norm`.
    Returns:
        total: (..., m), the sum in x's dtype.
        y: (..., m) in out_dtype, the norm of the sum as it is stored in x's dtype.
    Raises:
        InputError: a shape or dtype is wrong.
        BackendError: `backend` cannot run.
    """
    dtype, like = _checked("add_rms_norm", x, weight, update, out_dtype)
    run = _ADD_IMPLEMENTATIONS.pick(backend, x, update, weight, like)
    return run(x, update, weight, eps, dtype)


def _checked(
    name: str, x: Tensor, weight: Tensor, update: Tensor | None, out_dtype: torch.dtype | None
) -> tuple[torch.dtype, Tensor]:
    """The result's dtype, and a tensor of it."""
    check_floating(name, x=x, update=update, weight=weight)
    check_shapes(name, update=(update, x.shape), weight=(weight, x.shape[-1:]))
    dtype = x.dtype if out_dtype is None else out_dtype
    if not dtype.is_floating_point:
        raise InputError(f"{name}: out_dtype={dtype}, must be a floating-point dtype")
    # not all dtypes that may go in may come out of a kernel: an empty tensor of it decides
    return dtype, x if dtype == x.dtype else x.new_empty(0, dtype=dtype)
