"""Checkpoints written beside the training are those of a run that waits for them."""

import errno
import json
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks_train import spiking

from blackmamba.errors import CheckpointError
from blackmamba.train import Progress, RunConfig, checkpoints, run, staging
from blackmamba.train.metrics import read_metrics
from blackmamba.train.parallel.ranks import Ranks
from blackmamba.train.saver import Saver

Small = Callable[..., RunConfig]
pytestmark = pytest.mark.usefixtures("draw_nothing")
_PATIENCE_S = 60.0  # of a test that fails


class Late(Progress):
    """Lets no checkpoint be written before the next step is done, but for the last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: int):
        self.done, self._steps, self.saved = threading.Condition(), steps, list[str]()
        self._last = 0
        self._write = staging._write_whole
        monkeypatch.setattr(staging, "_write_whole", self._late)

    def on_step(self, row: dict[str, Any]) -> None:
        with self.done:
            self._last = row["step"]
            self.done.notify_all()

    def on_checkpoint(self, folder: Path) -> None:
        assert threading.current_thread() is threading.main_thread()
        self.saved.append(folder.name)

    def _late(self, folder: Path, *rest: Any) -> None:
        until = min(self._steps, int(folder.name[5:]) + 1)
        with self.done:
            assert self.done.wait_for(lambda: self._last >= until, _PATIENCE_S), "was waited for"
        self._write(folder, *rest)


def content(out: Path) -> dict[str, bytes]:
    """Of all files of all checkpoints, without what a clock says and the option itself."""
    found = {str(p.relative_to(out)): p.read_bytes() for p in (out / "checkpoints").rglob("*.*")}
    for name in [n for n in found if n.endswith("trainer.json")]:
        trainer = json.loads(found[name])
        trainer["counters"].pop("seconds")
        trainer["config"]["train"].pop("checkpoint_async")
        found[name] = json.dumps(trainer).encode()
    return {name: each for name, each in found.items() if "checksums" not in name}


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl")]


def test_the_training_goes_on_and_the_copy_does_not(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = {"checkpoint_every": 3, "evaluate_every": 4, "keep_best": True, "ema_decay": 0.9}
    settings |= {"steps": 9}
    run(small(**settings), tmp_path / "waits")
    late = Late(monkeypatch, 9)
    run(small(**settings, checkpoint_async=True), tmp_path / "beside", progress=late)
    assert late.saved == [f"step-{n:08d}" for n in (3, 4, 6, 8, 9)]
    assert content(tmp_path / "beside") == content(tmp_path / "waits")
    assert losses(tmp_path / "beside") == losses(tmp_path / "waits")


def test_going_back_waits_for_what_is_being_written(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The checkpoint is not there when the outlier is, and is written when it is waited for."""
    settings = {"steps": 6, "checkpoint_every": 3, "spikes": "rollback", "spike_window": 3}
    with spiking({3}):
        run(small(**settings), tmp_path / "waits")
    asked, write, wait = threading.Event(), staging._write_whole, Saver.wait
    gone_back = list[tuple[int, int]]()

    def waits(self: Saver) -> None:
        if self._under_way is not None:
            asked.set()
        wait(self)

    def writes(folder: Path, *rest: Any) -> None:
        if folder.name == "step-00000003":
            assert asked.wait(_PATIENCE_S), "was not waited for"
            assert not gone_back
        write(folder, *rest)

    class Looks(Progress):
        def on_rollback(self, step: int, to: int) -> None:
            gone_back.append((step, to))

    monkeypatch.setattr(Saver, "wait", waits)
    monkeypatch.setattr(staging, "_write_whole", writes)
    with spiking({3}):
        run(small(**settings, checkpoint_async=True), tmp_path / "beside", progress=Looks())
    assert gone_back == [(4, 3)]
    assert losses(tmp_path / "beside") == losses(tmp_path / "waits")
    assert content(tmp_path / "beside") == content(tmp_path / "waits")


def test_going_back_to_what_could_not_be_written_ends_the_run(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = {"steps": 8, "checkpoint_every": 3, "spikes": "rollback", "spike_window": 3}
    config, write = small(**settings, checkpoint_async=True), staging._write_whole
    spiked = threading.Event()

    def writes(folder: Path, *rest: Any) -> None:
        if folder.name == "step-00000006":
            assert spiked.wait(_PATIENCE_S)
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, *rest)

    def waits(self: Saver) -> None:
        if self._under_way is not None and (tmp_path / "checkpoints/step-00000003").exists():
            spiked.set()
        wait(self)

    wait = Saver.wait
    monkeypatch.setattr(Saver, "wait", waits)
    monkeypatch.setattr(staging, "_write_whole", writes)
    with spiking({6}), pytest.raises(CheckpointError, match=r"step-00000006: .*No space left"):
        run(config, tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    monkeypatch.undo()
    with spiking({6}):
        assert run(config, tmp_path, resume=True).rollbacks == 1


@pytest.mark.usefixtures("signals")
def test_a_signal_waits_for_what_is_being_written(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Stopped(Late):
        def on_step(self, row: dict[str, Any]) -> None:
            if row["step"] == 5:
                signal.raise_signal(signal.SIGTERM)
                self._steps = 5
            super().on_step(row)

    config = small(checkpoint_every=4, checkpoint_async=True)
    with pytest.raises(KeyboardInterrupt, match="saved and stopped after step 5 of 12"):
        run(config, tmp_path / "out", progress=Stopped(monkeypatch, 12))
    assert sorted(p.name for p in (tmp_path / "out/checkpoints").iterdir()) == [
        "step-00000004", "step-00000005",
    ]  # fmt: skip
    newest = checkpoints.newest_checkpoint(tmp_path / "out/checkpoints")
    assert newest is not None
    checkpoints.check_files(newest, Ranks())


def test_a_full_disk_is_told_soon_and_once(small: Small, tmp_path: Path):
    config = small(checkpoint_every=4, steps=16, checkpoint_async=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Fills(Progress):
        def on_checkpoint(self, folder: Path) -> None:  # the first is whole, however long it took
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    try:
        with pytest.raises(CheckpointError, match=r"step-00000008: .* cannot be written"):
            run(config, tmp_path, progress=Fills())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 8 <= len(losses(tmp_path)) <= 12  # the next checkpoint would have to wait for it
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    assert run(config, tmp_path, resume=True).steps == 16


def test_an_error_of_the_training_is_the_one_that_is_told():
    def fails() -> Path:
        raise CheckpointError("no room")

    def ends(error: Exception | None) -> None:
        with Saver(print, is_async=True) as saver:
            saver.save(fails)
            if error is not None:
                raise error

    with pytest.raises(ValueError, match="of the training"):
        ends(ValueError("of the training"))
    with pytest.raises(CheckpointError, match="no room"):
        ends(None)
