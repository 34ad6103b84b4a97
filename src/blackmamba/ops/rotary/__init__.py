"""Rotary positions: pairs of numbers of each head turned by angles."""

from torch import Tensor

from blackmamba.errors import InputError
from blackmamba.ops.backend import Backend, Implementations
from blackmamba.ops.checks import check_dims, check_floating
from blackmamba.ops.rotary.gpu import rotary_triton
from blackmamba.ops.rotary.reference import rotary_reference

_IMPLEMENTATIONS = Implementations(
    "rotary", {"triton": rotary_triton, "reference": rotary_reference}
)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Turn each pair (x[i], x[i + h/2]) of every head by its token's angle i.

    Args:
        x: (b, l, n, h), n heads of even h; any floating-point dtype.
        cos, sin: (b, l, h/2), or (1, l, h/2) for all rows alike; float32, or as wide as x. No
            gradient flows to them.
        backend: see ops/backend.py.
    Returns:
        (b, l, n, h) in x's dtype; computed in float32 at least.
    Raises:
        InputError: a shape or dtype is off.
        BackendError: `backend` cannot run.
    Source:
        Su et al. 2021 (arXiv 2104.09864), eq. 34, with halves in the place of neighbours.
    """
    check_dims("rotary", "x", x, "blnh")
    check_floating("rotary", x=x, cos=cos, sin=sin)
    b, l, _, h = x.shape
    for name, table in (("cos", cos), ("sin", sin)):
        if tuple(table.shape) not in ((b, l, h // 2), (1, l, h // 2)) or h % 2:
            raise InputError(
                f"rotary: {name} has shape {tuple(table.shape)}, x {tuple(x.shape)}; it must be "
                f"({b}, {l}, h/2) or (1, {l}, h/2), and h even"
            )
    if cos.shape != sin.shape:
        raise InputError(f"rotary: cos has shape {tuple(cos.shape)}, sin {tuple(sin.shape)}")
    return _IMPLEMENTATIONS.pick(backend, x)(x, cos.detach(), sin.detach())
