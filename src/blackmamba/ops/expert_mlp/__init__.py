"""One feed-forward expert per token, or several whose outputs are added up."""

from typing import Literal

from torch import Tensor

from blackmamba.errors import InputError
from blackmamba.ops.backend import Backend, Implementations
from blackmamba.ops.checks import check_dims, check_floating, check_integers, check_shapes
from blackmamba.ops.expert_mlp.choices import summed
from blackmamba.ops.expert_mlp.gpu import expert_mlp_gpu
from blackmamba.ops.expert_mlp.native import expert_mlp_native
from blackmamba.ops.expert_mlp.reference import expert_mlp_reference
from blackmamba.ops.expert_mlp.torch_grouped import expert_mlp_grouped

_IMPLEMENTATIONS = Implementations(
    "expert_mlp",
    {
        "native": expert_mlp_native,
        "triton": expert_mlp_gpu,
        "torch": expert_mlp_grouped,
        "reference": expert_mlp_reference,
    },
)


def expert_mlp(
    x: Tensor,
    expert_ids: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    *,
    activation: Literal["silu", "gelu"] = "silu",
    gated: bool = True,
    fc1_bias: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    gate: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """y_t = gate_t * MLP_{expert_ids[t]}(x_t); no token is dropped.

    An expert is fc2 (act(g) * u) with [g | u] = fc1 x, or fc2 act(fc1 x) if not gated.

    Args:
        x: (t, m), any floating-point dtype; t may be 0.
        expert_ids: (t,) int64, each within 0 .. e - 1 (checked on CPU); or (t, k) for k experts a
            token: then y_t is the sum over them, in float32 or wider before it is rounded.
        fc1: (e, 2f, m) with rows [gate | up], or (e, f, m) if not gated; cast to x's dtype.
        fc2: (e, m, f); cast to x's dtype.
        activation: "silu" or "gelu" (the exact, erf form).
        gated: whether fc1 gives two halves.
        fc1_bias: (e, 2f) or (e, f).
        fc2_bias: (e, m).
        gate: of the shape of expert_ids, scales each expert's output.
        backend: see ops/backend.py.
    Returns:
        (t, m) in x's dtype. Experts without a token get zero gradient.
    Raises:
        InputError: a shape or dtype is wrong, an id is out of range, or an unknown activation.
        BackendError: `backend` cannot run.
    Source:
        Fedus et al. 2021 (arXiv 2101.03961), eq. 2; Shazeer 2020 (arXiv 2002.05202), eq. 6, for
        the gated form.
    """
    name = "expert_mlp"
    check_dims(name, "x", x, "tm")
    check_dims(name, "fc1", fc1, "efm")
    check_dims(name, "fc2", fc2, "emf")
    check_floating(name, x=x, fc1=fc1, fc2=fc2, fc1_bias=fc1_bias, fc2_bias=fc2_bias, gate=gate)
    t, m = x.shape
    e, rows = fc1.shape[:2]
    check_shapes(
        name,
        expert_ids=(expert_ids, chosen_shape(expert_ids, t)),
        fc1=(fc1, (e, rows, m)),
        fc2=(fc2, (e, m, rows // 2 if gated else rows)),
        fc1_bias=(fc1_bias, (e, rows)),
        fc2_bias=(fc2_bias, (e, m)),
        gate=(gate, expert_ids.shape),
    )
    if activation not in ("silu", "gelu"):
        raise InputError(f"{name}: activation={activation!r}, must be 'silu' or 'gelu'")
    check_integers(name, "expert_ids", expert_ids, e - 1)
    run = _IMPLEMENTATIONS.pick(backend, x)
    ids = expert_ids.flatten()
    scale = None if gate is None else gate.flatten()
    y = run(x, ids, fc1, fc2, activation, gated, fc1_bias, fc2_bias, scale)
    return y if expert_ids.dim() == 1 else summed(y, t)


def chosen_shape(expert_ids: Tensor, t: int) -> tuple[int, ...]:
    """What `expert_ids` of t tokens must look like."""
    return (t,) if expert_ids.dim() != 2 else (t, max(1, expert_ids.shape[1]))
