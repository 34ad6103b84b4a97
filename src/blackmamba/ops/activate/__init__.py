"""The non-linearity of experts and dense feed-forward layers."""

from typing import Literal

from torch import Tensor

from blackmamba.errors import InputError
from blackmamba.ops.activate.gpu import activate_triton
from blackmamba.ops.activate.native import activate_native
from blackmamba.ops.activate.reference import activate_reference
from blackmamba.ops.backend import Backend, Implementations
from blackmamba.ops.checks import check_floating

_IMPLEMENTATIONS = Implementations(
    "activate",
    {"triton": activate_triton, "native": activate_native, "reference": activate_reference},
)


def activate(
    h: Tensor,
    activation: Literal["silu", "gelu"] = "silu",
    gated: bool = True,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """act(g) * u of [g | u] = h, or act(h) if not gated.

    Args:
        h: (..., 2f), or (..., f) if not gated; any floating-point dtype.
        activation: "silu" or "gelu" (the exact, erf form).
        gated: whether h is two halves.
        backend: see ops/backend.py.
    Returns:
        (..., f) in h's dtype.
    Raises:
        InputError: h is not of a floating-point dtype, has no dimension or an odd last one while
            gated, or an unknown activation.
        BackendError: `backend` cannot run.
    Source:
        Shazeer 2020 (arXiv 2002.05202), eq. 5 and 6; Hendrycks and Gimpel 2016 (arXiv 1606.08415).
    """
    check_floating("activate", h=h)
    if h.dim() == 0 or (gated and h.shape[-1] % 2):
        raise InputError(
            f"activate: h has shape {tuple(h.shape)}, must be (..., {'2f' if gated else 'f'})"
        )
    if activation not in ("silu", "gelu"):
        raise InputError(f"activate: activation={activation!r}, must be 'silu' or 'gelu'")
    return _IMPLEMENTATIONS.pick(backend, h)(h, activation, gated)
