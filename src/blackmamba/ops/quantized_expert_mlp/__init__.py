"""Feed-forward experts of each token, with the experts' matrices stored in 8 or 4 bits."""

from typing import Literal

from torch import Tensor

from blackmamba.errors import InputError
from blackmamba.ops.backend import Backend, Implementations
from blackmamba.ops.checks import check_dims, check_floating, check_integers, check_shapes
from blackmamba.ops.expert_mlp import chosen_shape
from blackmamba.ops.expert_mlp.choices import choices_per_token, repeated, summed
from blackmamba.ops.quantized_expert_mlp.native import quantized_expert_mlp_native
from blackmamba.ops.quantized_expert_mlp.reference import quantized_expert_mlp_reference
from blackmamba.ops.quantized_expert_mlp.torch_grouped import quantized_expert_mlp_grouped
from blackmamba.ops.quantized_linear import QuantizedWeight, check_inference, check_weight

_IMPLEMENTATIONS = Implementations(
    "quantized_expert_mlp",
    {
        "native": quantized_expert_mlp_native,
        "torch": quantized_expert_mlp_grouped,
        "reference": quantized_expert_mlp_reference,
    },
)


def quantized_expert_mlp(
    x: Tensor,
    expert_ids: Tensor,
    fc1: QuantizedWeight,
    fc2: QuantizedWeight,
    *,
    activation: Literal["silu", "gelu"] = "silu",
    gated: bool = True,
    fc1_bias: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    gate: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """`expert_mlp` of the matrices that `fc1` and `fc2` stand for; for inference only.

    Args:
        x: (t, m), any floating-point dtype; t may be 0.
        expert_ids: (t,) or (t, k) int64, each within 0 .. e - 1 (checked on CPU).
        fc1: (e, 2f, m) with rows [gate | up], or (e, f, m) if not gated.
        fc2: (e, m, f).
        activation, gated, fc1_bias, fc2_bias, gate: as for `expert_mlp`.
        backend: see ops/backend.py.
    Returns:
        (t, m) in x's dtype.
    Raises:
        InputError: a shape or dtype is wrong, an id is out of range, an unknown activation, or an
            input requires a gradient.
        BackendError: `backend` cannot run.
    Source:
        As `expert_mlp`.
    """
    name = "quantized_expert_mlp"
    check_dims(name, "x", x, "tm")
    check_weight(name, "fc1", fc1, 3)
    check_weight(name, "fc2", fc2, 3)
    check_floating(name, x=x, fc1_bias=fc1_bias, fc2_bias=fc2_bias, gate=gate)
    t, m = x.shape
    e, rows = fc1.shape[:2]
    wanted = {
        "fc1": (fc1.shape, (e, rows, m)),
        "fc2": (fc2.shape, (e, m, rows // 2 if gated else rows)),
    }
    for which, (shape, right) in wanted.items():
        if shape != right:
            raise InputError(f"{name}: {which} has shape {shape}, must be {right}")
    check_shapes(
        name,
        expert_ids=(expert_ids, chosen_shape(expert_ids, t)),
        fc1_bias=(fc1_bias, (e, rows)),
        fc2_bias=(fc2_bias, (e, m)),
        gate=(gate, expert_ids.shape),
    )
    if activation not in ("silu", "gelu"):
        raise InputError(f"{name}: activation={activation!r}, must be 'silu' or 'gelu'")
    check_integers(name, "expert_ids", expert_ids, e - 1)
    check_inference(name, x, gate)
    run = _IMPLEMENTATIONS.pick(backend, x)
    ids = expert_ids.flatten()
    scale = None if gate is None else gate.flatten()
    rows = repeated(x, choices_per_token(x, ids))
    y = run(rows, ids, fc1, fc2, activation, gated, fc1_bias, fc2_bias, scale)
    return y if expert_ids.dim() == 1 else summed(y, t)
