"""How large a model is, in closed form from its configuration: parameters, memory, arithmetic.

Letters: m d_model, d d_inner, n d_state, r dt_rank, k d_conv, f width, e experts, v vocabulary.

Source: derived from the layers in this folder; the tests compare with built models. FLOPs count a
multiply-add as 2 and an exponential as 1.
"""

import dataclasses
from typing import assert_never

from blackmamba.config import LayerSpec, ModelConfig


@dataclasses.dataclass(frozen=True)
class Count:
    """Parameters of a part: all that are stored, and those that one token uses."""

    total: int
    active: int

    def __add__(self, other: "Count") -> "Count":
        return Count(self.total + other.total, self.active + other.active)


def parameters(config: ModelConfig) -> Count:
    """Parameters of the whole model; the embedding counts as active, once if it is tied."""
    count = Count(0, 0)
    for spec in config.layer_specs:
        count += layer_parameters(config, spec)
    m, v = config.d_model, config.vocab_size
    rest = v * m * (1 if config.tie_embeddings else 2)
    rest += m * (2 if config.final_norm == "layer_norm" else 1)
    rest += v if config.head_bias else 0
    return count + Count(rest, rest)


def layer_parameters(config: ModelConfig, spec: LayerSpec) -> Count:
    """Parameters of one layer with its norms."""
    m, bias = config.d_model, config.linear_bias
    shared = m * ((spec.mixer != "none") + (spec.feed_forward != "none"))  # norms
    if spec.mixer == "mamba":
        d, n, r, k = config.d_inner, config.d_state, config.dt_rank, config.d_conv
        shared += 2 * d * m + (k + 1) * d + (r + 2 * n) * d + r * d + d + n * d + d + d * m
        shared += (2 * d + m) if bias else 0
        shared += (r + 2 * n) if config.mamba_norm else 0
    elif spec.mixer == "attention":
        q, kv = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
        shared += 2 * q * m + 2 * kv * m
        shared += (q + 2 * kv + m) if bias else 0
    elif spec.mixer != "none":
        assert_never(spec.mixer)
    if spec.feed_forward == "mlp":
        dense = _feed_forward(config, config.d_mlp)
        return Count(shared + dense, shared + dense)
    if spec.feed_forward == "moe":
        shared += (m + 1) * spec.n_experts  # router; a selection bias is no parameter
        shared += _feed_forward(config, config.d_shared_expert)
        expert = _feed_forward(config, config.d_expert)
        active = config.experts_per_token * expert
        return Count(shared + spec.n_experts * expert, shared + active)
    return Count(shared, shared)


def _feed_forward(config: ModelConfig, width: int) -> int:
    """Parameters of a dense layer or expert; a shared expert of width 0 is none."""
    m, rows = config.d_model, (2 * width if config.gated else width)
    biases = (rows + m) if config.linear_bias and width else 0
    return rows * m + width * m + biases


def state_bytes(config: ModelConfig, context: int, product_bytes: int = 4) -> int:
    """Bytes that one sequence's memory takes after `context` tokens.

    Args:
        config: the model; Mamba layers take the same at any context.
        context: tokens read so far.
        product_bytes: bytes per number of the compute dtype (the SSM state is float32).
    """
    total = 0
    for spec in config.layer_specs:
        if spec.mixer == "mamba":
            total += config.d_inner * (config.d_state * 4 + (config.d_conv - 1) * product_bytes)
        elif spec.mixer == "attention":
            total += 2 * context * config.n_kv_heads * config.d_head * product_bytes + 8
        elif spec.mixer != "none":
            assert_never(spec.mixer)
    return total


@dataclasses.dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one token, by what they are spent on."""

    products: int = 0
    """Matrix products: projections, experts, router, head."""
    convolution: int = 0
    scan: int = 0
    scores: int = 0
    """Attention's products with keys and values."""

    @property
    def total(self) -> int:
        return self.products + self.convolution + self.scan + self.scores

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.products + other.products,
            self.convolution + other.convolution,
            self.scan + other.scan,
            self.scores + other.scores,
        )


