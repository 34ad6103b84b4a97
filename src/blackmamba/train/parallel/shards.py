"""What one rank holds of the parameters, as plain tensors that an optimizer can step.

The optimizer is elementwise, so a rank updates its part alone, by the same kernels as one process,
and what it remembers of a parameter lies over the ranks as the parameter does.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor

from blackmamba.model import BlackMamba


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one parameter lies over the ranks."""

    shape: torch.Size
    """Of the whole."""
    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    """For each dimension of the mesh, whether and along which of its own it is cut."""
    host_mesh: DeviceMesh
    """The same mesh, of tensors in the host's memory."""

    @property
    def pieces(self) -> int:
        """Ranks that hold it together."""
        sizes = zip(self.placements, self.mesh.shape, strict=True)
        return math.prod(size for placement, size in sizes if placement.is_shard())

    def spread(self, piece: Tensor) -> DTensor:
        """This rank's piece, of the parameter or of anything of its shape, as part of the whole.

        It shares the piece's memory if that is on the device of the mesh or of the host's.
        """
        strides = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        return DTensor.from_local(
            piece.detach(),
            self.host_mesh if piece.device.type == "cpu" else self.mesh,
            self.placements,
            run_check=False,
            shape=self.shape,
            stride=tuple(strides),
        )

    def piece(self, whole: Tensor) -> Tensor:
        """What this rank has of it; all ranks have the same whole."""
        spread = distribute_tensor(whole, self.mesh, self.placements, src_data_rank=None)
        return spread.to_local()


class Shards(nn.Module):
    """The parameters of a spread model, by their names in it.

    A parameter that is cut has a plain twin here, which shares the memory of this rank's piece; one
    that is not is the model's own.

    Args:
        model: on its device and spread.
        layouts: of the parameters that are cut.
        size: all ranks.
    """

    def __init__(self, model: BlackMamba, layouts: Mapping[str, Layout], size: int):
        super().__init__()
        self.layouts = dict(layouts)
        self._size = size
        # Taken now: while a layer is gathered, the model has other tensors in their places.
        self._whole_or_cut = dict(model.named_parameters())
        self._twins = {n: _twin(p) for n, p in self._whole_or_cut.items()}
        self._names = {twin: name for name, twin in self._twins.items()}

    def named_parameters(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """What this rank holds of each parameter."""
        del prefix, recurse, remove_duplicate
        return iter(self._twins.items())

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """As `named_parameters`."""
        del recurse
        return iter(self._twins.values())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the model and of the twins."""
        del set_to_none
        for parameter in itertools.chain(self._whole_or_cut.values(), self._twins.values()):
            parameter.grad = None

    def pairs(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """Name, the model's parameter, and what this rank holds of it: the same if it is whole."""
        for name, own in self._whole_or_cut.items():
            yield name, own, self._twins[name]

    def piece_of_gradient(self, name: str) -> Tensor | None:
        """This rank's piece of the gradient of a parameter that FSDP has cut."""
        own, twin = self._whole_or_cut[name], self._twins[name]
        twin.data = _piece(own)  # it may have been moved
        return None if own.grad is None else _piece(own.grad)

    def is_expert(self, name: str) -> bool:
        """Whether this parameter is of experts that are spread over ranks."""
        return name in self.layouts and "expert" in (self.layouts[name].mesh.mesh_dim_names or ())

    def copies(self, name: str) -> int:
        """How many ranks hold the same numbers of this parameter."""
        return self._size // (self.layouts[name].pieces if name in self.layouts else 1)

    def spread(self, name: str, piece: Tensor) -> Tensor:
        """This rank's piece of something of the parameter's shape, as part of the whole."""
        return self.layouts[name].spread(piece) if name in self.layouts else piece

    def whole(self, name: str, piece: Tensor) -> Tensor:
        """All pieces put together; all ranks call it."""
        layout = self.layouts.get(name)
        if layout is None:
            return piece
        return layout.spread(piece.to(layout.mesh.device_type)).full_tensor()

    def gather(self, twin: nn.Parameter, piece: Tensor) -> Tensor:
        """As `whole`, by what this rank holds of the parameter."""
        return self.whole(self._names[twin], piece)

    def cut(self, twin: nn.Parameter, whole: Tensor) -> Tensor:
        """This rank's piece of something of the whole parameter's shape."""
        return self.piece(self._names[twin], whole)

    def piece(self, name: str, whole: Tensor) -> Tensor:
        """As `cut`, by the parameter's name."""
        layout = self.layouts.get(name)
        return whole if layout is None else layout.piece(whole)


def _twin(parameter: nn.Parameter) -> nn.Parameter:
    if not isinstance(parameter, DTensor):
        return parameter
    return nn.Parameter(_piece(parameter), requires_grad=parameter.requires_grad)


def _piece(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    assert isinstance(detached, DTensor)
    return detached.to_local()
