"""What a training run takes on many GPUs, by formula: memory, traffic and time of a step.

Nothing is run or built. docs/scaling.md has the formulas in words, the assumptions, and how far
they are from what was measured on one GPU.

Letters: l sequence, m d_model, d d_inner, n d_state, r dt_rank, k d_conv, f width of an expert,
v vocabulary.
"""

import dataclasses
from typing import Literal, assert_never

from blackmamba.analyse.machines import Machine
from blackmamba.config import LayerSpec, ModelConfig
from blackmamba.errors import ConfigError
from blackmamba.model.size import layer_parameters, parameters, training_flops_per_token
from blackmamba.train.config import RunConfig, TrainConfig
from blackmamba.train.parallel.mesh import check_fits, degrees, gathered_together

_SCAN_SPAN = 16  # tokens between the states that the scan on a GPU keeps
_LOGITS_BYTES = 1 << 29  # of a chunk of logits
_FLOAT = 4
_SCAN_FORWARD = 0.2  # the share of the forward pass in the scan's time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """How a run lies on GPUs."""

    gpus: int
    node_gpus: int
    shards: int = 1
    """Ranks that hold one copy of the parameters together."""
    experts: int = 1
    """Ranks that share the experts of a layer."""
    sequence: int = 1
    """Ranks that share a row."""

    def __post_init__(self) -> None:
        for name in ("gpus", "node_gpus", "shards", "experts", "sequence"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("shards", "experts", "sequence"):
            if self.gpus % getattr(self, name):
                raise ConfigError(f"{name}={getattr(self, name)}: must divide the {self.gpus} GPUs")

    @staticmethod
    def of(config: RunConfig, gpus: int, node_gpus: int) -> "Grid":
        """As `config.parallel` has it on so many GPUs.

        Raises:
            ConfigError: a degree does not divide what it should.
        """
        parallel = config.parallel
        check_fits(parallel, config.model, gpus, node_gpus)
        return Grid(
            gpus=gpus,
            node_gpus=node_gpus,
            shards=degrees(parallel, gpus, node_gpus)[1],
            experts=parallel.expert,
            sequence=parallel.sequence,
        )

    @property
    def expert_shards(self) -> int:
        """Ranks that hold one copy of one rank's experts together."""
        return max(1, self.shards // self.experts)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends in a step, for one purpose."""

    what: str
    sent_bytes: float
    group: int
    """Ranks that exchange them."""
    stride: int
    """How far apart these ranks are."""
    overlaps: bool
    """Whether it runs beside the arithmetic."""

    def seconds(self, machine: Machine, grid: Grid) -> float:
        """At the rate of the slowest link on the way."""
        if self.group == 1:
            return 0.0
        rate = machine.link_bytes_s
        if (self.group - 1) * self.stride >= grid.node_gpus:
            ports = max(1, min(self.group, grid.node_gpus // self.stride))
            rate = min(rate, ports * machine.network_bytes_s)
        return self.sent_bytes / (rate * machine.network_share)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step of a run on every GPU."""

    grid: Grid
    machine: Machine
    tokens: int
    """Of a step, over all GPUs."""
    micro_tokens: int
    """That a GPU reads at once."""
    memory: dict[str, float]
    """Bytes on each GPU, by part, when most is in use."""
    traffic: tuple[Traffic, ...]
    seconds: dict[str, float]
    """Of arithmetic on each GPU, by kind."""
    flops_per_token: int

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def compute_s(self) -> float:
        return sum(self.seconds.values())

    def communication_s(self, *, overlaps: bool) -> float:
        """Of what does, or of what does not run beside arithmetic."""
        return sum(
            t.seconds(self.machine, self.grid) for t in self.traffic if t.overlaps is overlaps
        )

    @property
    def step_s(self) -> tuple[float, float]:
        """With all of it hidden that can be, and with nothing hidden."""
        hidden, open_ = self.communication_s(overlaps=True), self.communication_s(overlaps=False)
        return max(self.compute_s, hidden) + open_, self.compute_s + hidden + open_

    def utilisation(self, step_s: float) -> float:
        """Share of the GPUs' product rate; docs/performance.md."""
        rate = self.machine.product_flop_s * self.grid.gpus
        return self.flops_per_token * self.tokens / step_s / rate


def plan(config: ModelConfig, train: TrainConfig, grid: Grid, machine: Machine) -> Plan:
    """What a step takes.

    Args:
        config: the model.
        train: batch, length, precision and recomputation; "auto" counts as bfloat16 and, without
            shards, float32 masters.
        grid: how it lies on the GPUs.
        machine: what they give.
    Raises:
        ConfigError: the batch or a row does not divide over the ranks; an optimizer of which
            nothing was measured.
    """
    if train.optimizer != "adamw":
        raise ConfigError(
            f"train.optimizer={train.optimizer!r}: the plan knows 'adamw' alone; set that for it"
        )
    readers = grid.gpus // grid.sequence
    if train.batch_size % (readers * train.accumulate):
        raise ConfigError(
            f"train.batch_size={train.batch_size}: must be a multiple of {readers} ranks times "
            f"accumulate={train.accumulate}"
        )
    if train.seq_len % grid.sequence:
        raise ConfigError(
            f"train.seq_len={train.seq_len}: must be a multiple of parallel.sequence="
            f"{grid.sequence}"
        )
    rows = train.batch_size // (readers * train.accumulate)
    micro_tokens = rows * train.seq_len // grid.sequence
    return Plan(
        grid=grid,
        machine=machine,
        tokens=train.batch_size * train.seq_len,
        micro_tokens=micro_tokens,
        memory=_memory(config, train, grid, micro_tokens),
        traffic=_traffic(config, train, grid, rows, micro_tokens),
        seconds=_seconds(config, train, grid, machine, micro_tokens * train.accumulate),
        flops_per_token=training_flops_per_token(config, train.seq_len),
    )


# ---- parameters -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Held:
    """Parameters of a model by how they are kept."""

    dense: int
    """In matrices and vectors of the products' dtype, outside of experts."""
    experts: int
    float32: int
    """That every rank keeps whole: norms, router, A_log, D, dt_bias."""
    root: int
    """Of the dense ones, embedding and head: gathered once for forward and backward pass."""
    largest_group: int
    """Of a layer's or pair's dense part and one rank's share of its experts: what is gathered at
    once."""

    def on_rank(self, grid: Grid) -> float:
        """Of the first two kinds, how many a GPU keeps."""
        experts = self.experts / grid.experts / grid.expert_shards
        return self.dense / grid.shards + experts


def held(config: ModelConfig, experts: int = 1) -> Held:
    """Count them; `experts` is the number of ranks that share those of a layer."""
    float32 = config.d_model * (2 if config.final_norm == "layer_norm" else 1)
    dense = routed = 0
    gathered: list[int] = []
    for spec in config.layer_specs:
        own = _float32_parameters(config, spec)
        in_experts = _expert_parameters(config, spec)
        rest = layer_parameters(config, spec).total - own - in_experts
        float32, dense, routed = float32 + own, dense + rest, routed + in_experts
        gathered.append(rest + in_experts // experts)
    largest = max(sum(gathered[i] for i in group) for group in gathered_together(config))
    root = parameters(config).total - dense - routed - float32
    return Held(dense + root, routed, float32, root, largest)


def _float32_parameters(config: ModelConfig, spec: LayerSpec) -> int:
    m, n, r = config.d_model, config.d_state, config.dt_rank
    norms = m * ((spec.mixer != "none") + (spec.feed_forward != "none"))
    if spec.mixer == "mamba":
        norms += config.d_inner * (n + 2) + ((r + 2 * n) if config.mamba_norm else 0)
    return norms + (m + 1) * spec.n_experts


def _expert_parameters(config: ModelConfig, spec: LayerSpec) -> int:
    m, rows = config.d_model, _rows(config, config.d_expert)
    return spec.n_experts * (rows * m + m * config.d_expert + (rows + m) * config.linear_bias)


def _rows(config: ModelConfig, width: int) -> int:
    """Outputs of the first product of a feed-forward part."""
    return 2 * width if config.gated else width


# ---- memory ---------------------------------------------------------------------------------


def _memory(config: ModelConfig, train: TrainConfig, grid: Grid, tokens: int) -> dict[str, float]:
    """Bytes when the backward pass begins: activations are whole, gradients have yet to come."""
    counts, product = held(config, grid.experts), _product_bytes(train)
    own = counts.on_rank(grid)
    weights, masters = _weights(train, grid)
    found = {
        "parameters": own * (weights + masters) + counts.float32 * _FLOAT,
        "moments": (own + counts.float32) * 2 * _FLOAT,
        "activations": float(tokens * activation_bytes_per_token(config, train)),
        "loss": float(_LOGITS_BYTES + _FLOAT * config.vocab_size * config.d_model),
    }
    if train.ema_decay:
        found["average"] = _FLOAT * (own + counts.float32)
    whole = counts.dense + counts.experts / grid.experts
    if grid.shards > 1:
        group = counts.largest_group
        gathered = product * (2 * group + counts.root)  # one at work, the next on its way
        found["gathered and reduced"] = gathered + (product + _FLOAT) * group
        if train.accumulate > 1:  # summed on the rank until the last micro-batch
            found["gradients"] = whole * _FLOAT
    elif train.accumulate > 1:
        found["gradients"] = whole * _FLOAT
    if grid.shards == 1 and train.weights == "float32" and product != _FLOAT:
        found["cast parameters"] = whole * product
    return found


def _product_bytes(train: TrainConfig) -> int:
    return _FLOAT if train.dtype == "float32" else 2


def _weights(train: TrainConfig, grid: Grid) -> tuple[int, int]:
    """Bytes of a parameter where the products read it, and of its master beside."""
    how = train.weights
    if how == "auto":
        how = "master" if grid.shards == 1 and train.dtype != "float32" else "float32"
    product = _product_bytes(train)
    return {"float32": (_FLOAT, 0), "master": (product, _FLOAT), "stochastic": (product, 0)}[how]


def activation_bytes_per_token(config: ModelConfig, train: TrainConfig) -> int:
    """Bytes that a token keeps for the backward pass: the table of docs/performance.md."""
    product = _product_bytes(train)
    stream = _FLOAT if config.residual_dtype == "float32" else product
    m = config.d_model
    if train.recompute == "layers":  # each layer's two inputs, and one layer whole
        largest = max(_layer_bytes(config, s, product, "none") for s in config.layer_specs)
        return config.n_layers * m * (stream + product) + largest
    return sum(
        m * stream + _layer_bytes(config, spec, product, train.recompute)
        for spec in config.layer_specs
    )


def _layer_bytes(
    config: ModelConfig,
    spec: LayerSpec,
    product: int,
    recompute: Literal["none", "cheap", "layers"],
) -> int:
    """Without the residual stream."""
    m, d, n, r = config.d_model, config.d_inner, config.d_state, config.dt_rank
    cheap, kept = 0, 0  # outputs of norms and convolutions, and the rest
    if spec.mixer == "mamba":
        cheap += m + d
        kept += 2 * d + (r + 2 * n) + d + d  # in_proj, x_proj, dt_proj, scan
        kept += n * d // _SCAN_SPAN
    elif spec.mixer == "attention":
        q, kv = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
        cheap += m
        kept += 2 * q + 2 * kv
    elif spec.mixer != "none":
        assert_never(spec.mixer)
    if spec.feed_forward != "none":
        cheap += m
        kept += _rows(config, _width(config, spec))
    return product * (kept + (cheap if recompute == "none" else 0))


def _width(config: ModelConfig, spec: LayerSpec) -> int:
    """Of all that a token goes through in a feed-forward part."""
    if spec.feed_forward == "mlp":
        return config.d_mlp
    return config.experts_per_token * config.d_expert + config.d_shared_expert


# ---- traffic --------------------------------------------------------------------------------


def _traffic(
    config: ModelConfig, train: TrainConfig, grid: Grid, rows: int, tokens: int
) -> tuple[Traffic, ...]:
    """Of a ring, a rank sends (n - 1) / n of what is gathered or reduced, and twice that of what is
    summed for all."""
    counts, product, steps = held(config), _product_bytes(train), train.accumulate
    found: list[Traffic] = []

    def add(what: str, sent: float, group: int, stride: int, overlaps: bool) -> None:
        if group > 1:
            found.append(Traffic(what, sent, group, stride, overlaps))

    parts = [("", counts.dense, counts.root, grid.shards, 1)]
    if grid.experts == 1:
        parts = [("", counts.dense + counts.experts, counts.root, grid.shards, 1)]
    else:
        own = counts.experts // grid.experts
        parts.append((" of experts", own, 0, grid.expert_shards, grid.experts))
    for whose, count, root, shards, stride in parts:
        share = (shards - 1) / shards
        twice = 2 * count - root  # forward, and all but the root again backward
        add(f"gather parameters{whose}", steps * product * twice * share, shards, stride, True)
        add(f"reduce gradients{whose}", _FLOAT * count * share, shards, stride, True)
        copies = grid.gpus // stride // shards
        summed = 2 * (copies - 1) / copies * _FLOAT * count / shards
        add(f"sum gradients{whose}", summed, copies, stride * shards, shards > 1)
    everyone = 2 * (grid.gpus - 1) / grid.gpus * _FLOAT * counts.float32
    add("sum float32 gradients", everyone, grid.gpus, 1, False)

    n_routed = sum(s.feed_forward == "moe" for s in config.layer_specs)
    away = (grid.experts - 1) / grid.experts * config.experts_per_token
    leaving = away * tokens * config.d_model * product
    # there and back, and so do their gradients
    add("tokens to experts", 4 * n_routed * steps * leaving, grid.experts, 1, False)

    if config.sinkhorn_scope == "global":
        logits = tokens * _FLOAT * sum(s.n_experts for s in config.layer_specs)
        add("logits of all ranks", steps * logits * (grid.gpus - 1), grid.gpus, 1, False)

    n_mamba = sum(s.mixer == "mamba" for s in config.layer_specs)
    numbers = rows * config.d_inner * (2 * config.d_state + 1) * (grid.sequence - 1)
    tails = 2 * rows * config.d_inner * (config.d_conv - 1)
    sent = n_mamba * steps * (_FLOAT * numbers + product * tails)
    add("states of rows", sent, grid.sequence, 1, False)
    return tuple(found)


# ---- time -----------------------------------------------------------------------------------


def _seconds(
    config: ModelConfig, train: TrainConfig, grid: Grid, machine: Machine, tokens: int
) -> dict[str, float]:
    """Of a GPU's share of a step, by kind, in bfloat16."""
    m, d, f, k = config.d_model, config.d_inner, config.d_expert, config.d_conv
    counts, head = held(config, grid.experts), config.d_model * config.vocab_size
    flops = {"products": 6.0 * head, "experts' products": 0.0}
    moved = {"norms": 0.0, "convolution": 0.0, "experts' rows": 0.0, "router": 0.0}  # bytes
    scan = 0.0
    for spec in config.layer_specs:
        expert = _expert_parameters(config, spec) // max(1, spec.n_experts)
        expert *= config.experts_per_token
        dense = layer_parameters(config, spec).active - _float32_parameters(config, spec) - expert
        flops["products"] += 6 * dense
        flops["experts' products"] += 6 * expert
        if spec.feed_forward == "moe":
            moved["experts' rows"] += config.experts_per_token * (
                18 * f + 20 * m
            )  # gathered, activated, scattered; gradients
            moved["router"] += 12 * m
        if spec.mixer == "mamba":
            flops["products"] -= 6 * d * (k + 1)  # the convolution is no product
            moved["convolution"] += 10 * d
            scan += machine.scan_s * d * config.d_state / 16
    norm = m * (28 if config.residual_dtype == "float32" else 16)  # with the residual addition
    moved["norms"] += norm * (config.n_layers + 1)
    moved["loss"] = 5 * config.vocab_size  # in bfloat16, read twice and written once, and caches
    if train.recompute == "layers":  # all but the head once more forward
        flops = {kind: each * 4 / 3 for kind, each in flops.items()}
        flops["products"] -= 2.0 * head
        moved = {kind: each * (1 if kind == "loss" else 4 / 3) for kind, each in moved.items()}
        scan *= 1 + _SCAN_FORWARD
    if grid.sequence > 1:
        scan *= 1 + 2 * _SCAN_FORWARD
    return {
        **{name: tokens * each / machine.model_product_flop_s for name, each in flops.items()},
        "scan": tokens * scan,
        **{name: tokens * each / machine.bytes_s for name, each in moved.items()},
        "optimizer": (counts.on_rank(grid) + counts.float32) * machine.optimizer_s,
    }
