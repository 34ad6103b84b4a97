"""One step of AdamW over many tensors, in place, with parameters of 16 bits if wanted."""

from collections.abc import Sequence

import torch
from torch import Tensor

from blackmamba.errors import InputError
from blackmamba.ops.adamw.gpu import adamw_triton, global_norm_triton
from blackmamba.ops.adamw.native import adamw_native, global_norm_native
from blackmamba.ops.adamw.reference import adamw_reference, global_norm_reference
from blackmamba.ops.adamw.tensors import AdamWTensors
from blackmamba.ops.backend import Backend, Implementations

__all__ = ["AdamWTensors", "adamw_", "adamw_factors", "global_norm"]

_IMPLEMENTATIONS = Implementations(
    "adamw", {"triton": adamw_triton, "native": adamw_native, "reference": adamw_reference}
)

_NORM_IMPLEMENTATIONS = Implementations(
    "global_norm",
    {
        "triton": global_norm_triton,
        "native": global_norm_native,
        "reference": global_norm_reference,
    },
)


def adamw_(
    tensors: Sequence[AdamWTensors],
    factors: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    backend: Backend = "auto",
) -> None:
    """Update parameters and moments, if factors say so; nothing waits for the device.

        m = beta1 m + (1 - beta1) g          p = p - lr decay p
        v = beta2 v + (1 - beta2) g^2        p = p - lr m c1 / (sqrt(v) c2 + eps)

    where g is the gradient times a factor, and c1 = 1 / (1 - beta1^n), c2 = 1 / sqrt(1 - beta2^n)
    at the n-th update. All arithmetic is in float32. A parameter that is narrower is rounded from
    its master, which then is what is updated, or has none and is rounded at random: up or down with
    probabilities that make the mean right, so that many small updates add up as they should.

    Args:
        tensors: a parameter each, with its gradient and its moments.
        factors: (6,) float64 on their device, see `adamw_factors`.
        beta1, beta2, eps: of AdamW.
        backend: see ops/backend.py.
    Raises:
        InputError: tensors that do not go together.
        BackendError: `backend` cannot run.
    Source:
        Loshchilov and Hutter 2019 (arXiv 1711.05101), algorithm 2. Stochastic rounding: Gupta et
        al. 2015 (arXiv 1502.02551), section 3.
    """
    for t in tensors:
        t.check()
    if factors.shape != (6,) or factors.dtype != torch.float64:
        raise InputError(
            f"adamw: factors of shape {tuple(factors.shape)}, {factors.dtype}: "
            "must be (6,), torch.float64"
        )
    every = [t.parameter for t in tensors] + [t.gradient for t in tensors]
    _IMPLEMENTATIONS.pick(backend, *every)(tensors, factors, beta1, beta2, eps)


def adamw_factors(
    lr: float | Tensor,
    step: Tensor,
    *,
    beta1: float,
    beta2: float,
    gradient_scale: Tensor | float = 1.0,
    go: Tensor | bool = True,
) -> Tensor:
    """What `adamw_` is told by the device itself, so that the host need not know.

    Args:
        lr: learning rate.
        step: a scalar on the device: how many updates there were.
        beta1, beta2: of AdamW.
        gradient_scale: what gradients are multiplied by.
        go: whether there is an update; otherwise everything stays as it is.
    Returns:
        (6,) float64: lr, c1, c2, gradient scale, go and a seed.
    """
    n = step.double() + 1
    scalars = (
        lr,
        1 / (1 - beta1**n),
        (1 - beta2**n).rsqrt(),
        gradient_scale,
        go,
        n,
    )
    return torch.stack(
        [s.double() if isinstance(s, Tensor) else torch.full_like(n, float(s)) for s in scalars]
    )


def global_norm(tensors: Sequence[Tensor], *, backend: Backend = "auto") -> Tensor:
    """The Euclidean norm of all numbers of all tensors together.

    Args:
        tensors: at least one, any shapes and floating-point dtypes.
        backend: see ops/backend.py.
    Returns:
        A scalar on their device, float32 or wider.
    Raises:
        InputError: there is no tensor.
        BackendError: `backend` cannot run.
    """
    if not tensors:
        raise InputError("global_norm: tensors is empty")
    return _NORM_IMPLEMENTATIONS.pick(backend, *tensors)(tensors)
