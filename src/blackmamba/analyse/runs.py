"""Many short training runs over the same data, each a folder of its own that is not made twice."""

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blackmamba.analyse.experts import rule_gap
from blackmamba.checkpoint import load
from blackmamba.config import ModelConfig
from blackmamba.data import DataConfig, MixtureData, PreparedData, prepare
from blackmamba.errors import OutOfTimeError
from blackmamba.files import write_text
from blackmamba.model import BlackMamba
from blackmamba.model.size import training_flops_per_token
from blackmamba.train import RunConfig, TrainConfig, run
from blackmamba.train.checkpoints import newest_checkpoint
from blackmamba.train.metrics import METRICS_FILE, read_metrics

_DATA, _FINAL, _CHECKPOINTS = "data", "final.json", "checkpoints"
_ROWS = 64  # windows that are read together


@dataclasses.dataclass(frozen=True)
class Curve:
    """A finished run."""

    name: str
    seed: int
    folder: Path
    config: ModelConfig
    seq_len: int
    tokens: tuple[int, ...]
    """Read up to the end of each step."""
    losses: tuple[float, ...]
    """Training loss of each step, nats per token."""
    seconds: tuple[float, ...]
    """Since the run's start."""
    final_nats: float
    """Validation loss at the end, nats per token, in windows of seq_len that begin with an empty
    memory: attention was not trained to look back further, so that it would lose by more."""
    final_bits: float
    """The same, bits per byte."""
    final_training_nats: float | None
    """The same by training's rule of routing over 64 windows, where experts are; None: of a run
    that was made before that was looked at."""

    @property
    def flops(self) -> tuple[float, ...]:
        """Training FLOPs up to the end of each step, by the closed form."""
        each = training_flops_per_token(self.config, self.seq_len)
        return tuple(float(each * n) for n in self.tokens)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run to be made."""

    name: str
    """Of its folder and in figures."""
    config: ModelConfig
    seed: int
    """Of weights and order of the text."""
    settings: TrainConfig
    """Its seed is not looked at."""
    keeps_checkpoints: bool = False
    """Whether those of its way are still there at the end; else they are for going on from."""


class Bench:
    """Trains networks on one prepared text, under one folder.

    Args:
        folder: of all its runs; what is finished in it is read and not trained again.
        data: the text; one that is prepared is a source of a mixture.
        jobs: so many runs at once, each a process; 1: in this one, one after the other. Several
            share the GPUs that are visible, each process on one of them in turn.
        tell: is given a line when a run begins or, of several at once, ends.
        seconds: from now on; runs that are not finished by then are cut. Infinity: none is.
    """

    def __init__(
        self,
        folder: Path,
        data: DataConfig,
        jobs: int = 1,
        tell: Callable[[str], None] = lambda _: None,
        seconds: float = math.inf,
    ):
        self._folder, self._data, self._jobs, self._tell = folder, data, jobs, tell
        self._seconds, self._end = seconds, time.monotonic() + seconds

    def train(self, plans: Iterable[Plan]) -> None:
        """Make the runs that are not finished yet: seed by seed, of each the widest networks first.

        Raises:
            OutOfTimeError: the time is over; a run that was cut goes on the next time.
        """
        missing = {(p.name, p.seed): p for p in plans if not self._is_done(p)}
        waiting = sorted(missing.values(), key=lambda plan: (plan.seed, -plan.config.d_model))
        if waiting and not self._data.sources:
            prepare(self._data, self._folder / _DATA)
        orders = [
            (self._run_config(p), self._of(p), self._folder / _DATA, p.keeps_checkpoints)
            for p in waiting
        ]
        if not waiting or (self._jobs == 1 and math.isinf(self._end)):
            for plan, order in zip(waiting, orders, strict=True):
                self._tell(f"training {_words(plan)}")
                _train(*order)
            return
        self._tell(f"training {len(waiting)} runs, {self._jobs} at once")
        threads = max(1, torch.get_num_threads() // self._jobs)
        others = active_children()
        context = get_context("spawn")
        pool = ProcessPoolExecutor(
            min(self._jobs, len(waiting)), context, _begin, (context.Value("i", 0), threads)
        )
        try:
            running = {
                pool.submit(_train, *order): plan
                for plan, order in zip(waiting, orders, strict=True)
            }
            left = None if math.isinf(self._end) else max(0.0, self._end - time.monotonic())
            for done in as_completed(running, left):
                self._tell(f"{_words(running[done])}: {done.result():.4f} nats a token")
        except TimeoutError:
            self._kill(others)
            unfinished = sum(not self._is_done(plan) for plan in waiting)
            raise OutOfTimeError(
                f"time is up after {self._seconds:g} s: {len(waiting) - unfinished} of "
                f"{len(waiting)} runs are finished and kept in {self._folder}; "
                "to go on, run the same again"
            ) from None
        except BaseException:
            self._kill(others)
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    @staticmethod
    def _kill(others: Collection[BaseProcess]) -> None:
        """End this process's children but for `others`; their runs go on the next time."""
        for child in active_children():
            if child not in others:
                child.kill()

    def curve(self, plan: Plan) -> Curve:
        """Of a run, which is made if it is not finished."""
        self.train([plan])
        seq_len = plan.settings.seq_len
        return _read(plan.name, plan.seed, self._of(plan), plan.config, seq_len)

    def checkpoints(self, curve: Curve) -> dict[int, BlackMamba]:
        """The models that a run saved on its way, in evaluation mode, by step."""
        folders = sorted((curve.folder / _CHECKPOINTS).glob("step-*"))
        return {int(folder.name.removeprefix("step-")): load(folder) for folder in folders}

    def opened(self, curve: Curve) -> PreparedData | MixtureData:
        """What a run read."""
        return _opened(self._data, curve.folder)

    def _of(self, plan: Plan) -> Path:
        return self._folder / f"{plan.name}-seed{plan.seed}"

    def _is_done(self, plan: Plan) -> bool:
        return (self._of(plan) / _FINAL).exists()

    def _run_config(self, plan: Plan) -> RunConfig:
        train = dataclasses.replace(plan.settings, seed=plan.seed)
        return RunConfig(model=plan.config, data=self._data, train=train)


