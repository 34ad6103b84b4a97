"""A linear layer whose weights may be stored wider than it computes."""

from torch import Tensor, nn

from blackmamba.ops import linear


class Linear(nn.Linear):
    """nn.Linear that computes in its input's dtype.

    Mixed-precision training keeps float32 weights and sends bfloat16 activations: the cast happens
    here, once a call, and its backward returns a float32 gradient.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in the input's dtype."""
        bias = None if self.bias is None else self.bias.to(input.dtype)  # pyright: ignore[reportUnnecessaryComparison]
        return linear(input, self.weight.to(input.dtype), bias)
