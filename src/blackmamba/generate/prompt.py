"""A pass over prompts on a GPU, for recording: few launches, and the residual stream in one place.

Letters: b batch, l sequence, t tokens (b l), m d_model, d d_inner, v vocabulary.
"""

from functools import partial

import torch
from torch import Tensor

from blackmamba.model import BlackMamba, State
from blackmamba.model.layer import Layer
from blackmamba.model.mamba import Mamba
from blackmamba.model.moe import MoE
from blackmamba.model.state import LayerState, MambaState
from blackmamba.ops import linear
from blackmamba.ops.expert_mlp.gpu import adds_routed
from blackmamba.ops.expert_mlp.hopper import add_routed_
from blackmamba.ops.mamba_mixer.gpu import (
    PromptWeights,
    mamba_mixer_of_last,
    mamba_mixer_of_prompt,
)
from blackmamba.ops.prompt import gpu as kernels


class PromptPass:
    """What `model.prefill` computes, with the logits of each row's last token.

    What depends on the weights alone is computed here, once. What no memory and no logits depend on
    is left out: behind the last mixer, all tokens but each row's last. Where norm and choice are
    one kernel, routers see the norm before it is rounded: the results of a bfloat16 model differ
    from the model's by that. Where experts add to the stream (`add_routed_`), their rows take
    2 e t m bytes while a layer is computed; in which order they lie changes no result.

    Args:
        model: in evaluation mode; sequential layers, each a Mamba, MLP or MoE layer without biases.
            Its weights must not change or move.
    """

    @torch.no_grad()
    def __init__(self, model: BlackMamba):
        self._mixers: list[PromptWeights | None] = []
        self._routers: list[tuple[Tensor, Tensor] | None] = []
        for layer in model._stack():
            mixer, fed = layer.mixer, layer.feed_forward
            weights = router = None
            if isinstance(mixer, Mamba) and mixer.dt_norm is None:
                weights = PromptWeights.of(
                    mixer.conv_weight, mixer.conv_bias, mixer.x_proj.weight, mixer.dt_proj.weight,
                    mixer.dt_bias, mixer.decay_rates(), mixer.D, model.compute_dtype,
                )  # fmt: skip
            if isinstance(fed, MoE) and fed.router.is_plain and kernels.routable(fed.router.weight):
                router = fed.router.weight * layer.norm.weight, fed.router.bias
            self._mixers.append(weights)
            self._routers.append(router)
        mixing = [i for i, layer in enumerate(model._stack()) if layer.mixer is not None]
        self._last_mixer = mixing[-1] if mixing else -1

    @torch.inference_mode()
    def __call__(
        self, model: BlackMamba, ids: Tensor, state: State | None, lengths: Tensor | None
    ) -> tuple[Tensor, State]:
        """Read ids (b, l) behind `state`; rows have `lengths` (b,) real tokens, at least 1.

        Returns:
            Logits (b, v), and the new memory.
        """
        b, l = ids.shape
        ends = (
            torch.arange(1, b + 1, device=ids.device) * l
            if lengths is None
            else (torch.arange(b, device=ids.device) * l + lengths)
        )
        last = ends - 1
        x, update, first = model.embedding.weight, None, ids.flatten()
        assert isinstance(x, Tensor)
        if self._last_mixer < 0:
            first = first[last]
        layers: list[LayerState] = [None] * len(self._mixers) if state is None else [*state.layers]
        counts = ids.new_zeros(len(layers), kernels.MOST_EXPERTS, dtype=torch.int32)
        for i, layer in enumerate(model._stack()):
            router = self._routers[i]
            if (
                router is not None
                and update is not None
                and kernels.chooses(x, update, model.compute_dtype, router[0])
            ):
                experts = _plain_experts(layer.feed_forward)
                if experts is not None and adds_routed(x, *experts):
                    of_layer = counts[i, : len(router[0])]
                    _add_experts_(x, update, layer, router, experts, of_layer)
                    update = None
                    continue
                y, routes = kernels.norm_and_choice(
                    x, update, layer.norm.weight, layer.norm.eps, router
                )
            elif first is not None or (router is not None and len(x) <= kernels.FEW):
                x, y, routes = kernels.norm(
                    x, layer.norm.weight, layer.norm.eps, model.compute_dtype, update=update,
                    ids=first, stream=model.residual_dtype, router=router,
                )  # fmt: skip
                first = None
            else:
                x, y = layer.norm.add(x, update, model.compute_dtype)
                routes = None
            fed = layer.feed_forward
            if fed is None:
                of = last if i == self._last_mixer else None
                y = y.view(b, l, -1)
                update, layers[i] = self._mixed(layer, y, i, layers[i], lengths, of)
                x = x if of is None else x[of]
            elif routes is not None and isinstance(fed, MoE):
                shared = None if fed.shared is None else partial(fed.shared, y)
                update = fed.routed(y, routes.expert_ids, routes.gate, shared)
            else:
                update = fed(y, balanced=False)[0] if isinstance(fed, MoE) else fed(y)
        logits = model._logits(model._normed(x, update))
        return logits, State(b, tuple(layers))

    def _mixed(
        self,
        layer: Layer,
        y: Tensor,
        i: int,
        state: LayerState,
        lengths: Tensor | None,
        last: Tensor | None,
    ) -> tuple[Tensor, LayerState]:
        """What the Mamba layer of index i makes of y (b, l, m), as (t, m), and its new memory.

        Args:
            last: (b,), of which of the t tokens alone, as (b, m); None: of all.
        """
        mixer, weights = layer.mixer, self._mixers[i]
        assert isinstance(mixer, Mamba)
        assert state is None or isinstance(state, MambaState)
        if weights is None:
            update, state = mixer(y, state, lengths)
            update = update.flatten(0, 1)
            return update if last is None else update[last], state
        before = first = None
        if state is not None:
            before, first = state.conv.to(y.dtype), state.ssm
        if last is None:
            xz = mixer.in_proj(y)
            y, conv, ssm = mamba_mixer_of_prompt(xz, weights, before, first, lengths)
            y = y.flatten(0, 1)
        else:
            of_x, of_z = mixer.in_proj.weight.to(y.dtype).chunk(2)
            x, z = linear(y, of_x), linear(y.flatten(0, 1)[last], of_z)
            y, conv, ssm = mamba_mixer_of_last(x, z, weights, before, first, lengths, last)
        return mixer.out_proj(y), MambaState(conv, ssm)


def _plain_experts(fed: object) -> tuple[Tensor, Tensor] | None:
    """fc1 and fc2, if they are all that becomes of a token."""
    if not isinstance(fed, MoE) or not fed.gated or fed.fc1_bias is not None:
        return None
    if fed.shared is not None or fed.spread_experts is not None:
        return None
    fc1, fc2 = fed.fc1, fed.fc2
    return (fc1, fc2) if isinstance(fc1, Tensor) and isinstance(fc2, Tensor) else None


def _add_experts_(
    x: Tensor,
    update: Tensor,
    layer: Layer,
    router: tuple[Tensor, Tensor],
    experts: tuple[Tensor, Tensor],
    counts: Tensor,
) -> None:
    """x += update, and then what experts make of x's norm, by `counts` (e,) of zeros."""
    norm, fed = layer.norm, layer.feed_forward
    assert isinstance(fed, MoE)
    y, places = kernels.norm_and_places(x, update, norm.weight, norm.eps, router, counts)
    gelu = fed.activation == "gelu"
    add_routed_(x, y, places.counts, places.order, places.gate, *experts, gelu)
