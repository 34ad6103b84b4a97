"""Several runs side by side: what each reached, how fast, and in which settings they differ."""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from blackmamba.errors import TrainingError
from blackmamba.train.folder import RECIPE
from blackmamba.train.metrics import METRICS_FILE, Row, read_metrics

_LAST = 50  # steps over which a training loss is averaged
_NOT_SETTINGS = ("data.text", "train.loggers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run's folder says of it; the run may still be going on."""

    name: str
    rows: list[Row]
    """Lines of metrics.jsonl."""
    settings: dict[str, Any]
    """Of its recipe, by "train.lr" and the like."""

    @property
    def loss(self) -> float | None:
        """Mean training loss of the last steps, nats per token."""
        losses = [row["loss"] for row in self.rows[-_LAST:] if row["loss"] is not None]
        return statistics.fmean(losses) if losses else None

    @property
    def best(self) -> tuple[int, float, float] | None:
        """Step, nats per token and bits per byte of the best validation."""
        found = [
            (row["validation"]["nats_per_token"], row["step"], row["validation"]["bits_per_byte"])
            for row in self.rows
            if row.get("validation", {}).get("nats_per_token") is not None
        ]
        if not found:
            return None
        nats, step, bits = min(found)
        return step, nats, bits

    @property
    def tokens_per_s(self) -> float:
        """Median over the steps."""
        return statistics.median(row["tokens_per_s"] for row in self.rows)

    @property
    def skipped(self) -> int:
        """Steps without an update, for any reason."""
        return sum(row["skipped"] for row in self.rows)


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """A record of each; their names are as short as tells them apart.

    Raises:
        TrainingError: one is no run, or has no step yet, or is damaged.
    """
    short = [folder.resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    return [_read(folder, name) for folder, name in zip(folders, names, strict=True)]


def differing_settings(records: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Settings that are not the same in all runs, and each run's value ("-": it has none)."""
    keys = dict.fromkeys(key for record in records for key in record.settings)
    found: dict[str, list[str]] = {}
    for key in keys:
        values = [
            json.dumps(record.settings[key]) if key in record.settings else "-"
            for record in records
        ]
        if len(set(values)) > 1 and key not in _NOT_SETTINGS:
            found[key] = values
    return found


def smoothed(values: Sequence[float]) -> list[float]:
    """A moving average over about a fiftieth of all, without a lean to its beginning."""
    rest = max(0.0, 1 - 50 / max(1, len(values)))
    found: list[float] = []
    total = weight = 0.0
    for value in values:
        total, weight = rest * total + value, rest * weight + 1
        found.append(total / weight)
    return found


def _read(folder: Path, name: str) -> RunRecord:
    if not (folder / METRICS_FILE).is_file():
        raise TrainingError(f"{folder}: no run's folder: it has no {METRICS_FILE}")
    rows = read_metrics(folder / METRICS_FILE)
    if not rows:
        raise TrainingError(f"{folder}: this run has no step yet")
    try:
        recipe = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise TrainingError(f"{folder / RECIPE}: damaged or missing ({reason})") from None
    return RunRecord(name=name, rows=rows, settings=_flat(recipe))


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict):
            found |= _flat(cast("dict[str, Any]", value), f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
