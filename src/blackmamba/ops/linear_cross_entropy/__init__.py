"""Cross-entropy of a linear head, without all of its logits at once."""

from torch import Tensor

from blackmamba.ops.backend import Backend, Implementations
from blackmamba.ops.checks import check_dims, check_floating, check_integers, check_shapes
from blackmamba.ops.linear_cross_entropy.chunked import (
    linear_cross_entropy_chunked,
    linear_cross_entropy_native,
)
from blackmamba.ops.linear_cross_entropy.gpu import linear_cross_entropy_triton
from blackmamba.ops.linear_cross_entropy.reference import linear_cross_entropy_reference

_IMPLEMENTATIONS = Implementations(
    "linear_cross_entropy",
    {
        "triton": linear_cross_entropy_triton,
        "native": linear_cross_entropy_native,
        "torch": linear_cross_entropy_chunked,
        "reference": linear_cross_entropy_reference,
    },
)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    divisor: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Sum over t of -log softmax(weight x_t + bias)[labels_t], over a divisor.

    Args:
        x: (t, m), any floating-point dtype; t may be 0.
        weight: (v, m), cast to x's dtype; its gradient is not rounded to that.
        labels: (t,) int64, each within 0 .. v - 1, or ignore_index.
        bias: (v,), as `weight`.
        ignore_index: tokens with this label add nothing and get no gradient.
        divisor: a scalar without a gradient, of any dtype, such as the number of labels for their
            mean; None: 1. Of what backward is called on, it costs no pass over the gradients.
        backend: see ops/backend.py.
    Returns:
        A scalar in nats, float32 or wider: the sum over the divisor; NaN for 0 labels over 0.
    Raises:
        InputError: a shape or dtype is wrong, or a label is out of range (checked on CPU).
        BackendError: `backend` cannot run.
    """
    name = "linear_cross_entropy"
    check_dims(name, "x", x, "tm")
    check_dims(name, "weight", weight, "vm")
    check_floating(name, x=x, weight=weight, bias=bias)
    (t, m), v = x.shape, weight.shape[0]
    check_shapes(name, weight=(weight, (v, m)), labels=(labels, (t,)), bias=(bias, (v,)))
    check_shapes(name, divisor=(divisor, ()))
    check_integers(name, "labels", labels, v - 1, ignored=ignore_index)
    return _IMPLEMENTATIONS.pick(backend, x)(x, weight, labels, bias, ignore_index, divisor)
