"""Spreads a model over ranks: a part of its parameters each (FSDP2), a part of its experts each.

Parameters stay float32 and are gathered, a layer at a time, in the dtype of the products. Those
that compute in float32 (`keeps_float32`: norms, router, A_log, D, dt_bias, adapters) may not be
gathered with the others, as FSDP has one dtype for a group; and as they are few (but for adapters
well under a thousandth of a model), every rank simply keeps them whole: one small sum of gradients
a step in place of a gather in every layer.

Source: Zhao et al. 2023 (arXiv 2304.11277).
"""

import warnings

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate, Shard

from blackmamba.model import BlackMamba, keeps_float32
from blackmamba.model.layer import Layer
from blackmamba.model.moe import MoE
from blackmamba.train.parallel.config import ParallelConfig
from blackmamba.train.parallel.experts import SpreadExperts
from blackmamba.train.parallel.mesh import Mesh
from blackmamba.train.parallel.shards import Layout, Shards

_CUT = ("fc1", "fc2", "fc1_bias", "fc2_bias")
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
    group, place = mesh.routed.get_group("expert"), mesh.routed.get_local_rank("expert")
    for prefix, module in model.named_modules():
        if not isinstance(module, MoE):
            continue
        module.run_experts = SpreadExperts(group)
        for name in _CUT:
            whole = getattr(module, name)
            if whole is None:
                continue
            layouts[f"{prefix}.{name}"] = Layout(
                whole.shape, mesh.routed, (Replicate(), Replicate(), Shard(0)), mesh.host_routed
            )
            own = whole.detach().chunk(mesh.experts)[place].clone()
            setattr(module, name, nn.Parameter(own, requires_grad=whole.requires_grad))


def _shard(model: BlackMamba, config: ParallelConfig, mesh: Mesh) -> None:
    """Make a group of parameters of every layer, one of its experts if they are spread, and one of
    what is left: embedding and head."""
    # A layer's output may be a view, which nothing writes to.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    kept = {p for name, p in model.named_parameters() if keeps_float32(name)}
    narrow = model.compute_dtype != torch.float32
    policy = MixedPrecisionPolicy(
        param_dtype=model.compute_dtype if narrow else None,
        reduce_dtype=torch.float32 if narrow else None,
        cast_forward_inputs=False,
    )
    offload = CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy()
    dense = mesh.dense if mesh.replicas > 1 else mesh.dense["shard"]
    if mesh.experts > 1:
        kept |= _shard_experts(model, mesh, policy, offload, kept)
    for module in (*(m for m in model.modules() if isinstance(m, Layer)), model):
        fully_shard(
            module, mesh=dense, mp_policy=policy, offload_policy=offload, ignored_params=kept
        )
    for entrance in _ENTRANCES:
        register_fsdp_forward_method(model, entrance)


def _shard_experts(
    model: BlackMamba,
    mesh: Mesh,
    policy: MixedPrecisionPolicy,
    offload: OffloadPolicy,
    kept: set[nn.Parameter],
) -> set[nn.Parameter]:
    """Shard each expert along its rows; or give back those that are on one rank of a copy."""
    routed = [m for m in model.modules() if isinstance(m, MoE)]
    if mesh.routed.size(1) == 1:
        return {p for m in routed for n, p in m.named_parameters() if n in _CUT}
    replicated = mesh.routed.size(0) > 1
    own = mesh.routed["replicate", "shard"] if replicated else mesh.routed["shard"]
    for module in routed:
        fully_shard(
            module,
            mesh=own,
            mp_policy=policy,
            offload_policy=offload,
            ignored_params=kept,
            shard_placement_fn=lambda _: Shard(1),
        )
    return set()
