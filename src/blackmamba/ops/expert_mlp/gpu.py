"""Routed experts on the GPU: a counting sort, grouped products, Triton between them.

The products are those of products.cu where there is a Hopper, torch's elsewhere. Nothing waits for
the device: how many tokens an expert has is known there alone. Kept for the gradient are the input,
fc1's output and the order of the tokens; the rest is computed again. Few tokens without a gradient,
as in generation, have kernels of their own, which read each chosen expert's weights once and are
bound by that.
"""

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from blackmamba.ops import gpu
from blackmamba.ops.expert_mlp import hopper, library
from blackmamba.ops.expert_mlp.choices import choices_per_token, repeated, summed
from blackmamba.ops.expert_mlp.order import gathered, sort_by_expert
from blackmamba.ops.expert_mlp.torch_grouped import expert_mlp_grouped
from blackmamba.ops.gpu import tuning

FEW = 256
"""Most choices of which the kernels for few are faster than torch's grouped products."""
FEW_WITHOUT_PRODUCT = 512
"""The same where torch has no grouped product that leaves the host alone."""


@dataclasses.dataclass(frozen=True)
class FewCut:
    """How the products of few tokens are cut into programs."""

    rows: int
    """Of a weight."""
    numbers: int
    """Of each of them at a time."""
    warps: int
    stages: int


FEW_DEFAULTS = {16: FewCut(32, 128, 4, 5), 32: FewCut(64, 64, 4, 5), 64: FewCut(64, 64, 4, 5)}
"""By the tokens at once."""
FEW_CUTS = tuple(
    FewCut(rows, numbers, warps, stages)
    for rows, numbers, stages in (
        (16, 128, 5), (16, 256, 3), (32, 64, 5), (32, 128, 3), (32, 128, 5), (64, 64, 3),
        (64, 64, 6), (64, 128, 3), (128, 64, 3),
    )
    for warps in (4, 8)
)  # fmt: skip
"""What `blackmamba tune` tries."""


def expert_mlp_gpu(
    x: Tensor,
    expert_ids: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    activation: Literal["silu", "gelu"],
    gated: bool,
    fc1_bias: Tensor | None,
    fc2_bias: Tensor | None,
    gate: Tensor | None,
) -> Tensor:
    """`expert_mlp`; without these kernels where experts are not gated, have biases or are not of
    whole 16 bytes, and in other dtypes than bfloat16, which torch's grouped products take."""
    plain = fc1_bias is None and fc2_bias is None and gated and 0 not in x.shape
    aligned = not any(size % 8 for size in (*fc1.shape[1:], fc2.shape[2]))
    has_product = x.dtype == torch.bfloat16 and aligned
    few = FEW if has_product else FEW_WITHOUT_PRODUCT
    if plain and len(expert_ids) <= few and not torch.is_grad_enabled():
        fc1, fc2 = fc1.to(x.dtype), fc2.to(x.dtype)
        return _few(x, expert_ids, fc1, fc2, gate, activation == "gelu")
    if not (plain and has_product):
        return expert_mlp_grouped(
            x, expert_ids, fc1, fc2, activation, gated, fc1_bias, fc2_bias, gate
        )
    fc1, fc2 = fc1.to(x.dtype), fc2.to(x.dtype)
    inputs = (x, fc1, fc2, gate)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    return _forward(x, expert_ids, fc1, fc2, gate, activation == "gelu", keep)[0]


