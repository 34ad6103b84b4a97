"""The router's product: float32 logits of rows that may be narrower."""

from torch import Tensor

from blackmamba.ops.backend import Backend, Implementations
from blackmamba.ops.checks import check_dims, check_floating, check_shapes
from blackmamba.ops.router_logits.gpu import router_choice_triton, router_logits_triton
from blackmamba.ops.router_logits.native import router_logits_native
from blackmamba.ops.router_logits.reference import (
    router_choice_reference,
    router_logits_reference,
)

_IMPLEMENTATIONS = Implementations(
    "router_logits",
    {
        "triton": router_logits_triton,
        "native": router_logits_native,
        "reference": router_logits_reference,
    },
)
_CHOICES = Implementations(
    "router_choice",
    {"triton": router_choice_triton, "reference": router_choice_reference},
    forward_only=("triton",),
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
    _check("router_logits", x, weight, bias)
    return _IMPLEMENTATIONS.pick(backend, x, weight, bias)(x, weight, bias)


def router_choice(
    x: Tensor, weight: Tensor, bias: Tensor, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """The expert of the largest logit of each row, of equal ones the first, and its gate.

    Args:
        x, weight, bias: see `router_logits`; e is at least 1.
        backend: see ops/backend.py; "triton" has no gradient.
    Returns:
        logits: (t, e), those of `router_logits`.
        expert_ids: (t,) int64.
        gate: (t,) in weight's dtype, the sigmoid of the largest logit.
    Raises:
        InputError, BackendError: as `router_logits`.
    """
    _check("router_choice", x, weight, bias)
    return _CHOICES.pick(backend, x, weight, bias)(x, weight, bias)


def _check(name: str, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    check_dims(name, "x", x, "tm")
    check_dims(name, "weight", weight, "em")
    check_floating(name, x=x, weight=weight, bias=bias)
    e = len(weight)
    check_shapes(name, weight=(weight, (e, x.shape[1])), bias=(bias, (e,)))
