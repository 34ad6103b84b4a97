"""What a network computes, counted by watching it, to hold against `model/size.py`.

torch's counter sees matrix products and attention. Scan and convolution are elementwise to it: how
their closed forms are counted is written beside them.
"""

import dataclasses

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from blackmamba.config import ModelConfig
from blackmamba.model import BlackMamba
from blackmamba.model.size import forward_flops
from blackmamba.ops.backend import forcing


@dataclasses.dataclass(frozen=True)
class CountedFlops:
    """Of one pass over a batch of rows."""

    forward: int
    training: int
    """Forward and backward."""
    expected_forward: int
    """The closed form's products and scores for the same batch."""


def counted_flops(config: ModelConfig, rows: int, length: int) -> CountedFlops:
    """Count the products of a pass over random tokens, forward and with its backward pass.

    Args:
        config: of a small network; it runs by the references, so that torch's counter knows every
            product.
        rows, length: of the batch.
    """
    model = BlackMamba(config)
    ids = torch.randint(config.n_tokens, (rows, length))
    with forcing("reference"), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            model(ids)
        with FlopCounterMode(display=False) as training:
            model.loss(ids, ids).backward()
    # What attention multiplies for a row of l tokens is its whole square, masked half and all.
    flops = forward_flops(config, length - 1)
    return CountedFlops(
        forward.get_total_flops(),
        training.get_total_flops(),
        rows * length * (flops.products + flops.scores),
    )
