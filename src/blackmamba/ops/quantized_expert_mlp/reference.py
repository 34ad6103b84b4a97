"""What `quantized_expert_mlp` means: `expert_mlp` with the chosen experts written out."""

from torch import Tensor

from blackmamba.ops.checks import wide_dtype
from blackmamba.ops.expert_mlp.reference import expert_mlp_reference
from blackmamba.ops.quantized_linear import QuantizedWeight, dequantize


def quantized_expert_mlp_reference(
    x: Tensor,
    expert_ids: Tensor,
    fc1: QuantizedWeight,
    fc2: QuantizedWeight,
    activation: str,
    gated: bool,
    fc1_bias: Tensor | None,
    fc2_bias: Tensor | None,
    gate: Tensor | None,
) -> Tensor:
    """Computed in float32 or wider. Float64 in, float64 out."""
    wide = wide_dtype(x)
    fc1_efm, fc2_emf = dequantize(fc1, wide), dequantize(fc2, wide)
    y = expert_mlp_reference(
        x.to(wide), expert_ids, fc1_efm, fc2_emf, activation, gated, fc1_bias, fc2_bias, gate
    )
    return y.to(x.dtype)
