"""Pictures of runs: loss, experts, several runs side by side.

Without matplotlib there are none, and a warning in the log.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blackmamba.files import atomic_file
from blackmamba.train.compare import RunRecord, smoothed
from blackmamba.train.metrics import METRICS_FILE, Row, read_metrics

_DPI = 150
_BALANCED = 2.0  # the colours end at so many times an expert's fair share
_logger = logging.getLogger(__name__)


def draw_loss(folder: Path) -> None:
    """Draw metrics.jsonl as loss.png: training and validation loss over steps."""
    figure = _figure("loss.png", 7, 4.2)
    if figure is None:
        return
    rows = read_metrics(folder / METRICS_FILE)
    series = [("-", "training", [(r["step"], r["loss"]) for r in rows])]
    for key, label in (("validation", "validation"), ("validation_ema", "averaged weights")):
        found = [(r["step"], r[key]["nats_per_token"]) for r in rows if key in r]
        series += [("o-", label, found)] if found else []
    axes = figure.add_subplot()
    for style, label, points in series:
        known = [(step, loss) for step, loss in points if loss is not None]
        steps, losses = [step for step, _ in known], [loss for _, loss in known]
        axes.plot(steps, losses, style, linewidth=0.9, markersize=4, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    _write(figure, folder / "loss.png")


def draw_experts(folder: Path) -> None:
    """Draw metrics.jsonl as expert-load.png: who got which tokens, in the end and over the run.

    No picture if no layer has experts.
    """
    rows = [row for row in read_metrics(folder / METRICS_FILE) if "experts" in row]
    if not rows:
        return
    figure = _figure("expert-load.png", 11, 7)
    if figure is None:
        return
    layers = list(rows[-1]["experts"])
    steps = np.array([row["step"] for row in rows])
    loads = expert_loads(rows)
    grid = figure.add_gridspec(2, 2, width_ratios=(2, 3))
    _draw_last_load(figure, figure.add_subplot(grid[0, 0]), layers, loads)
    _draw_load_over_time(figure.add_subplot(grid[0, 1]), layers, steps, loads)
    busiest, agreement = figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
    colours = _colours(len(layers))
    for layer, colour in zip(layers, colours, strict=True):
        for axes, key in ((busiest, "max_load"), (agreement, "argmax_agreement")):
            values = [row["experts"][layer][key] for row in rows]
            axes.plot(steps, values, color=colour, linewidth=1.1, label=f"layer {layer}")
    busiest.set(xlabel="step", ylabel="tokens over the mean", title="busiest expert")
    busiest.set_ylim(bottom=1)
    agreement.set(xlabel="step", ylabel="share of tokens")
    agreement.set_title("training's choice is also inference's (the largest logit)")
    for axes in (busiest, agreement):
        axes.grid(alpha=0.3)
    shown = sorted({0, len(layers) // 2, len(layers) - 1}) if len(layers) > 8 else None
    handles, labels = agreement.get_legend_handles_labels()
    if shown is not None:
        handles, labels = [handles[i] for i in shown], [labels[i] for i in shown]
    agreement.legend(handles, labels, fontsize="small")
    _write(figure, folder / "expert-load.png")


def expert_loads(rows: Sequence[Row]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Each expert's tokens over its fair share: (records, layers, experts).

    NaN where a layer has fewer experts than another.
    """
    layers = list(rows[-1]["experts"])
    width = max(len(rows[-1]["experts"][layer]["share"]) for layer in layers)
    loads = np.full((len(rows), len(layers), width), np.nan)
    for i, row in enumerate(rows):
        for j, layer in enumerate(layers):
            share = row["experts"][layer]["share"]
            loads[i, j, : len(share)] = np.array(share) * len(share)
    return loads


