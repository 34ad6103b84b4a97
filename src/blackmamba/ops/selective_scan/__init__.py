"""The selective state-space recurrence over whole sequences."""

from torch import Tensor

from blackmamba.ops.backend import Backend, Implementations
from blackmamba.ops.checks import check_any_integers, check_dims, check_floating, check_shapes
from blackmamba.ops.documents import documents
from blackmamba.ops.selective_scan.gpu import selective_scan_gpu
from blackmamba.ops.selective_scan.native import selective_scan_native
from blackmamba.ops.selective_scan.reference import selective_scan_reference
from blackmamba.ops.selective_scan.torch_chunked import selective_scan_chunked

_IMPLEMENTATIONS = Implementations(
    "selective_scan",
    {
        "native": selective_scan_native,
        "triton": selective_scan_gpu,
        "torch": selective_scan_chunked,
        "reference": selective_scan_reference,
    },
)


def selective_scan(
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
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the SSM: h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t, y_t = C_t h_t + D x_t.

    Args:
        x: (b, l, d), any floating-point dtype; l may be 0.
        dt: (b, l, d); delta = dt + dt_bias, or softplus of it. Where that softplus is 0 (dt = -inf)
            the state passes through unchanged, bit for bit.
        A: (d, n), negative.
        B, C: (b, l, n).
        D: (d,), skip weights.
        z: (b, l, d); y is multiplied by silu(z).
        dt_bias: (d,).
        dt_softplus: whether delta is a softplus.
        initial_state: (b, d, n); None: zeros.
        seq_idx: (b, l), any integer dtype: which document each token belongs to, in rows that hold
            several. Where it differs from the token before, the state starts again from zero;
            `initial_state` is the first document's and `final_state` the last one's.
        cu_seqlens: the same of a single row, by where documents end: (documents + 1,), any integer
            dtype, rising from 0 to l.
        backend: see ops/backend.py.
    Returns:
        y: (b, l, d), in x's dtype.
        final_state: (b, d, n), float32 or wider; computed as that throughout.
    Raises:
        InputError: a shape disagrees with x and A, or a dtype is not floating-point (of
            seq_idx, cu_seqlens: not an integer one); both of these are given.
        BackendError: `backend` cannot run.
    Source:
        Gu and Dao 2023 (arXiv 2312.00752), eq. 2 and algorithm 2; B by Euler, not eq. 4, as their
        code does.
    """
    name = "selective_scan"
    check_dims(name, "x", x, "bld")
    check_dims(name, "A", A, "dn")
    check_floating(name, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    check_floating(name, initial_state=initial_state)
    seq_idx = documents(name, x, seq_idx, cu_seqlens)
    if seq_idx is not None:
        check_any_integers(name, "seq_idx", seq_idx)
    b, l, d = x.shape
    n = A.shape[1]
    check_shapes(
        name,
        dt=(dt, (b, l, d)),
        A=(A, (d, n)),
        B=(B, (b, l, n)),
        C=(C, (b, l, n)),
        D=(D, (d,)),
        z=(z, (b, l, d)),
        dt_bias=(dt_bias, (d,)),
        initial_state=(initial_state, (b, d, n)),
        seq_idx=(seq_idx, (b, l)),
    )
    run = _IMPLEMENTATIONS.pick(backend, x, dt, A, B, C, D, z, dt_bias, initial_state)
    return run(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx)
