"""What tests let ranks do: run several runs, one after the other; or fail."""

import contextlib
import os
import resource
import signal
import threading
from collections.abc import Collection, Generator
from pathlib import Path
from typing import Any

from many_ranks import say

from blackmamba.data import WindowSampler
from blackmamba.errors import BlackMambaError
from blackmamba.model import BlackMamba
from blackmamba.model.balance import Losses
from blackmamba.train import Progress, RunConfig, load_recipe, run, runner, staging
from blackmamba.train.parallel import watch

Incident = tuple[str, int, int]
"""What happens, to which rank, when it reads the batch of which step (from 1)."""


def train_all(runs: list[tuple[RunConfig, Path, bool]]) -> list[Any]:
    """The result of each run: (configuration, folder, resume)."""
    _draw_nothing()
    results: list[Any] = []
    for config, out, resume in runs:
        say(f"run {out.name}")
        results.append(run(config, out, resume=resume))
    return results


def train_spiky(bad: set[int], runs: list[tuple[RunConfig, Path, bool]]) -> list[Any]:
    """As `train_all`, with batches whose loss is an outlier."""
    with spiking(bad):
        return train_all(runs)


@contextlib.contextmanager
def spiking(bad: Collection[int]) -> Generator[list[int]]:
    """Batches of these numbers have a loss thirty times as large; gives the numbers of those that
    were read."""
    read = list[int]()
    batch, losses = WindowSampler.batch, BlackMamba.losses

    def reads(self: WindowSampler, step: int, *args: Any) -> Any:
        read.append(step)
        return batch(self, step, *args)

    def spikes(self: BlackMamba, *args: Any, **options: Any) -> Losses:
        found, factor = losses(self, *args, **options), 30 if read[-1] in bad else 1
        return found._replace(
            total=found.total * factor, cross_entropy=found.cross_entropy * factor
        )

    WindowSampler.batch, BlackMamba.losses = reads, spikes  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield read
    finally:
        WindowSampler.batch, BlackMamba.losses = batch, losses


def train_some(
    runs: list[tuple[RunConfig, Path, bool]], last: tuple[RunConfig, Path, bool, Incident | None]
) -> tuple[str, str]:
    """Several runs, and how one more ended."""
    train_all(runs)
    return _train(*last)


def train_badly(runs: list[tuple[RunConfig, Path, bool, Incident | None]]) -> list[tuple[str, str]]:
    """How each run ended: the name of the error, or "", and what it says."""
    _draw_nothing()
    return [_train(config, out, resume, incident) for config, out, resume, incident in runs]


def _train(
    config: RunConfig, out: Path, resume: bool, incident: Incident | None
) -> tuple[str, str]:
    read = WindowSampler.batch
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def batch(self: WindowSampler, step: int, rank: int = 0, world_size: int = 1) -> Any:
        if incident is not None and incident[1:] == (rank, step + 1):
            if incident[0].startswith("SIG"):
                os.kill(os.getpid(), signal.Signals[incident[0]])
            else:  # a full disk: no file may grow beyond 3 kB
                resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, limits[1]))
        return read(self, step, rank, world_size)

    WindowSampler.batch = batch  # pyright: ignore[reportAttributeAccessIssue]
    say(f"run {out.name}")
    try:
        run(config, out, resume=resume)
    except (BlackMambaError, KeyboardInterrupt) as error:
        return type(error).__name__, str(error)
    finally:
        WindowSampler.batch = read
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "", ""


def train_until_killed(recipe: Path, out: Path, step: int, place: str) -> None:
    """Goes on with a run, and dies without any clean-up after the step or inside the checkpoint
    that it is told."""

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    class Death(Progress):
        def on_step(self, row: dict[str, Any]) -> None:
            if row["step"] == step:
                if place == "checkpoint":
                    staging.settle = die  # weights and moments are written, the rest is not
                else:
                    die()

    _draw_nothing()
    run(load_recipe(recipe), out, resume=True, progress=Death())


def outlive(config: RunConfig, out: Path, incident: Incident) -> tuple[str, str]:
    """How a run ended for a rank, of which another one dies."""
    watch._BEAT_S = 0.05  # a rank that is dead will not tell more if it is waited for longer
    _draw_nothing()
    return _train(config, out, False, incident)


def waits_for_nothing(what: str) -> int:
    """Rank 1 "hangs", "crashes", "dies" or fails; the other waits."""
    rank = int(os.environ["RANK"])
    if rank == 1:
        say("in step 3")
        if what == "hangs":
            threading.Event().wait()
        if what == "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        if what == "dies":
            os._exit(7)
        raise ValueError("rank 1 alone")
    say("waits")
    threading.Event().wait()
    return rank


def _draw_nothing() -> None:
    """Pictures would take as long as the runs. In this process alone, which is a rank."""
    for name in ("draw_loss", "draw_experts"):
        setattr(runner, name, lambda *_: None)
