"""The experts' native products as one node of the graph, and the order of the tokens.

Also what torch.compile and fake tensors need to know of them.

Both kinds take x, expert_ids, weights and other tensors that have gradients, gelu and gated; they
give y and, for the gradient, fc1's output, the order of the choices and the groups' ends.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from blackmamba.ops import native
from blackmamba.ops.checks import check_integers

_Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def sorted_by_expert(expert_ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """Choices (t,) of 0 .. n_experts - 1: those of the first expert, of the second, ..., each as
    they stand; and how many of them there are up to each expert's last.

    Raises:
        InputError: another id, which a compiled program has not looked for.
    """
    ids = expert_ids.contiguous()
    order, ends = ids.new_empty(len(ids)), ids.new_empty(n_experts)
    if not native.extension().grouped_order(
        ids.data_ptr(), len(ids), n_experts, order.data_ptr(), ends.data_ptr()
    ):
        check_integers("expert_mlp", "expert_ids", ids, n_experts - 1)
    return order, ends


def run(
    forward: Callable[..., _Outputs], backward: Callable[..., list[Tensor]], inputs: Sequence[Any]
) -> Tensor:
    """y, of passes that are no custom operations: those cost more for each call."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        return cast(Tensor, _Experts.apply(forward, backward, *inputs))
    return forward(*inputs)[0]


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Any, backward: Any, *inputs: Any) -> Tensor:
        y, *kept = forward(*inputs)
        *tensors, ctx.gelu, ctx.gated = inputs
        ctx.run = backward
        ctx.save_for_backward(*tensors, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        _, _, *needs = ctx.needs_input_grad
        return None, None, *_of_inputs(ctx, ctx.run, grads[0], needs)


def outputs(x: Tensor, expert_ids: Tensor, fc1: Tensor, *_: Any) -> _Outputs:
    """Memory for what the forward pass gives."""
    n_choices = expert_ids.shape[0]
    return (
        x.new_empty(n_choices, x.shape[1]),
        x.new_empty(n_choices, fc1.shape[1]),
        expert_ids.new_empty(n_choices),
        expert_ids.new_empty(fc1.shape[0]),
    )


def empty_gradients(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """Memory for each gradient, x's first; without numbers where it is not needed."""
    x = inputs[0]
    assert x is not None
    return [
        (x if t is None else t).new_empty(t.shape if needed and t is not None else 0)
        for t, needed in zip(inputs, needs, strict=True)
    ]


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the tensors for `gradients`."""
    *tensors, ctx.gelu, ctx.gated = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def gradients(backward: Callable[..., list[Tensor]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Autograd's backward function of a pass that takes y's gradient, what `save` kept, gelu, gated
    and whether each gradient is needed."""

    def of_node(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * len(ctx.needs_input_grad)
        return _of_inputs(ctx, backward, grad_y, ctx.needs_input_grad)

    return of_node


def _of_inputs(
    ctx: Any, backward: Callable[..., list[Tensor]], grad_y: Tensor, inputs_need: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradient of each input, or None: ids, gelu and gated have none."""
    needs_x, _ids, *others, _gelu, _gated = inputs_need
    needs = [needs_x, *others]
    found = backward(grad_y, *ctx.saved_tensors, ctx.gelu, ctx.gated, needs)
    x, *rest = (g if needed else None for g, needed in zip(found, needs, strict=True))
    return x, None, *rest, None, None
