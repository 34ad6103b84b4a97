"""Outliers: how they are told, skipped and gone back from, also by a run that is stopped."""

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_train import spiking

from blackmamba.errors import TrainingError
from blackmamba.model import BlackMamba
from blackmamba.train import Progress, RunConfig, run, train_step
from blackmamba.train.metrics import read_metrics
from blackmamba.train.optimizer import build_optimizer
from blackmamba.train.spikes import SpikeGuard

Small = Callable[..., RunConfig]
CPU = torch.device("cpu")


def judge(guard: SpikeGuard, loss: float, norm: float = 1.0) -> bool:
    return bool(guard.is_usual(torch.tensor(loss), torch.tensor(norm)))


def test_the_rule_is_the_median_and_its_deviation():
    guard = SpikeGuard(5, 3.0, CPU)
    assert judge(guard, 1000.0)  # nothing is known yet
    assert all(judge(guard, loss) for loss in (1.0, 2.0, 3.0, 4.0))
    # 1, 2, 3, 4, 1000: median 3, deviations 2 1 0 1 997, so 1.4826 is one
    limit = 3 + 3 * 1.4826
    assert not judge(guard, limit + 0.01)
    assert not judge(guard, math.nan)
    assert not judge(guard, 2.0, math.inf)
    assert guard.remembered() == ((1000.0, 1.0, 2.0, 3.0, 4.0), (1.0,) * 5)
    assert judge(guard, limit - 0.01)  # takes the place of 1000
    assert guard.remembered()[0] == pytest.approx((1, 2, 3, 4, limit - 0.01))
    assert judge(guard, -1e9)  # smaller is never one
    assert not judge(guard, 3.0, 1.0301)  # equal norms: a hundredth of the median counts
    assert judge(guard, 3.0, 1.0299)


@pytest.mark.parametrize("cut", [0, 2, 4, 5, 13])
def test_a_guard_goes_on_where_another_stopped(cut: int):
    chance = random.Random(1)
    numbers = [(chance.lognormvariate(0, 2), chance.lognormvariate(0, 2)) for _ in range(40)]
    whole, first = SpikeGuard(4, 2.0, CPU), SpikeGuard(4, 2.0, CPU)
    expected = [judge(whole, *pair) for pair in numbers]
    assert 0 < sum(expected) < 40
    found = [judge(first, *pair) for pair in numbers[:cut]]
    second = SpikeGuard(4, 2.0, CPU, first.remembered())
    assert found + [judge(second, *pair) for pair in numbers[cut:]] == expected


@pytest.mark.parametrize("weights", ["float32", "master"])
def test_an_outlier_changes_nothing(weights: str, small: Small):
    from blackmamba.train.mixed import narrow_weights

    torch.manual_seed(0)
    model = BlackMamba(small().model, compute_dtype=torch.bfloat16)
    masters = narrow_weights(model, torch.bfloat16) if weights == "master" else {}
    optimizer = build_optimizer(model, small(weights=weights, dtype="bfloat16").train, masters)
    ids = torch.arange(34).view(2, 17)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    guard = SpikeGuard(2, 1.0, CPU, ((1.0, 1.0), (1e9, 1e9)))
    outcome = train_step(model, optimizer, ids[:, :-1], ids[:, 1:], lr=0.1, guard=guard)
    assert outcome.is_finite
    assert outcome.is_spike
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    guard = SpikeGuard(2, 1e3, CPU, ((1.0, 1.0), (1e9, 1e9)))
    assert train_step(model, optimizer, ids[:, :-1], ids[:, 1:], lr=0.1, guard=guard).is_taken
    assert not all(torch.equal(before[n], t) for n, t in model.state_dict().items())


# ---- whole runs ----------------------------------------------------------------------------


@pytest.fixture
def bad_batches() -> Iterator[tuple[set[int], list[int]]]:
    """Numbers of batches whose loss shall be a spike, and those that were read."""
    bad = set[int]()
    with spiking(bad) as read:
        yield bad, read


class DeathError(Exception):
    pass


class DieAfter(Progress):
    """Dies once a step was ended so many times in all."""

    def __init__(self, ended: int):
        self.left = ended
        self.rollbacks: list[tuple[int, int]] = []

    def on_step(self, row: dict[str, Any]) -> None:
        self.left -= 1
        if not self.left:
            raise DeathError

    def on_rollback(self, step: int, to: int) -> None:
        self.rollbacks.append((step, to))


def rows(out: Path) -> list[dict[str, Any]]:
    clock = ("seconds", "tokens_per_s", "machine")
    found = read_metrics(out / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in clock} for row in found]


