"""A test whose ranks hang says which, and where."""

import many_ranks
import pytest
from many_ranks import on_ranks
from ranks_train import waits_for_nothing


def test_a_rank_that_hangs_is_told_with_its_stack(monkeypatch: pytest.MonkeyPatch):
    heard: set[tuple[int, str]] = set()
    expected = {(0, "begins"), (0, "waits"), (1, "begins"), (1, "in step 3")}

    def clock() -> float:  # time passes when all is said
        return 1e9 if heard == expected else 0.0

    monkeypatch.setattr(many_ranks, "_clock", clock)
    with pytest.raises(AssertionError) as caught:
        on_ranks(2, waits_for_nothing, "hangs", timeout_s=60, said=lambda *told: heard.add(told))
    first, second = str(caught.value).split("rank 1: ")
    assert first.startswith("no word for 60 s\nrank 0: waits\n")
    assert second.startswith("in step 3\n")
    assert all("in waits_for_nothing" in report for report in (first, second))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("crashes", "(?s)rank 1 ended with status -11: in step 3\n.*in waits_for_nothing"),
        ("dies", "rank 1 ended with status 7: in step 3"),
        ("fails", "ValueError: rank 1 alone"),
    ],
)
def test_a_rank_that_fails_is_told_at_once(what: str, message: str):
    with pytest.raises(AssertionError, match=message):
        on_ranks(2, waits_for_nothing, what, timeout_s=60)
