"""What `router_logits` and `router_choice` mean."""

import torch
from torch import Tensor
from torch.nn import functional as F


def router_logits_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer of x as the weight has it."""
    return F.linear(x.to(weight.dtype), weight, bias)


def router_choice_reference(
    x: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The logits, where each row is largest, and the sigmoid of that logit."""
    logits = router_logits_reference(x, weight, bias)
    expert_ids = logits.argmax(dim=-1)
    return logits, expert_ids, torch.sigmoid(logits.gather(1, expert_ids[:, None])[:, 0])
