"""What a GPU and its links give: measured where we could, assumed where we say so."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates of one GPU and of what connects it to others."""

    name: str
    memory_bytes: float
    product_flop_s: float
    """A large bfloat16 product: what utilisation is a share of."""
    model_product_flop_s: float
    """Products of the shapes of these models."""
    bytes_s: float
    """Kernels that are bound by memory."""
    scan_s: float
    """The selective scan with 16 states, forward and backward, of a token and channel."""
    optimizer_s: float
    """AdamW with the gradient's norm, clipping and masters, of a parameter."""
    node_gpus: int
    link_bytes_s: float
    """To GPUs of the same node, each way."""
    network_bytes_s: float
    """Of a GPU's own port to other nodes, each way."""
    network_share: float
    """Of these two rates that collectives reach."""


H100 = Machine(
    name="h100",
    memory_bytes=80e9,
    product_flop_s=797e12,  # measured: 8192 x 8192 x 8192
    model_product_flop_s=664e12,  # measured: 624 to 704 at 16k to 32k rows
    bytes_s=2.9e12,  # measured: 96 % of a copy's 3.02e12, by the norm
    scan_s=1.87e-3 / (8 * 2048 * 2304),  # measured: 8 rows of 2,048, 2,304 channels
    optimizer_s=15.6e-3 / 1.4585e9,  # measured: 1.46 G parameters
    node_gpus=8,
    link_bytes_s=450e9,  # assumed: NVLink 4, 900 GB/s both ways together
    network_bytes_s=50e9,  # assumed: 400 Gb/s InfiniBand, a port for each GPU
    network_share=0.8,  # assumed
)

H200 = dataclasses.replace(  # the same processor and links; memory is larger and faster
    H100,
    name="h200",
    memory_bytes=141e9,
    bytes_s=0.96 * 4.25e12,  # measured: a copy's rate, of which the norm reached 96 % on an H100
    scan_s=1.648e-3 / (8 * 2048 * 2304),  # measured
    optimizer_s=11.4e-3 / 1.4585e9,  # measured
)

MACHINES = {machine.name: machine for machine in (H100, H200)}
