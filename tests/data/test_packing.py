"""What a row says of its documents, and that ranks share a batch without remainder."""

import numpy as np
import pytest
import torch

from blackmamba.data import Batch, Packing, WindowSampler
from blackmamba.errors import ConfigError

EOT = 0


def test_documents_are_counted_and_their_ends_masked_if_wanted():
    rows = np.array([[5, 6, 0, 7, 0, 0, 8], [0, 1, 2, 3, 4, 5, 0]])
    stream = Packing().batch(rows)
    assert stream.seq_idx is None
    told = Packing(kind="documents", eot_id=EOT).batch(rows)
    assert torch.equal(told.input_ids, stream.input_ids)
    assert torch.equal(told.labels, stream.labels)
    assert told.seq_idx is not None
    assert told.seq_idx.tolist() == [[0, 0, 1, 1, 2, 3], [0, 0, 0, 0, 0, 0]]
    masked = Packing(kind="masked", eot_id=EOT).batch(rows)
    assert masked.seq_idx is not None
    assert torch.equal(masked.seq_idx, told.seq_idx)
    assert masked.labels.tolist() == [[6, -100, 7, -100, -100, 8], [1, 2, 3, 4, 5, -100]]
    assert torch.equal(masked.input_ids, stream.input_ids)
    across = masked.seq_idx[:, :-1] != masked.seq_idx[:, 1:]
    assert (masked.labels[:, :-1][across] == -100).all()


@pytest.mark.parametrize("kind", ["stream", "documents", "masked"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_share_the_batch_of_one_process(kind: str, world_size: int):
    tokens = np.arange(101, dtype="<u2") % 7
    sampler = WindowSampler(tokens, 8, 6, 3, Packing(kind=kind, eot_id=EOT))  # pyright: ignore
    for step in (0, 1, 5):
        whole = sampler.batch(step)
        parts = [sampler.batch(step, rank, world_size) for rank in range(world_size)]
        joined = Batch(*(None if p[0] is None else torch.cat(p) for p in zip(*parts, strict=True)))
        for one, many in zip(whole, joined, strict=True):
            assert (one is None and many is None) or torch.equal(one, many)
        places = [p for r in range(world_size) for p in sampler.windows(step, r, world_size)]
        assert places == sampler.windows(step)


def test_wrong_ranks():
    sampler = WindowSampler(np.arange(100), 8, 6, seed=0)
    with pytest.raises(ConfigError, match="batch_size=6: must be a multiple of the 4 ranks"):
        sampler.batch(0, 0, 4)
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        sampler.batch(0, 2, 2)


@pytest.mark.parametrize("batch_size", [10**13, 10**18])
def test_a_batch_that_no_memory_holds_fails_before_its_rows_are_looked_up(batch_size: int):
    sampler = WindowSampler(np.arange(100), 8, batch_size, 0)
    with pytest.raises(MemoryError):
        sampler.batch(0)
