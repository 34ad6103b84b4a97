"""What a batch of sequences remembers: all of it, in one immutable object.

For a Mamba layer that is the convolution's last inputs and the SSM state, whose size does not
depend on how many tokens were read. For an attention layer it is the keys and values of every token
so far. Beam search, batching and prompt caches need nothing but the methods here.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from blackmamba.errors import InputError


@dataclasses.dataclass(frozen=True)
class MambaState:
    conv: Tensor
    """(b, d, k - 1): the convolution's last inputs, oldest first; the products' dtype."""
    ssm: Tensor
    """(b, d, n): h of the recurrence; float32 or wider."""


@dataclasses.dataclass(frozen=True)
class AttentionState:
    keys: Tensor
    """(b, g, s, h) for g key heads of width h; index s is the token's position in its row."""
    values: Tensor
    """(b, g, s, h)."""
    lengths: Tensor
    """(b,) int64: how many positions of each row are real."""


LayerState = MambaState | AttentionState | None


@dataclasses.dataclass(frozen=True)
class State:
    """Memory of `batch_size` sequences, one entry a layer; None where a layer has none."""

    batch_size: int
    layers: tuple[LayerState, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.numel() * t.element_size() for t in self.to_tensors().values())

    def clone(self) -> "State":
        """A copy that shares no memory with this one."""
        return self._map(Tensor.clone, self.batch_size)

    def to(self, device: torch.device | str) -> "State":
        """The same memory on another device."""
        return self._map(lambda t: t.to(device), self.batch_size)

    def select(self, rows: Tensor | Sequence[int]) -> "State":
        """Gather rows: to drop finished ones, repeat one for a beam, or reorder.

        Args:
            rows: indices 0 .. batch_size - 1, in any order, repeats allowed.
        Raises:
            InputError: an index is out of range.
        """
        index = torch.as_tensor(rows, dtype=torch.int64)
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.batch_size:
            raise InputError(f"rows={index.tolist()}: must be within 0 .. {self.batch_size - 1}")
        return self._map(lambda t: t.index_select(0, index.to(t.device)), index.numel())

    @staticmethod
    def cat(states: "Sequence[State]") -> "State":
        """One batch out of several, rows in order. All must come from the same model.

        Attention rows of different lengths are padded at the end to the longest.
        """
        if not states:
            raise InputError("states is empty: cat needs at least one State")
        return State(
            sum(s.batch_size for s in states),
            tuple(_cat_layer(parts) for parts in zip(*(s.layers for s in states), strict=True)),
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """Its tensors by name ("3.ssm"), to be written with safetensors; see `from_tensors`."""
        return {
            f"{i}.{field.name}": getattr(layer, field.name)
            for i, layer in enumerate(self.layers)
            if layer is not None
            for field in dataclasses.fields(layer)
        }

    @staticmethod
    def from_tensors(like: "State", tensors: Mapping[str, Tensor]) -> "State":
        """What `to_tensors` gave, as a State again.

        Args:
            like: any State of the same model, such as `model.initial_state(1)`.
            tensors: as from `to_tensors`.
        Raises:
            InputError: names do not match the model's layers.
        """
        if set(tensors) != set(like.to_tensors()):
            odd = sorted(set(tensors) ^ set(like.to_tensors()))
            raise InputError(f"state tensors do not match this model: {', '.join(odd)}")
        layers = tuple(
            None
            if layer is None
            else type(layer)(
                **{f.name: tensors[f"{i}.{f.name}"] for f in dataclasses.fields(layer)}
            )
            for i, layer in enumerate(like.layers)
        )
        sizes = {len(t) for t in tensors.values()} or {like.batch_size}
        if len(sizes) != 1:
            raise InputError(f"state tensors have different batch sizes: {sorted(sizes)}")
        return State(sizes.pop(), layers)

    def _map(self, change: Callable[[Tensor], Tensor], batch_size: int) -> "State":
        return State(
            batch_size,
            tuple(
                None
                if layer is None
                else type(layer)(
                    **{f.name: change(getattr(layer, f.name)) for f in dataclasses.fields(layer)}
                )
                for layer in self.layers
            ),
        )


def _cat_layer(parts: Sequence[LayerState]) -> LayerState:
    first = parts[0]
    if first is None:
        return None
    attention = [p for p in parts if isinstance(p, AttentionState)]
    if attention:
        longest = max(p.keys.shape[2] for p in attention)

        def padded(cache: Tensor) -> Tensor:
            return torch.nn.functional.pad(cache, (0, 0, 0, longest - cache.shape[2]))

        return AttentionState(
            torch.cat([padded(p.keys) for p in attention]),
            torch.cat([padded(p.values) for p in attention]),
            torch.cat([p.lengths for p in attention]),
        )
    names = [field.name for field in dataclasses.fields(first)]
    return type(first)(**{n: torch.cat([getattr(p, n) for p in parts]) for n in names})