def draw_comparison(records: Sequence[RunRecord], path: Path) -> bool:
    """Draw several runs' losses over tokens and over time; whether there is a picture.

    Training loss is smoothed; a dot is a validation.
    """
    figure = _figure(path.name, 11, 4.6)
    if figure is None:
        return False
    by_tokens, by_time = figure.subplots(1, 2, sharey=True)
    low, high = np.inf, -np.inf
    for index, record in enumerate(records):
        colour = f"C{index % 10}"
        rows = [row for row in record.rows if row["loss"] is not None]
        losses = smoothed([row["loss"] for row in rows])
        validated = [row for row in rows if row.get("validation", {}).get("nats_per_token")]
        found = [row["validation"]["nats_per_token"] for row in validated]
        for axes, key, unit in ((by_tokens, "tokens", 1e6), (by_time, "seconds", 60)):
            axes.plot(
                [row[key] / unit for row in rows], losses, color=colour, linewidth=1.1,
                label=record.name,
            )  # fmt: skip
            axes.plot(
                [row[key] / unit for row in validated], found, "o", color=colour, markersize=5,
                markeredgecolor="white",
            )  # fmt: skip
        if len(losses):  # what the first steps do would hide all the rest
            settled = [*losses[len(losses) // 10 :], *found]
            low, high = min(low, *settled), max(high, *settled)
    by_tokens.set(xlabel="million tokens", ylabel="loss (nats per token)")
    by_time.set(xlabel="minutes")
    if high > low:
        by_tokens.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    for axes in (by_tokens, by_time):
        axes.grid(alpha=0.3)
    by_tokens.legend(title="training; dots: validation", fontsize="small")
    _write(figure, path)
    return True


def _draw_last_load(figure: Any, axes: Any, layers: Sequence[str], loads: Any) -> None:
    """Layer by expert, the mean of the last tenth of the records."""
    last = loads[-max(1, len(loads) // 10) :].mean(axis=0)
    image = axes.imshow(last, aspect="auto", cmap="RdBu_r", vmin=0, vmax=_BALANCED)
    axes.set(xlabel="expert", ylabel="layer", title="load at the end (1: a fair share)")
    axes.set_yticks(range(len(layers)), layers, fontsize="small" if len(layers) > 12 else None)
    axes.set_xticks(range(last.shape[1]) if last.shape[1] <= 16 else [])
    if last.size <= 160:
        for (j, e), load in np.ndenumerate(last):
            if np.isfinite(load):
                dark = abs(load - 1) > 0.6
                axes.text(e, j, f"{load:.2f}", ha="center", va="center", fontsize="x-small",
                          color="white" if dark else "black")  # fmt: skip
    figure.colorbar(image, ax=axes, extend="max")


def _draw_load_over_time(axes: Any, layers: Sequence[str], steps: Any, loads: Any) -> None:
    """A row for each expert, layer by layer, over the steps."""
    width = loads.shape[2]
    by_expert = loads.reshape(len(steps), -1).T
    edge = (steps[1] - steps[0]) / 2 if len(steps) > 1 else 0.5
    axes.imshow(
        by_expert, aspect="auto", cmap="RdBu_r", vmin=0, vmax=_BALANCED, interpolation="nearest",
        extent=(steps[0] - edge, steps[-1] + edge, len(by_expert) - 0.5, -0.5),
    )  # fmt: skip
    for boundary in range(width, len(by_expert), width):
        axes.axhline(boundary - 0.5, color="black", linewidth=0.8)
    axes.set_yticks([width * j + (width - 1) / 2 for j in range(len(layers))], layers)
    axes.set(xlabel="step", ylabel="layer, each with a row an expert", title="load over the run")


def _colours(count: int) -> list[Any]:
    """From the first layer to the last."""
    from matplotlib import colormaps

    return [colormaps["viridis"](i / max(1, count - 1) * 0.9) for i in range(count)]


def _figure(name: str, width: float, height: float) -> Any:
    """An empty one; None, and a warning, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        _logger.warning("no %s: matplotlib is not installed; pip install 'blackmamba[train]'", name)
        return None
    return Figure(figsize=(width, height), layout="constrained")


def _write(figure: Any, path: Path) -> None:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI)
