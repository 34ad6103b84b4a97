"""Steps as one CUDA graph over memory made beforehand: the fast way to generate on a GPU.

A step is some hundred kernels of microseconds; launched one by one, the host is what it waits for.
Here they are recorded once and replayed with one call. A recording has room for SIZES sequences and
is kept for the next that generates with the same model.

Of one sequence every kernel is our own, a matrix times a vector (`narrow.py`); of up to 16 on
NVIDIA's Hopper in bfloat16, too, by matrix units (`few.py`). Of more, and of models that go beyond
the paper's router, products are the library's (`wide.py`).

Letters: b batch, v vocabulary.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from blackmamba.config import ModelConfig
from blackmamba.errors import BackendError, InputError
from blackmamba.generate import few
from blackmamba.generate.decoder import KNOWN_MODULES, REPLACED_METHODS, beyond_the_paper
from blackmamba.generate.narrow import NARROW, NarrowStep, launcher
from blackmamba.generate.wide import WideStep
from blackmamba.model import BlackMamba, State
from blackmamba.model.layer import Layer
from blackmamba.model.quantized import QuantizedEmbedding, QuantizedLinear, QuantizedStorage
from blackmamba.model.state import LayerState, MambaState
from blackmamba.ops import gpu
from blackmamba.ops.backend import ENVIRONMENT_VARIABLE, forced_backend

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Sequences that a recording has room for."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 8192  # numbers of a vector that a program holds


def cannot_capture_any(config: ModelConfig) -> str | None:
    """Why no model of this configuration is recorded here; None if one may be."""
    if (forced := forced_backend()) not in ("auto", "triton"):
        return f"{ENVIRONMENT_VARIABLE}={forced} asks for another backend"
    if (reason := gpu.missing()) is not None:
        return reason
    if max(config.d_inner, config.d_expert, config.d_mlp) > _WIDEST:
        return f"a layer is wider than {_WIDEST}"
    if config.linear_bias or config.head_bias or not config.gated or config.d_conv < 2:
        return "it has biases, experts without gates, or no convolution"
    return None


def cannot_capture(model: BlackMamba, batch_size: int = 1) -> str | None:
    """Why no `CapturedDecoder` takes this model; None if one does."""
    if (reason := cannot_capture_any(model.config)) is not None:
        return reason
    if batch_size > SIZES[-1]:
        return f"{batch_size} sequences: it takes at most {SIZES[-1]}"
    if plain_weights(model) is not None:
        return None
    odd = next(filter(None, map(_oddity, *zip(*model.named_modules(), strict=True))), None)
    return odd or next(
        f"{name} is {parameter.dtype} on {parameter.device}"
        for name, parameter in model.named_parameters()
        if not _fits(parameter)
    )


Weights = tuple[tuple[int, int], ...]
"""Changes when weights, or biases of the choice, move or are written to."""


def fingerprint(model: BlackMamba) -> Weights:
    """Of all its parameters and buffers."""
    return _walk(model)[1]


def plain_weights(model: BlackMamba, known: Weights | None = None) -> Weights | None:
    """`fingerprint`; None if a module or a parameter is one that no recording takes. Asked before
    every prompt, while the device waits.

    Args:
        known: what this gave before, given back if it still holds.
    """
    is_plain, weights = _walk(model)
    if not is_plain:
        return None
    if weights == known:
        return known
    return weights if all(map(_fits, model.parameters())) else None


def _walk(model: nn.Module) -> tuple[bool, Weights]:
    """Whether a recording can do what all modules do, and the weights. By hand: there are some 200
    modules, and torch's generators of them take several times as long."""
    is_plain = True
    weights: list[tuple[int, int]] = []
    pending: list[nn.Module] = [model]
    for module in pending:  # which grows
        is_plain = is_plain and _plain(module)
        own = module.__dict__
        for tensors in own["_parameters"], own["_buffers"]:
            if tensors:
                weights += [_mark(tensor) for tensor in tensors.values() if tensor is not None]
        if own["_modules"]:
            pending += [child for child in own["_modules"].values() if child is not None]
    return is_plain, tuple(weights)


