"""Start here: token ids -> embedding -> layers -> norm -> head -> logits.

Letters: b batch, l sequence, m d_model, v vocabulary.

Source: BlackMamba (arXiv 2402.01771), figure 1. The layer pattern of the configuration makes this
same class the paper's three other networks: dense transformer, MoE transformer and dense Mamba.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, Self, overload

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from blackmamba.config import ModelConfig, QuantizationConfig
from blackmamba.errors import ConfigError, InputError
from blackmamba.model.balance import Losses, Reduce, RouterLoad, losses
from blackmamba.model.checks import check_ids, check_range, check_state
from blackmamba.model.embedding import Embedding
from blackmamba.model.init import initialise
from blackmamba.model.layer import Layer, Trace
from blackmamba.model.lora import adaptation
from blackmamba.model.mamba import Mamba
from blackmamba.model.moe import MoE
from blackmamba.model.norm import final_norm
from blackmamba.model.quantize import store_quantized
from blackmamba.model.quantized import QuantizedEmbedding, QuantizedLinear, QuantizedStorage
from blackmamba.model.state import LayerState, State
from blackmamba.ops import linear, linear_cross_entropy, quantized_linear
from blackmamba.ops.checks import check_any_integers, check_shapes
from blackmamba.ops.recompute import Recompute
from blackmamba.ops.sequence import Pieces

_KEPT_FLOAT32 = {"A_log", "D", "dt_bias", "lora_A", "lora_B"}


def keeps_float32(name: str) -> bool:
    """Whether the parameter of this name stays float32 in a 16-bit model.

    These are A_log, D and dt_bias (small errors compound over a sequence), the norms, the router
    and adapters.
    """
    parts = name.split(".")
    return any(p in _KEPT_FLOAT32 or p == "router" or p.endswith("norm") for p in parts)


class BlackMamba(nn.Module):
    """A language model of the layers that its configuration names.

    Args:
        config: the network's shape.
        device: where to build it; "meta" makes shapes without memory.
        dtype: of the parameters; those named by `keeps_float32` are float32 or wider.
        compute_dtype: of the products' inputs; None: as `dtype`. float32 parameters with a bfloat16
            compute_dtype are mixed-precision training.
        quantization: how its large matrices are stored; None: as parameters like all others. Such a
            model is for inference: it is in evaluation mode and has no gradients. See `quantize`.

    The weights are random, drawn from torch's global generator. Training and evaluation mode differ
    in the router alone, and only of kind "sinkhorn": balanced choice in training, largest logits in
    evaluation.

    Attributes:
        reduce_load: sums the experts' load over ranks, for balance_scope="global"; None: this
            process is the only one.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
        quantization: QuantizationConfig | None = None,
    ):
        super().__init__()
        for what in (dtype, compute_dtype or dtype):
            if not what.is_floating_point:
                raise InputError(
                    f"dtype={what}: must be a floating-point dtype such as torch.float32"
                )
        self.config = config
        self.quantization = quantization
        self.reduce_load: Reduce | None = None
        self.compute_dtype = compute_dtype or dtype
        where = None if device is None else torch.device(device)
        wide = torch.promote_types(dtype, torch.float32)
        self.residual_dtype = (
            torch.promote_types(self.compute_dtype, torch.float32)
            if config.residual_dtype == "float32"
            else self.compute_dtype
        )
        self.embedding: nn.Embedding | QuantizedEmbedding = Embedding(
            config.vocab_size, config.d_model, device=where, dtype=dtype
        )
        self.layers = nn.ModuleList(
            Layer(
                config,
                spec,
                index,
                device=where,
                dtype=dtype,
                wide=wide,
                compute_dtype=self.compute_dtype,
            )
            for index, spec in enumerate(config.layer_specs)
        )
        self.final_norm = final_norm(config, device=where, dtype=wide)
        self.head: nn.Linear | QuantizedLinear | None = None
        if not config.tie_embeddings:
            self.head = nn.Linear(
                config.d_model, config.vocab_size, bias=False, device=where, dtype=dtype
            )
        self.head_bias: nn.Parameter | None = None
        if config.head_bias:
            self.head_bias = nn.Parameter(torch.empty(config.vocab_size, device=where, dtype=dtype))
        if self.embedding.weight.device.type != "meta":
            initialise(self)
        if quantization is not None:
            store_quantized(self, quantization)
            self.requires_grad_(False)
            self.eval()

    def forward(
        self,
        input_ids: Tensor,
        *,
        seq_idx: Tensor | None = None,
        trace: Trace | None = None,
        sequence_group: ProcessGroup | None = None,
    ) -> Tensor:
        """Logits of the next token at every position, each row read from its beginning.

        Args:
            input_ids: (b, l) int64, each within 0 .. vocab_size - 1; neither b nor l may be 0.
            seq_idx: (b, l), any integer dtype, for rows that hold several documents: the number of
                each token's document, which no other document of the row has. Each document is
                read as if it stood alone, except that in training experts are balanced over all
                tokens together. Negative numbers mark pads: balance losses and counts leave them
                out, Sinkhorn's plan does not. None: each row is one document.
            trace: filled with what went on inside.
            sequence_group: ranks that hold consecutive pieces of the same rows. All of them call
                this, each with its own piece: see `blackmamba.ops.sequence`. Experts are balanced
                over each rank's tokens.
        Returns:
            (b, l, v) in the compute dtype.
        Raises:
            InputError: a wrong shape or dtype, an empty batch, an id out of range.
            ConfigError: sequence_group, and there are attention layers.
        """
        return self._logits(self._features(input_ids, seq_idx, trace, sequence_group)[0])

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        seq_idx: Tensor | None = None,
        trace: Trace | None = None,
        sequence_group: ProcessGroup | None = None,
    ) -> Tensor:
        """What training minimises: `losses(...).total`."""
        return self.losses(
            input_ids, labels, seq_idx=seq_idx, trace=trace, sequence_group=sequence_group
        ).total

    def losses(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        seq_idx: Tensor | None = None,
        trace: Trace | None = None,
        sequence_group: ProcessGroup | None = None,
    ) -> Losses:
        """Mean cross-entropy in nats over the labels that are not -100, without all logits at once;
        and in training mode what the configuration adds to it for the experts' balance.

        In training mode, with gradients, routers count here how many tokens each expert had; see
        `balance_step`.

        Args:
            input_ids: (b, l) int64.
            labels: (b, l) int64: the token that follows each position, or -100 to leave it out.
            seq_idx: see `forward`; the label of a document's last token is the caller's choice.
            trace: filled with what went on inside.
            sequence_group: see `forward`; the label of a piece's last token is the first token of
                the next piece.
        Returns:
            float32 scalars; the cross-entropy is NaN if every label is -100, as there is nothing to
            average. With sequence_group it is the mean over this rank's labels, 0 if it has none.
            The loss of the whole rows is then the mean of the ranks' losses weighted by how many
            labels each has; its gradient is the sum of the ranks' gradients, weighted likewise.
        Raises:
            InputError: a wrong shape or dtype, an empty batch, an id or label out of range.
        """
        counted = labels != -100
        if labels.shape != input_ids.shape:
            raise InputError(
                f"labels of shape {tuple(labels.shape)}: must be that of input_ids, "
                f"{tuple(input_ids.shape)}"
            )
        check_range(self.config, "labels", labels.where(counted, labels.new_zeros(())))
        x, weight, loads = self._features(input_ids, seq_idx, trace, sequence_group)
        n_counted = counted.sum()
        if sequence_group is not None:  # a piece may have none where its row has some
            n_counted = n_counted.clamp(min=1)
        cross_entropy = linear_cross_entropy(
            x.flatten(0, 1),
            weight,
            labels.flatten(),
            bias=self._head_bias(),
            divisor=n_counted,
        )
        routers = [
            layer.feed_forward.router
            for layer in self._stack()
            if isinstance(layer.feed_forward, MoE)
        ]
        found = losses(cross_entropy, loads, routers, self.config, self.reduce_load)
        if trace is not None:
            trace.losses = found
        return found

    def initial_state(self, batch_size: int) -> State:
        """The memory of `batch_size` sequences before their first token."""
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}: must be at least 1")
        return State(batch_size, tuple(layer.initial_state(batch_size) for layer in self._stack()))

    @overload
    def prefill(
        self,
        input_ids: Tensor,
        state: State | None = ...,
        *,
        lengths: Tensor | None = ...,
        logits: Literal["all", "last"] = ...,
        trace: Trace | None = ...,
    ) -> tuple[Tensor, State]: ...
    @overload
    def prefill(
        self,
        input_ids: Tensor,
        state: State | None = ...,
        *,
        lengths: Tensor | None = ...,
        logits: Literal["none"],
        trace: Trace | None = ...,
    ) -> tuple[None, State]: ...
    def prefill(
        self,
        input_ids: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        logits: Literal["all", "last", "none"] = "all",
        trace: Trace | None = None,
    ) -> tuple[Tensor | None, State]:
        """Read a piece of each sequence at once and remember it.

        Reading a then b gives what reading a + b gives.

        Args:
            input_ids: (b, l) int64.
            state: memory to go on from, left as it is; None: nothing was read yet.
            lengths: (b,) int64, 0 .. l: rows are right-padded and only so many tokens are real.
            logits: "all" (b, l, v); "last" (b, v), of each row's last real token; "none".
            trace: filled with what went on inside.
        Returns:
            The logits and the new memory. Logits at pads mean nothing.
        Raises:
            InputError: shapes do not fit, an empty batch, an id or length out of range, or
                "last" with a row of length 0.
        """
        check_ids(self.config, input_ids)
        b, l = input_ids.shape
        check_state(self.config, state, b)
        if lengths is not None:
            if lengths.shape != (b,) or lengths.dtype != torch.int64:
                raise InputError(
                    f"lengths of shape {tuple(lengths.shape)}, {lengths.dtype}: "
                    f"must be ({b},), torch.int64"
                )
            low, high = int(lengths.min()), int(lengths.max())
            least = 1 if logits == "last" else 0
            if low < least or high > l:
                raise InputError(f"lengths={lengths.tolist()}: each must be {least} .. {l}")
        if logits == "last":
            return self._read(input_ids, state, lengths, trace)
        x, update, state, _ = self._run(self._embed(input_ids), state, lengths, None, trace)
        return None if logits == "none" else self._logits(self._normed(x, update)), state

    def step(self, next_ids: Tensor, state: State) -> tuple[Tensor, State]:
        """Read one token of each sequence.

        Args:
            next_ids: (b,) int64.
            state: memory so far, left as it is.
        Returns:
            Logits (b, v) of the token after, and the new memory.
        Raises:
            InputError: shapes do not fit or an id is out of range.
        """
        if next_ids.dim() != 1:
            raise InputError(f"next_ids of shape {tuple(next_ids.shape)}: must be (batch,)")
        check_ids(self.config, next_ids[:, None])
        check_state(self.config, state, len(next_ids))
        x = self._embed(next_ids)
        layers = list(state.layers)
        for i, layer in enumerate(self._stack()):
            x, layers[i] = layer.step(x, layers[i])
        return self._logits(self._normed(x, None)), State(state.batch_size, tuple(layers))

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode.

        Raises:
            InputError: training mode of a quantised model without adapters.
        """
        if mode and self.quantization is not None and adaptation(self) is None:
            raise InputError(
                f"this model is quantised to {self.quantization.bits} bits and for inference only: "
                "train the model that it was made from"
            )
        return super().train(mode)

    @property
    def recompute(self) -> Recompute:
        """What training computes twice so as not to keep it; see `Recompute`. "none" at first."""
        return self._stack()[0].recompute

    @recompute.setter
    def recompute(self, what: Recompute) -> None:
        for layer in self._stack():
            layer.recompute = what
            if isinstance(layer.mixer, Mamba):
                layer.mixer.recompute = what

    # ---- parts ------------------------------------------------------------------------------

    def _stack(self) -> list[Layer]:
        return list(self.layers)  # pyright: ignore[reportReturnType] # ModuleList forgets the type

    def _features(
        self,
        input_ids: Tensor,
        seq_idx: Tensor | None,
        trace: Trace | None,
        sequence_group: ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, list[RouterLoad]]:
        """What the head multiplies, its weight, and how the experts were used."""
        check_ids(self.config, input_ids)
        if seq_idx is not None:
            check_any_integers("model", "seq_idx", seq_idx)
            check_shapes("model", seq_idx=(seq_idx, input_ids.shape))
        pieces = None
        if sequence_group is not None:
            if any(spec.mixer == "attention" for spec in self.config.layer_specs):
                raise ConfigError(
                    "rows cut over ranks: this model has attention layers, which would need the "
                    "keys and values of all ranks; give each rank whole rows"
                )
            pieces = Pieces.cut(sequence_group, seq_idx)
        x, weight = self._embed_with_head(input_ids)
        x, update, _, loads = self._run(x, None, None, seq_idx, trace, pieces)
        return self._normed(x, update), weight, loads

    def _read(
        self,
        input_ids: Tensor,
        state: State | None,
        lengths: Tensor | None,
        trace: Trace | None = None,
    ) -> tuple[Tensor, State]:
        """`prefill` with the logits of each row's last token, of arguments known to fit.

        Behind the last mixer nothing depends on other tokens, so they end there; unless the trace
        is to have them, or experts are balanced over all of them.
        """
        b, l = input_ids.shape
        stack, device = self._stack(), input_ids.device
        mixing = [i for i, layer in enumerate(stack) if layer.mixer is not None]
        n_whole = len(stack)
        if trace is None and not self.training and mixing:
            n_whole = mixing[-1] + 1
        x = self._embed(input_ids)
        x, update, state, _ = self._run(x, state, lengths, None, trace, n_layers=n_whole)
        ends = torch.full((b,), l, device=device) if lengths is None else lengths
        last = torch.arange(b, device=device), ends - 1
        x, update = x[last][:, None], update[last][:, None]
        for layer in stack[n_whole:]:
            x, update, _, _ = layer(x, update, None, None, None, None)
        return self._logits(self._normed(x, update)[:, 0]), state

    def _run(
        self,
        x: Tensor,
        state: State | None,
        lengths: Tensor | None,
        seq_idx: Tensor | None,
        trace: Trace | None,
        pieces: Pieces | None = None,
        n_layers: int | None = None,
    ) -> tuple[Tensor, Tensor, State, list[RouterLoad]]:
        """Embedded tokens to the residual stream before the last layer, what that adds to it, the
        new memory, and how the experts of each routed layer were used, if the layers say so; only
        through the first n_layers, if given."""
        batch_size, update = len(x), None
        loads: list[RouterLoad] = []
        stack = self._stack()
        layers: list[LayerState] = [None] * len(stack) if state is None else list(state.layers)
        for i, layer in enumerate(stack[:n_layers]):
            x, update, layers[i], load = self._through(layer)(
                x, update, pieces or layers[i], lengths, seq_idx, trace
            )
            if load is not None:
                loads.append(load)
        assert update is not None  # there is a layer
        return x, update, State(batch_size, tuple(layers)), loads

    def _through(
        self, layer: Layer
    ) -> Callable[..., tuple[Tensor, Tensor, LayerState, RouterLoad | None]]:
        if not (layer.recompute == "layers" and self.training and torch.is_grad_enabled()):
            return layer
        return partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False)

    def _embed(self, ids: Tensor) -> Tensor:
        return self.embedding(ids).to(self.residual_dtype)

    def _embed_with_head(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded tokens, and the weight of the head that is to read what comes of them."""
        if self.head is not None or not isinstance(self.embedding, Embedding):
            return self._embed(ids), self._head_weight()
        x, weight = self.embedding.with_table(ids)
        return x.to(self.residual_dtype), weight

    def _normed(self, x: Tensor, update: Tensor | None) -> Tensor:
        return self.final_norm.add(x, update, self.compute_dtype)[1]

    def _logits(self, x: Tensor) -> Tensor:
        weight = self._head()
        if isinstance(weight, QuantizedStorage):
            return quantized_linear(x, weight.stored(), self._head_bias())
        return linear(x, weight.to(self.compute_dtype), self._head_bias())

    def _head(self) -> Tensor | QuantizedStorage:
        return self.embedding.weight if self.head is None else self.head.weight

    def _head_weight(self) -> Tensor:
        weight = self._head()
        if isinstance(weight, QuantizedStorage):
            return weight.whole(self.compute_dtype)
        return weight

    def _head_bias(self) -> Tensor | None:
        return None if self.head_bias is None else self.head_bias.to(self.compute_dtype)
