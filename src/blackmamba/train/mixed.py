"""AdamW that the device steps by itself, for parameters that may be narrower than float32.

What torch's optimizer would have the host wait for or do in a pass of its own (whether the gradient
is finite, clipping, rounding to the products' dtype) is part of the one pass over memory.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blackmamba.model import keeps_float32
from blackmamba.ops import AdamWTensors, adamw_, adamw_factors


def narrow_weights(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Put the parameters that may be narrow in `dtype`, in place; what the trained ones were."""
    masters: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not keeps_float32(name) and parameter.dtype != dtype:
            if parameter.requires_grad:
                masters[name] = parameter.detach()
            parameter.data = parameter.detach().to(dtype)
    return masters


class MixedAdamW(torch.optim.Optimizer):
    """AdamW in float32 for parameters of float32 and of 16 bits.

    Args:
        groups: as for every optimizer of torch, with "weight_decay".
        lr, betas, eps: of AdamW.
        masters: float32 copies of narrow parameters, to be kept and rounded from; a bfloat16
            parameter without one is rounded at random. See `adamw_`.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        masters: Mapping[nn.Parameter, Tensor],
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.quantities = {p: self._quantities(p in masters) for p in self._parameters()}
        for parameter, master in masters.items():
            self.state[parameter]["master"] = master

    def _quantities(self, has_master: bool) -> tuple[str, ...]:
        """What is remembered of a parameter."""
        return ("exp_avg", "exp_avg_sq", "step", *(("master",) if has_master else ()))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update by the parameters' own gradients."""
        assert closure is None
        self.update({p: p.grad for p in self._parameters() if p.grad is not None})

    @torch.no_grad()
    def update(
        self,
        gradients: Mapping[nn.Parameter, Tensor],
        *,
        gradient_scale: Tensor | float = 1.0,
        go: Tensor | bool = True,
    ) -> None:
        """One update by these gradients times a scale, if `go`; neither need be known to the host.

        Args:
            gradients: of parameters of this optimizer, in any dtype.
            gradient_scale: a scalar, on the device that computed the gradients.
            go: on the same device; False: everything stays as it is. Where parameters are on
                another, it waits for that one.
        """
        places: dict[torch.device, list[nn.Parameter]] = {}
        for p in gradients:
            places.setdefault(p.device, []).append(p)
        for device, own in places.items():
            scale = on_device(device, gradient_scale)
            self._update({p: gradients[p] for p in own}, scale, on_device(device, go))

    def _update(
        self,
        gradients: Mapping[nn.Parameter, Tensor],
        gradient_scale: Tensor | float,
        go: Tensor | bool,
    ) -> None:
        steps = self._steps(gradients)
        for group in self.param_groups:
            own = [p for p in group["params"] if p in gradients]
            if not own:
                continue
            betas = {"beta1": group["betas"][0], "beta2": group["betas"][1]}
            factors = adamw_factors(
                group["lr"], steps, **betas, gradient_scale=gradient_scale, go=go
            )
            adamw_(
                [
                    AdamWTensors(
                        parameter=p.data,
                        gradient=gradients[p].contiguous(),
                        exp_avg=self.state[p]["exp_avg"],
                        exp_avg_sq=self.state[p]["exp_avg_sq"],
                        master=self.state[p].get("master"),
                        decay=group["weight_decay"],
                    )
                    for p in own
                ],
                factors,
                **betas,
                eps=group["eps"],
            )
        steps += go

    def _steps(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """How many updates there were: one number on their device, shared by all."""
        shared: Tensor | None = None
        for parameter in parameters:
            state = self.state[parameter]
            if "exp_avg" not in state:
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(
                        parameter, dtype=torch.float32, memory_format=torch.contiguous_format
                    )
            if shared is None:
                shared = state.get("step", torch.zeros((), device=parameter.device))
            state["step"] = shared
        assert shared is not None
        return shared

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]


def on_device(device: torch.device, value: Tensor | float) -> Any:
    """A number as it is; a tensor there."""
    return value.to(device) if isinstance(value, Tensor) else value
