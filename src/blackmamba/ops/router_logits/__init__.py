"""The router's product: float32 logits of rows that may be narrower."""

from torch import Tensor

from blackmamba.ops.backend import Backend, Implementations
from blackmamba.ops.checks import check_dims, check_floating, check_shapes
from blackmamba.ops.router_logits.gpu import router_logits_triton
from blackmamba.ops.router_logits.reference import router_logits_reference

_IMPLEMENTATIONS = Implementations(
    "router_logits", {"triton": router_logits_triton, "reference": router_logits_reference}
)


def router_logits(x: Tensor, weight: Tensor, bias: Tensor, *, backend: Backend = "auto") -> Tensor:
    """weight x + bias in the weight's dtype, which may be wider than x's.

    Args:
        x: (t, m), any floating-point dtype; t may be 0.
        weight: (e, m), float32 or wider in the model.
        bias: (e,), in weight's dtype.
        backend: see ops/backend.py.
    Returns:
        (t, e) in weight's dtype. x is not rounded, nor is any sum.
    Raises:
        InputError: a shape or dtype is wrong.
        BackendError: `backend` cannot run.
    """
    name = "router_logits"
    check_dims(name, "x", x, "tm")
    check_dims(name, "weight", weight, "em")
    check_floating(name, x=x, weight=weight, bias=bias)
    e = len(weight)
    check_shapes(name, weight=(weight, (e, x.shape[1])), bias=(bias, (e,)))
    return _IMPLEMENTATIONS.pick(backend, x, weight, bias)(x, weight, bias)
