"""Training windows cover everything once an epoch; validation predicts every token once."""

import numpy as np
import pytest
import torch

from blackmamba.data import ValidationStreams, WindowSampler
from blackmamba.errors import ConfigError, DataError, InputError

EOT = 0


def numbered(n: int, dtype: str = "<u2") -> np.ndarray:
    """Tokens that are their own places, so that a batch shows what it is made of."""
    return np.arange(n, dtype=dtype)


# ---- training -------------------------------------------------------------------------------


@pytest.mark.parametrize("n_tokens", [9, 16, 17, 103])
@pytest.mark.parametrize("batch_size", [1, 3, 40])
def test_every_window_comes_once_an_epoch(n_tokens: int, batch_size: int):
    seq_len, n_epochs = 8, 5
    sampler = WindowSampler(numbered(n_tokens), seq_len, batch_size, seed=3)
    assert sampler.n_windows == n_tokens // seq_len
    n_steps = -(-n_epochs * sampler.n_windows // batch_size)
    windows = torch.cat([sampler.batch(step)[0] for step in range(n_steps)])
    starts = set[int]()
    for epoch in windows[: n_epochs * sampler.n_windows].split(sampler.n_windows):
        # Windows follow each other on the ring of tokens: their starts are one chain.
        first = epoch[:, 0].sort().values
        gaps = torch.diff(first, append=first[:1] + n_tokens)
        assert sorted(gaps.tolist()) == sorted(
            [seq_len] * (sampler.n_windows - 1) + [seq_len + n_tokens % seq_len]
        )
        assert len(epoch.unique()) == epoch.numel() == sampler.n_windows * seq_len
        starts.add(int(first[0]))
    assert len(starts) > 1, "every epoch starts at the same place"


def test_labels_are_the_tokens_after_the_inputs():
    tokens = numbered(50)
    sampler = WindowSampler(tokens, 7, 4, seed=0)
    for step in range(20):
        input_ids, labels, seq_idx = sampler.batch(step)
        assert seq_idx is None
        assert input_ids.shape == labels.shape == (4, 7)
        assert input_ids.dtype == labels.dtype == torch.int64
        assert input_ids.is_contiguous()
        assert labels.is_contiguous()
        assert torch.equal(labels, (input_ids + 1) % 50)
        assert torch.equal(labels[:, :-1], input_ids[:, 1:])


def test_order_is_shuffled_anew_in_every_epoch():
    sampler = WindowSampler(numbered(8 * 32), 8, 32, seed=0)
    orders = [((ids := sampler.batch(e)[0][:, 0]) - ids.min()).tolist() for e in range(4)]
    assert len({tuple(order) for order in orders}) == 4
    for order in orders:
        assert sorted(order) == list(range(0, 8 * 32, 8))
        assert order != sorted(order)


def test_a_batch_depends_on_seed_and_step_only():
    def sampler(seed: int) -> WindowSampler:
        return WindowSampler(numbered(100), 8, 5, seed)

    steps = list(range(12))
    forwards = [sampler(1).batch(step) for step in steps]
    one = sampler(1)
    for step in [*reversed(steps), 3, 11, 3]:
        for again, expected in zip(one.batch(step)[:2], forwards[step][:2], strict=True):
            assert torch.equal(again, expected)
    assert not torch.equal(sampler(2).batch(0)[0], forwards[0][0])


def test_batches_of_any_size_give_the_same_windows():
    ones, sevens = (WindowSampler(numbered(100), 8, b, seed=4) for b in (1, 7))
    assert torch.equal(
        torch.cat([ones.batch(step)[0] for step in range(42)]),
        torch.cat([sevens.batch(step)[0] for step in range(6)]),
    )


def test_large_ids_and_late_steps():
    tokens = np.full(40, 2**32 - 1, dtype="<u4")
    input_ids, _, _ = WindowSampler(tokens, 8, 2, seed=0).batch(10**12)
    assert input_ids.unique().tolist() == [2**32 - 1]


def test_too_few_tokens():
    with pytest.raises(DataError, match="8 training tokens: seq_len=8 needs 9 or more"):
        WindowSampler(numbered(8), 8, 1, seed=0)


@pytest.mark.parametrize(
    ("seq_len", "batch_size", "seed", "message"),
    [(0, 1, 0, "seq_len=0"), (8, 0, 0, "batch_size=0"), (8, 1, -1, "seed=-1")],
)
def test_wrong_arguments(seq_len: int, batch_size: int, seed: int, message: str):
    with pytest.raises(ConfigError, match=f"{message}: must be at least"):
        WindowSampler(numbered(100), seq_len, batch_size, seed)


def test_negative_step():
    with pytest.raises(InputError, match="step=-1"):
        WindowSampler(numbered(100), 8, 1, seed=0).batch(-1)


# ---- validation -----------------------------------------------------------------------------


@pytest.mark.parametrize("n_tokens", [1, 2, 7, 8, 9, 30, 31, 32, 33])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("seq_len", [1, 4, 100])
def test_every_token_is_predicted_once_from_the_one_before(
    n_tokens: int, batch_size: int, seq_len: int
):
    tokens = numbered(n_tokens) + 1
    streams = ValidationStreams(tokens, batch_size, seq_len, EOT)
    pieces = list(streams)
    assert len(pieces) == len(streams)
    assert streams.n_predicted == n_tokens
    assert streams.batch_size == min(batch_size, n_tokens)
    for input_ids, labels in pieces:
        assert input_ids.shape == labels.shape
        assert len(input_ids) == streams.batch_size
        assert 1 <= input_ids.shape[1] <= seq_len
        assert input_ids.dtype == labels.dtype == torch.int64
    input_ids, labels = (torch.cat(part, dim=1) for part in zip(*pieces, strict=True))
    predicted = labels != -100
    assert torch.equal(labels[predicted], torch.arange(1, n_tokens + 1))  # also: left to right
    assert torch.equal(
        input_ids[predicted], torch.arange(n_tokens)
    )  # token i is predicted from i-1
    assert input_ids.min() >= 0
    assert predicted[:, :-1].all(), "only the last column may have places without a label"


def test_streams_can_be_read_again():
    streams = ValidationStreams(numbered(20), 3, 4, EOT)
    for first, second in zip(streams, streams, strict=True):
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])


def test_wrong_streams():
    with pytest.raises(DataError, match="0 validation tokens"):
        ValidationStreams(numbered(0), 1, 1, EOT)
    with pytest.raises(ConfigError, match="batch_size=0"):
        ValidationStreams(numbered(5), 0, 1, EOT)
    with pytest.raises(ConfigError, match="seq_len=-1"):
        ValidationStreams(numbered(5), 1, -1, EOT)
