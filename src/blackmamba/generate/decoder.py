"""Steps that write into memory made beforehand: the fast way to generate on a CPU.

`BlackMamba.step` makes new tensors for everything. A `Decoder` owns one copy of the sequences'
memory and advances it in place, the whole stack of layers in one call of the native kernels, which
read every weight that a token needs once. After its first step it allocates nothing.

Letters: b batch, m d_model, d d_inner, r dt_rank, n d_state, k d_conv, v vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blackmamba.config import ModelConfig
from blackmamba.errors import BackendError, InputError
from blackmamba.model import BlackMamba, State
from blackmamba.model.attention import Attention
from blackmamba.model.embedding import Embedding
from blackmamba.model.layer import Layer
from blackmamba.model.linear import Linear
from blackmamba.model.mamba import Mamba
from blackmamba.model.mlp import MLP
from blackmamba.model.moe import MoE
from blackmamba.model.norm import LayerNorm, RMSNorm
from blackmamba.model.quantized import QuantizedEmbedding, QuantizedLinear, QuantizedStorage
from blackmamba.model.router import Router
from blackmamba.model.state import LayerState, MambaState
from blackmamba.ops import native
from blackmamba.ops.backend import ENVIRONMENT_VARIABLE, forced_backend

# Modules whose arithmetic the kernels know. Any other, a wrapped or a derived one, may differ.
KNOWN_MODULES = (
    BlackMamba, nn.ModuleList, Embedding, nn.Embedding, Layer, Mamba, MLP, MoE, Router, RMSNorm,
    LayerNorm, Linear, nn.Linear, QuantizedStorage, QuantizedLinear, QuantizedEmbedding,
)  # fmt: skip
REPLACED_METHODS = {"forward", "step"}
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}  # weights.hpp


def beyond_the_paper(config: ModelConfig) -> str | None:
    """What of a model the kernels do not know: they have one expert a token, that of the largest
    logit, weighted by its sigmoid, as "sinkhorn" and "sigmoid" infer; None if there is nothing."""
    if config.mamba_norm:
        return "dt, B and C are normed"
    if not any(spec.feed_forward == "moe" for spec in config.layer_specs):
        return None
    if config.experts_per_token > 1:
        return f"{config.experts_per_token} experts a token"
    if config.d_shared_expert:
        return "a shared expert"
    if not config.gates_are_sigmoids or config.selection_bias:
        return f"router {config.router!r}{' with a selection bias' * config.selection_bias}"
    return None


def cannot_decode(model: BlackMamba) -> str | None:
    """Why no `Decoder` takes this model; None if one does."""
    if (forced := forced_backend()) not in ("auto", "native"):
        return f"{ENVIRONMENT_VARIABLE}={forced} asks for another backend"
    if (reason := native.missing()) is not None:
        return reason
    if (reason := beyond_the_paper(model.config)) is not None:
        return f"it has no kernels for {reason}"
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            return "the model has attention layers, whose memory grows with every token"
        if type(module) not in KNOWN_MODULES:
            return f"{name or 'the model'} is a {type(module).__name__}, which has its own ways"
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or REPLACED_METHODS & vars(module).keys()
        ):
            return f"{name or 'the model'} has hooks or replaced methods, which would not be called"
    for name, parameter in model.named_parameters():
        if (reason := native.unfit(parameter)) is not None:
            return f"{name}: {reason}"
    return None


class Decoder:
    """A batch of sequences that goes on one token at a time.

    The model is used as in evaluation mode. Activations are float32 whatever the weights are, so
    for a bfloat16 model the logits differ from those of `model.step` by that one's rounding; on
    their way into products with quantised weights those of a bfloat16 model have 16 bits, 2^-15 of
    the largest of four or eight neighbours (docs/quantization.md). The weights must not change or
    move while the decoder is in use.

    Args:
        model: on the CPU, float32 or bfloat16, without attention layers.
        state: what was read so far; it is copied.
    Raises:
        BackendError: the model or the machine does not fit; see `cannot_decode`.
        InputError: the state is not of this model.
    """

    def __init__(self, model: BlackMamba, state: State):
        if (reason := cannot_decode(model)) is not None:
            raise BackendError(f"no in-place decoder: {reason}")
        if len(state.layers) != model.config.n_layers:
            raise InputError(
                f"state of {len(state.layers)} layers: this model has {model.config.n_layers}"
            )
        self._model = model
        self._batch_size = state.batch_size
        self._kept: list[Tensor] = []  # what the plan points to
        self._states = [_copied(layer) for layer in state.layers]
        self._compute_dtype = model.compute_dtype
        self._logits = torch.empty(state.batch_size, model.config.vocab_size)
        self._plan = self._planned()

    def step(self, next_ids: Tensor) -> Tensor:
        """Read one token of each sequence.

        Args:
            next_ids: (b,) int64.
        Returns:
            Logits (b, v) float32 of the token after; the next step overwrites them.
        Raises:
            InputError: a wrong shape or dtype, or an id out of range.
        """
        if next_ids.shape != (self._batch_size,) or next_ids.dtype != torch.int64:
            raise InputError(
                f"next_ids of shape {tuple(next_ids.shape)}, {next_ids.dtype}: "
                f"must be ({self._batch_size},), torch.int64"
            )
        vocab_size = self._model.config.vocab_size
        for token_id in next_ids.tolist():
            if not 0 <= token_id < vocab_size:
                raise InputError(f"next_ids holds {token_id}: must be 0 .. {vocab_size - 1}")
        ids = next_ids.contiguous()
        self._plan.step(ids.data_ptr(), self._logits.data_ptr(), torch.get_num_threads())
        return self._logits

    def select(self, rows: Tensor | Sequence[int]) -> "Decoder":
        """A decoder of these rows; see `State.select`."""
        return Decoder(self._model, self.state.select(rows))

    @property
    def state(self) -> State:
        """A copy of what was read so far, as the model's other methods take it."""
        return State(
            self._batch_size,
            tuple(
                None
                if layer is None
                else MambaState(
                    layer.conv.to(self._compute_dtype, copy=True).contiguous(), layer.ssm.clone()
                )
                for layer in self._states
            ),
        )

    # ---- what the kernels are told -----------------------------------------------------------

    def _planned(self) -> Any:
        model, config = self._model, self._model.config
        sizes = {
            "m": config.d_model,
            "d": config.d_inner,
            "r": config.dt_rank,
            "n": config.d_state,
            "k": config.d_conv,
            "v": config.vocab_size,
        }
        layers = [
            self._layer(layer, memory)
            for layer, memory in zip(model.layers, self._states, strict=True)
            if isinstance(layer, Layer)
        ]
        table = model.embedding.weight
        head_weight = table if model.head is None else model.head.weight
        head = {
            "norm": self._norm(model.final_norm),
            "head": self._linear(head_weight, model.head_bias),
        }
        return native.extension().DecodePlan(
            self._batch_size, sizes, layers, self._weights(table), head
        )

    def _layer(self, layer: Layer, memory: MambaState | None) -> dict[str, Any]:
        plan: dict[str, Any] = {"norm": self._norm(layer.norm)}
        if isinstance(layer.mixer, Mamba) and memory is not None:
            mixer = layer.mixer
            plan |= {
                "in_proj": self._linear(mixer.in_proj.weight, mixer.in_proj.bias),
                "x_proj": self._linear(mixer.x_proj.weight, None),
                "dt_proj": self._linear(mixer.dt_proj.weight, None),
                "out_proj": self._linear(mixer.out_proj.weight, mixer.out_proj.bias),
                "conv_weight": self._floats(mixer.conv_weight.t()),
                "conv_bias": self._floats(mixer.conv_bias),
                "dt_bias": self._floats(mixer.dt_bias),
                "A": self._floats(mixer.decay_rates()),
                "D": self._floats(mixer.D),
                "conv_state": memory.conv.data_ptr(),
                "ssm_state": memory.ssm.data_ptr(),
            }
        if layer.feed_forward_norm is not None:
            plan["feed_forward_norm"] = self._norm(layer.feed_forward_norm)
        part = layer.feed_forward
        if isinstance(part, MoE):
            plan |= {
                "n_experts": part.fc1.shape[0],
                "router_weight": self._floats(part.router.weight),
                "router_bias": self._floats(part.router.bias),
                "fc1": self._linear(part.fc1, part.fc1_bias),
                "fc2": self._linear(part.fc2, part.fc2_bias),
            }
        elif isinstance(part, MLP):
            plan |= {
                "n_experts": 0,
                "router_weight": 0,
                "router_bias": 0,
                "fc1": self._linear(part.fc1.weight, part.fc1.bias),
                "fc2": self._linear(part.fc2.weight, part.fc2.bias),
            }
        if part is not None:
            plan |= {"gated": part.gated, "gelu": part.activation == "gelu"}
        return plan

    def _linear(self, weight: Tensor | QuantizedStorage, bias: Tensor | None) -> tuple[Any, int]:
        return self._weights(weight), 0 if bias is None else self._floats(bias)

    def _weights(self, weight: Tensor | QuantizedStorage) -> tuple[int, ...]:
        """(kind, data, scales, rows, columns, group, narrow) of a matrix, or of each of several."""
        rows, columns = weight.shape[-2:]
        narrow = self._compute_dtype == torch.bfloat16
        if isinstance(weight, QuantizedStorage):
            data, scales = self._keep(weight.data), self._keep(weight.scales)
            return (
                _KINDS[data.dtype], data.data_ptr(), scales.data_ptr(), rows, columns,
                weight.group_size, narrow,
            )  # fmt: skip
        data = self._keep(weight.detach().contiguous())
        return _KINDS[data.dtype], data.data_ptr(), 0, rows, columns, 0, narrow

    def _norm(self, norm: RMSNorm | LayerNorm) -> tuple[int, int, float, bool]:
        is_layer_norm = isinstance(norm, LayerNorm)
        bias = self._floats(norm.bias) if is_layer_norm else 0
        return self._floats(norm.weight), bias, norm.eps, is_layer_norm

    def _floats(self, tensor: Tensor) -> int:
        return self._keep(tensor.detach().to(torch.float32).contiguous()).data_ptr()

    def _keep(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor)
        return tensor


def _copied(layer: LayerState) -> MambaState | None:
    """Memory of our own, float32; of `conv` the channels lie side by side, for the kernels."""
    if not isinstance(layer, MambaState):
        return None
    conv, ssm = layer.conv.transpose(1, 2), layer.ssm
    conv, ssm = (torch.empty(t.shape, dtype=torch.float32).copy_(t) for t in (conv, ssm))
    return MambaState(conv.transpose(1, 2), ssm)
