"""The gradient of quantised experts with respect to what they are given: they stay as they are.

Kept for it are the inputs alone. The backward pass writes out the experts' matrices once more, in
the inputs' dtype, and computes the layer again by `expert_mlp`, whose gradient it is.

Source: Dettmers et al. 2023 (arXiv 2305.14314), section 3, where matrices are written out in both
passes; our forward pass is that of inference.
"""

from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from blackmamba.ops.expert_mlp import expert_mlp
from blackmamba.ops.quantized_expert_mlp import quantized_expert_mlp
from blackmamba.ops.quantized_linear import QuantizedWeight, dequantize


def frozen_expert_mlp(
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
) -> Tensor:
    """`quantized_expert_mlp` with gradients of x and gate; the experts and their biases have none.

    Raises:
        InputError: as `quantized_expert_mlp`.
    """
    options = {"activation": activation, "gated": gated, "fc1_bias": fc1_bias, "fc2_bias": fc2_bias}
    return cast(Tensor, _Frozen.apply(x, gate, expert_ids, fc1, fc2, options))


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor | None,
        expert_ids: Tensor,
        fc1: QuantizedWeight,
        fc2: QuantizedWeight,
        options: dict[str, Any],
    ) -> Tensor:
        ctx.save_for_backward(x, gate, expert_ids)
        ctx.experts, ctx.options = (fc1, fc2), options
        return quantized_expert_mlp(x, expert_ids, fc1, fc2, gate=gate, **options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, gate, expert_ids = ctx.saved_tensors
        fc1, fc2 = (dequantize(experts, x.dtype) for experts in ctx.experts)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            gate = None if gate is None else gate.detach().requires_grad_()
            y = expert_mlp(x, expert_ids, fc1, fc2, gate=gate, **ctx.options)
        inputs = (x,) if gate is None else (x, gate)
        found = torch.autograd.grad(y, inputs, grads[0])
        return found[0], (None if gate is None else found[1]), None, None, None, None
