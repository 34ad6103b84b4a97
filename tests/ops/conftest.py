"""Fixtures of the operations' tests."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that a number which nothing wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
