"""Which ranks share what.

Ranks are numbered so that neighbours are on one machine, and groups that talk most are neighbours:

    parameters   rank = replica * shards + shard
    experts      rank = (replica * outer + shard) * expert_degree + expert,  shards = outer * degree
    rows         rank = reader * sequence + piece

Every rank has rows of its own, also those that share experts; or pieces of rows, with a sequence.
"""

import dataclasses

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from blackmamba.config import ModelConfig
from blackmamba.errors import ConfigError
from blackmamba.train.parallel.config import ParallelConfig
from blackmamba.train.parallel.ranks import Ranks


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The ranks as a grid, several times over: for the parameters, for the experts' and rows."""

    replicas: int
    """Copies of the model."""
    shards: int
    """Ranks that hold one copy together."""
    experts: int
    """Ranks that share the experts of a layer."""
    sequence: int
    """Ranks that share every row."""
    dense: DeviceMesh
    """(replicate, shard)"""
    routed: DeviceMesh
    """(replicate, shard, expert): with experts spread, fewer ranks share one of them."""
    held: DeviceMesh
    """(replicate, expert): of what each rank of an expert holds whole."""
    rows: DeviceMesh
    """(reader, piece)"""
    host_dense: DeviceMesh
    host_routed: DeviceMesh
    host_held: DeviceMesh
    """The same three, for what is in the host's memory."""


def degrees(config: ParallelConfig, size: int, node_size: int) -> tuple[int, int]:
    """Replicas and shards.

    Raises:
        ConfigError: a degree does not divide the number of ranks.
    """
    shards = {"none": 1, "full": size, "hybrid": config.shard_degree or node_size}[config.shard]
    if size % shards:
        raise ConfigError(f"parallel.shard_degree={shards}: must divide the {size} ranks")
    if size % config.sequence:
        raise ConfigError(f"parallel.sequence={config.sequence}: must divide the {size} ranks")
    if size % config.expert:
        raise ConfigError(f"parallel.expert={config.expert}: must divide the {size} ranks")
    if config.shard == "hybrid" and shards % config.expert:
        raise ConfigError(
            f"parallel.expert={config.expert}: must divide the {shards} ranks that hold a copy"
        )
    return size // shards, shards


def check_fits(config: ParallelConfig, model: ModelConfig, size: int, node_size: int) -> None:
    """See that this model can be spread so.

    Raises:
        ConfigError: names the degree that does not divide, and what it should.
    """
    _, shards = degrees(config, size, node_size)
    specs = zip(model.layers, model.layer_specs, strict=True)
    routed = [(text, spec.n_experts) for text, spec in specs if spec.feed_forward == "moe"]
    if config.sequence > 1 and any(spec.mixer == "attention" for spec in model.layer_specs):
        raise ConfigError(
            f"parallel.sequence={config.sequence}: this model has attention layers, which would "
            "need the keys and values of all ranks; leave it at 1"
        )
    if config.expert == 1:
        return
    if not routed:
        raise ConfigError(f"parallel.expert={config.expert}: this model has no routed layer")
    for text, n_experts in routed:
        if n_experts % config.expert:
            raise ConfigError(
                f"parallel.expert={config.expert}: must divide the {n_experts} experts "
                f"of layer {text!r}"
            )
    outer = max(1, shards // config.expert)
    rows = model.d_expert * (2 if model.gated else 1)
    for name, width in (("d_model", model.d_model), ("the rows of an expert", rows)):
        if width % outer:
            raise ConfigError(
                f"parallel.expert={config.expert}: leaves {outer} ranks to share each expert, "
                f"which must divide {name}, {width}"
            )


def gathered_together(model: ModelConfig) -> list[list[int]]:
    """The layers, by index, whose parameters are one group of FSDP: a mixer and the feed-forward
    layer behind it, as half as many collectives of larger size take less time; others alone."""
    groups: list[list[int]] = []
    for index, spec in enumerate(model.layer_specs):
        before = model.layer_specs[index - 1] if groups and len(groups[-1]) == 1 else None
        if before is not None and before.feed_forward == "none" and spec.mixer == "none":
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def build_mesh(config: ParallelConfig, ranks: Ranks) -> Mesh:
    """The groups of ranks; made by all of them together.

    Raises:
        ConfigError: as `degrees`.
    """
    replicas, shards = degrees(config, ranks.size, ranks.node_size)
    outer = max(1, shards // config.expert)
    shapes = {
        ("replicate", "shard"): (replicas, shards),
        ("replicate", "shard", "expert"): (
            ranks.size // outer // config.expert,
            outer,
            config.expert,
        ),
        ("replicate", "expert"): (ranks.size // config.expert, config.expert),
        ("reader", "piece"): (ranks.size // config.sequence, config.sequence),
    }

    def build(device: str) -> list[DeviceMesh]:
        return [init_device_mesh(device, s, mesh_dim_names=n) for n, s in shapes.items()]

    dense, routed, held, rows = build(ranks.device.type)
    is_host = ranks.device.type == "cpu"
    host_dense, host_routed, host_held = (dense, routed, held) if is_host else build("cpu")[:3]
    return Mesh(
        replicas=replicas,
        shards=shards,
        experts=config.expert,
        sequence=config.sequence,
        dense=dense,
        routed=routed,
        held=held,
        rows=rows,
        host_dense=host_dense,
        host_routed=host_routed,
        host_held=host_held,
    )
