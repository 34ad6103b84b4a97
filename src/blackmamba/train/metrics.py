"""What a run measures: a JSON object a line in metrics.jsonl, and whatever loggers are wanted.

Each step has exactly one line, also after resumes and roll-backs: step, loss, lr, grad_norm,
skipped, tokens, tokens_per_s, seconds. Every `log_every` steps a line has also `experts` (by
layer), `grad_norms` (by part) and `machine` (mean tokens_per_s since the last, mfu, memory_bytes);
some have `validation` and `validation_ema`. `spike` is true for an outlier; `rolled_back` says
what a roll-back before this step left out. A number that is not finite is null.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor

from blackmamba.errors import TrainingError
from blackmamba.files import write_text
from blackmamba.model import Routing
from blackmamba.train.loggers import Logger
from blackmamba.train.readings import Readings

Row = dict[str, Any]
METRICS_FILE = "metrics.jsonl"
_FIGURES = ("load_entropy", "router_entropy", "argmax_agreement", "mean_gate")


def _none(_: int) -> Sequence[Logger]:
    return ()


class MetricsLog:
    """Writes a run's metrics; a context manager.

    Args:
        folder: of the run.
        step: steps that are done; lines of later ones, from before a resume, are dropped.
        begin_loggers: opens the loggers that go on after so many steps.
    Raises:
        ConfigError: what a logger needs is not installed.
        TrainingError: the file is damaged or cannot be written.
    """

    def __init__(
        self, folder: Path, *, step: int, begin_loggers: Callable[[int], Sequence[Logger]] = _none
    ):
        self._path = folder / METRICS_FILE
        self._begin_loggers = begin_loggers
        self._begin(step)

    def _begin(self, step: int) -> None:
        rows = [row for row in read_metrics(self._path) if row["step"] <= step]
        try:
            write_text(self._path, "".join(map(_line, rows)))
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from None
        self._loggers = self._begin_loggers(step)

    def rewind(self, step: int) -> None:
        """Drop what was written of later steps."""
        self._close()
        self._begin(step)

    def write(self, row: Row) -> None:
        """Add a step."""
        left = memoryview(_line(row).encode())
        try:
            while left:  # a disk that is nearly full takes a part, and none the next time
                left = left[self._file.write(left) :]
        except OSError as error:
            raise self._unwritable(error) from None
        if self._loggers:
            numbers = dict(_scalars(row))
            for logger in self._loggers:
                logger.write(row["step"], numbers)

    def sync(self) -> None:
        """Put everything on disk, so that it is there whenever a later checkpoint is."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        self._file.close()
        for logger in self._loggers:
            logger.close()

    def _unwritable(self, error: OSError) -> TrainingError:
        return TrainingError(f"{self._path}: cannot be written ({error.strerror})")


class NoMetrics:
    """A `MetricsLog` of the ranks that leave writing to the first."""

    def write(self, row: Row) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def rewind(self, step: int) -> None:
        """Nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def read_metrics(path: Path) -> list[Row]:
    """The lines of a metrics.jsonl; none if there is no file. A last line cut short is left out.

    Raises:
        TrainingError: another line is damaged, or the file cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read ({error.strerror})") from None
    rows: list[Row] = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line end was cut short
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int):
                raise TypeError
            rows.append(row)
        except (ValueError, TypeError, KeyError):
            raise TrainingError(f"{path}: line {number} is damaged; remove it") from None
    return rows


class ExpertLoad:
    """How evenly each routed layer of a step used its experts; asking waits until it is known."""

    def __init__(self, routing: Mapping[int, Routing]):
        self._layers = list(routing)
        found: dict[str, Tensor] = {}
        for layer, routed in routing.items():
            stats = routed.statistics()
            load = stats.tokens_per_expert.double()
            figures = [getattr(stats, name) for name in _FIGURES]
            found[f"{layer} share"] = load / load.sum()
            found[f"{layer} figures"] = torch.stack([f.double() for f in figures])
        self._readings = Readings(found)

    def by_layer(self) -> dict[str, dict[str, Any]]:
        """By layer index: `RoutingStats` in numbers.

        max_load is the busiest expert's tokens over the mean (1: balanced), share each expert's
        part of the tokens. A figure that is not finite, as of logits that are not, is None.
        """
        known = self._readings.known()
        found: dict[str, dict[str, Any]] = {}
        for layer in self._layers:
            share, figures = known[f"{layer} share"], known[f"{layer} figures"]
            found[str(layer)] = {
                "max_load": max(share) * len(share),
                **dict(zip(_FIGURES, map(finite, figures), strict=True)),
                "share": [round(s, 6) for s in share],
            }
        return found


def finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _scalars(row: Mapping[str, Any], prefix: str = "train") -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        if isinstance(value, dict):
            inner = cast("dict[str, Any]", value)
            name = key if prefix == "train" else f"{prefix}/{key}"
            yield from _scalars(inner, name)
        elif isinstance(value, int | float) and key != "step":
            yield f"{prefix}/{key}", float(value)
