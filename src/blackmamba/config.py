"""What decides a model's shape, and the typed reading of every configuration in this package.

`ModelConfig` is the whole description of a network; equal configurations build equal shapes.
`from_mapping` and `to_mapping` turn any of the package's configuration dataclasses from and into
plain dictionaries (YAML, JSON): unknown keys and wrong types are errors that name the key, its
value and what would be right.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, cast

from blackmamba.errors import ConfigError

T = TypeVar("T")

Mixer = Literal["mamba", "attention"]
FeedForward = Literal["mlp", "moe"]
RouterKind = Literal["sinkhorn", "softmax", "sigmoid"]
_MIXERS = typing.get_args(Mixer)
_TOO_LARGE = 2.0**63  # for torch's seeds and numpy's sizes
_LARGEST_SIZE = 2**30  # of a model's widths and counts: twice the product of two is below 2^63
_LAYER_GRAMMAR = (
    'a layer is "mamba", "attention", "mlp", "moe", or a parallel pair such as "mamba+moe"; '
    '"moe:16" sets that layer\'s own number of experts'
)


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One entry of the layer pattern, taken apart.

    A layer has a mixer, a feed-forward part, or both side by side (a parallel pair).
    """

    mixer: Mixer | Literal["none"]
    feed_forward: FeedForward | Literal["none"]
    n_experts: int  # 0 unless feed_forward is "moe"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Everything that decides a parameter's shape and what the network computes.

    Sizes (letters as in the package's legend): `d_model` m, `d_inner` d = expand * m, `d_state` n,
    `d_conv` k, `dt_rank` r = ceil(m / 16), `d_expert` f, `n_experts` e, `vocab_size` v.
    """

    layers: tuple[str, ...]
    """The stack from bottom to top, e.g. ("mamba", "moe", "mamba", "moe"); see `layer_specs`."""
    d_model: int
    vocab_size: int
    """Rows of the embedding; token ids are 0 .. vocab_size - 1."""
    unused_vocab: int = 0
    """How many of the last ids no token has (padding of the table); they are never sampled."""

    expand: int = 2
    d_state: int = 16
    d_conv: int = 4
    mamba_norm: bool = False
    """RMSNorms on dt (before dt_proj), B and C of each Mamba layer."""

    n_experts: int = 8
    d_expert: int = 0
    """Width of one expert; needed when a layer is "moe"."""
    d_mlp: int = 0
    """Width of a dense feed-forward layer; needed when a layer is "mlp"."""
    activation: Literal["silu", "gelu"] = "silu"
    """Of experts and dense feed-forward layers; "gelu" is the exact (erf) form."""
    gated: bool = True
    """h = act(gate) * up from one product of twice the width; False: h = act(up)."""

    router: RouterKind = "sinkhorn"
    """How a token's experts are chosen and weighted; docs/routers.md says which to take.

    "sinkhorn", the paper's: by a balanced plan in training and by the largest logits in inference;
    gates are sigmoids. "softmax" and "sigmoid": by the largest scores always, which are the gates.
    """
    experts_per_token: int = 1
    """k: the outputs of so many experts are added up, each times its gate."""
    normalize_gates: bool = False
    """Divide the gates by their sum over the k chosen experts; for k of at least 2."""
    d_shared_expert: int = 0
    """Width of an expert beside the routed ones that every token goes through; 0: none. Several
    shared experts are the same as one of their widths together."""
    balance_loss: float = 0.0
    """Weight of each routed layer's balance loss; for "softmax" and "sigmoid"."""
    balance_scope: Literal["rank", "global"] = "rank"
    """Whose load the balance loss looks at: of the rank's micro-batch, or of all ranks and of the
    step's micro-batches so far."""
    router_z_loss: float = 0.0
    """Weight of each routed layer's z-loss, the mean of logsumexp(logits)^2."""
    selection_bias: bool = False
    """Add a bias to the scores when experts are chosen, not to the gates, and move it against the
    load after every step; for "softmax" and "sigmoid"."""
    selection_bias_rate: float = 1e-3
    """How far it moves; 0: it stays as it is."""
    selection_bias_update: Literal["sign", "error"] = "sign"
    """"sign": by the rate, up or down; "error": by the rate times (1 - load / mean load)."""

    sinkhorn_scale: float = 2.0
    """Training assignment: Sinkhorn runs on exp(sinkhorn_scale * router logits)."""
    sinkhorn_start: Literal["paper", "ones"] = "paper"
    sinkhorn_tolerance: float = 1e-2
    """Largest relative error of a marginal at which the iteration stops."""
    sinkhorn_max_iterations: int = 100
    sinkhorn_scope: Literal["rank", "global"] = "rank"
    """Over which tokens the plan is balanced: the rank's micro-batch, or that of all ranks."""

    n_heads: int = 0
    """Query heads; needed when a layer is "attention"."""
    n_kv_heads: int = 0
    """Key and value heads; divides n_heads."""
    d_head: int = 64
    rope_theta: float = 10_000.0

    linear_bias: bool = False
    """Biases in in_proj, out_proj, feed-forward and attention products.

    The convolution, dt and the router always have one.
    """
    head_bias: bool = False
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    final_norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    residual_dtype: Literal["float32", "compute"] = "float32"
    """dtype of the residual stream: float32, or that of the layers' products."""

    def __post_init__(self) -> None:
        for name in ("d_model", "vocab_size", "expand", "d_state", "d_conv", "n_experts", "d_head",
                     "sinkhorn_max_iterations", "experts_per_token"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value > _LARGEST_SIZE:
                raise ConfigError(f"{field.name}={value}: must be at most {_LARGEST_SIZE}")
        for name in ("norm_eps", "rope_theta", "sinkhorn_scale", "sinkhorn_tolerance"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ConfigError(f"{name}={getattr(self, name)}: must be positive and finite")
        for name in ("balance_loss", "router_z_loss", "selection_bias_rate", "d_shared_expert"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)}: must be finite and at least 0")
        if not self.layers:
            raise ConfigError("layers is empty: a model needs at least one layer")
        if not 0 <= self.unused_vocab < self.vocab_size:
            raise ConfigError(
                f"unused_vocab={self.unused_vocab}: must be 0 .. {self.vocab_size - 1} "
                "(vocab_size - 1)"
            )
        specs = self.layer_specs
        if any(s.feed_forward == "moe" for s in specs) and self.d_expert < 1:
            raise ConfigError(
                f"d_expert={self.d_expert}: layers of kind moe need d_expert of at least 1"
            )
        if any(s.feed_forward == "mlp" for s in specs) and self.d_mlp < 1:
            raise ConfigError(f"d_mlp={self.d_mlp}: layers of kind mlp need d_mlp of at least 1")
        self._check_router()
        if any(s.mixer == "attention" for s in specs):
            if self.n_heads < 1 or self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads:
                raise ConfigError(
                    f"n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}: "
                    "attention layers need both, and n_kv_heads must divide n_heads"
                )
            if self.d_head % 2:
                raise ConfigError(f"d_head={self.d_head}: rotary positions need an even head width")

    def _check_router(self) -> None:
        k = self.experts_per_token
        for text, spec in zip(self.layers, self.layer_specs, strict=True):
            if spec.feed_forward == "moe" and k > spec.n_experts:
                raise ConfigError(
                    f"experts_per_token={k}: layer {text!r} has {spec.n_experts} experts"
                )
        if self.router == "sinkhorn":
            for name in ("balance_loss", "selection_bias"):
                if getattr(self, name):
                    raise ConfigError(
                        f"{name}={getattr(self, name)!r}: router='sinkhorn' balances by its plan; "
                        "this is for router='softmax' or 'sigmoid'"
                    )
        elif self.sinkhorn_scope != "rank":
            raise ConfigError(
                f"sinkhorn_scope={self.sinkhorn_scope!r}: router={self.router!r} has no plan"
            )
        if self.normalize_gates and k == 1:
            raise ConfigError(
                "normalize_gates=True: needs experts_per_token of at least 2; the gate of one "
                "expert would always be 1, and the router would learn nothing"
            )
        if self.balance_scope != "rank" and not self.balance_loss:
            raise ConfigError(f"balance_scope={self.balance_scope!r}: needs a balance_loss above 0")
        if self.selection_bias_update != "sign" and not self.selection_bias:
            raise ConfigError(
                f"selection_bias_update={self.selection_bias_update!r}: needs selection_bias=True"
            )

    @property
    def gates_are_sigmoids(self) -> bool:
        """Whether inference takes the largest logits, each weighted by its sigmoid, as the paper's
        router does: kernels and the released format know of no other gate."""
        return self.router in ("sinkhorn", "sigmoid")

    @property
    def counts_tokens(self) -> bool:
        """Whether routers remember what load they had since the last step of the optimizer."""
        return self.selection_bias or self.balance_scope == "global"

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def dt_rank(self) -> int:
        return math.ceil(self.d_model / 16)

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def n_tokens(self) -> int:
        """How many ids have a token."""
        return self.vocab_size - self.unused_vocab

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """The pattern taken apart, one entry a layer. Raises ConfigError on an unknown layer."""
        return tuple(_parse_layer(i, text, self.n_experts) for i, text in enumerate(self.layers))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationConfig:
    """Which of a model's matrices are stored in few bits, and in how many.

    It changes neither the network nor its shapes: those are `ModelConfig`'s. Router, norms,
    convolution, dt_proj, A_log, D and dt_bias are never quantised.
    """

    bits: Literal[8, 4]
    """Embedding, head and x_proj, where `what` covers them, have 8 either way."""
    group_size: Literal[32, 64, 128]
    """Columns of a row that share a scale."""
    what: Literal["experts", "all"] = "experts"
    """"all": also in_proj, x_proj and out_proj, attention, dense layers, embedding and head."""

    def __post_init__(self) -> None:
        for name, valid in (("bits", (8, 4)), ("group_size", (32, 64, 128)),
                            ("what", ("experts", "all"))):  # fmt: skip
            if getattr(self, name) not in valid:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r}: must be {' or '.join(map(repr, valid))}"
                )


