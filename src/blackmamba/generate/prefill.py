"""Prompts of a few thousand tokens on a GPU: read by one CUDA graph in place of some 250 launches.

Up to `MOST_TOKENS` the device would wait for the host. So the pass is recorded for a ladder of
shapes, each when it is met for the second time, and shorter pieces are padded to the next one. A
model keeps its last `KEPT` recordings; they share their working memory.

A recording is of the weights as they were. Where they still lie in the same memory the device
begins to read the prompt, and meanwhile the host looks whether anything has changed: then what was
read is thrown away.

Letters: b batch, l sequence, v vocabulary.
"""

import threading
import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from blackmamba.generate.captured import SIZES, Weights, cannot_capture_any, plain_weights
from blackmamba.generate.prompt import PromptPass
from blackmamba.model import BlackMamba, State
from blackmamba.ops import gpu

MOST_TOKENS = 16_384
"""With pads; more keep the device busy for longer than the host takes to launch them."""
KEPT = 24

LENGTHS = (
    16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12_288,
    16_384,
)  # fmt: skip
"""What rows are padded to."""


def read_piece(
    model: BlackMamba, input_ids: Tensor, state: State | None, lengths: Tensor | None
) -> tuple[Tensor, State]:
    """`model.prefill` with logits of each row's last token, recorded where that is faster.

    Args:
        model: in evaluation mode.
        input_ids: (b, l) int64, on any device, each within the vocabulary.
        state: memory to go on from; None: nothing was read yet.
        lengths: (b,) int64, on the CPU, 1 .. l; None: all rows are whole.
    Returns:
        Logits (b, v) and the new memory, on the model's device.
    """
    shape, recordings = _shape(*input_ids.shape), _KEPT.get(model)
    key: _Key | None = None
    if shape is not None:
        has_pads = input_ids.shape[1] < shape[1] or (
            lengths is not None and bool((lengths < shape[1]).any())
        )
        key = (*shape, has_pads or state is not None, has_pads)
    if recordings is not None and key is not None:
        found = recordings.read_at_once(model, key, input_ids, state, lengths)
        if found is not None:
            return found
    device = next(model.parameters()).device
    weights = None
    if device.type == "cuda" and key is not None and cannot_capture_any(model.config) is None:
        recordings = _KEPT.setdefault(model, _Recordings())
        weights = plain_weights(model, recordings.weights)
    if recordings is not None and weights is not None and key is not None:
        recording = recordings.find(model, weights, key)
        if recording is not None:
            return recording.read(input_ids, state, lengths)
    on_device = None if lengths is None else lengths.to(device)
    return model.prefill(input_ids.to(device), state, lengths=on_device, logits="last")


def _shape(b: int, l: int) -> tuple[int, int] | None:
    """Rows and tokens of the recording for (b, l); None if there is none so large."""
    rows = next((size for size in SIZES if size >= b), None)
    length = next((length for length in LENGTHS if length >= l), None)
    if rows is None or length is None or rows * length > MOST_TOKENS:
        return None
    return rows, length


_Key = tuple[int, int, bool, bool]
"""b, l, goes_on, has_pads."""


class _Recordings:
    """Those of one model."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._met: set[_Key] = set()
        self._kept: OrderedDict[_Key, Recording] = OrderedDict()
        self.weights: Weights | None = None
        """That the recordings are for."""
        self._memory: Memory | None = None
        self._pool: Any = None
        self._pass: PromptPass | None = None

    def read_at_once(
        self,
        model: BlackMamba,
        key: _Key,
        input_ids: Tensor,
        state: State | None,
        lengths: Tensor | None,
    ) -> tuple[Tensor, State] | None:
        """`read_piece` by a recording; None if there is none, or its weights are others by now."""
        with self._lock:
            recording, weights, memory = self._kept.get(key), self.weights, self._memory
            if recording is None or memory is None or not memory.is_same():
                return None
            self._kept.move_to_end(key)
        found = recording.read(input_ids, state, lengths)
        is_fit = cannot_capture_any(model.config) is None
        return found if is_fit and plain_weights(model, weights) == weights else None

    def find(self, model: BlackMamba, weights: Weights, key: _Key) -> "Recording | None":
        """The recording for this; None the first time."""
        with self._lock:
            if self.weights != weights:
                self._kept.clear()
                self.weights, self._pool = weights, torch.cuda.graph_pool_handle()
                self._pass, self._memory = PromptPass(model), Memory(model)
            if key not in self._kept:
                if key not in self._met:
                    self._met.add(key)
                    return None
                b, l, goes_on, has_pads = key
                self._kept[key] = Recording(
                    model, b, l, goes_on=goes_on, has_pads=has_pads, pool=self._pool, run=self._pass
                )
            self._kept.move_to_end(key)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return self._kept[key]


class Memory:
    """Where a model's parameters and buffers lie. Keeps none of them alive."""

    def __init__(self, model: BlackMamba):
        tensors = (*model.parameters(), *model.buffers())
        self._tensors = [(weakref.ref(tensor), tensor.data_ptr()) for tensor in tensors]

    def is_same(self) -> bool:
        """Whether all of them are still there: what was recorded may be run, for good or bad."""
        return all(
            (tensor := find()) is not None and tensor.data_ptr() == address
            for find, address in self._tensors
        )


