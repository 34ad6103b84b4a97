"""Balanced assignment of tokens to experts."""

from typing import Literal

import torch
from torch import Tensor

from blackmamba.errors import InputError
from blackmamba.ops.backend import Backend, Implementations
from blackmamba.ops.checks import check_dims, check_floating
from blackmamba.ops.sinkhorn import gpu, native
from blackmamba.ops.sinkhorn.reference import (
    SinkhornResult,
    SinkhornStep,
    sinkhorn_reference,
    sinkhorn_steps,
)

__all__ = ["SinkhornResult", "SinkhornStep", "sinkhorn", "sinkhorn_choice", "sinkhorn_steps"]

_IMPLEMENTATIONS = Implementations("sinkhorn", {"reference": sinkhorn_reference})


def _reference_choice(
    logits: Tensor, scale: float, start: str, tolerance: float, max_iterations: int
) -> Tensor:
    return sinkhorn_reference(logits, scale, start, tolerance, max_iterations).plan.argmax(dim=-1)


_CHOICES = Implementations(
    "sinkhorn_choice",
    {"triton": gpu.choice, "native": native.choice, "reference": _reference_choice},
)


def sinkhorn(
    logits: Tensor,
    *,
    scale: float = 2.0,
    start: Literal["paper", "ones"] = "paper",
    tolerance: float = 1e-4,
    max_iterations: int = 1000,
    backend: Backend = "auto",
) -> SinkhornResult:
    """Scale rows and columns of exp(scale * logits) until all rows and all columns sum alike.

    Args:
        logits: (t, e), any finite values, any floating-point dtype; t may be 0.
        scale: inverse temperature; the authors' code has 2.
        start: of the column factors d1: "ones", or "paper": 1 / (e * column sum), which is one more
            column step.
        tolerance: stop once every row and column sum is right within this share of itself. This
            test does not depend on t, e or the scale of the factors.
        max_iterations: stop after so many in any case, at least 1.
        backend: see ops/backend.py.
    Returns:
        plan: (t, e), rows sum to 1 / t, columns to 1 / e; float32 or wider.
        iterations: row-and-column steps taken.
        error: the largest relative error of a marginal of `plan`.
    Raises:
        InputError: a wrong shape or dtype, no expert, or a parameter out of range.
        BackendError: `backend` cannot run.
    Source:
        BlackMamba (arXiv 2402.01771), section on the router and its appendix; Sinkhorn 1967. We
        iterate in log space and test the marginals, where the authors' code tests the change of d1
        against a fixed 1e-4, which thousands of tokens pass at once.
    """
    _check(logits, scale, start, tolerance, max_iterations)
    return _IMPLEMENTATIONS.pick(backend, logits)(logits, scale, start, tolerance, max_iterations)


def sinkhorn_choice(
    logits: Tensor,
    *,
    scale: float = 2.0,
    start: Literal["paper", "ones"] = "paper",
    tolerance: float = 1e-4,
    max_iterations: int = 1000,
    k: int = 1,
    backend: Backend = "auto",
) -> Tensor:
    """The expert of each token: where its row of the plan is largest; or its k experts.

    One node for torch.compile, which cannot trace an iteration that stops on what it computes. No
    gradient flows through it.

    Args:
        logits, scale, start, tolerance, max_iterations, backend: see `sinkhorn`.
        k: experts of a token, at most e.
    Returns:
        (t,) int64, each 0 .. e - 1; for k > 1 (t, k), the largest first. Only k = 1 has a kernel on
        a GPU: more wait for the device.
    Raises:
        InputError, BackendError: as `sinkhorn`; and k is not 1 .. e.
    """
    if not 1 <= k <= max(1, logits.shape[-1]):
        raise InputError(f"sinkhorn: k={k}, must be 1 .. {logits.shape[-1]}, the experts")
    if k > 1:
        return _choices(logits.detach(), k, scale, start, tolerance, max_iterations, backend)
    return _choice(logits.detach(), scale, start, tolerance, max_iterations, backend)


@torch.library.custom_op("blackmamba::sinkhorn_choice", mutates_args=())
def _choice(
    logits: Tensor, scale: float, start: str, tolerance: float, max_iterations: int, backend: str
) -> Tensor:
    _check(logits, scale, start, tolerance, max_iterations)
    if backend == "auto" and logits.shape[1] > gpu.MOST_EXPERTS:
        backend = "reference"
    run = _CHOICES.pick(backend, logits)  # pyright: ignore[reportArgumentType] # a schema has no Literal
    return run(logits, scale, start, tolerance, max_iterations)


@torch.library.custom_op("blackmamba::sinkhorn_choices", mutates_args=())
def _choices(
    logits: Tensor,
    k: int,
    scale: float,
    start: str,
    tolerance: float,
    max_iterations: int,
    backend: str,
) -> Tensor:
    _check(logits, scale, start, tolerance, max_iterations)
    run = _IMPLEMENTATIONS.pick(backend, logits)  # pyright: ignore[reportArgumentType] # as above
    plan = run(logits, scale, start, tolerance, max_iterations).plan
    return plan.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()


def _check(logits: Tensor, scale: float, start: str, tolerance: float, max_iterations: int) -> None:
    check_dims("sinkhorn", "logits", logits, "te")
    check_floating("sinkhorn", logits=logits)
    if logits.shape[1] == 0:
        raise InputError(f"sinkhorn: logits has shape {tuple(logits.shape)}, needs an expert")
    if start not in ("paper", "ones"):
        raise InputError(f"sinkhorn: start={start!r}, must be 'paper' or 'ones'")
    if max_iterations < 1:
        raise InputError(f"sinkhorn: max_iterations={max_iterations}, must be at least 1")
    if not (scale > 0 and tolerance > 0):
        raise InputError(f"sinkhorn: scale={scale}, tolerance={tolerance}, must be positive")


@_choice.register_fake
def _(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


@_choices.register_fake
def _(logits: Tensor, k: int, *_: object) -> Tensor:
    return logits.new_empty(logits.shape[0], k, dtype=torch.int64)
