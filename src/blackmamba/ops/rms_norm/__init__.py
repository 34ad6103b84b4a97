"""Root-mean-square norm."""

import torch
from torch import Tensor

from blackmamba.errors import InputError
from blackmamba.ops.backend import Backend, Implementations
from blackmamba.ops.checks import check_floating, check_shapes
from blackmamba.ops.rms_norm.native import rms_norm_native
from blackmamba.ops.rms_norm.reference import rms_norm_reference

_IMPLEMENTATIONS = Implementations(
    "rms_norm", {"native": rms_norm_native, "reference": rms_norm_reference}
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
    check_floating("rms_norm", x=x, weight=weight)
    check_shapes("rms_norm", weight=(weight, x.shape[-1:]))
    dtype = x.dtype if out_dtype is None else out_dtype
    if not dtype.is_floating_point:
        raise InputError(f"rms_norm: out_dtype={dtype}, must be a floating-point dtype")
    # float16 or float64 out of float32: no kernel, so that an empty tensor of it decides
    like = x if dtype == x.dtype else x.new_empty(0, dtype=dtype)
    return _IMPLEMENTATIONS.pick(backend, x, weight, like)(x, weight, eps, dtype)
