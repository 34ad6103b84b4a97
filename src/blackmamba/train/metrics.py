"""What a run measures: a JSON object a line in metrics.jsonl and, if wanted, TensorBoard events.

Each step has exactly one line, also after resumes: step, loss, lr, grad_norm, skipped, tokens,
tokens_per_s, seconds; some have also `experts` (by layer) and `validation`. A number that is not
finite is null.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, cast

from blackmamba.errors import ConfigError, TrainingError
from blackmamba.files import write_text
from blackmamba.model import Routing

Row = dict[str, Any]
METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Writes a run's metrics; a context manager.

    Args:
        folder: of the run.
        step: steps that are done; lines of later ones, from before a resume, are dropped.
        tensorboard: also write event files into folder/tensorboard.
    Raises:
        ConfigError: TensorBoard is wanted and not installed.
        TrainingError: the file is damaged or cannot be written.
    """

    def __init__(self, folder: Path, *, step: int, tensorboard: bool):
        self._path = folder / METRICS_FILE
        rows = [row for row in read_metrics(self._path) if row["step"] <= step]
        try:
            write_text(self._path, "".join(map(_line, rows)))
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from None
        self._writer: Any = None
        if tensorboard:
            self._writer = _summary_writer()(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, row: Row) -> None:
        """Add a step."""
        left = memoryview(_line(row).encode())
        try:
            while left:  # a disk that is nearly full takes a part, and none the next time
                left = left[self._file.write(left) :]
        except OSError as error:
            raise self._unwritable(error) from None
        if self._writer is not None:
            for name, value in _scalars(row):
                self._writer.add_scalar(name, value, row["step"])

    def sync(self) -> None:
        """Put everything on disk, so that it is there whenever a later checkpoint is."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def _unwritable(self, error: OSError) -> TrainingError:
        return TrainingError(f"{self._path}: cannot be written ({error.strerror})")


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


def expert_load(routing: Mapping[int, Routing]) -> dict[str, dict[str, float]]:
    """How evenly each routed layer used its experts, by layer index.

    max_load is the busiest expert's tokens over the mean (1: balanced); the others are those of
    `RoutingStats`.
    """
    found: dict[str, dict[str, float]] = {}
    for layer, routed in routing.items():
        stats = routed.statistics()
        load = stats.tokens_per_expert.double()
        found[str(layer)] = {
            "max_load": (load.max() / load.mean()).item(),
            "load_entropy": stats.load_entropy.item(),
            "argmax_agreement": stats.argmax_agreement.item(),
            "mean_gate": stats.mean_gate.item(),
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
        elif value is not None and key != "step":
            yield f"{prefix}/{key}", float(value)


def check_tensorboard() -> None:
    """See that TensorBoard's event files can be written.

    Raises:
        ConfigError: it is not installed.
    """
    _summary_writer()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "train.tensorboard=true: tensorboard is not installed; "
            "pip install 'blackmamba[train]', or set train.tensorboard=false"
        ) from None
    return SummaryWriter
