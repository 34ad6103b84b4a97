"""Experts over ranks, and what is computed while tokens travel to them."""

from many_ranks import on_ranks
from traffic_ranks import experts_beside


def test_a_shared_expert_is_computed_while_tokens_travel():
    for told, apart in on_ranks(2, experts_beside):
        assert told == [
            "sizes", "leave", "beside", "arrive", "leave", "arrive", "backward",
            "leave", "arrive", "leave", "beside", "arrive",
        ]  # fmt: skip
        assert max(apart) < 1e-12
