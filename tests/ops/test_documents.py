"""Documents of a row by their ends, or by a number for each token."""

import pytest
import torch

from blackmamba.errors import InputError
from blackmamba.ops import causal_conv1d, selective_scan

ENDS = [0, 3, 3, 4, 11]
SEQ_IDX = torch.tensor([[7] * 3 + [2] + [9] * 7])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scan(x: torch.Tensor, **options: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    b, l, d = x.shape
    A = -normal(d, 4).exp()
    return selective_scan(
        x, x, A, normal(b, l, 4), normal(b, l, 4, seed=1), dt_softplus=True, **options
    )  # pyright: ignore


def convolution(x: torch.Tensor, **options: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return causal_conv1d(x, normal(x.shape[2], 4), **options)  # pyright: ignore


@pytest.mark.parametrize("run", [scan, convolution])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ends_mean_the_same_as_numbers(run, dtype: torch.dtype):  # pyright: ignore
    x = normal(1, 11, 5)
    expected = run(x, seq_idx=SEQ_IDX)
    actual = run(x, cu_seqlens=torch.tensor(ENDS, dtype=dtype))
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    assert not torch.equal(run(x)[0], expected[0])
    for first, end in ((0, 3), (3, 4), (4, 11)):
        if run is convolution:  # the scan's B and C would have to be cut too
            assert torch.equal(run(x[:, first:end])[0], expected[0][:, first:end])


@pytest.mark.parametrize("run", [scan, convolution])
@pytest.mark.parametrize(
    ("rows", "ends", "message"),
    [
        (2, [0, 11], "for one row of documents, x has 2 rows"),
        (1, [0, 4, 3, 11], "must rise from 0 to 11"),
        (1, [1, 11], "must rise"),
        (1, [0, 12], "must rise"),
        (1, [0], "has 1 numbers, must have 2 or more"),
        (1, [0.0, 11.0], "must be an integer dtype"),
        (1, [[0, 11]], r"cu_seqlens has shape \(1, 2\), must be \(n\)"),
    ],
)
def test_bad_ends_are_named(run, rows: int, ends: list[int], message: str):  # pyright: ignore
    with pytest.raises(InputError, match=message):
        run(normal(rows, 11, 5), cu_seqlens=torch.tensor(ends))


@pytest.mark.parametrize("run", [scan, convolution])
def test_one_way_at_a_time(run):  # pyright: ignore
    with pytest.raises(InputError, match="give one of them"):
        run(normal(1, 11, 5), seq_idx=SEQ_IDX, cu_seqlens=torch.tensor(ENDS))
