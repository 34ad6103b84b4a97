"""How a run is spread over processes."""

import dataclasses
import math
from typing import Literal

from blackmamba.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the model is spread over the ranks; each reads its own rows of every batch.

    Nothing here changes what is learnt, so a resumed run may have other values and another number
    of ranks. How many ranks there are is for torchrun to say.
    """

    shard: Literal["none", "full", "hybrid"] = "none"
    """"none": every rank holds all parameters. "full": each holds an equal part of parameters,
    gradients and moments (FSDP2), and a layer is gathered while it is computed. "hybrid": the
    ranks of a node hold one copy together, every node its own."""
    shard_degree: int = 0
    """For "hybrid": how many ranks hold a copy together; 0: those of a node."""
    expert: int = 1
    """How many ranks share the experts of a layer; tokens travel to them. Divides the number of
    experts of every routed layer."""
    sequence: int = 1
    """How many ranks read the same rows, each its piece of every one: for rows too long for one
    rank. Mamba layers hand on what they remember, exactly; Sinkhorn and the balance losses of a
    rank see its pieces. Divides train.seq_len; no attention layers."""
    cpu_offload: bool = False
    """Keep the parts and the optimizer in the host's memory; needs a shard other than "none"."""
    timeout_s: float = 600.0
    """A rank that the others have waited for this long ends the run."""

    def __post_init__(self) -> None:
        if self.expert < 1:
            raise ConfigError(f"parallel.expert={self.expert}: must be at least 1")
        if self.sequence < 1:
            raise ConfigError(f"parallel.sequence={self.sequence}: must be at least 1")
        if self.shard_degree < 0:
            raise ConfigError(f"parallel.shard_degree={self.shard_degree}: must be at least 0")
        if self.shard_degree and self.shard != "hybrid":
            raise ConfigError(
                f"parallel.shard_degree={self.shard_degree}: is for shard='hybrid', "
                f"not shard={self.shard!r}"
            )
        if self.cpu_offload and self.shard == "none":
            raise ConfigError("parallel.cpu_offload=true: needs shard='full' or 'hybrid'")
        if not 1 <= self.timeout_s < math.inf:
            raise ConfigError(
                f"parallel.timeout_s={self.timeout_s}: must be at least 1, and finite"
            )
