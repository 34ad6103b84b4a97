"""The embedding's table beside the head that multiplies with it."""

import pytest
import torch

from blackmamba.model.embedding import Embedding

IDS = torch.tensor([[3, 1, 3], [0, 3, 5]])


def _gradient(table: Embedding, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Of a sum that every row and all of the weight have a share in, each a different one."""
    torch.manual_seed(1)
    shares = [torch.randn(t.shape, dtype=torch.float64).to(t.dtype) for t in (rows, weight)]
    table.weight.grad = None
    ((rows * shares[0]).sum() + (weight * shares[1]).sum()).backward(retain_graph=True)
    assert table.weight.grad is not None
    return table.weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_with_a_table_the_gradient_has_the_same_bits(dtype: torch.dtype):
    torch.manual_seed(0)
    table = Embedding(7, 4, dtype=dtype)
    apart = _gradient(table, table(IDS), table.weight)
    rows, weight = table.with_table(IDS)
    assert torch.equal(rows, table.weight[IDS])
    assert torch.equal(weight, table.weight)
    for _ in range(2):  # nothing of a kept graph is written over
        together = _gradient(table, rows, weight)
        assert not together.is_sparse
        assert torch.equal(together, apart)


@pytest.mark.parametrize("which", ["rows", "table"])
def test_a_gradient_by_one_of_the_two_is_no_sparse_one(which: str):
    table = Embedding(7, 4)
    rows, weight = table.with_table(IDS)
    (rows if which == "rows" else weight).sum().backward()
    assert table.weight.grad is not None
    expected = torch.bincount(IDS.flatten(), minlength=7).float() if which == "rows" else 1.0
    assert torch.equal(table.weight.grad, torch.zeros(7, 4) + torch.as_tensor(expected).view(-1, 1))


def test_without_gradients_the_table_is_the_parameter():
    table = Embedding(7, 4)
    with torch.no_grad():
        assert table.with_table(IDS)[1] is table.weight
    table.weight.requires_grad_(False)
    assert table.with_table(IDS)[1] is table.weight
