"""Root-mean-square norm."""

from torch import Tensor

from blackmamba.ops.backend import Backend, Implementations
from blackmamba.ops.checks import check_floating, check_shapes
from blackmamba.ops.rms_norm.reference import rms_norm_reference

_IMPLEMENTATIONS = Implementations("rms_norm", {"reference": rms_norm_reference})


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, *, backend: Backend = "auto") -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

    Args:
        x: (..., m), any floating-point dtype.
        weight: (m,).
        eps: added to the mean square.
        backend: see ops/backend.py.
    Returns:
        (..., m) in x's dtype; computed in float32 or wider.
    Raises:
        InputError: a shape or dtype is wrong.
        BackendError: `backend` cannot run.
    Source:
        Zhang and Sennrich 2019 (arXiv 1910.07467), eq. 4, with eps inside the root.
    """
    check_floating("rms_norm", x=x, weight=weight)
    check_shapes("rms_norm", weight=(weight, x.shape[-1:]))
    return _IMPLEMENTATIONS.pick(backend, x)(x, weight, eps)
