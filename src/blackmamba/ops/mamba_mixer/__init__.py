"""What a Mamba layer does between its outer projections, over whole sequences."""

from torch import Tensor

from blackmamba.ops.backend import Backend, Implementations
from blackmamba.ops.checks import check_any_integers, check_dims, check_floating, check_shapes
from blackmamba.ops.mamba_mixer.gpu import mamba_mixer_gpu
from blackmamba.ops.mamba_mixer.native import mamba_mixer_native
from blackmamba.ops.mamba_mixer.reference import mamba_mixer_reference

_IMPLEMENTATIONS = Implementations(
    "mamba_mixer",
    {
        "triton": mamba_mixer_gpu,
        "native": mamba_mixer_native,
        "torch": mamba_mixer_reference,  # as BLACKMAMBA_BACKEND=torch has each operation in it
        "reference": mamba_mixer_reference,
    },
)


def mamba_mixer(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    seq_idx: Tensor | None = None,
    recompute: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal convolution, SiLU, dt, B and C of each token, selective scan, gate.

    One operation, because then its gradients need not be put together: halves of xz's gradient and
    parts of x_proj's are written where they belong.

    Args:
        xz: (b, l, 2 d), columns [x | z]; any floating-point dtype.
        conv_weight: (d, k), conv_bias: (d,), x_proj: (r + 2 n, d), rows [dt | B | C], and
            dt_proj: (d, r): in xz's dtype.
        dt_bias: (d,), A: (d, n), negative, and D: (d,).
        seq_idx: (b, l), any integer dtype: which document each token belongs to; a document sees
            nothing of the one before it in its row.
        recompute: whether the convolution is computed again in the backward pass and not kept.
        backend: see ops/backend.py.
    Returns:
        y: (b, l, d) in xz's dtype.
        final_state: (b, d, n), float32 or wider; that of the scan.
    Raises:
        InputError: a shape or dtype is wrong.
        BackendError: `backend` cannot run.
    Source:
        Gu and Dao 2023 (arXiv 2312.00752), section 3.4, figure 3 and algorithm 2.
    """
    name = "mamba_mixer"
    check_dims(name, "xz", xz, "blc")
    check_dims(name, "A", A, "dn")
    check_dims(name, "conv_weight", conv_weight, "dk")
    check_dims(name, "dt_proj", dt_proj, "dr")
    (b, l, _), (d, n), k, r = xz.shape, A.shape, conv_weight.shape[1], dt_proj.shape[1]
    check_floating(name, xz=xz, dt_bias=dt_bias, A=A, D=D)
    check_shapes(
        name,
        xz=(xz, (b, l, 2 * d)),
        conv_weight=(conv_weight, (d, k)),
        conv_bias=(conv_bias, (d,)),
        x_proj=(x_proj, (r + 2 * n, d)),
        dt_proj=(dt_proj, (d, r)),
        dt_bias=(dt_bias, (d,)),
        D=(D, (d,)),
        seq_idx=(seq_idx, (b, l)),
    )
    if seq_idx is not None:
        check_any_integers(name, "seq_idx", seq_idx)
    inputs = (xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D)
    return _IMPLEMENTATIONS.pick(backend, *inputs)(*inputs, seq_idx, recompute)