def test_skipped_and_counted(bad_batches: tuple[set[int], list[int]], small: Small, tmp_path: Path):
    bad_batches[0].update((2, 7, 8))
    config = small(spikes="skip", spike_window=4, checkpoint_every=5)
    result = run(config, tmp_path / "whole")
    found = rows(tmp_path / "whole")
    assert [row["step"] for row in found if row.get("spike")] == [8, 9]  # batch 2 is too early
    assert [row["step"] for row in found if row["skipped"]] == [8, 9]
    assert (result.spikes, result.bad_steps, result.rollbacks) == (2, 0, 0)
    assert "(2 outliers)" in result.report()

    with pytest.raises(DeathError):
        run(config, tmp_path / "cut", progress=DieAfter(6))
    run(config, tmp_path / "cut", resume=True)
    assert rows(tmp_path / "cut") == found

    with pytest.raises(TrainingError, match=r"step 9: .* an outlier for 2 .*spike_threshold"):
        run(small(spikes="skip", spike_window=4, max_bad_steps=2), tmp_path / "strict")


def test_gone_back_and_on_with_other_data(
    bad_batches: tuple[set[int], list[int]], small: Small, tmp_path: Path
):
    bad, read = bad_batches
    bad.update((4, 8, 13))
    # One checkpoint is kept: the one that a signal would make must not push it out.
    config = small(
        steps=12, spikes="rollback", spike_window=3, checkpoint_every=3, keep_checkpoints=1,
        max_rollbacks=3, ema_decay=0.9,
    )  # fmt: skip
    progress = DieAfter(0)
    result = run(config, tmp_path / "whole", progress=progress)
    # Step 5 reads batch 4: back to 3, on with 5. Step 7 reads 8: back to 6, on with 9.
    # Step 11 reads 13: back to 9, on with 14.
    assert progress.rollbacks == [(5, 3), (7, 6), (11, 9)]
    assert read == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    found = rows(tmp_path / "whole")
    assert [row["step"] for row in found] == list(range(1, 13))
    assert {row["step"]: row["rolled_back"] for row in found if "rolled_back" in row} == {
        4: {"from_step": 5, "skipped_batches": 2},
        7: {"from_step": 7, "skipped_batches": 1},
        10: {"from_step": 11, "skipped_batches": 2},
    }
    assert not any(row["skipped"] for row in found)
    assert (result.spikes, result.rollbacks, result.tokens) == (3, 3, 12 * 64)
    assert "(3 outliers, 3 roll-backs)" in result.report()

    for ended in (4, 5, 7, 12):  # killed before, between and after
        out = tmp_path / f"cut{ended}"
        with pytest.raises(DeathError):
            run(config, out, progress=DieAfter(ended))
        run(config, out, resume=True)
        assert rows(out) == found, ended
        for name in ("model/model.safetensors", "model_ema/model.safetensors"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), ended

    with pytest.raises(TrainingError, match=r"step 11: .* after 2 roll-backs"):
        run(small(**{f: getattr(config.train, f) for f in (
            "steps", "spikes", "spike_window", "checkpoint_every")}, max_rollbacks=2),
            tmp_path / "strict")  # fmt: skip


def test_checkpoints_of_the_way_that_was_left_go(
    bad_batches: tuple[set[int], list[int]], small: Small, tmp_path: Path
):
    """The best so far lies behind the one that is gone back to; and is then another."""
    bad_batches[0].add(4)
    config = small(
        steps=5, spikes="rollback", spike_window=3, checkpoint_every=3, evaluate_every=2,
        keep_best=True, keep_checkpoints=9,
    )  # fmt: skip
    seen = list[list[str]]()

    class Looks(Progress):
        def on_rollback(self, step: int, to: int) -> None:
            assert (step, to) == (5, 3)
            seen.append(sorted(p.name for p in (tmp_path / "checkpoints").iterdir()))

    run(config, tmp_path, progress=Looks())
    assert seen == [["step-00000002", "step-00000003"]]
    assert bad_batches[1] == [0, 1, 2, 3, 4, 5, 6]
    kept = sorted(int(p.name[5:]) for p in (tmp_path / "checkpoints").iterdir())
    assert kept == [2, 3, 4, 5]


def test_nothing_to_go_back_to(
    bad_batches: tuple[set[int], list[int]], small: Small, tmp_path: Path
):
    bad_batches[0].add(5)
    config = small(spikes="rollback", spike_window=3, checkpoint_every=10)
    assert run(config, tmp_path).rollbacks == 0
    assert [row["step"] for row in rows(tmp_path) if row.get("spike")] == [6]
