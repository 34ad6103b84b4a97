"""Which steps are so unusual that their gradient should not be trusted.

Source: skipping and going back as in Chowdhery et al. 2022 (arXiv 2204.02311), section 5.1: a spike
comes of a state of the weights and certain data together, so other data help. The rule, median and
median absolute deviation, is the usual robust one; 1.4826 makes the latter a standard deviation for
normal numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_TO_DEVIATION = 1.4826
_LEAST = 0.01  # of the median: a smaller deviation counts as this one


class SpikeGuard:
    """Tells outliers among losses and gradient norms, on their device; nothing waits for it.

    A step is an outlier if its loss or its norm is above the median of the last `window` usual
    steps by more than `threshold` deviations. The first `window` steps are all usual. What is an
    outlier is not remembered.

    Args:
        window: steps that are remembered, at least 2.
        threshold: deviations.
        device: of the numbers.
        remembered: losses, then norms, of earlier steps, oldest first, to go on from.
    """

    def __init__(
        self,
        window: int,
        threshold: float,
        device: torch.device,
        remembered: tuple[Sequence[float], Sequence[float]] = ((), ()),
    ):
        self._window, self._threshold = window, threshold
        self._recent = torch.full((2, window), torch.nan, dtype=torch.float64)
        count = len(remembered[0])
        for row, values in zip(self._recent, remembered, strict=True):
            row[:count] = torch.tensor(values, dtype=torch.float64)
        self._recent = self._recent.to(device)
        self._places = torch.arange(window, device=device)
        self._count = torch.tensor(count, device=device)

    def is_usual(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether a step with these finite scalars may be taken; if so they are remembered.

        Returns:
            A bool scalar on their device; False also if one is not finite.
        """
        numbers = torch.stack((loss.double(), norm.double()))
        middle = self._median(self._recent)
        spread = self._median((self._recent - middle).abs()) * _TO_DEVIATION
        spread = torch.maximum(spread, _LEAST * middle.abs())
        above = (numbers > middle[:, 0] + self._threshold * spread[:, 0]).any()
        is_usual = numbers.isfinite().all() & ~(above & (self._count >= self._window))
        here = (self._places == self._count % self._window) & is_usual
        self._recent = torch.where(here, numbers[:, None], self._recent)
        self._count += is_usual
        return is_usual

    def remembered(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Losses and norms, oldest first. Waits for the device."""
        count = int(self._count)
        ordered = self._recent.roll(-(count % self._window) if count > self._window else 0, 1)
        losses, norms = ordered[:, : min(count, self._window)].tolist()
        return tuple(losses), tuple(norms)

    def _median(self, rows: Tensor) -> Tensor:
        """The lower median of each row's known numbers, (2, 1); NaN where there is none."""
        known = torch.minimum(self._count, self._places[-1] + 1)
        place = ((known - 1) // 2).clamp(min=0)
        return rows.sort(dim=1).values.gather(1, place.expand(2, 1))  # NaN comes last
