"""Which part of the network a parameter belongs to, to see which one's gradient grows."""

from collections.abc import Iterable

from torch import nn

from blackmamba.model import BlackMamba

Parts = dict[str, list[nn.Parameter]]


def parameters_by_part(
    model: BlackMamba, named: Iterable[tuple[str, nn.Parameter]] | None = None
) -> Parts:
    """Those that are trained, under embedding, mamba, attention, router, experts, mlp, norms, head.

    Parts that the model lacks are left out.

    Args:
        model: whose names they are.
        named: what stands for its parameters; None: they themselves.
    """
    parts: Parts = {}
    for name, parameter in model.named_parameters() if named is None else named:
        if parameter.requires_grad:
            parts.setdefault(_part_of(name, model), []).append(parameter)
    return parts


def _part_of(name: str, model: BlackMamba) -> str:
    first, *path = name.split(".")
    if first == "embedding":
        return "embedding"
    if first.startswith("head"):
        return "head"
    if first.endswith("norm") or path[1].endswith("norm"):
        return "norms"
    spec = model.config.layer_specs[int(path[0])]
    if path[1] == "mixer":
        return spec.mixer
    if path[2] == "router":
        return "router"
    return "experts" if spec.feed_forward == "moe" else "mlp"