def _begin(begun: Any, threads: int) -> None:
    """In each process of a pool, before its first run: its threads, and the GPU that is its own.

    Args:
        begun: a number that they share, of those that came before.
        threads: of each.
    """
    torch.set_num_threads(threads)
    with begun.get_lock():
        number = begun.value
        begun.value += 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def _words(plan: Plan) -> str:
    return f"{plan.name}, seed {plan.seed}: {plan.settings.steps} steps"


def _train(config: RunConfig, folder: Path, prepared: Path, keeps_checkpoints: bool) -> float:
    """Make one run, from its newest checkpoint if it was cut; its validation loss.

    Text that was prepared once is copied: each run has its own folder of it.
    """
    goes_on = newest_checkpoint(folder / _CHECKPOINTS) is not None
    if not goes_on:
        shutil.rmtree(folder, ignore_errors=True)
        if not config.data.sources:
            shutil.copytree(prepared, folder / _DATA)
    run(config, folder, resume=goes_on)
    if not keeps_checkpoints:
        shutil.rmtree(folder / _CHECKPOINTS)
    loss = windowed_loss(folder, config.data, config.train.seq_len)
    write_text(folder / _FINAL, json.dumps(dataclasses.asdict(loss)) + "\n")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the next run of this process may be of another size
    return loss.nats


def _opened(data: DataConfig, folder: Path) -> PreparedData | MixtureData:
    if data.sources:
        return MixtureData(data, folder / _DATA)
    return PreparedData.open(folder / _DATA)


def _read(name: str, seed: int, folder: Path, config: ModelConfig, seq_len: int) -> Curve:
    rows = [row for row in read_metrics(folder / METRICS_FILE) if row["loss"] is not None]
    final = json.loads((folder / _FINAL).read_text(encoding="utf-8"))
    return Curve(
        name=name,
        seed=seed,
        folder=folder,
        config=config,
        seq_len=seq_len,
        tokens=tuple(row["tokens"] for row in rows),
        losses=tuple(row["loss"] for row in rows),
        seconds=tuple(row["seconds"] for row in rows),
        final_nats=final["nats"],
        final_bits=final["bits"],
        final_training_nats=final.get("training_nats"),
    )


@dataclasses.dataclass(frozen=True)
class WindowedLoss:
    """On held-out text, in windows read from an empty memory."""

    nats: float
    """Per token, by the inference rule of routing."""
    bits: float
    """Per byte, by the same."""
    training_nats: float
    """Per token, by the training rule over 64 windows, which sees tokens that come later."""


def windowed_loss(folder: Path, data: DataConfig, seq_len: int) -> WindowedLoss:
    """Of a run's model.

    Args:
        folder: of a finished run.
        data: what it was told to read.
        seq_len: tokens of a window; what is left over at the end is not read.
    """
    validation = _opened(data, folder).validation
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load(folder / "model", device=device)
    ids = torch.from_numpy(validation.tokens[:].astype(np.int64)).to(device)
    seq_len = min(seq_len, len(ids) - 1)
    windows = (len(ids) - 1) // seq_len
    inputs, labels = (
        ids[first : first + windows * seq_len].view(windows, seq_len).split(_ROWS)
        for first in (0, 1)
    )
    found = rule_gap(model, zip(inputs, labels, strict=True))
    tokens_per_byte = validation.n_tokens / validation.n_bytes
    nats = found.inference_nats
    return WindowedLoss(nats, nats * tokens_per_byte / math.log(2), found.training_nats)