def _mark(tensor: Tensor) -> tuple[int, int]:
    try:
        return tensor.data_ptr(), tensor._version
    except RuntimeError:  # a tensor of inference mode does not count what is written to it
        return tensor.data_ptr(), 0


def _fits(parameter: Tensor) -> bool:
    return parameter.dtype in _DTYPES and (parameter.is_cuda or gpu.interpreted())


def _plain(module: nn.Module) -> bool:
    """Whether a recording can do what the module does."""
    own = module.__dict__  # what follows is asked of each of them for every prompt
    return (
        type(module) in _PLAIN
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and own.keys().isdisjoint(REPLACED_METHODS)
        and not (type(module) is Layer and _is_pair(own["_modules"]))
    )


def _oddity(name: str, module: nn.Module) -> str | None:
    """Why not."""
    if _plain(module):
        return None
    if isinstance(module, QuantizedStorage | QuantizedLinear | QuantizedEmbedding):
        return f"{name} is quantised"
    if type(module) not in KNOWN_MODULES:
        return f"{name or 'the model'} is a {type(module).__name__}, which has its own ways"
    if isinstance(module, Layer) and _is_pair(module._modules):
        return f"{name} is a parallel pair"
    return f"{name or 'the model'} has hooks or replaced methods, which would not be called"


def _is_pair(parts: Mapping[str, nn.Module | None]) -> bool:
    return parts.get("mixer") is not None and parts.get("feed_forward") is not None


_PLAIN = frozenset(KNOWN_MODULES) - {QuantizedStorage, QuantizedLinear, QuantizedEmbedding}


class CapturedDecoder:
    """A batch of sequences that goes on one token at a time; as `Decoder` on a CPU.

    The model is used as in evaluation mode. One sequence has float32 activations whatever the
    weights are, so for a bfloat16 model the logits differ from those of `model.step` by that one's
    rounding.

    Args:
        model: on a GPU; see `cannot_capture`.
        state: what was read so far; it is copied.
        graph: whether to record; without, the kernels are launched one by one.
    Raises:
        BackendError: the model or the machine does not fit.
    """

    def __init__(self, model: BlackMamba, state: State, *, graph: bool | None = None):
        if (reason := cannot_capture(model, state.batch_size)) is not None:
            raise BackendError(f"no captured decoder: {reason}")
        self._model = model
        self._batch_size = state.batch_size
        if graph is None:
            graph = not gpu.interpreted()
        self._recording = _taken(model, state.batch_size, graph)
        self._recording.load(state)

    def step(self, next_ids: Tensor | None) -> Tensor:
        """Read one token of each sequence; nothing waits for the device.

        Args:
            next_ids: (b,) int64, on any device; each within the vocabulary. None: what `greedy`
                gave after the last step.
        Returns:
            Logits (b, v) float32 of the token after; the next step overwrites them.
        Raises:
            InputError: a wrong shape or dtype.
        """
        if next_ids is None:
            self._recording.run()
            return self.logits
        if next_ids.shape != (self._batch_size,) or next_ids.dtype != torch.int64:
            raise InputError(
                f"next_ids of shape {tuple(next_ids.shape)}, {next_ids.dtype}: "
                f"must be ({self._batch_size},), torch.int64"
            )
        recording = self._recording
        recording.ids[: self._batch_size].copy_(next_ids, non_blocking=True)
        recording.run()
        return self.logits

    def greedy(self) -> Tensor:
        """(2, b) int64, on the device, after a step: the id of the largest logit of the model's
        tokens, the first of equals; and 1, or 0 if that logit is not finite."""
        return self._recording.choice[:, : self._batch_size]

    def select(self, rows: Tensor | Sequence[int]) -> "CapturedDecoder":
        """A decoder of these rows; see `State.select`."""
        return CapturedDecoder(
            self._model, self.state.select(rows), graph=self._recording.graph is not None
        )

    @property
    def logits(self) -> Tensor:
        """(b, v) float32 after the last step."""
        return self._recording.logits[: self._batch_size]

    @property
    def state(self) -> State:
        """A copy of what was read so far, as the model's other methods take it."""
        return self._recording.saved(self._batch_size)

    def __del__(self) -> None:
        recording = getattr(self, "_recording", None)
        if recording is not None and _FREE is not None:  # pyright: ignore[reportUnnecessaryComparison] # at exit
            _FREE.setdefault(self._model, []).append(recording)


