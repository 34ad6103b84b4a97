"""Numbers on their way from the device to the host."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Readings:
    """Reads tensors of a device without stopping it; the first question waits until they are there.

    Args:
        tensors: by name, any shapes, all on one device. They are copied as they are now.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._sizes = {name: t.numel() for name, t in tensors.items()}
        numbers = torch.cat([t.detach().flatten().double() for t in tensors.values()])
        self._event: torch.cuda.Event | None = None
        if numbers.is_cuda:
            host = torch.empty_like(numbers, device="cpu", pin_memory=True)
            numbers = host.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        self._numbers = numbers

    def known(self) -> dict[str, list[float]]:
        """All numbers, in the tensors' row-major order."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        parts = self._numbers.split(list(self._sizes.values()))
        return {name: part.tolist() for name, part in zip(self._sizes, parts, strict=True)}
