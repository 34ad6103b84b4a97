"""What `parallel.sequence` refuses, and which piece of a batch a rank reads."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from blackmamba.data import Batch
from blackmamba.errors import ConfigError
from blackmamba.presets import presets
from blackmamba.train import RunConfig
from blackmamba.train.config import check_ranks, check_resumable
from blackmamba.train.parallel.config import ParallelConfig
from blackmamba.train.parallel.ranks import Ranks

Small = Callable[..., RunConfig]


def spread(config: RunConfig, **parallel: Any) -> RunConfig:
    return dataclasses.replace(config, parallel=ParallelConfig(**parallel))


@pytest.mark.parametrize(
    ("preset", "sizes", "sequence", "message"),
    [
        ("tiny", {}, 3, "parallel.sequence=3: must divide the 4 ranks"),
        ("transformer-tiny", {}, 2, "parallel.sequence=2: this model has attention layers"),
        ("tiny", {"seq_len": 15}, 2, "train.seq_len=15: must be a multiple of parallel.sequence=2"),
        ("tiny", {"seq_len": 8}, 4, "parallel.sequence=4, and at least 12"),
        ("tiny", {"batch_size": 3}, 2, "a multiple of 2, for 2 groups of 2 ranks"),
    ],
)
def test_what_cannot_be_cut_is_named(
    small: Small, preset: str, sizes: dict[str, int], sequence: int, message: str
):
    config = spread(small(presets[preset], **sizes), sequence=sequence)
    with pytest.raises(ConfigError, match=message):
        check_ranks(config, Ranks(size=4, node_size=4))


def test_a_sequence_of_none_is_refused():
    with pytest.raises(ConfigError, match="sequence=0: must be at least 1"):
        ParallelConfig(sequence=0)


def test_resuming_counts_those_that_read(small: Small):
    whole = small(presets["tiny"], batch_size=8, accumulate=4)
    train = dataclasses.replace(whole.train, accumulate=2)
    cut = spread(dataclasses.replace(whole, train=train), sequence=2)
    check_resumable(whole, cut, (1, 4))
    with pytest.raises(ConfigError, match="accumulate"):
        check_resumable(whole, cut, (1, 8))


def test_pieces_make_up_the_batch():
    ids, labels = torch.arange(24).view(2, 12), torch.arange(24).view(2, 12) + 1
    for seq_idx in (None, torch.zeros(2, 12, dtype=torch.int32)):
        batch = Batch(ids, labels, seq_idx)
        pieces = [batch.piece(i, 3) for i in range(3)]
        assert torch.equal(torch.cat([p.input_ids for p in pieces], 1), ids)
        assert torch.equal(pieces[1].labels, labels[:, 4:8])
        assert all((p.seq_idx is None) == (seq_idx is None) for p in pieces)
