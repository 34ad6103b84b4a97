"""What autograd, torch.compile and fake tensors need to know of the experts' native products.

Both kinds take x, expert_ids, weights and other tensors that have gradients, gelu and gated; they
give y and, for the gradient, fc1's output, the order of the choices and the groups' ends.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


def outputs(
    x: Tensor, expert_ids: Tensor, fc1: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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

    def run(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * len(ctx.needs_input_grad)
        needs_x, _ids, *others, _gelu, _gated = ctx.needs_input_grad
        needs = [needs_x, *others]
        found = backward(grad_y, *ctx.saved_tensors, ctx.gelu, ctx.gated, needs)
        x, *rest = (g if needed else None for g, needed in zip(found, needs, strict=True))
        return x, None, *rest, None, None

    return run