def _parse_layer(index: int, text: str, n_experts: int) -> LayerSpec:
    match = re.fullmatch(
        r"(?:(mamba|attention)(?:\+(?=.))?)?(?:(mlp|moe)(?::([1-9][0-9]{0,8}))?)?", text
    )
    if not text or match is None or (match[1] and match[2] and "+" not in text):
        raise ConfigError(f"layers[{index}]={text!r}: {_LAYER_GRAMMAR}")
    mixer, feed_forward, own_experts = match.groups()
    if own_experts and feed_forward != "moe":
        raise ConfigError(f"layers[{index}]={text!r}: {_LAYER_GRAMMAR}")
    return LayerSpec(
        mixer=cast("Mixer", mixer) if mixer else "none",
        feed_forward=cast("FeedForward", feed_forward) if feed_forward else "none",
        n_experts=(int(own_experts) if own_experts else n_experts) if feed_forward == "moe" else 0,
    )


# ---- typed reading of configurations -------------------------------------------------------


def from_mapping(cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Build the configuration dataclass `cls` from plain data, checking every key and type.

    Numbers written as text ("3e-4", as YAML reads it) count as numbers where one is wanted.

    Args:
        cls: a dataclass whose fields are str, int, float, bool, Literal, tuple or such dataclasses.
        mapping: plain data, as from YAML or JSON.
        where: path of the mapping inside the whole, for messages ("train").
    Raises:
        ConfigError: an unknown key (naming its nearest valid one), a missing key, or a wrong type.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(
            f"{where or 'the configuration'}={mapping!r}: must be a mapping of keys to values"
        )
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # pyright: ignore[reportArgumentType]
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in fields:
            raise ConfigError(f"unknown key {path!r}; {_meant(str(key), fields, hints)}")
        values[key] = _convert(hints[key], value, path)
    missing = [
        name
        for name, f in fields.items()
        if name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where or cls.__name__}: missing {', '.join(missing)}")
    return cls(**values)


def to_mapping(config: Any) -> dict[str, Any]:
    """The plain data, fit for JSON or YAML, that `from_mapping` reads back as an equal object."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}


def nearest(name: str, valid: typing.Iterable[str]) -> str:
    """'did you mean ...?' where something valid is close to `name`, else what is valid."""
    names = [str(v) for v in valid]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"valid are: {', '.join(names)}"


def _meant(key: str, fields: typing.Iterable[str], hints: Mapping[str, Any]) -> str:
    """`nearest`; first of all the same key one level further in, as in train.lr for lr."""
    for name in fields:
        inner = hints[name]
        if dataclasses.is_dataclass(inner) and key in {f.name for f in dataclasses.fields(inner)}:
            return f"did you mean '{name}.{key}'?"
    return nearest(key, fields)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, tuple):
        return [_plain(v) for v in cast("tuple[Any, ...]", value)]
    return value


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, cast(type, hint)) else from_mapping(hint, value, path)  # pyright: ignore
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{path}={value!r}: must be one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ConfigError(f"{path}={value!r}: must be a list")
        items = cast("list[Any]", value)
        return tuple(_convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(items))
    if origin in (typing.Union, types.UnionType):
        raise AssertionError(f"{path}: configuration fields have one type")
    if hint is float:
        return _number(value, path)
    if hint is int:
        number = _number(value, path)
        if not number.is_integer():
            raise ConfigError(f"{path}={value!r}: must be a whole number")
        if abs(number) >= _TOO_LARGE:
            raise ConfigError(f"{path}={value!r}: must be below 2^63")
        return int(value) if isinstance(value, int) else int(number)
    if not isinstance(value, hint):
        names = {bool: "true or false", str: "text"}
        raise ConfigError(f"{path}={value!r}: must be {names.get(hint, str(hint))}")
    return value


def _number(value: Any, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ConfigError(f"{path}={value!r}: must be a number")
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"{path}={value!r}: must be a number") from None
    except OverflowError:
        raise ConfigError(f"{path}: a number of {len(str(value))} digits is too large") from None