@torch.library.custom_op("blackmamba::expert_mlp_few", mutates_args=())
def _few(
    x: Tensor, expert_ids: Tensor, fc1: Tensor, fc2: Tensor, gate: Tensor | None, gelu: bool
) -> Tensor:
    """y, for few tokens."""
    from blackmamba.ops.expert_mlp import kernels

    e, m, f = fc2.shape
    x = repeated(x, choices_per_token(x, expert_ids))
    x = x if x.stride(1) == 1 else x.contiguous()
    order, ends = sort_by_expert(expert_ids, e)
    hidden, y = x.new_empty(len(x), f), x.new_empty(len(x), m)
    at_once = 16 if len(x) <= 64 else 32 if len(x) <= 128 else 64
    fc1, fc2 = fc1.contiguous(), fc2.contiguous()
    wide = x.dtype == torch.float32
    if gate is not None:
        gate = gate.contiguous()

    def run(cut: FewCut) -> None:
        numbers, stages = (min(cut.numbers, 64) // 2, 2) if wide else (cut.numbers, cut.stages)
        options: dict[str, Any] = {
            "M": at_once, "BN": cut.rows, "BK": numbers, "WIDE": wide or gpu.interpreted(),
            "num_warps": cut.warps, "num_stages": stages,
        }  # fmt: skip
        gpu.launch(
            kernels.few_in_kernel, (-(-f // cut.rows), e),
            x, order, ends, fc1, hidden, m, f, x.stride(0), GELU=gelu, **options,
        )  # fmt: skip
        gpu.launch(
            kernels.few_out_kernel, (-(-m // cut.rows), e),
            hidden, order, ends, fc2, x if gate is None else gate, y, m, f,
            HAS_GATE=gate is not None, **options,
        )  # fmt: skip

    size = f"tokens={tuning.rounded(len(x))} m={m} f={f} e={e} bytes={x.element_size()}"
    name = "expert_mlp of few"
    run(tuning.pick(name, size, FEW_DEFAULTS[at_once], lambda: FEW_CUTS, run))
    return y


@_few.register_fake
def _(x: Tensor, expert_ids: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(expert_ids.shape[0], x.shape[1])


MOST_ADDED = 16_384
"""Tokens up to which the places that `hopper.add_routed_` reads are worth their memory: 302 MB for
8 experts of width 1152."""


def adds_routed(stream: Tensor, fc1: Tensor, fc2: Tensor) -> bool:
    """Whether `hopper.add_routed_` is for a stream (t, m) and experts without biases: on a Hopper,
    for more tokens than `_few` is for and at most `MOST_ADDED`."""
    return FEW < len(stream) <= MOST_ADDED and hopper.fits(fc1, fc2)


def _products(*matrices: Tensor) -> Any:
    """The module whose products take these rows and weights."""
    return hopper if hopper.fits(*matrices) else library


@torch.library.custom_op("blackmamba::expert_mlp_gpu", mutates_args=())
def _forward(
    x: Tensor,
    expert_ids: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    gate: Tensor | None,
    gelu: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y; and for the gradient fc1's output, sorted by expert (empty if not `keep`), that order and
    the groups' ends."""
    order, ends = sort_by_expert(expert_ids, len(fc1))
    k = choices_per_token(x, expert_ids)
    rows = gathered(order if k == 1 else order // k, x)[0]
    products = _products(rows, fc1, fc2)
    hidden, h = products.gated(rows, fc1, ends, gelu, keep)
    gate = None if gate is None else gate.float().contiguous()
    y = products.placed(hidden, fc2, ends, order, gate)
    return y, x.new_empty(0) if h is None else h, order, ends


@torch.library.custom_op("blackmamba::expert_mlp_gpu_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    x: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    gate: Tensor | None,
    h: Tensor,
    order: Tensor,
    ends: Tensor,
    gelu: bool,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, fc1, fc2 and gate; empty for those not needed."""
    from blackmamba.ops.expert_mlp import kernels

    f, k = fc2.shape[2], choices_per_token(x, order)
    products = _products(h, fc1, fc2)
    needs_x, needs_fc1, needs_fc2, _ = needs
    if needs_fc1 and k == 1:
        grad_y, rows = gathered(order, grad_y, x)
    else:
        (grad_y,) = gathered(order, grad_y)
        rows = gathered(order // k, x)[0] if needs_fc1 else grad_y
    grad = products.product(grad_y, fc2, ends)
    grad_h, hidden = torch.empty_like(h), torch.empty_like(grad)
    grad_gate = x.new_empty(0) if gate is None else gate.new_empty(len(order))
    gpu.launch(
        kernels.activate_backward_kernel, (len(order),),
        grad, h, order, x if gate is None else gate.contiguous(), grad_h, hidden, grad_gate,
        len(order), f, GELU=gelu, HAS_GATE=gate is not None, BLOCK=1024,
    )  # fmt: skip
    none = grad_x = x.new_empty(0)
    if needs_x:
        grad_x = products.placed(grad_h, fc1, ends, order, by_columns=True)
        grad_x = grad_x if k == 1 else summed(grad_x, len(x))
    return [
        grad_x,
        products.gradient(grad_h, rows, ends) if needs_fc1 else none,
        products.gradient(grad_y, hidden, ends) if needs_fc2 else none,
        grad_gate,
    ]


@_forward.register_fake
def _(
    x: Tensor, expert_ids: Tensor, fc1: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t, int32, keep = expert_ids.shape[0], torch.int32, rest[-1]
    return (
        x.new_empty(t, x.shape[1]),
        x.new_empty(t, fc1.shape[1]) if keep else x.new_empty(0),
        expert_ids.new_empty(t, dtype=int32),
        expert_ids.new_empty(fc1.shape[0], dtype=int32),
    )


@_backward.register_fake
def _(
    grad_y: Tensor, x: Tensor, fc1: Tensor, fc2: Tensor, gate: Tensor | None, *rest: Any
) -> list[Tensor]:
    needs = rest[-1]
    shapes = [t.shape if needed else (0,) for t, needed in zip((x, fc1, fc2), needs, strict=False)]
    grad_gate = x.new_empty(0) if gate is None else gate.new_empty(gate.shape[0])
    return [*(x.new_empty(shape) for shape in shapes), grad_gate]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, fc1, fc2, gate, ctx.gelu, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, fc1, fc2, gate, *output[1:])


def _gradients(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 7
    x_ids, others = ctx.needs_input_grad[:1], ctx.needs_input_grad[2:5]
    needs = [*x_ids, *others]
    found = _backward(grad_y, *ctx.saved_tensors, ctx.gelu, needs)
    x, *rest = (g if needed else None for g, needed in zip(found, needs, strict=True))
    return x, None, *rest, None, None


_forward.register_autograd(_gradients, setup_context=_save)
