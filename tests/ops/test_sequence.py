"""Rows cut over ranks give what whole rows give: outputs, states, losses and every gradient."""

from typing import Any

import pytest
from many_ranks import on_ranks
from sequence_ranks import CHECKS, RANKS, check_all


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """What each of four processes found; two of them also did everything as a pair."""
    return on_ranks(RANKS, check_all)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", [name for name in CHECKS if name != "refusals"])
def test_pieces_equal_the_whole(found: list[dict[str, Any]], name: str, size: int):
    # float64: sums in another order. float32: rounding, of the long row over 65,536 terms of both
    # signs: A_log's gradient was wrong by 1.6e-5.
    tolerance = {"float32 scan": 1e-5, "long row": 5e-5}.get(name, 1e-12)
    for rank in range(size):
        errors = found[rank][f"{name}, {size} ranks"]
        wrong = {what: error for what, error in errors.items() if not error < tolerance}
        assert not wrong, f"rank {rank}"


def test_what_cannot_be_cut_is_refused(found: list[dict[str, Any]]):
    attention, short = found[0]["refusals, 2 ranks"]
    assert "attention layers" in attention
    assert "a piece of 2 tokens: must be at least 3 (d_conv - 1)" in short
