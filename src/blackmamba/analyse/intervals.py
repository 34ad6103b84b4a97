"""Means over few runs, with the interval that so few allow."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

_T_95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t, two-sided 95 %, by degrees of freedom from 0."""


@dataclasses.dataclass(frozen=True)
class Mean:
    """Of n values."""

    value: float
    half_width: float
    """Of the 95 % interval by Student's t; NaN for a single value."""
    n: int

    def __str__(self) -> str:
        return format(self, "")

    def __format__(self, sign: str) -> str:
        """With "+", the value has its sign in any case."""
        value = f"{self.value:{sign}.4f}"
        return value if math.isnan(self.half_width) else f"{value} ± {self.half_width:.4f}"


def mean(values: Sequence[float]) -> Mean:
    """Mean and 95 % interval, as if the values were drawn from a normal distribution."""
    n = len(values)
    if n == 1:
        return Mean(values[0], math.nan, 1)
    t = _T_95[n - 1] if n <= len(_T_95) else 1.96 + 2.4 / (n - 1)
    return Mean(statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n), n)