def forward_flops(config: ModelConfig, context: int) -> Flops:
    """To read one token when `context` tokens are before it."""
    total = Flops(products=2 * config.d_model * config.vocab_size)  # head
    for spec in config.layer_specs:
        total += layer_flops(config, spec, context)
    return total


def flops_per_token(config: ModelConfig, context: int) -> int:
    """Forward FLOPs to read one token when `context` tokens are before it.

    Training costs about three times as much: the backward pass has two products for each of these.
    """
    return forward_flops(config, context).total


def training_flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """FLOPs that training one token takes at least: what a utilisation is a share of.

    6 for each active parameter (a multiply-add forward, two backward), three times what the scan of
    each Mamba layer and the scores of each attention layer take forward. A table of embeddings that
    no product reads does not count; neither does anything that is computed twice to save memory.

    Args:
        config: the model.
        seq_len: tokens of a row; only attention layers depend on it.
    Source:
        6 N: Kaplan et al. 2020 (arXiv 2001.08361), section 2.1.
    """
    active = parameters(config).active
    if not config.tie_embeddings:
        active -= config.vocab_size * config.d_model
    extra = 0
    for spec in config.layer_specs:
        if spec.mixer == "mamba":
            extra += _scan_flops(config)
        elif spec.mixer == "attention":  # a token sees half of its row
            extra += 2 * (seq_len + 1) * config.n_heads * config.d_head
        elif spec.mixer != "none":
            assert_never(spec.mixer)
    return 6 * active + 3 * extra


def prompt_flops(config: ModelConfig, seq_len: int) -> int:
    """Forward FLOPs that reading a row takes at least, if its memory is kept and the logits of its
    last token are asked for.

    Behind the last mixer that is one token; of the last mixer, if it is a Mamba layer, all tokens
    need what their state depends on, and one needs z, C and what is behind the scan.

    Args:
        config: the model.
        seq_len: tokens of the row.
    """
    specs = config.layer_specs
    mixing = [i for i, spec in enumerate(specs) if spec.mixer != "none"]
    last = mixing[-1] if mixing else -1
    total = 2 * config.d_model * config.vocab_size
    for i, spec in enumerate(specs):
        of_token = layer_flops(config, spec, seq_len // 2).total
        total += (seq_len if i < last else 1) * of_token
        if i == last:
            total += (seq_len - 1) * _remembering_flops(config, spec, seq_len // 2)
    return total


def _remembering_flops(config: ModelConfig, spec: LayerSpec, context: int) -> int:
    """Of one token, to keep the mixer's memory alone."""
    m, d, n, r = config.d_model, config.d_inner, config.d_state, config.dt_rank
    if spec.mixer != "mamba":
        return layer_flops(config, spec, context).total
    products = 2 * m * d + 2 * d * (r + n) + 2 * r * d
    return products + 2 * config.d_conv * d + 6 * d * n + d


def _scan_flops(config: ModelConfig) -> int:
    """exp(dt A) 2, decay and drive 2 + 2, C.h 2 for each of d n; dt x, D x, gate for d."""
    return 8 * config.d_inner * config.d_state + 5 * config.d_inner


def layer_flops(config: ModelConfig, spec: LayerSpec, context: int) -> Flops:
    """Forward FLOPs of one layer for one token; norms and activations do not count."""
    m = config.d_model
    flops = Flops()
    if spec.mixer == "mamba":
        d, n, r, k = config.d_inner, config.d_state, config.dt_rank, config.d_conv
        flops += Flops(
            products=2 * m * 2 * d + 2 * d * (r + 2 * n) + 2 * r * d + 2 * d * m,
            convolution=2 * k * d,
            scan=_scan_flops(config),
        )
    elif spec.mixer == "attention":
        q, kv = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
        flops += Flops(products=2 * m * (2 * q + 2 * kv), scores=4 * (context + 1) * q)
    elif spec.mixer != "none":
        assert_never(spec.mixer)
    matrices = 3 if config.gated else 2
    if spec.feed_forward == "mlp":
        flops += Flops(products=2 * m * config.d_mlp * matrices)
    if spec.feed_forward == "moe":
        widths = config.experts_per_token * config.d_expert + config.d_shared_expert
        flops += Flops(products=2 * m * widths * matrices + 2 * m * spec.n_experts)
    return flops
