"""What AdamW keeps for one parameter."""

import dataclasses

import torch
from torch import Tensor

from blackmamba.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamWTensors:
    """A parameter and what its update needs, all of one shape and contiguous."""

    parameter: Tensor
    """float32, bfloat16 or float16; written."""
    gradient: Tensor
    """In any of these."""
    exp_avg: Tensor
    """m, float32; written."""
    exp_avg_sq: Tensor
    """v, float32; written."""
    master: Tensor | None = None
    """The parameter in float32; written. None: the parameter has no other copy."""
    decay: float = 0.0
    """Weight decay."""

    def check(self) -> None:
        """See that the tensors go together.

        Raises:
            InputError: they do not.
        """
        shape, device = self.parameter.shape, self.parameter.device
        for field in dataclasses.fields(self):
            tensor = getattr(self, field.name)
            if not isinstance(tensor, Tensor):
                continue
            if tensor.shape != shape or tensor.device != device:
                raise InputError(
                    f"adamw: {field.name} has shape {tuple(tensor.shape)} on {tensor.device}, "
                    f"must be {tuple(shape)} on {device}"
                )
            if not tensor.is_contiguous():
                raise InputError(f"adamw: {field.name} is not contiguous")
            wide = field.name not in ("parameter", "gradient")
            if wide and tensor.dtype != torch.float32:
                raise InputError(f"adamw: {field.name} is {tensor.dtype}, must be torch.float32")
        if self.master is None and self.parameter.dtype == torch.float16:
            raise InputError("adamw: a float16 parameter needs a master")
