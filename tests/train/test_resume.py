"""A run that was stopped and resumed is the run that was not: bit for bit."""

import dataclasses
import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from many_ranks import alone
from ranks_train import train_until_killed

import blackmamba
from blackmamba.data import SourceConfig
from blackmamba.errors import CheckpointError, ConfigError, DataError
from blackmamba.ops.native import bfloat16
from blackmamba.train import Progress, RunConfig, load_recipe, run, write_recipe
from blackmamba.train.config import _found
from blackmamba.train.metrics import read_metrics

Small = Callable[..., RunConfig]


def rows(out: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock says."""
    clock = ("seconds", "tokens_per_s", "machine")
    found = read_metrics(out / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in clock} for row in found]


def assert_same_run(one: Path, other: Path, step: int) -> None:
    assert rows(one) == rows(other)
    names = ("model/model.safetensors", f"checkpoints/step-{step:08d}/optimizer.safetensors")
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


class At(Progress):
    """Does something after a step."""

    def __init__(self, step: int, action: Callable[[], object]):
        self.step, self.action = step, action
        self.begun = -1

    def on_start(self, step: int, steps: int) -> None:
        self.begun = step

    def on_step(self, row: dict[str, Any]) -> None:
        if row["step"] == self.step:
            self.action()


def stop() -> None:
    raise InterruptedError


# ---- killed --------------------------------------------------------------------------------


def test_killed_three_times(small: Small, tmp_path: Path):
    steps = 24
    config = small(steps=steps, accumulate=2, evaluate_every=7, checkpoint_every=5)
    chance = random.Random(os.getpid())
    moments = [
        (chance.randrange(1, 5), "step"),  # before there is a checkpoint
        (chance.randrange(6, 10), "step"),
        (chance.randrange(10, 20), "checkpoint"),
    ]
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "killed"
    write_recipe(config, recipe)
    for step, place in [*moments, (0, "nowhere")]:
        ended = alone(train_until_killed, recipe, out, step, place)
        assert ended == (-signal.SIGKILL if step else None), moments
        if place == "checkpoint":
            assert list((out / "checkpoints").glob(".step-*")), moments
    run(config, tmp_path / "whole")
    assert_same_run(out, tmp_path / "whole", steps)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [
        "step-00000020",
        "step-00000024",
    ]


def test_every_step_can_be_the_last(small: Small, tmp_path: Path):
    config = small(steps=6, warmup_steps=2, checkpoint_every=1, evaluate_every=2)
    run(config, tmp_path / "whole")
    out = tmp_path / "stopped"
    for step in range(1, 7):
        progress = At(step, stop)  # before this step is saved
        with pytest.raises(InterruptedError):
            run(config, out, resume=True, progress=progress)
        assert progress.begun == max(0, step - 2)
    run(config, out, resume=True)
    assert_same_run(tmp_path / "whole", out, 6)


def test_counters_go_on(small: Small, tmp_path: Path):
    config = small(checkpoint_every=4)
    with pytest.raises(InterruptedError):
        run(config, tmp_path, progress=At(6, stop))
    before = read_metrics(tmp_path / "metrics.jsonl")[3]["seconds"]
    result = run(config, tmp_path, resume=True)
    assert result.tokens == 12 * 64
    assert result.seconds > before
    assert read_metrics(tmp_path / "metrics.jsonl")[4]["seconds"] > before


# ---- interrupted ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("signals")
def test_a_signal_saves_and_leaves(number: signal.Signals, small: Small, tmp_path: Path):
    config = small()
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    progress = At(5, lambda: signal.raise_signal(number))
    with pytest.raises(KeyboardInterrupt, match="saved and stopped after step 5 of 12"):
        run(config, tmp_path / "out", progress=progress)
    assert [p.name for p in (tmp_path / "out/checkpoints").iterdir()] == ["step-00000005"]
    assert blackmamba.load(tmp_path / "out").config.d_model == 16
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers

    run(config, tmp_path / "out", resume=True)
    run(config, tmp_path / "whole")
    assert_same_run(tmp_path / "out", tmp_path / "whole", 12)


@pytest.mark.usefixtures("signals")
def test_a_second_signal_leaves_at_once(small: Small, tmp_path: Path):
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        run(small(), tmp_path, progress=At(5, twice))
    assert not str(caught.value)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.usefixtures("signals")
def test_an_ignored_signal_stays_ignored(small: Small, tmp_path: Path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    result = run(small(), tmp_path, progress=At(5, lambda: signal.raise_signal(signal.SIGINT)))
    assert result.steps == 12


@pytest.mark.usefixtures("signals")
def test_a_signal_in_the_last_step_changes_nothing(small: Small, tmp_path: Path):
    run(small(), tmp_path, progress=At(12, lambda: signal.raise_signal(signal.SIGINT)))
    assert (tmp_path / "summary.json").exists()


# ---- what may be resumed -------------------------------------------------------------------


def test_a_second_run_needs_its_own_folder(small: Small, tmp_path: Path):
    run(small(steps=3), tmp_path)
    with pytest.raises(ConfigError, match=r"holds a run already.*--resume, or choose another"):
        run(small(steps=3), tmp_path)


def test_nothing_to_resume_begins_anew(
    small: Small, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    progress = At(2, stop)
    with pytest.raises(InterruptedError):
        run(small(), tmp_path, progress=progress)
    assert len(rows(tmp_path)) == 2
    run(small(lr=0.005), tmp_path, resume=True)
    assert "no checkpoint to resume from" in caplog.text
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 13))


def test_a_finished_run_is_left_as_it_is(small: Small, tmp_path: Path):
    first = run(small(), tmp_path)
    weights = (tmp_path / "model/model.safetensors").read_bytes()
    before = rows(tmp_path)
    second = run(small(), tmp_path, resume=True, progress=At(13, stop))
    assert (second.nats_per_token, second.steps) == (first.nats_per_token, 12)
    assert (tmp_path / "model/model.safetensors").read_bytes() == weights
    assert rows(tmp_path) == before


def test_more_steps_go_on_and_fewer_cannot(small: Small, tmp_path: Path):
    run(small(), tmp_path)
    early = rows(tmp_path)
    result = run(small(steps=20), tmp_path, resume=True)
    assert result.steps == 20
    assert rows(tmp_path)[:12] == early
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 21))
    with pytest.raises(ConfigError, match=r"train.steps=15: .*step-00000020 has more steps"):
        run(small(steps=15), tmp_path, resume=True)


def test_other_settings_are_refused_before_anything_is_touched(small: Small, tmp_path: Path):
    run(small(), tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(ConfigError, match=r"train.lr \(was 0.01, now 0.5\)"):
        run(small(lr=0.5), tmp_path, resume=True)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_path_may_be_spelled_in_another_way(
    text: Path, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = small(steps=4, checkpoint_every=2)
    run(config, tmp_path / "out")
    monkeypatch.chdir(text.parent)
    data = dataclasses.replace(config.data, text=(f"./{text.name}",))
    run(dataclasses.replace(config, data=data), tmp_path / "out", resume=True)
    other = dataclasses.replace(config.data, text=(str(tmp_path),))
    with pytest.raises(ConfigError, match=r"data.text \(was \('/"):
        run(dataclasses.replace(config, data=other), tmp_path / "out", resume=True)
    mixed = (SourceConfig(name="a", path=text.name, weight=1), SourceConfig(name="b", text=("c",)))
    assert _found(mixed) == _found((
        SourceConfig(name="a", path=str(text), weight=1),
        SourceConfig(name="b", text=(str(text.with_name("c")),)),
    ))  # fmt: skip


def test_the_text_may_be_gone_but_not_another(text: Path, small: Small, tmp_path: Path):
    shutil.copytree(text, tmp_path / "text")
    config = small(checkpoint_every=6)
    data = {"text": (str(tmp_path / "text"),), "vocab_size": 300, "validation_fraction": 0.1}
    config = RunConfig(model=config.model, data=type(config.data)(**data), train=config.train)
    out = tmp_path / "out"
    with pytest.raises(InterruptedError):
        run(config, out, progress=At(8, stop))
    shutil.copytree(out, tmp_path / "other")

    shutil.rmtree(tmp_path / "text")
    run(config, out, resume=True)
    assert [row["step"] for row in rows(out)] == list(range(1, 13))

    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("Something else. " * 2000)
    (tmp_path / "other/data/train.bin").unlink()
    with pytest.raises(DataError, match="not the text that this run began with"):
        run(config, tmp_path / "other", resume=True)


# ---- damage --------------------------------------------------------------------------------


@pytest.fixture
def stopped(small: Small, tmp_path: Path) -> tuple[RunConfig, Path]:
    """A run with checkpoints at steps 4 and 8, and the folder of the newer."""
    config = small(checkpoint_every=4)
    with pytest.raises(InterruptedError):
        run(config, tmp_path, progress=At(9, stop))
    return config, tmp_path / "checkpoints" / "step-00000008"


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "optimizer.safetensors", "trainer.json", "checksums.json"],
)
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_damage_is_named_and_the_one_before_still_works(
    name: str, damage: str, stopped: tuple[RunConfig, Path]
):
    config, folder = stopped
    file = folder / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        file.write_bytes(content[:middle] if damage == "truncated" else flipped)
    with pytest.raises(CheckpointError, match=r"step-00000008.*damaged checkpoint") as caught:
        run(config, folder.parent.parent, resume=True)
    assert "remove its folder to resume from the one before" in str(caught.value)
    assert "\n" not in str(caught.value)
    if name == "trainer.json":
        shutil.rmtree(folder)
        progress = At(13, stop)
        run(config, folder.parent.parent, resume=True, progress=progress)
        assert progress.begun == 4


def test_files_of_another_model_are_refused(
    stopped: tuple[RunConfig, Path], small: Small, narrower: Any, tmp_path: Path
):
    config, folder = stopped
    run(small(narrower, steps=3), tmp_path / "other")
    for file in (tmp_path / "other/checkpoints/step-00000003").iterdir():
        if file.name not in ("trainer.json", "checksums.json"):
            shutil.copy(file, folder)
    with pytest.raises(CheckpointError, match=r"config.json: .*its checksum is not the one"):
        run(config, folder.parent.parent, resume=True)
    trainer = json.loads((folder / "trainer.json").read_text())  # as before there were checksums
    (folder / "trainer.json").write_text(json.dumps(trainer | {"format": 1}))
    (folder / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json is that of another model"):
        run(config, folder.parent.parent, resume=True)


def test_a_checkpoint_of_a_later_version_is_refused(stopped: tuple[RunConfig, Path]):
    config, folder = stopped
    trainer = json.loads((folder / "trainer.json").read_text())
    (folder / "trainer.json").write_text(json.dumps(trainer | {"format": 99}))
    (folder / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match="format 99; this version reads 2"):
        run(config, folder.parent.parent, resume=True)


def test_a_full_disk_leaves_the_older_checkpoint(small: Small, tmp_path: Path):
    config = small(checkpoint_every=4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow beyond 20 kB from here on: the weights do not fit, the metrics do.
    progress = At(6, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1])))
    try:
        with pytest.raises(CheckpointError, match=r"step-00000008: .* cannot be written"):
            run(config, tmp_path / "out", progress=progress)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in (tmp_path / "out/checkpoints").iterdir()] == ["step-00000004"]
    progress = At(13, stop)
    run(config, tmp_path / "out", resume=True, progress=progress)
    assert progress.begun == 4
    run(config, tmp_path / "whole")
    assert_same_run(tmp_path / "out", tmp_path / "whole", 12)


@pytest.mark.parametrize("has_instructions", [False, True])
def test_auto_dtype_is_decided_once(
    small: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    has_instructions: bool,
):
    def dtypes(values: bool, steps: int, resume: bool) -> str:
        monkeypatch.setattr(bfloat16, "_by", "tiles" if values else "floats")
        run(small(steps=steps, dtype="auto"), tmp_path / "run", resume=resume)
        return load_recipe(tmp_path / "run" / "recipe.yaml").train.dtype

    expected = "bfloat16" if has_instructions else "float32"
    assert dtypes(has_instructions, 2, resume=False) == expected
    assert dtypes(not has_instructions, 4, resume=True) == expected
    other = "float32" if has_instructions else "bfloat16"
    with pytest.raises(ConfigError, match=rf"train.dtype \(was '{expected}'"):
        run(small(steps=6, dtype=other), tmp_path / "run", resume=True)
