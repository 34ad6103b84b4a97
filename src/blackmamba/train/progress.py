"""What a run tells of itself while it goes on, and a progress bar that shows it."""

from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from blackmamba.train.evaluation import Validation


class Progress:
    """Called by `run` as it goes on; does nothing. Override what you want to know."""

    def on_start(self, step: int, steps: int) -> None:
        """Training begins after `step` of `steps` steps (0 but for a resumed run)."""

    def on_step(self, row: dict[str, Any]) -> None:
        """A step is done; `row` is its line of metrics.jsonl."""

    def on_evaluation(self, step: int, validation: Validation) -> None:
        """The validation text was predicted after `step` steps."""

    def on_average(self, step: int, validation: Validation) -> None:
        """So did the moving average of the weights, if there is one."""

    def on_checkpoint(self, folder: Path) -> None:
        """A checkpoint is on disk."""

    def on_rollback(self, step: int, to: int) -> None:
        """Step `step` was an outlier: the run goes on from the checkpoint after `to` steps."""


class RichProgress(Progress):
    """A bar with loss, speed and time left; a context manager. Writes to `console` alone."""

    def __init__(self, console: Console):
        self._console = console
        self._bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TextColumn("{task.fields[mfu]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task(
            "train", total=None, loss="-", speed="-", mfu="", visible=False
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def on_start(self, step: int, steps: int) -> None:
        if step:
            self._console.print(f"going on after step {step}")
        self._bar.reset(self._task, total=steps, completed=step, visible=True)

    def on_step(self, row: dict[str, Any]) -> None:
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.3f}"
        skipped = ", skipped" if row["skipped"] else ""
        speed = row.get("machine", row)["tokens_per_s"]
        if "machine" in row:
            self._bar.update(self._task, mfu=f"MFU {100 * row['machine']['mfu']:.0f} %")
        self._bar.update(
            self._task, completed=row["step"], loss=loss + skipped, speed=f"{speed:,.0f}"
        )

    def on_evaluation(self, step: int, validation: Validation) -> None:
        self._console.print(
            f"step {step}: validation {validation.nats_per_token:.3f} nats per token, "
            f"{validation.bits_per_byte:.3f} bits per byte",
            highlight=False,
        )

    def on_checkpoint(self, folder: Path) -> None:
        self._console.print(f"saved {folder}", highlight=False, markup=False)

    def on_average(self, step: int, validation: Validation) -> None:
        self._console.print(
            f"step {step}: average of weights {validation.nats_per_token:.3f} nats per token, "
            f"{validation.bits_per_byte:.3f} bits per byte",
            highlight=False,
        )

    def on_rollback(self, step: int, to: int) -> None:
        self._console.print(f"step {step}: an outlier; back to step {to}", highlight=False)
        self._bar.update(self._task, completed=to)