def warmup(model: BlackMamba, batch_sizes: Iterable[int] = SIZES[:4]) -> None:
    """Record steps for batches of these sizes now, so that no request waits for it."""
    with torch.inference_mode():
        kept = [CapturedDecoder(model, model.initial_state(size)) for size in batch_sizes]
    del kept


_FREE: weakref.WeakKeyDictionary[BlackMamba, list["_Recording"]] = weakref.WeakKeyDictionary()


def _taken(model: BlackMamba, batch_size: int, graph: bool) -> "_Recording":
    """A recording that no one uses, with room for the batch."""
    size = next(size for size in SIZES if size >= batch_size)
    free, weights = _FREE.get(model, []), fingerprint(model)
    free[:] = [recording for recording in free if recording.weights == weights]
    for i, recording in enumerate(free):
        if recording.size == size and (recording.graph is not None) == graph:
            return free.pop(i)
    return _Recording(model, size, graph, weights)


class _Recording:
    """The memory of `size` sequences, and the launches of a step over it."""

    def __init__(
        self, model: BlackMamba, size: int, graph: bool, weights: tuple[tuple[int, int], ...]
    ):
        self.size, self.weights = size, weights
        self._conv_dtype = model.compute_dtype
        config = model.config
        device = model.embedding.weight.device
        new: Callable[..., Tensor] = lambda *shape: torch.zeros(shape, device=device)  # noqa: E731
        self.ids = torch.zeros(size, dtype=torch.int64, device=device)
        self.choice = torch.zeros(2, size, dtype=torch.int64, device=device)
        self.logits = new(size, config.vocab_size)
        is_few = few.fits(model, size)
        if beyond_the_paper(config) is None and (is_few or size <= NARROW):
            kind = few.FewStep if is_few else NarrowStep
            step = kind(model, size, new, self.ids, self.logits)
            self._step: Callable[[], None] = step
        else:
            step = WideStep(model, size, new)
            self._step = lambda: step(self.ids, self.logits)
        self._states = step.states
        self._choose = self._chooser(config.n_tokens)
        self.graph: torch.cuda.CUDAGraph | None = None
        if graph:
            self._launch()  # compiles
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._launch()

    def run(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            self._launch()

    def load(self, state: State) -> None:
        """Copy a state of at most `size` sequences into this memory."""
        for mine, theirs in zip(self._states, state.layers, strict=True):
            if mine is not None:
                assert isinstance(theirs, MambaState)
                mine.conv[: state.batch_size].copy_(theirs.conv)
                mine.ssm[: state.batch_size].copy_(theirs.ssm)

    def saved(self, batch_size: int) -> State:
        layers: list[LayerState] = [
            None
            if layer is None
            else MambaState(
                layer.conv[:batch_size].to(self._conv_dtype, copy=True),
                layer.ssm[:batch_size].clone(),
            )
            for layer in self._states
        ]
        return State(batch_size, tuple(layers))

    def _launch(self) -> None:
        self._step()
        self._choose()

    def _chooser(self, n_tokens: int) -> Callable[[], object]:
        from blackmamba.ops.decode import kernels

        args = (self.logits, self.ids, self.choice, n_tokens, self.logits.stride(0), self.size)
        return launcher(kernels.greedy_kernel, (self.size,), args, {"BK": 4096, "num_warps": 16})
