"""Counting Sinkhorn's steps: by accuracy, and as the authors' loop stops."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from blackmamba.analyse.sinkhorn import (
    STARTS,
    TOLERANCES,
    Setting,
    authors_steps,
    compare,
    converge,
    milliseconds,
    overload_of,
    settings,
)
from blackmamba.errors import InputError
from blackmamba.ops import sinkhorn

FIXTURE = Path(__file__).parents[1] / "fixtures" / "released-dev" / "sinkhorn.npz"


def test_the_authors_steps_are_those_of_their_code():
    """Golden counts. Logits of scale 10 are left out: theirs is float32, and overflows there."""
    golden = np.load(FIXTURE)
    cases = {name.split("/")[0] for name in golden if "iters_new" in name}
    compared = 0
    for case in cases:
        if golden[f"{case}/meta"][2] >= 10:
            continue
        logits = torch.from_numpy(golden[f"{case}/cost"])
        for start, name in (("paper", "new"), ("ones", "vanilla")):
            theirs = int(golden[f"{case}/iters_{name}"])
            if theirs != -1:  # it ran to its limit
                compared += 1
                assert authors_steps(logits, start, 2.0, 400) == theirs, (case, name)
    assert compared >= 14


@pytest.mark.parametrize("start", STARTS)
def test_steps_are_those_of_the_operation(start: str):
    logits = Setting(200, 6, 1.0, 1.0).logits(1)
    found = converge(logits, start)  # pyright: ignore
    for tolerance in TOLERANCES:
        result = sinkhorn(logits, start=start, tolerance=tolerance)  # pyright: ignore
        assert found.steps_to[tolerance] == result.iterations
        assert found.errors[result.iterations - 1] == pytest.approx(result.error, rel=1e-3)


def test_what_does_not_converge_is_said_so():
    logits = Setting(64, 4, 4.0, 4.0).logits(0)
    found = converge(logits, "ones", max_steps=1)
    assert found.steps_to[1e-3] == 0
    assert list(found.overload) == [1]


def test_overload():
    assert overload_of(torch.eye(4)) == 0
    assert overload_of(torch.tensor([[1.0, 0.0], [1.0, 0.0]])) == 1
    with pytest.raises(InputError, match="at least one token"):
        converge(torch.empty(0, 3), "paper")


def test_the_paper_s_start_saves_steps_and_balances_at_once():
    [row] = compare([Setting(1024, 8, 1.0, 1.0)], seeds=3)
    assert row.steps_to["paper"][1e-2] < row.steps_to["ones"][1e-2]
    assert row.overload["paper"][1] < row.overload["ones"][1] < row.argmax_overload
    assert row.overload["paper"][0] == pytest.approx(row.overload["ones"][0], abs=0.05)
    assert all(math.isfinite(n) for n in row.steps_to["ones"].values())


def test_settings_cover_the_grid():
    assert len(settings((256, 2048), (8, 16, 64))) == 24
    assert milliseconds(Setting(64, 4, 1.0, 1.0), "paper", torch.device("cpu"), repeats=1) > 0


def test_the_authors_test_passes_at_once_with_their_start():
    """However wrong the balance still is: what the claim of one iteration rests on."""
    logits = Setting(2048, 8, 2.0, 2.0).logits(0)
    found = converge(logits, "paper")
    assert found.authors_steps == 1
    assert found.errors[0] > 1
    assert found.steps_to[1e-2] > 5
    assert authors_steps(logits, "ones", 2.0, max_steps=3) == 0