_KEPT: weakref.WeakKeyDictionary[BlackMamba, _Recordings] = weakref.WeakKeyDictionary()


class Recording:
    """The pass over (b, l) tokens.

    Args:
        model: in evaluation mode; see `cannot_capture`.
        b, l: the shape; narrower batches and shorter rows are padded.
        goes_on: whether there is memory to go on from; a row without has zeros.
        has_pads: whether rows may be shorter than l.
        pool: memory that recordings which never run at the same time may share.
        graph: whether to record; without, the kernels are launched one by one.
        run: the pass; None: made here, or the model's own where there is no GPU.
    """

    def __init__(
        self,
        model: BlackMamba,
        b: int,
        l: int,
        *,
        goes_on: bool,
        has_pads: bool,
        pool: Any = None,
        graph: bool | None = None,
        run: PromptPass | None = None,
    ):
        device = next(model.parameters()).device
        self._model = weakref.proxy(model)
        self._lock = threading.Lock()
        self._ids = torch.zeros(b, l, dtype=torch.int64, device=device)
        self._lengths = torch.full((b,), l, device=device) if has_pads else None
        self._first = model.initial_state(b) if goes_on else None
        self._own = {} if self._first is None else self._first.to_tensors()
        self._pass = run or (PromptPass(model) if device.type == "cuda" else None)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._found: tuple[Tensor, State] | None = None
        if gpu.missing() is None and not gpu.interpreted() if graph is None else graph:
            self._run()  # compiles
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool):
                self._found = self._run()

    @torch.inference_mode()
    def read(
        self, input_ids: Tensor, state: State | None, lengths: Tensor | None
    ) -> tuple[Tensor, State]:
        """As `read_piece`, for at most as many rows and tokens."""
        b, l = input_ids.shape
        with self._lock:
            self._ids[:b, :l].copy_(input_ids, non_blocking=True)
            if self._lengths is not None:
                if lengths is None:
                    self._lengths[:b].fill_(l)
                else:
                    self._lengths[:b].copy_(lengths, non_blocking=True)
            if self._own:
                whole = b == len(self._ids)
                own = self._own if whole else {name: t[:b] for name, t in self._own.items()}
                given = {} if state is None else state.to_tensors()
                if given:
                    torch._foreach_copy_(list(own.values()), [given[name] for name in own])
                else:
                    torch._foreach_zero_(list(own.values()))
            if self._graph is not None:
                self._graph.replay()
            logits, found = self._found or self._run()
            return logits[:b].clone(), _first_rows(found, b)

    @torch.inference_mode()
    def _run(self) -> tuple[Tensor, State]:
        model: Any = self._model  # a weak proxy
        if self._pass is not None:
            return self._pass(model, self._ids, self._first, self._lengths)
        return model._read(self._ids, self._first, self._lengths)


def _first_rows(state: State, b: int) -> State:
    """A copy of the first b rows."""
    found = {name: tensor[:b] for name, tensor in state.to_tensors().items()}
    copies = {name: torch.empty_like(tensor) for name, tensor in found.items()}
    # those of one dtype at once: by one kernel on a GPU
    for dtype in {tensor.dtype for tensor in found.values()}:
        names = [name for name, tensor in found.items() if tensor.dtype == dtype]
        torch._foreach_copy_([copies[name] for name in names], [found[name] for name in names])
    return State.from_tensors(state, copies)
