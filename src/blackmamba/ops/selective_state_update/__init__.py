"""One token of the selective state-space recurrence."""

from torch import Tensor

from blackmamba.ops.backend import Backend, Implementations
from blackmamba.ops.checks import check_dims, check_floating, check_shapes
from blackmamba.ops.selective_state_update.native import selective_state_update_native
from blackmamba.ops.selective_state_update.reference import selective_state_update_reference

_IMPLEMENTATIONS = Implementations(
    "selective_state_update",
    {"native": selective_state_update_native, "reference": selective_state_update_reference},
    forward_only=("native",),
)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Advance the SSM by one token: h' = exp(delta A) h + delta B x, y = C h' + D x.

    Args:
        state: (b, d, n), h; float32 or wider, because it accumulates.
        x: (b, d).
        dt: (b, d); delta = dt + dt_bias, or softplus of it.
        A: (d, n), negative.
        B, C: (b, n).
        D: (d,), skip weights.
        z: (b, d); y is multiplied by silu(z).
        dt_bias: (d,).
        dt_softplus: whether delta is a softplus.
        backend: see ops/backend.py.
    Returns:
        y: (b, d), in x's dtype.
        state: (b, d, n), new memory; nothing is written in place.
    Raises:
        InputError: a shape disagrees with `state`, or a dtype is not floating-point.
        BackendError: `backend` cannot run.
    Source:
        Gu and Dao 2023 (arXiv 2312.00752), eq. 2; B by Euler, not eq. 4, as their code does.
    """
    name = "selective_state_update"
    check_dims(name, "state", state, "bdn")
    check_floating(name, state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    b, d, n = state.shape
    check_shapes(
        name,
        x=(x, (b, d)),
        dt=(dt, (b, d)),
        A=(A, (d, n)),
        B=(B, (b, n)),
        C=(C, (b, n)),
        D=(D, (d,)),
        z=(z, (b, d)),
        dt_bias=(dt_bias, (d,)),
    )
    run = _IMPLEMENTATIONS.pick(backend, state, x, dt, A, B, C, D, z, dt_bias)
    return run(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
