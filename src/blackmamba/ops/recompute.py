"""Less memory in training: outputs that are cheap to compute are not kept for the backward pass."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

Recompute = Literal["none", "cheap", "layers"]
"""What is computed twice. "cheap": outputs of norms and convolutions, one pass over memory each.
"layers": everything inside of a layer, matrix products too: a third more time."""


def not_kept(
    output: Tensor, again: Callable[[], Tensor], wanted: bool = True
) -> AbstractContextManager[object]:
    """A context in which operations that save `output` for backward keep `again` in its place.

    Args:
        output: fills its memory alone.
        again: computes the same numbers once more, from tensors that are kept anyway.
        wanted: whether to do anything.
    """
    if not (wanted and torch.is_grad_enabled() and output.requires_grad):
        return nullcontext()
    source = _Source(output, again)
    return torch.autograd.graph.saved_tensors_hooks(source.pack, source.unpack)


class _Source:
    """Gives an output to all that saved it: computed at the first request, let go at the last."""

    def __init__(self, output: Tensor, again: Callable[[], Tensor]):
        self._memory = output.untyped_storage().data_ptr()  # no reference: that would keep it
        self._dtype = output.dtype
        self._again = again
        self._n_saved = self._n_given = 0
        self._computed: Tensor | None = None

    def pack(self, saved: Tensor) -> Any:
        """What autograd keeps of a tensor."""
        if saved.untyped_storage().data_ptr() != self._memory or saved.dtype != self._dtype:
            return saved
        self._n_saved += 1
        return saved.shape, saved.stride(), saved.storage_offset()

    def unpack(self, packed: Any) -> Tensor:
        """The tensor, for the backward pass."""
        if isinstance(packed, Tensor):
            return packed
        if self._computed is None:
            with torch.no_grad():
                self._computed = self._again()
        found = self._computed.as_strided(*packed)
        self._n_given += 1
        if self._n_given == self._n_saved:
            self._n_given, self._computed = 0, None
        return found
