"""Spreads a model over ranks: a part of its parameters each (FSDP2), a part of its experts each.

Parameters stay float32 and are gathered, a layer or a pair of them at a time, in the dtype of the
products. Those that compute in float32 (`keeps_float32`: norms, router, A_log, D, dt_bias,
adapters) may not be gathered with the others, as FSDP has one dtype for a group; and as they are
few (but for adapters well under a thousandth of a model), every rank simply keeps them whole: one
small sum of gradients a step in place of a gather in every layer. Adapters of experts that are
spread lie with them.

Source: Zhao et al. 2023 (arXiv 2304.11277).
"""

import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate, Shard

from blackmamba.model import BlackMamba, keeps_float32
from blackmamba.model.moe import MoE
from blackmamba.train.parallel.config import ParallelConfig
from blackmamba.train.parallel.experts import SpreadExperts
from blackmamba.train.parallel.mesh import Mesh, gathered_together
from blackmamba.train.parallel.shards import Layout, Shards

_ENTRANCES = (
    "loss",
    "losses",
    "prefill",
)  # what training calls of a model, in the place of `forward`


def spread(model: BlackMamba, config: ParallelConfig, mesh: Mesh) -> Shards:
    """Leave this rank its part of a model, which all ranks have built alike, in place.

    Args:
        model: whole, on the device of this rank.
        config: says how.
        mesh: the groups of ranks.
    Returns:
        What this rank holds.
    """
    layouts: dict[str, Layout] = {}
    wholes = {name: p.shape for name, p in model.named_parameters()}
    if mesh.experts > 1:
        _cut_experts(model, mesh, layouts)
    if config.shard != "none":
        _shard(model, config, mesh)
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            continue
        if name in layouts:  # cut along a second dimension, too
            placements = (Replicate(), Shard(1), Shard(0))
            layouts[name] = Layout(wholes[name], mesh.routed, placements, mesh.host_routed)
        else:
            layouts[name] = Layout(
                wholes[name], mesh.dense, (Replicate(), Shard(0)), mesh.host_dense
            )
    return Shards(model, layouts, mesh.replicas * mesh.shards)


def _cut_experts(model: BlackMamba, mesh: Mesh, layouts: dict[str, Layout]) -> None:
    """Leave each routed layer the experts of this rank."""
    group, place = mesh.held.get_group("expert"), mesh.held.get_local_rank("expert")
    for prefix, module in model.named_modules():
        if not isinstance(module, MoE):
            continue
        module.spread_experts = SpreadExperts(group)
        for name, whole in stacked(module).items():
            path, _, last = name.rpartition(".")
            layouts[f"{prefix}.{name}"] = Layout(
                whole.shape, mesh.held, (Replicate(), Shard(0)), mesh.host_held
            )
            own = whole.detach().chunk(mesh.experts)[place].clone()
            own = nn.Parameter(own, requires_grad=whole.requires_grad)
            setattr(module.get_submodule(path), last, own)


def stacked(module: MoE) -> dict[str, nn.Parameter]:
    """The parameters that have a part for each expert, those of adapters too."""
    named = module.named_parameters()
    return {name: p for name, p in named if name.split(".")[0] not in ("router", "shared")}


def _shard(model: BlackMamba, config: ParallelConfig, mesh: Mesh) -> None:
    """Make a group of parameters of every layer or pair of layers, one of its experts if they are
    spread, and one of what is left: embedding and head."""
    # A layer's output may be a view, which nothing writes to.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    kept = {p for name, p in model.named_parameters() if keeps_float32(name)}
    narrow = model.compute_dtype != torch.float32
    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=model.compute_dtype if narrow else None,
            reduce_dtype=torch.float32 if narrow else None,
            cast_forward_inputs=False,
        ),
        "offload_policy": CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy(),
        "ignored_params": kept,
    }
    dense = mesh.dense if mesh.replicas > 1 else mesh.dense["shard"]
    if mesh.experts > 1:
        _shard_experts(model, mesh, dense, options)
    for group in gathered_together(model.config):
        fully_shard([model.layers[i] for i in group], mesh=dense, **options)
    fully_shard(model, mesh=dense, **options)
    for entrance in _ENTRANCES:
        register_fsdp_forward_method(model, entrance)


def _shard_experts(
    model: BlackMamba, mesh: Mesh, dense: DeviceMesh, options: dict[str, Any]
) -> None:
    """Shard each expert along its rows, over the ranks that have it; or none if that is one."""
    routed = [m for m in model.modules() if isinstance(m, MoE)]
    if mesh.routed.size(1) == 1:
        options["ignored_params"] |= {p for m in routed for p in stacked(m).values()}
        return
    own = mesh.routed["replicate", "shard"] if mesh.routed.size(0) > 1 else mesh.routed["shard"]
    for module in routed:
        if module.shared is not None:  # lies as what is no expert does
            fully_shard(module.shared, mesh=dense, **options)
        fully_shard(module, mesh=own, shard_placement_fn=lambda _: Shard(1), **options)
