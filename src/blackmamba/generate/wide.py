"""A step of many sequences on a GPU, for recording: the model's own parts, its memory in place.

Letters: b batch, d d_inner, r dt_rank, n d_state, v vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from blackmamba.model import BlackMamba
from blackmamba.model.layer import Layer
from blackmamba.model.mamba import Mamba
from blackmamba.model.moe import MoE
from blackmamba.model.state import MambaState
from blackmamba.ops import gpu


class WideStep:
    """What `model.step` computes; the convolution and the SSM update their memory where it lies.

    Args:
        model: sequential layers, each a Mamba, MLP or MoE layer without biases.
        size: sequences.
        new: makes float32 zeros of a shape.
    """

    def __init__(self, model: BlackMamba, size: int, new: Callable[..., Tensor]):
        self._model, self._size = model, size
        self.states: list[MambaState | None] = []
        self._constants: list[tuple[Tensor, ...]] = []
        d, n, taps = model.config.d_inner, model.config.d_state, model.config.d_conv
        for layer in model.layers:
            assert isinstance(layer, Layer)
            if not isinstance(layer.mixer, Mamba):
                self.states.append(None)
                self._constants.append(())
                continue
            mixer = layer.mixer
            self.states.append(MambaState(new(size, d, taps - 1), new(size, d, n)))
            constants = (
                mixer.conv_weight,
                mixer.conv_bias,
                mixer.dt_bias,
                mixer.decay_rates() / math.log(2),
                mixer.D,
            )
            self._constants.append(tuple(c.detach().float().contiguous() for c in constants))

    @torch.no_grad()
    def __call__(self, ids: Tensor, logits: Tensor) -> None:
        """Read ids (b,); logits (b, v) of the tokens after them go to `logits`."""
        model = self._model
        x, update = model._embed(ids), None
        for layer, state, constants in zip(
            model._stack(), self.states, self._constants, strict=True
        ):
            x, y = layer.norm.add(x, update, model.compute_dtype)
            if isinstance(layer.mixer, Mamba):
                assert state is not None
                update = self._mamba(layer.mixer, y, state, constants)
            elif isinstance(layer.feed_forward, MoE):
                update = layer.feed_forward(y)[0]
            else:
                assert layer.feed_forward is not None
                update = layer.feed_forward(y)
        logits.copy_(model._logits(model._normed(x, update)))

    def _mamba(
        self, mixer: Mamba, u: Tensor, state: MambaState, constants: tuple[Tensor, ...]
    ) -> Tensor:
        from blackmamba.ops.decode import kernels

        conv_weight, conv_bias, dt_bias, A2, D = constants
        d, n = A2.shape
        r = mixer.dt_proj.weight.shape[1]
        xz = mixer.in_proj(u)
        gpu.launch(
            kernels.conv_kernel, (-(-d // 256), self._size),
            xz, conv_weight, conv_bias, state.conv, d, TAPS=conv_weight.shape[1], BD=256,
        )  # fmt: skip
        dbc = mixer.x_proj(xz[:, :d])
        y = u.new_empty(self._size, d)
        gpu.launch(
            kernels.update_kernel, (-(-d // 64), self._size),
            xz, dbc, mixer.dt_proj(dbc[:, :r]), dt_bias, dt_bias, A2, D, state.ssm, y, d, r, n,
            BD=64, BR=16, N=max(16, 1 << (n - 1).bit_length()), PRODUCT=False, PDL=False,
        )  # fmt: skip
        return mixer.out_proj(y)
