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
from blackmamba.ops.mamba_mixer.gpu import PromptWeights, mamba_mixer_of_prompt
from blackmamba.ops.prompt import gpu as kernels


class PromptPass:
    """What `model.prefill` computes, with the logits of each row's last token.

    What depends on the weights alone is computed here, once. Of few tokens routers see the norm
    before it is rounded: for a bfloat16 model the results differ from the model's by that.

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

    @torch.inference_mode()
    def __call__(
        self, model: BlackMamba, ids: Tensor, state: State | None, lengths: Tensor | None
    ) -> tuple[Tensor, State]:
        """Read ids (b, l) behind `state`; rows have `lengths` (b,) real tokens, at least 1.

        Returns:
            Logits (b, v), and the new memory.
        """
        b, l = ids.shape
        x, update, first = model.embedding.weight, None, ids.flatten()
        assert isinstance(x, Tensor)
        layers: list[LayerState] = [None] * len(self._mixers) if state is None else [*state.layers]
        for i, layer in enumerate(model._stack()):
            router = self._routers[i]
            if first is not None or (router is not None and len(x) <= kernels.FEW):
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
                update, layers[i] = self._mixed(layer, y.view(b, l, -1), i, layers[i], lengths)
            elif routes is not None and isinstance(fed, MoE):
                shared = None if fed.shared is None else partial(fed.shared, y)
                update = fed.routed(y, routes.expert_ids, routes.gate, shared)
            else:
                update = fed(y, balanced=False)[0] if isinstance(fed, MoE) else fed(y)
        ends = (
            torch.arange(1, b + 1, device=x.device) * l
            if lengths is None
            else (torch.arange(b, device=x.device) * l + lengths)
        )
        last = ends - 1
        assert update is not None  # there is a layer
        logits = model._logits(model._normed(x[last], update[last]))
        return logits, State(b, tuple(layers))

    def _mixed(
        self, layer: Layer, y: Tensor, i: int, state: LayerState, lengths: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        """What the Mamba layer of index i makes of y (b, l, m), as (t, m), and its new memory."""
        mixer, weights = layer.mixer, self._mixers[i]
        assert isinstance(mixer, Mamba)
        assert state is None or isinstance(state, MambaState)
        if weights is None:
            update, state = mixer(y, state, lengths)
            return update.flatten(0, 1), state
        xz = mixer.in_proj(y)
        before = first = None
        if state is not None:
            before, first = state.conv.to(xz.dtype), state.ssm
        y, conv, ssm = mamba_mixer_of_prompt(xz, weights, before, first, lengths)
        return mixer.out_proj(y.flatten(0, 1)), MambaState(conv, ssm)
